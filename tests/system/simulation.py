"""The whole federation as a function of a seed: coordinator, workers, broker, network and disk in one loop.

Knows how the parties are started, what is around them, and what must hold whatever breaks. Does not know what breaks
(`adversary.py`), how time and death are made (`virtual.py`), nor how messages travel (`cable.py`).

    python -m tests.system.simulation 17        tells everything that happens in seed 17
"""

import asyncio
import contextvars
import gc
import hashlib
import logging
import os
import random
import secrets
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from broker import topology
from broker.chain import Chain
from broker.errors import LearnerFailed, RunEnded
from broker.messages import Answer, Attempt, Message
from broker.tensors import Layout
from coordinator import history
from coordinator.service import Coordinator
from coordinator.store import VERSIONS, Store
from coordinator.verify import verify
from tests.system.adversary import COORDINATOR, Adversary, Party
from tests.system.cable import Cable
from tests.system.rig import MODEL, Lesson, learned, plan, start_weights
from tests.system.virtual import OURS, Killed, Process, Stuck, VirtualLoop
from workers.post import Shared
from workers.residuals import Residual
from workers.service import Worker
from workers.spool import Slot, Spool, _locked
from workers.training import Seat
from workers.work import Done, Who, Work, task_seed

ROOMS = ("broker", "coordinator", "workers")
NAMES, JUDGE = ("a", "b", "c"), "judge"
ROUNDS = 4
BEGAN_AT = 1_800_000_000.0  # seconds since 1970
AFTER_S = 600.0
"""So long after the last fault a run has ended, whatever it was."""
REST_S = 90.0
WAITING_MAX = 100
LAST_WORDS = 40
TRAINING_S = (0.0, 1.0, 8.0)

# what a run may be asked for; whoever waits for all has the bits of the undisturbed run
PATIENT_S = 3600.0  # nothing is left to the deadline
PLANS: dict[str, dict[str, Any]] = {
    "all": {"cohort": 3, "quorum": 3, "round_s": PATIENT_S},
    "all, kept": {"cohort": 3, "quorum": 3, "round_s": PATIENT_S, "keep_updates": True},
    "all, cyclic": {"cohort": 3, "quorum": 3, "round_s": PATIENT_S, "schedule": "cyclic"},
    "deadline": {"cohort": 3, "quorum": 3, "round_s": 40.0},
    "quorum": {"cohort": 3, "quorum": 2, "round_s": 30.0},
    "over-selected": {"cohort": 2, "quorum": 1, "over_select": 1.5, "round_s": 30.0, "keep_updates": True},
    "cyclic": {"cohort": 3, "quorum": 2, "round_s": 30.0, "schedule": "cyclic"},
}


class Failed(Exception):
    """Something did not hold."""


class Simulation:
    """One seed's.

    Attributes:
        digest: of all that has happened.
    """

    def __init__(self, seed: int, folder: Path, *, tell: Callable[[str], None] | None = None) -> None:
        self.seed = seed
        self.adversary = Adversary(seed, self)
        self.digest = hashlib.sha256()
        self._plan = self.adversary.dice.choice(sorted(PLANS))
        self._names = (*NAMES, JUDGE) if self.adversary.dice.random() < 0.3 else NAMES
        self._training_s = self.adversary.dice.choice(TRAINING_S)
        self._tell = tell
        self._folder = folder
        self._last = deque[str](maxlen=LAST_WORDS)
        self._lives: Counter[str] = Counter()
        self._parties: dict[str, Party] = {}
        self._closing = False
        self._problems: list[str] = []
        self._accepted: set[tuple[Attempt, str]] = set()
        self.loop = VirtualLoop(self.adversary.chance, bound_s=AFTER_S)
        self.loop.thread_s = self.adversary.lag_s
        self.adversary.begin(self.loop)
        self._over = asyncio.Event()

    @property
    def run(self) -> Path:
        return self._folder / "run"

    def go(self) -> None:
        """Run it through, and look at what has come of it.

        Raises:
            Failed: something did not hold; what, and the last of what had happened.
        """
        made = plan(rounds=ROUNDS, gather_s=20.0, **PLANS[self._plan])
        Store.create(self.run, made, MODEL, memoryview(start_weights()))
        handles, world = open_files(), self._world()
        with self._patched():
            try:
                world.run(self.loop.run_until_complete, self._main())
            except Stuck as problem:
                self._problems.append(f"it does not end: {problem}; {Store.open(self.run).now().get('why')}")
            finally:
                world.run(self.loop.end)
                self.loop.close()
        if not self._problems:
            self._check_run()
            self._check_queues()
        self._parties.clear()
        self.adversary.network.cables.clear()
        gc.collect()
        if not self._problems and (left := open_files() - handles) > 0:
            self._problems.append(f"{left} files are open still")
        self._problems += self.loop.complaints
        if self._problems:
            raise Failed(self._story())

    def _story(self) -> str:
        faults = ", ".join(f"{count} {kind}" for kind, count in sorted(self.adversary.faults.items()))
        return "\n".join([
            f"seed {self.seed}, plan {self._plan}: {'; '.join(self._problems[:5])}",
            f"after {faults or 'nothing'}, {self.digest.hexdigest()}", "  …", *(f"  {each}" for each in self._last),
            f"again, with all that happens: python -m tests.system.simulation {self.seed}",
        ])  # fmt: skip

    def _world(self) -> contextvars.Context:
        context = contextvars.copy_context()
        context.run(OURS.set, self.loop.world)
        return context

    # -- the parties --------------------------------------------------------------------------------------------

    async def _main(self) -> None:
        self._begin_coordinator()
        for name in self._names:
            self._begin_worker(name)
        await self._over.wait()
        self.adversary.left = 0
        await asyncio.sleep(REST_S)  # whoever is away is back by then
        self._closing = True
        workers = [party for name, party in self._parties.items() if name != COORDINATOR]
        for worker in workers:
            worker.stop.set()
        await asyncio.wait([worker.process.task for worker in workers if worker.process.task])

    def _begin_coordinator(self, *, forced: bool = False) -> None:
        async def coordinate(party: Party) -> None:
            await Coordinator(Store.open(self.run), party.cable).serve(forced=forced)
            await party.cable.close()

        self._begin(COORDINATOR, coordinate)

    def _begin_worker(self, name: str) -> None:
        async def work(party: Party) -> None:
            spool = Spool(self._folder / name)
            party.process.at_death.append(partial(let_go, spool))
            who = Who(name, "lesson", trains=name != JUDGE, lease_s=15.0, drain_s=5.0)
            seat = cast(Seat, Bench(self, party, Lesson(spool)))  # it asks for the class, and uses these methods
            await Worker(who, Shared(party.cable, spool), seat).serve(party.stop)
            await party.cable.close()
            spool.remove()

        self._begin(name, work)

    def _begin(self, name: str, body: Callable[[Party], Coroutine[Any, Any, None]]) -> None:
        self._lives[name] += 1

        async def live(_: Process) -> None:
            await body(party)

        process = self.loop.begin(f"{name}{self._lives[name]}", live)
        party = self._parties[name] = Party(name, process, Cable(self.adversary.network, process))
        assert process.task is not None
        process.task.add_done_callback(partial(self._ended, party), context=self._world())

    def _ended(self, party: Party, task: asyncio.Task[None]) -> None:
        if not party.process.alive:
            return
        party.process.at_death.clear()
        party.process.task = None
        problem, present = None if task.cancelled() else task.exception(), self._parties[party.name] is party
        if problem is not None and (present or not isinstance(problem, RunEnded)):
            self._problems.append(f"{party.process.name} has ended: {problem!r}")
            self._over.set()
        elif present and party.name == COORDINATOR:
            self._over.set()
        elif present and not self._closing:  # it left
            self.again(party, self.adversary.away_s())

    # -- what the adversary asks for ----------------------------------------------------------------------------

    def present(self, process: Process) -> Party | None:
        """See `Stage.present`."""
        return next((party for party in self._parties.values() if party.process is process), None)

    def again(self, party: Party, after_s: float, *, forced: bool = False) -> None:
        """See `Stage.again`."""

        def begin() -> None:
            if self._closing or self._parties[party.name] is not party:  # another has begun
                return
            if party.name != COORDINATOR:
                self._begin_worker(party.name)
            elif not party.process.alive or (forced and not self._over.is_set()):
                self._begin_coordinator(forced=forced and party.process.alive)

        self.lasts(after_s)
        self.loop.outside(self.loop.time() + after_s, begin)

    def lasts(self, for_s: float) -> None:
        """See `Stage.lasts`."""
        self.loop.bound_s = max(self.loop.bound_s, self.loop.time() + for_s + AFTER_S)

    def note(self, who: str, what: str, *, counts: bool = True) -> None:
        """See `Stage.note`."""
        line = f"{self.loop.time():11.6f} {who:13} {what}"
        if counts:
            self.digest.update(line.encode())
        self._last.append(line)
        if self._tell:
            self._tell(line)

    def sent(self, message: Message, keys: tuple[str, ...]) -> None:
        """Whoever is told that an update is accepted may forget it: its version must be there."""
        if isinstance(message, Answer) and message.verdict == "accepted":
            self._accepted |= {(message.of, worker) for worker in keys}
            if not Store.open(self.run).path(message.of.round).exists():
                self._problems.append(f"{message.of} is said to be accepted, and there is no version of it")

    def training_s(self) -> float:
        """How long a training takes."""
        return self.adversary.chance.random() ** 2 * self._training_s

    # -- what is around them ------------------------------------------------------------------------------------

    @contextmanager
    def _patched(self) -> Iterator[None]:
        """The clock, the dice, the log and the disk are ours."""
        chance = self.adversary.chance
        ours = {
            "time": (time, SimpleNamespace(monotonic=self.loop.time, time=lambda: BEGAN_AT + self.loop.time())),
            "random": (random, SimpleNamespace(uniform=chance.uniform, Random=random.Random)),
            "secrets": (secrets, SimpleNamespace(token_hex=lambda size: chance.randbytes(size).hex())),
        }
        gc.collect()
        gc.disable()  # what lies in circles would else be let go at instants that nobody has drawn
        try:
            with pytest.MonkeyPatch.context() as patch:
                for _, module in sorted(sys.modules.items()):
                    for name, (real, simulated) in ours.items():
                        if module.__name__.split(".")[0] in ROOMS and getattr(module, name, None) is real:
                            patch.setattr(module, name, simulated)
                patch.setattr("workers.spool._locked", locked)
                patch.setattr("coordinator.hands.SEATS", 1)
                patch.setattr("coordinator.desk.SEATS", 1)
                self._patch_disk(patch)
                for room in ROOMS:
                    patch.setattr(logging.getLogger(room), "handlers", [Ear(self)])
                    patch.setattr(logging.getLogger(room), "propagate", False)
                    logging.getLogger(room).setLevel(logging.INFO)
                yield
        finally:
            for room in ROOMS:
                logging.getLogger(room).setLevel(logging.NOTSET)
            gc.enable()

    def _patch_disk(self, patch: pytest.MonkeyPatch) -> None:
        """Whoever is dead writes nothing, and every write is two steps: right before it, and right after it."""

        def stepping(owner: Any, name: str, said: Callable[..., str]) -> None:
            original = getattr(owner, name)

            def write(*arguments: Any, **words: Any) -> Any:
                process = OURS.get(self.loop.world)
                if process is self.loop.world:
                    return original(*arguments, **words)
                self.adversary.step(process, said(*arguments))
                made = original(*arguments, **words)
                self.adversary.step(process, f"{said(*arguments)}: done")
                return made

            patch.setattr(owner, name, write)

        append, replace = Chain.append, Path.replace

        def torn(chain: Chain, file: Any, line: Any) -> None:
            """Should the process die before this is synced, it is the power that has failed."""
            process, end = OURS.get(self.loop.world), file.seek(0, os.SEEK_END)
            append(chain, file, line)
            try:
                self.adversary.step(process, f"append {line['event']}")
            except Killed:
                written, dice = file.seek(0, os.SEEK_END) - end, self.adversary.dice
                file.truncate(end + dice.choice((0, dice.randrange(written), written)))
                raise

        def replaced(path: Path, there: Path) -> Path:
            if there.parent.name == VERSIONS and there.exists() and path.read_bytes() != there.read_bytes():
                self._problems.append(f"{there.name} is written over with other bytes")
            return replace(path, there)

        patch.setattr(os, "fsync", lambda _: None)
        patch.setattr(Path, "replace", replaced)
        patch.setattr(Chain, "append", torn)
        stepping(os, "fsync", lambda _: "sync")
        stepping(os, "pwrite", lambda _, data, at: f"write {len(data)} at {at}")
        stepping(Path, "replace", lambda _, there: f"replace {there.name}")
        stepping(Path, "unlink", lambda path, **_: f"unlink {path.name}")

    # -- what must hold -----------------------------------------------------------------------------------------

    def _check_run(self) -> None:
        """Every version follows from the one before and from who was counted, and the history says so."""
        store, problems = Store.open(self.run), self._problems
        lines = [line for line in store.history() if line["event"] == "round"]
        if [line["version"] for line in lines] != [*range(1, ROUNDS + 1)]:
            problems.append(f"the history has the versions {[line['version'] for line in lines]}")
            return
        weights = start_weights()
        for line in lines:
            number, counted = line["version"], [name for name in line["cohort"] if name in line["counted"]]
            if not store.plan.least <= len(counted) <= store.plan.cohort or not {*counted} <= {*NAMES}:
                problems.append(f"version {number} has counted {counted}")
            turns = [counted] if store.plan.schedule == "parallel" else [[name] for name in counted]
            for turn in turns:
                seeds = [task_seed(store.plan.seed, number, name) for name in turn]
                weights = next_version(weights, [learned(seed, weights) for seed in seeds])
            if store.load(number)[1] != weights:
                problems.append(f"version {number} does not follow from {counted} and the version before")
                return
        made = history.rounds(lines)
        for of, worker in sorted(self._accepted, key=str):
            if made[of.round]["attempt"] != of.attempt or worker not in made[of.round]["counted"]:
                problems.append(f"{worker} was told that it is accepted in {of}, and was not counted")
        problems += [finding.said for finding in verify(self.run)[0] if finding.bad]

    def _check_queues(self) -> None:
        """Nobody consumes any more, and nothing piles up."""
        of_run = (topology.hello_queue("test"), topology.inbox_queue("test"))
        for name, queue in sorted(self.adversary.broker._queues.items()):
            if queue.consumers:
                self._problems.append(f"{name} is consumed still")
            if len(queue.ready) > WAITING_MAX:
                self._problems.append(f"{len(queue.ready)} messages wait in {name}")
            # a coordinator that was followed may declare them when all is over; they expire
            if name in of_run and not self.adversary.faults["followed coordinator"]:
                self._problems.append(f"{name} is there still")


class Bench:
    """Stands in for the training process: takes its time, or fails."""

    def __init__(self, simulation: Simulation, party: Party, lesson: Lesson) -> None:
        self.start, self.contract = lesson.start, lesson.contract
        self._simulation = simulation
        self._party = party
        self._lesson = lesson

    async def run(self, work: Work, layout: Layout, *, weights: Slot, residual: Residual | None = None) -> Done:
        await asyncio.sleep(self._simulation.training_s())
        if self._party.fails:
            self._party.fails = False
            raise LearnerFailed("the adversary has made it fail")
        return await self._lesson.run(work, layout, weights=weights, residual=residual)


class Ear(logging.Handler):
    """Puts log lines among what happens; what the dead say is not heard."""

    def __init__(self, simulation: Simulation) -> None:
        super().__init__()
        self._simulation = simulation

    def emit(self, record: logging.LogRecord) -> None:
        process = OURS.get(self._simulation.loop.world)
        if process.alive:  # it may name a folder, which is another one each time
            self._simulation.note(process.name, f"    {record.getMessage()}", counts=False)


def next_version(weights: bytearray, updates: list[tuple[int, bytes]]) -> bytearray:
    """What follows from a version and a set of updates, in a few lines of numpy that share nothing with ours."""
    after, examples = bytearray(weights), sum(count for count, _ in updates)
    for segment in MODEL.segments:
        where, kind = slice(segment.start, segment.stop), np.dtype(segment.dtype)
        deltas = [(count, np.frombuffer(delta[where], kind)) for count, delta in updates]
        if kind == np.int64:
            after[where] = np.max([values for _, values in deltas], axis=0).tobytes()
            continue
        steps = np.sum(
            [np.rint(values.astype(float) * count * 2.0**52).astype(int) for count, values in deltas], axis=0
        )
        old = np.frombuffer(weights[where], kind).astype(float)
        after[where] = (old + steps.astype(float) / (examples * 2.0**52)).astype(kind).tobytes()
    return after


def let_go(spool: Spool) -> None:
    """Its memory is not ours any more."""
    spool._lock = None
    spool._held.clear()
    spool.kept.clear()


def locked(folder: Path) -> int | None:
    """A worker's lock, which the system releases when the process is gone."""
    number = _locked(folder)
    if number is not None:
        OURS.get().at_death.append(partial(os.close, number))
    return number


def open_files() -> int:
    """How many this process has open, where that can be seen."""
    place = Path("/proc/self/fd")
    return len(list(place.iterdir())) if place.is_dir() else 0


def main(seed: int, *, quiet: bool) -> None:
    with tempfile.TemporaryDirectory() as place:
        simulation = Simulation(seed, Path(place), tell=None if quiet else print)
        try:
            simulation.go()
        except Failed as failed:
            sys.exit(str(failed))
    print(f"seed {seed} holds, {simulation.digest.hexdigest()}")  # noqa: T201


if __name__ == "__main__":
    for number in filter(str.isdecimal, sys.argv[1:]):
        main(int(number), quiet="--quiet" in sys.argv)
