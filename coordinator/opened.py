"""A round in the making, with all that belongs to it: whom it asks, for what, how its turns' weights are called.

Knows the plan, names and records. Does not know when a turn begins or ends (`service.py`), nor who may be counted
(`round.py`).
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from broker.link import Delivery
from broker.messages import Attempt, Call, Ready, Step, Update
from broker.ring import Form
from coordinator.history import Facts
from coordinator.plan import Plan
from coordinator.roster import choose_cohort, draw_cohort
from coordinator.round import Phase, Round
from coordinator.unmasking import Unmasking


@dataclass(slots=True)
class Secret:
    """A secure sum in the making.

    Attributes:
        serial: tells it from others of the same attempt.
        context: what all keys and signatures in it bind.
        core: who has said what, and the masked sum.
        ready: worker → its keys, of everyone who has advertised some.
        form: what the words stand for, once that is settled.
        coming: worker → what it said of its masked words, which are on their way.
        calls: worker → what it was told last.
        gone: worker → why it has dropped out.
        finished: whose words are in the sum, once that is known.
        said: what counts, in order.
        released: something may have been revealed.
    """

    serial: int
    context: bytes
    core: Unmasking
    ready: dict[str, Ready] = field(default_factory=dict)
    form: Form | None = None
    coming: dict[str, Step] = field(default_factory=dict)
    calls: dict[str, Call] = field(default_factory=dict)
    gone: dict[str, str] = field(default_factory=dict)
    finished: tuple[str, ...] = ()
    said: list[Ready | Step] = field(default_factory=list)
    released: bool = False

    def wants(self, update: Update) -> bool:
        """Whether these masked words are still wanted: those of a sum before this one are not."""
        step = self.coming.get(update.worker)
        said = step is not None and step.payload == update.payload
        return said and self.core.stage == "masked" and update.worker in self.core.waiting


@dataclass(slots=True)
class Open:
    """A round in the making, and what belongs to it alone."""

    round: Round
    weights: memoryview
    check: str  # the checksum of these weights
    facts: Facts
    turn: int = 0
    sent_to: dict[str, str] = field(default_factory=dict)  # worker → the incarnation that was sent the task
    returned: set[str] = field(default_factory=set)  # owe an update, and have lost what they were sent
    held: list[Delivery] = field(default_factory=list)  # accepted updates, acknowledged when the version is safe
    untidy: set[str] = field(default_factory=set)  # sent parts that nobody will drain
    left_s: float | None = None  # taken up again: how long its turn has left
    secret: Secret | None = None  # where updates are only added up in secret
    called: str = ""  # the payload that this turn's workers are sent

    def begin_turn(self) -> None:
        """The next turn has weights of its own, and after a restart perhaps others than before it."""
        self.turn += 1
        self.called = named(self.round.of, self.turn, self.check)

    def is_of_this_turn(self, update: Update) -> bool:
        """Whether the update was made from the weights of this turn."""
        return update.payload.id.startswith(f"{self.called}/")


def asked(plan: Plan, trainers: Sequence[str], number: int) -> list[str]:
    """Who is asked in a round. Where the coordinator's noise counts on chance, from dice that nobody can know.

    The plan's seed is told to every worker.
    """
    if plan.dp == "central":
        return draw_cohort(trainers, plan.rate, random.SystemRandom())
    return choose_cohort(trainers, plan.asks, random.Random(f"{plan.seed}/{number}"))


def begun(plan: Plan, of: Attempt, cohort: Sequence[str]) -> Round:
    """An attempt that nobody has been asked in."""
    turns = [cohort] if plan.schedule == "parallel" else [[worker] for worker in cohort]
    quorum, target = plan.least, plan.cohort
    if plan.dp == "central":  # whether one counts must not depend on who else does
        quorum, target = quorum if plan.rate == 1 else -(-2 * len(cohort) // 3), len(cohort)
    return Round(of, turns, quorum=quorum, turn_s=plan.round_s, target=target)


def releases(here: Open, updates: int, *, veiled: bool) -> bool:
    """Whether there are weights to make when a turn is over.

    Noise costs, so under it only a round that makes a version; but that, too, if it has asked nobody, for dice must
    not be seen to have done so.
    """
    outcome = here.round.outcome
    return outcome is not None and outcome[0] is Phase.CLOSED if veiled else updates > 0 or not here.round.quorum


def named(of: Attempt, turn: int, check: str) -> str:
    """The name of a turn's weights, never that of others: a folder may be older than what workers remember of it."""
    return f"{of.run}/{of.round}/{of.attempt}/{turn}-{check}"
