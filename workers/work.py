"""Who a worker is, what one task asks for and what came of it, in plain values.

Knows no torch: the daemon, which must never import it, and the training process, which does little else, both speak
of work in these words. Does not know how training is done or where a result is sent.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from broker.messages import Scalar

LEASE_S = 15.0
EXAMPLES_MAX = 2**29 - 1  # so that examples × a float32 is exact in float64 (see the sum in ARCHITECTURE.md)


@dataclass(frozen=True, slots=True)
class Who:
    """A worker's own settings.

    Attributes:
        name: unique in the federation.
        learner: what it can learn, for people.
        trains: False for one that only evaluates.
        lease_s: how long a sign of life counts; one is sent three times as often.
        drain_s: how long SIGTERM lets the job in hand go on.
    """

    name: str
    learner: str
    trains: bool = True
    lease_s: float = LEASE_S
    drain_s: float = 30.0


@dataclass(frozen=True, slots=True)
class Work:
    """What to do with the weights received; both, and the version is scored before it is trained."""

    train: bool
    evaluate: bool
    seed: int
    settings: dict[str, Scalar]
    round: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one task made, in the process that made it.

    `examples` and `delta` are None where nothing was trained; `metrics` is what train reported, `scores` what
    evaluate said of the weights as they were received.
    """

    examples: int | None
    metrics: dict[str, float]
    scores: dict[str, float]
    delta: bytearray | None


@dataclass(frozen=True, slots=True)
class Done:
    """An outcome as the daemon sees it: the delta's raw bytes are in a file, which is the daemon's to delete."""

    examples: int | None
    metrics: dict[str, float]
    scores: dict[str, float]
    delta_file: Path | None
    seconds: float


def task_seed(seed: int, number: int, worker: str) -> int:
    """The dice of one worker in one round, below 2^63: the same whenever, wherever and however often it trains.

    Args:
        seed: the task's seed, from the plan.
        number: the round.
        worker: the worker's name, so that no two workers draw the same batches.
    """
    digest = hashlib.blake2b(f"{seed}/{number}/{worker}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
