"""Payloads in pieces: any order, each once, and nothing that lies gets in."""

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from broker.errors import WireError
from broker.messages import PART_BYTES_MIN, Attempt, Closed, Part, Payload, encode, encode_part
from broker.parts import Assembly, split
from broker.tensors import TensorSpec


def payload_of(size_bytes: int) -> Payload:
    return Payload("p", PART_BYTES_MIN, (TensorSpec("w", "uint8", (size_bytes,)),))


def cut(size_bytes: int) -> tuple[Payload, bytes, list[Part]]:
    data, payload = random.Random(size_bytes).randbytes(size_bytes), payload_of(size_bytes)
    return payload, data, list(split(payload, memoryview(data)))


@given(st.integers(0, 4 * PART_BYTES_MIN), st.randoms(use_true_random=False))
@settings(max_examples=25, deadline=None)
def test_parts_in_any_order_and_any_number_make_the_payload(size_bytes: int, dice: random.Random) -> None:
    payload, data, parts = cut(size_bytes)
    assert len(parts) == -(-size_bytes // PART_BYTES_MIN)
    arriving = parts + dice.choices(parts, k=3) if parts else []
    dice.shuffle(arriving)
    assembly = Assembly(payload)
    news = [assembly.add(part) for part in arriving]
    assert sum(news) == len(parts)
    assert assembly.complete
    assert assembly.data == data


def test_a_part_is_received_where_it_belongs_and_counts_when_it_is_added() -> None:
    payload, data, parts = cut(2 * PART_BYTES_MIN + 5)
    assembly = Assembly(payload)
    for part in parts:
        head, tail = encode_part(part)
        aimed = assembly.aim(memoryview(head + bytes(tail[:9])), len(head) + len(tail))
        assert aimed is not None
        assert aimed.at == len(head)
        aimed.place[:] = tail
        assert not assembly.complete
        assert assembly.add(aimed.part)
    assert assembly.complete
    assert assembly.data == data


def test_what_landed_in_its_place_and_lies_does_not_count() -> None:
    payload, data, (part, *_) = cut(PART_BYTES_MIN)
    assembly = Assembly(payload)
    head, tail = encode_part(part)
    aimed = assembly.aim(memoryview(head), len(head) + len(tail))
    assert aimed is not None
    aimed.place[:] = bytes(PART_BYTES_MIN)
    with pytest.raises(WireError, match="does not match its checksum"):
        assembly.add(aimed.part)
    assert assembly.missing == 1
    assert assembly.add(part)  # the true one comes another way
    assert assembly.data == data


def test_only_a_part_that_is_awaited_is_given_a_place_and_only_once() -> None:
    payload, _, (first, second) = cut(PART_BYTES_MIN + 100)
    assembly = Assembly(payload)

    def aim(part: Part, *, more: int = 0, cut_at: int | None = None) -> object:
        head, tail = encode_part(part)
        return assembly.aim(memoryview(head[:cut_at]), len(head) + len(tail) + more)

    assert aim(replace(first, payload="q")) is None
    assert aim(replace(first, index=2)) is None
    assert aim(replace(second, data=bytes(101))) is None
    assert aim(first, more=1) is None
    assert aim(first, cut_at=20) is None
    assert assembly.aim(memoryview(encode(Closed(Attempt("r", 1, 1), ""))), 100) is None
    assert assembly.add(second)
    assert aim(second) is None
    assert aim(first) is not None
    assert aim(first) is None


@pytest.mark.parametrize(
    ("size_bytes", "lengths"),
    [
        (0, []),
        (1, [1]),
        (PART_BYTES_MIN, [PART_BYTES_MIN]),
        (PART_BYTES_MIN + 1, [PART_BYTES_MIN, 1]),
        (2 * PART_BYTES_MIN, [PART_BYTES_MIN, PART_BYTES_MIN]),
    ],
)
def test_all_parts_are_equally_long_but_the_last(size_bytes: int, lengths: list[int]) -> None:
    _, _, parts = cut(size_bytes)
    assert [len(part.data) for part in parts] == lengths
    assert [part.index for part in parts] == list(range(len(lengths)))


def test_a_payload_without_bytes_is_complete_at_once() -> None:
    assert Assembly(payload_of(0)).complete


def test_it_is_complete_with_the_last_part_and_not_before() -> None:
    payload, _, parts = cut(3 * PART_BYTES_MIN)
    assembly = Assembly(payload)
    for missing, part in zip((3, 2, 1), parts, strict=True):
        assert (assembly.missing, assembly.complete) == (missing, False)
        assembly.add(part)
    assert (assembly.missing, assembly.complete) == (0, True)


def test_a_part_of_another_payload_is_passed_over() -> None:
    payload, _, parts = cut(10)
    assembly = Assembly(payload)
    assert not assembly.add(replace(parts[0], payload="q"))
    assert assembly.missing == 1
    assert bytes(assembly.data) == bytes(10)


def test_a_part_that_came_already_changes_nothing() -> None:
    payload, data, (part,) = cut(10)
    assembly = Assembly(payload)
    assert assembly.add(part)
    other = bytes(10)
    assert not assembly.add(replace(part, data=other, checksum=xxh3_64_intdigest(other)))
    assert assembly.data == data


@pytest.mark.parametrize(
    ("lie", "said"),
    [
        ({"index": 2}, "part 2 lies outside a payload of 262244 bytes"),
        ({"index": 2**53}, "lies outside"),
        ({"index": 0}, "part 0 has 100 bytes where 262144 belong"),
        ({"data": bytes(99)}, "part 1 has 99 bytes where 100 belong"),
        ({"data": bytes(PART_BYTES_MIN)}, "has 262144 bytes where 100 belong"),
        ({"data": b""}, "has 0 bytes where 100 belong"),
        ({"data": bytes(100)}, "part 1 does not match its checksum"),
        ({"checksum": 0}, "part 1 does not match its checksum"),
    ],
)
def test_a_part_that_lies_is_refused_and_leaves_no_trace(lie: dict[str, object], said: str) -> None:
    payload, data, (first, last) = cut(PART_BYTES_MIN + 100)
    assembly = Assembly(payload)
    with pytest.raises(WireError, match=said):
        assembly.add(replace(last, **lie))  # type: ignore[arg-type]  # the lies fit their fields
    assert not any(assembly.data)
    assert assembly.add(first)
    assert assembly.add(last)
    assert assembly.data == data


def test_parts_land_in_the_memory_they_are_given() -> None:
    payload, data, parts = cut(PART_BYTES_MIN + 100)
    place = bytearray(len(data))
    assembly = Assembly(payload, memoryview(place))
    for part in parts:
        assembly.add(part)
    assert place == data
