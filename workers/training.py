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
from pathlib import Path
from typing import Any

import msgpack

from broker.errors import LearnerFailed, UsageError
from broker.tensors import Layout, TensorSpec
from workers.work import Done, Work

LENGTH_BYTES = 4
END_S = 5.0  # a killed process is gone at once, unless the kernel holds it, and then no waiting helps
SIGNALS: dict[int, str] = {
    signal.SIGKILL: "killed: out of memory?",
    signal.SIGSEGV: "a crash in native code",
    signal.SIGABRT: "aborted by native code",
}


@dataclass(frozen=True, slots=True)
class _Child:
    process: asyncio.subprocess.Process
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter


class Trainer:
    """A learner beside its data, in a process of its own that is started when needed.

    One thing at a time: calls wait for each other. A child that died or was killed is replaced by the next call.

    Args:
        learner: as for `workers.learner.load`.
        source: what the learner's data() is given.
        folder: where the files of deltas are written; must exist.
        threads: how many threads torch computes with; the results depend on it, so it is not the machine's to choose.
    """

    def __init__(self, learner: str, source: str, folder: Path, *, threads: int = 1) -> None:
        self.pid: int | None = None
        self.ready_s = 0.0
        self._opening = {"do": "open", "learner": learner, "source": source, "threads": threads}
        self._folder = folder
        self._threads = threads
        self._child: _Child | None = None
        self._layout = Layout(())
        self._turn = asyncio.Lock()

    async def start(self) -> Layout:
        """Start the process, load the learner and its data, and say which tensors its model has.

        Takes as long as the learner's data() takes; cancel it to give up.

        Raises:
            UsageError: the learner or its data cannot be loaded, and why.
            LearnerFailed: the process died over it.
        """
        async with self._turn:
            await self._open()
            return self._layout

    async def run(self, work: Work, layout: Layout, weights_file: Path) -> Done:
        """Do one task with the weights in the file; cancelling kills the process in the midst of it.

        Args:
            work: what to do.
            layout: which tensors the file holds, as raw bytes.
            weights_file: is only read. The delta is written to the folder under the same stem, with `.delta`.

        Raises:
            LearnerFailed: the learner raised or returned nonsense, the process died, or it could not be started anew.
        """
        delta_file = self._folder / f"{weights_file.stem}.delta"
        request = {
            "do": "task", "work": asdict(work), "specs": [(s.name, s.dtype, s.shape) for s in layout.specs],
            "weights_file": _path(weights_file), "delta_file": _path(delta_file),
        }  # fmt: skip
        try:
            async with self._turn:
                await self._open()
                answer = await self._ask(request)
        except BaseException as problem:
            delta_file.unlink(missing_ok=True)
            if isinstance(problem, UsageError):
                raise LearnerFailed(str(problem)) from problem
            raise
        return Done(
            examples=answer["examples"],
            metrics=answer["metrics"],
            scores=answer["scores"],
            delta_file=delta_file if answer["delta"] else None,
            seconds=answer["seconds"],
        )

    async def draw(self, weights_file: Path, *, seed: int) -> Layout:
        """Write the weights of a fresh model, drawn with `seed`, to the file, and say which tensors they are.

        Raises:
            UsageError: model() raised, or the learner cannot be loaded.
            LearnerFailed: the process died over it.
        """
        async with self._turn:
            await self._open()
            answer = await self._ask({"do": "initial", "seed": seed, "weights_file": _path(weights_file)})
            return _layout(answer)

    async def stop(self) -> None:
        """End the process, whatever it does, within seconds; may be called again.

        A task under way fails; cancel calls that may still be starting the process before this.
        """
        await self._end()

    async def _open(self) -> None:
        if self._child is not None and _lives(self._child.process.pid):
            return
        await self._end()  # of a child that died while idle, its socket is left
        self._child = await _spawn(self._threads)
        self.pid = self._child.process.pid
        try:
            answer = await self._ask(self._opening)
        except (UsageError, LearnerFailed):  # it lives, but has nothing to train with
            await self._end()
            raise
        self._layout, self.ready_s = _layout(answer), answer["seconds"]

    async def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._child is not None
        try:
            answer = await _exchange(self._child, request)
        except BaseException:  # dead, or cancelled: nobody waits for what this child may still say
            await self._end()
            raise
        if "failed" in answer:
            raise (UsageError if answer["failed"] == "usage" else LearnerFailed)(answer["text"])
        return answer

    async def _end(self) -> None:
        child, self._child, self.pid = self._child, None, None
        if child is None:
            return
        with suppress(ProcessLookupError):  # the group: whatever the learner started goes with it
            os.killpg(child.process.pid, signal.SIGKILL)
        child.writer.close()
        with suppress(TimeoutError, OSError):
            async with asyncio.timeout(END_S):
                await child.process.wait()
                await child.writer.wait_closed()


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
        reader, writer = await asyncio.open_connection(sock=ours)
    except BaseException:
        ours.close()  # which also ends a child that is there already
        raise
    return _Child(process, reader, writer)


async def _exchange(child: _Child, request: dict[str, Any]) -> dict[str, Any]:
    """Ask and wait for the answer or the child's end, whichever comes first."""
    talk = asyncio.ensure_future(_talk(child, msgpack.packb(request)))
    end = asyncio.ensure_future(child.process.wait())
    try:
        await asyncio.wait({talk, end}, return_when=asyncio.FIRST_COMPLETED)
        if talk.done() and talk.exception() is None:
            return talk.result()
        await asyncio.wait({end}, timeout=END_S)  # the socket may close a moment before the process is gone
    finally:
        talk.cancel()
        end.cancel()
        await asyncio.gather(talk, end, return_exceptions=True)
    raise LearnerFailed(_last_words(child.process.returncode))


async def _talk(child: _Child, packed: bytes) -> dict[str, Any]:
    child.writer.write(len(packed).to_bytes(LENGTH_BYTES, "big") + packed)
    await child.writer.drain()
    length = int.from_bytes(await child.reader.readexactly(LENGTH_BYTES), "big")
    answer: dict[str, Any] = msgpack.unpackb(await child.reader.readexactly(length))
    return answer


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


def _layout(answer: dict[str, Any]) -> Layout:
    return Layout(tuple(TensorSpec(name, dtype, tuple(shape)) for name, dtype, shape in answer["specs"]))


def _path(file: Path) -> str:
    return str(file.absolute())
