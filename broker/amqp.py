"""One connection to RabbitMQ for traffic: channels that publish with confirms and consume.

Knows AMQP 0-9-1 as far as messages need it. Does not know how connections come back (`lanes.py`), nor what is
promised to whoever publishes and consumes (`rabbit.py`). What exists in the broker is declared through aio-pika;
messages are not, because the wire is what Fluffle is for: ARCHITECTURE.md says what the difference is in seconds.
"""

import asyncio
import logging
import ssl
from collections.abc import Iterable
from typing import cast

from pamqp import commands
from pamqp.base import Frame
from pamqp.exceptions import PAMQPException
from pamqp.header import ProtocolHeader
from pamqp.heartbeat import Heartbeat
from yarl import URL

from broker import frames
from broker.channels import CLOSE_S, Channel, Refused
from broker.errors import BrokerRefused, LinkError, WireError
from broker.frames import Inflow, Inlet, Spares
from broker.messages import Buffer

log = logging.getLogger(__name__)

CONNECT_S = 10.0
FRAME_BYTES_MAX = 4 * 1024 * 1024
"""The largest frames we take, if the broker likes them so large; unless it was told to, it stays at 128 KiB."""
CHANNELS_MAX = 2047
SILENCES_MAX = 2.5  # heartbeats that may be missing
CAPABILITIES = {
    "authentication_failure_close": True, "basic.nack": True, "connection.blocked": True,
    "consumer_cancel_notify": True, "publisher_confirms": True,
}  # fmt: skip


async def connect(url: URL, name: str, heartbeat_s: int) -> "Connection":
    """A connection, in one attempt within CONNECT_S.

    Raises:
        LinkError: nobody answers.
        BrokerRefused: it answers and refuses, or is no RabbitMQ.
    """
    where = f"{url.host}:{url.port}"
    assert url.host
    assert url.port
    absent = f"no RabbitMQ answers at {where}: start one with `fluffle broker start`, or check --broker."
    connection = Connection(name)
    try:
        async with asyncio.timeout(CONNECT_S):
            loop = asyncio.get_running_loop()
            await loop.create_connection(lambda: connection, url.host, url.port, ssl=_tls(url))
            await connection.greet(url, heartbeat_s)
    except BaseException as problem:
        connection.abort("it could not be opened")
        if isinstance(problem, ssl.SSLError):
            raise BrokerRefused(
                f"no trusted TLS connection with {where} ({problem.reason}): check --broker."
            ) from None
        if isinstance(problem, Refused):
            raise _unwelcome(problem, url) from None
        if isinstance(problem, WireError):
            raise BrokerRefused(f"what listens at {where} is not RabbitMQ: check --broker.") from None
        if isinstance(problem, LinkError | OSError):  # TimeoutError is one
            raise LinkError(absent) from None
        raise
    return connection


def _tls(url: URL) -> ssl.SSLContext | None:
    if url.scheme != "amqps":
        return None
    given = url.query
    context = ssl.create_default_context(cafile=given.get("cafile"), capath=given.get("capath"))
    if given.get("certfile"):
        context.load_cert_chain(given["certfile"], given.get("keyfile"))
    if given.get("no_verify_ssl", "0") != "0":
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def _unwelcome(refused: Refused, url: URL) -> BrokerRefused:
    where, user = f"{url.host}:{url.port}", url.user or "guest"
    if refused.text.startswith("ACCESS_REFUSED - Login"):
        return BrokerRefused(f"RabbitMQ at {where} refuses the password of user {user}: check the one in --broker.")
    return BrokerRefused(
        f"RabbitMQ at {where} does not let user {user} into vhost {_vhost(url)} ({refused.text}): "
        "check its name in --broker, or give the user permission there."
    )


def _vhost(url: URL) -> str:
    return url.path[1:] or "/"


class Connection(asyncio.BufferedProtocol):
    """An open connection, until `alive` is False; made by `connect`.

    Whoever waits for anything on it when it is lost is told so with LinkError.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.frame_bytes = 4096
        self._numbers = range(0)  # that channels may have; 0 is the connection's own
        self.spares = Spares()
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()  # why
        self._inlet = Inlet(self)
        self._transport: asyncio.Transport | None = None
        self._kept: dict[int, list[Channel]] = {}  # prefetch → channels that nobody uses
        self._outgoing: list[Buffer] = []
        self._channels: dict[int, Channel] = {0: Channel(self, 0)}
        self._now = asyncio.get_running_loop().time
        self._read_at = self._wrote_at = self._now()

    @property
    def alive(self) -> bool:
        """Whether it can still be used."""
        return not self.lost.done()

    async def greet(self, url: URL, heartbeat_s: int) -> None:
        """Say who we are, and agree on sizes.

        Raises:
            Refused: the broker does not let us in.
            WireError: this is no RabbitMQ.
            LinkError: it hung up.
        """
        zero = self._channels[0]
        start = zero.awaited()
        self.write((ProtocolHeader().marshal(),))
        await start
        about = {"product": "Fluffle", "connection_name": self.name, "capabilities": CAPABILITIES}
        secret = f"\0{url.user or 'guest'}\0{url.password or 'guest'}"
        tune = await zero.ask(commands.Connection.StartOk(about, "PLAIN", secret))  # type: ignore[arg-type]  # its FieldTable is invariant
        if not isinstance(tune, commands.Connection.Tune):
            raise WireError("RabbitMQ's greeting is not AMQP 0-9-1.")
        self.frame_bytes = min(tune.frame_max or FRAME_BYTES_MAX, FRAME_BYTES_MAX)
        channels = min(tune.channel_max or CHANNELS_MAX, CHANNELS_MAX)
        self._numbers = range(1, channels + 1)
        zero.send(commands.Connection.TuneOk(channels, self.frame_bytes, heartbeat_s))
        await zero.ask(commands.Connection.Open(_vhost(url)))
        if heartbeat_s:
            self._keep_alive(heartbeat_s)

    def open(self, *, confirms: bool = False, prefetch: int = 0) -> "Channel":
        """A channel, one that was kept or one asked for; whether it was given, whoever uses it first learns.

        Raises:
            LinkError: the connection has no room for another channel.
        """
        while not confirms and (kept := self._kept.get(prefetch)):
            channel = kept.pop()
            if channel.ended is None:
                return channel
        number = next((n for n in self._numbers if n not in self._channels), None)
        if number is None:
            raise LinkError(f"{self.name} has {len(self._numbers)} channels already, as many as RabbitMQ grants it.")
        channel = self._channels[number] = Channel(self, number)
        wishes: list[Frame] = [commands.Channel.Open()]
        if confirms:
            wishes.append(commands.Confirm.Select())
        if prefetch:
            wishes.append(commands.Basic.Qos(prefetch_count=prefetch))
        channel.begin(wishes)
        return channel

    def keep(self, channel: "Channel", *, prefetch: int) -> None:
        """A channel that is as good as new, for the next one who asks: opening one is work for the broker."""
        self._kept.setdefault(prefetch, []).append(channel)

    async def close(self) -> None:
        """Close within CLOSE_S; unacked deliveries go back to their queues."""
        if self.alive:
            self._channels[0].send(commands.Connection.Close(200, "bye", 0, 0))
            await asyncio.wait({self.lost}, timeout=CLOSE_S)
        self.abort("this side closed it")

    def abort(self, why: str) -> None:
        """Be done with it at once."""
        self._end(why)
        if self._transport is not None:
            self._transport.abort()

    def write(self, pieces: Iterable[Buffer]) -> None:
        """Send these bytes, one after another; they must not change until the broker has confirmed them."""
        if not self._outgoing:  # what is written in one turn of the loop leaves in one call of the system
            asyncio.get_running_loop().call_soon(self._flush)
        self._outgoing.extend(pieces)

    def _flush(self) -> None:
        pieces, self._outgoing = self._outgoing, []
        if self._transport is not None and self.alive:
            self._wrote_at = self._now()
            self._transport.writelines(pieces)

    def forget(self, number: int) -> None:
        """A channel is closed on both sides."""
        self._channels.pop(number, None)

    def _keep_alive(self, heartbeat_s: int) -> None:
        if not self.alive:
            return
        now = self._now()
        if now - self._read_at > SILENCES_MAX * heartbeat_s:
            self.abort("no sign of life for too long")
            return
        if now - self._wrote_at >= heartbeat_s / 3:
            self.write((Heartbeat().marshal(),))
        asyncio.get_running_loop().call_later(heartbeat_s / 3, self._keep_alive, heartbeat_s)

    def _end(self, why: str) -> None:
        if self.alive:
            self.lost.set_result(why)
            for channel in [*self._channels.values()]:
                channel.end(LinkError(f"the connection was lost: {why}."))

    # -- what asyncio calls -------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The socket is open."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's says so without inheriting

    def connection_lost(self, exc: Exception | None) -> None:
        """The socket is closed."""
        self._end(str(exc) if exc else "the broker hung up")

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 - asyncio's guess; we know better
        """Where to receive into."""
        return self._inlet.room()

    def buffer_updated(self, nbytes: int) -> None:
        """So much has been received."""
        self._read_at = self._now()
        try:
            self._inlet.take(nbytes)
        except (WireError, PAMQPException, ValueError, IndexError, KeyError) as problem:
            log.debug("%s: %r", self.name, problem)
            for channel in self._channels.values():
                channel.end(problem if isinstance(problem, WireError) else WireError("what comes is not AMQP."))
            self.abort("what comes is not AMQP")

    # -- what comes ---------------------------------------------------------------------------------------------

    def take_frame(self, kind: int, channel: int, payload: bytes) -> None:
        """See `frames.Sink`."""
        to = self._channels.get(channel)
        if to is None or kind == frames.HEARTBEAT:
            return
        if kind == frames.METHOD:
            to.take_method(payload)
        else:
            to.take_header(payload)

    def inflow(self, channel: int) -> Inflow | None:
        """See `frames.Sink`."""
        to = self._channels.get(channel)
        return to.inflow if to else None

    def landed(self, channel: int) -> None:
        """See `frames.Sink`."""
        if to := self._channels.get(channel):
            to.landed()
