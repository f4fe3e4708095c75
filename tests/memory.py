"""A broker inside one process, for tests and simulations: the link's promises without RabbitMQ, network or chance.

Knows exchanges, queues, limits, deliveries and how connections get lost. Does not know AMQP or time, but for the
clock it is given. It differs from RabbitMQ where a comment says so, and nowhere that `tests/contract` can see.
"""

import asyncio
import heapq
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

from broker.errors import BrokerRefused, Lacking, LinkClosed, LinkError, NoRoom, QueueInUse, Unroutable
from broker.link import BROADCAST_MAX, PUBLISH_S, Delivery, Intake, Lane, Outgoing
from broker.messages import Buffer, Part
from broker.parts import Aim
from broker.topology import Binding, Queue, Topology


class MemoryBroker:
    """What all `MemoryLink`s of one simulation share.

    Args:
        clock: seconds since whenever, for message-ttl.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.up = True
        self._clock = clock
        self._links: list[MemoryLink] = []
        self._exchanges: dict[str, str] = {}
        self._queues: dict[str, _Queue] = {}
        self._bindings: list[Binding] = []
        self._news = asyncio.Event()

    def pause(self) -> None:
        """Go away: every connection is lost, and everything waits until `resume`."""
        self.up = False
        for link in self._links:
            link.drop()

    def resume(self) -> None:
        """Come back, with every queue and message."""
        self.up = True
        self.tell()

    def forget(self) -> None:
        """Lose what is not persistent, as RabbitMQ does when it restarts; between `pause` and `resume`."""
        for queue in self._queues.values():
            queue.forget()

    def wipe(self) -> None:
        """Lose everything, as a broker does whose folder was removed."""
        for name in [*self._queues]:
            self.delete(name)
        self._exchanges.clear()

    def remove(self, exchange: str) -> None:
        """Remove an exchange and its bindings, as by hand."""
        del self._exchanges[exchange]
        self._bindings = [each for each in self._bindings if each.exchange != exchange]

    def tell(self) -> None:
        """Something has changed: whoever waits looks again."""
        self._news.set()
        self._news = asyncio.Event()

    async def change(self) -> None:
        """Wait until something changes."""
        await self._news.wait()

    def register(self, link: "MemoryLink") -> None:
        """This link's connection is lost with all others."""
        self._links.append(link)

    def queue(self, name: str) -> "_Queue | None":
        """The queue of that name, without what has expired."""
        queue = self._queues.get(name)
        if queue is not None:
            queue.expire()
        return queue

    def delete(self, name: str) -> None:
        """Remove a queue, its bindings and its consumers."""
        queue = self._queues.pop(name, None)
        self._bindings = [each for each in self._bindings if each.queue != name]
        if queue is not None:
            queue.end()
        self.tell()

    def declare(self, topology: Topology) -> None:
        """See `Link.declare`."""
        for exchange in topology.exchanges:
            if self._exchanges.setdefault(exchange.name, exchange.kind) != exchange.kind:
                raise BrokerRefused(f"the exchange {exchange.name} exists and is of another kind: delete it.")
        for asked in topology.queues:
            queue = self._queues.setdefault(asked.name, _Queue(asked, self._clock))
            if dict(queue.declared.arguments) != dict(asked.arguments):
                raise BrokerRefused(f"the queue {asked.name} exists with other arguments: delete it.")
        for binding in topology.bindings:
            if binding.exchange not in self._exchanges or binding.queue not in self._queues:
                raise BrokerRefused(f"a binding lacks {binding.exchange} or {binding.queue}: declare it first.")
            if binding not in self._bindings:
                self._bindings.append(binding)

    def consume(self, queue: str, *, prefetch: int, alone: bool) -> "_Consumer":
        """Someone who takes a queue's deliveries from now on, until it is ended.

        Raises:
            QueueInUse, LinkError: see `Link.consume`.
        """
        source = self.queue(queue)
        if source is None:
            raise Lacking(f"there is no queue {queue}: declare it, then consume again.")
        if source.consumers and (alone or any(other.alone for other in source.consumers)):
            raise QueueInUse(f"the queue {queue} is consumed by someone else already.")
        consumer = _Consumer(source, prefetch, self.tell, alone)
        source.consumers.append(consumer)
        source.deliver()
        return consumer

    def take(self, message: Outgoing, user: str = "") -> bool:
        """Put a message into every queue that its keys reach; False when one is full, and here all or none."""
        kind = self._exchanges.get(message.exchange)
        reached = {
            binding.queue: self._queues[binding.queue]
            for binding in self._bindings
            if binding.exchange == message.exchange and any(_fits(kind, binding.key, key) for key in message.keys)
        }
        if not reached:
            raise Unroutable(f"no queue takes {message.exchange} for {message.keys[0]}: its receiver is not there.")
        message = replace(message, body=b"".join(message.pieces))  # the sender's memory may change from now on
        if any(queue.refuses(len(message.body)) for queue in reached.values()):
            return False
        for queue in reached.values():
            queue.put(message, user)
        return True


class MemoryLink:
    """Keeps the promises of `broker.link.Link` on a `MemoryBroker`, which vouches for `user`, if there is one.

    It checks no rights: whoever declares what is not theirs to declare gets it.
    """

    def __init__(self, broker: MemoryBroker, user: str = "") -> None:
        self.vouched = bool(user)
        self._user = user
        self._broker = broker
        self._consumers: list[_Consumer] = []
        self._closed = False
        broker.register(self)

    def drop(self) -> None:
        """Lose the connection: consumers end with LinkError, their unacked deliveries are void and come again."""
        for consumer in self._consumers:
            consumer.end(LinkError(f"the connection was lost while {consumer.queue.declared.name} was consumed."))
        self._consumers.clear()
        self._broker.tell()

    async def declare(self, topology: Topology) -> None:
        """See `Link.declare`."""
        await self._until(lambda: self._broker.up, PUBLISH_S)
        self._broker.declare(topology)

    async def publish(self, message: Outgoing, *, within_s: float = PUBLISH_S) -> None:
        """See `Link.publish`."""
        assert 0 < len(message.keys) <= BROADCAST_MAX
        full = False

        def taken() -> bool:
            nonlocal full
            there = self._broker.up
            full = there and not self._broker.take(message, self._user)
            return there and not full

        try:
            await self._until(taken, within_s)
        except LinkError as late:
            if full and not self._closed:
                raise NoRoom(str(late)) from None
            raise

    @asynccontextmanager
    async def consume(
        self, queue: str, *, lane: Lane = Lane.CONTROL, prefetch: int = 64, alone: bool = False,
        aim: Aim | None = None,
    ) -> AsyncIterator[AsyncIterator[Delivery]]:  # fmt: skip
        """See `Link.consume`."""
        del lane, aim  # nothing waits behind anything here, and nothing is copied
        await self._until(lambda: self._broker.up, None)
        consumer = self._broker.consume(queue, prefetch=prefetch, alone=alone)
        self._consumers.append(consumer)
        try:
            yield consumer.intake
        finally:
            if consumer in self._consumers:
                self._consumers.remove(consumer)
            consumer.end(LinkError(f"{queue} is no longer consumed."))
            self._broker.tell()

    async def purge(self, queue: str) -> int:
        """See `Link.purge`."""
        await self._until(lambda: self._broker.up, PUBLISH_S)
        source = self._broker.queue(queue)
        dropped = source.purge() if source is not None else 0
        self._broker.tell()
        return dropped

    async def delete(self, queue: str) -> None:
        """See `Link.delete`."""
        await self._until(lambda: self._broker.up, PUBLISH_S)
        self._broker.delete(queue)

    async def depth(self, queue: str) -> int | None:
        """See `Link.depth`."""
        await self._until(lambda: self._broker.up, PUBLISH_S)
        source = self._broker.queue(queue)
        return None if source is None else len(source.ready)

    async def close(self) -> None:
        """See `Link.close`."""
        self._closed = True
        for consumer in self._consumers:
            consumer.intake.lose(LinkClosed("this link was closed."))
        self.drop()

    async def _until(self, done: Callable[[], bool], within_s: float | None) -> None:
        """Wait until `done()`, asking after every change."""
        try:
            async with asyncio.timeout(within_s):
                await asyncio.sleep(0)  # so that one busy party cannot keep all others from their turn
                while True:
                    if self._closed:
                        raise LinkClosed("this link was closed.")
                    if done():
                        return
                    await self._broker.change()
        except TimeoutError:
            raise LinkError(f"the broker did not take it within {within_s:g} s.") from None


@dataclass(slots=True)
class _Stored:
    """A message in a queue; `place` is where it belongs, also when it comes back."""

    place: int
    message: Outgoing
    user: str
    expires_at: float


class _Queue:
    """Messages in order, those who consume them in turn, and the limits."""

    def __init__(self, declared: Queue, clock: Callable[[], float]) -> None:
        limits = declared.arguments
        self.declared = declared
        self.ready: list[tuple[int, _Stored]] = []  # a heap: what comes back comes back to its place
        self.consumers: list[_Consumer] = []
        self._clock = clock
        self._places = 0
        self._bytes = 0
        self._length_max = float(limits.get("x-max-length", "inf"))
        self._bytes_max = float(limits.get("x-max-length-bytes", "inf"))
        self._ttl_s = float(limits.get("x-message-ttl", "inf")) / 1000
        self._may_refuse = limits.get("x-overflow") == "reject-publish"

    def refuses(self, size: int) -> bool:
        """Whether a message of `size` bytes has no room, in a queue that says so."""
        self.expire()
        return self._may_refuse and (len(self.ready) + 1 > self._length_max or self._bytes + size > self._bytes_max)

    def put(self, message: Outgoing, user: str) -> None:
        """Append; then the oldest that wait go until the limits are kept."""
        self._places += 1
        self._push(_Stored(self._places, message, user, self._clock() + self._ttl_s))
        self.deliver()
        while len(self.ready) > self._length_max or self._bytes > self._bytes_max:
            self._pop()

    def deliver(self) -> None:
        """Hand out, as far as the consumers have room, each in turn."""
        self.expire()
        while self.ready and (consumer := next((each for each in self.consumers if each.has_room), None)):
            self.consumers.remove(consumer)
            self.consumers.append(consumer)
            consumer.take(self._pop())

    def give_back(self, stored: list[_Stored]) -> None:
        """To their places, for the next consumer."""
        for each in stored:
            self._push(each)
        self.deliver()

    def expire(self) -> None:
        """Drop what is too old, from the head."""
        while self.ready and self.ready[0][1].expires_at <= self._clock():
            self._pop()

    def purge(self) -> int:
        """Drop what waits; how many that was."""
        dropped = len(self.ready)
        self.ready.clear()
        self._bytes = 0
        return dropped

    def forget(self) -> None:
        """Drop what is not persistent."""
        kept = [stored for _, stored in self.ready if stored.message.persistent]
        self.purge()
        for stored in kept:
            self._push(stored)

    def end(self) -> None:
        """The queue is deleted."""
        consumers, self.consumers = self.consumers, []
        for consumer in consumers:
            consumer.intake.lose(LinkError(f"the queue {self.declared.name} was deleted while it was consumed."))
            consumer.unacked.clear()

    def _push(self, stored: _Stored) -> None:
        heapq.heappush(self.ready, (stored.place, stored))
        self._bytes += len(stored.message.body)

    def _pop(self) -> _Stored:
        _, stored = heapq.heappop(self.ready)
        self._bytes -= len(stored.message.body)
        return stored


@dataclass(slots=True, eq=False)
class _Consumer:
    queue: _Queue
    prefetch: int
    tell: Callable[[], None]
    alone: bool
    intake: Intake = field(default_factory=Intake)
    unacked: dict[int, _Stored] = field(default_factory=dict)

    @property
    def has_room(self) -> bool:
        return len(self.unacked) < self.prefetch

    def take(self, stored: _Stored) -> None:
        self.unacked[stored.place] = stored
        self.intake.take(_Delivery(self, stored))

    def settle(self, place: int) -> None:
        """Forget one delivery; nothing when it is void."""
        if self.unacked.pop(place, None) is not None:
            self.queue.deliver()
            self.tell()

    def end(self, why: LinkError) -> None:
        """Consume no more; what is unacked goes back."""
        self.intake.lose(why)
        if self in self.queue.consumers:
            self.queue.consumers.remove(self)
        held, self.unacked = list(self.unacked.values()), {}
        self.queue.give_back(held)


@dataclass(frozen=True, slots=True)
class _Delivery:
    consumer: _Consumer
    stored: _Stored

    @property
    def body(self) -> Buffer:
        return self.stored.message.pieces[0]

    @property
    def part(self) -> Part | None:
        return None

    @property
    def key(self) -> str:
        return self.stored.message.keys[0]

    @property
    def user(self) -> str:
        return self.stored.user

    async def ack(self) -> None:
        self.consumer.settle(self.stored.place)


def _fits(kind: str | None, pattern: str, key: str) -> bool:
    """Whether an exchange of this kind takes a message of this key along a binding of this pattern."""
    if kind == "topic":
        return _fits_words(pattern.split("."), key.split("."))
    return kind == "fanout" or pattern == key


def _fits_words(pattern: list[str], words: list[str]) -> bool:
    """`*` stands for one word, `#` for any number."""
    if not pattern:
        return not words
    if pattern[0] == "#":
        return any(_fits_words(pattern[1:], words[i:]) for i in range(len(words) + 1))
    return bool(words) and pattern[0] in ("*", words[0]) and _fits_words(pattern[1:], words[1:])
