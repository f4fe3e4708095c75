"""The sum: the same bits in any order, as exact as its grid, and nothing of an update that is refused."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from broker.errors import WireError
from broker.formats import CHUNK_ITEMS, FORMATS, Format, Run
from broker.tensors import FLOATS, ITEM_BYTES, Layout, TensorSpec, as_float64, from_float64, view
from coordinator.aggregation import EXAMPLES_MAX, LOW_REACH, MEAN, REACH, RULES, Sums
from tests.summed import finished as made_of

AS_IT_IS = FORMATS["float32"]
EVERY_DTYPE = Layout.of(TensorSpec(f"a_{dtype}", dtype, (3,)) for dtype in ITEM_BYTES)
Updates = list[tuple[int, bytes]]


def one(dtype: str, *values: float) -> tuple[Layout, bytes]:
    """One tensor, and its bytes."""
    array = from_float64(np.array(values), dtype) if dtype in FLOATS else np.array(values).astype(dtype)
    return Layout.of([TensorSpec("w", dtype, (len(values),))]), array.tobytes()


def summed(layout: Layout, updates: Updates, sums: Sums | None = None) -> Sums:
    sums = sums or MEAN.init(layout, AS_IT_IS)
    for examples, update in updates:
        MEAN.add(sums, examples, memoryview(update))
    return sums


def finished(sums: Sums, weights: bytes) -> bytes:
    return bytes(made_of(MEAN, sums, memoryview(weights)))


def mean(layout: Layout, weights: bytes, updates: Updates) -> bytes:
    return finished(summed(layout, updates), weights)


def mean_float32(weights: list[float], updates: list[tuple[int, list[float]]]) -> NDArray[np.float32]:
    layout, start = one("float32", *weights)
    found = mean(layout, start, [(n, one("float32", *deltas)[1]) for n, deltas in updates])
    return np.frombuffer(found, np.float32)


def total(sums: Sums, item: int) -> int:
    """What has been added up in one place, in steps of 2^-52."""
    chunk = item // CHUNK_ITEMS
    low = int(sums.low[item]) if chunk in sums.bounds else 0
    return low + (int(sums.high[item]) << 52 if chunk in sums.carried else 0)


def state(sums: Sums) -> tuple[object, ...]:
    totals = [total(sums, item) for item in range(len(sums.low))]
    largest = [(start, values.tobytes()) for start, values in sorted(sums.largest.items())]
    return totals, largest, sums.examples, sums.updates, sums.reach


@st.composite
def payloads(draw: st.DrawFn) -> bytes:
    """Bytes for EVERY_DTYPE, as an update may hold them."""
    data = bytearray(EVERY_DTYPE.size_bytes)
    for segment in EVERY_DTYPE.segments:
        items = view(memoryview(data)[segment.start : segment.stop], segment.dtype)
        if segment.dtype in FLOATS:
            # weights and mean together below 2^16: float16 ends there
            numbers = st.floats(-(2.0**14), 2.0**14) | st.sampled_from([0.0, -0.0, 1e-9, -1e-9, 5e-324, 2.0**-149])
            drawn = np.array(draw(st.lists(numbers, min_size=3, max_size=3)))
            items[:] = from_float64(drawn, segment.dtype)
        elif segment.dtype == "bool":
            items[:] = draw(st.lists(st.booleans(), min_size=3, max_size=3))
        else:
            bounds = np.iinfo(segment.dtype)
            numbers_ = st.integers(int(bounds.min), int(bounds.max))
            items[:] = draw(st.lists(numbers_, min_size=3, max_size=3))
    return bytes(data)


EXAMPLES = st.integers(1, 2**29 - 1) | st.sampled_from([1, 2, 3, 2**29 - 1])


# -- any order ------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(EXAMPLES, payloads()), min_size=1, max_size=5), payloads(), st.data())
@settings(max_examples=30, deadline=None)
def test_the_same_updates_in_any_order_make_the_same_bits(
    updates: Updates, weights: bytes, data: st.DataObject
) -> None:
    other_order = data.draw(st.permutations(updates))
    assert mean(EVERY_DTYPE, weights, updates) == mean(EVERY_DTYPE, weights, other_order)


def test_the_order_would_matter_to_a_plain_sum_of_floats() -> None:
    """What the test above is about: float64 gives 0.0 here in one order, and another number in the other."""
    deltas = [(1, [2.0**40]), (1, [2.0**-20]), (1, [-(2.0**40)])]
    plain = {
        sum(delta[0] for _, delta in order) for order in (deltas, deltas[::-1], [deltas[0], deltas[2], deltas[1]])
    }
    assert len(plain) > 1
    results = {mean_float32([0.0], list(order)).tobytes() for order in (deltas, deltas[::-1])}
    assert results == {np.float32(2.0**-20 / 3).tobytes()}


# -- exact ----------------------------------------------------------------------------------------------------------

FLOAT32 = st.floats(-(2.0**21), 2.0**21, width=32)


@given(FLOAT32, st.lists(st.tuples(EXAMPLES, FLOAT32), min_size=1, max_size=8))
@settings(max_examples=100, deadline=None)
def test_the_mean_is_the_exact_one_within_the_grid_and_half_a_step_of_the_dtype(
    weight: float, updates: list[tuple[int, float]]
) -> None:
    found = mean_float32([weight], [(n, [delta]) for n, delta in updates])[0]
    total = sum(n for n, _ in updates)
    exact = Fraction(weight) + sum((n * Fraction(delta) for n, delta in updates), Fraction(0)) / total
    grid = Fraction(len(updates), total * 2**53)  # each update is rounded once to the grid's step of 2^-52
    float64 = abs(exact) * Fraction(4, 2**53) + abs(Fraction(weight)) * Fraction(2, 2**53)
    assert abs(Fraction(float(found)) - exact) <= Fraction(float(np.spacing(np.abs(found)))) / 2 + grid + float64


@given(
    st.lists(st.tuples(st.integers(1, 1000), st.integers(-(2**20), 2**20)), min_size=1, max_size=20),
    st.integers(-(2**20), 2**20),
)
@settings(max_examples=100, deadline=None)
def test_a_mean_that_float32_can_hold_is_found_to_the_last_bit(updates: list[tuple[int, int]], weight: int) -> None:
    total = sum(n for n, _ in updates)
    exact = Fraction(weight, 2**10) + Fraction(sum(n * k for n, k in updates), total * 2**10)
    found = mean_float32([weight / 2**10], [(n, [k / 2**10]) for n, k in updates])[0]
    assert found == np.float32(float(exact))


@given(st.floats(width=32, allow_nan=False, allow_infinity=False), FLOAT32, EXAMPLES)
@settings(max_examples=100, deadline=None)
def test_one_update_alone_gives_weights_plus_delta_rounded_once(weight: float, delta: float, examples: int) -> None:
    # every bit of the delta must be on the grid: 24 bits down from 2^-28
    on_grid = float(np.float32(delta)) if abs(delta) >= 2.0**-28 else 0.0
    found = mean_float32([weight], [(examples, [on_grid])])[0]
    assert found == np.float32(np.float64(weight) + np.float64(on_grid))


def test_deltas_of_a_billionth_are_kept_beside_a_million() -> None:
    found = mean_float32([0.0, 0.0], [(100, [1e-9, 1e6]), (300, [3e-9, -2e6])])
    np.testing.assert_allclose(found, [2.5e-9, -1.25e6], rtol=1e-7)


def test_a_billionth_survives_a_million_in_the_same_place() -> None:
    found = mean_float32([0.0], [(1, [1e6]), (1, [1e-9]), (1, [-1e6])])
    np.testing.assert_allclose(found, [1e-9 / 3], rtol=1e-6)


def test_denormal_deltas_are_below_the_grid_and_count_as_nothing() -> None:
    assert mean_float32([1.0, 0.0], [(1, [1e-45, -1e-45])]).tolist() == [1.0, 0.0]


def test_a_denormal_weight_stays_as_it_is() -> None:
    assert mean_float32([1e-45], [(3, [0.0])]).tobytes() == np.float32(1e-45).tobytes()


@pytest.mark.parametrize("delta", [0.5 - 2.0**-25, 1.5 - 2.0**-23, 600.5 - 2.0**-14])
def test_thousands_of_updates_are_carried_over_before_the_low_limb_overflows(delta: float) -> None:
    layout, update = one("float32", delta, -delta)
    n = 5000
    sums = summed(layout, [(1, update)] * n)
    assert sums.carried
    assert abs(sums.low).max() <= LOW_REACH * 2**52
    assert [Fraction(total(sums, item), 2**52) for item in (0, 1)] == [Fraction(delta) * n, -Fraction(delta) * n]


def test_examples_add_up_to_the_limit_and_no_further() -> None:
    layout, update = one("float32", 0.25)
    full = EXAMPLES_MAX // 2**28
    sums = summed(layout, [(2**28, update)] * full)
    assert sums.examples == EXAMPLES_MAX == 2**40
    before = state(sums)
    with pytest.raises(WireError, match="lower the examples"):
        MEAN.add(sums, 1, memoryview(update))
    assert state(sums) == before
    assert view(finished(sums, bytes(4)), "float32")[0] == 0.25


def test_the_reach_of_the_grid_itself_is_within_it() -> None:
    layout, update = one("float32", 2.0**23, -(2.0**23))
    sums = summed(layout, [(2**28, update)])
    assert [total(sums, item) >> 52 for item in (0, 1)] == [REACH, -REACH]
    assert view(finished(sums, bytes(8)), "float32").tolist() == [2.0**23, -(2.0**23)]


def test_a_tensor_longer_than_a_chunk_is_summed_to_its_end() -> None:
    n = 2 * CHUNK_ITEMS + 5
    layout = Layout.of([TensorSpec("w", "float32", (n,)), TensorSpec("v", "float64", (3,))])
    update = np.concatenate([np.arange(3.0).view(np.uint8), np.arange(n, dtype=np.float32).view(np.uint8)]).tobytes()
    assert mean(layout, bytes(layout.size_bytes), [(2, update), (5, update)]) == update


# -- against integers of any size ------------------------------------------------------------------------------------

ON_BOTH_SIDES_OF_A_LIMB = (
    st.floats(-1, 1, width=32)
    | st.floats(-(2.0**21), 2.0**21, width=32)
    | st.builds(lambda k, e: float(np.float32(k * 2.0**e)), st.integers(-(2**24), 2**24), st.integers(-60, -3))
    | st.sampled_from([2.0**9, 2.0**10, 512.5, -1023.75, 2.0**-53, -(2.0**-53), 3 * 2.0**-53, 0.5, -0.5, 1.5])
)
FEW_OR_MANY = st.integers(1, 3) | st.integers(1, 2**12) | EXAMPLES


def in_steps(examples: int, delta: float) -> int:
    """The contribution in steps of 2^-52, to nearest, ties to even; its product is rounded as float64 rounds it."""
    return round(Fraction(examples * delta) * 2**52)


@given(
    st.lists(st.tuples(FEW_OR_MANY, st.tuples(*[ON_BOTH_SIDES_OF_A_LIMB] * 3)), min_size=1, max_size=12), st.data()
)
@settings(max_examples=150, deadline=None)
def test_every_sum_is_the_integer_it_should_be_whatever_the_order_and_the_limbs(
    updates: list[tuple[int, tuple[float, ...]]], data: st.DataObject
) -> None:
    layout, start = one("float32", 0.25, -3.0, 1e-8)
    before = np.frombuffer(start, np.float32).tolist()
    sums = MEAN.init(layout, AS_IT_IS)
    for order in (updates, data.draw(st.permutations(updates))):
        sums.clear()
        summed(layout, [(n, one("float32", *deltas)[1]) for n, deltas in order], sums)
        exact = [sum(in_steps(n, deltas[item]) for n, deltas in updates) for item in range(3)]
        assert [total(sums, item) for item in range(3)] == exact
        found = np.frombuffer(finished(sums, start), np.float32)
        examples = sum(n for n, _ in updates)
        for item, steps in enumerate(exact):
            whole = (steps + 2**51) >> 52
            mean_ = (float(steps - (whole << 52)) * 2.0**-52 + float(whole)) / examples
            assert found[item] == np.float32(mean_ + before[item])


@given(st.lists(st.tuples(FEW_OR_MANY, st.floats(-1e6, 1e6)), min_size=1, max_size=8))
@settings(max_examples=100, deadline=None)
def test_products_of_float64_deltas_are_rounded_once_before_they_are_put_on_the_grid(
    updates: list[tuple[int, float]],
) -> None:
    layout = one("float64", 0.0)[0]
    sums = summed(layout, [(n, one("float64", delta)[1]) for n, delta in updates])
    assert total(sums, 0) == sum(in_steps(n, delta) for n, delta in updates)


@pytest.mark.parametrize("order", [(600.0, 500.0, 2.0**-43, 2.0**-52), (2.0**-52, 500.0, 2.0**-43, 600.0)])
def test_a_sum_is_rounded_once_and_not_limb_by_limb(order: tuple[float, ...]) -> None:
    layout, start = one("float64", 0.0)
    sums = summed(layout, [(1, one("float64", delta)[1]) for delta in order])
    assert sums.carried
    assert view(finished(sums, start), "float64")[0] == (1100 + 2.0**-42) / 4  # a step less would be a tie


@given(st.lists(st.tuples(EXAMPLES, payloads()), min_size=1, max_size=3), payloads())
@settings(max_examples=30, deadline=None)
def test_sums_that_are_used_again_remember_nothing(updates: Updates, weights: bytes) -> None:
    sums = summed(EVERY_DTYPE, [(2**29 - 1, damaged("float64", 4e6)), (3, damaged("int8", 127))])
    finished(sums, weights)
    sums.clear()
    assert state(sums) == state(MEAN.init(EVERY_DTYPE, AS_IT_IS))
    assert finished(summed(EVERY_DTYPE, updates, sums), weights) == mean(EVERY_DTYPE, weights, updates)


# -- updates written in other formats -------------------------------------------------------------------------------


def scattered(*runs: Run) -> Format:
    """A format whose every update holds these runs, and no integers."""
    return AS_IT_IS._replace(runs=lambda *_: iter(runs), others=lambda *_: iter(()))


def test_floats_that_are_named_one_by_one_are_added_where_they_belong() -> None:
    layout = Layout.of([TensorSpec("w", "float32", (CHUNK_ITEMS + 10,))])
    runs = (
        Run(np.array([0, 7]), np.array([1.0, -2.0], np.float32)),
        Run(np.array([CHUNK_ITEMS + 1, CHUNK_ITEMS + 9]), np.array([2.0**20, 0.5], np.float32)),
    )
    sums = MEAN.init(layout, scattered(*runs))
    for _ in range(2):
        MEAN.add(sums, 3, memoryview(b""))
    found = np.frombuffer(finished(sums, bytes(layout.size_bytes)), np.float32)
    assert {int(i): float(found[i]) for i in np.flatnonzero(found)} == {
        0: 1.0, 7: -2.0, CHUNK_ITEMS + 1: 2.0**20, CHUNK_ITEMS + 9: 0.5,
    }  # fmt: skip


def test_what_no_update_speaks_of_stays_as_it_was() -> None:
    layout, weights = one("float32", 1.5, -2.0)
    sums = MEAN.init(layout, scattered())
    MEAN.add(sums, 1, memoryview(b""))
    assert finished(sums, weights) == weights


def test_an_update_whose_last_run_is_damaged_leaves_no_trace() -> None:
    layout = Layout.of([TensorSpec("w", "float32", (CHUNK_ITEMS + 1,))])
    good = Run(slice(0, 2), np.ones(2, np.float32))
    sums = MEAN.init(layout, scattered(good, Run(slice(CHUNK_ITEMS, CHUNK_ITEMS + 1), np.array([np.nan]))))
    before = state(sums)
    with pytest.raises(WireError, match="NaN or infinity"):
        MEAN.add(sums, 1, memoryview(b""))
    assert state(sums) == before


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_every_format_adds_up_to_the_same_in_any_order(name: str) -> None:
    layout = Layout.of([TensorSpec("w", "float32", (1500,)), TensorSpec("n", "int64", (2,))])
    dice = np.random.default_rng(1)
    fmt, updates = FORMATS[name], []
    for seed in range(4):
        numbers = np.array([seed, 9 - seed]).tobytes()
        delta = memoryview(numbers + (dice.standard_normal(1500) * 0.1).astype(np.float32).tobytes())
        updates.append((1 + 400 * seed, bytes(fmt.pack(layout, delta, residual=None, dice=dice))))
    made = set()
    for order in (updates, updates[::-1]):
        made.add(finished(summed(layout, order, MEAN.init(layout, fmt)), bytes(layout.size_bytes)))
    assert len(made) == 1
    assert np.frombuffer(made.pop()[:16], np.int64).tolist() == [3, 9]


# -- integers and booleans ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", sorted(set(ITEM_BYTES) - FLOATS - {"bool"}))
def test_of_integers_the_largest_counts_whatever_the_weights_and_examples_were(dtype: str) -> None:
    layout, weights = one(dtype, 100, 100)
    updates = [(1000, one(dtype, 3, 7)[1]), (1, one(dtype, 5, 2)[1])]
    assert view(mean(layout, weights, updates), dtype).tolist() == [5, 7]


def test_the_largest_integers_are_not_rounded() -> None:
    layout, weights = one("int64", 0)
    largest = np.array([2**63 - 1]).tobytes()
    assert mean(layout, weights, [(1, largest), (2**29 - 1, np.array([2**63 - 2]).tobytes())]) == largest


def test_of_booleans_one_that_is_true_counts() -> None:
    layout, weights = one("bool", 1, 1, 0)
    assert mean(layout, weights, [(1, b"\0\1\0"), (9, b"\0\0\0")]) == b"\0\1\0"


def test_a_model_without_floats_and_one_without_tensors_can_be_averaged() -> None:
    layout, weights = one("int8", 1)
    assert mean(layout, weights, [(1, b"\2")]) == b"\2"
    assert mean(Layout(()), b"", [(1, b"")]) == b""


# -- refused --------------------------------------------------------------------------------------------------------


def damaged(dtype: str, value: float) -> bytes:
    """An update for EVERY_DTYPE whose last item of `dtype` is `value` and all else 1."""
    data = bytearray(EVERY_DTYPE.size_bytes)
    for segment in EVERY_DTYPE.segments:
        items = view(memoryview(data)[segment.start : segment.stop], segment.dtype)
        items[:] = from_float64(np.ones(3), segment.dtype) if segment.dtype in FLOATS else 1
        if segment.dtype == dtype:
            items[2:] = from_float64(np.array([value]), dtype) if dtype in FLOATS else value
    return bytes(data)


@pytest.mark.parametrize("dtype", sorted(FLOATS))
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_an_update_that_is_not_finite_is_refused_and_leaves_no_trace(dtype: str, value: float) -> None:
    sums = summed(EVERY_DTYPE, [(3, damaged("", 0))])
    before = state(sums)
    with pytest.raises(WireError, match="NaN or infinity: training has diverged there"):
        MEAN.add(sums, 1, memoryview(damaged(dtype, value)))
    assert state(sums) == before


def test_a_nan_that_signals_is_refused_like_any_other() -> None:
    sums = summed(one("float32", 1.0)[0], [])
    with pytest.raises(WireError, match="NaN"):
        MEAN.add(sums, 1, memoryview(np.array([0x7F800001], np.uint32).tobytes()))


@pytest.mark.parametrize(
    ("dtype", "value", "examples"),
    [
        ("float32", 2.0**23 + 1, 2**28),
        ("float32", -(2.0**52), 1),
        ("float32", 3e38, 2**29 - 1),
        ("float64", 1.7e308, 2**29 - 1),
        ("bfloat16", 3e38, 1),
    ],
)
def test_an_update_beyond_the_grid_is_refused_and_leaves_no_trace(dtype: str, value: float, examples: int) -> None:
    sums = summed(EVERY_DTYPE, [(3, damaged("", 0))])
    before = state(sums)
    with pytest.raises(WireError, match=r"examples times the largest delta is .*, over the limit of 2\.25e\+15\."):
        MEAN.add(sums, examples, memoryview(damaged(dtype, value)))
    assert state(sums) == before


def test_updates_that_reach_beyond_the_grid_together_are_refused() -> None:
    layout, update = one("float32", 2.0**23)
    sums = summed(layout, [(2**28, update)] * 2000)
    sums.examples = 0  # their limit would come first
    sums.reach += 48 * REACH
    before = state(sums)
    with pytest.raises(WireError, match="the round's sum would leave its grid"):
        MEAN.add(sums, 2**28, memoryview(update))
    assert state(sums) == before


def test_a_boolean_that_is_neither_0_nor_1_is_refused() -> None:
    layout, _ = one("bool", 0)
    with pytest.raises(WireError, match="a boolean that is neither 0 nor 1"):
        summed(layout, [(1, b"\2")])


def test_a_mean_that_its_dtype_cannot_hold_is_the_largest_that_it_can() -> None:
    """Whoever could send a float16 to infinity could end every round that it takes part in."""
    layout, weights = one("float16", 65504)
    assert mean(layout, weights, [(1, one("float16", 30000)[1])]) == weights


# -- what it costs --------------------------------------------------------------------------------------------------


def test_a_round_holds_8_bytes_for_each_float_however_many_updates_come() -> None:
    layout = Layout.of([TensorSpec("w", "float32", (1000,)), TensorSpec("h", "bfloat16", (10,))])
    sums = summed(layout, [(1, bytes(layout.size_bytes))] * 5)
    assert sums.low.nbytes == 8 * 1010
    assert not sums.carried
    assert not sums.largest


def test_only_chunks_with_large_sums_take_a_second_limb() -> None:
    deltas = np.zeros(3 * CHUNK_ITEMS, np.float32)
    deltas[CHUNK_ITEMS + 5] = 2.0**9 + 0.25
    layout = Layout.of([TensorSpec("w", "float32", deltas.shape)])
    assert summed(layout, [(1, deltas.tobytes())]).carried == {1}


def test_the_weights_and_the_updates_are_left_as_they_were() -> None:
    layout, weights = one("float32", 1.0)
    _, update = one("float32", 2.0)
    mean(layout, weights, [(1, update)])
    assert weights == one("float32", 1.0)[1]
    assert update == one("float32", 2.0)[1]


def test_every_rule_can_be_named_in_a_plan() -> None:
    assert RULES["mean"] is MEAN


def test_16_bit_floats_are_rounded_once_from_the_mean() -> None:
    for dtype in ("bfloat16", "float16"):
        layout, weights = one(dtype, 1.0)
        updates = [(1, one(dtype, 2.0**-6)[1]), (2, one(dtype, -(2.0**-7))[1])]
        found = as_float64(view(mean(layout, weights, updates), dtype), dtype)[0]
        assert found == 1.0
