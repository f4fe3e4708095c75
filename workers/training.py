"""The daemon's side of training: a child process that holds the learner and its data, and does one task at a time.

Knows how to have that process started by its guard (`guarded.py`), ask it, and be rid of it: the daemon survives its
crash, the kernel's out-of-memory killer, and a task that is cancelled. Does not know the broker, nor torch, which
only guard and child import (`guard.py`, `child.py`).
"""

import asyncio
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from broker.contract import Contract
from broker.errors import LearnerFailed, UsageError
from broker.formats import format_of
from broker.tensors import Layout
from workers.guarded import Guard, Line
from workers.residuals import Residual
from workers.spool import Slot, Spool
from workers.work import Done, Work, layout_of, told

RENEW_AFTER = 1000
"""How many tasks a training process does before another one takes its place."""
PATIENCE_S_MAX = 60.0


class Trainer:
    """A learner in a process of its own, which is started when needed, with the data of all who train there.

    One thing at a time: calls wait for each other, first come, first served. A child that died or was killed is
    replaced by the next call.

    Args:
        learner: as for `workers.learner.load`.
        spool: where models lie that both processes see.
        threads: how many threads torch computes with; the results depend on it, so it is not the machine's to choose.
        memory_mb: how much memory the process may have, in millions of bytes; None for whatever the machine has.
        renew_after: how many tasks it does before another one takes its place: what a learner leaks is bounded.

    Attributes:
        spool: as given.
        pid: the process, while there is one.
        contract: of the learner as it was loaded last.
        ready_s: how long it took to load the learner, and since then the data.
        patience_s: how long a task that nobody waits for any more may go on, before the process is killed: as long
            as another one would take to load learner and data, so that either choice costs at most twice what the
            better one does; at most PATIENCE_S_MAX.
    """

    def __init__(
        self,
        learner: str,
        spool: Spool,
        *,
        threads: int = 1,
        memory_mb: int | None = None,
        renew_after: int = RENEW_AFTER,
    ) -> None:
        self.pid: int | None = None
        self.contract = Contract()
        self.ready_s = 0.0
        self.patience_s = 0.0
        self._opening = {"do": "open", "learner": learner, "threads": threads}
        self.spool = spool
        self._guard = Guard(threads, (memory_mb or 0) * 1_000_000)
        self._renew_after = renew_after
        self._tasks = 0
        self._child: Line | None = None
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
                self._tasks += 1
                written = format_of(work.format, keep=work.keep).layout(layout) if work.train else layout
                delta = self.spool.take(written.size_bytes) if work.train else None
                answer = await self._ask(
                    {
                        "do": "task", "source": source, "work": asdict(work),
                        "specs": None if layout.specs == self._layout.specs else told(layout),
                        "weights": _shown(weights), "delta": None if delta is None else _shown(delta),
                        "residual": [str(residual.owed), str(residual.left)] if residual and work.owes else None,
                    },
                    (weights, delta),
                )  # fmt: skip
            except UsageError as problem:
                raise LearnerFailed(str(problem)) from problem
        return Done(delta=delta, layout=written, **answer)

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
            answer = await self._ask({"do": "draw", "seed": seed, "weights": _shown(slot)}, (slot,))
            return layout_of(answer["specs"]), slot

    async def stop(self) -> None:
        """End the process, whatever it does, within seconds; may be called again.

        A task under way fails; cancel calls that may still be starting the process before this.
        """
        if self._child is not None and self._child.pid is None:  # its guard loads torch, and would not hear
            await self._guard.leave()
        await self._end()
        if self._straggler is not None:
            await asyncio.wait([self._straggler])
        await self._guard.leave()

    async def _open(self) -> None:
        if self._straggler is not None:
            await asyncio.wait([self._straggler])
            self._straggler = None
        if self._child is not None and self._tasks < self._renew_after:
            with suppress(LearnerFailed):  # it has died while idle
                await self._ask({"do": "ping"})
                return
        await self._end()
        self.ready_s, self.patience_s, self._tasks = 0.0, 0.0, 0
        try:
            self._child = await self._guard.fork()
            answer = await self._ask(self._opening)
        except OSError as problem:
            raise LearnerFailed(f"the training process could not be started: {problem.strerror}.") from problem
        except (UsageError, LearnerFailed):  # it lives, but has nothing to train with
            await self._end()
            raise
        self.pid = self._child.pid
        self._layout = layout_of(answer["specs"])
        self.contract = Contract(answer["contract"], answer["file"])

    async def _ask(self, request: dict[str, Any], slots: tuple[Slot | None, ...] = ()) -> dict[str, Any]:
        """The child's answer; `slots` are what the request speaks of, and kept until the child is done with them."""
        child = self._child
        assert child is not None
        waiting = child.ask(request)
        try:
            answer = await asyncio.shield(waiting)
        except asyncio.CancelledError:
            self._straggler = asyncio.create_task(self._outwait(waiting, slots))
            raise
        except LearnerFailed:
            await self._end()
            raise
        before, self.ready_s = self.ready_s, answer.pop("ready_s")
        self.patience_s += self.ready_s - before
        if answer.get("spent"):
            await self._end()
        if answer.get("failed") == "usage":
            raise UsageError(answer["text"])
        if "failed" in answer:
            raise LearnerFailed(answer["text"])
        return answer

    async def _outwait(self, waiting: "asyncio.Future[dict[str, Any]]", slots: tuple[Slot | None, ...]) -> None:
        """Nobody waits for what the child will say; let it come to an end, if that is soon."""
        await asyncio.wait([waiting], timeout=min(self.patience_s, PATIENCE_S_MAX))
        if not waiting.done() or waiting.exception() is not None:
            await self._end()
        del slots  # only now may others write there

    async def _end(self) -> None:
        child, self._child, self.pid = self._child, None, None
        if child is None:
            return
        await self._guard.kill(child)
        child.close()


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

    @property
    def contract(self) -> Contract:
        """As `Trainer.contract`."""
        return self.trainer.contract

    async def start(self) -> Layout:
        """As `Trainer.start`."""
        return await self.trainer.start(self.source if self.at_once else None)

    async def run(self, work: Work, layout: Layout, *, weights: Slot, residual: Residual | None = None) -> Done:
        """As `Trainer.run`."""
        return await self.trainer.run(work, layout, source=self.source, weights=weights, residual=residual)


def _shown(slot: Slot) -> dict[str, Any]:
    """A slot as the child finds it: a place in a file."""
    path, at = slot.file
    return {"file": str(path), "at": at, "size": len(slot.data)}
