"""A way to the broker, as both services see it. `rabbit.py` and `tests/memory.py` keep its promises, under one suite.

Knows messages' bytes, routing and acknowledgement. Does not know what a message means, nor when to send one.

The promises:
- `publish` returns when the broker has the message; whatever it raises, the message may have arrived all the same,
  so everything that is sent can be recognised when it comes twice.
- A delivery is ours until acked; unacked ones come back, to the next consumer.
- `consume` raises LinkError when its connection is lost. Deliveries in hand are then void: acking them does nothing,
  and they come again. Consuming once more waits for the broker to return.
- Publishing waits for the broker to return, within its bound.
- One queue, one publisher: first in, first out, for messages published one after the other.
- A queue that is full and may refuse (`reject-publish`) makes the publisher wait for room, within its bound.
"""

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from typing import Protocol

from broker.errors import LinkError
from broker.messages import Buffer, Message, Part, decode, encode_part
from broker.parts import Aim
from broker.topology import Topology

WINDOW_BYTES = 8 * 1024 * 1024
"""Bytes on their way to the broker and not yet confirmed, per payload."""
BROADCAST_MAX = 1000
"""Most routing keys of one publish: they travel in a header that must fit one frame of 128 KiB."""
PUBLISH_S = 300.0
"""How long a publish waits for an absent or blocked broker before it gives up."""


class Lane(Enum):
    """Connections are apart, so that small messages never wait behind parts and acks never behind uploads."""

    CONTROL = "control"
    DOWN = "down"
    UP = "up"


@dataclass(frozen=True, slots=True)
class Outgoing:
    """One message to publish: to every queue that `keys` reach, as one copy to the broker.

    A body in several pieces is sent as one; nothing may change in them before it is confirmed.
    """

    exchange: str
    keys: tuple[str, ...]
    body: bytes | tuple[Buffer, ...]
    lane: Lane = Lane.CONTROL
    persistent: bool = True
    headers: tuple[tuple[str, str], ...] = ()

    @property
    def pieces(self) -> tuple[Buffer, ...]:
        """The body, however it was given."""
        return self.body if isinstance(self.body, tuple) else (self.body,)


class Delivery(Protocol):
    """One message, ours until acked."""

    @property
    def body(self) -> Buffer:
        """The message's bytes; they may be other bytes once it has been acked."""

    @property
    def part(self) -> Part | None:
        """A part whose data has landed where the consumer aimed it: it is the message, and `body` is empty."""

    @property
    def key(self) -> str:
        """The routing key it was published with; the first one, whichever of several brought it here."""

    @property
    def user(self) -> str:
        """Who published it, if the broker vouches for that; else empty."""

    async def ack(self) -> None:
        """Done with: the broker forgets it. Does nothing when the delivery is void."""


class Link(Protocol):
    """A connected party's way to the broker.

    Attributes:
        vouched: the broker vouches for who publishes: what we say carries our name, what others say must carry
            theirs, and a worker's queues are not its own to declare.
    """

    vouched: bool

    async def declare(self, topology: Topology) -> None:
        """Make sure that these exist.

        Raises:
            BrokerRefused: the broker has them with other arguments, or does not allow it.
        """

    async def publish(self, message: Outgoing, *, within_s: float = PUBLISH_S) -> None:
        """Hand one message to the broker; returns when the broker has confirmed it.

        Raises:
            Unroutable: none of its keys reaches a queue, or there is no such exchange. One key of several that
                reaches none goes unnoticed.
            BrokerRefused: not allowed, or larger than the broker takes.
            LinkError: not confirmed within `within_s`; it may have arrived.
            NoRoom: a queue was full for as long.
            LinkClosed: this link was closed.
        """

    def consume(
        self,
        queue: str,
        *,
        lane: Lane = Lane.CONTROL,
        prefetch: int = 64,
        alone: bool = False,
        aim: Aim | None = None,
    ) -> AbstractAsyncContextManager[AsyncIterator[Delivery]]:  # fmt: skip
        """Take deliveries of a queue; at most `prefetch` unacked at a time. Leaving gives the unacked back.

        Entering waits for the broker as long as it takes. `alone`: as the queue's only consumer. `aim` may say of a
        part where its data is to land, and must be quick; what it says of a part may go unheeded.

        Raises:
            QueueInUse: (on entering) someone else consumes it, and one of the two wants it alone.
            Lacking: (on entering) there is no such queue.
            LinkError: (while iterating) the connection was lost, or the queue was deleted.
            LinkClosed: this link was closed.
        """

    async def purge(self, queue: str) -> int:
        """Drop what waits in a queue (not what is unacked); how many messages that was, 0 if there is no queue."""

    async def delete(self, queue: str) -> None:
        """Remove a queue and what is in it; fine when there is none."""

    async def depth(self, queue: str) -> int | None:
        """How many messages wait in a queue, unacked ones not counted; None when there is no such queue."""

    async def close(self) -> None:
        """Close; unacked deliveries go back to their queues. May be called twice."""


class Intake:
    """What one consumer has received and not handed on yet, until it is lost: the iterator that `consume` gives."""

    def __init__(self) -> None:
        self._arrived: asyncio.Queue[Delivery | None] = asyncio.Queue()  # bounded by the consumer's prefetch
        self._lost: LinkError | None = None

    def __aiter__(self) -> "Intake":
        return self

    async def __anext__(self) -> Delivery:
        delivery = None if self._lost else await self._arrived.get()
        if self._lost is not None:  # then what arrived before is void, and comes again
            raise self._lost
        assert delivery is not None
        return delivery

    def take(self, delivery: Delivery) -> None:
        """One more."""
        self._arrived.put_nowait(delivery)

    def lose(self, why: LinkError) -> None:
        """No more: whoever waits, and whoever comes, is told why."""
        if self._lost is None:
            self._lost = why
            self._arrived.put_nowait(None)


def read(delivery: Delivery) -> Message:
    """The message that was delivered.

    Raises:
        WireError: see `messages.decode`.
    """
    return delivery.part or decode(delivery.body)


heard = lru_cache(maxsize=4)(decode)
"""A message of a control queue: those who are hosted together are told the same, in which nothing can change."""


async def publish_parts(
    link: Link, parts: Iterable[Part], exchange: str, keys: tuple[str, ...], *, lane: Lane
) -> int:
    """Publish a payload's parts, at most WINDOW_BYTES unconfirmed at a time; bytes handed to the broker.

    Parts are not persistent: both ends can send them again, and disks would only slow the broker down.

    Raises:
        LinkError: as `publish`; some of the parts may have arrived.
    """
    sent, waiting = 0, 0
    room = asyncio.Event()
    failure: BaseException | None = None

    async def one(body: tuple[Buffer, ...], size: int) -> None:
        nonlocal waiting
        for batch in batches(keys):
            await link.publish(Outgoing(exchange, batch, body, lane, persistent=False))
        waiting -= size
        room.set()

    try:
        async with asyncio.TaskGroup() as group:
            for part in parts:
                body = encode_part(part)
                size = sum(map(len, body))
                while waiting >= WINDOW_BYTES:
                    room.clear()
                    await room.wait()
                waiting, sent = waiting + size, sent + size
                group.create_task(one(body, size))
    except ExceptionGroup as several:  # the first failure speaks for all: they share one connection
        failure = first_of(several)
        for each in (several, *several.exceptions):  # with tasks and frames in a circle, they would keep the payload
            each.__traceback__ = each.__context__ = None
    if failure is not None:
        try:
            raise failure
        finally:
            failure = None
    return sent


def first_of(several: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first single exception inside a group."""
    inner: BaseException = several
    while isinstance(inner, BaseExceptionGroup):
        inner = inner.exceptions[0]
    return inner


def batches(keys: tuple[str, ...]) -> Iterable[tuple[str, ...]]:
    """`keys` in runs short enough for one publish each."""
    return (keys[i : i + BROADCAST_MAX] for i in range(0, len(keys), BROADCAST_MAX))
