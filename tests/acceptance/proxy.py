"""A network that fails: on loopback, a line between each party and the broker that is cut, stopped, halved or slowed.

Knows bytes, both ways, and how they are kept from arriving. Does not know AMQP. All lines of a `Network` live on one
event loop in a thread of its own; the test, which is not asynchronous, calls in from outside. A line takes no more
memory than the buffers of its streams, because what is not passed on is not read either.
"""

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

CHUNK = 1 << 16
CALL_S = 10.0
WAYS: tuple["Way", "Way"] = ("up", "down")
RESET = struct.pack("ii", 1, 0)
"""SO_LINGER that makes of a close a reset."""

Way = Literal["up", "down"]
_Result = TypeVar("_Result")


@dataclass(slots=True, eq=False)
class Wire:
    """One connection: the party's end of it and the broker's, and what carries bytes between them."""

    party: asyncio.StreamWriter
    broker: asyncio.StreamWriter
    carriers: tuple[asyncio.Task[None], ...] = ()

    def drop(self, *ends: asyncio.StreamWriter) -> None:
        """Reset these ends; nothing is carried any more."""
        for carrier in self.carriers:
            carrier.cancel()
        for end in ends:
            reset(end)


class Line:
    """All connections of one party; made by `Network.line`. Every method is called from the test's thread.

    Attributes:
        port: where the party finds the broker.
        carried: bytes that were passed on, each way, since the beginning.
        opened: connections that reached the broker, since the beginning.
    """

    def __init__(self, network: "Network", target: int) -> None:
        self.port = 0
        self.carried: dict[Way, int] = {"up": 0, "down": 0}
        self.opened = 0
        self._network = network
        self._target = target
        self._rate: float | None = None
        self._flows: dict[Way, asyncio.Event] = {}
        self._wires: set[Wire] = set()
        self._left: list[asyncio.StreamWriter] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    # -- what the test does to it -------------------------------------------------------------------------------

    def stop(self, *ways: Way) -> None:
        """Nothing gets through any more these ways (both, if none is given); nobody is told."""

        def now() -> None:
            for way in ways or WAYS:
                self._flows[way].clear()

        self._network.do(now)

    def go(self) -> None:
        """Everything gets through again, first what was held up."""

        def now() -> None:
            for flow in self._flows.values():
                flow.set()

        self._network.do(now)

    def slow(self, bytes_s: float | None) -> None:
        """Let so many bytes a second through each way of each connection; None: as many as come."""
        self._rate = bytes_s

    def cut(self) -> int:
        """Reset all connections, at both ends; how many."""

        def now() -> int:
            wires = list(self._wires)
            for wire in wires:
                wire.drop(wire.party, wire.broker)
            return len(wires)

        return self._network.do(now)

    def halve(self, gone: Literal["party", "broker"]) -> int:
        """Reset only one end of all connections; the other one is open, and nobody will ever answer it. How many."""

        def now() -> int:
            wires = list(self._wires)
            for wire in wires:
                wire.drop(wire.party if gone == "party" else wire.broker)
                self._left.append(wire.broker if gone == "party" else wire.party)
            return len(wires)

        return self._network.do(now)

    # -- on the loop --------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Listen."""
        self._flows = {way: asyncio.Event() for way in WAYS}
        for flow in self._flows.values():
            flow.set()
        self._server = await asyncio.start_server(self._take, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        """Reset what is left."""
        assert self._server is not None
        self._server.close()
        for wire in self._wires:
            wire.drop(wire.party, wire.broker)
        for end in self._left:
            reset(end)
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self._flows["up"].wait()
            answers, broker = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            reset(writer)
            return
        except asyncio.CancelledError:
            reset(writer)
            raise
        self.opened += 1
        wire = Wire(writer, broker)
        carry = asyncio.get_running_loop().create_task
        wire.carriers = (carry(self._carry(reader, broker, "up")), carry(self._carry(answers, writer, "down")))
        self._wires.add(wire)
        try:
            await asyncio.wait(wire.carriers)
        finally:
            self._wires.discard(wire)
            for carrier in wire.carriers:
                carrier.cancel()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: Way) -> None:
        """Pass on one way, until there is an end; the end is passed on, too, but not through a stopped line."""
        with contextlib.suppress(OSError):
            while data := await reader.read(CHUNK):
                await self._flows[way].wait()
                writer.write(data)
                await writer.drain()
                self.carried[way] += len(data)
                if self._rate is not None:
                    await asyncio.sleep(len(data) / self._rate)
        await self._flows[way].wait()
        writer.close()


class Network:
    """Lines to one broker; a context manager."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._lines: list[Line] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="network", daemon=True)

    def line(self) -> Line:
        """A line for one more party."""
        line = Line(self, self._target)
        self._wait(line.open())
        self._lines.append(line)
        return line

    def do(self, what: Callable[[], _Result]) -> _Result:
        """Do something on the loop."""

        async def there() -> _Result:
            return what()

        return self._wait(there())

    def _wait(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(CALL_S)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, why: BaseException | None, at: TracebackType | None) -> None:
        for line in self._lines:
            self._wait(line.close())
        self._wait(asyncio.sleep(0))  # transports close in the turn of the loop after
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CALL_S)
        self._loop.close()


def reset(writer: asyncio.StreamWriter) -> None:
    """Close with a reset, as a machine does that has been switched on again."""
    own = writer.get_extra_info("socket")
    with contextlib.suppress(OSError):
        own.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    writer.transport.abort()
