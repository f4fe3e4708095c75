"""A link whose network is in an adversary's hand: it does whatever `broker/link.py` allows, and nothing else.

Knows how messages, confirms, deliveries and acknowledgements travel, and how connections break, at either end first.
Does not know when they do: `adversary.py` says so, at every step.

- Each lane is a connection of its own. What is sent on it arrives in order, or not at all; it arrives also when its
  sender has given up, or has been killed meanwhile.
- A lost connection is noticed at once or later, by either end. Until the sender notices, it waits for its confirms,
  and then sends again, what may have arrived before; until the broker notices, its consumers hold their queue.
- What is delivered may be handed over late. Its bytes are other bytes once it has been acknowledged.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from broker.errors import LinkClosed, LinkError
from broker.link import BROADCAST_MAX, PUBLISH_S, Delivery, Lane, Outgoing
from broker.messages import Message, Part, decode
from broker.parts import Aim
from broker.topology import Topology
from tests.memory import MemoryBroker
from tests.system.virtual import Process, VirtualLoop

TRANSIT_S = 1e-6  # between two things on one lane
RETRY_S = 0.1
ASKING = "asking"  # the lane of all that is asked of the broker


class Adversary(Protocol):
    """What a cable asks."""

    def step(self, process: Process, what: str) -> None:
        """This is about to happen: now is the time."""

    def sent(self, message: Message, keys: tuple[str, ...]) -> None:
        """This is on its way to these."""

    def lag_s(self) -> float:
        """How long something takes."""

    def fate(self, what: str) -> str:
        """What becomes of something that is sent: it `arrives`, is `lost`, or its confirm is `unconfirmed`."""


@dataclass(eq=False)
class Network:
    """The broker, and who can reach it.

    Attributes:
        blocked_until: it takes nothing before.
        cables: everyone's.
    """

    loop: VirtualLoop
    broker: MemoryBroker
    adversary: Adversary
    blocked_until: float = 0.0
    cables: list["Cable"] = field(default_factory=list)

    def restart(self, away_s: float) -> None:
        """The broker goes away, loses what is not persistent, and comes back."""
        for cable in self.cables:
            cable.cut()
        self.broker.pause()
        self.broker.forget()
        self.loop.outside(self.loop.time() + away_s, self.broker.resume)


@dataclass(eq=False)
class Flow:
    """One consumer, as both ends see it."""

    lane: Lane
    consumer: Any  # the memory broker's own
    cut: bool = False
    pending: Delivery | None = None
    lost: asyncio.Event = field(default_factory=asyncio.Event)

    def lose(self) -> None:
        """Our end notices that the connection is lost."""
        self.consumer.intake.lose(LinkError(f"the connection was lost ({self.lane.value})."))
        self.lost.set()

    def end(self) -> None:
        """The broker notices."""
        self.consumer.end(LinkError("it is consumed no longer."))
        self.consumer.tell()


class Cable:
    """Keeps the promises of `broker.link.Link` for one process."""

    vouched = False

    def __init__(self, network: Network, process: Process) -> None:
        self.network = network
        self.process = process
        self.dark_until = 0.0
        self._loop = network.loop
        self._flows: list[Flow] = []
        self._sent: dict[str, list[asyncio.Future[Any]]] = {}
        self._busy_until: dict[str, float] = {}
        self._closed = False
        network.cables.append(self)

    # -- how it breaks ------------------------------------------------------------------------------------------

    def cut(self, *lanes: Lane, told_s: float = 0.0, noticed_s: float = 0.0) -> None:
        """Lose these lanes, or all: what is on its way is lost; we notice after `told_s`, the broker `noticed_s`."""
        names = {lane.value for lane in lanes} or {*(lane.value for lane in Lane), ASKING}
        now = self._loop.time()
        for flow in [flow for flow in self._flows if flow.lane.value in names and not flow.cut]:
            flow.cut = True
            self._flows.remove(flow)
            _at_once_or(self._loop, now + told_s, flow.lose)
            _at_once_or(self._loop, now + noticed_s, flow.end)
        for name in sorted(names):
            for told in self._sent.pop(name, []):
                _at_once_or(self._loop, now + told_s, _fail, told)

    def die(self, *, arriving: bool, noticed_s: float) -> None:
        """The process is killed: what it has sent may still arrive, and its connections end."""
        self._closed = True
        sent, self._sent = self._sent, {}
        self.cut(noticed_s=noticed_s)
        self._sent = sent if arriving else {}

    # -- sending ------------------------------------------------------------------------------------------------

    async def declare(self, topology: Topology) -> None:
        """See `Link.declare`."""
        names = ", ".join(each.name for each in topology.queues or topology.exchanges)
        while True:  # those who come back declare first: a broker that is away for long is no reason to end
            try:
                await self._ask(ASKING, f"declare {names}", lambda: self.network.broker.declare(topology))
            except LinkClosed:
                raise
            except LinkError:
                continue
            return

    async def publish(self, message: Outgoing, *, within_s: float = PUBLISH_S) -> None:
        """See `Link.publish`."""
        assert 0 < len(message.keys) <= BROADCAST_MAX
        take, said = self.network.broker.take, decode(b"".join(message.pieces))
        what = f"publish {message.exchange} {' '.join(message.keys)}: {told_of(said)}"

        def action() -> Callable[[], bool]:
            now = replace(message, body=b"".join(message.pieces))
            self.network.adversary.sent(said, message.keys)
            return lambda: take(now)

        await self._ask(message.lane.value, what, action=action, within_s=within_s, publishes=True)

    async def purge(self, queue: str) -> int:
        """See `Link.purge`."""

        def purge() -> int:
            found = self.network.broker.queue(queue)
            dropped = found.purge() if found else 0
            self.network.broker.tell()
            return dropped

        return int(await self._ask(ASKING, f"purge {queue}", purge))

    async def delete(self, queue: str) -> None:
        """See `Link.delete`."""
        await self._ask(ASKING, f"delete {queue}", lambda: self.network.broker.delete(queue))

    async def depth(self, queue: str) -> int | None:
        """See `Link.depth`."""

        def depth() -> int | None:
            found = self.network.broker.queue(queue)
            return len(found.ready) if found else None

        found: int | None = await self._ask(ASKING, f"depth {queue}", depth)
        return found

    async def close(self) -> None:
        """See `Link.close`."""
        self.process.check()
        self._closed = True
        for flow in self._flows:
            flow.consumer.intake.lose(LinkClosed("this link was closed."))
        self.cut()

    async def _ask(
        self,
        lane: str,
        what: str,
        act: Callable[[], Any] = lambda: None,
        *,
        action: Callable[[], Callable[[], Any]] | None = None,
        within_s: float | None = PUBLISH_S,
        publishes: bool = False,
    ) -> Any:
        """Let the broker do something, again and again until it says that it has; False is no."""
        try:
            async with asyncio.timeout(within_s):
                while True:
                    self.network.adversary.step(self.process, what)
                    await self._reachable(publishes=publishes)
                    try:
                        answer = await self._send(lane, what, action() if action else act)
                        if answer is not False:
                            return answer
                    except ConnectionError:
                        pass
                    await asyncio.sleep(RETRY_S)
        except TimeoutError:
            raise LinkError(f"the broker did not answer within {within_s} s: {what}.") from None

    async def _reachable(self, *, publishes: bool) -> None:
        await asyncio.sleep(0)
        while True:
            self.process.check()
            if self._closed:
                raise LinkClosed("this link was closed.")
            network, until = self.network, self.dark_until
            if publishes:
                until = max(until, network.blocked_until)
            if not network.broker.up:
                await network.broker.change()
            elif until > self._loop.time():
                await asyncio.sleep(until - self._loop.time())
            else:
                return

    async def _send(self, lane: str, what: str, act: Callable[[], Any]) -> Any:
        """One try: there, and back again."""
        told: asyncio.Future[Any] = self._loop.create_future()
        fate, adversary = self.network.adversary.fate(what), self.network.adversary
        self._sent.setdefault(lane, []).append(told)
        at = max(self._loop.time() + adversary.lag_s(), self._busy_until.get(lane, 0.0) + TRANSIT_S)
        self._busy_until[lane] = at
        self._loop.outside(at, self._arrive, lane, told, act, fate)
        answer = await told
        await asyncio.sleep(adversary.lag_s())
        self.process.check()
        return answer

    def _arrive(self, lane: str, told: asyncio.Future[Any], act: Callable[[], Any], fate: str) -> None:
        if told not in self._sent.get(lane, ()):
            return  # it was lost with its connection
        if fate == "lost" or not self.network.broker.up or self.dark_until > self._loop.time():
            self._break(lane)
            return
        try:
            answer = act()
        except Exception as refused:  # noqa: BLE001 - the broker's answer
            self._sent[lane].remove(told)
            if not told.done():
                told.set_exception(refused)
            return
        if fate == "unconfirmed":
            self._break(lane)
            return
        self._sent[lane].remove(told)
        if not told.done():
            told.set_result(answer)
        elif isinstance(answer, Flow):  # nobody is there to consume, as the broker finds out soon
            self._leave(answer, self.network.adversary.lag_s())

    def _break(self, lane: str) -> None:
        if lane == ASKING:
            for told in self._sent.pop(lane, []):
                _fail(told)
        else:
            self.cut(Lane(lane), told_s=self.network.adversary.lag_s())

    # -- receiving ----------------------------------------------------------------------------------------------

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
        """See `Link.consume`."""
        del aim  # what it says may go unheeded
        entered: list[Flow] = []

        def enter() -> Flow:
            entered.append(Flow(lane, self.network.broker.consume(queue, prefetch=prefetch, alone=alone)))
            self._flows.append(entered[-1])
            return entered[-1]

        try:
            yield Delivered(self, queue, await self._ask(lane.value, f"consume {queue}", enter, within_s=None))
        finally:
            for flow in entered if self.process.alive else ():
                self._leave(flow)

    def _leave(self, flow: Flow, after_s: float = 0.0) -> None:
        """Consume no more; what is unacked goes back."""
        if not flow.cut:
            flow.cut = True
            self._flows.remove(flow)
            _at_once_or(self._loop, self._loop.time() + after_s, flow.end)

    async def hand_over(self, queue: str, flow: Flow) -> Delivery:
        """The next delivery; one that is not waited for any more is the next all the same."""
        pending = flow.pending
        delivery = await anext(flow.consumer.intake) if pending is None else pending
        flow.pending = delivery
        self.network.adversary.step(self.process, f"deliver {queue}: {told_of(decode(delivery.body))}")
        await asyncio.sleep(self.network.adversary.lag_s())
        self.process.check()
        if flow.cut:
            await flow.lost.wait()
        if (lost := flow.consumer.intake._lost) is not None:
            raise lost
        flow.pending = None
        return Taken(self, flow, queue, delivery)


@dataclass(frozen=True, slots=True)
class Delivered:
    """What `consume` gives."""

    cable: Cable
    queue: str
    flow: Flow

    def __aiter__(self) -> "Delivered":
        return self

    async def __anext__(self) -> Delivery:
        return await self.cable.hand_over(self.queue, self.flow)


class Taken:
    """One delivery."""

    part: Part | None = None

    def __init__(self, cable: Cable, flow: Flow, queue: str, delivery: Delivery) -> None:
        self.key = delivery.key
        self.user = delivery.user
        self._room = bytearray(delivery.body)
        self.body = memoryview(self._room).toreadonly()
        self._cable = cable
        self._flow = flow
        self._queue = queue
        self._delivery = delivery

    async def ack(self) -> None:
        """See `Delivery.ack`."""
        cable = self._cable
        cable.network.adversary.step(cable.process, f"ack {self._queue}")
        if not self._flow.cut and cable.network.adversary.fate("ack") != "arrives":
            cable.cut(self._flow.lane)
        elif not self._flow.cut:
            await self._delivery.ack()
        self._room[:] = bytes(len(self._room))


def told_of(message: Message) -> str:
    """What it is, for people."""
    kind = type(message).__name__.lower()
    if isinstance(message, Part):
        return f"{kind} {message.index} of {message.payload}"
    of = getattr(message, "of", None) or getattr(message, "doing", None)
    return " ".join([kind, str(of or ""), getattr(message, "verdict", "") or getattr(message, "incarnation", "")])


def _fail(told: asyncio.Future[Any]) -> None:
    if not told.done():
        told.set_exception(ConnectionError())


def _at_once_or(loop: VirtualLoop, at: float, act: Callable[..., object], *arguments: Any) -> None:
    if at <= loop.time():
        act(*arguments)
    else:
        loop.outside(at, act, *arguments)
