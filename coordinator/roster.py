"""Who is here: workers' signs of life, their leases, who rests, and the choice of a cohort among them.

Pure: time and dice come in as arguments, rounds one after the other. Does not know how a round is made, messages'
routes or what a worker trains.
"""

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from broker.messages import Hello

LEASE_S_MAX = 3600.0
WORKERS_MAX = 20_000
FAILURES_MAX, STRIKES_MAX = 3, 3
"""After so many failures on end a worker rests, and after so many lies in the whole run."""
_NOBODY: Mapping[str, Mapping[str, Any]] = {}
REST_ROUNDS, REST_ROUNDS_MAX = 2, 64
"""How long its first rest is; each further one is twice as long, up to the second number."""


@dataclass(frozen=True, slots=True)
class Present:
    """One worker whose lease has not ended. `until_at` is on the clock that `hear` was given."""

    worker: str
    incarnation: str
    trains: bool
    lease_s: float
    until_at: float


class Roster:
    """Everyone who is here. Changed only by `hear`, `renew`, `leave` and `lapse`.

    Args:
        invited: for these there is always room.

    Attributes:
        due_at: no lease ends before, on the clock given to `hear`: so not all are looked at whenever one speaks.
    """

    def __init__(self, invited: Iterable[str] = ()) -> None:
        self._invited = frozenset(invited)
        self._present: dict[str, Present] = {}
        self.due_at = 0.0
        self._lost_all = False

    def hear(self, hello: Hello, now: float) -> bool:
        """Note a sign of life; False if the roster is full."""
        if not self.has(hello.worker) and len(self._present) >= WORKERS_MAX and hello.worker not in self._invited:
            return False
        lease_s = min(hello.lease_s, LEASE_S_MAX)
        self._present[hello.worker] = Present(hello.worker, hello.incarnation, hello.trains, lease_s, now + lease_s)
        self.due_at = min(self.due_at, now + lease_s)
        return True

    def renew(self, now: float) -> None:
        """Begin every lease anew: we have been deaf, and nobody's silence means anything."""
        self._present = {w: replace(p, until_at=now + p.lease_s) for w, p in self._present.items()}

    def leave(self, worker: str) -> bool:
        """Strike a worker off; False when it was not here."""
        return self._present.pop(worker, None) is not None

    def lapse(self, now: float) -> list[str]:
        """Strike off everyone whose lease has ended; their names, sorted."""
        if now < self.due_at:
            return []
        gone = sorted(p.worker for p in self._present.values() if p.until_at <= now)
        for worker in gone:
            del self._present[worker]
        self.due_at = min((p.until_at for p in self._present.values()), default=now + LEASE_S_MAX)
        self._lost_all |= bool(gone) and not self._present
        return gone

    def lost_all(self) -> bool:
        """Whether the leases of all who were left have ended since this was asked last."""
        found, self._lost_all = self._lost_all, False
        return found

    def has(self, worker: str) -> bool:
        """Whether the worker is here."""
        return worker in self._present

    def incarnation(self, worker: str) -> str:
        """The worker's present incarnation; empty when it is not here."""
        present = self._present.get(worker)
        return present.incarnation if present else ""

    def trainers(self, invited: Sequence[str] = ()) -> list[str]:
        """Names of those who train: sorted, or in the order of `invited` (and only those) where it is given."""
        names = {p.worker for p in self._present.values() if p.trains}
        if invited:
            return [name for name in invited if name in names]
        return sorted(names)

    def evaluators(self) -> list[str]:
        """Sorted names of those who only evaluate."""
        return sorted(p.worker for p in self._present.values() if not p.trains)


@dataclass(frozen=True, slots=True)
class Rest:
    """How many rounds a worker is not chosen for, and its last failure."""

    rounds: int
    why: str


@dataclass(slots=True)
class _Record:
    """A worker that has failed and has not been counted since, or has lied."""

    failures: int = 0
    strikes: int = 0
    why: str = ""
    rest: int = 0  # the length of its last rest
    until: int = 0  # so many rounds must be over


class Rests:
    """Who keeps failing, and is not chosen for a while.

    A round is one try at a version here, whether it made one. One counted update clears a worker of its failures, but
    nothing clears it of lies: invalid messages and updates. One more of either after a rest begins the next.
    """

    def __init__(self) -> None:
        self._over = 0
        self._records: dict[str, _Record] = {}

    def note(self, fared: Mapping[str, str], struck: Mapping[str, Mapping[str, Any]] = _NOBODY) -> dict[str, Rest]:
        """One more round is over; who begins to rest.

        Args:
            fared: how its workers have fared, see `Round.fared`.
            struck: who has lied since the round before, how often and what about, see `Facts.struck`.
        """
        self._over += 1
        begun = {}
        for worker in {**fared, **struck}:
            record = self._records.pop(worker, None) or _Record()
            why, lie = fared.get(worker, ""), struck.get(worker, {"times": 0, "why": ""})
            record.failures = record.failures + 1 if why else record.failures if worker not in fared else 0
            record.strikes += lie["times"]
            if not record.failures and not record.strikes:
                continue
            self._records[worker] = record
            record.why = lie["why"] or why or record.why
            if (why and record.failures >= FAILURES_MAX) or (lie["times"] and record.strikes >= STRIKES_MAX):
                record.rest = min(2 * record.rest, REST_ROUNDS_MAX) or REST_ROUNDS
                record.until = self._over + record.rest
                begun[worker] = Rest(record.rest, record.why)
        while len(self._records) > WORKERS_MAX:  # whoever failed longest ago is forgotten
            del self._records[next(iter(self._records))]
        return begun

    def excuse(self, declined: Mapping[str, str]) -> None:
        """Let those rest whose data's owners did not allow the round that is over: a little, and never for longer.

        Hours come and go, cohorts grow, and whoever owns the data may change the rules at any time.
        """
        for worker, why in declined.items():
            record = self._records.setdefault(worker, _Record())
            record.why, record.until = why, max(record.until, self._over + REST_ROUNDS)

    def remember(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Take up what a run's history says of how its workers have fared."""
        for line in lines:
            if {"counted", "failed"} <= line.keys():
                self.note({**dict.fromkeys(line["counted"], ""), **line["failed"]}, line.get("struck", _NOBODY))
                self.excuse(line.get("declined", {}))

    @property
    def present(self) -> dict[str, Rest]:
        """Who rests, for how many more rounds, and why."""
        return {w: Rest(r.until - self._over, r.why) for w, r in self._records.items() if r.until > self._over}

    def spare(self, trainers: Sequence[str], quorum: int) -> list[str]:
        """The trainers without those who rest; all of them if there is no quorum without: nobody waits for ever."""
        resting = self.present
        fit = [worker for worker in trainers if worker not in resting]
        return fit if len(fit) >= quorum else list(trainers)


def choose_cohort(trainers: Sequence[str], size: int, dice: random.Random) -> list[str]:
    """`size` of the trainers, each equally likely, kept in their order; all of them when they are fewer."""
    if len(trainers) <= size:
        return list(trainers)
    chosen = set(dice.sample(list(trainers), size))
    return [name for name in trainers if name in chosen]


def draw_cohort(trainers: Sequence[str], rate: float, dice: random.Random) -> list[str]:
    """Each of the trainers with a probability of `rate`, whoever else is drawn; perhaps nobody. In their order."""
    return [name for name in trainers if dice.random() < rate]


def may_begin(present: int, cohort: int, quorum: int, *, waited_s: float, gather_s: float) -> tuple[bool, str]:
    """Whether a round may begin with the trainers present, and why.

    A full cohort begins at once. Less than that, but a quorum, begins when `gather_s` have passed, so that the first
    round after the coordinator came up does not depend on who was quickest to join; later ones wait for nobody.
    """
    if present >= cohort:
        return True, f"{present} of {cohort} workers are here"
    if present < quorum:
        return False, f"waiting for workers: {present} here, quorum {quorum}"
    if waited_s < gather_s:
        return False, f"{present} of {cohort} workers are here; the others have {gather_s:.0f} s to join"
    return True, f"{present} of {cohort} workers are here, quorum {quorum}"
