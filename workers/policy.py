"""What the owner of the data allows, whatever a coordinator asks for: `policy.toml`, and the decisions that follow.

Knows the rules and the sentences that a refused coordinator is told: the rule that stands in the way, and nothing of
what the worker has or does beyond it. Does not know the clock, the ledger or tasks: what is asked comes in as an
argument (`owner.py` asks).
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass as record
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from broker import wording
from broker.fields import counted
from broker.tensors import PAYLOAD_BYTES_MAX

DAY_MINUTES = 24 * 60
ANY = ("*",)
_WINDOW = re.compile(r"([01]\d|2[0-4]):([0-5]\d)-([01]\d|2[0-4]):([0-5]\d)")
_GLOBS = tuple[Annotated[str, Field(min_length=1, max_length=200)], ...]


@record(frozen=True, slots=True)
class Asked:
    """What is known of a task before anything of it has been done.

    Attributes:
        run: whose it is.
        learner: this worker's own.
        coordinator: who asks, as the broker vouches; empty where it does not.
        trains: it is to be trained, not only scored.
        cohort: how many are asked at the same time, as the coordinator says.
        size_bytes: of the model.
        secure: what comes of it is only added up in secret.
        delta: for which its ε is counted; None: there is no noise in it.
    """

    run: str
    learner: str
    coordinator: str
    trains: bool
    cohort: int
    size_bytes: int
    secure: bool = False
    delta: float | None = None


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", strict=True))
class Policy:
    """The rules. One that is not given allows everything. `*` and `?` in names stand for any letters.

    Attributes:
        runs: names of the runs that are served.
        learners: names of the learners that are run on this data.
        coordinators: broker users who may ask; with others than `*`, only where the broker vouches for who speaks.
        hours: local times of day at which tasks are taken, as "22:00-06:30"; what was begun is finished.
        rounds_a_day: most tasks that are trained from midnight to midnight.
        cohort_min: fewest workers that are asked together with this one. In a plain round nobody can check it.
        model_bytes_max: the largest model.
        examples_min: fewest examples that an update, or a score, must be made from to leave; 0: any number.
        metrics: which of the learner's figures leave; `examples` among the scores is one of them.
        privacy: `secure`: only tasks are done whose outcome is added up in secret, and none is scored for itself.
        threshold_min: secure rounds: more than this part of those who hold shares must help to open a secret.
        epsilon_max: the largest ε that may be spent; no task is done then without noise of this worker's, also none
            that is only scored,
        delta_max: nor one that counts ε for a larger δ.
        log: what the worker's log tells of tasks: with `metrics`, without (`tasks`), or only `refusals` and trouble.
    """

    runs: _GLOBS = ANY
    learners: _GLOBS = ANY
    coordinators: _GLOBS = ANY
    hours: tuple[str, ...] = ()
    rounds_a_day: Annotated[int, Field(ge=0)] | None = None
    cohort_min: Annotated[int, Field(ge=0)] = 0
    model_bytes_max: Annotated[int, Field(ge=1)] = PAYLOAD_BYTES_MAX
    examples_min: Annotated[int, Field(ge=0)] = 0
    metrics: _GLOBS = ANY
    privacy: Literal["any", "secure"] = "any"
    threshold_min: Annotated[float, Field(ge=0, lt=1)] = 2 / 3
    epsilon_max: Annotated[float, Field(ge=0)] = math.inf
    delta_max: Annotated[float, Field(gt=0, lt=1)] = 1e-3
    log: Literal["metrics", "tasks", "refusals"] = "metrics"

    def __post_init__(self) -> None:
        for window in self.hours:
            start, stop = _minutes(window)
            if start in (stop, DAY_MINUTES):
                raise ValueError(f"hours: {window} is no time of a day: from 00:00 to 24:00 is all of it")

    def permits(self, asked: Asked, *, minute: int, done_today: int) -> str:
        """Why a task is not taken; empty if it is.

        Args:
            asked: the task.
            minute: of the day, local time.
            done_today: how many were trained since midnight.
        """
        trains, most, clock = asked.trains, self.rounds_a_day, f"{minute // 60:02d}:{minute % 60:02d}"
        reasons = (
            (not _listed(self.coordinators, asked.coordinator), "does not serve this coordinator"),
            (not _listed(self.runs, asked.run), "does not serve this run"),
            (not _listed(self.learners, asked.learner), "does not allow this learner"),
            (not self.is_open(minute), f"serves at {' and '.join(self.hours)} only, by its clock it is {clock}"),
            (asked.size_bytes > self.model_bytes_max, f"takes models of {self.model_bytes_max} bytes at the most"),
            (self.privacy == "secure" and not asked.secure, "serves secure rounds only"),
            (self.is_unbounded(asked.delta), f"bounds epsilon, for a delta of {self.delta_max:g} at the most"),
            (trains and asked.cohort < self.cohort_min, f"asks for a cohort of {self.cohort_min} at the least"),
            (trains and most is not None and done_today >= most, f"serves {counted(most or 0, 'round')} a day"),
        )
        return next((_said(rule) for broken, rule in reasons if broken), "")

    def is_open(self, minute: int) -> bool:
        """Whether a minute of the day lies in the hours; a window may reach over midnight."""
        windows = map(_minutes, self.hours)
        return not self.hours or any(
            start <= minute < stop if start < stop else not stop <= minute < start for start, stop in windows
        )

    def is_unbounded(self, delta: float | None) -> bool:
        """Whether ε is to be bounded, and what is told of a task (`Asked.delta`) bounds it not."""
        return self.epsilon_max < math.inf and (delta is None or delta > self.delta_max)

    def permits_leaving(self, *examples: float | None) -> str:
        """Why what was made from so many examples does not leave; empty if it does. None: nobody has counted."""
        few = self.examples_min > 0 and any(count is not None and count < self.examples_min for count in examples)
        return _said(f"asks for {self.examples_min} examples a task at the least") if few else ""

    def may_leave(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Those of a learner's figures that may leave."""
        return {name: value for name, value in metrics.items() if _listed(self.metrics, name)}


def _said(rule: str) -> str:
    return f"the policy of the data's owner {rule}."


def _listed(globs: Iterable[str], name: str) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs)


def _minutes(window: str) -> tuple[int, int]:
    """From which minute of the day to which other.

    Raises:
        ValueError: it is not written so.
    """
    found = _WINDOW.fullmatch(window)
    hour, minute, to_hour, to_minute = map(int, found.groups()) if found else (DAY_MINUTES,) * 4
    start, stop = 60 * hour + minute, 60 * to_hour + to_minute
    if max(start, stop) > DAY_MINUTES:
        raise ValueError(f'hours: {window[:40]!r} must be like "22:00-06:30"')
    return start, stop


def read(path: Path) -> Policy:
    """The rules in a file.

    Raises:
        UsageError: no such file, not TOML, or no policy.
    """
    return wording.make(Policy, wording.read(path), str(path))
