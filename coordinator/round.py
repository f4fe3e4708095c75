"""One round: who was asked, who has answered, whether it is over, and why.

Pure: time comes in as an argument, a decision comes out with its reason in words. Does not know tensors, queues or
files, nor what an update holds.

A round has turns. A parallel round has one turn with the whole cohort; a cyclic one has a turn for each worker, which
starts from the weights that the turn before left. Rules, all of them here:

    open       somebody who was asked in this turn may still answer, the target is not reached, and the turn's
               deadline has not passed; or an upload that was accepted is still being drained; or turns remain
    closed     no turn remains and the counted updates reach the quorum
    abandoned  no turn remains and they do not

A worker whose lease has ended is waited for only while the quorum is missing: it may return before the deadline.
**A turn always ends**: at its deadline, or, while something is being drained, `turn_s` after that and no later (a
minute if that is more: a deadline of seconds need not cut off those who have kept it). When it has ended nothing
more is taken into its sum; what was being added counts, what was only being received does not.
"""

from collections.abc import Collection, Iterable, Sequence
from enum import Enum
from itertools import islice

from broker.messages import EXAMPLES_MAX, Attempt, Update
from broker.tensors import Layout

DRAIN_S_MIN = 60.0
"""How long what was accepted before the deadline may be received after it, if `turn_s` is less."""
NAMED_MAX = 12
"""So many workers are named where it is said who is waited for; `waits_for` has them all."""
WHY_MAX = 4000
"""Characters of why a round was abandoned: there may be thousands who have refused."""
REISSUES_MAX = 32
"""So often a worker may lose its task in one turn and be sent it again."""


class Phase(Enum):
    """Whether the round goes on."""

    OPEN = "open"
    CLOSED = "closed"
    ABANDONED = "abandoned"


class Verdict(Enum):
    """What an update is to the round it came into."""

    ACCEPTED = "accepted"
    LATE = "late"
    STRANGER = "stranger"
    DUPLICATE = "duplicate"
    INVALID = "invalid"


class Round:
    """The state of one attempt at one version; changed only by the methods that are verbs.

    Attributes:
        of: run, round and attempt.
        cohort, members: everyone chosen, in order; the same, to be looked up.
        quorum: fewest counted updates that make a version.
        target: most of them; when they are there, nobody else is waited for.
        counted: worker → examples, for every update in the sum.
        refused: worker → reason, for everyone who will not contribute any more.
        declined: those of them whose data's owner does not allow it, and why.
        asked: the workers of the present turn.
        outstanding: those of them who have neither been counted nor refused, in order.
        claimed: those who have said that the whole task is with them; decides nothing.
        deadline_at: when the present turn stops waiting for answers.
        ends_at: when it stops waiting for uploads that were accepted before.
    """

    def __init__(
        self, of: Attempt, turns: Sequence[Sequence[str]], *, quorum: int, turn_s: float, target: int | None = None
    ) -> None:
        self.of = of
        self.cohort = tuple(worker for turn in turns for worker in turn)
        self.members = frozenset(self.cohort)
        self.quorum = quorum
        self.target = len(self.cohort) if target is None else target
        self.counted: dict[str, int] = {}
        self.refused: dict[str, str] = {}
        self.declined: dict[str, str] = {}
        self._turns = [tuple(turn) for turn in turns]
        self._turn_s = turn_s
        self.asked: tuple[str, ...] = ()
        self.outstanding: dict[str, None] = {}
        self._arriving: dict[str, None] = {}
        self._lost: set[str] = set()
        self._left: set[str] = set()
        self._revoked: set[str] = set()
        self._silent: dict[str, str] = {}  # worker → why its turn ended without it
        self._losses: dict[str, int] = {}  # worker → how often it lost its task in this turn
        self.claimed: set[str] = set()
        self.deadline_at = self.ends_at = float("-inf")
        self._over = ""  # why the present turn has ended, once it has

    def begin_turn(self, now: float, *, turn_s: float | None = None) -> tuple[str, ...]:
        """Go on to the next turn, which has `turn_s`, or as long as any; who is to be asked."""
        self.asked = self._turns.pop(0)
        self.deadline_at = now + (self._turn_s if turn_s is None else turn_s)
        self.ends_at = self.deadline_at + max(self._turn_s, DRAIN_S_MIN)
        self.outstanding = dict.fromkeys(w for w in self.asked if w not in self.counted and w not in self.refused)
        self._arriving.clear()
        self._losses.clear()
        self._over = ""
        return self.asked

    def end_turn(self, now: float) -> None:
        """The turn is over and stays so, whoever comes or goes; what is being added may still be counted."""
        self._over = self.turn_over(now)[1]
        for worker in self.outstanding.keys() - self._arriving.keys():
            if worker in self._lost:
                self._silent[worker] = "it went away and owed an update"
            elif now >= self.deadline_at and not self.full:
                self._silent[worker] = f"nothing came from it within {self._turn_s:g} s"

    @property
    def outcome(self) -> tuple[Phase, str] | None:
        """What the round has come to with the present turn; None while that goes on."""
        return self.phase(self.ends_at) if self._over else None

    @property
    def has_turn(self) -> bool:
        """Whether a turn remains to be begun."""
        return bool(self._turns)

    def judge(self, of: Attempt, worker: str) -> tuple[Verdict, str]:
        """What an update of this worker, made for `of`, is to this round, and why."""
        if of.run != self.of.run:
            return Verdict.STRANGER, f"it is for the run {of.run}, this is {self.of.run}"
        if (of.round, of.attempt) != (self.of.round, self.of.attempt):
            return Verdict.LATE, f"it is for {of}, this is {self.of}"
        if worker not in self.members:
            return Verdict.STRANGER, f"{worker} was not asked in {self.of}"
        if worker in self._revoked:
            return Verdict.STRANGER, f"{worker} belongs to the federation no more"
        if worker in self.counted or worker in self._arriving:
            return Verdict.DUPLICATE, f"an update of {worker} is counted in {self.of} already"
        if worker in self.refused:
            return Verdict.LATE, f"{worker} is out of {self.of}: {self.refused[worker]}"
        if worker not in self.outstanding:
            comes = any(worker in turn for turn in self._turns)
            return Verdict.LATE, f"the turn of {worker} in {self.of} {'has not come' if comes else 'is over'}"
        if self.full:
            return Verdict.LATE, f"the target of {self.of} is reached: {self.target} updates are counted"
        if self.outcome:
            return Verdict.LATE, f"{self.of} is being summed up"
        return Verdict.ACCEPTED, "in time"

    def accept(self, worker: str) -> None:
        """An update was judged ACCEPTED; its parts are on the way, and the round waits for them."""
        assert worker in self.outstanding
        self._arriving[worker] = None

    def takes(self, worker: str) -> bool:
        """Whether the accepted update of a worker is still wanted: if not when its adding begins, it is left."""
        return worker in self._arriving and not self._over and not self.full

    def count(self, worker: str, examples: int) -> None:
        """The update is in the sum."""
        self.outstanding.pop(worker, None)
        self._arriving.pop(worker, None)
        self.counted[worker] = examples

    def drop_out(self, worker: str, reason: str) -> None:
        """What was counted, because it was ready for a secure sum, is not in it: a failure, goodbye or not."""
        if self.counted.pop(worker, None) is not None:
            self._left -= {worker} - self.declined.keys()
            self.refuse(worker, reason)

    def go_without(self, reason: str, fault: Collection[str] = ()) -> None:
        """Nothing is counted, and the version stays what it was: a sum that is lost may not be asked for again.

        It is a failure of those whose `fault` that was; if nobody knows, of everyone.
        """
        for worker in [*self.counted]:
            self.drop_out(worker, f"its secure sum is lost, and no other may be revealed: {reason}")
            if fault and worker not in fault:
                self._left.add(worker)
        self.quorum = 0

    def withdraw(self, worker: str, reason: str) -> None:
        """The worker says that it will not contribute; what is arriving already counts all the same."""
        if worker not in self._arriving and worker not in self.refused:  # the first reason is the one to read
            self.refuse(worker, reason)

    def leave(self, worker: str, reason: str) -> None:
        """The worker withdraws with a goodbye, which is no failure."""
        self.withdraw(worker, reason)
        if self.refused.get(worker) == reason or worker in self.counted:
            self._left.add(worker)

    def revoke(self, worker: str, reason: str) -> None:
        """The worker belongs to the federation no more: what arrives from it is left, what is in the sum stays."""
        self.refuse(worker, reason)
        self._revoked.add(worker)
        self._left.add(worker)

    def decline(self, worker: str, reason: str) -> None:
        """The worker withdraws because its data's owner wants it, which is no failure either."""
        self.leave(worker, reason)
        if worker in self._left:
            self.declined[worker] = reason

    def refuse(self, worker: str, reason: str) -> None:
        """The worker will not contribute to this round, nor what is arriving; nobody waits for it any more."""
        self.outstanding.pop(worker, None)
        self._arriving.pop(worker, None)
        if worker in self.members and worker not in self.counted:
            self.refused[worker] = reason

    def lose(self, worker: str) -> None:
        """The worker's lease has ended, or it has left; it may come back."""
        if worker in self.members:
            self._lost.add(worker)

    def is_away(self, worker: str) -> bool:
        """Whether the worker was here, and its lease has ended or it has left."""
        return worker in self._lost or worker in self._left

    def find(self, worker: str) -> bool:
        """The worker is (back) here; True when it still owes this turn an update."""
        self._lost.discard(worker)
        return worker in self.outstanding and worker not in self._arriving

    def reissue(self, worker: str) -> bool:
        """The worker has lost its task; whether it is to be sent again. Too often, and it is out of the round."""
        self.claimed.discard(worker)
        self._losses[worker] = losses = self._losses.get(worker, 0) + 1
        if losses > REISSUES_MAX:
            self.refuse(worker, f"it has lost its task {losses} times")
        return losses <= REISSUES_MAX

    @property
    def full(self) -> bool:
        """Whether the target is reached."""
        return len(self.counted) >= self.target

    @property
    def waits_for(self) -> dict[str, str]:
        """Worker → what is waited for, for everyone outstanding."""

        def awaited(worker: str) -> str:
            if worker in self._arriving:
                return "its update is being received"
            if worker in self._lost:
                return "it is away and may return"
            return "it trains or uploads" if worker in self.claimed else "it has not got the whole task yet"

        return {worker: awaited(worker) for worker in self.outstanding}

    @property
    def picture(self) -> dict[str, object]:
        """How it stands, for people."""
        return {
            "round": self.of.round, "attempt": self.of.attempt, "cohort": self.cohort, "quorum": self.quorum,
            "target": self.target, "counted": sorted(self.counted), "waiting": self.waits_for,
            "refused": dict(self.refused),
        }  # fmt: skip

    @property
    def fared(self) -> dict[str, str]:
        """Worker → why it failed this round, empty for those who were counted.

        Without those of whom the round can say neither: they said goodbye, were not needed any more, or were cut off.
        """
        refused = {worker: reason for worker, reason in self.refused.items() if worker not in self._left}
        return self._silent | refused | dict.fromkeys(self.counted, "")

    def turn_over(self, now: float) -> tuple[bool, str]:
        """Whether the present turn waits for nobody any more, and why."""
        if self._over:
            return True, self._over
        waiting = self.outstanding
        if not waiting:
            return True, "everyone who was asked has answered"
        if self.full:
            return True, "the target is reached"
        if self._arriving:
            names = some(self._arriving)
            if now >= self.ends_at:
                return True, f"the time for uploads has passed without {names}"
            return False, f"receiving from {names}"
        if now >= self.deadline_at:
            return True, f"the deadline has passed without {some(waiting)}"
        away = waiting.keys() & self._lost
        if len(away) < len(waiting):
            return False, f"waiting for {some(w for w in waiting if w not in away)}"
        if len(self.counted) >= self.quorum or self._turns:
            return True, f"{some(waiting)} went away"
        return False, f"waiting for {some(waiting)} to return"

    def phase(self, now: float) -> tuple[Phase, str]:
        """Open, closed or abandoned, and why."""
        over, why = self.turn_over(now)
        if not over:
            return Phase.OPEN, why
        if self._turns:
            return Phase.OPEN, f"next is the turn of {', '.join(self._turns[0])}"
        tally = f"{len(self.counted)}/{len(self.cohort)} updates, quorum {self.quorum}"
        if len(self.counted) >= self.quorum:
            return Phase.CLOSED, f"{tally}: {why}" if self.full and self.outstanding else tally
        refusals = "".join(f"; {worker}: {reason}" for worker, reason in self.refused.items())
        return Phase.ABANDONED, f"{tally}: {why}{refusals}"[:WHY_MAX]


def some(names: Iterable[str]) -> str:
    """The names, of many only the first: nobody reads thousands, time and again."""
    first = [*islice(names, NAMED_MAX + 1)]
    return ", ".join(first[:NAMED_MAX] + ["others"] * (len(first) > NAMED_MAX))


def judge(
    update: Update, now_open: Round | None, layout: Layout, *, examples_max: int = EXAMPLES_MAX
) -> tuple[Verdict, str]:
    """What an update is to the round that is open, if one is, and why; `layout` is what its payload must have."""
    if now_open is None:
        return Verdict.LATE, f"it is for {update.of}, which is over"
    verdict, reason = now_open.judge(update.of, update.worker)
    if verdict is not Verdict.ACCEPTED:
        return verdict, reason
    if differs := layout.difference(update.payload.layout):
        return Verdict.INVALID, f"its tensors are not those that the plan asks for: {differs}"
    if update.version != now_open.of.round - 1:  # round n makes version n
        return Verdict.INVALID, f"it is made from version {update.version}, not {now_open.of.round - 1}"
    if update.examples > examples_max:
        return Verdict.INVALID, f"it counts {update.examples} examples, and examples_max is {examples_max}"
    return verdict, reason
