"""Several threads that add and average: the same bits, each chunk with one of them, and nobody left at work."""

import threading
from collections.abc import Iterator

import numpy as np
import pytest

from broker.formats import CHUNK_ITEMS, FORMATS
from broker.tensors import Layout, TensorSpec
from coordinator import hands
from coordinator.aggregation import MEAN, alone
from coordinator.hands import Hands


@pytest.fixture(params=[1, 2, 3])
def several(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hands]:
    monkeypatch.setattr(hands, "SEATS", request.param)
    made = Hands()
    yield made
    made.rest()


def test_what_was_made_comes_in_the_order_of_the_items(several: Hands) -> None:
    assert several.spread(lambda item, _: item * item, range(50)) == [n * n for n in range(50)]
    assert several.spread(lambda item, _: item, []) == []


def test_no_two_sit_in_one_seat(several: Hands) -> None:
    sitting, crowded = set[int](), list[int]()

    def work(item: int, seat: int) -> None:
        if seat in sitting:
            crowded.append(item)
        sitting.add(seat)
        np.ones(100_000).sum()
        sitting.discard(seat)

    several.spread(work, range(40))
    assert not crowded


def test_all_seats_work_at_the_same_time(several: Hands) -> None:
    meeting = threading.Barrier(hands.SEATS, timeout=20)
    several.spread(lambda _, __: meeting.wait(), range(3 * hands.SEATS))


def test_one_failure_ends_it_when_nobody_is_at_work_any_more(several: Hands) -> None:
    at_work = set[int]()

    def work(item: int, _: int) -> None:
        at_work.add(item)
        try:
            if item == 5:
                raise ValueError("the fifth")
            np.ones(100_000).sum()
        finally:
            at_work.discard(item)

    with pytest.raises(ValueError, match="the fifth"):
        several.spread(work, range(10_000))
    assert not at_work
    assert several.spread(lambda item, _: item, [7]) == [7]


def test_items_that_cannot_be_drawn_end_it_too(several: Hands) -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        several.spread(lambda item, _: item, items())


@pytest.mark.parametrize("name", ["float32", "bfloat16", "int8", "top-k"])
def test_the_bits_do_not_depend_on_how_many_add_and_average(several: Hands, name: str) -> None:
    floats = 5 * CHUNK_ITEMS + 77
    layout = Layout.of(
        [TensorSpec("w", "float32", (floats,)), TensorSpec("h", "float16", (999,)), TensorSpec("n", "int64", (3,))]
    )
    dice, fmt = np.random.default_rng(3), FORMATS[name]
    shared, own = MEAN.init(layout, fmt, seats=hands.SEATS), MEAN.init(layout, fmt)
    for examples in (3, 100_000):  # the second is carried to the high limb
        delta = np.frombuffer(bytearray(layout.size_bytes), np.uint8)
        delta[24 : 24 + 4 * floats] = dice.standard_normal(floats).astype(np.float32).view(np.uint8)
        packed = fmt.pack(layout, delta.data, residual=None, dice=dice)
        MEAN.add(shared, examples, packed, spread=several.spread)
        MEAN.add(own, examples, packed, spread=alone)
    weights = memoryview(bytes(layout.size_bytes))
    versions = [bytearray(layout.size_bytes) for _ in range(2)]
    for sums, version, spread in ((shared, versions[0], several.spread), (own, versions[1], alone)):

        def put(start: int, piece: memoryview, version: bytearray = version) -> None:
            version[start : start + len(piece)] = piece

        MEAN.finish(sums, weights, put, spread=spread)
    assert versions[0] == versions[1]
    assert any(versions[0])
