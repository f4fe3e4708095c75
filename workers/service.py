"""The worker at work: says that it is here, takes tasks, has them trained, sends back what came of them.

Knows the order of things, and what to do when the broker goes away. Does not know how training is done
(`training.py`) or how bytes travel (`post.py`, `outbox.py`), nor torch: models lie in slots (`spool.py`).

A worker trains one model at a time; what it made before may still be on its way, or wait for its verdict. Runs that
ask at the same time are served in turn, and of one run only the newest task waits. What a worker was sent and has not
claimed yet is lost when its connection is lost; it then takes a new incarnation, which tells all coordinators to send
it again.
"""

import asyncio
import contextlib
import logging
import random
import secrets
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any

from broker.errors import Declined, LearnerFailed, LinkError, Refused, UsageError, WireError
from broker.formats import FORMATS
from broker.link import Delivery, first_of, read
from broker.messages import TEXT_MAX, Answer, Call, Claim, Closed, Goodbye, Hello, Message, Part, Resumed, Task
from broker.pact import model_digest
from broker.parts import Aimed
from broker.tensors import Layout
from workers.jobs import Job, is_same
from workers.outbox import RUNS_MAX, Outbox
from workers.owner import Owner
from workers.post import GOODBYE_S, PREFETCH_MIN, Post, Shared
from workers.residuals import Residuals
from workers.secrecy import UNMASKED, Secrecy, check
from workers.spending import Spending
from workers.spool import Held, Landing, Slot
from workers.training import Seat
from workers.work import BEATS, Done, Who, work_for

log = logging.getLogger(__name__)

WAITING_MAX = 8
"""So many runs may have a task here that is being done or waits for its turn; a task of another one is refused."""
LANDING_MAX = PREFETCH_MIN - 1
"""Of so many runs parts may be landing: the headers are not acknowledged meanwhile, and must leave room for parts."""

REFUSING_S = 1.0
"""So long before a task's deadline it is refused, or else its round would be over before the reason is heard."""


class Worker:
    """One worker. `serve` returns when it was told to stop and has said goodbye."""

    def __init__(self, who: Who, shared: Shared, seat: Seat) -> None:
        self.who = who
        self.post = Post(shared, who.name, self._tell)
        self.spool = shared.spool
        self.seat = seat
        self.layout = Layout(())
        self._rest = asyncio.Event()  # something is done with
        self._owner = Owner(who, shared.spool.folder)
        self._residuals = Residuals(shared.spool.folder, who.name)
        self._spending = Spending(shared.spool.folder, who.name, self._owner)
        self._outbox = Outbox(
            who.name, self.post, owner=self._owner, residuals=self._residuals, tell=self._tell, rest=self._rest.set,
        )  # fmt: skip
        if who.member:
            self._outbox.secrecy = Secrecy(
                who.member, shared.spool.folder, room=shared.spool.take, note=self._owner.ledger.write,
                least=self._owner.least, pay=self._spending.share,
            )  # fmt: skip
        self._incarnation = ""  # empty while we do not listen
        self._landing: dict[str, Job] = {}  # run → its task whose parts are landing
        self._jobs: list[Job] = []  # claimed; the first has its turn
        self._holds: Held | None = None
        self._turn = asyncio.Lock()  # those who wait for it get it in the order in which they came
        self._group = asyncio.TaskGroup()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._heard = True
        self._epochs: dict[str, int] = {}  # run → the highest that was heard

    async def serve(self, stop: asyncio.Event) -> None:
        """Work until `stop` is set; then finish what is in hand, if `drain_s` allows, and leave.

        Raises:
            UsageError: the learner or its data cannot be loaded, another worker has this name, or the broker refuses.
        """
        self.layout = await self.seat.start()
        self._tell(f"{self.who.name} is ready: {len(self.layout.specs)} tensors, {self.layout.size_bytes} bytes")
        await self.post.declare()
        try:
            async with self._group as group:
                for kept, delta in self.spool.kept.pop(self.who.name, []):
                    self._outbox.restore(kept, delta, self._start)
                receiving = group.create_task(self.post.receive_tasks(self._begin, self._take, self._lose, self._aim))
                self._start(self._beat())
                self._start(self.post.hear_answers(self._hear, self._outbox.ask_again))
                await stop.wait()
                receiving.cancel()
                await self._finish()
                for task in [*self._tasks]:
                    task.cancel()
                await self.post.greet(Goodbye(self.who.name, "it was told to stop"), within_s=GOODBYE_S)
                self._tell(f"{self.who.name} has left")
        except* Exception as several:  # noqa: BLE001 - whichever part failed first is the reason
            raise first_of(several) from None

    async def _finish(self) -> None:
        """Let what is in hand come to its end, within `drain_s`."""
        self._lose()
        for job in [*self._jobs]:
            if not job.begun:
                self._give_up(job, "this worker leaves")
        if self._in_hand:
            self._tell(f"stopping when {self._in_hand[-1].of} is done, at most {self.who.drain_s:.0f} s")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.who.drain_s):
                while self._in_hand:
                    self._rest.clear()
                    await self._rest.wait()

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Begin something that ends with the worker, if not before."""
        task = self._group.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    @property
    def _in_hand(self) -> list[Task]:
        """What was claimed and is not done with, the oldest first."""
        return [*self._outbox.tasks, *(job.task for job in self._jobs)]

    def _tell(self, what: str, level: int = logging.INFO) -> None:
        """A line in the log; one of many workers says who it is, and what is usual only to those who ask for it."""
        if self.who.hosted:
            what = f"{self.who.name}: {what}"
        if level == logging.INFO and (self.who.hosted or self._owner.policy.log == "refusals"):
            level = logging.DEBUG
        log.log(level, "%s", what)

    # -- signs of life ------------------------------------------------------------------------------------------

    async def _beat(self) -> None:
        period_s = self.who.lease_s / BEATS
        await asyncio.sleep(random.uniform(0, period_s))  # those who came together need not speak together for ever
        while True:
            await self._say_hello()
            await asyncio.sleep(period_s)

    async def _say_hello(self) -> None:
        if not self._incarnation:  # what is sent now would be purged
            return
        who, doing = self.who, self._in_hand[-1].of if self._in_hand else None
        hello = Hello(who.name, self._incarnation, who.learner[:TEXT_MAX], who.trains, who.lease_s, doing)
        heard = await self.post.greet(hello, within_s=who.lease_s / BEATS)
        if heard != self._heard:
            self._tell("a coordinator is listening" if heard else "no coordinator is listening yet")
        self._heard = heard

    def _outdated(self, run: str, epoch: int) -> bool:
        """Whether another coordinator has taken over the run since this one spoke."""
        if epoch < self._epochs.get(run, 0):
            self._tell(f"a former coordinator of {run} is not heard (clocks set back? start anew)", logging.WARNING)
            return True
        self._epochs[run] = epoch
        while len(self._epochs) > RUNS_MAX:
            del self._epochs[next(iter(self._epochs))]
        return False

    # -- receiving ----------------------------------------------------------------------------------------------

    async def _begin(self) -> None:
        """What is in hand goes on; all else that we were sent is lost, and must be sent again."""
        self._lose()
        await self._renew()

    async def _renew(self) -> None:
        self._incarnation = secrets.token_hex(8)
        await self._say_hello()

    def _lose(self) -> None:
        self._incarnation, self._holds = "", None
        self._landing.clear()  # and no broker waits for us to acknowledge their headers

    async def _take(self, delivery: Delivery) -> None:
        concerned = [*self._landing]  # of bytes that cannot be read nobody can say whose they are
        try:
            message = read(delivery)
            if isinstance(message, Task) and not self._outdated(message.of.run, message.epoch):
                await self._expect(message, delivery)
            else:
                if isinstance(message, Part):  # else, or of something that is over: nothing
                    parts = {run: job.landing.parts for run, job in self._landing.items()}
                    concerned = [run for run in parts if parts[run].payload.id == message.payload]
                    for run in concerned:
                        if not parts[run].complete:  # by what another of this process was sent
                            parts[run].add(message)
                await delivery.ack()
        except WireError as problem:
            await delivery.ack()
            self._tell(f"refused what came from the coordinator: {problem}", logging.WARNING)
            for run in concerned:
                await self._turn_away(run, str(problem))
        for job in [*self._landing.values()]:
            if job.landing.parts.complete:
                self._begin_work(job)

    def _aim(self, begins: memoryview, size: int) -> Aimed | None:
        """See `broker.parts.Aim`."""
        aims = (job.landing.parts.aim(begins, size) for job in self._landing.values())
        return next(filter(None, aims), None)

    def _drop(self, run: str) -> Job | None:
        """The parts of the run's task are waited for no more; the job, if there was one."""
        if job := self._landing.pop(run, None):
            self._start(job.header.ack())
        return job

    async def _turn_away(self, run: str, reason: str) -> None:
        if job := self._drop(run):
            await self._outbox.refuse(job.task, reason)

    async def _expect(self, task: Task, delivery: Delivery) -> None:
        """A task's header has come: make room for its parts, or refuse it at once."""
        if any(is_same(task, known) for known in self._in_hand):
            await delivery.ack()  # the same task again, while it is being done or waits
            self._outbox.ask_again(task.of.run)  # whoever sends it has not heard what came of it
            return
        run = task.of.run
        self._drop(run)
        try:
            self._owner.admit(task, delivery.user, trains=self._trains(task))
            landing = self._room_for(task)
        except (Declined, LearnerFailed, Refused, UsageError) as problem:
            await self._outbox.refuse(task, str(problem), declined=isinstance(problem, Declined))
            await delivery.ack()
            return
        if landing is not None:
            # from now on, also while its parts land and others of this process are trained
            margin_s = min(REFUSING_S, task.deadline_s / 10)
            due_at = asyncio.get_running_loop().time() + task.deadline_s - margin_s
            self._landing[run] = Job(task, delivery, landing, due_at)
            if len(self._landing) > LANDING_MAX:
                await self._turn_away(next(iter(self._landing)), "other runs' tasks came before all of its parts.")
            return
        await delivery.ack()
        self._tell(f"{task.of} takes a version or a roster that is not here: asking for the whole")
        await self._renew()

    def _room_for(self, task: Task) -> Landing | None:
        """Where the parts of a task land; None where it takes a version that we do not hold, or an unseen roster.

        Raises:
            LearnerFailed: it is of another model, or there is no room, or it is not for us, or too many runs wait.
            Refused: whether we may take part cannot be known.
            UsageError: the model has names that the format of the change needs.
        """
        if len({job.task.of.run for job in self._jobs} - {task.of.run}) >= WAITING_MAX:
            raise LearnerFailed(f"tasks of {WAITING_MAX} other runs wait here already: ask again later.")
        check(task, self.who)
        if task.secure and (secrecy := self._outbox.secrecy):
            if secrecy.answered(task.of):  # by an attempt that we have in hand no more
                raise LearnerFailed(UNMASKED)
            if not secrecy.trust(task.secure):
                return None
        expected = self.layout if task.down == "full" else FORMATS[task.down].layout(self.layout)
        if differs := self.seat.contract.breach(task, expected, task.payload.layout):
            raise LearnerFailed(differs)
        if task.format == "top-k" and not task.keep > 0:
            raise LearnerFailed(f"an update in the format top-k cannot keep {task.keep:g} of its floats.")
        landing = self.spool.expect(task.payload)
        if task.down != "full" and landing.base is None and landing.weights is None:
            if self._holds is None or self._holds.name != (task.of.run, task.version - 1):
                return None
            landing.base = self._holds.weights
        return landing if task.down == "full" or landing.base or landing.weights else None

    def _begin_work(self, job: Job) -> None:
        """All parts are here."""
        run = job.task.of.run
        del self._landing[run]
        for older in [*self._jobs]:
            if older.task.of.run == run:
                self._give_up(older, "a newer task has come")
        self._outbox.hurry(job.task)
        self._jobs.append(job)
        # not waited for: parts that landed for another worker of this process already must not pile up meanwhile
        self._start(self._claim(job))
        job.work = self._start(self._work_on(job))

    async def _claim(self, job: Job) -> None:
        """Tell the coordinator, and only then let the broker forget the task."""
        try:
            await self.post.say(Claim(job.task.of, self.who.name, self._incarnation))
        except LinkError as problem:
            self._tell(f"{job.task.of}: the claim could not be sent: {problem}", logging.WARNING)
        else:
            await job.header.ack()

    # -- working ------------------------------------------------------------------------------------------------

    def _trains(self, task: Task) -> bool:
        return self.who.trains and task.work == "train"

    async def _work_on(self, job: Job) -> None:
        """Have its turn; what came of a job is on its way while the next one has its own."""
        try:
            async with asyncio.timeout_at(job.due_at), self._turn:
                job.begun = True
                done = await self._do(job)
        except (Declined, LearnerFailed, WireError, TimeoutError) as problem:
            late = "not done" if job.begun else "other runs had their turn, and this one's did not come"
            said = await asyncio.to_thread(self._spending.told, job.task, problem)
            reason = said or f"{late} within the {job.task.deadline_s:.0f} s of the task"
            await self._outbox.refuse(job.task, reason, declined=isinstance(problem, Declined))
        else:
            self._outbox.put(job.task, done, self._start)
        finally:
            self._is_over(job)

    def _is_over(self, job: Job) -> None:
        if job in self._jobs:
            self._jobs.remove(job)
        self._rest.set()

    async def _do(self, job: Job) -> Done:
        """What came of a job.

        Raises:
            LearnerFailed, Declined, WireError: why nothing did.
        """
        task, train = job.task, self._trains(job.task)
        work, private = work_for(task, self.who), self.who.trains and task.noise is not None
        self._owner.take(task, trains=train)
        if train and private:
            work = await asyncio.to_thread(self._spending.begin, task, self.layout, work)
        weights = await self._unfold(task, job.landing)
        self._holds = self.spool.hold((task.of.run, task.version), job.landing)
        if work.owes:
            await self._outbox.settle(task.of.run)  # what the update before leaves out belongs to this one
        owed = self._residuals.begin(task.of) if work.owes else None
        model = await asyncio.to_thread(model_digest, weights.data) if task.secure else b""
        done = self._owner.sift(await self.seat.run(work, self.layout, weights=weights, residual=owed))
        done = replace(done, model=model, examples=done.examples and min(done.examples, task.examples_max))
        if train and private:
            done = await asyncio.to_thread(self._spending.pay, task, done)
        told = (done.metrics if train else done.scores) if self._owner.policy.log == "metrics" else {}
        said = "".join(f", {name} {value:.4g}" for name, value in told.items())
        self._tell(f"{task.of}: {'trained' if train else 'scored'} in {done.seconds:.2f} s{said}")
        return done

    async def _unfold(self, task: Task, landing: Landing) -> Slot:
        """The version's weights; of a change, made once for all workers of this process.

        Raises:
            LearnerFailed: there is no room for them.
            WireError: the change lies.
        """
        if task.down == "full":
            landing.weights = landing.slot
        elif landing.weights is None:
            landing.room = landing.room or self.spool.take(self.layout.size_bytes)
            await asyncio.to_thread(landing.unfold, self.layout, FORMATS[task.down])
        assert landing.weights is not None
        return landing.weights

    def _give_up(self, job: Job, reason: str) -> None:
        """Not in the midst of an evaluation, though: that is still wanted."""
        if job.begun and not self._trains(job.task):
            return
        self._tell(f"{job.task.of} is given up: {reason}")
        if job.work:
            job.work.cancel()
        self._is_over(job)

    # -- answers ------------------------------------------------------------------------------------------------

    def _hear(self, message: Message) -> None:
        if not isinstance(message, Answer | Closed | Resumed | Call):
            self._tell(f"a {type(message).__name__.lower()} does not belong into the control queue", logging.WARNING)
            return
        run = message.run if isinstance(message, Resumed) else message.of.run
        if self._outdated(run, message.epoch):
            return
        if isinstance(message, Resumed):
            self._tell(f"the run {run} is taken up again")
            self._outbox.ask_again(run)
            self._start(self._outbox.refuse_again(run))
            self._start(self._say_hello())
            return
        self._outbox.hear(message)
        if not isinstance(message, Closed):
            return
        if (landing := self._landing.get(run)) and landing.task.of == message.of:
            self._drop(run)
        for job in [*self._jobs]:
            if job.task.of == message.of:
                self._give_up(job, message.reason)
