"""`fluffle try` and `fluffle evaluate`: a learner beside its data, with no broker: a task timed, sized, looked at.

Knows what a good learner keeps to, and says so where one does not. Does not know torch (the training process does)
nor how a report is shown.
"""

import asyncio
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from broker.changes import apply_change
from broker.contract import Contract
from broker.errors import UsageError
from broker.files import read_version
from broker.formats import FORMATS
from broker.messages import Scalar
from broker.tensors import FLOATS, Layout, view
from workers.spool import Spool
from workers.training import Seat, Trainer
from workers.work import Done, Work

SCORE = Work(train=False, evaluate=True, seed=1, settings={}, round=1)


@dataclass(frozen=True, slots=True)
class Report:
    """What one trial showed.

    Attributes:
        layout: the model's tensors, buffers included.
        contract: what other learners must have in common with it.
        ready_s: seconds to load the learner and its data.
        done: the task, whose scores are from before training.
        after: what evaluate said after it.
        warnings: what the learner should not do, a sentence each.
    """

    layout: Layout
    contract: Contract
    ready_s: float
    done: Done
    after: dict[str, float]
    warnings: tuple[str, ...]


def try_learner(where: str, source: str, *, settings: dict[str, Scalar] | None = None, threads: int = 1) -> Report:
    """Do one task twice, with the same dice, in a training process of its own, and report.

    Args:
        where: as for `workers.learner.load`.
        source: what the learner's data() is given.
        settings: what its train() is given, beside seed and round.
        threads: how many threads torch computes with.

    Raises:
        UsageError: the learner or its data cannot be loaded, or model() is another every time.
        LearnerFailed: a task failed, and why.
    """
    return asyncio.run(_try_out(where, source, settings or {}, threads))


async def _try_out(where: str, source: str, settings: dict[str, Scalar], threads: int) -> Report:
    async with _alone(where, source, threads) as seat:
        trainer, layout = seat.trainer, await seat.start()
        drawn, start = await trainer.draw(seed=0)
        if layout != drawn:
            raise UsageError(
                f"model() called twice gives different tensors ({layout.difference(drawn)}): "
                "no two workers could learn together; make it return the same shape every time."
            )
        work = Work(train=True, evaluate=True, seed=1, settings=settings, round=1)
        done, again = [await seat.run(work, drawn, weights=start) for _ in range(2)]
        assert done.delta is not None
        assert again.delta is not None
        warnings = _looked_at(layout, done.delta.data, again.delta.data)
        apply_change(start.data, done.delta.data, layout, FORMATS["float32"], start.data)
        after = (await seat.run(SCORE, layout, weights=start)).scores
        return Report(layout, trainer.contract, trainer.ready_s, done, after=after, warnings=warnings)


def score(where: str, version: Path, source: str, *, threads: int = 1) -> dict[str, float]:
    """What the learner's evaluate says of a version.

    Raises:
        UsageError: the version, the learner or its data cannot be loaded.
        LearnerFailed: the version is of another learner, or evaluate failed.
    """
    layout, weights, _ = read_version(version)

    async def scored() -> dict[str, float]:
        async with _alone(where, source, threads) as seat:
            received = seat.trainer.spool.take(len(weights))
            received.data[:] = weights
            return (await seat.run(SCORE, layout, weights=received)).scores

    return asyncio.run(scored())


@asynccontextmanager
async def _alone(where: str, source: str, threads: int) -> AsyncIterator[Seat]:
    """A training process for one learner beside one source, of which nothing is left afterwards."""
    with tempfile.TemporaryDirectory(prefix="fluffle-") as folder:
        spool = Spool(Path(folder))
        trainer = Trainer(where, spool, threads=threads)
        try:
            yield Seat(trainer, source)
        finally:
            await trainer.stop()
            spool.remove()


def _looked_at(layout: Layout, first: memoryview, second: memoryview) -> tuple[str, ...]:
    """Warnings from the deltas of one task done twice."""
    warnings = []
    floats = [s for s in layout.segments if s.dtype in FLOATS]
    if not any(np.any(view(first[s.start : s.stop], "uint8")) for s in floats):
        warnings.append("train() changed no weights: it must change the model it is given, in place.")
    if not np.array_equal(view(first, "uint8"), view(second, "uint8")):
        warnings.append(
            "train() with the same seed twice gave two different results: draw all chance from settings['seed'], "
            "keep nothing, like an optimizer, for the next task, or an update that is made again will be another."
        )
    return tuple(warnings)
