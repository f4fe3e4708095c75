"""Where the contract is tested: a broker, links to it, and a network that can be taken away."""

import asyncio
import socket
import struct
from contextlib import suppress
from dataclasses import replace
from typing import Protocol

from broker.invitation import Access
from broker.link import Delivery, Link, Outgoing
from broker.rabbit import connect
from broker.topology import Binding, Exchange, Queue, Topology
from tests.memory import MemoryBroker, MemoryLink


class Ground(Protocol):
    async def link(self) -> Link: ...

    def cut(self) -> None:
        """Every connection is lost; new ones are let through."""

    def leave(self) -> None:
        """Every connection is lost, and none is let through until `come_back`."""

    def come_back(self) -> None: ...

    async def close(self) -> None: ...


class MemoryGround:
    def __init__(self) -> None:
        self._broker = MemoryBroker()

    async def link(self) -> MemoryLink:
        return MemoryLink(self._broker)

    def cut(self) -> None:
        self._broker.pause()
        self._broker.resume()

    def leave(self) -> None:
        self._broker.pause()

    def come_back(self) -> None:
        self._broker.resume()

    async def close(self) -> None:
        self._broker.pause()


class RabbitGround:
    def __init__(self, access: Access) -> None:
        self._access = access
        self._links: list[Link] = []
        assert access.url.host is not None
        assert access.url.port is not None
        self.proxy = Proxy(access.url.host, access.url.port)

    async def link(self, heartbeat_s: int = 30) -> Link:
        if not self.proxy.port:
            await self.proxy.start()
        self._links.append(await connect(self.access, name="contract", heartbeat_s=heartbeat_s))
        return self._links[-1]

    @property
    def access(self) -> Access:
        """Through the proxy."""
        return replace(self._access, url=self._access.url.with_port(self.proxy.port))

    def cut(self) -> None:
        self.proxy.cut()

    def leave(self) -> None:
        self.proxy.refuses = True
        self.proxy.cut()

    def come_back(self) -> None:
        self.proxy.refuses = False

    async def close(self) -> None:
        await asyncio.gather(*(link.close() for link in self._links))
        await self.proxy.close()


class Proxy:
    """Hands bytes on, until told not to: by a reset (`cut`), at the door (`refuses`), or by silence (`flow`)."""

    def __init__(self, host: str, port: int) -> None:
        self.port = 0
        self.refuses = False
        self.flow = asyncio.Event()
        self.flow.set()
        self._to = (host, port)
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._meet, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    def cut(self) -> None:
        for writer in self._writers:
            raw = writer.get_extra_info("socket")
            with suppress(OSError):  # closed already
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        self.cut()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _meet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.refuses:
            writer.transport.abort()
            return
        try:
            there, back = await asyncio.open_connection(*self._to)
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, back}
        try:
            with suppress(OSError):
                async with asyncio.TaskGroup() as pumps:
                    one = pumps.create_task(self._pump(reader, back))
                    other = pumps.create_task(self._pump(there, writer))
                    await asyncio.wait({one, other}, return_when=asyncio.FIRST_COMPLETED)
                    one.cancel()
                    other.cancel()
        finally:
            self._writers -= {writer, back}
            writer.transport.abort()
            back.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(256 * 1024):
                await self.flow.wait()
                writer.write(data)
                await writer.drain()


def queue(name: str, **arguments: int | str) -> Queue:
    limits = {"x-" + key.replace("_", "-"): value for key, value in arguments.items()}
    return Queue(name, {"x-queue-type": "classic", **limits})


def direct(*queues: Queue) -> Topology:
    """The exchange `post`, which leads to each of the queues by its name."""
    bindings = tuple(Binding("post", each.name, each.name) for each in queues)
    return Topology((Exchange("post", "direct"),), queues, bindings)


def to(name: str, body: bytes = b"") -> Outgoing:
    return Outgoing("post", (name,), body)


async def take(link: Link, name: str, count: int) -> list[bytes]:
    """The bodies of the next `count` deliveries, acked."""
    bodies = []
    async with asyncio.timeout(20), link.consume(name) as deliveries:
        for _ in range(count):
            delivery = await anext(deliveries)
            bodies.append(bytes(delivery.body))
            await delivery.ack()
    return bodies


async def hold(link: Link, name: str, count: int) -> list[Delivery]:
    """Deliveries that were taken and given back unacked."""
    async with asyncio.timeout(20), link.consume(name) as deliveries:
        return [await anext(deliveries) for _ in range(count)]
