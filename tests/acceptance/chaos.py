"""Federations that suffer: faults drawn from a seed, and a supervisor that starts again what was killed.

Knows how each fault is brought about and undone, and when: by what the run has reached, plus a little of the seed's
chance. Does not know what must be true afterwards; that is the tests'.
"""

import contextlib
import os
import random
import signal
import sys
import time
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from broker.errors import UsageError
from broker.folder import BROKER
from broker.processes import holder
from broker.topology import inbox_queue, upload_queue
from tests.acceptance.federation import Federation
from tests.acceptance.proxy import Line, Network, Way
from tests.benchmarks.troupe import offspring
from tests.node import Node

LEARNER = """
import time
from pathlib import Path
import torch
from torch import nn

PLACE = Path({place!r})

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.many = nn.Parameter(torch.zeros({floats}))
        self.few = nn.Linear(3, 5)
        self.register_buffer("rounds", torch.zeros((), dtype=torch.int64))

def model():
    return Model()

def data(source):
    return source

def train(model, data, settings):
    model.rounds += 1
    number, stage = int(model.rounds), PLACE / settings["stage"]
    (stage / f"began-{{data}}-{{number}}").touch()
    end = time.monotonic() + 120
    while int((stage / "gate").read_text() or 0) < number:
        assert time.monotonic() < end, "the gate was never opened"
        time.sleep(0.01)
    time.sleep(settings["nap"])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn(parameter.shape) / number
    (stage / f"ended-{{data}}-{{number}}").touch()
    return 1 + int(torch.randint(1000, ())), {{"loss": float(torch.rand(()))}}

def evaluate(model, data):
    return {{"loss": float(model.many.abs().mean()), "examples": 1}}
"""
OPEN = 10**9
STAGES = ("training", "trained", "closed")
HESITATION_S = 60.0
"""How long a fault may take until its victim is well enough for it."""
AGAIN_S = 0.5
"""A supervisor's pause before it starts what has ended by itself."""
KINDS: Mapping[str, tuple[str, float, float, int]] = {
    # what → whose, for at least and at most so many seconds, how many cards of a deck
    "kill coordinator": ("coordinator", 0.0, 1.5, 4),
    "kill worker": ("worker", 0.0, 1.5, 4),
    "kill child": ("worker", 0.0, 0.0, 2),
    "kill guard": ("worker", 0.0, 0.0, 1),
    "kill broker": ("broker", 0.0, 1.0, 1),
    "restart broker": ("broker", 0.0, 0.0, 1),
    "stop coordinator": ("coordinator", 0.5, 5.0, 2),
    "stop worker": ("worker", 0.5, 5.0, 2),
    "stop broker": ("broker", 0.5, 4.0, 1),
    "cut": ("party", 0.0, 0.0, 4),
    "dark": ("party", 0.5, 5.0, 2),
    "deaf": ("party", 0.5, 4.0, 1),
    "mute": ("party", 0.5, 4.0, 1),
    "close all connections": ("broker", 0.0, 0.0, 1),
    "memory alarm": ("broker", 0.5, 3.0, 1),
    "delete upload queue": ("worker", 0.0, 0.0, 1),
    "delete inbox": ("coordinator", 0.0, 0.0, 1),
}
ASKS = {"close all connections", "memory alarm", "delete upload queue", "delete inbox"}
"""Faults that rabbitmqctl brings about, for which the broker must run."""
STOPS: Mapping[str, tuple[Way, ...]] = {"dark": ("up", "down"), "deaf": ("down",), "mute": ("up",)}
"""Lines on which nothing gets through, and which way."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault: it strikes when `watch` is so far in `round`, and `jitter_s` later; it lasts `lasts_s`."""

    kind: str
    victim: str
    round: int
    stage: str
    watch: str
    jitter_s: float
    lasts_s: float

    def __str__(self) -> str:
        return (
            f"{self.kind} ({self.victim}) in round {self.round} when {self.watch} has come to “{self.stage}” "
            f"+ {self.jitter_s:.3f} s, for {self.lasts_s:.2f} s"
        )


def schedule(seed: int, count: int, workers: Sequence[str], kinds: Sequence[str] = tuple(KINDS)) -> list[Fault]:
    """The faults of a seed, in order: whole shuffled decks, so that each kind comes about as often as it should."""
    dice, faults, deck, number = random.Random(seed), list[Fault](), list[str](), 1
    whose = {"coordinator": ["coordinator"], "broker": ["broker"], "worker": [*workers]}
    whose["party"] = ["coordinator", *workers]
    while len(faults) < count:
        if not deck:
            deck = [kind for kind in kinds for _ in range(KINDS[kind][3])]
            dice.shuffle(deck)
        kind = deck.pop()
        who, least, most, _ = KINDS[kind]
        victim, number = dice.choice(whose[who]), number + dice.choice((0, 1, 1, 1, 2))
        watch = victim if victim in workers else dice.choice(list(workers))
        jitter_s, lasts_s = dice.uniform(0.0, 0.12), dice.uniform(least, most)
        faults.append(Fault(kind, victim, number, dice.choice(STAGES), watch, jitter_s, lasts_s))
    return faults


class Arena:
    """A federation, each party with a line of its own to a broker of its own.

    Attributes:
        federation: its run and processes.
        lines: each party's line.
        struck: the faults that have been brought about.
        exits: processes that ended by themselves before they had reached the broker, as they may.
        handles, memory: of the coordinator at work, as sampled: the most files it had open, and bytes resident.
    """

    def __init__(self, folder: Path, node: Node, network: Network, *, workers: int = 3, floats: int = 1000) -> None:
        self.node = node
        self.federation = Federation(folder, node.url)
        self.federation.learner.write_text(LEARNER.format(place=str(folder), floats=floats))
        self.workers = [f"w{i + 1}" for i in range(workers)]
        self.lines: dict[str, Line] = {party: network.line() for party in ("coordinator", *self.workers)}
        self.struck: list[Fault] = []
        self.exits: list[str] = []
        self.handles = self.memory = 0
        self._stage = folder
        self._plan: tuple[str, ...] = ()
        self._since: dict[str, int] = {}  # process → where its log stood when it was started
        self._hurt: dict[str, tuple[float, Fault]] = {}  # who → when it will be healed, and of what
        self._seen = (-1, 0)
        self._seconds = [time.monotonic()]

    # -- processes ----------------------------------------------------------------------------------------------

    def start(self, party: str) -> None:
        """Start a party, at the far end of its line."""
        f, port = self.federation, self.lines[party].port
        f.env["FLUFFLE_BROKER"] = self.node.url.replace(f":{self.node.url.rsplit(':', 1)[1]}", f":{port}/")
        log = f.folder / f"{party}.log"
        self._since[party] = log.stat().st_size if log.exists() else 0
        if party == "coordinator":
            f.coordinator(*self._plan)
        else:
            f.worker(party)

    def begin(self, name: str, rounds: int, *, gate: int = OPEN, nap: float = 0.02, seed: int = 11) -> None:
        """Make a run and start its coordinator; training waits for the gate, which is the last round that may end."""
        f = self.federation
        f.run, self._stage = f.folder / name, f.folder / f"stage-{name}"
        self._stage.mkdir()
        self.open_gate(gate)
        f.fluffle("init", str(f.learner), str(f.run), "--seed", str(seed), "--set", f"nap={nap}")
        everyone = str(len(self.workers))
        self._plan = (
            *("--rounds", str(rounds), "--cohort", everyone, "--quorum", everyone),
            *("--round-s", "900", "--gather-s", "900", "--set", f"stage={self._stage.name}"),
        )
        self.start("coordinator")

    def end(self) -> None:
        """End everything, whatever state it is in."""
        for party, process in self.federation.processes.items():
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
            self.lines[party].go()
        self._signal_broker(signal.SIGCONT)
        self.federation.end()

    def _signal_broker(self, number: int) -> None:
        broker = holder(self.node.folder / BROKER)
        if broker is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(broker, number)

    # -- progress -----------------------------------------------------------------------------------------------

    def open_gate(self, last: int) -> None:
        fresh = self._stage / "gate.new"
        fresh.write_text(str(last))
        fresh.replace(self._stage / "gate")

    def made(self) -> int:
        """Versions in the history."""
        history = self.federation.run / "history.jsonl"
        size = history.stat().st_size if history.exists() else 0
        if size != self._seen[0]:
            self._seen = (size, len(self.federation.rounds()))
        return self._seen[1]

    def reached(self, fault: Fault) -> bool:
        """Whether the run has come to where a fault is to strike."""
        if self.made() >= fault.round:
            return True
        mark = {"training": "began", "trained": "ended"}.get(fault.stage)
        return mark is not None and (self._stage / f"{mark}-{fault.watch}-{fault.round}").exists()

    def look(self) -> None:
        """Sample what the coordinator holds."""
        pid = self.federation.processes["coordinator"].pid
        with contextlib.suppress(OSError):
            self.handles = max(self.handles, handles(pid))
            self.memory = max(self.memory, resident(pid))

    # -- faults -------------------------------------------------------------------------------------------------

    def suffer(self, faults: Sequence[Fault], *, within_s: float) -> None:
        """Let the run go to its end under these faults; whatever goes wrong, say under which and where."""
        try:
            self._suffer(list(faults), time.monotonic() + within_s)
        except BaseException:
            sys.stderr.write(self.story(faults))
            raise

    def _suffer(self, faults: list[Fault], until: float) -> None:
        due_at: float | None = None
        self.open_gate(faults[0].round if faults else OPEN)
        while True:
            now = time.monotonic()
            assert now < until, f"not done in time: {self.made()} versions, {len(faults)} faults to come"
            for who in [who for who, (at, _) in self._hurt.items() if now >= at]:
                self._heal(who, self._hurt.pop(who)[1])
            self._supervise()
            if "coordinator" not in self._hurt and self.federation.processes["coordinator"].poll() == 0:
                assert not faults, f"the run ended before {len(faults)} faults, the first of them {faults[0]}"
                break
            if faults and due_at is None and self.reached(faults[0]):
                due_at = now + faults[0].jitter_s
            assert due_at is None or now < due_at + HESITATION_S, f"could not be brought about: {faults[0]}"
            if due_at is not None and now >= due_at and self._may(faults[0]) and self._strike(faults[0]):
                self.struck.append(faults.pop(0))
                due_at = None
                self.open_gate(faults[0].round if faults else OPEN)
            if not faults and not self._hurt:
                self.look()
            time.sleep(0.005)
        for who in list(self._hurt):
            self._heal(who, self._hurt.pop(who)[1])

    def _supervise(self) -> None:
        """Start again what has ended by itself, if it had not reached the broker; anything else may not end."""
        for party, process in self.federation.processes.items():
            if party in self._hurt or process.poll() in {None, 0 if party == "coordinator" else None}:
                continue
            said = self.federation.log(party).encode()[self._since[party] :].decode().strip()
            assert "connected to" not in said, f"{party} ended with status {process.returncode}: {said[-600:]}"
            self.exits.append(f"{party}: {said[-200:]}")
            fault = Fault("ended by itself", party, 0, "", "", 0.0, AGAIN_S)
            self._hurt[party] = time.monotonic() + AGAIN_S, fault

    def _may(self, fault: Fault) -> bool:
        """Whether its victim is well, and the broker, if that is to be asked."""
        return fault.victim not in self._hurt and not (fault.kind in ASKS and "broker" in self._hurt)

    def _strike(self, fault: Fault) -> bool:
        """Bring a fault about; False: not possible at the moment."""
        f, kind, victim = self.federation, fault.kind, fault.victim
        if kind in ASKS:
            return self._ask(fault)
        if kind == "cut":
            return self.lines[victim].cut() > 0
        if kind in STOPS:
            self.lines[victim].stop(*STOPS[kind])
        elif victim == "broker":
            self._strike_broker(kind)
        elif kind in {"kill child", "kill guard"}:
            below = offspring(f.processes[victim].pid)  # the guard, and then the training process that it keeps
            if len(below) < 2:
                return False
            os.kill(below[0 if kind == "kill guard" else -1], signal.SIGKILL)
        elif kind.startswith("kill"):
            f.kill(victim)
        else:
            f.processes[victim].send_signal(signal.SIGSTOP)
        self._hurt[victim] = time.monotonic() + fault.lasts_s, fault
        return True

    def _strike_broker(self, kind: str) -> None:
        if kind == "kill broker":
            self.node.kill()
        elif kind == "restart broker":
            self.node.restart()
        else:
            self._signal_broker(signal.SIGSTOP)

    def run_name(self) -> str:
        """What the run is called on the wire."""
        return str(tomllib.loads((self.federation.run / "plan.toml").read_text())["run"])

    def _ask(self, fault: Fault) -> bool:
        words = {
            "close all connections": ("close_all_connections", "chaos"),
            "memory alarm": ("set_vm_memory_high_watermark", "absolute", "1MB"),
            "delete upload queue": ("delete_queue", upload_queue(fault.victim)),
            "delete inbox": ("delete_queue", inbox_queue(self.run_name())),
        }
        try:
            self.node.ctl(*words[fault.kind])
        except UsageError:
            return False  # there is no such queue yet
        if fault.kind == "memory alarm":
            self._hurt["broker"] = time.monotonic() + fault.lasts_s, fault
        return True

    def _heal(self, who: str, fault: Fault) -> None:
        kind = fault.kind
        if kind in {"kill coordinator", "kill worker", "ended by itself"}:
            self.start(who)
        elif kind == "kill broker":
            self.node.restart()
        elif kind == "stop broker":
            self._signal_broker(signal.SIGCONT)
        elif kind.startswith("stop"):
            self.federation.processes[who].send_signal(signal.SIGCONT)
        elif kind in STOPS:
            self.lines[who].go()
        elif kind == "memory alarm":
            self.node.ctl("set_vm_memory_high_watermark", "0.4")

    # -- telling ------------------------------------------------------------------------------------------------

    def story(self, faults: Sequence[Fault]) -> str:
        """The schedule, how far it came, and the ends of all logs."""
        lines = ["", f"{self.made()} versions made; the schedule (*: has struck):"]
        lines += [f" {'*' if i < len(self.struck) else ' '} {fault}" for i, fault in enumerate(faults)]
        lines += [f"under way: {fault}" for _, fault in self._hurt.values()]
        lines += [f"ended by itself: {each}" for each in self.exits]
        for party in self.federation.processes:
            lines += [f"-- {party}", *self.federation.log(party).splitlines()[-40:]]
        return "\n".join(lines) + "\n"

    def depths(self) -> dict[str, int]:
        """Every queue of ours, and how much is in it."""
        rows = (row.split() for row in self.node.ctl("list_queues", "name", "messages").splitlines())
        return {row[0]: int(row[1]) for row in rows if len(row) == 2 and row[0].startswith("fluffle.")}

    def counts(self) -> Counter[str]:
        return Counter(fault.kind for fault in self.struck)


def resident(pid: int) -> int:
    """Bytes of memory that a process has for itself alone or shares, without files that it has mapped."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def handles(pid: int) -> int:
    return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())
