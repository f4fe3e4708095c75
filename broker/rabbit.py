"""The link to a real RabbitMQ: confirmed publishing, and deliveries that end with the connection they came by.

Knows how each promise of `link.py` is kept: messages by our own `amqp.py`, questions by aio-pika. Does not know what
messages mean, nor how connections come back (`lanes.py`). Nothing is restored behind the caller's back: a lost
connection ends the consumers on it with LinkError, publishers try again, and whoever needs it next opens it.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import TypeVar

from aio_pika.abc import AbstractChannel
from aiormq import exceptions

from broker import lanes
from broker.amqp import Connection
from broker.channels import Channel, Refused
from broker.errors import BrokerRefused, Lacking, LinkClosed, LinkError, NoRoom, QueueInUse, Unroutable, UsageError
from broker.invitation import Access
from broker.lanes import Asking, backoff_s, interruptions, words
from broker.link import BROADCAST_MAX, PUBLISH_S, Delivery, Intake, Lane, Outgoing
from broker.parts import Aim
from broker.topology import Topology

log = logging.getLogger(__name__)

NOT_FOUND = 404
DAY_S = 24 * 3600.0
_Answer = TypeVar("_Answer")


async def connect(
    access: Access | str, *, name: str, heartbeat_s: int = 30, give_up_s: float | None = None
) -> "RabbitLink":
    """A link to RabbitMQ.

    Args:
        access: where RabbitMQ is and who asks, or the URL that says so; never repeated in an error or a log.
        name: who this is, as operators see it in RabbitMQ's list of connections.
        heartbeat_s: a broker that is silent for about three of these counts as lost.
        give_up_s: whoever waits for RabbitMQ for longer has GaveUp raised; None waits for ever.

    Raises:
        UsageError: the URL is none or not secured, or no RabbitMQ answers there.
        BrokerRefused: it answers and refuses, or is no RabbitMQ; waiting would not help.
    """
    link = RabbitLink(Access.at(access) if isinstance(access, str) else access, name, heartbeat_s, give_up_s)
    try:
        await link.open()
    except BaseException as problem:
        await link.close()
        if isinstance(problem, LinkError):
            raise UsageError(str(problem)) from None
        raise
    return link


class RabbitLink:
    """Keeps the promises of `broker.link.Link`; made by `connect`."""

    def __init__(self, access: Access, name: str, heartbeat_s: int, give_up_s: float | None) -> None:
        self.vouched = access.vouched
        self._access = access
        self._absence = lanes.Absence(give_up_s)
        self._lanes = {
            lane: lanes.Lane(self._renewed, f"{name} {lane.value}", heartbeat_s, self._absence) for lane in Lane
        }
        self._asking = Asking(self._renewed, f"{name} asking", heartbeat_s)
        self._minding: asyncio.Task[None] | None = None
        self._intakes: set[Intake] = set()
        self._running: set[asyncio.Timeout] = set()
        self._closed = False

    async def open(self) -> None:
        """Open the first connection, in one attempt."""
        if self.vouched:
            self._minding = asyncio.create_task(self._mind_expiry())
        await self._lanes[Lane.CONTROL].dial()

    def _renewed(self) -> Access:
        """How we come in: if the invitation on the disk is another one by now, by that one."""
        self._access = self._access.renewed()
        return self._access

    async def _mind_expiry(self) -> None:
        """Say once a day that the invitation ends soon, until there is another one in its place."""
        while True:
            if said := self._renewed().expiry():
                log.warning("%s", said)
            await asyncio.sleep(DAY_S)

    async def declare(self, topology: Topology) -> None:
        """See `Link.declare`."""

        async def ask(channel: AbstractChannel) -> None:
            for each in topology.exchanges:
                await channel.declare_exchange(each.name, each.kind, durable=True, auto_delete=each.passing)
            for queue in topology.queues:
                await channel.declare_queue(queue.name, durable=True, arguments=dict(queue.arguments))
            for binding in topology.bindings:
                bound = await channel.get_queue(binding.queue, ensure=False)
                await bound.bind(binding.exchange, binding.key)

        try:  # however long RabbitMQ is away, which is no reason to end: those who come back declare first
            await self._ask(ask, within_s=None)
        except exceptions.ChannelPreconditionFailed as problem:
            raise BrokerRefused(
                f"RabbitMQ has this queue or exchange with other properties ({words(problem)}): "
                "delete it there, or use another vhost."
            ) from None
        except exceptions.ChannelNotFoundEntity as problem:
            raise BrokerRefused(f"RabbitMQ lacks what a binding needs ({words(problem)}): declare it.") from None

    async def publish(self, message: Outgoing, *, within_s: float = PUBLISH_S) -> None:
        """See `Link.publish`."""
        assert 0 < len(message.keys) <= BROADCAST_MAX
        lane, pauses, alone, full = self._lanes[message.lane], backoff_s(), False, False
        said = f"RabbitMQ did not confirm a message to {message.exchange}"
        async with self._bounded(within_s, said, full=lambda: full):
            while True:
                try:
                    if await (_publish_alone(lane, message) if alone else (await lane.publisher()).publish(message)):
                        return
                    full = True
                except Refused as problem:
                    # It ended every publish on the channel, whosever fault it was: on a channel of our own we learn.
                    if alone and problem.code == NOT_FOUND:
                        raise Unroutable(f"RabbitMQ has no such exchange ({problem.text}): declare it.") from None
                    if alone:
                        raise _refusal(problem.text, f"publishing to {message.exchange}") from None
                    alone = True
                    continue
                except (Unroutable, LinkClosed):
                    raise
                except LinkError as lost:
                    full = False
                    log.debug("publishing to %s again: %s", message.exchange, lost)
                await asyncio.sleep(next(pauses))

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
        """See `Link.consume`. Entering waits for the broker, but not for a queue that is missing: LinkError."""
        intake = Intake()
        async with self._bounded(None, "never said"):
            connection, channel = await self._start(
                self._lanes[lane], queue, prefetch=prefetch, intake=intake, alone=alone, aim=aim
            )
        self._intakes.add(intake)
        try:
            yield intake
        finally:
            self._intakes.discard(intake)
            as_new = False
            try:
                as_new = await channel.leave()
            finally:  # cancelled, too: a consumer that stays would hold its queue
                if as_new:
                    connection.keep(channel, prefetch=prefetch)
                else:
                    await channel.close()

    async def purge(self, queue: str) -> int:
        """See `Link.purge`."""

        async def ask(channel: AbstractChannel) -> int:
            asked = await channel.get_queue(queue, ensure=False)
            return (await asked.purge()).message_count or 0

        with suppress(exceptions.ChannelNotFoundEntity):
            return await self._ask(ask)
        return 0

    async def delete(self, queue: str) -> None:
        """See `Link.delete`."""
        with suppress(exceptions.ChannelNotFoundEntity):
            await self._ask(lambda channel: channel.queue_delete(queue))

    async def depth(self, queue: str) -> int | None:
        """See `Link.depth`."""
        with suppress(exceptions.ChannelNotFoundEntity):
            asked = await self._ask(lambda channel: channel.declare_queue(queue, passive=True))
            return asked.declaration_result.message_count
        return None

    async def close(self) -> None:
        """See `Link.close`; takes at most CLOSE_S, whatever the broker does."""
        if self._closed:
            return
        self._closed = True
        if self._minding:
            self._minding.cancel()
        for intake in self._intakes:
            intake.lose(LinkClosed("this link was closed."))
        for scope in self._running:
            if not scope.expired():
                scope.reschedule(0)
        await asyncio.gather(self._asking.close(), *(lane.close() for lane in self._lanes.values()))

    @asynccontextmanager
    async def _bounded(
        self, within_s: float | None, complaint: str, *, full: Callable[[], bool] = lambda: False
    ) -> AsyncIterator[None]:
        """Run one operation under its bound; closing the link ends it at once."""
        if self._closed:
            raise LinkClosed("this link was closed.")
        try:
            async with asyncio.timeout(within_s) as scope:
                self._running.add(scope)
                yield
        except TimeoutError:
            if self._closed:
                raise LinkClosed("this link was closed.") from None
            if full():
                raise NoRoom(f"{complaint} within {within_s:g} s: a queue that it belongs in is full.") from None
            raise LinkError(f"{complaint} within {within_s:g} s: is it running, with memory and disk left?") from None
        finally:
            self._running.discard(scope)

    async def _start(
        self, lane: lanes.Lane, queue: str, *, prefetch: int, intake: Intake, alone: bool, aim: Aim | None
    ) -> tuple[Connection, Channel]:
        """A channel of its own on which `intake` consumes; waits for the broker as long as it takes."""
        pauses = backoff_s()
        while True:
            try:
                connection = await lane.connection()
                channel = connection.open(prefetch=prefetch)
                try:
                    await channel.consume(queue, intake, alone=alone, aim=aim)
                except BaseException:
                    await channel.close()
                    raise
                return connection, channel
            except Refused as problem:
                if problem.code == NOT_FOUND:
                    raise Lacking(f"there is no queue {queue}: declare it, then consume again.") from None
                if "exclusive" in problem.text:
                    raise QueueInUse(f"the queue {queue} is consumed by someone else already.") from None
                raise _refusal(problem.text, f"consuming {queue}") from None
            except LinkClosed:
                raise
            except LinkError as lost:
                log.debug("consuming %s again: %s", queue, lost)
            await asyncio.sleep(next(pauses))

    async def _ask(
        self, question: Callable[[AbstractChannel], Awaitable[_Answer]], *, within_s: float | None = PUBLISH_S
    ) -> _Answer:
        """Ask on a channel of its own, because a no closes the channel; ask again after each interruption."""
        pauses = backoff_s()
        async with self._bounded(within_s, "RabbitMQ did not answer"):
            while True:
                try:
                    async with self._asking.channel() as channel:
                        self._absence.over()
                        with interruptions():
                            return await question(channel)
                except (exceptions.ChannelAccessRefused, exceptions.ChannelLockedResource) as problem:
                    raise _refusal(words(problem), "this") from None
                except LinkError as lost:
                    log.debug("asking again: %s", lost)
                    self._absence.goes_on(str(lost))
                await asyncio.sleep(next(pauses))


async def _publish_alone(lane: lanes.Lane, message: Outgoing) -> bool:
    channel = (await lane.connection()).open(confirms=True)
    try:
        return await channel.publish(message)
    finally:
        await channel.close()


def _refusal(said: str, what: str) -> BrokerRefused:
    return BrokerRefused(f"RabbitMQ does not allow {what} ({said}): ask who runs it for the permission.")
