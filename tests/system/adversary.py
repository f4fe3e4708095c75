"""What may break, and when: at any step, as the dice of a seed have it.

Knows each kind of fault and for how long it lasts. Does not know what must hold all the same (`simulation.py`).

A step is anything that is asked of the broker, delivered, acknowledged, or written to a disk; a process may die right
before it and right after it. Each seed draws how much breaks, how often, of which kinds, and how slow everything is.
When all has broken that was to break, nothing does any more.
"""

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from broker.link import Lane
from broker.messages import Message
from tests.memory import MemoryBroker
from tests.system.cable import Cable, Network
from tests.system.virtual import Process, VirtualLoop

FAULTS_MAX = (0, 1, 3, 6, 12, 24)
OFTEN = (0.003, 0.01, 0.03, 0.1)
SLOW_S = (0.0, 0.002, 0.05, 1.0)
AWAY_S_MIN, AWAY_S_MAX = 0.05, 60.0
STALE_S = 11.0
"""After so long a standby coordinator takes over."""
COORDINATOR = "coordinator"


@dataclass(eq=False)
class Party:
    """One life of the coordinator or of a worker.

    Attributes:
        stop: what SIGTERM sets.
        fails: its next training fails.
    """

    name: str
    process: Process
    cable: Cable
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    fails: bool = False


class Stage(Protocol):
    """Where it all happens."""

    loop: VirtualLoop

    def present(self, process: Process) -> Party | None:
        """Whose present life this process is, if it is one."""

    def again(self, party: Party, after_s: float, *, forced: bool = False) -> None:
        """Start it anew after a while."""

    def note(self, who: str, what: str) -> None:
        """This has happened."""

    def sent(self, message: Message, keys: tuple[str, ...]) -> None:
        """This is on its way."""

    def lasts(self, for_s: float) -> None:
        """A fault lasts so long; the run may take longer accordingly."""


class Adversary:
    """One seed's; see `cable.Adversary`.

    Attributes:
        chance: everything else that is left to chance: whose turn it is, how long things take.
        faults: how many of each kind have happened.
        left: how many may still happen.
    """

    def __init__(self, seed: int, stage: Stage) -> None:
        self.chance = random.Random(f"chance/{seed}")
        self.dice = random.Random(f"faults/{seed}")
        self.faults: Counter[str] = Counter()
        self.left = self.dice.choice(FAULTS_MAX)
        self._often = self.dice.choice(OFTEN)
        self._kinds = sorted(self.dice.sample(sorted(FAULTS), self.dice.randint(1, len(FAULTS))))
        self._slow_s = self.dice.choice(SLOW_S)
        self._stage = stage

    def begin(self, loop: VirtualLoop) -> None:
        """Here is the loop."""
        self.loop = loop
        self.broker = MemoryBroker(loop.time)
        self.network = Network(loop, self.broker, self)

    def step(self, process: Process, what: str) -> None:
        """Let something break now, or not.

        Raises:
            Killed: it was this process.
        """
        process.check()
        self._stage.note(process.name, what)
        if self.left and self.dice.random() < self._often:
            party, kind = self._stage.present(process), self.dice.choice(self._kinds)
            if party and (said := FAULTS[kind](self, party)):
                self._happens(kind, said)
            process.check()

    def fate(self, what: str) -> str:
        """What becomes of something that is sent."""
        for kind in (LOST, UNCONFIRMED):
            if self.left and kind in self._kinds and self.dice.random() < self._often / 4:  # there are so many
                self._happens(kind, what)
                return kind
        return "arrives"

    def sent(self, message: Message, keys: tuple[str, ...]) -> None:
        """See `Stage.sent`."""
        self._stage.sent(message, keys)

    def lag_s(self) -> float:
        """How long something takes: mostly next to nothing."""
        return self.chance.random() ** 4 * self._slow_s

    def away_s(self) -> float:
        """From a moment to a minute, each magnitude as likely as the other."""
        away_s: float = AWAY_S_MIN * (AWAY_S_MAX / AWAY_S_MIN) ** self.dice.random()
        self._stage.lasts(away_s)
        return away_s

    def _happens(self, kind: str, what: str) -> None:
        self.left -= 1
        self.faults[kind] += 1
        self._stage.note("ADVERSARY", f"{kind}: {what}")

    # -- kinds: each says what it has done, or nothing if it has not ------------------------------------------------

    def kill(self, party: Party) -> str:
        """As SIGKILL does; whoever watches over it starts it anew."""
        away_s, noticed_s = self.away_s(), self.dice.choice((0.0, 0.0, self.away_s()))
        party.cable.die(arriving=self.dice.random() < 0.5, noticed_s=noticed_s)
        self.loop.kill(party.process)
        self._stage.again(party, away_s)
        return f"{party.process.name}, for {away_s:.2f} s; its connections for {noticed_s:.2f} s"

    def cut(self, party: Party) -> str:
        """Some of its connections are lost; either end may notice late."""
        lanes = [lane for lane in Lane if self.dice.random() < 0.5] or [Lane.CONTROL]
        told_s, noticed_s = (self.dice.choice((0.0, self.away_s())) for _ in range(2))
        party.cable.cut(*lanes, told_s=told_s, noticed_s=noticed_s)
        names = ", ".join(lane.value for lane in lanes)
        return f"{party.process.name} {names}, noticed after {told_s:.2f} s, by the broker after {noticed_s:.2f} s"

    def darken(self, party: Party) -> str:
        """Its network is gone for a while."""
        away_s = self.away_s()
        party.cable.dark_until = self.loop.time() + away_s
        party.cable.cut(told_s=self.dice.random() * away_s, noticed_s=self.away_s())
        return f"{party.process.name} for {away_s:.2f} s"

    def restart_broker(self, _: Party) -> str:
        """It goes away, and loses what is not persistent."""
        if not self.broker.up:
            return ""
        away_s = self.away_s()
        self.network.restart(away_s)
        return f"for {away_s:.2f} s"

    def block(self, _: Party) -> str:
        """The broker is out of memory or disk, and takes nothing for a while."""
        away_s = self.away_s()
        self.network.blocked_until = self.loop.time() + away_s
        return f"for {away_s:.2f} s"

    def delete_queue(self, _: Party) -> str:
        """By hand."""
        queue: str = self.dice.choice(sorted(self.broker._queues) or [""])
        self.broker.delete(queue)
        return queue

    def halt(self, party: Party) -> str:
        """As SIGSTOP does, and SIGCONT later."""
        away_s = self.away_s()
        party.process.stopped_until = self.loop.time() + away_s
        return f"{party.process.name} for {away_s:.2f} s"

    def follow(self, party: Party) -> str:
        """The coordinator is stopped, and another takes over; then it goes on."""
        if party.name != COORDINATOR:
            return ""
        away_s = STALE_S + self.away_s()
        party.process.stopped_until = self.loop.time() + away_s
        self._stage.again(party, STALE_S, forced=True)
        return f"{party.process.name} for {away_s:.2f} s"

    def leave(self, party: Party) -> str:
        """As SIGTERM does; it comes again."""
        if party.name == COORDINATOR or party.stop.is_set():
            return ""
        party.stop.set()
        return party.process.name

    def fail(self, party: Party) -> str:
        """Its learner raises."""
        if party.name == COORDINATOR:
            return ""
        party.fails = True
        return party.process.name


LOST, UNCONFIRMED = "lost", "unconfirmed"
FAULTS: dict[str, Callable[[Adversary, Party], str]] = {
    "kill": Adversary.kill,
    "cut": Adversary.cut,
    "darken": Adversary.darken,
    "restart of the broker": Adversary.restart_broker,
    "blocked broker": Adversary.block,
    "deleted queue": Adversary.delete_queue,
    "halt": Adversary.halt,
    "followed coordinator": Adversary.follow,
    "leave": Adversary.leave,
    "failed training": Adversary.fail,
    LOST: lambda *_: "",  # drawn by `fate`, where something is sent
    UNCONFIRMED: lambda *_: "",
}
