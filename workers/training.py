"""The daemon's side of training: a child process that holds the learner and its data, and does one task at a time.

Knows how to start that process, ask it, and be rid of it: the daemon survives its crash, the kernel's out-of-memory
killer, and a task that is cancelled. Does not know the broker, nor torch, which only the child imports (`child.py`).
"""

import asyncio
import os
import signal
import socket
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, cast

import msgpack

from broker.errors import LearnerFailed, UsageError
from broker.formats import format_of
from broker.tensors import Layout, TensorSpec
from workers.residuals import Residual
from workers.spool import Slot, Spool
from workers.work import Done, Work

LENGTH_BYTES = 4
END_S = 5.0  # a killed process is gone at once, unless the kernel holds it, and then no waiting helps
LAST_WORDS_S = 0.2  # of a process that is gone, what it had written is in the socket already
SIGNALS: dict[int, str] = {
    signal.SIGKILL: "killed: out of memory?",
    signal.SIGSEGV: "a crash in native code",
    signal.SIGABRT: "aborted by native code",
}


class Trainer:
    """A learner in a process of its own, which is started when needed, with the data of all who train there.

    One thing at a time: calls wait for each other, first come, first served. A child that died or was killed is
    replaced by the next call.

    Args:
        learner: as for `workers.learner.load`.
        spool: where models lie that both processes see.
        threads: how many threads torch computes with; the results depend on it, so it is not the machine's to choose.

    Attributes:
        spool: as given.
        pid: the process, while there is one.
        ready_s: how long it took to load the learner, and since then the data.
        patience_s: how long a task that nobody waits for any more may go on, before the process is killed: as long
            as starting another one would take, so that either choice costs at most twice what the better one does.
    """

    def __init__(self, learner: str, spool: Spool, *, threads: int = 1) -> None:
        self.pid: int | None = None
        self.ready_s = 0.0
        self.patience_s = 0.0
        self._opening = {"do": "open", "learner": learner, "threads": threads}
        self.spool = spool
        self._threads = threads
        self._child: _Child | None = None
        self._layout = Layout(())
        self._turn = asyncio.Lock()
        self._straggler: asyncio.Task[None] | None = None

    async def start(self, source: str | None = None) -> Layout:
        """Start the process, load the learner, and say which tensors its model has; load a source's data, if given.

        Takes as long as the learner takes; cancel it to give up.

        Raises:
            UsageError: the learner or its data cannot be loaded, and why.
            LearnerFailed: the process died over it.
        """
        async with self._turn:
            await self._open()
            if source is not None:
                await self._ask({"do": "load", "source": source})
            return self._layout

    async def run(
        self, work: Work, layout: Layout, *, source: str, weights: Slot, residual: Residual | None = None
    ) -> Done:
        """Do one task with a source's data, which is loaded if it has not been yet.

        Cancelling returns at once; the process is killed if the task then takes longer than `patience_s`.

        Args:
            work: what to do.
            layout: which tensors `weights` holds.
            source: what the learner's data() is given.
            weights: the version's raw bytes; they are only read.
            residual: the files of what the format leaves out; None to let it be lost.

        Raises:
            LearnerFailed: the learner raised or returned nonsense, its data cannot be loaded, there is no room for
                the delta, the process died, or it could not be started anew.
        """
        async with self._turn:
            try:
                await self._open()
                written = format_of(work.format, keep=work.keep).layout(layout) if work.train else layout
                delta = self.spool.take(written.size_bytes) if work.train else None
                answer = await self._ask(
                    {
                        "do": "task", "source": source, "work": asdict(work),
                        "specs": None if layout.specs == self._layout.specs else _told(layout),
                        "weights": _shown(weights), "delta": None if delta is None else _shown(delta, empty=True),
                        "residual": [str(residual.owed), str(residual.left)] if residual and work.owes else None,
                    },
                    (weights, delta),
                )  # fmt: skip
            except UsageError as problem:
                raise LearnerFailed(str(problem)) from problem
        if delta is not None and delta.file is None:
            delta = Slot(memoryview(bytearray(answer["delta"])))
        return Done(
            examples=answer["examples"],
            metrics=answer["metrics"],
            scores=answer["scores"],
            delta=delta,
            seconds=answer["seconds"],
            layout=written,
        )

    async def draw(self, *, seed: int) -> tuple[Layout, Slot]:
        """The weights of a fresh model, drawn with `seed`, and which tensors they are.

        Where these are not the tensors that `start` has said, the weights are left out.

        Raises:
            UsageError: model() raised, or the learner cannot be loaded.
            LearnerFailed: the process died over it, or there is no room for the weights.
        """
        async with self._turn:
            await self._open()
            slot = self.spool.take(self._layout.size_bytes)
            answer = await self._ask({"do": "draw", "seed": seed, "weights": _shown(slot, empty=True)}, (slot,))
            drawn = _layout(answer)
            return drawn, slot if slot.file or drawn != self._layout else Slot(
                memoryview(bytearray(answer["weights"]))
            )

    async def stop(self) -> None:
        """End the process, whatever it does, within seconds; may be called again.

        A task under way fails; cancel calls that may still be starting the process before this.
        """
        await self._end()
        if self._straggler is not None:
            await asyncio.wait([self._straggler])

    async def _open(self) -> None:
        if self._straggler is not None:
            await asyncio.wait([self._straggler])
            self._straggler = None
        if self._child is not None and _lives(self._child.process.pid):
            return
        await self._end()  # of a child that died while idle, its socket is left
        began_at, self.ready_s, self.patience_s = asyncio.get_running_loop().time(), 0.0, 0.0
        self._child = await _spawn(self._threads)
        self.pid = self._child.process.pid
        try:
            answer = await self._ask(self._opening)
        except (UsageError, LearnerFailed):  # it lives, but has nothing to train with
            await self._end()
            raise
        self._layout = _layout(answer)
        self.patience_s = asyncio.get_running_loop().time() - began_at

    async def _ask(self, request: dict[str, Any], slots: tuple[Slot | None, ...] = ()) -> dict[str, Any]:
        """The child's answer; `slots` are what the request speaks of, and kept until the child is done with them."""
        child = self._child
        assert child is not None
        waiting = child.line.ask(request)
        try:
            answer = await asyncio.shield(waiting)
        except asyncio.CancelledError:
            self._straggler = asyncio.create_task(self._outwait(waiting, slots))
            raise
        except LearnerFailed:
            await self._end()
            raise
        self.patience_s += answer["ready_s"] - self.ready_s
        self.ready_s = answer["ready_s"]
        if "failed" in answer:
            raise (UsageError if answer["failed"] == "usage" else LearnerFailed)(answer["text"])
        return answer

    async def _outwait(self, waiting: "asyncio.Future[dict[str, Any]]", slots: tuple[Slot | None, ...]) -> None:
        """Nobody waits for what the child will say; let it come to an end, if that is soon."""
        await asyncio.wait([waiting], timeout=self.patience_s)
        if not waiting.done() or waiting.exception() is not None:
            await self._end()
        del slots  # only now may others write there

    async def _end(self) -> None:
        child, self._child, self.pid = self._child, None, None
        if child is None:
            return
        with suppress(ProcessLookupError):  # the group: whatever the learner started goes with it
            os.killpg(child.process.pid, signal.SIGKILL)
        child.line.close()
        both: set[asyncio.Future[None]] = {child.watch, child.line.closed}
        await asyncio.wait(both, timeout=END_S)
        child.watch.cancel()


@dataclass(frozen=True, slots=True)
class Seat:
    """One worker's place in the training process.

    Attributes:
        trainer: the process, which others may sit in, too.
        source: what the learner's data() is given.
        at_once: the data is loaded when the worker starts; otherwise when it is first needed.
    """

    trainer: Trainer
    source: str
    at_once: bool = True

    async def start(self) -> Layout:
        """As `Trainer.start`."""
        return await self.trainer.start(self.source if self.at_once else None)

    async def run(self, work: Work, layout: Layout, *, weights: Slot, residual: Residual | None = None) -> Done:
        """As `Trainer.run`."""
        return await self.trainer.run(work, layout, source=self.source, weights=weights, residual=residual)


class _Line(asyncio.Protocol):
    """The daemon's end of the socket: one question at a time, and its answer or the reason why none will come."""

    def __init__(self) -> None:
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._transport: asyncio.WriteTransport | None = None
        self._arrived = bytearray()
        self._waiting: asyncio.Future[dict[str, Any]] | None = None
        self._failed = ""

    def ask(self, request: dict[str, Any]) -> "asyncio.Future[dict[str, Any]]":
        """Send a question; the answer to come, which fails with LearnerFailed."""
        assert self._transport is not None
        self._waiting = asyncio.get_running_loop().create_future()
        packed: bytes = msgpack.packb(request)
        self._transport.write(len(packed).to_bytes(LENGTH_BYTES, "big") + packed)
        if self._failed:
            self.fail(self._failed)
        return self._waiting

    def fail(self, why: str) -> None:
        """No more answers will come."""
        self._failed = why
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_exception(LearnerFailed(why))

    def close(self) -> None:
        """Hang up."""
        assert self._transport is not None
        self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)  # uvloop's is none by name

    def data_received(self, data: bytes) -> None:
        self._arrived += data
        end = LENGTH_BYTES + int.from_bytes(self._arrived[:LENGTH_BYTES], "big")
        if LENGTH_BYTES < end <= len(self._arrived):
            answer = msgpack.unpackb(memoryview(self._arrived)[LENGTH_BYTES:end])
            self._arrived = bytearray()
            if self._waiting is not None and not self._waiting.done():
                self._waiting.set_result(answer)

    def connection_lost(self, _why: Exception | None) -> None:
        if not self.closed.done():
            self.closed.set_result(None)


@dataclass(frozen=True, slots=True)
class _Child:
    process: asyncio.subprocess.Process
    line: _Line
    watch: asyncio.Task[None]


async def _spawn(threads: int) -> _Child:
    ours, theirs = socket.socketpair()
    try:
        with theirs:
            process = await asyncio.create_subprocess_exec(
                # -P: the folder the daemon was started in must not hide installed modules
                *(sys.executable, "-P", "-m", "workers.child", str(theirs.fileno()), str(os.getpid())),
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            )
        _, line = await asyncio.get_running_loop().create_connection(_Line, sock=ours)
    except BaseException:
        ours.close()  # which also ends a child that is there already
        raise
    return _Child(process, line, asyncio.create_task(_watch(process, line)))


async def _watch(process: asyncio.subprocess.Process, line: _Line) -> None:
    """Tell whoever waits for an answer when none will come."""
    end = asyncio.ensure_future(process.wait())
    either: set[asyncio.Future[Any]] = {end, line.closed}
    try:
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        # one may show a moment before the other; what the learner started may keep the socket open for good
        await asyncio.wait(either, timeout=END_S if line.closed.done() else LAST_WORDS_S)
        line.fail(_last_words(process.returncode))
        await end
    finally:
        end.cancel()


def _lives(pid: int) -> bool:
    """Whether the child runs; asks the kernel, because asyncio hears of a death a little later."""
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    except ChildProcessError:
        return False


def _last_words(status: int | None) -> str:
    if status is None:
        return "the training process closed its socket: the learner must not close files that are not its own."
    if status >= 0:
        return f"the training process ended by itself with status {status}: the learner must return, not exit."
    name = SIGNALS.get(-status) or signal.strsignal(-status)
    return f"the training process ended with signal {-status} ({name}); the next task starts a new one."


def _shown(slot: Slot, *, empty: bool = False) -> dict[str, Any]:
    """A slot as the child finds it: a place in a file, or, of a small one, its bytes if there are any yet."""
    if slot.file is None:
        return {"data": b"" if empty else slot.data}
    path, at = slot.file
    return {"file": str(path), "at": at, "size": len(slot.data)}


def _told(layout: Layout) -> list[tuple[str, str, tuple[int, ...]]]:
    return [(spec.name, spec.dtype, spec.shape) for spec in layout.specs]


def _layout(answer: dict[str, Any]) -> Layout:
    return Layout(tuple(TensorSpec(name, dtype, tuple(shape)) for name, dtype, shape in answer["specs"]))
