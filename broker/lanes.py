"""Connections to RabbitMQ that come back, and what it means when aio-pika raises.

Knows how to connect, how a lost connection looks, and which errors are the broker's answer. Does not know what is
published or consumed. Only `rabbit.py` uses this file, and no third one knows aio-pika.
"""

import asyncio
import logging
import random
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import aio_pika
from aio_pika.abc import AbstractChannel
from aiormq.exceptions import (
    AMQPError,
    AuthenticationError,
    ChannelAccessRefused,
    ChannelNotFoundEntity,
    ChannelPreconditionFailed,
    ProbableAuthenticationError,
    ProtocolSyntaxError,
)
from yarl import URL

from broker.errors import BrokerRefused, LinkClosed, LinkError, UsageError

log = logging.getLogger(__name__)

CONNECT_S = 10.0
CLOSE_S = 5.0
PAUSE_MIN_S, PAUSE_MAX_S = 0.1, 5.0
CANCELS_MAX = 5  # a close waits inside a wait inside a wait; each cancel ends one
PORTS = {"amqp": 5672, "amqps": 5671}

REFUSALS = (ChannelNotFoundEntity, ChannelAccessRefused, ChannelPreconditionFailed)
"""RabbitMQ's answers that close the channel: no such thing, no right to it, or another thing of that name."""


class Connector:
    """One connection, opened when first needed and again when it was lost, with one channel for publishing."""

    def __init__(self, url: URL, name: str, heartbeat_s: int) -> None:
        self._url = url.update_query(heartbeat=str(heartbeat_s))
        self._where = f"{url.host}:{url.port}"
        self._name = name
        self._turn = asyncio.Lock()
        self._connection: aio_pika.Connection | None = None
        self._publisher: AbstractChannel | None = None
        self._trouble = ""  # why the last attempt failed: said once, however often we try
        self._leaving = False

    async def connection(self) -> aio_pika.Connection:
        """The open connection, however long RabbitMQ takes to come back; the caller bounds the wait.

        Raises:
            BrokerRefused: it has never let us in. A refusal later is taken for an upheaval that passes.
        """
        pauses = backoff_s()
        while True:
            async with self._turn:
                if self._connection is not None and self._connection.connected.is_set():
                    return self._connection
                try:
                    return await self.dial()
                except BrokerRefused as problem:
                    if self._connection is None:
                        raise
                    trouble = str(problem)
                except LinkClosed:
                    raise
                except LinkError as problem:
                    trouble = str(problem)
                if trouble != self._trouble:
                    log.warning("%s: trying again until it works: %s", self._name, trouble)
                self._trouble = trouble
                await asyncio.sleep(next(pauses))

    async def dial(self) -> aio_pika.Connection:
        """Connect, in one attempt.

        Raises:
            LinkError: nobody answers.
            LinkClosed: the link was closed meanwhile.
            BrokerRefused: it answers and refuses, or is no RabbitMQ.
        """
        connection = aio_pika.Connection(self._url, client_properties={"connection_name": self._name})
        try:
            with _dialling(self._url):
                await connection.connect(timeout=CONNECT_S)
        except BaseException:
            await shut(connection)
            raise
        if self._leaving:  # closed while we were at it
            await shut(connection)
            raise LinkClosed("this link was closed.")
        connection.close_callbacks.add(self._say_lost)
        former, self._connection, self._trouble = self._connection, connection, ""
        log.info("%s: connected %sto %s", self._name, "again " if former else "", self._where)
        if former is not None:
            await shut(former)
        return connection

    async def publisher(self) -> AbstractChannel:
        """The open channel for publishing, confirmed, that raises for what it cannot route."""
        connection = await self.connection()
        async with self._turn:
            if self._publisher is None or self._publisher.is_closed:
                self._publisher = await open_channel(connection, confirms=True)
            return self._publisher

    @asynccontextmanager
    async def channel(self, *, confirms: bool) -> AsyncIterator[AbstractChannel]:
        """A channel for one purpose, closed afterwards."""
        channel = await open_channel(await self.connection(), confirms=confirms)
        try:
            yield channel
        finally:
            await shut(channel)

    async def close(self) -> None:
        """Close the connection; what is unacked goes back to its queues."""
        self._leaving = True
        if self._connection is not None:
            await shut(self._connection)

    def _say_lost(self, _sender: object, why: BaseException | None) -> None:
        if not self._leaving:
            log.warning("%s: lost the connection to %s: %s", self._name, self._where, words(why))


async def open_channel(connection: aio_pika.Connection, *, confirms: bool) -> AbstractChannel:
    """A channel on an open connection; one with `confirms` also raises for what cannot be routed.

    Raises:
        LinkError: the connection was lost, or the broker blocks it for want of memory or disk.
    """
    with interruptions():
        async with asyncio.timeout(CONNECT_S):
            channel = connection.channel(publisher_confirms=confirms, on_return_raises=confirms)
            await channel.initialize()
            return channel


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
    except (AMQPError, OSError, RuntimeError) as problem:  # TimeoutError and ConnectionError are OSErrors
        raise LinkError(f"the connection was lost: {words(problem)}.") from problem


@contextmanager
def _dialling(url: URL) -> Iterator[None]:
    """Make a sentence, without the password, of whatever ends the attempt to connect."""
    where = f"{url.host}:{url.port}"
    try:
        with interruptions():
            yield
    except LinkError as failed:
        problem = failed.__cause__
        seen = problem.__cause__ if problem is not None else None
        if isinstance(problem, ProbableAuthenticationError | AuthenticationError):
            raise BrokerRefused(
                f"RabbitMQ at {where} refuses the password of user {url.user or 'guest'}: check the one in --broker."
            ) from None
        if isinstance(problem, ProtocolSyntaxError) and "Connection.OpenOk" in str(problem):
            vhost = url.path[1:] or "/"
            raise BrokerRefused(
                f"RabbitMQ at {where} does not let user {url.user or 'guest'} into vhost {vhost}: "
                "check its name in --broker, or give the user permission there."
            ) from None
        if isinstance(seen, ssl.SSLError):
            raise BrokerRefused(f"no trusted TLS connection with {where} ({seen.reason}): check --broker.") from None
        babble = isinstance(seen, asyncio.IncompleteReadError) and bool(seen.partial)
        if babble or isinstance(problem, ProtocolSyntaxError):
            raise BrokerRefused(f"what listens at {where} is not RabbitMQ: check --broker.") from None
        raise LinkError(
            f"no RabbitMQ answers at {where}: start one with `fluffle broker start`, or check --broker."
        ) from None


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


def checked(url: str) -> URL:
    """The broker's URL with its port.

    Raises:
        UsageError: it is none; the sentence does not repeat it, because it may hold a password.
    """
    try:
        parsed = URL(url)
        usable = parsed.scheme in PORTS and bool(parsed.host)
    except ValueError:
        usable = False
    if not usable:
        raise UsageError("the broker's URL must look like amqp://USER:PASSWORD@HOST:PORT/VHOST: check --broker.")
    return parsed if parsed.port else parsed.with_port(PORTS[parsed.scheme])
