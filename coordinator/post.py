"""The coordinator's end of the wire: what it sends, what it listens to, and how an upload is drained.

Knows queues, parts and reconnecting. Does not know rounds' rules: every decision is the service's.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable
from contextlib import AsyncExitStack
from dataclasses import replace

from broker import topology
from broker.errors import BrokerRefused, LinkError, PartsLost, QueueInUse, Unroutable, UsageError, WireError
from broker.files import forget, forgetting
from broker.link import Delivery, Lane, Link, Outgoing, batches, publish_parts, read
from broker.messages import Answer, Attempt, Call, Closed, Goodbye, Message, Part, Resumed, Task, Update, encode
from broker.parts import Assembly, split

log = logging.getLogger(__name__)

STALL_S = 20.0
"""How long the next missing part of an upload that was said to be complete may keep the coordinator waiting."""
LOOK_S = 2.0
"""After so long without a part we look whether there is one, unless we have asked for them."""
RESENDS_MAX = 3
PREFETCH_PARTS = 16
FORGET_PARTS = 32
"""After so many parts of a mapped file, what they have been copied from or to leaves our memory for the system's."""
INBOX_PREFETCH, INBOX_SPARE, HELD_BYTES_MAX = 2048, 64, 64 * 1024 * 1024
"""Accepted updates stay unacknowledged until their version is saved; all others, and small messages, must still get
past them, and all that may be here at a time must find room in memory."""
HELLO_PREFETCH = 64
RETRY_S = 0.2
RIVAL_S = 100.0
"""So long the connection of a coordinator that is gone may linger, and hold the run's queues."""
RESTORE_S = 2.0
"""So long at least between two looks at one worker's queues, however often it says that they are gone."""
DEAD_BYTES_MAX = 64 * 1024

Take = Callable[[Message, Delivery], Awaitable[None]]
Heard = Callable[[bool], Awaitable[None]]
Waiting = Callable[[], int]


class Post:
    """One run's coordinator, as the federation hears it.

    Attributes:
        blame: told of every message that is put aside, and why.
        held_max: so many accepted updates of a round stay unacknowledged until its version is safe.
        asked: worker → when its parts were first asked for again, in this turn.
    """

    def __init__(self, link: Link, run: str, epoch: int) -> None:
        self.link = link
        self.run = run
        self.epoch = epoch
        self.blame: Callable[[Delivery, str], None] = lambda *_: None
        self.held_max = 1
        self.asked: dict[str, float] = {}
        self._restored: dict[str, float] = {}  # whose queues were made anew, and when

    async def declare(self) -> None:
        """Make sure that the run's queues and the federation's exchanges exist."""
        await self.link.declare(topology.FEDERATION)
        await self.link.declare(topology.of_run(self.run))

    async def retire(self) -> None:
        """Remove the run's queues: the run has ended, and nothing may pile up in them."""
        await self.link.delete(topology.hello_queue(self.run))
        await self.link.delete(topology.inbox_queue(self.run))

    async def _alone(self, stack: AsyncExitStack, queue: str, *, prefetch: int) -> AsyncIterator[Delivery]:
        """The deliveries of a queue whose only consumer we are; for who was it before there is time to go.

        Two coordinators with a folder each, of which one is a copy, would take each other's messages.

        Raises:
            UsageError: another coordinator stays.
        """
        now = asyncio.get_running_loop().time
        until = 0.0
        while True:
            try:
                return await stack.enter_async_context(self.link.consume(queue, prefetch=prefetch, alone=True))
            except QueueInUse:
                if not until:
                    said = "the run %s has another coordinator, or its lost connection: waiting for %.0f s at most"
                    log.warning(said, self.run, RIVAL_S)
                    until = now() + RIVAL_S
                elif now() >= until:
                    raise UsageError(
                        f"another coordinator of the run {self.run} is at work on this broker, in another folder: "
                        "end one of them; a copy of a run needs a broker or virtual host of its own."
                    ) from None
                await asyncio.sleep(RETRY_S)

    async def hear_hellos(self, take: Take, heard: Heard) -> None:
        """Give every sign of life to `take`, for ever; `heard` is told when we begin and cease to hear them."""
        await self._listen(topology.hello_queue(self.run), take, heard, prefetch=HELLO_PREFETCH)

    async def read_inbox(self, take: Take, heard: Heard) -> None:
        """Give everything that workers say to this run to `take`, for ever. `take` acknowledges.

        Of two rounds, `held_max` updates each may be unacknowledged at the same time.
        """
        await self._listen(topology.inbox_queue(self.run), take, heard, prefetch=2 * self.held_max + INBOX_SPARE)

    async def _listen(self, queue: str, take: Take, heard: Heard, *, prefetch: int) -> None:
        while True:
            try:
                async with AsyncExitStack() as stack:
                    deliveries = await self._alone(stack, queue, prefetch=prefetch)
                    await heard(True)
                    async for delivery in deliveries:
                        await self._open(delivery, take)
            except LinkError as problem:
                log.debug("%s: %s", queue, problem)
                await heard(False)
                await asyncio.sleep(RETRY_S)
                await self.declare()

    async def _open(self, delivery: Delivery, take: Take) -> None:
        try:
            message = read(delivery)
        except WireError as problem:
            await self.bury(delivery, str(problem))
            return
        sender = delivery.key.rsplit(".", 1)[-1]
        if getattr(message, "worker", None) != sender:
            await self.bury(delivery, f"a message of {sender} speaks in the name of someone else.")
            return
        revoked = isinstance(message, Goodbye) and delivery.user == topology.OPERATOR
        if self.link.vouched and delivery.user != sender and not revoked:
            whose = f"{delivery.user[:63]}, says the broker" if delivery.user else "nobody the broker vouches for"
            await self.bury(delivery, f"a message of {sender} is a stranger's: it comes from {whose}.")
            return
        await take(message, delivery)

    async def bury(self, delivery: Delivery, reason: str) -> None:
        """Put a message aside, with the reason, where an operator can look at it; then forget it."""
        log.warning("refused a message from %s: %s", delivery.key, reason)
        self.blame(delivery, reason)
        headers = (("reason", reason[:500]), ("key", delivery.key[:200]))
        body = bytes(delivery.body[:DEAD_BYTES_MAX])
        try:
            await self.link.publish(Outgoing(topology.DEAD, ("",), body, headers=headers), within_s=5.0)
        except LinkError as problem:  # it is bad mail; losing it is better than reading it for ever
            log.debug("could not put it aside: %s", problem)
        await delivery.ack()

    async def restore(self, worker: str) -> None:
        """Make a worker's queues, and the ways there, anew: they are gone, and whoever is invited may not do so.

        The broker vouches for who says that they are: whoever is not invited any more cannot.
        """
        now = asyncio.get_running_loop().time()
        if now - self._restored.get(worker, -RESTORE_S) < RESTORE_S:
            return
        self._restored[worker] = now
        try:
            await self.link.declare(topology.of_worker(worker, invited=self.link.vouched))
        except (LinkError, BrokerRefused) as problem:
            log.warning("the queues of %s are gone and could not be made anew: %s", worker, problem)
        else:
            log.info("the queues of %s were gone: made anew", worker)

    async def send_task(self, task: Task, weights: memoryview, workers: list[str], *, seen: set[str]) -> int:
        """Send a version to these workers, as one copy to the broker; how many bytes that was.

        Who has `seen` the roster of a secure task is told its digest alone; of another task there is nothing to see.

        Raises:
            Unroutable: none of them has a queue, nor would take one.
            LinkError: the broker did not take it.
        """
        try:
            return await self._send_task(task, weights, tuple(workers), seen)
        except Unroutable:  # somebody has deleted the exchange, and with it all bindings, or all of their queues
            log.warning("RabbitMQ has lost the ways to all who were asked: they are made anew")
            await self.declare()
            for worker in workers:
                await self.restore(worker)
            return await self._send_task(task, weights, tuple(workers), seen)

    async def _send_task(self, task: Task, weights: memoryview, keys: tuple[str, ...], seen: set[str]) -> int:
        sent = 0
        heads = [(task, tuple(key for key in keys if key not in seen))]
        if task.secure:
            bare = replace(task, secure=replace(task.secure, shown=b""))
            heads.append((bare, tuple(key for key in keys if key in seen)))
        for head, told in heads:
            header = encode(head) if told else b""
            for batch in batches(told):
                with contextlib.suppress(Unroutable):  # others may be there; if nobody is, the parts say so
                    # not persistent: without its parts it is worth nothing
                    await self.link.publish(Outgoing(topology.DOWN, batch, header, Lane.DOWN, persistent=False))
                sent += len(header)
        parts = forgetting(split(task.payload, weights), weights, lambda part: len(part.data))
        return sent + await publish_parts(self.link, parts, topology.DOWN, keys, lane=Lane.DOWN)

    async def tell(self, workers: Iterable[str], message: Answer | Closed | Resumed | Call) -> None:
        """Send a small message to these workers. One that cannot be reached will hear it by asking again."""
        # a call that is lost with the broker is asked for again, by the answer to the one before
        body, lasting = encode(replace(message, epoch=self.epoch)), not isinstance(message, Call)
        for batch in batches(tuple(workers)):
            try:
                await self.link.publish(Outgoing(topology.CONTROL, batch, body, persistent=lasting))
            except LinkError as problem:
                log.debug("could not tell %d workers: %s", len(batch), problem)

    async def resume(self, workers: Iterable[str]) -> None:
        """Let these workers say again what they have for this run and was not answered."""
        await self.tell(workers, Resumed(self.run, self.epoch))

    async def tell_all(self, of: Attempt, cohort: Iterable[str], counted: Collection[str], why: str) -> None:
        """Tell everyone who was asked what has become of a round that has made a version."""
        await self.tell(counted, Answer(of, "accepted", f"counted in version {of.round}"))
        await self.tell([w for w in cohort if w not in counted], Closed(of, f"it is closed: {why}"))

    async def drop_upload(self, worker: str) -> None:
        """Throw away what a worker has uploaded and nobody will drain."""
        with contextlib.suppress(LinkError):
            await self.link.purge(topology.upload_queue(worker))

    async def drain(self, update: Update, room: memoryview, *, within_s: float, waiting: Waiting = lambda: 0) -> bool:
        """Let the bytes of an update land in `room`, out of its worker's upload queue; False if that is to wait.

        The worker says that all parts are there before this is called; should some be lost with the broker, it is
        asked to send them again. All of it together takes at most `within_s`, whatever worker and broker do; and who
        has to be waited for makes room while others are `waiting`, whose parts may be there: again and again, but not
        for longer than they would be waited for alone, because nobody may have them any more.

        Raises:
            WireError: the parts lie.
            PartsLost: they do not come.
        """
        assembly, now = Assembly(update.payload, room), asyncio.get_running_loop().time
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                for resent in range(RESENDS_MAX):
                    pause_s = 0.0
                    try:
                        # what was asked for takes its time: its worker may be cut off, or its line slow
                        queue = topology.upload_queue(update.worker)
                        await self._collect(assembly, queue, patient=resent > 0, waiting=waiting)
                    except (TimeoutError, LinkError) as problem:
                        missing, why = assembly.missing, str(problem) or "none is on its way"
                        log.info("%s: %d parts of %s are missing: %s", update.of, missing, update.worker, why)
                        pause_s = LOOK_S if isinstance(problem, LinkError) else 0.0
                    if assembly.complete:
                        return True
                    why = f"{assembly.missing} parts are missing"
                    await self.tell((update.worker,), Answer(update.of, "resend", why))
                    await asyncio.sleep(pause_s)  # a queue that is gone is made anew by its worker, or at its word
                    if waiting() and now() < self.asked.setdefault(update.worker, now()) + RESENDS_MAX * STALL_S:
                        return False
        raise PartsLost(f"{assembly.missing} of its parts did not come.")

    async def _collect(self, assembly: Assembly, queue: str, *, patient: bool, waiting: Waiting) -> None:
        """Take parts out of a queue until all are here. Those of another run are left to its coordinator for a while.

        Raises:
            TimeoutError: some are not there, and are not waited for (any longer).
        """
        now, until, began_at = asyncio.get_running_loop().time, float("inf"), float("-inf")
        while not await self._take(assembly, queue, patient=patient, waiting=waiting, leaves=now() < until):
            # one that has not been in the way all the time is another, or is asked for
            until = min(until if now() - began_at < LOOK_S else float("inf"), now() + LOOK_S)
            await asyncio.sleep(RETRY_S)
            began_at = now()

    async def _take(self, assembly: Assembly, queue: str, *, patient: bool, waiting: Waiting, leaves: bool) -> bool:
        """As `_collect`; False if a part of another run has come, and is left where it was."""
        if assembly.complete:
            return True
        now = asyncio.get_running_loop().time
        async with self.link.consume(queue, lane=Lane.UP, prefetch=PREFETCH_PARTS, aim=assembly.aim) as deliveries:
            due_at, waited_s = now() + STALL_S, 0.0
            while not assembly.complete:
                began_at = now()
                delivery = await _next(deliveries, until=min(due_at, began_at + LOOK_S))
                waited_s += now() - began_at
                if delivery is not None:
                    message = read(delivery)
                    if leaves and isinstance(message, Part) and not message.payload.startswith(f"{self.run}/"):
                        return False
                    if await self._land(delivery, message, assembly):
                        due_at = now() + STALL_S
                if not assembly.missing or (delivery is not None and not (waited_s >= LOOK_S and waiting())):
                    continue
                waited_s = 0.0
                # all have been in the queue: what is neither there nor half here is lost
                there = assembly.arriving or await self.link.depth(queue)
                if now() >= due_at or not (there or (patient and not waiting())):
                    raise TimeoutError
        return True

    async def _land(self, delivery: Delivery, message: Message, assembly: Assembly) -> bool:
        """Put a part in its place; whether it was one that was missing.

        Raises:
            WireError: it lies, or is no part.
        """
        if not isinstance(message, Part):  # it need not say whose: nobody else may publish to where this comes from
            raise WireError("something that is not a part lies in the upload queue.")
        added = assembly.add(message)
        if added and message.index % FORGET_PARTS == FORGET_PARTS - 1:
            forget(assembly.data)
        await delivery.ack()
        return added


def held_max(asks: int, size: int) -> int:
    """How many updates of a round, which asks so many, may be unacknowledged; to say one takes about `size` bytes."""
    return max(1, min(asks, (INBOX_PREFETCH - INBOX_SPARE) // 2, HELD_BYTES_MAX // size))


async def _next(deliveries: AsyncIterator[Delivery], *, until: float) -> Delivery | None:
    """The next delivery; None if there is none by then."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout_at(until):
            return await anext(deliveries)
    return None
