"""A channel of a connection to RabbitMQ: confirms, deliveries, questions and their answers.

Knows what the broker says on a channel and whom it concerns. Does not know sockets or how a connection is opened:
that is `amqp.py`, the only file that makes channels.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol
from uuid import uuid4

import pamqp.frame
from pamqp import commands
from pamqp.base import Frame
from pamqp.header import ContentHeader

from broker import frames
from broker.errors import LinkError, Unroutable
from broker.frames import Inflow, Spares
from broker.link import Intake, Outgoing
from broker.messages import MESSAGE_BYTES_MAX, Buffer, Part
from broker.parts import Aim

log = logging.getLogger(__name__)

CLOSE_S = 5.0


class Refused(Exception):
    """RabbitMQ closed a channel, or will not open the connection: one of AMQP's codes, and a text."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code
        self.text = text.rstrip(".")


class Carrier(Protocol):
    """The connection, as its channels see it."""

    name: str
    user: str
    frame_bytes: int
    spares: Spares

    def write(self, pieces: Iterable[Buffer]) -> None:
        """Send these bytes."""

    def forget(self, number: int) -> None:
        """A channel is closed on both sides."""

    def abort(self, why: str) -> None:
        """Be done with the connection."""


@dataclass(frozen=True, slots=True)
class _Consumer:
    queue: str
    intake: Intake
    aim: Aim | None


class Channel:
    """A channel, until it has `ended`: with why, an error for whoever uses it still."""

    def __init__(self, connection: Carrier, number: int) -> None:
        self.ended: Exception | None = None
        self.inflow: Inflow | None = None
        self._connection = connection
        self._number = number
        # AMQP answers in the order of the questions; None for those whose answer nobody awaits
        self._asked: deque[asyncio.Future[Frame] | None] = deque()
        self._published = 0
        self._unconfirmed: dict[int, asyncio.Future[bool | None]] = {}
        self._marked = uuid4().hex
        self._consumers: dict[str, _Consumer] = {}
        self._consumed = 0
        self._held = 0  # deliveries that are not acked
        self._arriving: frames.Deliver | None = None  # None: what comes is a message that is returned

    # -- asking -------------------------------------------------------------------------------------------------

    def send(self, question: Frame) -> None:
        """Send a method that nobody answers."""
        self._connection.write((pamqp.frame.marshal(question, self._number),))

    def awaited(self) -> asyncio.Future[Frame]:
        """The next answer that nobody else awaits."""
        answer: asyncio.Future[Frame] = asyncio.get_running_loop().create_future()
        if self.ended:
            answer.set_exception(self.ended)
        else:
            self._asked.append(answer)
        return answer

    def begin(self, wishes: Iterable[Frame]) -> None:
        """Send the first methods; nobody need await their answers: a no ends the channel, and all that follows."""
        for wish in wishes:
            self._asked.append(None)
            self.send(wish)

    async def ask(self, question: Frame) -> Frame:
        """Send a method and wait for its answer.

        Raises:
            Refused: the broker closed the channel over it.
            LinkError: the connection was lost.
        """
        answer = self.awaited()
        self.send(question)
        return await answer

    async def publish(self, message: Outgoing) -> bool:
        """Hand over one message; False when a queue that it reaches is full.

        Raises:
            Unroutable: it reaches no queue.
            Refused: the broker closed the channel, over this message or another.
            LinkError: the connection was lost.
        """
        if self.ended:
            raise self.ended
        self._published += 1
        tag, number, pieces, user = self._published, self._number, message.pieces, self._connection.user
        size = sum(map(len, pieces))
        known = frames.properties(message.headers, message.keys[1:], persistent=message.persistent, signed=bool(user))
        confirmed: asyncio.Future[bool | None] = asyncio.get_running_loop().create_future()
        self._unconfirmed[tag] = confirmed
        self._connection.write([
            frames.method(number, frames.publish(message.exchange, message.keys[0])),
            frames.header(number, size, known, f"{self._marked}.{tag}", user=user),
            *frames.body(number, pieces, size, self._connection.frame_bytes),
        ])  # fmt: skip
        try:
            taken = await confirmed
        finally:
            self._unconfirmed.pop(tag, None)
        if taken is None:
            whom = message.keys[0] + (", …" if len(message.keys) > 1 else "")
            raise Unroutable(f"no queue takes {message.exchange} for {whom}: its receiver is not there.")
        return taken

    async def consume(self, queue: str, intake: Intake, *, alone: bool, aim: Aim | None = None) -> None:
        """Let a queue's messages come into `intake`, and parts where `aim` says; one queue at a time.

        Raises:
            Refused: there is no such queue, or it is not ours to consume.
            LinkError: the connection was lost.
        """
        self._consumed += 1
        name = f"{self._number}.{self._consumed}"
        self._consumers[name] = _Consumer(queue, intake, aim)
        await self.ask(commands.Basic.Consume(queue=queue, consumer_tag=name, exclusive=alone))

    async def leave(self) -> bool:
        """Consume no more, within CLOSE_S; False if the channel is not as good as new then, and must be closed."""
        if not self._as_new():
            return False
        try:
            async with asyncio.timeout(CLOSE_S):
                for name in [*self._consumers]:
                    await self.ask(commands.Basic.Cancel(name))
        except (LinkError, Refused, TimeoutError):
            return False
        self._consumers.clear()
        return self._as_new()

    def _as_new(self) -> bool:
        return not self._held and self.ended is None

    def ack(self, tag: int, body: bytearray) -> None:
        """Acknowledge a delivery, whose body is void then."""
        if not self.ended:
            self._connection.write((frames.ack(self._number, tag),))
            if body:
                self._connection.spares.give(body)
            self._held -= 1

    async def close(self) -> None:
        """Close it and wait for the answer at most CLOSE_S; what is unacked goes back."""
        if self.ended:
            return
        answer = self.awaited()
        self.send(commands.Channel.Close(200, "", 0, 0))
        self.end(LinkError("the channel was closed."), but=answer)
        await asyncio.wait({answer}, timeout=CLOSE_S)
        if answer.done() and not answer.cancelled():
            answer.exception()  # it is over either way

    def end(self, why: Exception, *, but: asyncio.Future[Frame] | None = None) -> None:
        """It is over: tell everyone who waits."""
        if self.ended is None:
            self.ended = why
        waiting: list[asyncio.Future[Any] | None] = [*self._asked, *self._unconfirmed.values()]
        for each in waiting:
            if each and not each.done() and each is not but:
                each.set_exception(why)
        self._asked = deque(each if each is but else None for each in self._asked)
        if self.inflow:
            self.inflow.divert()
        lost = why if isinstance(why, LinkError) else LinkError(f"the channel was closed: {why}.")
        for consumer in self._consumers.values():
            consumer.intake.lose(lost)

    # -- what comes ---------------------------------------------------------------------------------------------

    def take_method(self, payload: bytes) -> None:
        """A method's frame has come."""
        which = frames.which(payload)
        if which == frames.DELIVER:
            self._arriving = arriving = frames.deliver(payload)
            consumer = self._consumers.get(arriving.consumer)
            aim = consumer.aim if consumer and self.ended is None else None
            self.inflow = Inflow(MESSAGE_BYTES_MAX + 1, self._connection.spares, aim=aim)
        elif which in (frames.ACK, frames.NACK):
            self._confirm(frames.settled(payload))
        elif which == frames.RETURN:
            self._arriving, self.inflow = None, Inflow(0)
        else:
            _, _, method = pamqp.frame.unmarshal(frames.method(self._number, payload))
            self._take_rare(method)

    def _confirm(self, word: frames.Settled) -> None:
        tags = [word.tag]
        if word.multiple:
            tags = [tag for tag in self._unconfirmed if tag <= word.tag]
        for tag in tags:
            confirmed = self._unconfirmed.get(tag)
            if confirmed and not confirmed.done():
                confirmed.set_result(word.taken)

    def _take_rare(self, method: object) -> None:
        match method:
            case commands.Channel.Close():
                self.send(commands.Channel.CloseOk())
                self.end(Refused(method.reply_code or 0, method.reply_text))
                self._connection.forget(self._number)
            case commands.Channel.CloseOk():
                self._connection.forget(self._number)
                self._answer(method)
            case commands.Connection.Close():
                self.send(commands.Connection.CloseOk())
                self.end(Refused(method.reply_code or 0, method.reply_text))
                self._connection.abort(method.reply_text)
            case commands.Connection.CloseOk():
                self._connection.abort("this side closed it")
            case commands.Connection.Blocked():
                log.warning("%s: RabbitMQ takes nothing for now: %s", self._connection.name, method.reason)
            case commands.Connection.Unblocked():
                log.info("%s: RabbitMQ takes messages again", self._connection.name)
            case commands.Basic.Cancel():
                if consumer := self._consumers.pop(method.consumer_tag or "", None):
                    why = f"the queue {consumer.queue} was deleted while it was consumed: declare it again."
                    consumer.intake.lose(LinkError(why))
            case _:
                self._answer(method)

    def _answer(self, method: object) -> None:
        if self._asked and isinstance(method, Frame):
            waiting = self._asked.popleft()
            if waiting and not waiting.done():
                waiting.set_result(method)

    def take_header(self, payload: bytes) -> None:
        """The header of a message has come."""
        if self.inflow is not None:
            self.inflow.begin(payload)
            self.landed()  # there may be nothing more of it

    def landed(self) -> None:
        """If the message under way is whole, hand it on."""
        if self.inflow is None or not self.inflow.whole:
            return
        inflow, arriving, self.inflow = self.inflow, self._arriving, None
        if arriving is None:
            head = ContentHeader()
            head.unmarshal(inflow.head)
            mark, _, tag = (head.properties.message_id or "").partition(".")
            returned = self._unconfirmed.get(int(tag)) if mark == self._marked else None
            if returned and not returned.done():
                returned.set_result(None)
        elif consumer := self._consumers.get(arriving.consumer):
            self._held += 1
            consumer.intake.take(Delivered(self, arriving.tag, arriving.key, inflow.body, inflow.part, inflow.head))


@dataclass(frozen=True, slots=True)
class Delivered:
    """A delivery; see `broker.link.Delivery`."""

    channel: Channel
    tag: int
    key: str
    body: bytearray
    part: Part | None
    head: bytes

    @property
    def user(self) -> str:
        """See `Delivery.user`."""
        return frames.user(self.head)

    async def ack(self) -> None:
        """See `Delivery.ack`."""
        self.channel.ack(self.tag, self.body)
