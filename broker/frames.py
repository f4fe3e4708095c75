"""AMQP's frames: how a message becomes some, and how some become a message, with hardly a copy.

Pure. Knows the layout of frames, and the few methods that every message needs. Does not know connections, confirms or
what a message means; methods that are rare are packed and read by pamqp.

On the way out a body's pieces stay where they are: only what stands between them is made. On the way in the bulk of a
frame is received right into the message that it belongs to.
"""

import struct
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import pamqp.encode

from broker.errors import WireError
from broker.messages import Buffer, Part
from broker.parts import Aim

METHOD, HEADER, BODY, HEARTBEAT = KINDS = (1, 2, 3, 8)
END = 0xCE
AROUND_BYTES = 8  # a frame's head and end
DELIVER, RETURN, ACK, NACK = (60, 60), (60, 50), (60, 80), (60, 120)
SCRATCH_BYTES = 256 * 1024  # a method must fit here, and what we say of our own messages
GULP_BYTES = 64 * 1024
AHEAD_BYTES = 16 * 1024  # while a body is under way: what is read with the end of a frame is copied, so not much is
DIRECT_BYTES = 32 * 1024
SPARES_MAX = 16

_HEAD = struct.Struct(">BHI")
_METHOD = struct.Struct(">HH")
_CONTENT = struct.Struct(">HHQ")
_PUBLISH = struct.Struct(">HHH")
_ACK = struct.Struct(">BHIHHQBB")
_FLAGS = struct.Struct(">H")
_HEADERS, _DELIVERY_MODE, _MESSAGE_ID, _USER_ID = 1 << 13, 1 << 12, 1 << 7, 1 << 4
_BEFORE_USER_ID = (
    (15, -1), (14, -1), (13, -4), (12, 1), (11, 1), (10, -1), (9, -1), (8, -1), (7, -1), (6, 8), (5, -1),
)  # fmt: skip
"""Properties that stand before it, by their flag's bit: how many bytes each has, or (negative) how many say that."""


class Deliver(NamedTuple):
    """What precedes a message that comes: to which consumer, under which tag, and how it was published."""

    consumer: str
    tag: int
    key: str


class Settled(NamedTuple):
    """The broker's word on publishes: `tag`, and with `multiple` all before it, are `taken` or refused."""

    tag: int
    multiple: bool
    taken: bool


class Spares:
    """Memory of large bodies that nobody needs any more: new memory would have to be found and emptied first."""

    def __init__(self) -> None:
        self._spares: list[bytearray] = []

    def take(self, size: int) -> bytearray:
        """Memory of this size, with anything in it."""
        if self._spares and len(self._spares[-1]) == size:
            return self._spares.pop()
        return bytearray(size)

    def give(self, body: bytearray) -> None:
        """Nobody looks at this body any more. Only the largest are kept: a payload's last part is smaller."""
        size = len(self._spares[-1]) if self._spares else DIRECT_BYTES
        if len(body) > size:
            self._spares.clear()
        if len(body) >= size and len(self._spares) < SPARES_MAX:
            self._spares.append(body)


class Inflow:
    """A message on its way in. Of one that is larger than `keep_max`, the rest is counted and let go.

    Attributes:
        size: of its body, known when its header has come; `seen` is how much of that has come.
        head: its header's payload.
        body: where it lands; empty if it was aimed.
        part: what it is, if it was aimed: its data lands elsewhere.
    """

    def __init__(self, keep_max: int, spares: Spares | None = None, *, aim: Aim | None = None) -> None:
        self.size = -1
        self.seen = 0
        self.head = b""
        self.body = bytearray()
        self.part: Part | None = None
        self._aim = aim
        self._from = 0  # first byte of the body that `_place` holds
        self._keep_max = keep_max
        self._spares = spares or Spares()
        self._place = memoryview(bytearray())

    def begin(self, head: bytes) -> None:
        """The header has come."""
        if len(head) < _CONTENT.size:
            raise WireError("RabbitMQ sent a header that is too short.")
        self.head, self.size = head, _CONTENT.unpack_from(head)[2]
        if self._aim is None or self.size < DIRECT_BYTES:
            self._land_here()

    def _land_here(self) -> None:
        self._aim = None
        self.body = self._spares.take(min(self.size, self._keep_max))
        self._place = memoryview(self.body)

    def take(self, piece: memoryview) -> None:
        """More of the body."""
        if self._aim is not None:
            aimed, self._aim = self._aim(piece, self.size), None
            if aimed is None:
                self._land_here()
            else:
                self._from, self._place, self.part = aimed
        skip = max(self._from - self.seen, 0)
        place = self.place(len(piece) - skip)
        place[:] = piece[skip : skip + len(place)]
        self.seen += len(piece)

    def place(self, count: int) -> memoryview:
        """Where the next `count` bytes go; shorter, or empty, where they are not kept."""
        at = max(self.seen - self._from, 0)
        return self._place[at : at + max(count, 0)]

    def divert(self) -> None:
        """Nobody waits for it any more: what is still to come goes nowhere."""
        self._aim, self._place = None, memoryview(bytearray())

    @property
    def whole(self) -> bool:
        """Whether all of it has come."""
        return self.seen >= self.size >= 0


class Sink(Protocol):
    """What becomes of frames."""

    def take_frame(self, kind: int, channel: int, payload: bytes) -> None:
        """A whole frame that is no part of a body."""

    def inflow(self, channel: int) -> Inflow | None:
        """The message under way on a channel, once its header has come."""

    def landed(self, channel: int) -> None:
        """The message under way may be whole."""


class Inlet:
    """A stream of bytes on its way into frames. `room()` says where the next ones go, `take(n)` that n are there.

    `take` raises WireError when what comes is not AMQP.
    """

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._scratch = memoryview(bytearray(SCRATCH_BYTES))
        self._filled = 0
        self._channel = 0
        self._rest = 0  # bytes of the present body frame that have not come
        self._inflow: Inflow | None = None
        self._direct = False

    def room(self) -> memoryview:
        """Where to receive into."""
        if self._rest >= DIRECT_BYTES and not self._filled and self._inflow is not None:
            place = self._inflow.place(self._rest)
            if place:
                self._direct = True
                return place
        self._direct = False
        under_way = self._inflow is not None and not self._inflow.whole
        return self._scratch[self._filled : self._filled + (AHEAD_BYTES if under_way else GULP_BYTES)]

    def take(self, count: int) -> None:
        """`count` bytes are where `room()` said."""
        if self._direct:
            assert self._inflow is not None
            self._inflow.seen += count
            self._rest -= count
            return
        self._filled += count
        at = 0
        while (after := self._step(at)) is not None:
            at = after
        left = self._filled - at
        if left and at:
            self._scratch[:left] = self._scratch[at : self._filled]
        self._filled = left

    def _step(self, at: int) -> int | None:
        """Use up what lies at `at`; where to go on, or None when more must come first."""
        have = self._filled - at
        if not have:
            return None
        if self._rest:
            piece = self._scratch[at : at + min(self._rest, have)]
            if self._inflow is not None:
                self._inflow.take(piece)
            self._rest -= len(piece)
            return at + len(piece)
        if self._channel:  # a body frame's end
            self._end(at)
            channel, self._channel = self._channel, 0
            self._sink.landed(channel)
            return at + 1
        return self._begin(at)

    def _begin(self, at: int) -> int | None:
        """A frame begins here: use it up if it is whole, and of a body's its head."""
        if self._scratch[at] not in KINDS:
            raise WireError("what comes is not AMQP.")
        if self._filled - at < _HEAD.size:
            return None
        head: tuple[int, int, int] = _HEAD.unpack_from(self._scratch, at)
        kind, channel, size = head
        begins, stop = at + _HEAD.size, at + _HEAD.size + size
        if kind == BODY:
            self._channel, self._rest, self._inflow = channel, size, self._sink.inflow(channel)
            return begins
        if size > SCRATCH_BYTES - AROUND_BYTES and self._filled >= (after := begins + _CONTENT.size):
            if kind != HEADER:
                raise WireError("a frame is too large.")
            # its sender says more beside the body than anybody wants: that is let go
            self._sink.take_frame(kind, channel, bytes(self._scratch[begins:after]) + bytes(_FLAGS.size))
            self._channel, self._rest, self._inflow = channel, stop - after, None
            return after
        if self._filled <= stop:
            return None
        self._end(stop)
        self._sink.take_frame(kind, channel, bytes(self._scratch[begins:stop]))
        if kind == HEADER:
            self._inflow = self._sink.inflow(channel)
        return stop + 1

    def _end(self, at: int) -> None:
        if self._scratch[at] != END:
            raise WireError("a frame does not end where it should.")


# -- out ----------------------------------------------------------------------------------------------------


def method(channel: int, payload: bytes) -> bytes:
    """A method's frame."""
    return b"%b%b\xce" % (_HEAD.pack(METHOD, channel, len(payload)), payload)


def publish(exchange: str, key: str) -> bytes:
    """Basic.Publish: mandatory, so that what cannot be routed comes back."""
    return b"%b%b%b\x01" % (_PUBLISH.pack(60, 40, 0), _short(exchange), _short(key))


@lru_cache(maxsize=64)  # the parts of a model go to the same thousand names
def properties(
    headers: tuple[tuple[str, str], ...], others: tuple[str, ...], *, persistent: bool, signed: bool = False
) -> bytes:
    """A message's properties but its id and, if it is `signed`, its user, which `header` adds.

    RabbitMQ routes by `others`, further keys, too, and takes them off.
    """
    table: dict[str, Any] = dict(headers)
    if others:
        table["BCC"] = list(others)
    flags = _MESSAGE_ID | _DELIVERY_MODE | (_HEADERS if table else 0) | (_USER_ID if signed else 0)
    packed = pamqp.encode.field_table(table) if table else b""
    return b"%b%b%b" % (_FLAGS.pack(flags), packed, b"\x02" if persistent else b"\x01")


def header(channel: int, size: int, known: bytes, message_id: str, *, user: str = "") -> bytes:
    """The frame that announces a body of `size` bytes; `user` as `known` says."""
    payload = b"%b%b%b%b" % (_CONTENT.pack(60, 0, size), known, _short(message_id), _short(user) if user else b"")
    return b"%b%b\xce" % (_HEAD.pack(HEADER, channel, len(payload)), payload)


def body(channel: int, pieces: Iterable[Buffer], size: int, frame_bytes: int) -> Iterator[Buffer]:
    """The body's frames, in pieces to be sent one after another; what is large is looked at, not copied."""
    most = frame_bytes - AROUND_BYTES
    left = room = 0
    for piece in pieces:
        whole, at = memoryview(piece), 0
        while at < len(whole):
            if not room:
                room = min(size, most)
                size -= room
                yield (b"\xce" if left else b"") + _HEAD.pack(BODY, channel, room)
                left = 1
            part = whole[at : at + room]
            room -= len(part)
            at += len(part)
            yield part
    if left:
        yield b"\xce"


def ack(channel: int, tag: int) -> bytes:
    """Basic.Ack, as a frame."""
    return _ACK.pack(METHOD, channel, 13, *ACK, tag, 0, END)


def _short(text: str) -> bytes:
    encoded = text.encode()
    return b"%b%b" % (bytes((len(encoded),)), encoded)


# -- in -----------------------------------------------------------------------------------------------------


def which(payload: bytes) -> tuple[int, int]:
    """Class and number of a method."""
    if len(payload) < _METHOD.size:
        raise WireError("RabbitMQ sent a method that is too short.")
    found: tuple[int, int] = _METHOD.unpack_from(payload)
    return found


def deliver(payload: bytes) -> Deliver:
    """Basic.Deliver."""
    consumer, at = _text(payload, 4)
    tag = int.from_bytes(payload[at : at + 8], "big")
    _, key_at = _text(payload, at + 9)  # behind the exchange; before that stands whether it came before
    return Deliver(consumer, tag, _text(payload, key_at)[0])


def user(head: bytes) -> str:
    """Whom the broker vouches for, by a message's header; empty where it is not said, or not understood."""
    at = _CONTENT.size + _FLAGS.size
    try:
        (flags,) = _FLAGS.unpack_from(head, _CONTENT.size)
        if not flags & _USER_ID or flags & 1:  # further flags, which AMQP 0-9-1 has no use for
            return ""
        for bit, size in _BEFORE_USER_ID:
            if flags & 1 << bit:
                at += size if size > 0 else int.from_bytes(head[at : at - size], "big") - size
        return _text(head, at)[0]
    except (struct.error, IndexError, UnicodeDecodeError):
        return ""


def settled(payload: bytes) -> Settled:
    """Basic.Ack or Basic.Nack of publishes."""
    return Settled(int.from_bytes(payload[4:12], "big"), payload[12] & 1 == 1, which(payload) == ACK)


def _text(payload: bytes, at: int) -> tuple[str, int]:
    stop = at + 1 + payload[at]
    # a routing key may be any bytes: what cannot be read must not look like a broken connection, time and again
    return payload[at + 1 : stop].decode(errors="backslashreplace"), stop
