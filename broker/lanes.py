"""Connections to RabbitMQ that come back, and what it means when aio-pika raises.

Knows how a lost connection is opened again, and which of aio-pika's errors are the broker's answer. Does not know
what is published or consumed. Only `rabbit.py` uses this file.
"""

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial

import aio_pika
from aio_pika.abc import AbstractChannel
from aiormq import exceptions

from broker import amqp
from broker.amqp import CONNECT_S
from broker.channels import CLOSE_S, Channel
from broker.errors import BrokerRefused, GaveUp, LinkClosed, LinkError
from broker.invitation import Access

log = logging.getLogger(__name__)

PAUSE_MIN_S, PAUSE_MAX_S = 0.1, 5.0
CANCELS_MAX = 5  # a close waits inside a wait inside a wait; each cancel ends one

REFUSALS = (
    exceptions.ChannelNotFoundEntity,
    exceptions.ChannelAccessRefused,
    exceptions.ChannelLockedResource,
    exceptions.ChannelPreconditionFailed,
)
"""RabbitMQ's answers that close the channel: no such thing, no right, another's alone, or another of that name."""


class Absence:
    """How long RabbitMQ has been out of reach, and when to give up: never, if `give_up_s` is None."""

    def __init__(self, give_up_s: float | None) -> None:
        self._give_up_s = give_up_s
        self._since: float | None = None

    def over(self) -> None:
        """It was reached."""
        self._since = None

    def goes_on(self, trouble: str) -> None:
        """It could not be reached.

        Raises:
            GaveUp: for too long.
        """
        now = asyncio.get_running_loop().time()
        self._since = now if self._since is None else self._since
        if self._give_up_s is not None and now - self._since >= self._give_up_s:
            trouble = trouble.rstrip(".")
            raise GaveUp(f"RabbitMQ was out of reach for {self._give_up_s:g} s and more; gave up: {trouble}.")


class Lane:
    """One connection, opened when first needed and again when it was lost, with one channel for publishing.

    Args:
        access: says how we come in, as of now.
        name: as operators see it.
        heartbeat_s: how often both sides give a sign of life.
        absence: of the RabbitMQ that all lanes share.
    """

    def __init__(self, access: Callable[[], Access], name: str, heartbeat_s: int, absence: Absence) -> None:
        self._access = access
        self._name = name
        self._heartbeat_s = heartbeat_s
        self._absence = absence
        self._turn = asyncio.Lock()
        self._connection: amqp.Connection | None = None
        self._publisher: Channel | None = None
        self._trouble = ""  # why the last attempt failed: said once, however often we try
        self._leaving = False

    async def connection(self) -> amqp.Connection:
        """The open connection, however long RabbitMQ takes to come back; the caller bounds the wait.

        It has let us in before (`rabbit.connect`): a refusal now is taken for an upheaval that passes.

        Raises:
            LinkClosed: the link was closed meanwhile.
            GaveUp: RabbitMQ has been away for longer than it may.
        """
        pauses = backoff_s()
        while True:
            async with self._turn:
                if self._connection is not None and self._connection.alive:
                    return self._connection
                try:
                    return await self.dial()
                except LinkClosed:
                    raise
                except (BrokerRefused, LinkError) as problem:
                    trouble = str(problem)
                if trouble != self._trouble:
                    log.warning("%s: trying again until it works: %s", self._name, trouble)
                self._trouble = trouble
                self._absence.goes_on(trouble)
                await asyncio.sleep(next(pauses))

    async def dial(self) -> amqp.Connection:
        """Connect, in one attempt.

        Raises:
            LinkError: nobody answers.
            LinkClosed: the link was closed meanwhile.
            BrokerRefused: it answers and refuses, or is no RabbitMQ.
        """
        access = self._access()
        connection = await amqp.connect(access, self._name, self._heartbeat_s)
        if self._leaving:  # closed while we were at it
            await connection.close()
            raise LinkClosed("this link was closed.")
        where = f"{access.url.host}:{access.url.port}"
        connection.lost.add_done_callback(partial(self._say_lost, where))
        again = "again " if self._connection else ""
        self._connection, self._trouble = connection, ""
        self._absence.over()
        log.info("%s: connected %sto %s", self._name, again, where)
        return connection

    async def publisher(self) -> Channel:
        """The open channel for publishing, with confirms."""
        connection = await self.connection()
        if self._publisher is None or self._publisher.ended:
            self._publisher = connection.open(confirms=True)
        return self._publisher

    async def close(self) -> None:
        """Close the connection; what is unacked goes back to its queues."""
        self._leaving = True
        if self._connection is not None:
            await self._connection.close()

    def _say_lost(self, where: str, why: asyncio.Future[str]) -> None:
        if not self._leaving:
            log.warning("%s: lost the connection to %s: %s", self._name, where, why.result())


class Asking:
    """A connection of aio-pika's for whatever is asked of the broker: what exists, and what should."""

    def __init__(self, access: Callable[[], Access], name: str, heartbeat_s: int) -> None:
        self._access = access
        self._heartbeat_s = heartbeat_s
        self._name = name
        self._turn = asyncio.Lock()
        self._connection: aio_pika.Connection | None = None

    @asynccontextmanager
    async def channel(self) -> AsyncIterator[AbstractChannel]:
        """A channel for one purpose, closed afterwards: a no closes it anyway.

        Raises:
            LinkError: there is no connection, or it was lost.
        """
        async with self._turn:
            connection = self._connection
            if connection is None or not connection.connected.is_set():
                connection = await self._dial()
        with interruptions():
            async with asyncio.timeout(CONNECT_S):
                channel = connection.channel(publisher_confirms=False)
                await channel.initialize()
        try:
            yield channel
        finally:
            await shut(channel)

    async def _dial(self) -> aio_pika.Connection:
        former, self._connection = self._connection, None
        if former is not None:
            await shut(former)
        access = self._access()
        url = access.url.update_query(heartbeat=str(self._heartbeat_s))
        connection = aio_pika.Connection(
            url, ssl_context=access.tls, client_properties={"connection_name": self._name}
        )
        try:
            with interruptions():
                await connection.connect(timeout=CONNECT_S)
        except BaseException:
            await shut(connection)
            raise
        self._connection = connection
        return connection

    async def close(self) -> None:
        """Close the connection."""
        if self._connection is not None:
            await shut(self._connection)


async def shut(what: AbstractChannel | aio_pika.Connection) -> None:
    """Close within CLOSE_S; what is lost needs no closing, and what does not answer is left to the system."""
    closing = asyncio.ensure_future(what.close())
    try:
        await asyncio.wait({closing}, timeout=CLOSE_S)
    finally:
        for _ in range(CANCELS_MAX):
            if closing.done():
                break
            closing.cancel()
            await asyncio.wait({closing}, timeout=0.1)
    if closing.done() and not closing.cancelled() and closing.exception() is not None:
        log.debug("closing ended with %s", words(closing.exception()))


@contextmanager
def interruptions() -> Iterator[None]:
    """Make one LinkError of all the ways in which aio-pika says that the connection is gone.

    The treacherous one is CancelledError: a connection that got stuck cancels whoever waits on it. It is told from
    a real cancellation by the count of requests to cancel this task. Refusals pass.
    """
    task = asyncio.current_task()
    assert task is not None
    requests = task.cancelling()
    try:
        yield
    except asyncio.CancelledError:
        if task.cancelling() > requests:
            raise
        raise LinkError("the connection got stuck.") from None
    except REFUSALS:
        raise
    except (exceptions.AMQPError, OSError, RuntimeError) as problem:  # TimeoutError and ConnectionError are OSErrors
        raise LinkError(f"the connection was lost: {words(problem)}.") from problem


def words(problem: BaseException | None) -> str:
    """What the broker or the system said, without a full stop."""
    if isinstance(problem, asyncio.CancelledError):
        return "no sign of life for too long"
    said = next((part for part in reversed(getattr(problem, "args", ())) if isinstance(part, str) and part), "")
    return (said or type(problem).__name__).rstrip(".")


def backoff_s() -> Iterator[float]:
    """Seconds to wait between attempts: doubling, and never many parties in step."""
    pause_s = PAUSE_MIN_S
    while True:
        yield pause_s * random.uniform(0.5, 1.0)
        pause_s = min(2 * pause_s, PAUSE_MAX_S)
