"""A federation inside one event loop: a coordinator, workers, and a learner that is a few lines of numpy.

Knows how to start them, disturb them at an exact step, and prove at the end that nothing was left behind. Does not
know what a test is about. No torch, no child process, no network: a whole run takes milliseconds.
"""

import asyncio
import itertools
import json
import os
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import coordinator.post
import coordinator.service
import workers.post
import workers.service
from broker import topology
from broker.contract import Contract, fingerprint
from broker.errors import LearnerFailed, UsageError
from broker.formats import FORMATS, format_of
from broker.link import PUBLISH_S, Delivery, Lane, Outgoing
from broker.messages import PART_BYTES_MIN, Message, decode
from broker.norms import clip
from broker.parts import Aim
from broker.pinned import Roster
from broker.ring import Form, encode
from broker.tensors import Layout, TensorSpec, view
from coordinator import plan as plans
from coordinator.plan import Plan
from coordinator.rules import RULES
from coordinator.service import Coordinator
from coordinator.store import Store
from coordinator.unmasking import into_sums
from tests import summed
from tests.memory import MemoryBroker, MemoryLink
from workers.masking import Member
from workers.post import Shared
from workers.residuals import Residual
from workers.service import Worker
from workers.spool import Slot, Spool
from workers.training import Seat
from workers.work import Done, Who, Work, task_seed

MODEL = Layout.of(
    [TensorSpec("w", "float32", (132_000,)), TensorSpec("b", "float16", (1_000,)), TensorSpec("seen", "int64", ())]
)
PARTS = 3
LEASE_S = 3.0
BOUND_S = 50.0
"""No run of these tests takes longer, on however slow a machine; a hang ends here."""
QUICK: dict[ModuleType, dict[str, float]] = {
    coordinator.post: {"STALL_S": 0.1, "LOOK_S": 0.02, "RETRY_S": 0.005},
    coordinator.service: {"BACKOFF_S_MAX": 0.01, "FINAL_S_MAX": 5.0, "HOLD_S": 0.02},
    workers.post: {"RETRY_S": 0.005},
    workers.service: {"BEATS": 30},  # heard soon, and not lost on a busy machine
}

IDENTITIES = {name: Ed25519PrivateKey.from_private_bytes(sha256(name.encode()).digest()) for name in "abcdefghij"}
KEYS = {name: key.public_key().public_bytes_raw() for name, key in IDENTITIES.items()}
"""Who may take part in secure rounds, and as whom."""
OPERATOR = Ed25519PrivateKey.from_private_bytes(sha256(b"operator").digest())
SECURE: dict[str, Any] = {"privacy": "secure", "clip": 60.0, "examples_max": 64}
"""Of a plan: the clip is longer than what is learned."""
PATIENT = {module: {name: getattr(module, name) for name in constants} for module, constants in QUICK.items()}

Hook = Callable[[Outgoing | Delivery], Awaitable[object] | None]


def start_weights() -> bytearray:
    """Version 0: everything is zero."""
    return bytearray(MODEL.size_bytes)


def learned(seed: int, weights: bytes | bytearray) -> tuple[int, bytes]:
    """What one worker's learner makes of a version: examples and delta, a pure function of both arguments."""
    return _learned(seed, zlib.crc32(weights))


@lru_cache(1000)
def _learned(seed: int, checksum: int) -> tuple[int, bytes]:
    dice = np.random.default_rng([seed, checksum])
    delta = bytearray(MODEL.size_bytes)
    for segment in MODEL.segments:
        items = view(memoryview(delta)[segment.start : segment.stop], segment.dtype)
        if segment.dtype == "int64":
            items[:] = seed % 1000
        else:
            items[:] = dice.standard_normal(len(items)) / 8
    return 1 + seed % 50, bytes(delta)


def put_down(work: Work) -> None:
    """Ten steps with noise, if the work asks for any."""
    if work.train and work.row_noise:
        Path(work.steps[0]).write_text(json.dumps([*work.steps[1:], [(work.row_noise, 0.1, 10)]]))


def mean_of(weights: bytearray, updates: Iterable[tuple[int, bytes]]) -> bytearray:
    """The version that these updates make."""
    return summed.mean_of(MODEL, memoryview(weights), updates)


def secure_sum_of(plan: Plan, weights: bytearray, updates: Iterable[tuple[int, bytes]]) -> bytearray:
    """The version that these updates make when they are rounded to a ring's words and only their sum is known."""
    form, sums = Form(plan.ring, MODEL), RULES["mean"].init(MODEL, FORMATS["float32"])
    words = [encode(form, memoryview(delta), examples=examples, metrics={}) for examples, delta in updates]
    total = np.zeros(form.words, form.ring.dtype)
    for each in words:
        total += each
    into_sums(form, total, len(words), sums)
    return summed.finished(RULES["mean"], sums, memoryview(weights))


def secure_expected(plan: Plan, cohorts: Iterable[Iterable[str]]) -> bytearray:
    """The last version of a secure run in which each round adds up these workers' updates."""
    weights = start_weights()
    for number, cohort in enumerate(cohorts, 1):
        updates = [learned(task_seed(plan.seed, number, worker), weights) for worker in cohort]
        weights = secure_sum_of(plan, weights, updates)
    return weights


def read(what: Outgoing | Delivery) -> Message:
    """The message that a hook was given."""
    return decode(b"".join(what.pieces) if isinstance(what, Outgoing) else what.body)


def expected(plan: Plan, cohorts: Iterable[Iterable[str]]) -> bytearray:
    """The last version of a run in which each round counts the workers given for it."""
    return bytearray(_expected(plan.seed, plan.schedule, tuple(tuple(cohort) for cohort in cohorts)))


@lru_cache
def _expected(seed: int, schedule: str, cohorts: tuple[tuple[str, ...], ...]) -> bytes:
    weights = start_weights()
    for number, cohort in enumerate(cohorts, 1):
        for turn in [cohort] if schedule == "parallel" else [(worker,) for worker in cohort]:
            weights = mean_of(weights, [learned(task_seed(seed, number, worker), weights) for worker in turn])
    return bytes(weights)


class Lesson:
    """Stands in for `Seat`: does what it is told, when it is told.

    Attributes:
        gate: training waits for it; open unless a test closes it.
        began: set when a training has begun.
        fails: training raises LearnerFailed with this text.
        layout, contract: of the learner.
        unready: there is nothing to train with, for this reason.
        done: the (train, round) of everything that was done.
        received: round → checksum of the weights from which it was trained.

    Those that share a `turn` train one after another.
    """

    def __init__(self, spool: Spool, *, turn: asyncio.Lock | None = None) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self.began = asyncio.Event()
        self.fails = ""
        self.unready = ""
        self.layout, self.contract = MODEL, Contract(fingerprint(MODEL))
        self.done: list[tuple[bool, int]] = []
        self.received: dict[int, int] = {}
        self._spool = spool
        self._turn = turn or asyncio.Lock()

    async def start(self) -> Layout:
        if self.unready:
            raise UsageError(self.unready)
        return self.layout

    async def run(self, work: Work, layout: Layout, *, weights: Slot, residual: Residual | None = None) -> Done:
        del residual  # what formats leave out is lost here
        async with self._turn:
            return await self._run(work, layout, weights)

    async def _run(self, work: Work, layout: Layout, weights: Slot) -> Done:
        assert layout == MODEL
        received = bytes(weights.data)
        put_down(work)
        self.began.set()
        await self.gate.wait()
        if self.fails:
            raise LearnerFailed(self.fails)
        assert weights.data == received, "somebody has written over them"
        self.done.append((work.train, work.round))
        if work.train:
            self.received[work.round] = zlib.crc32(received)
        scores = {"sum": float(np.abs(view(received[:4000], "int64")).sum() % 1000), "examples": 10.0}
        scores = scores if work.evaluate else {}
        if not work.train:
            return Done(None, {}, scores, None, 0.0, layout)
        examples, learned_ = learned(work.seed, received)
        fmt, dice = format_of(work.format, keep=work.keep), np.random.default_rng(work.seed)
        delta = self._spool.take(fmt.layout(layout).size_bytes)
        fmt.pack(layout, memoryview(learned_), residual=None, dice=dice, into=delta.data)
        within = not work.clip or clip(fmt, layout, delta.data, work.clip) <= work.clip
        return Done(
            examples, {"loss": 1.0 / work.round}, scores, delta, 0.0, fmt.layout(layout),
            within=within,
        )  # fmt: skip


class Wire:
    """A `MemoryLink` that shows a hook everything it has published and everything it is about to hand over."""

    def __init__(self, broker: MemoryBroker, hook: Hook | None = None, *, user: str = "") -> None:
        self.link = MemoryLink(broker, user)
        self.vouched = self.link.vouched
        self.hook = hook
        self.declare = self.link.declare
        self.purge = self.link.purge
        self.delete = self.link.delete
        self.depth = self.link.depth
        self.close = self.link.close
        self.drop = self.link.drop

    async def publish(self, message: Outgoing, *, within_s: float = PUBLISH_S) -> None:
        await self.link.publish(message, within_s=within_s)
        await self.show(message)

    async def show(self, what: Outgoing | Delivery) -> None:
        waits = self.hook(what) if self.hook else None
        if waits is not None:
            await waits

    @asynccontextmanager
    async def consume(
        self,
        queue: str,
        *,
        lane: Lane = Lane.CONTROL,
        prefetch: int = 64,
        alone: bool = False,
        aim: Aim | None = None,
    ) -> AsyncIterator[AsyncIterator[Delivery]]:  # fmt: skip
        async with self.link.consume(queue, lane=lane, prefetch=prefetch, alone=alone, aim=aim) as deliveries:
            yield _Shown(deliveries, self)


@dataclass(frozen=True, slots=True)
class _Shown:
    deliveries: AsyncIterator[Delivery]
    wire: Wire

    def __aiter__(self) -> "_Shown":
        return self

    async def __anext__(self) -> Delivery:
        delivery = await anext(self.deliveries)
        await self.wire.show(delivery)
        return delivery


@dataclass(slots=True)
class Place:
    """One worker and what is around it."""

    name: str
    worker: Worker
    lesson: Lesson
    wire: Wire
    stop: asyncio.Event
    task: asyncio.Task[None]

    async def leave(self) -> None:
        """As SIGTERM does: finish, say goodbye, go."""
        self.stop.set()
        await self.task
        await self.wire.close()
        self.worker.spool.remove()

    async def die(self) -> None:
        """As SIGKILL does."""
        self.task.cancel()
        await asyncio.wait([self.task])
        await self.wire.close()
        self.worker.spool.remove()


@dataclass(slots=True)
class Federation:
    """A run and who takes part; made by `federation`. What a test changes through `patch` is as before afterwards."""

    folder: Path
    broker: MemoryBroker
    patch: pytest.MonkeyPatch
    places: dict[str, Place] = field(default_factory=dict)
    hook: Hook | None = None
    names: set[str] = field(default_factory=set)
    drains: int = 2
    lasting: bool = True  # a worker that returns finds the files of the one before
    invited: bool = False  # everybody is, and so the broker vouches for who says what
    coordinator: Coordinator | None = None
    roster: Roster = field(default_factory=lambda: Roster(KEYS, 0).signed(OPERATOR))
    _serving: asyncio.Task[None] | None = None
    _wire: Wire | None = None
    _spools: "itertools.count[int]" = field(default_factory=itertools.count)

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def store(self) -> Store:
        return Store.open(self.run)

    # -- who takes part -----------------------------------------------------------------------------------------

    def _way_of(self, name: str) -> Wire:
        return Wire(self.broker, self.hook, user=name if self.invited else "")

    def join(self, name: str, **of_who: Any) -> Place:
        """One more worker; it is started at once."""
        spool = Spool(self.folder / (f"spool-{name}" if self.lasting else f"spool-{name}-{next(self._spools)}"))
        lesson, wire, stop = Lesson(spool), self._way_of(name), asyncio.Event()
        usual: dict[str, Any] = {"lease_s": LEASE_S, "drain_s": 5.0}
        if self.store.plan.privacy == "secure" and of_who.get("trains", True):
            usual["member"] = Member(name, IDENTITIES[name], KEYS)
        who = Who(name, "lesson", **(usual | of_who))
        # it asks for the class, and uses these methods
        worker = Worker(who, Shared(wire, spool), cast(Seat, lesson))
        place = Place(name, worker, lesson, wire, stop, asyncio.create_task(worker.serve(stop)))
        self.places[name] = place
        self.names.add(name)
        return place

    def begin(self) -> asyncio.Task[None]:
        """Start the coordinator, or start it anew on the same folder."""
        self._wire = self._way_of("coordinator")
        self.coordinator = Coordinator(self.store, self._wire, drains=self.drains, keys=self.roster)
        self._serving = asyncio.create_task(self.coordinator.serve())
        return self._serving

    def kill(self) -> None:
        """Let the coordinator die where it stands; `revive` waits until it has, and starts it again."""
        if self._serving:
            self._serving.cancel()

    async def end(self) -> None:
        """Wait until the run is over, through every kill."""
        async with asyncio.timeout(BOUND_S):
            while True:
                serving = self._serving or self.begin()
                await asyncio.wait([serving])
                await self._bury()
                if not serving.cancelled():
                    serving.result()
                    return

    async def _bury(self) -> None:
        """A dead process writes nothing: wait for what its thread had begun."""
        if self._wire:
            await self._wire.close()
        self._wire = self._serving = None
        executor = ThreadPoolExecutor(4)
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(None, lambda: None)
        before = getattr(loop, "_default_executor", None)
        loop.set_default_executor(executor)
        if before is not None:
            before.shutdown(wait=True)

    # -- what is seen -------------------------------------------------------------------------------------------

    def lines(self, event: str = "") -> list[dict[str, Any]]:
        """The history, or its lines of one kind."""
        return [line for line in self.store.history() if not event or line["event"] == event]

    def counted(self) -> list[list[str]]:
        """Who was counted, round by round."""
        return [sorted(line["counted"]) for line in self.lines("round")]

    def here(self) -> list[str]:
        """Whom the coordinator knows to be here."""
        return (
            [*self.coordinator.roster.trainers(), *self.coordinator.roster.evaluators()] if self.coordinator else []
        )

    def incarnation(self, name: str) -> str:
        """As which incarnation the coordinator knows a worker."""
        return self.coordinator.roster.incarnation(name) if self.coordinator else ""

    def weights(self) -> bytearray:
        """The latest version."""
        store = self.store
        return bytearray(store.load(store.latest() or 0)[1])

    async def dead(self) -> list[tuple[str, bytes]]:
        """What was put aside: reasons and bodies. Takes them out."""
        wire = MemoryLink(self.broker)
        found: list[tuple[str, bytes]] = []
        async with wire.consume(topology.DEAD) as deliveries:
            while await wire.depth(topology.DEAD) or not found:
                delivery = await asyncio.wait_for(anext(deliveries), BOUND_S)
                headers = dict(delivery.stored.message.headers)  # type: ignore[attr-defined]  # the memory broker's own
                found.append((headers["reason"], bytes(delivery.body)))
                await delivery.ack()
        await wire.close()
        return found

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for something that announces itself by no event."""
        async with asyncio.timeout(BOUND_S):
            while not condition():  # noqa: ASYNC110 - there is no event to wait for
                await asyncio.sleep(0.001)

    async def depths(self) -> dict[str, int]:
        """Queues that are there and not empty."""
        link = MemoryLink(self.broker)
        run = self.store.plan.run
        names = [topology.DEAD, topology.hello_queue(run), topology.inbox_queue(run)]
        for name in self.names:
            names += [topology.down_queue(name), topology.control_queue(name), topology.upload_queue(name)]
        found = {name: await link.depth(name) for name in names}
        await link.close()
        return {name: depth for name, depth in found.items() if depth}

    async def close(self) -> None:
        """Everyone leaves."""
        if self._serving:
            self._serving.cancel()
            await asyncio.wait([self._serving])
            await self._bury()
        for place in self.places.values():
            if not place.task.done():
                place.stop.set()
                place.lesson.gate.set()
        for place in self.places.values():
            await asyncio.wait([place.task])
            await place.wire.close()
            place.worker.spool.remove()


def plan(**settings: Any) -> Plan:
    """Three workers, all of them waited for; rounds end by answers, not by the clock, unless a test says so."""
    usual = {
        "run": "test", "learner": "lesson", "rounds": 2, "cohort": 3, "quorum": 3, "round_s": 60.0, "gather_s": 60.0,
        "seed": 7, "part_bytes": PART_BYTES_MIN,
    }  # fmt: skip
    return plans.make({**usual, **settings})


@asynccontextmanager
async def federation(folder: Path, **settings: Any) -> AsyncIterator[Federation]:
    """A new run with the plan's settings; at the end nobody is there any more, and no task runs."""
    before = asyncio.all_tasks()
    Store.create(folder / "run", plan(**settings), MODEL, memoryview(start_weights()))
    with pytest.MonkeyPatch.context() as patch:
        made = Federation(folder, MemoryBroker(), patch)
        for module, constants in QUICK.items():
            for name, value in constants.items():
                assert getattr(module, name) == PATIENT[module][name], f"an earlier test has left {name} changed"
                patch.setattr(module, name, value)
        patch.setattr(os, "fsync", lambda _: None)  # no power fails here, and a busy disk takes its time
        try:
            yield made
        finally:
            await made.close()
    assert asyncio.all_tasks() == before, "a task was left running"
