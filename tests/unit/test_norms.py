"""The norm of an update: measured as it will be decoded, and brought down to a bound in every format."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.errors import WireError
from broker.formats import CHUNK_ITEMS, FORMATS, count_floats
from broker.norms import SLACK, clip, squares
from broker.tensors import Layout, TensorSpec, as_float64, view
from coordinator.aggregation import MEAN

MODEL = Layout.of(
    [
        TensorSpec("w", "float32", (CHUNK_ITEMS + 5_000,)), TensorSpec("wide", "float64", (7,)),
        TensorSpec("half", "float16", (300,)), TensorSpec("brain", "bfloat16", (300,)),
        TensorSpec("n", "int64", (3,)),
    ]
)  # fmt: skip


def some_delta(seed: int, size: float, model: Layout = MODEL) -> bytearray:
    """Deltas of about this size each, and integers that count for nothing."""
    dice, delta = np.random.default_rng(seed), bytearray(model.size_bytes)
    for segment in model.segments:
        items = view(memoryview(delta)[segment.start : segment.stop], segment.dtype)
        if segment.dtype == "int64":
            items[:] = 2**40
            continue
        x = dice.standard_normal(len(items)) * size
        items[:] = (x.astype(np.float32).view(np.uint32) >> 16) if segment.dtype == "bfloat16" else x
    return delta


def norm(name: str, payload: memoryview, model: Layout = MODEL) -> float:
    return math.sqrt(squares(FORMATS[name].runs(model, payload)))


def packed(name: str, delta: bytearray, model: Layout = MODEL) -> memoryview:
    residual = np.zeros(count_floats(model), np.float32) if FORMATS[name].lossy else None
    return FORMATS[name].pack(model, memoryview(delta), residual=residual, dice=np.random.default_rng(1))


def test_the_norm_is_that_of_all_floats_together_and_of_no_integer() -> None:
    delta = some_delta(1, 0.25)
    floats = [s for s in MODEL.segments if s.dtype != "int64"]
    all_ = np.concatenate([as_float64(view(delta[s.start : s.stop], s.dtype), s.dtype) for s in floats])
    assert norm("float32", memoryview(delta)) == pytest.approx(float(np.linalg.norm(all_)), rel=1e-12)


@pytest.mark.parametrize("name", list(FORMATS))
@pytest.mark.parametrize("most", [1e-30, 1e-6, 0.01, 1.0, 50.0])
def test_what_was_clipped_is_no_longer_than_the_bound_in_any_format_and_hardly_shorter(
    name: str, most: float
) -> None:
    payload = packed(name, some_delta(2, 1.0))
    before = norm(name, payload)
    assert clip(FORMATS[name], MODEL, payload, most) == before > most
    after = norm(name, payload)
    assert after <= most * (1 + 1e-6)  # a product of two float32 may be rounded up
    if most >= 0.01:  # below that, the steps of 16-bit floats are coarser than the deltas
        assert after >= most * 0.99


@pytest.mark.parametrize("name", list(FORMATS))
def test_what_is_within_the_bound_keeps_its_bits(name: str) -> None:
    payload = packed(name, some_delta(3, 1e-3))
    before = bytes(payload)
    clip(FORMATS[name], MODEL, payload, 100.0)
    assert payload == before


def test_clipping_keeps_the_direction_and_the_integers() -> None:
    model = Layout.of([TensorSpec("w", "float32", (4,)), TensorSpec("n", "int64", ())])
    delta = bytearray(np.array([30, -40, 0, 0], "<f4").tobytes())
    delta = bytearray(np.int64(9).tobytes()) + delta
    clip(FORMATS["float32"], model, memoryview(delta), 5.0)
    assert delta[:8] == np.int64(9).tobytes()
    assert np.frombuffer(delta[8:], "<f4").tolist() == pytest.approx([3, -4, 0, 0])


@pytest.mark.parametrize("name", list(FORMATS))
def test_the_same_delta_is_clipped_to_the_same_bits(name: str) -> None:
    payloads = [packed(name, some_delta(4, 3.0)) for _ in range(2)]
    for payload in payloads:
        clip(FORMATS[name], MODEL, payload, 1.0)
    assert payloads[0] == payloads[1]


def test_a_delta_whose_squares_are_beyond_all_numbers_becomes_nothing() -> None:
    model = Layout.of([TensorSpec("w", "float64", (2,))])
    delta = memoryview(bytearray(np.array([1e300, -1e200]).tobytes()))
    assert clip(FORMATS["float32"], model, delta, 1.0) == math.inf
    assert not np.frombuffer(delta).any()


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(list(FORMATS)), st.integers(0, 2**32), st.floats(1e-12, 1e12), st.floats(1e-9, 1e9),
    st.integers(0, 40),
)  # fmt: skip
def test_whatever_was_clipped_is_taken_by_the_sum(name: str, seed: int, size: float, most: float, items: int) -> None:
    """Property: a worker that keeps to the clip is never refused for it, in no format, at no scale."""
    model = Layout.of([TensorSpec("w", "float32", (items,)), TensorSpec("v", "float64", (1,))])
    payload = packed(name, some_delta(seed, size, model), model)
    clip(FORMATS[name], model, payload, most)
    sums = MEAN.init(model, FORMATS[name], clip=most)
    MEAN.add(sums, 1, payload)
    assert sums.updates == 1


@pytest.mark.parametrize("name", list(FORMATS))
def test_the_sum_refuses_what_is_above_the_bound_and_says_both_numbers(name: str) -> None:
    payload = packed(name, some_delta(5, 1.0))
    found = norm(name, payload)
    sums = MEAN.init(MODEL, FORMATS[name], clip=found / (1 + 2 * SLACK))
    with pytest.raises(WireError, match=f"its norm is {found:.6g}, and the plan allows {sums.clip:.6g}"):
        MEAN.add(sums, 3, payload)
    assert (sums.updates, sums.examples, sums.bounds, sums.largest) == (0, 0, {}, {})
    sums.clip = found / (1 + SLACK / 2)
    MEAN.add(sums, 3, payload)
    assert sums.updates == 1
