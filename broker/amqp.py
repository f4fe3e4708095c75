"""One connection to RabbitMQ for traffic: channels that publish with confirms and consume.

Knows AMQP 0-9-1 as far as messages need it. Does not know how connections come back (`lanes.py`), nor what is
promised to whoever publishes and consumes (`rabbit.py`). What exists in the broker is declared through aio-pika;
messages are not, because the wire is what Fluffle is for: ARCHITECTURE.md says what the difference is in seconds.
"""

import asyncio
import logging
import ssl
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import cast

from pamqp import commands
from pamqp.base import Frame
from pamqp.exceptions import PAMQPException
from pamqp.header import ProtocolHeader
from pamqp.heartbeat import Heartbeat

from broker import frames
from broker.channels import CLOSE_S, Channel, Refused
from broker.errors import BrokerRefused, LinkError, WireError
from broker.frames import Inflow, Inlet, Spares
from broker.invitation import Access
from broker.messages import Buffer

log = logging.getLogger(__name__)

CONNECT_S = 10.0
FRAME_BYTES_MIN, FRAME_BYTES_MAX = 4096, 4 * 1024 * 1024
"""Of frames: the least that AMQP knows; and the largest we take, if the broker likes them so large, which stays at
128 KiB unless it was told to."""
CHANNELS_MAX = 2047
SILENCES_MAX = 2.5  # heartbeats that may be missing
CAPABILITIES = {
    "authentication_failure_close": True, "basic.nack": True, "connection.blocked": True,
    "consumer_cancel_notify": True, "publisher_confirms": True,
}  # fmt: skip


async def connect(access: Access, name: str, heartbeat_s: int) -> "Connection":
    """A connection, in one attempt within CONNECT_S.

    Raises:
        LinkError: nobody answers.
        BrokerRefused: it answers and refuses, or is no RabbitMQ.
    """
    url, connection = access.url, Connection(name, access.user if access.vouched else "")
    assert url.host
    assert url.port
    try:
        async with asyncio.timeout(CONNECT_S):
            loop = asyncio.get_running_loop()
            await loop.create_connection(lambda: connection, url.host, url.port, ssl=access.tls)
            await connection.greet(access, heartbeat_s)
    except BaseException as problem:
        connection.abort("it could not be opened")
        # With TLS 1.3 whoever connects takes the handshake for done before its certificate has been looked at.
        told = connection.broken if isinstance(connection.broken, ssl.SSLError) else problem
        if unwelcome := _unwelcome(told, access):
            raise unwelcome from None
        raise
    return connection


def _unwelcome(problem: BaseException | None, access: Access) -> BrokerRefused | LinkError | None:
    """Why there is no connection, in a sentence; None where that is not for us to say."""
    where, user, vhost = f"{access.url.host}:{access.url.port}", access.user, _vhost(access)
    check = "ask whoever runs the federation if your invitation still holds" if access.vouched else "check --broker"
    match problem:
        case ssl.SSLError():
            why = problem.reason
            if isinstance(problem, ssl.SSLCertVerificationError):
                why += f": {problem.verify_message}; this machine's clock says {datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
            return BrokerRefused(f"no trusted TLS connection with {where} ({why}): {check}.")
        case Refused() if problem.text.startswith("ACCESS_REFUSED - Login"):
            what = "does not know" if access.vouched else "refuses the password of user"
            return BrokerRefused(f"RabbitMQ at {where} {what} {user}: {check}.")
        case Refused():
            return BrokerRefused(
                f"RabbitMQ at {where} does not let user {user} into vhost {vhost} ({problem.text}): {check}, or give "
                "the user permission there."
            )
        case WireError():
            return BrokerRefused(f"what listens at {where} is not RabbitMQ: {check}.")
        case LinkError() | OSError() | UnicodeError():  # TimeoutError is the second; the third: of a host like a..b
            start = "check the network" if access.vouched else "start one with `fluffle broker start`"
            return LinkError(f"no RabbitMQ answers at {where}: {start}, or {check}.")
    return None


def _vhost(access: Access) -> str:
    return access.url.path[1:] or "/"


class Connection(asyncio.BufferedProtocol):
    """An open connection, until `alive` is False; made by `connect`.

    Whoever waits for anything on it when it is lost is told so with LinkError.
    """

    def __init__(self, name: str, user: str = "") -> None:
        self.name = name
        self.user = user  # whom the broker vouches for; nobody, if empty
        self.broken: Exception | None = None  # how the transport ended, if not well
        self.frame_bytes = FRAME_BYTES_MIN
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

    async def greet(self, access: Access, heartbeat_s: int) -> None:
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
        login = ("PLAIN", f"\0{access.user}\0{access.url.password or 'guest'}")
        if access.url.query.get("auth") == "EXTERNAL":
            login = ("EXTERNAL", "")
        tune = await zero.ask(commands.Connection.StartOk(about, *login))  # type: ignore[arg-type]  # its FieldTable is invariant
        if not isinstance(tune, commands.Connection.Tune) or 0 < (tune.frame_max or 0) < FRAME_BYTES_MIN:
            raise WireError("RabbitMQ's greeting is not AMQP 0-9-1.")
        self.frame_bytes = min(tune.frame_max or FRAME_BYTES_MAX, FRAME_BYTES_MAX)
        channels = min(tune.channel_max or CHANNELS_MAX, CHANNELS_MAX)
        self._numbers = range(1, channels + 1)
        zero.send(commands.Connection.TuneOk(channels, self.frame_bytes, heartbeat_s))
        await zero.ask(commands.Connection.Open(_vhost(access)))
        if heartbeat_s:
            self._keep_alive(heartbeat_s)

    def open(self, *, confirms: bool = False, prefetch: int = 0) -> "Channel":
        """A channel, one that was kept or one asked for; whether it was given, whoever uses it first learns.

        Raises:
            LinkError: the connection was lost, or has no room for another channel.
        """
        if not self.alive:  # since its user has it: nobody would answer
            raise LinkError(f"the connection was lost: {self.lost.result()}.")
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
        self.broken = exc
        self._end(str(exc) if exc else "the broker hung up")

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 - asyncio's guess; we know better
        """Where to receive into."""
        return self._inlet.room()

    def buffer_updated(self, nbytes: int) -> None:
        """So much has been received."""
        self._read_at = self._now()
        try:
            self._inlet.take(nbytes)
        except (WireError, PAMQPException, ValueError, LookupError, RecursionError) as problem:
            log.debug("%s: %r", self.name, problem)
            if not self._numbers:  # while we greet: it is no RabbitMQ; later it is an upheaval like any
                self._channels[0].end(problem if isinstance(problem, WireError) else WireError("it is not AMQP."))
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
