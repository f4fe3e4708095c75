"""The coordinator at work: from version to version, round by round, until the plan is done.

Knows the order of things and reads the clock. Does not know how a round judges (`round.py`), how updates add up
(`aggregation.py`), how files are written (`store.py`) or how bytes travel (`post.py`).
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from broker.changes import encode_change
from broker.errors import Aborted, LinkError, Unroutable, WireError
from broker.files import checksum, forget, trouble
from broker.formats import FORMATS
from broker.link import Link, first_of
from broker.messages import Attempt, Closed, Payload, Task, encode
from broker.pinned import Roster as Keys
from coordinator import history
from coordinator import plan as plans
from coordinator.budget import Budget, last
from coordinator.desk import Desk
from coordinator.history import Facts
from coordinator.now import Now
from coordinator.opened import Open, asked, begun, named, releases
from coordinator.post import Post, held_max
from coordinator.roster import may_begin
from coordinator.round import Phase
from coordinator.secrecy import Secrecy
from coordinator.store import Store

log = logging.getLogger(__name__)

BACKOFF_S_MAX = 30.0
FINAL_S_MAX = 120.0
HOLD_S = 2.0
LEFT_S_MIN = 60.0
"""How long a round that is taken up waits at least, if its plan would: its workers may have been cut off, too."""
DRAINS = 2
"""Uploads received at once, each into a room of its own of the update's size."""


class Coordinator:
    """One run's coordinator. `serve` returns when the plan's last version is made and scored."""

    def __init__(self, store: Store, link: Link, *, drains: int = DRAINS, keys: Keys | None = None) -> None:
        self.store = store
        epoch = store.claim.epoch or store.begin_epoch()
        store.settle()
        self.plan = store.plan
        self.post = Post(link, self.plan.run, epoch)
        version = store.latest() or 0
        self.layout, self.weights = store.load(version)
        self._check = checksum(self.weights)
        self.change: memoryview | None = None  # from the version before, as the plan wants it sent
        self.desk = Desk(store, self.post, self.layout, version, drains=drains)
        self.roster = self.desk.roster
        self._former = self.desk.remember(store.history())
        self._budget = Budget(store, version, model=self.layout) if self.plan.dp in plans.ON_SUMS else None
        self._refused: dict[str, str] = {}  # see `last`
        self._ends = ""  # why the run ends early
        pay = self._budget.spend if self._budget else lambda _: None
        self._secrecy: Secrecy | None = None
        if self.plan.privacy == "secure":
            self._secrecy = Secrecy(store, self.desk, keys=keys or Keys({}, 0), wait=self._wait, pay=pay)
        self._group = asyncio.TaskGroup()
        self._sealing: asyncio.Task[None] | None = None
        self._alone, self._ready = asyncio.Event(), asyncio.Event()  # nobody else reads the inbox; we may
        self._say = Now(store, self.desk).say
        with trouble("no task of this run can be sent", "take fewer tensors or settings", of=(WireError,)):
            header = encode(self._task(Attempt(self.plan.run, 0, 0), "train", ""))
        self.post.held_max = held_max(self.plan.asks, len(header))

    async def serve(self, *, forced: bool = False) -> None:
        """Make the versions that the plan still asks for.

        Args:
            forced: the one before may be there still, and hold what was sent to the run's queues: they are made anew.

        Raises:
            UsageError: the run's folder cannot be written, the broker refuses, or a copy of the run is at work there.
            RunEnded: another coordinator has taken over.
        """
        if forced:
            await self.post.retire()
        await self.post.declare()
        try:
            async with self._group as group:
                post, desk = self.post, self.desk
                inbox = post.read_inbox(desk.read, self._attend)
                ears = [group.create_task(each) for each in (self._hold(), inbox)]
                await self._alone.wait()
                await self._tell_former()  # the coordinator before this one may have died before it could
                if desk.version >= self.plan.rounds:
                    log.info("all %d rounds are done; raise --rounds to go on", self.plan.rounds)
                else:
                    taken_up = await self._taken_up()  # before anybody is heard: who was counted must not be again
                    self._ready.set()
                    hellos, sums = post.hear_hellos(desk.hear, desk.listen), desk.keeping.keep(lambda: desk.open)
                    ears += [group.create_task(each) for each in (hellos, desk.drain_uploads(), sums)]
                    await self._make_versions(taken_up)
                    await self._sealed()
                    await self._score_last()
                for ear in ears:
                    ear.cancel()
        except* Exception as several:  # noqa: BLE001 - whichever part failed first is the reason
            raise first_of(several) from None
        self.store.claim.check()
        await self.post.retire()
        self._say("done", self._ends or f"version {self.desk.version} is made")

    async def _attend(self, hearing: bool) -> None:
        """The inbox is ours alone, or is not any more; what lay in one that was deleted must be said again."""
        if hearing and not self._alone.is_set():
            self._alone.set()
            await self._ready.wait()
        elif hearing and self.desk.open:
            await self.post.resume(self.desk.open.round.cohort)

    async def _hold(self) -> None:
        """End us when another coordinator has taken over, also where nobody says anything."""
        while True:
            self.store.claim.check()
            if self.roster.lost_all():  # or lost the exchange by which all are heard, and what they have said since
                await self.post.declare()
                await self._attend(hearing=True)
            await asyncio.sleep(HOLD_S)

    # -- rounds -------------------------------------------------------------------------------------------------

    async def _make_versions(self, taken_up: Open | None) -> None:
        """Round by round. One that is taken up is opened before anything is waited for: what comes is for it."""
        gather_s, failures = self.plan.gather_s, 0
        while self.desk.version < self.plan.rounds:
            if taken_up:
                here, taken_up = taken_up, None
            elif self.plan.dp != "none" and (ends := await self._last()):
                self._ends = f"version {self.desk.version} is the last: {ends}"
                return
            else:
                here, gather_s = self._open(await self._gather(gather_s)), 0.0
            if await self._try_round(here):
                failures = 0
                continue
            self._refused |= {worker: here.round.refused.get(worker, "") for worker in here.round.cohort}
            failures += 1
            pause_s = min(2.0 ** (failures - 1), BACKOFF_S_MAX)
            self._say("waiting", f"round {self.desk.version + 1} is tried again in {pause_s:.0f} s")
            await asyncio.sleep(pause_s)

    async def _last(self) -> str:
        here = {*self.roster.trainers(self.plan.workers)}  # now: the roster is not the thread's to look at
        return await asyncio.to_thread(last, self._budget, self._refused, here, least=self.plan.least)

    async def _gather(self, gather_s: float) -> list[str]:
        """The next round's cohort, once enough are here; a full one is waited for `gather_s` long."""
        plan, began_at = self.plan, time.monotonic()
        while True:
            now = time.monotonic()
            self.desk.lapse(now)
            here = self.desk.rests.spare(self.roster.trainers(plan.workers), plan.least)
            waited_s = now - began_at
            full = plan.population if self._budget else plan.asks
            ready, why = may_begin(len(here), full, plan.least, waited_s=waited_s, gather_s=gather_s)
            if ready:
                break
            judges = self.roster.evaluators()
            self._say("gathering", why if here or not judges else f"{why}; {', '.join(judges)} only evaluate")
            await self._wait(until=began_at + gather_s if waited_s < gather_s else None)
        cohort = asked(plan, here, self.desk.version + 1)
        if tired := sorted(set(cohort) & self.desk.rests.present.keys()):
            log.warning("%s should rest, but there is no quorum without: asked all the same", ", ".join(tired))
        return cohort

    def _open(self, cohort: list[str]) -> Open:
        """A new attempt at the next version, put down before anybody hears of it."""
        number, until = self.desk.version + 1, time.time() + self.plan.round_s
        attempt = self.store.journal.begin(number, plans.digest(self.plan), tuple(cohort), until)
        here = self._round(Attempt(self.plan.run, number, attempt), cohort)
        log.info("%s begins with %s", here.round.of, ", ".join(cohort))
        return here

    async def _taken_up(self) -> Open | None:
        """The attempt that was open when the coordinator before this one ended, if one was.

        Whoever was asked may be at it, or done: who does not ask is not asked again, and all are waited for.
        """
        number, plan = self.desk.version + 1, plans.digest(self.plan)
        lost = self._secrecy.released(number, plan) if self._secrecy else None
        begun = self.store.journal.resume(number, plan, lost=lost)
        if begun is None:
            self.desk.keeping.forget()
            return None
        here = self._round(Attempt(self.plan.run, begun.round, begun.attempt), begun.cohort)
        here.left_s = max(min(begun.until - time.time(), self.plan.round_s), min(self.plan.round_s, LEFT_S_MIN))
        log.info("%s goes on with %s", here.round.of, ", ".join(begun.cohort))
        await self.desk.begin_turn()
        await self.desk.keeping.take_up(here)
        return here

    def _round(self, of: Attempt, cohort: Sequence[str]) -> Open:
        if self._budget:
            self.desk.sums.clip = self._budget.clip(of.round)
        return Open(begun(self.plan, of, cohort), self.weights, self._check, self.desk.facts)

    async def _try_round(self, here: Open) -> bool:
        """One attempt at the next version; whether it was made."""
        self.desk.open, trying, began_at, trouble = here, here.round, time.monotonic(), ""
        try:
            while trying.has_turn:
                await self._take_turn(here)
        except (LinkError, WireError, Aborted) as problem:
            trouble = str(problem)
        await self._sealed()  # the version before this one
        (phase, why), seconds = trying.outcome or (Phase.OPEN, ""), time.monotonic() - began_at
        self.desk.rest(here)
        if phase is Phase.CLOSED and not trouble:
            await self._close(here, why, seconds)
            return True
        await self._abandon(here, trouble or why, seconds)
        return False

    async def _take_turn(self, here: Open) -> None:
        left_s, here.left_s = here.left_s, None
        asked = here.round.begin_turn(time.monotonic(), turn_s=left_s)
        here.begin_turn()
        first = here.round.cohort[: len(asked)] == asked
        task = self._task(here.round.of, "train", here.called)
        if self._secrecy:
            await self._secrecy.begin(here, task, again=left_s is not None)
        if left_s is None:
            await self.desk.begin_turn()
            await self._send(here, [*asked, *(self.roster.evaluators() if first else [])])
        else:
            await self.post.resume(here.round.outstanding)
        while True:
            now = time.monotonic()
            self.desk.lapse(now)
            over, why = here.round.turn_over(now)
            self._say("open", f"{here.round.of}: {why}" if not over else f"{here.round.of}: summing up")
            if over:
                here.round.end_turn(now)  # before the sum is taken
                await self.desk.end_turn()
                break
            if here.returned:  # all of them at once: it is one copy to the broker
                again, here.returned = sorted(here.returned), set()
                await self._send(here, again)
                continue
            await self._wait(until=here.round.deadline_at if now < here.round.deadline_at else here.round.ends_at)
        if self._secrecy or self._budget:
            await self._sealed()  # what was put down of the sum before this one is needed until then
        if self._secrecy:
            await self._secrecy.sum_up(here, task)
        if releases(here, self.desk.sums.updates, veiled=self._budget is not None):
            here.weights = await asyncio.to_thread(self._draft, here)

    def _draft(self, here: Open) -> memoryview:
        """The weights that come of this turn, and, if the plan wants it, their change as it will travel.

        The change is what the version is made of then: whoever applies it to the version before has the same bits.
        """
        plan, number = self.plan, here.round.of.round
        if self._budget:
            self._budget.cover(self.desk.sums, here)
        weights = self.store.draft(number, self.layout, lambda put: self.desk.finish(here.weights, put))
        if plan.down != "full":
            dice = np.random.default_rng([plan.seed, number])
            self.change = encode_change(here.weights, weights, self.layout, FORMATS[plan.down], dice)
            forget(weights)
        forget(here.weights)
        here.check = checksum(weights)
        return weights

    async def _close(self, here: Open, why: str, seconds: float) -> None:
        """The round has made a version. The next one may begin while it is written to the disk."""
        line = history.round_line(here.round, here.facts, why=why, seconds=seconds, at=time.time())
        line |= {"weights": here.check, **({"start": self._check} if here.round.of.round == 1 else {})}
        self.store.journal.made(line)
        self.weights, self._check = here.weights, here.check
        self.desk.made(here.round)
        await self.desk.drop_uploads(here)
        self._sealing = self._group.create_task(self._seal(here, line, why))

    async def _seal(self, here: Open, line: history.Line, why: str) -> None:
        """Make the version safe first, tell everyone after."""
        done = here.round
        self.store.journal.flush()  # unless the next round has begun, which was put down together with this
        await asyncio.to_thread(self.store.seal, done.of.round)
        self.store.note(await asyncio.to_thread(self.store.vouched, line))
        if self._budget:
            await asyncio.to_thread(self._budget.settle, done.of.round)
        self.desk.safe(done)
        if self._secrecy:
            self._secrecy.forget()
        log.info("%s closed: %s", done.of, why)
        await self.post.tell_all(done.of, done.cohort, done.counted, why)
        for delivery in here.held:
            await delivery.ack()

    async def _tell_former(self) -> None:
        """The coordinator before this one may have died between saving a version and saying so."""
        if line := self._former:
            of = Attempt(self.plan.run, line["round"], line["attempt"])
            await self.post.tell_all(of, line["cohort"], line["counted"], line.get("why", ""))

    async def _sealed(self) -> None:
        """Wait until the last version is safe, and all is told."""
        if self._sealing:
            await asyncio.wait({self._sealing})  # should it fail, the group ends us all

    async def _abandon(self, here: Open, why: str, seconds: float) -> None:
        given_up, self.desk.open, self.desk.facts = here.round, None, Facts()
        self.store.journal.abandon(given_up.of.round)
        self.store.note(history.abandoned_line(given_up, here.facts, why=why, seconds=seconds, at=time.time()))
        log.warning("%s abandoned: %s", given_up.of, why)
        await self.post.tell(list(given_up.cohort), Closed(given_up.of, f"it was abandoned: {why}"[:1000]))
        for delivery in here.held:
            await delivery.ack()
        await self.desk.drop_uploads(here)

    async def _score_last(self) -> None:
        """Let everyone score the last version: nobody will receive it in a next round."""
        evaluators = self.roster.evaluators()  # in secure rounds no trainer says its own score to anybody
        trainers = [] if self._secrecy else self.roster.trainers(self.plan.workers)
        of, began_at = Attempt(self.plan.run, self.desk.version, 0), time.monotonic()
        asked = [*trainers, *evaluators]
        if not asked:
            return
        self.desk.scores.final = final = dict.fromkeys(asked)
        self._say("scoring", f"version {self.desk.version} is scored by {', '.join(asked)}")
        with contextlib.suppress(LinkError):
            sent_to, task = dict.fromkeys(asked, ""), self._task(of, "evaluate", named(of, 0, self._check))
            until = began_at + min(self.plan.round_s, FINAL_S_MAX)
            while time.monotonic() < until:
                self.desk.lapse(time.monotonic())
                owing = {w: its for w in asked if final[w] is None and (its := self.roster.incarnation(w))}
                if not owing:
                    break
                if lost := [worker for worker in owing if sent_to[worker] != owing[worker]]:
                    sent_to |= owing
                    await self._send_version(task, self.weights, lost)
                await self._wait(until=until)
        self.desk.scores.note_final(self.desk.version, evaluators, seconds=time.monotonic() - began_at)

    # -- sending ------------------------------------------------------------------------------------------------

    async def _send(self, here: Open, workers: list[str]) -> None:
        """Send the open round's task with the weights as they are in this turn; not longer than the turn takes."""
        here.sent_to |= {worker: self.roster.incarnation(worker) for worker in workers}
        task = self._task(here.round.of, "train", here.called)
        try:
            async with asyncio.timeout(max(here.round.deadline_at - time.monotonic(), 0.0)):
                here.facts.bytes_down += await self._send_version(task, here.weights, workers)
        except TimeoutError:
            log.warning("%s: the deadline has passed before the broker had taken all of the task", here.round.of)

    async def _send_version(self, task: Task, weights: memoryview, workers: list[str]) -> int:
        """Send these workers the weights, or their change if they have the version before; bytes sent."""
        versions = [(task, weights, workers)]
        if self.change is not None:
            layout, down = FORMATS[self.plan.down].layout(self.layout), self.plan.down
            change = replace(task.payload, id=f"{task.payload.id}/change", tensors=layout.specs)
            follow = [worker for worker in workers if self.desk.holds(worker, self.desk.version - 1)]
            others = [worker for worker in workers if worker not in follow]
            versions = [(replace(task, down=down, payload=change), self.change, follow), (task, weights, others)]
        return sum([await self._send_task(*each) for each in versions if each[2]])

    def _task(self, of: Attempt, work: Literal["train", "evaluate"], called: str) -> Task:
        plan, here = self.plan, self.desk.open
        return Task(
            of, work, self.desk.version, plan.round_s, plan.seed, dict(plan.settings),
            Payload(called, plan.part_bytes, self.layout.specs), format=plan.format, keep=plan.kept,
            epoch=self.post.epoch, clip=self.desk.sums.clip, examples_max=plan.counts_most,
            cohort=len(here.round.asked) if here else 0, contract=plan.contract, learner_file=plan.learner_file,
            noise=plan.noise, secure=self._secrecy.secure if self._secrecy else None,
        )  # fmt: skip

    async def _send_task(self, task: Task, data: memoryview, workers: list[str]) -> int:
        try:
            seen = {worker for worker in workers if self.desk.holds(worker)} if task.secure else set[str]()
            return await self.post.send_task(task, data, workers, seen=seen)
        except Unroutable:  # their queues are gone; they declare them again when they return
            if self.desk.open:
                for worker in workers:
                    self.desk.open.round.lose(worker)
            return 0

    async def _wait(self, until: float | None) -> None:
        """Until something was heard, or a lease ends, or the given instant."""
        ends = [at for at in (until, self.roster.due_at) if at is not None]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(min(ends) - time.monotonic(), 0.001)):
                await self.desk.changed.wait()
        self.desk.changed.clear()
