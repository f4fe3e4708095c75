"""The coordinator at work: from version to version, round by round, until the plan is done.

Knows the order of things and reads the clock. Does not know how a round judges (`round.py`), how updates add up
(`aggregation.py`), how files are written (`store.py`) or how bytes travel (`post.py`).
"""

import asyncio
import contextlib
import logging
import random
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Literal

from broker.errors import LinkError, Unroutable, WireError
from broker.link import Delivery, Link, first_of
from broker.messages import (
    Answer,
    Attempt,
    Claim,
    Closed,
    Goodbye,
    Hello,
    Message,
    Payload,
    Refusal,
    Score,
    Task,
    Update,
)
from coordinator import history
from coordinator.aggregation import RULES, Sums
from coordinator.history import Facts
from coordinator.post import Post
from coordinator.roster import News, Roster, choose_cohort, may_begin
from coordinator.round import Phase, Round, Verdict, judge
from coordinator.store import Store

log = logging.getLogger(__name__)

BACKOFF_S_MAX = 30.0
FINAL_S_MAX = 120.0
REMEMBERED_ROUNDS = 64
TICK_S_MAX = 3600.0


@dataclass(slots=True)
class Open:
    """A round in the making, and what belongs to it alone."""

    round: Round
    sums: Sums
    weights: bytearray
    facts: Facts = field(default_factory=Facts)
    sent_to: dict[str, str] = field(default_factory=dict)  # worker → the incarnation that was sent the task
    returned: set[str] = field(default_factory=set)  # owe an update, and have lost what they were sent
    held: list[Delivery] = field(default_factory=list)  # accepted updates, acknowledged when the version is safe
    untidy: set[str] = field(default_factory=set)  # sent parts that nobody will drain


class Coordinator:
    """One run's coordinator. `serve` returns when the plan's last version is made and scored."""

    def __init__(self, store: Store, link: Link) -> None:
        self.store = store
        self.plan = store.plan
        self.post = Post(link, self.plan.run)
        self.roster = Roster()
        self.rule = RULES[self.plan.rule]
        self.version = store.latest() or 0
        self.layout, self.weights = store.load(self.version)
        self._open: Open | None = None
        self._changed = asyncio.Event()
        self._uploads: asyncio.Queue[tuple[Open, Update]] = asyncio.Queue()
        self._made: deque[tuple[Attempt, frozenset[str]]] = deque(maxlen=REMEMBERED_ROUNDS)
        self._final: dict[str, dict[str, float]] = {}
        self._said = ""

    async def serve(self) -> None:
        """Make the versions that the plan still asks for.

        Raises:
            UsageError: the run's folder cannot be written, or the broker refuses.
        """
        if self.version >= self.plan.rounds:
            log.info("all %d rounds of %s are done; raise --rounds to go on", self.plan.rounds, self.store.folder)
            return
        await self.post.declare()
        try:
            async with asyncio.TaskGroup() as group:
                ears = [
                    group.create_task(self.post.hear_hellos(self._hear)),
                    group.create_task(self.post.read_inbox(self._read)),
                    group.create_task(self._drain_uploads()),
                ]
                await self._make_versions()
                await self._score_last()
                for ear in ears:
                    ear.cancel()
        except* Exception as several:  # noqa: BLE001 - whichever part failed first is the reason
            raise first_of(several) from None
        await self.post.retire()
        self._say("done", f"version {self.version} is made")

    # -- rounds -------------------------------------------------------------------------------------------------

    async def _make_versions(self) -> None:
        up_at, failures = time.monotonic(), 0
        while self.version < self.plan.rounds:
            cohort = await self._gather(up_at)
            if await self._try_round(cohort):
                failures = 0
                continue
            failures += 1
            pause_s = min(2.0 ** (failures - 1), BACKOFF_S_MAX)
            self._say("waiting", f"round {self.version + 1} is tried again in {pause_s:.0f} s")
            await asyncio.sleep(pause_s)

    async def _gather(self, up_at: float) -> list[str]:
        while True:
            now = time.monotonic()
            self._lapse(now)
            here = self.roster.trainers(self.plan.workers)
            ready, why = may_begin(
                len(here),
                self.plan.cohort,
                self.plan.least,
                waited_s=now - up_at,
                gather_s=self.plan.gather_s,
            )
            if ready:
                break
            self._say("gathering", why)
            await self._wait(until=up_at + self.plan.gather_s if now < up_at + self.plan.gather_s else None)
        dice = random.Random(f"{self.plan.seed}/{self.version + 1}")
        return choose_cohort(here, self.plan.cohort, dice)

    async def _try_round(self, cohort: list[str]) -> bool:
        """One attempt at the next version; whether it was made."""
        number, began_at = self.version + 1, time.monotonic()
        of = Attempt(self.plan.run, number, self.store.begin_attempt(number))
        turns = [cohort] if self.plan.schedule == "parallel" else [[worker] for worker in cohort]
        trying = Round(of, turns, quorum=self.plan.least, turn_s=self.plan.round_s)
        self._open = here = Open(trying, self.rule.init(self.layout), self.weights)
        log.info("%s begins with %s", of, ", ".join(cohort))
        trouble = ""
        try:
            while trying.has_turn:
                await self._take_turn(here)
        except (LinkError, WireError) as problem:
            trouble = str(problem)
        phase, why = trying.phase(time.monotonic())
        seconds = time.monotonic() - began_at
        if phase is Phase.CLOSED and not trouble:
            await self._close(here, why, seconds)
            return True
        await self._abandon(here, trouble or why, seconds)
        return False

    async def _take_turn(self, here: Open) -> None:
        asked = here.round.begin_turn(time.monotonic())
        first = here.round.cohort[: len(asked)] == asked
        here.sums = self.rule.init(self.layout)
        await self._send(here, [*asked, *(self.roster.evaluators() if first else [])])
        while True:
            now = time.monotonic()
            self._lapse(now)
            while here.returned:
                await self._send(here, [here.returned.pop()])
            over, why = here.round.turn_over(now)
            self._say("open", f"{here.round.of}: {why}" if not over else f"{here.round.of}: summing up")
            if over:
                break
            await self._wait(until=here.round.deadline_at)
        if here.sums.updates:
            here.weights = await asyncio.to_thread(self.rule.finish, here.sums, memoryview(here.weights))

    async def _close(self, here: Open, why: str, seconds: float) -> None:
        """The round has made a version: save it first, tell everyone after."""
        done = here.round
        await asyncio.to_thread(self.store.save, done.of.round, self.layout, memoryview(here.weights))
        self.version, self.weights, self._open = done.of.round, here.weights, None
        self._made.append((done.of, frozenset(done.counted)))
        self.store.note(history.round_line(done, here.facts, why=why, seconds=seconds, at=time.time()))
        log.info("%s closed: %s", done.of, why)
        await self._tell(list(done.counted), Answer(done.of, "accepted", f"counted in version {self.version}"))
        uncounted = [worker for worker in done.cohort if worker not in done.counted]
        await self._tell(uncounted, Closed(done.of, f"it is closed: {why}"))
        await self._tidy(here)

    async def _abandon(self, here: Open, why: str, seconds: float) -> None:
        given_up = here.round
        self._open = None
        self.store.note(history.abandoned_line(given_up, here.facts, why=why, seconds=seconds, at=time.time()))
        log.warning("%s abandoned: %s", given_up.of, why)
        await self._tell(list(given_up.cohort), Closed(given_up.of, f"it was abandoned: {why}"[:1000]))
        await self._tidy(here)

    async def _tidy(self, here: Open) -> None:
        """Leave nothing of a round that is over in the queues."""
        for delivery in here.held:
            await delivery.ack()
        with contextlib.suppress(LinkError):
            for worker in here.untidy | (set(here.round.cohort) - set(here.round.counted)):
                await self.post.drop_upload(worker)

    async def _score_last(self) -> None:
        """Let everyone score the last version: nobody will receive it in a next round."""
        trainers, evaluators = self.roster.trainers(self.plan.workers), self.roster.evaluators()
        of, began_at = Attempt(self.plan.run, self.version, 0), time.monotonic()
        asked = [*trainers, *evaluators]
        if not asked:
            return
        self._say("scoring", f"version {self.version} is scored by {', '.join(asked)}")
        with contextlib.suppress(LinkError):
            task = self._task(of, "evaluate")
            await self.post.send_task(task, memoryview(self.weights), asked)
            until = began_at + min(self.plan.round_s, FINAL_S_MAX)
            while time.monotonic() < until:
                self._lapse(time.monotonic())
                if all(worker in self._final or not self.roster.has(worker) for worker in asked):
                    break
                await self._wait(until=until)
        for worker in evaluators:
            if worker in self._final:
                self.store.note(history.score_line(self.version, worker, self._final[worker], at=time.time()))
        scored = {worker: self._final[worker] for worker in trainers if self._final.get(worker)}
        seconds = time.monotonic() - began_at
        self.store.note(history.final_line(self.version, scored, seconds=seconds, at=time.time()))

    # -- sending ------------------------------------------------------------------------------------------------

    def _task(self, of: Attempt, work: Literal["train", "evaluate"]) -> Task:
        return Task(
            of=of,
            work=work,
            version=self.version,
            deadline_s=self.plan.round_s,
            seed=self.plan.seed,
            settings=dict(self.plan.settings),
            payload=Payload(f"{of.run}/{of.round}/{of.attempt}", self.plan.part_bytes, self.layout.specs),
        )

    async def _send(self, here: Open, workers: list[str]) -> None:
        """Send the open round's task with the weights as they are in this turn."""
        task = self._task(here.round.of, "train")
        for worker in workers:
            here.sent_to[worker] = self.roster.incarnation(worker)
        try:
            here.facts.bytes_down += await self.post.send_task(task, memoryview(here.weights), workers)
        except Unroutable:
            for worker in workers:  # their queues are gone; they declare them again when they return
                here.round.lose(worker)

    async def _tell(self, workers: list[str], message: Answer | Closed) -> None:
        try:
            await self.post.tell(workers, message)
        except LinkError as problem:  # they will ask again, and be answered then
            log.info("could not tell %s: %s", ", ".join(workers), problem)

    # -- listening ----------------------------------------------------------------------------------------------

    async def _hear(self, message: Message, delivery: Delivery) -> None:
        now = time.monotonic()
        if isinstance(message, Hello):
            self._greet(message, now)
        elif isinstance(message, Goodbye) and self.roster.leave(message.worker):
            log.info("%s left: %s", message.worker, message.reason)
            if self._open:
                self._open.round.refuse(message.worker, f"it left: {message.reason}")
        await delivery.ack()
        self._changed.set()

    def _greet(self, hello: Hello, now: float) -> None:
        news = self.roster.hear(hello, now)
        if news is News.CROWDED:
            log.warning("no room for %s: the roster is full", hello.worker)
            return
        if news is News.JOINED:
            log.info("%s is here%s", hello.worker, "" if hello.trains else ", to evaluate")
        here = self._open
        if here and here.round.find(hello.worker) and here.sent_to.get(hello.worker) != hello.incarnation:
            log.info("%s is back and has lost its task: sending it again", hello.worker)
            here.returned.add(hello.worker)

    async def _read(self, message: Message, delivery: Delivery) -> None:
        match message:
            case Update():
                await self._judge(message, delivery)
                return
            case Score():
                self._score(message)
            case Refusal():
                self._refused(message)
            case Claim():
                log.debug("%s: %s has claimed its task", message.of, message.worker)
            case _:
                await self.post.bury(delivery, f"a {type(message).__name__.lower()} does not belong into the inbox.")
                return
        await delivery.ack()
        self._changed.set()

    async def _judge(self, update: Update, delivery: Delivery) -> None:
        """Give an update its verdict; accepted ones stay unacknowledged until their version is safe."""
        here = self._open
        if any(update.of == of and update.worker in counted for of, counted in self._made):
            await self._tell([update.worker], Answer(update.of, "accepted", "it was counted already"))
        else:
            verdict, reason = judge(update, here.round if here else None, self.layout)
            if here and verdict is Verdict.ACCEPTED:
                here.round.accept(update.worker)
                here.held.append(delivery)
                self._uploads.put_nowait((here, update))
                return
            await self._turn_down(update, verdict, reason)
        await delivery.ack()
        self._changed.set()

    async def _turn_down(self, update: Update, verdict: Verdict, reason: str) -> None:
        log.warning("an update of %s is %s: %s", update.worker, verdict.value, reason)
        if self._open:
            self._open.untidy.add(update.worker)
            if verdict is Verdict.INVALID:
                self._open.round.refuse(update.worker, reason)
            line = {"worker": update.worker, "verdict": verdict.value, "reason": reason}
            if len(self._open.facts.others) < 2 * len(self._open.round.cohort) + 16:  # a flood must not fill the disk
                self._open.facts.others.append(line)
        if verdict is not Verdict.DUPLICATE:  # the first copy will be answered
            await self._tell([update.worker], Answer(update.of, verdict.value, reason[:1000]))

    def _score(self, score: Score) -> None:
        if score.of == Attempt(self.plan.run, self.version, 0):
            self._final[score.worker] = score.metrics
        elif self._open and score.of == self._open.round.of and score.worker in self._open.round.cohort:
            self._open.facts.scored[score.worker] = score.metrics
        elif score.version <= self.version and score.worker in self.roster.evaluators():
            self.store.note(history.score_line(score.version, score.worker, score.metrics, at=time.time()))

    def _refused(self, refusal: Refusal) -> None:
        log.warning("%s: %s refused: %s", refusal.of, refusal.worker, refusal.reason)
        if self._open and refusal.of == self._open.round.of:
            self._open.round.refuse(refusal.worker, refusal.reason)
        elif refusal.of == Attempt(self.plan.run, self.version, 0):
            self._final.setdefault(refusal.worker, {})

    async def _drain_uploads(self) -> None:
        """Take accepted updates one after another and fold them in."""
        while True:
            here, update = await self._uploads.get()
            if here is not self._open or update.worker in here.round.counted:
                continue
            try:
                data = await self.post.drain(update)
                await asyncio.to_thread(self.rule.add, here.sums, update.examples, data)
            except WireError as problem:
                await self._turn_down(update, Verdict.INVALID, str(problem))
            else:
                here.round.count(update.worker, update.examples)
                here.facts.trained[update.worker] = update.metrics
                here.facts.bytes_up += len(data)
            self._changed.set()

    # -- waiting and saying -------------------------------------------------------------------------------------

    def _lapse(self, now: float) -> None:
        for worker in self.roster.lapse(now):
            log.warning("%s has not been heard of: its lease has ended", worker)
            if self._open:
                self._open.round.lose(worker)

    async def _wait(self, until: float | None) -> None:
        """Until something was heard, or a lease ends, or the given instant."""
        ends = [at for at in (until, self.roster.next_lapse_at()) if at is not None]
        bound_s = min(ends) - time.monotonic() if ends else TICK_S_MAX
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(bound_s, 0.001)):
                await self._changed.wait()
        self._changed.clear()

    def _say(self, phase: str, why: str) -> None:
        """Say what is happening when it changes: one line in the log, and the run's `now.json`."""
        if why == self._said:
            return
        self._said = why
        log.log(logging.INFO if phase != "open" else logging.DEBUG, "%s", why)
        now: dict[str, Any] = {"phase": phase, "why": why, "version": self.version, "rounds": self.plan.rounds}
        if self._open:
            round_ = self._open.round
            now |= {"round": round_.of.round, "cohort": round_.cohort, "counted": sorted(round_.counted)}
        now |= {"here": [*self.roster.trainers(), *self.roster.evaluators()], "at": time.time()}
        self.store.say_now(now)


async def serve(store: Store, link: Link) -> None:
    """Be the coordinator of a run until its plan is done; see `Coordinator.serve`."""
    await Coordinator(store, link).serve()
