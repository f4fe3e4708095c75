"""Formats: what is decoded, what is left for the next update, and payloads that lie."""

import math
import zlib
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from broker.errors import UsageError, WireError
from broker.formats import (
    BLOCK_ITEMS,
    CHUNK_ITEMS,
    FORMATS,
    KEEP,
    VALUE_MAX,
    Format,
    _rounded,
    count_floats,
    format_of,
    top_k,
)
from broker.tensors import FLOATS, ITEM_BYTES, Layout, TensorSpec, as_float64, from_float64, view

LOSSY = [name for name, fmt in FORMATS.items() if fmt.lossy]
FORMAT = st.sampled_from([*FORMATS.values(), top_k(0.3), top_k(1.0)])
# names that lie before and behind those of the formats' own tensors
NAMES = st.text("aZ.é🐇", min_size=1, max_size=3)
SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
SPECS = st.lists(
    st.builds(TensorSpec, NAMES, st.sampled_from(sorted(ITEM_BYTES)), SHAPES),
    unique_by=lambda spec: spec.name,
    max_size=10,
)
LAYOUTS = SPECS.map(Layout.of)
SEEDS = st.integers(0, 2**32)
WIDE = Layout.of(
    [
        TensorSpec("double", "float64", (1001,)),
        TensorSpec("a", "float32", (CHUNK_ITEMS + 5,)),
        TensorSpec("b", "float32", (3, 700)),
        TensorSpec("scalar", "float32", ()),
        TensorSpec("none", "float32", (0, 4)),
        TensorSpec("brain", "bfloat16", (2 * CHUNK_ITEMS + 1,)),
        TensorSpec("half", "float16", (77,)),
        TensorSpec("count", "int64", ()),
        TensorSpec("code", "int8", (9,)),
        TensorSpec("é", "int8", (3,)),
        TensorSpec("mask", "bool", (5,)),
    ]
)


def dice(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def drawn(model: Layout, seed: int, *, size: float = 1.0) -> bytearray:
    """An update with values of many sizes."""
    chance = np.random.default_rng(seed)
    data = bytearray(model.size_bytes)
    for segment in model.segments:
        items = view(memoryview(data)[segment.start : segment.stop], segment.dtype)
        if segment.dtype in FLOATS:
            values = chance.standard_normal(len(items)) * np.exp2(chance.integers(-12, 3, len(items))) * size
            items[:] = from_float64(values, segment.dtype)
        else:
            items[:] = chance.integers(0, 2, len(items))
    return data


def floats(model: Layout, data: bytes | bytearray) -> NDArray[np.float64]:
    """All floats of raw bytes, in order."""
    found = [
        as_float64(view(memoryview(data)[s.start : s.stop], s.dtype), s.dtype)
        for s in model.segments
        if s.dtype in FLOATS
    ]
    return np.concatenate([np.empty(0), *found])


def packed(
    fmt: Format,
    model: Layout,
    delta: bytes | bytearray,
    *,
    residual: NDArray[np.float32] | None = None,
    seed: int = 0,
) -> memoryview:
    return fmt.pack(model, memoryview(delta), residual=residual, dice=dice(seed))


def decoded(fmt: Format, model: Layout, payload: memoryview) -> NDArray[np.float64]:
    """All floats that the payload tells, zeros for those that it does not."""
    found = np.zeros(count_floats(model))
    for where, values in fmt.runs(model, payload):
        found[where] = values
    return found


def one(*values: float, dtype: str = "float32") -> tuple[Layout, bytes]:
    """One tensor, and its bytes."""
    return Layout.of([TensorSpec("w", dtype, (len(values),))]), from_float64(np.array(values), dtype).tobytes()


def written(fmt: Format, model: Layout, payload: memoryview, name: str) -> NDArray[np.generic]:
    """A tensor of the payload, to be looked at or spoilt."""
    layout = fmt.layout(model)
    spec = next(spec for spec in layout.specs if spec.name == name)
    start = layout.offsets[name]
    return view(payload[start : start + spec.size_bytes], spec.dtype)


# -- all formats ----------------------------------------------------------------------------------------------------


@given(LAYOUTS, FORMAT, SEEDS)
@settings(max_examples=150, deadline=None)
def test_a_payload_lies_as_its_layout_says_and_integers_travel_as_they_are(
    model: Layout, fmt: Format, seed: int
) -> None:
    delta = drawn(model, seed)
    payload = packed(fmt, model, delta, residual=np.zeros(count_floats(model), np.float32))
    layout = fmt.layout(model)
    layout.check()
    assert len(payload) == layout.size_bytes
    assert layout.difference(fmt.layout(Layout(model.specs))) == ""
    back = bytearray(delta)
    for segment, values in fmt.others(model, payload):
        assert segment.dtype not in FLOATS
        view(memoryview(back)[segment.start : segment.stop], segment.dtype)[:] = ~values.astype(bool)
    told = bytearray(model.size_bytes)
    for segment, values in fmt.others(model, payload):
        view(memoryview(told)[segment.start : segment.stop], segment.dtype)[:] = values
    for segment in model.segments:
        if segment.dtype not in FLOATS:  # all of them were told, and rightly
            part = slice(segment.start, segment.stop)
            assert told[part] == delta[part]
            assert (view(back[part], segment.dtype) != view(delta[part], segment.dtype)).all()
    assert decoded(fmt, model, payload).shape == (count_floats(model),)


@pytest.mark.parametrize("name", [*FORMATS, "all"])
def test_runs_are_in_order_and_cross_neither_a_chunk_nor_a_dtype(name: str) -> None:
    fmt = top_k(1.0) if name == "all" else FORMATS[name]
    payload = packed(fmt, WIDE, drawn(WIDE, 1))
    borders = list(range(0, count_floats(WIDE), CHUNK_ITEMS))
    at = 0
    for segment in WIDE.segments:
        if segment.dtype in FLOATS:
            borders.append(at)
            at += (segment.stop - segment.start) // ITEM_BYTES[segment.dtype]
    assert at == count_floats(WIDE)
    before = -1
    for where, values in fmt.runs(WIDE, payload):
        indices = np.arange(at)[where]
        assert len(indices) == len(values) > 0
        assert indices[0] > before
        assert (np.diff(indices) > 0).all()
        before = int(indices[-1])
        assert not any(indices[0] < border <= before for border in borders)
        assert values.dtype == (np.float64 if name == "float32" and before < 1001 else np.float32)
        if isinstance(where, np.ndarray):
            assert where.dtype == np.int64
    assert before == at - 1 or name == "top-k"


@pytest.mark.parametrize("specs", [(), (TensorSpec("n", "int64", (2,)),), (TensorSpec("w", "float32", (0, 3)),)])
@pytest.mark.parametrize("name", FORMATS)
def test_a_model_without_floats_tells_none(name: str, specs: tuple[TensorSpec, ...]) -> None:
    model, fmt = Layout.of(specs), FORMATS[name]
    payload = packed(fmt, model, bytes(model.size_bytes), residual=np.zeros(0, np.float32))
    assert list(fmt.runs(model, payload)) == []
    assert sum(values.nbytes for _, values in fmt.others(model, payload)) == len(payload) == model.size_bytes


@pytest.mark.parametrize("name", FORMATS)
def test_a_payload_can_be_written_in_its_place_even_over_another(name: str) -> None:
    fmt, delta = FORMATS[name], drawn(WIDE, 2)
    into = memoryview(bytearray(b"\xff" * fmt.layout(WIDE).size_bytes))
    given_back = fmt.pack(WIDE, memoryview(delta), residual=None, dice=dice(), into=into)
    assert given_back is into
    assert into == packed(fmt, WIDE, delta)


@pytest.mark.parametrize("name", LOSSY)
def test_a_read_only_delta_is_as_good_and_is_left_as_it_was(name: str) -> None:
    delta = drawn(WIDE, 2)
    kept = bytes(delta)
    packed(FORMATS[name], WIDE, delta, residual=np.ones(count_floats(WIDE), np.float32))
    assert delta == kept
    assert packed(FORMATS[name], WIDE, kept) == packed(FORMATS[name], WIDE, delta)


def test_the_same_dice_give_the_same_bytes_and_others_do_not() -> None:
    delta = drawn(WIDE, 3)
    for name, fmt in FORMATS.items():
        assert packed(fmt, WIDE, delta, seed=1) == packed(fmt, WIDE, delta, seed=1)
        same = packed(fmt, WIDE, delta, seed=1) == packed(fmt, WIDE, delta, seed=2)
        assert same == (name != "int8")


def test_the_bytes_are_those_that_earlier_releases_wrote() -> None:
    model, delta = one(*((n * n % 1001 - 500) / 997 for n in range(3000)))
    sums = {name: zlib.crc32(packed(fmt, model, delta, seed=7)) for name, fmt in FORMATS.items()}
    assert sums == {"float32": 567150180, "bfloat16": 3479658703, "int8": 3292637053, "top-k": 1921821028}


@pytest.mark.parametrize(("name", "ratio"), [("float32", 1), ("bfloat16", 0.5), ("int8", 0.252), ("top-k", 0.0201)])
def test_a_format_costs_the_bytes_that_it_promises(name: str, ratio: float) -> None:
    model = Layout.of([TensorSpec("weight", "float32", (300, 257)), TensorSpec("bias", "float32", (257,))])
    assert FORMATS[name].layout(model).size_bytes <= ratio * model.size_bytes


@pytest.mark.parametrize("name", FORMATS)
def test_tensors_are_named_like_a_formats_own_only_where_it_has_none(name: str) -> None:
    model = Layout.of([TensorSpec("~codes", "float32", (3,)), TensorSpec("~x", "int64", ())])
    if name in ("float32", "bfloat16"):
        assert {spec.name for spec in FORMATS[name].layout(model).specs} == {"~codes", "~x"}
        return
    with pytest.raises(UsageError, match=r"the model's tensor '~x' is named like .* int8 and top-k.*: rename it"):
        FORMATS[name].layout(model)


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1.01 * VALUE_MAX, -1.01 * VALUE_MAX, 1e300])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_what_no_lossy_format_carries_is_refused(name: str, bad: float, dtype: str) -> None:
    model, delta = one(*[0.5] * 2000, bad, *[0.25] * 100, dtype=dtype)
    for residual in (None, np.zeros(2101, np.float32)):
        with pytest.raises(
            WireError, match=r"NaN, infinity or values beyond 8\.5e\+37.*training has diverged there\.$"
        ):
            packed(FORMATS[name], model, delta, residual=residual)


@pytest.mark.parametrize("name", LOSSY)
def test_the_largest_value_that_is_carried_is_decoded_to_something_finite(name: str) -> None:
    model, delta = one(VALUE_MAX, -VALUE_MAX, 1.0)
    residual = np.zeros(3, np.float32)
    found = decoded(FORMATS[name], model, packed(FORMATS[name], model, delta, residual=residual))
    assert np.isfinite(found.astype(np.float32)).all()
    assert np.isfinite(residual).all()
    with pytest.raises(WireError, match="values beyond"):  # what is left is added, too
        packed(FORMATS[name], model, delta, residual=np.full(3, VALUE_MAX, np.float32))


def test_formats_are_found_by_name_and_only_top_k_heeds_keep() -> None:
    model = WIDE
    assert format_of("int8", keep=0.5) is FORMATS["int8"]
    assert format_of("top-k").layout(model) == top_k(KEEP).layout(model)
    assert format_of("top-k", keep=0.5).layout(model) == top_k(0.5).layout(model)


# -- error feedback -------------------------------------------------------------------------------------------------


@given(LAYOUTS, FORMAT, st.lists(SEEDS, min_size=1, max_size=6))
@settings(max_examples=100, deadline=None)
def test_what_was_decoded_and_what_is_left_are_the_sum_of_all_deltas(
    model: Layout, fmt: Format, seeds: list[int]
) -> None:
    count = count_floats(model)
    residual, deltas, told, size = np.zeros(count, np.float32), np.zeros(count), np.zeros(count), np.zeros(count)
    for seed in seeds:
        delta = drawn(model, seed)
        told += decoded(fmt, model, packed(fmt, model, delta, residual=residual, seed=seed))
        deltas += floats(model, delta)
        size += np.abs(floats(model, delta))
    assert (np.abs(told + residual - deltas) <= 4 * len(seeds) * 2.0**-24 * size.sum(initial=0)).all()


@pytest.mark.parametrize("name", LOSSY)
def test_nothing_is_left_of_16_bit_tensors_in_bfloat16_and_little_in_the_others(name: str) -> None:
    residual = np.zeros(count_floats(WIDE), np.float32)
    delta = drawn(WIDE, 5)
    told = decoded(FORMATS[name], WIDE, packed(FORMATS[name], WIDE, delta, residual=residual))
    np.testing.assert_allclose(told + residual, floats(WIDE, delta), rtol=1e-6, atol=1e-7)
    sixteen_bits = 1001 + CHUNK_ITEMS + 5 + 2100 + 1
    assert residual[:sixteen_bits].any()
    assert residual[sixteen_bits:].any() == (name != "bfloat16")


@pytest.mark.parametrize("name", LOSSY)
def test_without_a_residual_an_update_is_written_as_with_zeros(name: str) -> None:
    delta = drawn(WIDE, 6)
    residual = np.zeros(count_floats(WIDE), np.float32)
    assert packed(FORMATS[name], WIDE, delta) == packed(FORMATS[name], WIDE, delta, residual=residual)


def test_a_small_delta_is_told_late_but_told() -> None:
    model, delta = one(1.0, 1e-3, 0.0)
    fmt, residual, told = top_k(0.3), np.zeros(3, np.float32), np.zeros(3)
    for _ in range(1001):
        told += decoded(fmt, model, packed(fmt, model, delta, residual=residual))
    assert told[1] > 0.9
    assert decoded(fmt, model, packed(fmt, model, delta))[1] == 0


# -- float32 --------------------------------------------------------------------------------------------------------


def test_in_float32_the_payload_is_the_update_itself_and_runs_are_views_of_it() -> None:
    fmt, delta = FORMATS["float32"], memoryview(drawn(WIDE, 4))
    residual = np.ones(count_floats(WIDE), np.float32)
    assert fmt.layout(WIDE) is WIDE
    assert fmt.pack(WIDE, delta, residual=residual, dice=dice()) is delta
    assert (residual == 1).all()
    np.testing.assert_array_equal(decoded(fmt, WIDE, delta), floats(WIDE, bytes(delta)))
    for where, values in fmt.runs(WIDE, delta):
        assert isinstance(where, slice)
        wide = where.start < 1001 + CHUNK_ITEMS + 5 + 2100 + 1
        assert np.shares_memory(values, np.frombuffer(delta, np.uint8)) == wide


# -- bfloat16 -------------------------------------------------------------------------------------------------------


TIES = st.sampled_from([1 + n * 2.0**-8 for n in range(-8, 9)])


@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32) | TIES, min_size=1, max_size=40))
@settings(max_examples=80, deadline=None)
def test_bfloat16_rounds_as_torch_does(values: list[float]) -> None:
    model, delta = one(*values)
    found = decoded(FORMATS["bfloat16"], model, packed(FORMATS["bfloat16"], model, delta))
    np.testing.assert_array_equal(found, torch.tensor(values, dtype=torch.float32).bfloat16().double().numpy())


def test_in_bfloat16_tensors_keep_their_names_and_shapes() -> None:
    found = {spec.name: spec for spec in FORMATS["bfloat16"].layout(WIDE).specs}
    assert found["double"] == TensorSpec("double", "bfloat16", (1001,))
    assert found["none"] == TensorSpec("none", "bfloat16", (0, 4))
    assert found["half"] == TensorSpec("half", "float16", (77,))
    assert set(found) == {spec.name for spec in WIDE.specs}


# -- int8 -----------------------------------------------------------------------------------------------------------

INT8 = FORMATS["int8"]


def every_throw(throws: NDArray[np.uint16]) -> np.random.Generator:
    """Dice that throw these numbers, whatever is asked for."""

    def random_raw(count: int) -> NDArray[np.uint64]:
        return np.resize(throws, 4 * count).view(np.uint64)

    return cast("np.random.Generator", SimpleNamespace(bit_generator=SimpleNamespace(random_raw=random_raw)))


@given(st.floats(-127, 127, width=32) | st.sampled_from([127.0, -127.0, 0.0, 2.0**-149, -(2.0**-149), 126.99999]))
@settings(max_examples=60, deadline=None)
def test_the_mean_over_all_throws_is_the_value_itself(value: float) -> None:
    found = _rounded(np.full(2**16, value, np.float32), every_throw(np.arange(2**16, dtype=np.uint16)))
    assert abs(found.astype(np.float64).mean() - np.float32(value)) <= 2.0**-17 * (1 + 2.0**-6)
    assert np.abs(found).max() <= 127
    assert found.max() - found.min() <= 1
    if abs(value) < 2.0**-17 or value == int(value):
        assert (found == value).all() or not found.any()


def test_the_mean_over_many_dice_is_the_value_itself() -> None:
    values = np.random.default_rng(0).uniform(-1, 1, 500)
    model, delta = one(*values)
    rolled = dice()
    told = [decoded(INT8, model, INT8.pack(model, memoryview(delta), residual=None, dice=rolled)) for _ in range(400)]
    scale = np.abs(values).max() / 127
    error = np.mean(told, axis=0) - values.astype(np.float32)
    assert np.abs(error).max() < 5 * scale * 0.5 / math.sqrt(400)  # five sigma, of 500 floats
    assert abs(error.mean()) < 5 * scale * 0.5 / math.sqrt(400 * 500)


@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=60), SEEDS)
@settings(max_examples=100, deadline=None)
def test_a_code_is_one_of_the_two_beside_the_value_and_never_beyond_127(values: list[float], seed: int) -> None:
    model, delta = one(*values)
    payload = packed(INT8, model, delta, seed=seed)
    scale = float(written(INT8, model, payload, "~scales").astype(np.float64)[0])
    codes = written(INT8, model, payload, "~codes").astype(np.int64)
    assert np.abs(codes).max() <= 127
    assert (scale == 0) == (not np.any(values))
    exact = floats(model, delta)
    assert (np.abs(scale * codes - exact) <= scale * (1 + 2.0**-16)).all()
    np.testing.assert_array_equal(decoded(INT8, model, payload), (np.float32(scale) * codes).astype(np.float32))


def test_blocks_of_zeros_and_of_the_smallest_numbers_divide_by_nothing() -> None:
    tiny = 2.0**-149
    model, delta = one(*[0.0] * BLOCK_ITEMS, *[tiny, -tiny, 0.0] * 341, 0.0, 3 * tiny, 1.0)
    residual = np.zeros(count_floats(model), np.float32)
    payload = packed(INT8, model, delta, residual=residual)
    scales = written(INT8, model, payload, "~scales").view(np.float32)
    assert scales[0] == 0
    assert 0 < scales[1] <= 2 * tiny
    found = decoded(INT8, model, payload)
    assert (found[:BLOCK_ITEMS] == 0).all()
    np.testing.assert_allclose(
        found[BLOCK_ITEMS : 2 * BLOCK_ITEMS], floats(model, delta)[BLOCK_ITEMS:-2], atol=2 * tiny
    )
    np.testing.assert_array_equal(found + residual, floats(model, delta))


def test_a_tensor_does_not_share_a_scale_with_its_neighbour() -> None:
    specs = [TensorSpec(name, "float32", (3,)) for name in ("bias", "variance", "weight")]
    model = Layout.of(specs)
    delta = np.array([1e-3, 2e-3, 1e-4, 1e6, 2e6, -1e5, 1e-2, 2e-2, 3e-2], np.float32).tobytes()
    assert INT8.layout(model).specs[0] == TensorSpec("~scales", "float32", (3,))
    found = decoded(INT8, model, packed(INT8, model, delta))
    for part in (slice(0, 3), slice(3, 6), slice(6, 9)):
        exact = floats(model, delta)[part]
        assert np.abs(found[part] - exact).max() <= np.abs(exact).max() / 126


@pytest.mark.parametrize("lie", [np.nan, np.inf, -np.inf, -1e-9, 2.0**121])
def test_a_scale_that_lies_is_refused_before_anything_is_told(lie: float) -> None:
    payload = packed(INT8, WIDE, drawn(WIDE, 8))
    written(INT8, WIDE, payload, "~scales").view(np.float32)[-1] = lie
    with pytest.raises(WireError, match=r"^an int8 payload has a scale that is not within 0 and 1\.3e\+36\.$"):
        next(INT8.runs(WIDE, payload))


def test_codes_that_no_worker_writes_are_finite_all_the_same() -> None:
    model, delta = one(1.0, 1.0)
    payload = packed(INT8, model, delta)
    written(INT8, model, payload, "~scales").view(np.float32)[:] = 2.0**120
    written(INT8, model, payload, "~codes").view(np.int8)[:] = -128
    assert np.isfinite(decoded(INT8, model, payload)).all()


# -- top-k ----------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.floats(-9, 9, width=16) | st.sampled_from([0.0, 1.0, -1.0]), min_size=1, max_size=60),
    st.floats(0.001, 1),
)
@settings(max_examples=100, deadline=None)
def test_the_largest_travel_and_of_equal_ones_the_first(values: list[float], keep: float) -> None:
    model, delta = one(*values)
    fmt, residual = top_k(keep), np.zeros(len(values), np.float32)
    payload = packed(fmt, model, delta, residual=residual)
    k = min(len(values), max(1, math.ceil(keep * len(values))))
    best = sorted(sorted(range(len(values)), key=lambda n: (-abs(values[n]), n))[:k])
    assert written(fmt, model, payload, "~indices").astype(np.int64).tolist() == best
    expected = [value if n in best else 0 for n, value in enumerate(values)]
    np.testing.assert_array_equal(decoded(fmt, model, payload), expected)
    np.testing.assert_array_equal(residual, [0 if n in best else value for n, value in enumerate(values)])


@pytest.mark.parametrize(
    "lie",
    [
        pytest.param([3, 3, 5], id="twice"),
        pytest.param([3, 2, 5], id="falling"),
        pytest.param([-1, 2, 5], id="negative"),
        pytest.param([3, 4, 9], id="outside"),
        pytest.param([2**31 - 1, -(2**31), 5], id="whose difference overflows"),
    ],
)
def test_indices_that_lie_are_refused_before_anything_is_told(lie: list[int]) -> None:
    model, delta = one(*range(9))
    fmt = top_k(1 / 3)
    payload = packed(fmt, model, delta)
    assert [run.where.tolist() for run in fmt.runs(model, payload)] == [[6, 7, 8]]  # type: ignore[union-attr]  # no slice
    written(fmt, model, payload, "~indices")[:] = lie
    with pytest.raises(WireError, match=r"^a top-k payload has indices that are not increasing, or are outside"):
        next(fmt.runs(model, payload))
