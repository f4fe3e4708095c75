"""The owner of the data, as the worker at work meets them: the policy in force, the ledger, what is counted in it.

Knows when the policy is read again, the local time of day, and what is written of a task. Does not decide
(`policy.py`), nor know how a line is written (`ledger.py`).
"""

import logging
import time
from collections import deque
from dataclasses import replace
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

from broker.errors import Declined, LearnerFailed, UsageError
from broker.messages import Attempt, Task
from workers import policy
from workers.ledger import SUFFIX, Ledger, moment
from workers.policy import Asked, Policy
from workers.work import Done, Who

log = logging.getLogger(__name__)

REMEMBERED = 32  # of so many times that a task was let in we know who has asked: more than a worker has in hand


class Owner:
    """One worker's.

    Attributes:
        folder: where the ledger is, among the worker's other files.
        policy: the rules in force: those of the file when the last task, or secure sum, came.
        ledger: what has happened.
    """

    def __init__(self, who: Who, folder: Path) -> None:
        self.folder = folder
        self.policy = Policy()
        self.ledger = Ledger(folder / f"{who.name}{SUFFIX}")
        self._who = who
        self._read: tuple[int, int] | None = None  # the file's time and size when it was read
        self._askers: deque[tuple[Attempt, str]] = deque(maxlen=REMEMBERED)
        self._today: date | None = None
        self._done_today = 0

    def admit(self, task: Task, coordinator: str, *, trains: bool) -> None:
        """Let a task in, of which only the header has come. `coordinator` is who the broker says has sent it.

        Raises:
            Declined: the policy does not allow it, or cannot be read.
            LearnerFailed: it asks for a count, and the ledger cannot be read.
        """
        self._askers.append((task.of, coordinator))
        self._look()
        now = _now()
        if self.policy.rounds_a_day is not None and self._today != now.date():
            trained = (moment(line) for line in self.ledger.read() if line.get("work") == "train")
            self._today = now.date()
            self._done_today = sum(at is not None and at.date() == self._today for at in trained)
        noise = task.noise if self._who.trains else None  # who only evaluates tells its score as it is
        asked = Asked(
            task.of.run, self._who.learner, coordinator, trains, task.cohort, task.payload.layout.size_bytes,
            secure=self._who.trains and task.secure is not None, delta=noise.delta if noise else None,
        )  # fmt: skip
        if why := self.policy.permits(asked, minute=60 * now.hour + now.minute, done_today=self._done_today):
            raise Declined(why)

    def least(self) -> tuple[int, float]:
        """Of how many a secure sum must be, and how large the part that must help to open a secret.

        Raises:
            Declined: the policy cannot be read.
        """
        self._look()
        return self.policy.cohort_min, self.policy.threshold_min

    def _look(self) -> None:
        """Read the policy again if the file has changed. One that cannot be read allows nothing."""
        if self._who.policy is None:
            return
        try:
            found = self._who.policy.stat()
            if self._read != (found.st_mtime_ns, found.st_size):
                self.policy = policy.read(self._who.policy)
                self._read = found.st_mtime_ns, found.st_size
        except (OSError, UsageError) as problem:
            self._read = None
            log.warning("nothing is done until the policy can be read again: %s", problem)
            raise Declined("the policy of the data's owner cannot be read.") from None

    def take(self, task: Task, *, trains: bool) -> None:
        """A task is begun, if it may be: it has waited, others were begun meanwhile, and the rules may have changed.

        Raises:
            Declined: as for `admit`.
            LearnerFailed: that cannot be written down.
        """
        self.admit(task, self._told(task.of)["asked_by"], trains=trains)
        self.ledger.write(
            "taken", **self._told(task.of), work="train" if trains else "evaluate", version=task.version,
            cohort=task.cohort, bytes=task.payload.layout.size_bytes,
        )  # fmt: skip
        self._done_today += trains and self._today == _now().date()

    def sift(self, done: Done) -> Done:
        """What came of a task, without the figures that may not leave.

        Raises:
            Declined: none of it may leave.
        """
        if why := self.policy.permits_leaving(done.examples, done.scores.get("examples")):
            raise Declined(why)
        may_leave = self.policy.may_leave
        return replace(done, metrics=may_leave(done.metrics), scores=may_leave(done.scores))

    def let_go(self, task: Task, done: Done) -> None:
        """An update, or only a score, is about to leave; it may when `ledger.keep` has returned.

        Raises:
            LearnerFailed: that cannot be written down.
        """
        facts: dict[str, Any] = {}
        if done.delta is not None:
            facts = {"format": task.format, "bytes": len(done.delta.data), "examples": done.examples}
            facts["metrics"] = sorted(done.metrics)
        told = {**self._told(task.of), "version": task.version, "scores": sorted(done.scores)}
        self.ledger.write("update" if facts else "score", **told, **facts)

    def note(self, event: str, of: Attempt, **facts: Any) -> None:
        """Write what has happened anyway, if it can be written."""
        try:
            self.ledger.write(event, **self._told(of), **facts)
        except LearnerFailed as problem:
            log.warning("%s", problem)

    def _told(self, of: Attempt) -> dict[str, Any]:
        asked_by = next((asker for known, asker in self._askers if known == of), "")
        return {"run": of.run, "round": of.round, "attempt": of.attempt, "asked_by": asked_by}


def _now() -> datetime:
    """Local time, which is what people mean by hours and days."""
    return datetime.fromtimestamp(time.time(), UTC).astimezone()
