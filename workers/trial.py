"""`fluffle try`: a learner checked beside its data, with no broker: one task done, timed, sized and looked at.

Knows what a good learner keeps to, and says so where one does not. Does not know torch (the training process does)
nor how a report is shown.
"""

import asyncio
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from broker.contract import Contract
from broker.errors import UsageError
from broker.messages import Scalar
from broker.tensors import FLOATS, Layout, as_float64, from_float64, view
from workers.spool import Spool
from workers.training import Seat, Trainer
from workers.work import Done, Work

PIECE_BYTES = 8 * 1024 * 1024  # weights are added up piece by piece, for float64 takes up to four times their room


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
    with tempfile.TemporaryDirectory(prefix="fluffle-try-") as name, asyncio.Runner() as steps:
        spool = Spool(Path(name))
        trainer = Trainer(where, spool, threads=threads)
        seat = Seat(trainer, source)
        try:
            layout = steps.run(seat.start())
            drawn, start = steps.run(trainer.draw(seed=0))
            if layout != drawn:
                raise UsageError(
                    f"model() called twice gives different tensors ({layout.difference(drawn)}): "
                    "no two workers could learn together; make it return the same shape every time."
                )
            work = Work(train=True, evaluate=True, seed=1, settings=settings or {}, round=1)
            done, again = (steps.run(seat.run(work, drawn, weights=start)) for _ in range(2))
            assert done.delta is not None
            assert again.delta is not None
            warnings = _looked_at(layout, done.delta.data, again.delta.data)
            _add(layout, start.data, done.delta.data)
            score = Work(train=False, evaluate=True, seed=1, settings={}, round=1)
            after = steps.run(seat.run(score, layout, weights=done.delta)).scores
        finally:
            steps.run(trainer.stop())
            spool.remove()
        return Report(layout, trainer.contract, trainer.ready_s, done, after=after, warnings=warnings)


def _looked_at(layout: Layout, first: memoryview, second: memoryview) -> tuple[str, ...]:
    """Warnings from the deltas of one task done twice."""
    warnings = []
    floats = [s for s in layout.segments if s.dtype in FLOATS]
    if not any(np.any(view(first[s.start : s.stop], "uint8")) for s in floats):
        warnings.append("train() changed no weights: it must change the model it is given, in place.")
    if not np.array_equal(view(first, "uint8"), view(second, "uint8")):
        warnings.append(
            "train() with the same seed twice gave two different results: draw all chance from settings['seed'], "
            "or an update that has to be made again will not be the same."
        )
    return tuple(warnings)


def _add(layout: Layout, start: memoryview, delta: memoryview) -> None:
    """Make a delta the trained weights: start + delta for floats, the delta's own value for integers and booleans."""
    for segment in layout.segments:
        if segment.dtype not in FLOATS:
            continue
        for at in range(segment.start, segment.stop, PIECE_BYTES):
            piece = slice(at, min(at + PIECE_BYTES, segment.stop))
            total = sum(as_float64(view(data[piece], segment.dtype), segment.dtype) for data in (start, delta))
            delta[piece] = from_float64(np.asarray(total), segment.dtype).tobytes()
