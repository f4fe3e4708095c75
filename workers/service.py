"""The worker at work: says that it is here, takes tasks, has them trained, sends back what came of them.

Knows the order of things, and what to do when the broker goes away. Does not know how training is done
(`training.py`), and never sees a tensor: models are files on their way to and from the training process.

A worker does one job at a time. What it was sent and has not claimed yet is lost when its connection is lost; it then
takes a new incarnation, which tells every coordinator to send again.
"""

import asyncio
import contextlib
import logging
import secrets
from dataclasses import dataclass, field
from pathlib import Path

from broker import topology
from broker.errors import LearnerFailed, LinkError, QueueInUse, Unroutable, UsageError, WireError
from broker.link import Delivery, Lane, Link, Outgoing, first_of, publish_parts
from broker.messages import (
    TEXT_MAX,
    Answer,
    Claim,
    Closed,
    Goodbye,
    Hello,
    Message,
    Part,
    Payload,
    Refusal,
    Score,
    Task,
    Update,
    decode,
    encode,
)
from broker.parts import split
from broker.tensors import Layout
from workers.spool import Arrival, Spool, read_file
from workers.training import Trainer
from workers.work import Done, Who, Work, task_seed

log = logging.getLogger(__name__)

RETRY_S = 0.2
PREFETCH = 32
GOODBYE_S = 2.0
NAMESAKE_S = 100.0
"""How long a former connection of our own may keep our queue: the broker notices its end after three heartbeats."""
SAY_S = 120.0
"""How long a claim, score, update or refusal tries to reach the broker before the job is given up."""


@dataclass(slots=True)
class Job:
    """A claimed task, from claim to answer."""

    task: Task
    weights_file: Path
    update: Update | None = None
    over: bool = False
    news: asyncio.Event = field(default_factory=asyncio.Event)  # an answer, or a reason to send the update again
    work: asyncio.Task[None] | None = None


class Worker:
    """One worker. `serve` returns when it was told to stop and has said goodbye."""

    def __init__(self, who: Who, link: Link, trainer: Trainer, spool: Spool) -> None:
        self.who = who
        self.link = link
        self.trainer = trainer
        self.spool = spool
        self.layout = Layout(())
        self._incarnation = ""
        self._arrival: Arrival | None = None
        self._job: Job | None = None
        self._next: tuple[Task, Path] | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self._heard = True

    async def serve(self, stop: asyncio.Event) -> None:
        """Work until `stop` is set; then finish the job in hand, if `drain_s` allows, and leave.

        Raises:
            UsageError: the learner or its data cannot be loaded, or the broker refuses.
        """
        self.layout = await self.trainer.start()
        log.info("%s is ready: %d tensors, %d bytes", self.who.name, len(self.layout.specs), self.layout.size_bytes)
        await self._declare()
        try:
            async with asyncio.TaskGroup() as group:
                receiving = group.create_task(self._receive(group))
                others = [group.create_task(self._beat()), group.create_task(self._hear_control())]
                await stop.wait()
                receiving.cancel()
                await self._finish()
                for task in others:
                    task.cancel()
        except* Exception as several:  # noqa: BLE001 - whichever part failed first is the reason
            raise first_of(several) from None
        finally:
            await self.trainer.stop()

    async def _finish(self) -> None:
        """Let the job in hand come to its end, and leave."""
        self._drop_arrival()
        self._next = None
        if self._job:
            log.info("stopping when %s is done, at most %.0f s", self._job.task.of, self.who.drain_s)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.who.drain_s):
                await self._idle.wait()
        if self._job and self._job.work:
            self._job.work.cancel()
        bye = encode(Goodbye(self.who.name, "it was told to stop"))
        with contextlib.suppress(LinkError):
            await self.link.publish(
                Outgoing(topology.UP, (topology.hello_key(self.who.name),), bye), within_s=GOODBYE_S
            )
        log.info("%s has left", self.who.name)

    # -- signs of life ------------------------------------------------------------------------------------------

    async def _declare(self) -> None:
        await self.link.declare(topology.FEDERATION)
        await self.link.declare(topology.of_worker(self.who.name))

    async def _beat(self) -> None:
        while True:
            await self._say_hello()
            await asyncio.sleep(self.who.lease_s / 3)

    async def _say_hello(self) -> None:
        if not self._incarnation:  # not listening yet: what is sent now would be purged
            return
        doing = self._job.task.of if self._job else None
        who = self.who
        hello = Hello(who.name, self._incarnation, who.learner[:TEXT_MAX], who.trains, who.lease_s, doing)
        message = Outgoing(topology.UP, (topology.hello_key(who.name),), encode(hello), persistent=False)
        heard = True
        try:
            await self.link.publish(message, within_s=who.lease_s / 3)
        except Unroutable:
            heard = False
        except LinkError as problem:
            log.debug("no sign of life sent: %s", problem)
        if heard != self._heard:
            log.info("a coordinator is listening" if heard else "no coordinator is listening yet")
        self._heard = heard

    # -- receiving ----------------------------------------------------------------------------------------------

    async def _receive(self, group: asyncio.TaskGroup) -> None:
        """Take tasks and their parts off the queue, for ever.

        Raises:
            UsageError: another worker of this name is connected.
        """
        queue = topology.down_queue(self.who.name)
        free = asyncio.timeout(None)  # runs only while someone else has our queue
        try:
            async with free:
                while True:
                    self._drop_arrival()
                    try:
                        await self._take_tasks(queue, free, group)
                    except QueueInUse as problem:
                        if free.when() is None:
                            log.warning("another worker called %s is connected, or was a moment ago", self.who.name)
                            free.reschedule(asyncio.get_running_loop().time() + NAMESAKE_S)
                        log.debug("%s", problem)
                        await asyncio.sleep(1.0)
                    except LinkError as problem:
                        log.info("the broker is away: %s", problem)
                        await asyncio.sleep(RETRY_S)
                        await self._declare()
        except TimeoutError:
            if not free.expired():
                raise
            raise UsageError(
                f"another worker called {self.who.name} is connected to this broker: choose another --name."
            ) from None

    async def _take_tasks(self, queue: str, free: asyncio.Timeout, group: asyncio.TaskGroup) -> None:
        self._incarnation = ""
        async with self.link.consume(queue, lane=Lane.DOWN, prefetch=1, alone=True):
            pass  # nobody else is at our queue: only now may it be purged
        await self._renew(queue)  # a job in hand goes on; nothing else survives a lost connection
        async with self.link.consume(queue, lane=Lane.DOWN, prefetch=PREFETCH, alone=True) as deliveries:
            free.reschedule(None)
            async for delivery in deliveries:
                await self._land(delivery, group)

    async def _renew(self, queue: str) -> None:
        """Take a new incarnation: what lies in the queue was sent to the former one."""
        await self.link.purge(queue)
        self._incarnation = secrets.token_hex(8)
        await self._say_hello()

    async def _land(self, delivery: Delivery, group: asyncio.TaskGroup) -> None:
        try:
            message = decode(delivery.body)
            if isinstance(message, Task):
                await self._expect(message, delivery)
            else:
                if isinstance(message, Part) and self._arrival:
                    self._arrival.assembly.add(message)  # or, if it is a part of something that is over, nothing
                await delivery.ack()
        except WireError as problem:
            log.warning("refused what came from the coordinator: %s", problem)
            await delivery.ack()
            if self._arrival:
                await self._refuse(self._arrival.task, str(problem))
                self._drop_arrival()
        if self._arrival and self._arrival.assembly.complete:
            await self._claim(self._arrival, group)

    async def _expect(self, task: Task, delivery: Delivery) -> None:
        """A task's header has come: make room for its parts, or refuse it at once."""
        if task.of in (self._job and self._job.task.of, self._next and self._next[0].of):
            await delivery.ack()  # the same task again, while it is being done or waits
            return
        if self._arrival:
            await self._arrival.header.ack()
            self._drop_arrival()
        differs = self.layout.difference(task.payload.layout)
        reason = f"this worker's learner has other tensors than the version: {differs}." if differs else ""
        if not differs:
            try:
                self._arrival = self.spool.expect(task, delivery)
            except LearnerFailed as problem:
                reason = str(problem)
        if reason:
            await self._refuse(task, reason)
            await delivery.ack()

    async def _claim(self, arrival: Arrival, group: asyncio.TaskGroup) -> None:
        """All parts are here: tell the coordinator, and only then let the broker forget the task."""
        self._arrival = None
        weights_file = arrival.finish()
        await self._say_of(arrival.task, Claim(arrival.task.of, self.who.name, self._incarnation))
        await arrival.header.ack()
        if self._next:
            self._next[1].unlink(missing_ok=True)
        self._next = (arrival.task, weights_file)
        if self._job is None:
            group.create_task(self._work_off())
        elif self._trains(self._job.task):
            self._give_up(self._job, "a newer task has come")  # an evaluation is finished first: it is still wanted

    def _drop_arrival(self) -> None:
        arrival, self._arrival = self._arrival, None
        if arrival:
            arrival.drop()

    # -- working ------------------------------------------------------------------------------------------------

    def _trains(self, task: Task) -> bool:
        return self.who.trains and task.work == "train"

    async def _work_off(self) -> None:
        """Do the waiting job, and the next one, until none waits."""
        self._idle.clear()
        while self._next:
            task, weights_file = self._next
            self._next = None
            self._job = job = Job(task, weights_file)
            job.work = work = asyncio.create_task(self._do(job))
            try:
                await asyncio.wait([work])
                if not work.cancelled():
                    work.result()
            except LinkError as problem:
                log.warning("%s: what came of it could not be sent: %s", task.of, problem)
            finally:
                work.cancel()
                await asyncio.wait([work])
                self._job = None
                self.spool.clear(weights_file)
        self._idle.set()

    async def _do(self, job: Job) -> None:
        task, train = job.task, self._trains(job.task)
        seed = task_seed(task.seed, task.of.round, self.who.name)
        work = Work(train=train, evaluate=True, seed=seed, settings=task.settings, round=task.of.round)
        try:
            async with asyncio.timeout(task.deadline_s):
                done = await self.trainer.run(work, task.payload.layout, job.weights_file)
        except (LearnerFailed, TimeoutError) as problem:
            reason = str(problem) or f"not done within the {task.deadline_s:.0f} s of the task"
            await self._refuse(task, reason)
            return
        if done.scores or not train:
            await self._say_of(task, Score(task.of, self.who.name, task.version, done.scores))
        said = ", ".join(f"{name} {value:.4g}" for name, value in (done.metrics or done.scores).items())
        log.info("%s: %s in %.2f s: %s", task.of, "trained" if train else "scored", done.seconds, said)
        if train:
            await self._send_update(job, done)

    async def _send_update(self, job: Job, done: Done) -> None:
        """Upload until the coordinator has said what became of it, or the round is over."""
        task = job.task
        assert done.delta_file is not None
        assert done.examples is not None
        # a training that was repeated may differ; its parts must not be mixed with those of the one before
        payload_id = f"{task.payload.id}/{self.who.name}/{secrets.token_hex(4)}"
        payload = Payload(payload_id, task.payload.part_bytes, task.payload.tensors)
        update = Update(task.of, self.who.name, task.version, done.examples, done.metrics, payload)
        job.update = update
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(task.deadline_s + SAY_S):
                while not job.over:
                    job.news.clear()
                    with read_file(done.delta_file) as data:
                        key = (topology.upload_key(self.who.name),)
                        await publish_parts(self.link, split(payload, data), topology.UP, key, lane=Lane.UP)
                    await self._say_of(task, update)
                    await job.news.wait()

    async def _refuse(self, task: Task, reason: str) -> None:
        log.warning("%s refused: %s", task.of, reason)
        await self._say_of(task, Refusal(task.of, self.who.name, reason[:TEXT_MAX]))

    async def _say_of(self, task: Task, message: Claim | Score | Update | Refusal) -> None:
        """Send a small message to the coordinator of the task's run; if that is gone for good, nobody needs it."""
        key = topology.inbox_key(task.of.run, self.who.name)
        try:
            await self.link.publish(Outgoing(topology.UP, (key,), encode(message)), within_s=SAY_S)
        except Unroutable:
            log.info("the run %s has no coordinator any more", task.of.run)

    # -- answers ------------------------------------------------------------------------------------------------

    async def _hear_control(self) -> None:
        queue = topology.control_queue(self.who.name)
        while True:
            try:
                async with self.link.consume(queue) as deliveries:
                    if self._job and self._job.update:  # its parts, or the answer, may be lost: ask by sending again
                        self._job.news.set()
                    async for delivery in deliveries:
                        try:
                            message = decode(delivery.body)
                        except WireError as problem:
                            log.warning("refused what came from the coordinator: %s", problem)
                        else:
                            self._hear(message)
                        await delivery.ack()
            except LinkError:
                await asyncio.sleep(RETRY_S)
                await self._declare()

    def _hear(self, message: Message) -> None:
        if not isinstance(message, Answer | Closed):
            log.warning("a %s does not belong into the control queue", type(message).__name__.lower())
            return
        if self._arrival and message.of == self._arrival.task.of and isinstance(message, Closed):
            self._drop_arrival()
        if self._next and message.of == self._next[0].of and isinstance(message, Closed):
            self._next[1].unlink(missing_ok=True)
            self._next = None
        job = self._job
        if job is None or message.of != job.task.of:
            return
        if isinstance(message, Closed):
            if self._trains(job.task):
                self._give_up(job, message.reason)
        elif message.verdict == "resend":
            log.info("%s: sending again: %s", job.task.of, message.reason)
            job.news.set()
        else:
            level = logging.DEBUG if message.verdict == "accepted" else logging.WARNING
            log.log(level, "%s: the update is %s: %s", job.task.of, message.verdict, message.reason)
            job.over = True
            job.news.set()

    def _give_up(self, job: Job, reason: str) -> None:
        log.info("%s is given up: %s", job.task.of, reason)
        job.over = True
        if job.update:
            job.news.set()
        elif job.work:
            job.work.cancel()
