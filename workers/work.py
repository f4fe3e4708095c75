"""Who a worker is, what one task asks for and what came of it, in plain values.

Knows no torch: the daemon, which must never import it, and the training process, which does little else, both speak
of work in these words. Does not know how training is done or where a result is sent.
"""

import hashlib
import signal
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from mmap import mmap
from pathlib import Path
from typing import Any

import msgpack

from broker.formats import FORMATS
from broker.messages import Scalar, Task
from broker.tensors import Layout, TensorSpec
from workers.masking import Member
from workers.spool import Slot

LEASE_S = 15.0
BEATS = 3
"""Signs of life in the time of a lease: two may come late."""

# what daemon, guard and training process say to each other
CLOSED = 71
"""Exit status of a training process whose socket the learner has closed."""
MEANT_FOR_DAEMON = signal.SIGTERM, signal.SIGINT, signal.SIGHUP
"""Whoever says these to all of us means the daemon, which tells guard and training process."""
Ended = Mapping[str, int | bool]


# made beforehand: it must work, too, when the memory is full; and whatever a learner calls its metrics
bytes_of: Callable[[Mapping[str, Any]], bytes] = msgpack.Packer(unicode_errors="replace").pack
"""A message as it goes through a socket; where it ends, msgpack knows."""


def told(layout: Layout) -> list[tuple[str, str, tuple[int, ...]]]:
    """Which tensors, as it goes through that socket."""
    return [(spec.name, spec.dtype, spec.shape) for spec in layout.specs]


def layout_of(specs: Iterable[tuple[str, str, Iterable[int]]]) -> Layout:
    """What `told` has told."""
    return Layout(tuple(TensorSpec(name, dtype, tuple(shape)) for name, dtype, shape in specs))


@dataclass(frozen=True, slots=True)
class Who:
    """A worker's own settings.

    Attributes:
        name: unique in the federation.
        learner: what it can learn, for people.
        trains: False for one that only evaluates.
        lease_s: how long a sign of life counts; one is sent three times as often.
        drain_s: how long SIGTERM lets the job in hand go on.
        member: who it is in secure rounds, and whom it knows; without it takes no part in any.
        hosted: it is one of many in its process, and the log tells only what is unusual.
        policy: the file in which the data's owner says what is allowed; None for anything.
    """

    name: str
    learner: str
    trains: bool = True
    lease_s: float = LEASE_S
    drain_s: float = 30.0
    hosted: bool = False
    member: Member | None = None
    policy: Path | None = None


@dataclass(frozen=True, slots=True)
class Work:
    """What to do with the weights received; both, and the version is scored before it is trained.

    The update is written in `format`, of which `keep` is an argument where it wants one. Its norm is at most `clip`,
    unless that is 0. With `row_noise` above 0 every step's gradient has so much noise, in units of `row_clip`, to
    which each row's is cut (`privacy.py`); these steps are put down in a file, as of a run, round and attempt.
    It is done by a learner whose file has the SHA-256 `learner_file`, or by any if that is empty.
    """

    train: bool
    evaluate: bool
    seed: int
    settings: dict[str, Scalar]
    round: int
    format: str = "float32"
    keep: float = 1.0
    clip: float = 0.0
    learner_file: str = ""
    row_noise: float = 0.0
    row_clip: float = 1.0
    steps: tuple[str, str, int, int] = ("", "", 0, 0)

    @property
    def owes(self) -> bool:
        """Whether its format leaves something out of an update, which the next one makes up for."""
        return self.train and FORMATS[self.format].lossy


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one task made, in the process that made it.

    `examples` and `delta` are None where nothing was trained; `metrics` is what train reported, `scores` what
    evaluate said of the weights as they were received.
    """

    examples: int | None
    metrics: dict[str, float]
    scores: dict[str, float]
    delta: bytes | bytearray | memoryview | mmap | None


@dataclass(frozen=True, slots=True)
class Done:
    """An outcome as the daemon sees it: the update is in a slot of its spool, as its format lays it out.

    In a secure round `model` is a digest of the weights from which it was trained.
    `within`: its norm was at most the clip before it was cut.
    """

    examples: int | None
    metrics: dict[str, float]
    scores: dict[str, float]
    delta: Slot | None
    seconds: float
    layout: Layout
    model: bytes = b""
    within: bool = True


def work_for(task: Task, who: Who) -> Work:
    """What a task asks of a worker; what is found out about a trainer's rows without noise does not travel."""
    noise = task.noise if who.trains else None
    private = noise if noise and noise.of == "row" else None
    return Work(
        train=who.trains and task.work == "train", evaluate=noise is None,
        seed=task_seed(task.seed, task.of.round, who.name), settings=task.settings, round=task.of.round,
        format=task.format, keep=task.keep, clip=task.clip, learner_file=task.learner_file,
        row_noise=private.multiplier if private else 0.0, row_clip=private.clip if private else 1.0,
    )  # fmt: skip


def task_seed(seed: int, number: int, worker: str) -> int:
    """The dice of one worker in one round, below 2^63: the same whenever, wherever and however often it trains.

    Args:
        seed: the task's seed, from the plan.
        number: the round.
        worker: the worker's name, so that no two workers draw the same batches.
    """
    digest = hashlib.blake2b(f"{seed}/{number}/{worker}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
