"""Why federate: what each worker would have learned alone, and what all data in one place would have given.

For demonstrations, where one machine has everybody's data: a real federation cannot know this. Does not know the
broker.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from broker.files import read_version
from broker.messages import Scalar
from workers import learner, task, weights
from workers.work import Work, task_seed


@dataclass(frozen=True, slots=True)
class Request:
    """What to compare.

    Attributes:
        learner: as for `workers.learner.load`.
        workers: name → source of each that trains alone.
        weights: a version's safetensors file, from which all begin.
        rounds: how many tasks each does, as many as the federation's rounds.
        seed: the plan's, so that a worker alone throws the dice it throws in the federation.
        settings: what train() is given.
        pooled: source of everybody's rows; None to leave that comparison out.
        held_out: source of the rows on which all are scored; None for the pooled ones, or else each one's own.
    """

    learner: str
    workers: dict[str, str]
    weights: str
    rounds: int
    seed: int = 0
    settings: dict[str, Scalar] = field(default_factory=dict)
    pooled: str | None = None
    held_out: str | None = None


def baseline(request: Request) -> dict[str, Any]:
    """Train each worker alone, then the pooled rows, and score each on the held-out rows.

    Returns:
        {"alone": {name: metrics}, "pooled": metrics or None}

    Raises:
        UsageError: the learner, a source or the version cannot be loaded.
        LearnerFailed: training failed, or the version is of another learner.
    """
    torch.set_num_threads(1)  # as workers do
    found = learner.load(request.learner)
    where = request.held_out or request.pooled
    judge = None if where is None else task.set_up(found, where)

    def learned(name: str, source: str) -> dict[str, float]:
        return _learned(request, task.set_up(found, source), name=name, judge=judge)

    return {
        "alone": {name: learned(name, source) for name, source in request.workers.items()},
        "pooled": None if request.pooled is None else learned("pooled", request.pooled),
    }


def _learned(request: Request, place: task.Place, *, name: str, judge: task.Place | None) -> dict[str, float]:
    """The scores after `rounds` tasks in a row, each beginning where the last one ended."""
    current: weights.Raw
    layout, current, _ = read_version(Path(request.weights))
    for number in range(1, request.rounds + 1):
        seed = task_seed(request.seed, number, name)
        work = Work(train=True, evaluate=False, seed=seed, settings=request.settings, round=number)
        task.do(place, work, layout=layout, received=current)
        current = weights.read(place.model, layout)
    score = Work(train=False, evaluate=True, seed=request.seed, settings={}, round=request.rounds)
    return task.do(judge or place, score, layout=layout, received=current).scores
