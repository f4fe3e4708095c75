"""The daemon's ends of two sockets: one to the guard (`guard.py`), one to the training process that it keeps.

Knows how both are started, asked and ended, and puts into words how a training process ended. Does not know what is
asked of it (`training.py`).
"""

import asyncio
import os
import signal
import socket
import sys
from contextlib import suppress
from typing import Any, cast

import msgpack

from broker.errors import LearnerFailed
from workers.work import CLOSED, bytes_of

START, KILL = b"s", b"k"
END_S = 5.0  # a killed process is gone at once, unless the kernel holds it, and then no waiting helps
GONE = "the training process is gone, with its guard or in the midst of an answer; the next task starts another."
SIGNALS: dict[int, str] = {
    signal.SIGKILL: "killed",
    signal.SIGSEGV: "a crash in native code",
    signal.SIGABRT: "aborted by native code",
}


class Line(asyncio.Protocol):
    """The daemon's end of the socket: one question at a time, and its answer or the reason why none will come."""

    def __init__(self) -> None:
        self.pid: int | None = None
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._transport: asyncio.WriteTransport | None = None
        self._arrived = msgpack.Unpacker()
        self._waiting: asyncio.Future[dict[str, Any]] | None = None
        self._failed = ""

    def ask(self, request: dict[str, Any]) -> "asyncio.Future[dict[str, Any]]":
        """Send a question; the answer to come, which fails with LearnerFailed."""
        assert self._transport is not None
        self._waiting = asyncio.get_running_loop().create_future()
        if self._failed or self._transport.is_closing():  # it has died while idle, or its guard has
            self._fail(GONE)
        else:
            self._transport.write(bytes_of(request))
        return self._waiting

    def close(self) -> None:
        """Hang up."""
        assert self._transport is not None
        self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.Protocol`."""
        self._transport = cast(asyncio.WriteTransport, transport)  # uvloop's is none by name

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        self._arrived.feed(data)
        for message in self._arrived:
            self._take(message)

    def connection_lost(self, _why: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        self._fail(GONE)
        if not self.ended.done():
            self.ended.set_result(None)

    def _take(self, message: dict[str, Any]) -> None:
        if "pid" in message:
            self.pid = message["pid"]
        elif "ended" in message:
            self._fail(_last_words(message["ended"], for_memory=message["memory"]))
            self.ended.set_result(None)
        elif self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(message)

    def _fail(self, why: str) -> None:
        """No more answers will come."""
        self._failed = self._failed or why
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_exception(LearnerFailed(self._failed))
            self._waiting.exception()  # looked at: whoever waited may have gone, and need not hear of it


class Guard:
    """The guard as the daemon sees it, started when first needed.

    Args:
        threads: how many threads torch computes with.
        memory_bytes: how much memory a training process may have; 0 for whatever the machine has.
    """

    def __init__(self, threads: int, memory_bytes: int) -> None:
        self._threads = threads
        self._memory_bytes = memory_bytes
        self._process: asyncio.subprocess.Process | None = None
        self._control: socket.socket | None = None

    async def fork(self) -> Line:
        """A new training process, once the guard gets round to it.

        Raises:
            OSError: the system has no room for it.
        """
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                try:
                    self._order(START, theirs.fileno())
                except OSError:  # there is no guard yet, or no longer
                    await self.leave()
                    await self._begin()
                    self._order(START, theirs.fileno())
            _, line = await asyncio.get_running_loop().create_connection(Line, sock=ours)
        except BaseException:
            ours.close()  # which also ends a child that is there already
            raise
        return line

    async def kill(self, child: Line) -> None:
        """End a training process and all it has started."""
        with suppress(OSError):
            self._order(KILL)
        await asyncio.wait([child.ended], timeout=END_S)
        if not child.ended.done():
            await self.leave()

    async def leave(self) -> None:
        """End the guard, and whatever it guards."""
        process, self._process = self._process, None
        if self._control is not None:
            self._control.close()
            self._control = None
        if process is None:
            return
        with suppress(ProcessLookupError):
            process.terminate()  # heeded only while it loads torch
        ended = asyncio.ensure_future(process.wait())
        await asyncio.wait([ended], timeout=END_S)
        if not ended.done():
            process.kill()
            await asyncio.wait([ended], timeout=END_S)
        ended.cancel()

    async def _begin(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._control = ours
            words, how = self._program(theirs)
            self._process = await asyncio.create_subprocess_exec(*words, **how)

    def _program(self, link: socket.socket) -> tuple[list[str], dict[str, Any]]:
        """The guard's command line, and how it is started with its end of the control socket."""
        # -P: the folder the daemon was started in must not hide installed modules
        words = [sys.executable, "-P", "-m", "workers.guard", str(link.fileno()), str(self._memory_bytes)]
        return words, {
            "stdin": asyncio.subprocess.DEVNULL, "pass_fds": (link.fileno(),), "start_new_session": True,
            "env": {**os.environ, "OMP_NUM_THREADS": str(self._threads)},
        }  # fmt: skip

    def _order(self, word: bytes, *links: int) -> None:
        if self._control is None:
            raise ConnectionError
        socket.send_fds(self._control, [word], links)


def _last_words(status: int, *, for_memory: bool) -> str:
    if for_memory:
        return "the training process ran out of memory, and the kernel killed it; the next task starts a new one."
    if status == CLOSED:
        return "the training process has lost its socket: the learner must not close files that are not its own."
    if status >= 0:
        return f"the training process ended by itself with status {status}: the learner must return, not exit."
    name = SIGNALS.get(-status) or signal.strsignal(-status)
    return f"the training process ended with signal {-status} ({name}); the next task starts a new one."
