"""Layouts: one order for all, every tensor aligned, differences in words; and numbers as bytes, rounded once."""

from fractions import Fraction

import numpy as np
import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from broker.errors import WireError
from broker.tensors import (
    FLOATS,
    ITEM_BYTES,
    NAME_LENGTH_MAX,
    PAYLOAD_BYTES_MAX,
    TENSORS_MAX,
    Layout,
    Segment,
    TensorSpec,
    are_finite,
    as_float64,
    from_float64,
    view,
)

SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)
SPECS = st.lists(
    st.builds(TensorSpec, st.text(min_size=1, max_size=4), st.sampled_from(sorted(ITEM_BYTES)), SHAPES),
    unique_by=lambda spec: spec.name,
    max_size=12,
)


@given(SPECS)
@settings(max_examples=100, deadline=None)
def test_parties_with_the_same_tensors_agree_on_every_place_and_none_overlap(specs: list[TensorSpec]) -> None:
    layout = Layout.of(specs)
    specs.reverse()
    assert Layout.of(specs) == layout
    at = 0
    for spec in layout.specs:
        assert layout.offsets[spec.name] == at
        assert at % ITEM_BYTES[spec.dtype] == 0, f"{spec} is not aligned"
        at += spec.size_bytes
    assert layout.size_bytes == at


@given(SPECS)
@settings(max_examples=100, deadline=None)
def test_segments_cover_the_bytes_without_gaps_and_each_dtype_has_one(specs: list[TensorSpec]) -> None:
    layout = Layout.of(specs)
    dtypes = [segment.dtype for segment in layout.segments]
    assert len(set(dtypes)) == len(dtypes)
    assert set(dtypes) == {spec.dtype for spec in specs if spec.items}
    ends = [0, *(segment.stop for segment in layout.segments)]
    assert [segment.start for segment in layout.segments] == ends[:-1]
    assert ends[-1] == layout.size_bytes


@given(SPECS)
@settings(max_examples=100, deadline=None)
def test_the_order_is_that_of_a_safetensors_file(specs: list[TensorSpec]) -> None:
    layout = Layout.of(specs)
    data = (np.arange(layout.size_bytes) % 251).astype(np.uint8)
    tensors = {
        spec.name: safetensors.TensorSpec(
            dtype=spec.dtype,
            shape=spec.shape,
            data_ptr=data.ctypes.data + layout.offsets[spec.name],
            data_len=spec.size_bytes,
        )
        for spec in reversed(layout.specs)
    }
    file = safetensors.serialize(tensors)
    assert file[8 + int.from_bytes(file[:8], "little") :] == data.tobytes()


def test_larger_items_come_first_then_the_dtype_then_the_name() -> None:
    layout = Layout.of(
        [
            TensorSpec("mask", "bool", (3,)),
            TensorSpec("b", "float32", (2,)),
            TensorSpec("half", "float16", ()),
            TensorSpec("a", "int32", ()),
            TensorSpec("count", "int64", ()),
            TensorSpec("a.weight", "float32", (1, 2)),
        ]
    )
    assert [spec.name for spec in layout.specs] == ["count", "a.weight", "b", "a", "half", "mask"]
    assert layout.segments == (
        Segment("int64", 0, 8),
        Segment("float32", 8, 24),
        Segment("int32", 24, 28),
        Segment("float16", 28, 30),
        Segment("bool", 30, 33),
    )


def test_a_scalar_holds_one_number_and_an_empty_tensor_none() -> None:
    scalar, empty = TensorSpec("s", "float32", ()), TensorSpec("e", "float32", (3, 0, 2))
    assert (scalar.items, scalar.size_bytes) == (1, 4)
    assert (empty.items, empty.size_bytes) == (0, 0)
    assert Layout.of([empty]).segments == ()
    assert Layout(()).size_bytes == 0


def test_the_items_of_every_dtype_are_as_wide_as_torch_has_them() -> None:
    for dtype, item_bytes in ITEM_BYTES.items():
        assert getattr(torch, dtype).itemsize == item_bytes
        assert view(bytes(8), dtype).itemsize == item_bytes


@pytest.mark.parametrize(
    ("specs", "said"),
    [
        ([TensorSpec("w", "complex64", ())], "'w' is 'complex64', which does not travel: take float32."),
        ([TensorSpec("w", "float32", (-1,))], "'w' has an impossible shape"),
        ([TensorSpec("w", "float32", (1,) * 17)], "'w' has an impossible shape"),
        ([TensorSpec("", "float32", ())], "must have 1 to 512 characters"),
        ([TensorSpec("__metadata__", "float32", ())], "and not be __metadata__"),
        ([TensorSpec("\ud800", "float32", ())], "must have 1 to 512 characters"),
        ([TensorSpec("w" * (NAME_LENGTH_MAX + 1), "float32", ())], "must have 1 to 512 characters"),
        ([TensorSpec("w", "float32", ()), TensorSpec("w", "bool", ())], "have the same name"),
        (
            [TensorSpec("w", "int8", (PAYLOAD_BYTES_MAX,)), TensorSpec("b", "int8", ())],
            "over the limit of 1099511627776",
        ),
        ([TensorSpec(str(n), "int8", ()) for n in range(TENSORS_MAX + 1)], "over the limit of 20000"),
    ],
)
def test_tensors_that_do_not_travel_are_refused(specs: list[TensorSpec], said: str) -> None:
    with pytest.raises(WireError, match=said):
        Layout.of(specs)


def test_a_layout_in_another_order_is_refused_when_checked() -> None:
    specs = Layout.of([TensorSpec("a", "float32", ()), TensorSpec("b", "float32", ())]).specs
    with pytest.raises(WireError, match="not in canonical order"):
        Layout(specs[::-1]).check()


def test_a_difference_names_the_first_tensor_that_differs_and_how() -> None:
    def layout(*specs: TensorSpec) -> Layout:
        return Layout.of(specs)

    weight, bias = TensorSpec("weight", "float32", (2, 3)), TensorSpec("bias", "float32", (2,))
    wide, double = TensorSpec("weight", "float32", (2, 4)), TensorSpec("bias", "float64", (2,))
    model = layout(weight, bias)
    assert model.difference(layout(bias, weight)) == ""
    assert model.difference(layout(bias)) == "weight float32[2, 3] is missing"
    assert model.difference(layout(bias, wide)) == "weight float32[2, 4] should be weight float32[2, 3]"
    assert model.difference(layout(double, weight)) == "bias float64[2] should be bias float32[2]"
    assert layout(bias).difference(model) == "weight float32[2, 3] is not part of the model"


# -- numbers --------------------------------------------------------------------------------------------------------


def bfloat16(values: "np.ndarray[tuple[int], np.dtype[np.float64]]") -> torch.Tensor:
    return torch.from_numpy(from_float64(values, "bfloat16")).view(torch.bfloat16)


def test_every_16_bit_pattern_is_widened_as_torch_widens_it() -> None:
    patterns = np.arange(2**16, dtype=np.uint16)
    for dtype in ("bfloat16", "float16"):
        ours = as_float64(view(patterns.tobytes(), dtype), dtype)
        theirs = torch.from_numpy(patterns.copy()).view(getattr(torch, dtype)).double().numpy()
        np.testing.assert_array_equal(ours, theirs)
        back = from_float64(ours, dtype).view(np.uint16)
        finite = np.isfinite(ours)
        np.testing.assert_array_equal(back[finite], patterns[finite])


@given(arrays.arrays(np.float32, 20, elements=st.floats(width=32, allow_nan=True)))
@settings(max_examples=80, deadline=None)
def test_float32_becomes_bfloat16_as_in_torch(values: "np.ndarray[tuple[int], np.dtype[np.float32]]") -> None:
    ours = bfloat16(values.astype(np.float64))
    assert torch.equal(ours.nan_to_num(1.5), torch.from_numpy(values).bfloat16().nan_to_num(1.5))


def test_ties_go_to_the_even_neighbour_in_every_dtype() -> None:
    for dtype, bits in (("float32", 23), ("float16", 10), ("bfloat16", 7)):
        step = 2.0**-bits
        exact = np.array([1 + step / 2, 1 + 3 * step / 2, -(1 + step / 2), 1 + step / 2 + 2.0**-24 * step])
        rounded = as_float64(from_float64(exact, dtype), dtype)
        last = 1.0 if dtype == "bfloat16" else 1 + step  # it rounds by way of float32, as its comment says
        np.testing.assert_array_equal(rounded, [1, 1 + 2 * step, -1, last])


def test_what_is_too_large_for_a_dtype_becomes_infinite_without_a_warning() -> None:
    for dtype, largest in (
        ("float32", 3.4028235677973366e38),
        ("float16", 65520.0),
        ("bfloat16", 3.3961775292304601e38),
    ):
        values = as_float64(from_float64(np.array([largest, -largest, np.nan]), dtype), dtype)
        np.testing.assert_array_equal(values, [np.inf, -np.inf, np.nan])
        below = as_float64(from_float64(np.array([largest * (1 - 1e-6)]), dtype), dtype)
        assert np.isfinite(below).all()


@given(st.floats(width=32, allow_nan=False, allow_infinity=False), st.sampled_from(sorted(FLOATS)))
@settings(max_examples=100, deadline=None)
def test_rounding_gives_the_nearest_value_of_the_dtype(value: float, dtype: str) -> None:
    raw = from_float64(np.array([value, 0.0]), dtype)
    near = as_float64(raw, dtype)[0]
    if not np.isfinite(near):
        return
    pattern = raw.view(f"uint{8 * raw.itemsize}")[0]
    for neighbour in (pattern + 1, max(int(pattern), 1) - 1):
        other = as_float64(view(int(neighbour).to_bytes(raw.itemsize, "little"), dtype), dtype)[0]
        if np.isfinite(other):
            assert abs(Fraction(near) - Fraction(value)) <= abs(Fraction(other) - Fraction(value))


@pytest.mark.parametrize("dtype", sorted(FLOATS))
def test_values_are_widened_and_rounded_into_memory_that_is_there(dtype: str) -> None:
    values = np.array([1.5, -2.0, 3e38])
    raw, wide = from_float64(np.zeros(3), dtype), np.empty(3)
    assert from_float64(values, dtype, out=raw) is raw
    assert as_float64(raw, dtype, out=wide) is wide
    np.testing.assert_array_equal(wide, as_float64(from_float64(values, dtype), dtype))


def test_infinite_values_and_nan_are_found_in_every_dtype() -> None:
    patterns = np.arange(2**16, dtype=np.uint16)
    for dtype in ("bfloat16", "float16"):
        raw = view(patterns.tobytes(), dtype)
        finite = np.isfinite(as_float64(raw, dtype))
        assert are_finite(raw[finite], dtype)
        assert not any(are_finite(raw[place : place + 1], dtype) for place in np.flatnonzero(~finite)[::100])
    for dtype in ("float32", "float64"):
        assert are_finite(view(bytes(8), dtype), dtype)
        assert not are_finite(from_float64(np.array([0.0, np.inf]), dtype), dtype)
        assert not are_finite(from_float64(np.array([np.nan, 0.0]), dtype), dtype)


def test_a_view_shares_its_bytes() -> None:
    data = bytearray(8)
    view(data, "float32")[:] = [1, 2]
    assert bytes(data) == np.array([1, 2], np.float32).tobytes()
