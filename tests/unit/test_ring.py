"""Updates as words: what a sum of words says is what the updates say, and what cannot be a sum is refused before."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from broker.errors import UsageError, WireError
from broker.formats import FORMATS
from broker.ring import ADDENDS_MAX, EXAMPLES_MAX, Form, Ring, counted, encode, ring_of
from broker.tensors import FLOATS, ITEM_BYTES, Layout, TensorSpec, from_float64, view
from coordinator.aggregation import MEAN, Sums
from coordinator.unmasking import into_sums
from tests.summed import finished

EVERY_DTYPE = Layout.of(TensorSpec(f"a_{dtype}", dtype, (3,)) for dtype in ITEM_BYTES)
FLOATS_ONLY = Layout.of([TensorSpec("w", "float32", (4,)), TensorSpec("b", "float64", (2,))])
NONE = np.zeros(0, np.int64)
RINGS = [ring_of(bits, clip=2.0, examples_max=1000, cohort=8) for bits in (32, 64)]


def update(layout: Layout, floats: NDArray[np.float64], others: NDArray[np.int64]) -> bytes:
    """Bytes in which all floats, and all others, come from these in turn."""
    data, f, o = bytearray(layout.size_bytes), 0, 0
    for segment in layout.segments:
        items = view(memoryview(data)[segment.start : segment.stop], segment.dtype)
        if segment.dtype in FLOATS:
            items[:] = from_float64(floats[f : f + len(items)], segment.dtype)
            f += len(items)
        else:
            items[:] = others[o : o + len(items)].astype(segment.dtype)
            o += len(items)
    return bytes(data)


def add_up(form: Form, updates: list[tuple[int, bytes, float]]) -> NDArray[np.unsignedinteger]:
    total = np.zeros(form.words, form.ring.dtype)
    for examples, data, loss in updates:
        total += encode(form, memoryview(data), examples=examples, metrics={"loss": loss, "more": 1.0})
    return total


def next_version(form: Form, updates: list[tuple[int, bytes, float]], weights: bytes) -> bytes:
    sums = Sums(form.model, FORMATS["float32"])
    into_sums(form, add_up(form, updates), len(updates), sums)
    return bytes(finished(MEAN, sums, memoryview(weights)))


@st.composite
def many_updates(draw: st.DrawFn) -> list[tuple[int, bytes, float]]:
    found = []
    for _ in range(draw(st.integers(1, 8))):
        floats = np.array(draw(st.lists(st.floats(-0.5, 0.5), min_size=12, max_size=12)))
        others = np.array(draw(st.lists(st.integers(0, 1), min_size=18, max_size=18)))
        found.append((draw(st.integers(1, 1000)), update(EVERY_DTYPE, floats, others), draw(st.floats(-50, 50))))
    return found


@pytest.mark.parametrize("ring", RINGS, ids=["32", "64"])
@settings(max_examples=15, deadline=None)
@given(updates=many_updates())
def test_the_mean_is_that_of_the_plain_sum_but_for_the_grid(
    ring: Ring, updates: list[tuple[int, bytes, float]]
) -> None:
    form, weights = Form(ring, EVERY_DTYPE, ("loss",)), bytes(EVERY_DTYPE.size_bytes)
    plain = MEAN.init(EVERY_DTYPE, FORMATS["float32"])
    for examples, data, _ in updates:
        MEAN.add(plain, examples, memoryview(data))
    told, found = finished(MEAN, plain, memoryview(weights)), next_version(form, updates, weights)
    examples = sum(each for each, _, _ in updates)
    step = len(updates) / 2 / ring.scale / examples
    for segment in EVERY_DTYPE.segments:
        ours, theirs = (view(memoryview(data)[segment.start : segment.stop], segment.dtype) for data in (found, told))
        if segment.dtype in ("float32", "float64"):
            assert np.abs(ours.astype(float) - theirs.astype(float)).max() <= step + 2.0**-23
    seen = counted(form, add_up(form, updates), len(updates))
    assert seen.examples == examples
    loss = sum(each * value for each, _, value in updates) / examples
    assert seen.metrics == {"loss": pytest.approx(loss, abs=len(updates) * 2.0**-17 / examples + 1e-12)}


def test_a_ring_of_64_bits_with_room_enough_gives_the_plain_sums_own_bits() -> None:
    ring = ring_of(64, clip=1.0, examples_max=20, cohort=4)
    assert ring.scale == 2.0**52
    form, dice = Form(ring, FLOATS_ONLY), np.random.default_rng(3)
    updates = [(n, update(FLOATS_ONLY, dice.uniform(-0.4, 0.4, 6), NONE), 0.0) for n in (1, 7, 20)]
    plain = MEAN.init(FLOATS_ONLY, FORMATS["float32"])
    for examples, data, _ in updates:
        MEAN.add(plain, examples, memoryview(data))
    weights = update(FLOATS_ONLY, dice.uniform(-1, 1, 6), NONE)
    assert next_version(form, updates, weights) == finished(MEAN, plain, memoryview(weights))


@pytest.mark.parametrize(("bits", "cohort"), [(32, 3), (32, 1000), (64, 3), (64, ADDENDS_MAX)])
def test_the_largest_updates_of_a_full_cohort_do_not_wrap(bits: int, cohort: int) -> None:
    ring = ring_of(bits, clip=0.5, examples_max=30, cohort=cohort)
    form = Form(ring, FLOATS_ONLY)
    for sign in (1, -1):
        data = update(FLOATS_ONLY, np.array([sign * ring.limit, 0, 0, 0, 0, 0]), NONE)
        total = encode(form, memoryview(data), examples=30, metrics={}) * np.asarray(cohort, ring.dtype)
        sums = Sums(FLOATS_ONLY, FORMATS["float32"])
        into_sums(form, total, cohort, sums)
        mean = np.frombuffer(finished(MEAN, sums, memoryview(bytes(FLOATS_ONLY.size_bytes))), np.float64, 2)
        assert mean == pytest.approx([sign * ring.limit, 0], rel=1e-5)
        assert counted(form, total, cohort).examples == 30 * cohort


def test_the_grid_is_the_finest_for_which_there_is_room() -> None:
    for bits, cohort, examples_max in ((32, 10, 1000), (32, 100, 50), (64, 7, 12345)):
        ring = ring_of(bits, clip=0.3, examples_max=examples_max, cohort=cohort)
        largest = cohort * (examples_max * 0.3 * ring.scale + 1)
        assert largest < 2 ** (bits - 1) <= 2.05 * largest


def test_a_clip_at_the_edge_of_its_grid_leaves_room_for_what_float64_rounds() -> None:
    layout = Layout.of([TensorSpec("w", "float64", (1,))])
    for cohort in range(3, 40):
        for examples in (1, 3, 7, 1000):
            clip = (2**63 - 1) / (cohort * examples * 2.0**40) / (1 + 2.0**-9)
            ring = ring_of(64, clip=clip, examples_max=examples, cohort=cohort)
            assert ring.scale in (2.0**39, 2.0**40)
            data = np.array([ring.limit]).tobytes()
            (word, *_) = encode(Form(ring, layout), memoryview(data), examples=examples, metrics={}).tolist()
            assert cohort * word < 2**63


def test_a_contribution_is_rounded_once_to_the_nearest_step() -> None:
    layout, ring = Layout.of([TensorSpec("w", "float64", (6,))]), RINGS[0]
    steps = np.array([0.5, 1.5, -2.5, 0.49, -0.75, 7.0])
    data = (steps / ring.scale / 3).tobytes()
    form = Form(ring, layout)
    assert form.signed(encode(form, memoryview(data), examples=3, metrics={}))[:6].tolist() == [0, 2, -2, 0, -1, 7]


def test_integers_and_booleans_become_the_mean_of_the_workers_rounded_halves_up() -> None:
    layout = Layout.of(
        [TensorSpec("count", "int64", (4,)), TensorSpec("small", "uint8", (1,)), TensorSpec("on", "bool", (2,))]
    )
    others = (
        [10, -3, 2**62, -(2**63), 255, 1, 0],
        [11, -4, 2**62, -(2**63), 255, 1, 1],
        [10, -4, 2**62, -(2**63), 255, 0, 0],
    )
    updates = [
        (n, update(layout, np.zeros(0), np.array(each, np.int64)), 0.0)
        for n, each in zip((1, 500, 2), others, strict=True)
    ]
    form = Form(RINGS[0], layout)
    found = next_version(form, updates, bytes(layout.size_bytes))
    assert np.frombuffer(found, np.int64, 4).tolist() == [10, -4, 2**62, -(2**63)]
    assert list(found[32:]) == [255, 1, 0]
    two = next_version(form, updates[:2], bytes(layout.size_bytes))
    assert np.frombuffer(two, np.int64, 2).tolist() == [11, -3]
    assert list(two[33:]) == [1, 1]


def test_more_examples_than_the_plan_takes_count_as_that_many() -> None:
    form, data = Form(RINGS[0], FLOATS_ONLY), update(FLOATS_ONLY, np.full(6, 0.25), NONE)
    many, most = (encode(form, memoryview(data), examples=n, metrics={}) for n in (10**6, 1000))
    assert (many == most).all()
    assert counted(form, many, 1).examples == 1000


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 2.1])
@pytest.mark.parametrize("place", [0, 5])
def test_what_is_not_finite_or_not_clipped_is_refused_before_it_is_masked(value: float, place: int) -> None:
    floats = np.zeros(6)
    floats[place] = value
    data = update(FLOATS_ONLY, floats, NONE)
    with pytest.raises(WireError, match="NaN or infinity" if not math.isfinite(value) else "over the limit of 2"):
        encode(Form(RINGS[0], FLOATS_ONLY), memoryview(data), examples=1, metrics={})


@pytest.mark.parametrize("metrics", [{}, {"loss": math.nan}, {"loss": math.inf}])
def test_a_metric_that_the_sum_holds_must_be_there_and_finite(metrics: dict[str, float]) -> None:
    data = bytes(FLOATS_ONLY.size_bytes)
    with pytest.raises(WireError, match="metric 'loss'"):
        encode(Form(RINGS[0], FLOATS_ONLY, ("loss",)), memoryview(data), examples=1, metrics=metrics)


def test_a_metric_out_of_all_bounds_counts_as_the_bound() -> None:
    form = Form(RINGS[0], FLOATS_ONLY, ("loss",))
    words = encode(form, memoryview(bytes(FLOATS_ONLY.size_bytes)), examples=3, metrics={"loss": -1e30})
    assert counted(form, words, 1).metrics == {"loss": -(2.0**16)}


@pytest.mark.parametrize(
    ("settled", "said"),
    [
        ({"clip": 0.0}, "clip is 0: set it above 0"),
        ({"clip": math.nan}, "clip is nan"),
        ({"clip": math.inf}, "clip is inf"),
        ({"clip": -1.0}, "clip is -1"),
        ({"clip": 1e-320}, "clip is 9.99989e-321"),
        ({"bits": 48}, "have 32 or 64 bits, not 48"),
        ({"examples_max": EXAMPLES_MAX}, "too small for 10 workers.*set ring_bits to 64"),
        ({"examples_max": 0}, "examples_max within 1"),
        ({"cohort": ADDENDS_MAX + 1}, "at most 32768 workers"),
        ({"cohort": ADDENDS_MAX}, "too small for 32768 workers"),
        ({"bits": 64, "examples_max": EXAMPLES_MAX, "clip": 1e10}, "of 64 bits is too small"),
    ],
)
def test_a_ring_that_cannot_hold_the_plan_is_refused_by_arithmetic(settled: dict[str, float], said: str) -> None:
    plan = {"bits": 32, "clip": 1.0, "examples_max": 10_000, "cohort": 10, **settled}
    with pytest.raises(UsageError, match=said):
        ring_of(
            int(plan["bits"]), clip=plan["clip"], examples_max=int(plan["examples_max"]), cohort=int(plan["cohort"])
        )


def test_words_are_written_where_they_are_wanted_and_as_a_payload_says() -> None:
    for ring in RINGS:
        form = Form(ring, EVERY_DTYPE, ("loss",))
        data = update(EVERY_DTYPE, np.linspace(-2, 2, 12), np.ones(18, np.int64))
        room = memoryview(bytearray(form.layout.size_bytes))
        words = encode(form, memoryview(data), examples=9, metrics={"loss": 0.5}, into=room)
        assert (
            bytes(room)
            == words.tobytes()
            == encode(form, memoryview(data), examples=9, metrics={"loss": 0.5}).tobytes()
        )
        assert [spec.name for spec in form.layout.specs] == ["~masked"]


@pytest.mark.parametrize("bits", [32, 64])
def test_whatever_one_worker_sends_a_sum_moves_the_model_no_further_than_all_clips_together(bits: int) -> None:
    """Four are honest. The fifth sends floats as dice fall, an update of one and a half clips, or other examples."""
    model = Layout.of([TensorSpec("w", "float32", (1000,))])
    form, dice = Form(ring_of(bits, clip=1.0, examples_max=100, cohort=5), model), np.random.default_rng(bits)
    deltas = dice.normal(size=(5, 1000)) * np.array([[1], [1], [1], [1], [-9]])
    deltas /= np.linalg.norm(deltas, axis=1, keepdims=True)
    words = [encode(form, memoryview(each.astype("f4").tobytes()), examples=50, metrics={}) for each in deltas]
    honest, liar, sums = sum(words[1:4], words[0]), words[4], Sums(model, FORMATS["float32"])
    assert into_sums(form, honest + liar, 5, sums).examples == 250
    wild, long, many, none = (liar.copy() for _ in range(4))
    wild[:1000] = dice.integers(0, 2**bits, 1000, liar.dtype.type)
    long[:1000] = np.rint(deltas[4] * 260 * form.ring.scale).astype(f"i{bits // 8}").view(liar.dtype)
    many[1000] = 301 + 2**15
    none[1000] = 2**bits - 198
    for lie in (wild, long * 2, many, none):
        with pytest.raises(WireError, match="do not add up to updates"):
            into_sums(form, honest + lie, 5, sums)


def test_words_that_are_no_sum_of_updates_are_found_out() -> None:
    form, sums = Form(RINGS[0], FLOATS_ONLY), Sums(FLOATS_ONLY, FORMATS["float32"])
    noise = np.random.default_rng(0).integers(0, 2**32, form.words, dtype=np.uint32)
    with pytest.raises(WireError, match="do not add up to updates"):
        into_sums(form, noise, 3, sums)
