"""AMQP's frames, cut and read: whatever way the bytes come, the same messages come out."""

import itertools
import struct
from collections.abc import Iterable, Iterator
from datetime import UTC
from typing import Any

import pamqp.frame
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pamqp import commands
from pamqp.header import ContentHeader
from pamqp.heartbeat import Heartbeat

from broker import frames
from broker.errors import WireError
from broker.frames import DIRECT_BYTES, HEADER, METHOD, SCRATCH_BYTES, Inflow, Inlet
from broker.messages import (
    PART_BYTES_MIN,
    Attempt,
    Buffer,
    Closed,
    Part,
    Payload,
    decode,
    encode,
    encode_part,
)
from broker.parts import Aim, Aimed, Assembly, split
from broker.tensors import TensorSpec

KEEP_MAX = 3 * SCRATCH_BYTES


class Reader:
    """Takes what an inlet finds: methods by channel, and the bodies that landed."""

    def __init__(self, aim: Aim | None = None) -> None:
        self.methods: list[tuple[int, bytes]] = []
        self.parts: list[Part] = []
        self._aim = aim
        self.bodies: list[tuple[int, bytes]] = []
        self._inflows: dict[int, Inflow] = {}

    def take_frame(self, kind: int, channel: int, payload: bytes) -> None:
        if kind == METHOD:
            self.methods.append((channel, payload))
        elif kind == HEADER:
            self._inflows[channel] = Inflow(KEEP_MAX, aim=self._aim)
            self._inflows[channel].begin(payload)
            self.landed(channel)

    def inflow(self, channel: int) -> Inflow | None:
        return self._inflows.get(channel)

    def landed(self, channel: int) -> None:
        inflow = self._inflows.get(channel)
        if inflow is not None and inflow.whole:
            del self._inflows[channel]
            if inflow.part is None:
                self.bodies.append((channel, bytes(inflow.body)))
            else:
                self.parts.append(inflow.part)

    def divert(self) -> None:
        for inflow in self._inflows.values():
            inflow.divert()


def read(stream: bytes, sizes: Iterable[int], reader: Reader | None = None) -> Reader:
    """What an inlet makes of a stream that comes in pieces of at most these sizes, over and over."""
    reader = reader or Reader()
    inlet, at = Inlet(reader), 0
    for size in itertools.cycle(sizes):
        if at == len(stream):
            return reader
        room = inlet.room()
        piece = stream[at : at + min(size, len(room))]
        room[: len(piece)] = piece
        inlet.take(len(piece))
        at += len(piece)
    raise AssertionError("no sizes")


def content(channel: int, pieces: tuple[Buffer, ...], frame_bytes: int) -> list[bytes]:
    """A message's frames but its method, each whole."""
    size = sum(map(len, pieces))
    head = frames.header(channel, size, frames.properties((), (), persistent=False), "id")
    body = b"".join(frames.body(channel, pieces, size, frame_bytes))
    return [head, *_frames_of(body)]


def _frames_of(stream: bytes) -> Iterator[bytes]:
    at = 0
    while at < len(stream):
        stop = at + 8 + int.from_bytes(stream[at + 3 : at + 7], "big")
        yield stream[at:stop]
        at = stop


def some(size: int, seed: int) -> bytes:
    """Bytes that differ from place to place."""
    return (bytes(range(251)) * (size // 251 + 1))[seed % 200 :][:size].ljust(size, b"!")


def payload_of(name: str, size: int) -> Payload:
    return Payload(name, PART_BYTES_MIN, (TensorSpec("w", "uint8", (size,)),))


SIZES = st.integers(0, 2000) | st.integers(DIRECT_BYTES - 9, 3 * DIRECT_BYTES)


@given(
    bodies=st.lists(st.lists(SIZES, max_size=3), min_size=1, max_size=4),
    frame_bytes=st.sampled_from([4096, 131_072, 1_114_112]),
    steps=st.lists(st.integers(1, 70_000), min_size=1, max_size=5),
)
def test_messages_come_out_as_they_went_in_however_the_bytes_come(
    bodies: list[list[int]], frame_bytes: int, steps: list[int]
) -> None:
    sent = [tuple(some(size, n) for size in sizes) for n, sizes in enumerate(bodies)]
    alive = frames.method(9, b"\0\x3c\0\x50")
    streams = [[alive, *content(n + 1, pieces, frame_bytes)] for n, pieces in enumerate(sent)]
    # channels take turns, frame by frame, as a busy broker's do
    mixed = b"".join(frame for row in itertools.zip_longest(*streams, fillvalue=b"") for frame in row)
    found = read(mixed, steps if max(steps) > 500 else [*steps, 4096])
    assert sorted(found.bodies) == [(n + 1, b"".join(pieces)) for n, pieces in enumerate(sent)]
    assert found.methods == [(9, b"\0\x3c\0\x50")] * len(sent)


@given(
    lengths=st.lists(st.integers(1, 3 * PART_BYTES_MIN), min_size=1, max_size=3),
    frame_bytes=st.sampled_from([4096, 131_072, 1_114_112]),
    steps=st.lists(st.integers(500, 400_000), min_size=1, max_size=4),
)
@settings(deadline=None)
def test_parts_land_in_their_place_however_the_bytes_come(
    lengths: list[int], frame_bytes: int, steps: list[int]
) -> None:
    sent = [some(length, n) for n, length in enumerate(lengths)]
    payloads = [payload_of(f"p{n}", size) for n, size in enumerate(lengths)]
    awaited = [Assembly(payload) for payload in payloads]
    small = encode(Closed(Attempt("run", 1, 1), "x" * 4000))
    streams = []
    for n, payload in enumerate(payloads, 1):
        bodies = [encode_part(part) for part in split(payload, memoryview(sent[n - 1]))]
        streams.append([frame for body in (*bodies, (small,)) for frame in content(n, body, frame_bytes)])
    mixed = b"".join(frame for row in itertools.zip_longest(*streams, fillvalue=b"") for frame in row)

    def aim(begins: memoryview, size: int) -> Aimed | None:
        return next((aimed for each in awaited if (aimed := each.aim(begins, size))), None)

    found = read(mixed, steps, Reader(aim))
    assert [body for _, body in found.bodies if body == small] == [small] * len(sent)
    others = [decode(body) for _, body in found.bodies if body != small]
    for part in [*found.parts, *others]:
        assert isinstance(part, Part)
        for assembly in awaited:
            assembly.add(part)
    assert [bytes(assembly.data) for assembly in awaited] == sent
    assert all(assembly.complete for assembly in awaited)


def test_what_is_diverted_writes_nowhere_any_more() -> None:
    data = some(PART_BYTES_MIN, 1)
    assembly = Assembly(payload := payload_of("p", len(data)))
    (part,) = split(payload, memoryview(data))
    stream = b"".join(content(1, encode_part(part), 1_114_112))
    reader = Reader(assembly.aim)
    inlet, at = Inlet(reader), 0
    while at < len(stream):
        room = inlet.room()[: len(stream) - at]
        room[:] = stream[at : at + len(room)]
        inlet.take(len(room))
        at += len(room)
        if at > 40_000:
            reader.divert()
    assert any(assembly.data)
    assert not any(assembly.data[150_000:])
    assert not assembly.complete


def test_what_is_larger_than_wanted_is_let_go_and_the_next_message_is_whole() -> None:
    large, small = some(2 * KEEP_MAX, 1), some(1000, 2)
    stream = b"".join([*content(1, (large,), 131_072), *content(1, (small,), 131_072)])
    assert read(stream, [100_000]).bodies == [(1, large[:KEEP_MAX]), (1, small)]


@pytest.mark.parametrize("step", [1, 7, 100_000])
@pytest.mark.parametrize("body", [b"", b"bad", some(2 * DIRECT_BYTES, 1)])
def test_a_message_of_which_its_sender_says_too_much_comes_without_that(body: bytes, step: int) -> None:
    """Who publishes may fill a broker's frame, of a megabyte perhaps: that must not end whoever consumes."""
    told = struct.pack(">HHQH", 60, 0, len(body), 1 << 13) + some(2 * SCRATCH_BYTES if step > 9 else SCRATCH_BYTES, 3)
    stream = struct.pack(">BHI", HEADER, 1, len(told)) + told + b"\xce"
    stream += b"".join([*frames.body(1, (body,), len(body), 131_072), *content(2, (b"good",), 131_072)])
    assert read(stream, [step]).bodies == [(1, body), (2, b"good")]
    with pytest.raises(WireError):
        read(stream.replace(told + b"\xce", told + b"\0"), [100_000])


def test_large_bodies_are_sent_as_they_lie_in_memory() -> None:
    data = bytearray(some(500_000, 0))
    pieces = list(frames.body(3, (b"head", memoryview(data)), 500_004, 131_072))
    looked_at = [piece for piece in pieces if isinstance(piece, memoryview) and piece.obj is data]
    assert sum(map(len, looked_at)) == len(data)


@pytest.mark.parametrize(
    "stream",
    [
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"\x01\x00\x00\x00\x00\x00\x04\x00\x0a\x00\x0a\xcd",  # ends with another byte
        b"\x01\x00\x00" + (SCRATCH_BYTES).to_bytes(4, "big") + bytes(99),  # a method that fits nowhere
        frames.method(1, b"")[:-1] + b"\x00",
    ],
)
def test_what_is_not_amqp_is_said_to_be_none(stream: bytes) -> None:
    with pytest.raises(WireError):
        read(stream, [1000])


def test_what_we_write_is_what_pamqp_reads() -> None:
    publish = frames.method(2, frames.publish("fluffle.down", "w1"))
    _, channel, method = pamqp.frame.unmarshal(publish)
    assert isinstance(method, commands.Basic.Publish)
    assert (channel, method.exchange, method.routing_key, method.mandatory) == (2, "fluffle.down", "w1", True)
    known = frames.properties((("reason", "why"),), ("w2", "w3"), persistent=True)
    _, _, head = pamqp.frame.unmarshal(frames.header(2, 77, known, "m.1"))
    assert isinstance(head, ContentHeader)
    assert (head.body_size, head.properties.message_id, head.properties.delivery_mode) == (77, "m.1", 2)
    assert head.properties.headers == {"reason": "why", "BCC": ["w2", "w3"]}
    _, _, ack = pamqp.frame.unmarshal(frames.ack(2, 2**40))
    assert isinstance(ack, commands.Basic.Ack)
    assert (ack.delivery_tag, ack.multiple) == (2**40, False)


def test_we_read_what_pamqp_writes() -> None:
    packed = pamqp.frame.marshal(commands.Basic.Deliver("c", 2**33, True, "fluffle.up", "hello.w1"), 1)
    assert frames.deliver(packed[7:-1]) == frames.Deliver("c", 2**33, "hello.w1")
    packed = pamqp.frame.marshal(commands.Basic.Nack(9, True), 1)
    assert frames.settled(packed[7:-1]) == frames.Settled(9, True, False)
    packed = pamqp.frame.marshal(commands.Basic.Ack(2**34, False), 1)
    assert frames.settled(packed[7:-1]) == frames.Settled(2**34, False, True)
    assert read(Heartbeat().marshal() + struct.pack(">BHI", METHOD, 4, 4) + b"abcd\xce", [3]).methods == [
        (4, b"abcd")
    ]


@pytest.mark.parametrize("user", ["ada", "w" * 63])
@pytest.mark.parametrize("headers", [(), (("reason", "x" * 300),)])
def test_whose_message_it_is_stands_where_amqp_wants_it(user: str, headers: tuple[tuple[str, str], ...]) -> None:
    known = frames.properties(headers, ("b", "c"), persistent=True, signed=True)
    payload = frames.header(3, 7, known, "id.1", user=user)[7:-1]
    head = ContentHeader()
    head.unmarshal(payload)
    assert (head.properties.user_id, head.properties.message_id, head.properties.delivery_mode) == (user, "id.1", 2)
    assert frames.user(payload) == user
    unsigned = frames.header(3, 7, frames.properties(headers, (), persistent=True), "id.1")[7:-1]
    head = ContentHeader()
    head.unmarshal(unsigned)
    assert (head.properties.user_id, frames.user(unsigned)) == (None, "")


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "content_type": st.text("abc", max_size=9), "content_encoding": st.text("abc", max_size=9),
            "headers": st.dictionaries(st.text("abc", min_size=1, max_size=9), st.integers(0, 9)),
            "delivery_mode": st.sampled_from([1, 2]), "priority": st.integers(0, 9),
            "correlation_id": st.text("abc", max_size=9), "reply_to": st.text("abc", max_size=9),
            "expiration": st.text("123", max_size=9), "message_id": st.text("abc", max_size=9),
            "timestamp": st.datetimes().map(lambda at: at.replace(microsecond=0, tzinfo=UTC, year=2020)),
            "message_type": st.text("abc", max_size=9), "user_id": st.text("abc", max_size=9),
            "app_id": st.text("abc", max_size=9),
        },
    )
)  # fmt: skip
def test_whose_message_it_is_is_found_among_all_other_properties(given_: dict[str, Any]) -> None:
    properties = commands.Basic.Properties(**given_)
    payload = pamqp.frame.marshal(ContentHeader(0, 5, properties), 1)[7:-1]
    assert frames.user(payload) == (given_.get("user_id") or "")


@given(st.binary(max_size=80), st.booleans())
def test_a_header_that_lies_names_nobody_or_somebody_and_harms_none(noise: bytes, flagged: bool) -> None:
    assert isinstance(frames.user(bytes(12) + (b"\xff\xf0" if flagged else b"") + noise), str)
