"""Changes of versions: the same bits on both sides, and nothing that is not in the version itself."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from broker.changes import apply_change, encode_change
from broker.errors import WireError
from broker.formats import CHUNK_ITEMS, FORMATS, Format
from broker.tensors import FLOATS, ITEM_BYTES, Layout, TensorSpec, as_float64, from_float64, view

DOWN = [FORMATS[name] for name in ("float32", "bfloat16", "int8")]
ODD = Layout.of(
    [
        *(TensorSpec(f"{dtype}.a", dtype, (7, 3)) for dtype in ITEM_BYTES),
        TensorSpec("float32.b", "float32", (CHUNK_ITEMS + 3,)),
        TensorSpec("float32.none", "float32", (0,)),
        TensorSpec("int8.é", "int8", (2,)),
    ]
)
NUMBERS = arrays.arrays(np.float32, 30, elements=st.floats(-(2.0**100), 2.0**100, width=32))


def version(layout: Layout, seed: int) -> bytearray:
    chance = np.random.default_rng(seed)
    data = bytearray(layout.size_bytes)
    for segment in layout.segments:
        items = view(memoryview(data)[segment.start : segment.stop], segment.dtype)
        if segment.dtype in FLOATS:
            items[:] = from_float64(chance.standard_normal(len(items)), segment.dtype)
        else:
            items[:] = chance.integers(0, 2, len(items))
    return data


def made(fmt: Format, layout: Layout, old: bytearray, new: bytearray) -> tuple[memoryview, bytearray]:
    """The change, and the version that it makes."""
    target = bytearray(new)
    encoded = encode_change(memoryview(old), memoryview(target), layout, fmt, np.random.default_rng(3))
    return encoded, target


@pytest.mark.parametrize("fmt", DOWN)
@pytest.mark.parametrize("layout", [ODD, Layout(()), Layout.of([TensorSpec("n", "int64", ())])])
def test_whoever_has_the_version_before_gets_the_next_to_the_last_bit(layout: Layout, fmt: Format) -> None:
    old, exact = version(layout, 1), version(layout, 2)
    kept = bytes(old)
    encoded, new = made(fmt, layout, old, exact)
    assert old == kept
    assert len(encoded) == fmt.layout(layout).size_bytes
    beside = memoryview(bytearray(b"\xff" * len(old)))
    apply_change(memoryview(old), encoded, layout, fmt, beside)
    assert beside == new
    apply_change(memoryview(old), encoded, layout, fmt, memoryview(old))  # or in its own place
    assert old == new


@pytest.mark.parametrize("fmt", DOWN)
def test_the_version_is_near_the_exact_one_and_its_integers_are_the_exact_ones(fmt: Format) -> None:
    old, exact = version(ODD, 1), version(ODD, 2)
    _, new = made(fmt, ODD, old, exact)
    for segment in ODD.segments:
        part = slice(segment.start, segment.stop)
        if segment.dtype in FLOATS:
            before, want, got = (
                as_float64(view(data[part], segment.dtype), segment.dtype) for data in (old, exact, new)
            )
            assert np.abs(got - want).max() <= np.abs(want - before).max() / 120
        else:
            assert new[part] == exact[part]


def test_the_same_dice_make_the_same_version() -> None:
    old, exact = version(ODD, 1), version(ODD, 2)
    assert made(FORMATS["int8"], ODD, old, exact) == made(FORMATS["int8"], ODD, old, exact)


@given(NUMBERS, NUMBERS)
@settings(max_examples=80, deadline=None)
def test_float32_is_rounded_as_by_way_of_float64(
    a: "np.ndarray[tuple[int], np.dtype[np.float32]]", b: "np.ndarray[tuple[int], np.dtype[np.float32]]"
) -> None:
    layout = Layout.of([TensorSpec("w", "float32", (30,))])
    difference = (b.astype(np.float64) - a).astype(np.float32)
    encoded, new = made(FORMATS["float32"], layout, bytearray(a.tobytes()), bytearray(b.tobytes()))
    assert bytes(encoded) == difference.tobytes()
    assert bytes(new) == (a.astype(np.float64) + difference).astype(np.float32).tobytes()


@pytest.mark.parametrize("fmt", DOWN)
@pytest.mark.parametrize(
    ("dtype", "before", "after"), [("float32", -3e38, 3e38), ("float16", 0, np.nan), ("float32", 0, np.nan)]
)
def test_a_model_that_diverges_is_said_to(fmt: Format, dtype: str, before: float, after: float) -> None:
    layout = Layout.of([TensorSpec("w", dtype, (1,))])
    old, new = (bytearray(from_float64(np.array([value]), dtype).tobytes()) for value in (before, after))
    with pytest.raises(WireError, match="diverged"):
        made(fmt, layout, old, new)


def test_a_change_that_leads_beyond_the_dtype_is_refused() -> None:
    layout, fmt = Layout.of([TensorSpec("w", "float32", (1,))]), FORMATS["float32"]
    encoded = memoryview(from_float64(np.array([3e38]), "float32").tobytes())
    with pytest.raises(WireError, match=r"^a change leads to weights that are not finite: the model has diverged\.$"):
        apply_change(encoded, encoded, layout, fmt, memoryview(bytearray(4)))


@pytest.mark.parametrize("fmt", DOWN)
def test_a_change_beyond_what_a_float16_holds_ends_at_the_largest_there_is(fmt: Format) -> None:
    """One update may take a float16 that far: the round must close all the same, and all must have the same bits."""
    layout = Layout.of([TensorSpec("w", "float16", (2,))])
    old, new = (bytearray(from_float64(np.array([-x, x]), "float16").tobytes()) for x in (60_000.0, 65_504.0))
    before = bytes(old)
    encoded = encode_change(memoryview(old), memoryview(new), layout, fmt, np.random.default_rng(1))
    followed = bytearray(4)
    apply_change(memoryview(before), encoded, layout, fmt, memoryview(followed))
    assert followed == new
    assert np.isfinite(np.frombuffer(new, np.float16)).all()
