"""Rules that a few liars cannot bend: what is left of each float, in any order and format, and within what bounds."""

from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from broker.errors import WireError
from broker.formats import CHUNK_ITEMS, FORMATS, top_k
from broker.tensors import FLOATS, Layout, TensorSpec, as_float64, from_float64, view
from coordinator import hands
from coordinator.aggregation import MEAN, Rule, Sums, alone
from coordinator.rules import RULES
from tests.summed import finished
from tests.unit.test_aggregation import EVERY_DTYPE, payloads

TRIMMED, MEDIAN = RULES["trimmed-mean"], RULES["median"]
PLAIN = FORMATS["float32"]
FLOAT32 = st.floats(-(2.0**21), 2.0**21, width=32)


def taken(rule: Rule, layout: Layout, updates: list[bytes], *, trim: int = 1) -> Sums:
    sums = rule.init(layout, PLAIN, trim=trim)
    for number, update in enumerate(updates, 1):
        rule.add(sums, number, memoryview(update))
    return sums


def of_floats(rule: Rule, rows: list[list[float]], weights: list[float], *, trim: int = 1) -> NDArray[np.float32]:
    layout = Layout.of([TensorSpec("w", "float32", (len(weights),))])
    sums = taken(rule, layout, [np.array(row, np.float32).tobytes() for row in rows], trim=trim)
    return np.frombuffer(finished(rule, sums, memoryview(np.array(weights, np.float32).tobytes())), np.float32)


def test_every_rule_can_be_named_in_a_plan() -> None:
    assert RULES == {"mean": MEAN, "trimmed-mean": TRIMMED, "median": MEDIAN}


@given(st.lists(FLOAT32, min_size=1, max_size=12), st.integers(0, 5), FLOAT32)
@settings(max_examples=200, deadline=None)
def test_what_is_left_of_a_float_is_the_mean_of_those_in_the_middle(
    deltas: list[float], trim: int, weight: float
) -> None:
    trim = min(trim, (len(deltas) - 1) // 2)
    for rule, out in ((TRIMMED, trim), (MEDIAN, (len(deltas) - 1) // 2)):
        found = of_floats(rule, [[delta] for delta in deltas], [weight], trim=trim)[0]
        middle = [Fraction(delta) for delta in sorted(deltas)[out : len(deltas) - out]]
        exact = Fraction(weight) + sum(middle, Fraction(0)) / len(middle)
        slack = Fraction(float(np.spacing(np.abs(found)))) / 2 + Fraction(2**21 * len(deltas), 2**52)
        assert exact - slack <= Fraction(float(found)) <= exact + slack


@given(st.lists(payloads(), min_size=3, max_size=6), payloads(), st.data())
@settings(max_examples=40, deadline=None)
def test_the_same_updates_in_any_order_make_the_same_bits(
    updates: list[bytes], weights: bytes, data: st.DataObject
) -> None:
    other = data.draw(st.permutations(updates))
    for rule in (TRIMMED, MEDIAN):
        versions = [finished(rule, taken(rule, EVERY_DTYPE, each), memoryview(weights)) for each in (updates, other)]
        assert versions[0] == versions[1]


@given(st.lists(payloads(), min_size=3, max_size=6), st.lists(payloads(), max_size=2), payloads())
@settings(max_examples=60, deadline=None)
def test_whatever_a_few_send_nothing_moves_further_than_the_honest_ones_say(
    honest: list[bytes], lies: list[bytes], weights: bytes
) -> None:
    for rule in (TRIMMED, MEDIAN):
        sums = taken(rule, EVERY_DTYPE, [*lies, *honest], trim=max(1, len(lies)))
        made = finished(rule, sums, memoryview(weights))
        for segment in EVERY_DTYPE.segments:
            where, dtype = slice(segment.start, segment.stop), segment.dtype
            after, *said = (view(memoryview(each)[where], dtype) for each in (bytes(made), *honest))
            if dtype in FLOATS:  # what one of them alone would make of it
                old = as_float64(view(memoryview(weights)[where], dtype), dtype)
                said = [as_float64(from_float64(old + as_float64(each, dtype), dtype), dtype) for each in said]
                after = as_float64(after, dtype)
            low, high = np.min(said, axis=0), np.max(said, axis=0)
            assert (low <= after).all(), f"{rule} {dtype}"
            assert (after <= high).all(), f"{rule} {dtype}"


def test_one_liar_bends_the_mean_and_not_these() -> None:
    rows = [[1.0, -2.0], [1.25, -2.0], [0.75, -2.25], [1e9, -1e9]]
    assert abs(of_floats(MEAN, rows, [0.0, 0.0])).min() > 1e8
    for rule in (TRIMMED, MEDIAN):
        assert of_floats(rule, rows, [0.0, 0.0]).tolist() == [1.125, -2.125]


def test_zeros_of_either_sign_are_the_same_bits_whoever_was_first() -> None:
    for order in ([-0.0, 0.0, -0.0], [0.0, -0.0, -0.0], [-0.0, -0.0, 0.0]):
        assert not np.signbit(of_floats(MEDIAN, [[delta] for delta in order], [-0.0]))[0]


@pytest.mark.parametrize("name", ["bfloat16", "int8", "top-k"])
def test_an_update_counts_as_it_is_decoded_in_every_format_and_chunk(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fmt = top_k(2e-5) if name == "top-k" else FORMATS[name]  # so few that there are chunks of which nobody speaks
    layout = Layout.of([
        TensorSpec("a", "float64", (9,)), TensorSpec("n", "int64", (2,)),
        TensorSpec("b", "float32", (3 * CHUNK_ITEMS + 5,)), TensorSpec("yes", "bool", (1,)),
    ])  # fmt: skip
    dice, weights = np.random.default_rng(3), bytes(layout.size_bytes)
    monkeypatch.setattr(hands, "SEATS", 2)
    several = hands.Hands()
    made = list[bytearray]()
    for spread, seats in ((alone, 1), (several.spread, 2)):
        dice, sums = np.random.default_rng(3), MEDIAN.init(layout, fmt, seats=seats)
        decoded = np.zeros((3, 3 * CHUNK_ITEMS + 14))
        for number in range(3):
            delta = bytearray(layout.size_bytes)
            for segment in layout.segments:
                items = view(memoryview(delta)[segment.start : segment.stop], segment.dtype)
                items[:] = dice.standard_normal(len(items)) if segment.dtype in FLOATS else number % 2
            payload = fmt.pack(layout, memoryview(delta), residual=None, dice=dice)
            for run in fmt.runs(layout, payload):
                decoded[number, run.where] = run.values
            MEDIAN.add(sums, 1, payload, spread=spread)
        version = bytearray(layout.size_bytes)

        def put(start: int, piece: memoryview, version: bytearray = version) -> None:
            version[start : start + len(piece)] = piece

        MEDIAN.finish(sums, memoryview(weights), put, spread=spread)
        made.append(version)
    several.rest()
    assert made[0] == made[1]
    parts = [view(memoryview(made[0])[each.start : each.stop], each.dtype) for each in layout.segments]
    floats = np.concatenate([part for part in parts if part.dtype.kind == "f"])
    np.testing.assert_array_equal(floats, np.median(decoded, axis=0).astype(np.float32))
    assert [part.tolist() for part in parts if part.dtype.kind != "f"] == [[0, 0], [False]]


def test_what_is_refused_is_not_set_aside() -> None:
    layout = Layout.of([TensorSpec("w", "float32", (1,)), TensorSpec("yes", "bool", (1,))])
    sums = MEDIAN.init(layout, PLAIN, clip=1.0)
    for value, yes, why in ((np.nan, 1, "NaN"), (2.0, 1, "its norm is 2"), (0.5, 2, "neither 0 nor 1")):
        with pytest.raises(WireError, match=why):
            MEDIAN.add(sums, 1, memoryview(np.float32(value).tobytes() + bytes([yes])))
    assert (sums.whole, sums.updates, sums.examples) == ([], 0, 0)


def test_an_update_lies_where_the_caller_says_and_nowhere_when_all_begins_anew() -> None:
    layout, room = Layout.of([TensorSpec("w", "float32", (1,))]), bytearray(4)
    sums = MEDIAN.init(layout, PLAIN, aside=lambda data: memoryview(bytes(data)))
    for value in (1.0, 5.0, 2.0):  # each lands in the same room
        room[:] = np.float32(value).tobytes()
        MEDIAN.add(sums, 1, memoryview(room))
    assert np.frombuffer(finished(MEDIAN, sums, memoryview(bytes(4))), np.float32) == [2.0]
    sums.clear()
    assert sums.whole == []


def test_a_result_that_no_tensor_can_hold_ends_the_attempt() -> None:
    layout = Layout.of([TensorSpec("w", "float32", (1,))])
    largest = memoryview(np.float32(np.finfo(np.float32).max).tobytes())
    sums = MEDIAN.init(layout, PLAIN)
    sums.whole = [memoryview(np.float32(2.0**104).tobytes())] * 3
    with pytest.raises(WireError, match="the model has diverged"):
        finished(MEDIAN, sums, largest)


def test_the_chunks_of_a_large_model_come_in_order() -> None:
    """Each place is put once, and none is left out."""
    layout = Layout.of([TensorSpec("w", "float32", (2 * CHUNK_ITEMS + 3,))])
    update, starts = memoryview(bytes(layout.size_bytes)), list[tuple[int, int]]()
    sums = MEDIAN.init(layout, PLAIN)
    for _ in range(3):
        MEDIAN.add(sums, 1, update)
    MEDIAN.finish(sums, update, lambda start, piece: starts.append((start, start + len(piece))))
    assert (starts[0][0], starts[-1][1]) == (0, layout.size_bytes)
    assert all(before[1] == after[0] for before, after in pairwise(starts))
