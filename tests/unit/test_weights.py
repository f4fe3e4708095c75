"""Weights as bytes: every dtype, every shape, strict about which tensors, and exact."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from broker.errors import LearnerFailed, UsageError
from broker.tensors import FLOATS, ITEM_BYTES, Layout, TensorSpec, as_float64, view
from workers import weights

SPECS = st.lists(
    st.tuples(
        st.text("abcxyz_", min_size=1, max_size=5),
        st.sampled_from(sorted(ITEM_BYTES)),
        st.lists(st.integers(0, 3), max_size=3).map(tuple),
    ),
    unique_by=lambda spec: spec[0],
    max_size=6,
)


def module(tensors: dict[str, Tensor]) -> nn.Module:
    made = nn.Module()
    for name, tensor in tensors.items():
        made.register_buffer(name, tensor)
    return made


def drawn(dtype: str, shape: tuple[int, ...]) -> Tensor:
    kind = weights.DTYPES[dtype]
    return torch.randn(shape).to(kind) if dtype in FLOATS else torch.randint(0, 100, shape).to(kind)


def same(one: nn.Module, other: nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@given(SPECS)
@settings(max_examples=60, deadline=None)
def test_weights_read_and_loaded_are_the_same_weights(specs: list[tuple[str, str, tuple[int, ...]]]) -> None:
    source = module({f"t{name}": drawn(dtype, shape) for name, dtype, shape in specs})
    target = module({f"t{name}": drawn(dtype, shape) for name, dtype, shape in specs})
    layout = weights.layout_of(source)
    data = weights.read(source, layout)
    assert len(data) == layout.size_bytes
    for form in (data, bytes(data), memoryview(data), memoryview(data).toreadonly()):
        weights.load(target, layout, form)
        assert same(source, target)
    unchanged = weights.delta(target, layout, data)
    floats = [s for s in layout.segments if s.dtype in FLOATS]
    assert not any(any(unchanged[s.start : s.stop]) for s in floats)


def test_bytes_lie_where_the_layout_says_for_those_who_have_no_torch() -> None:
    model = module({"w": torch.tensor([1.5, -2.0], dtype=torch.bfloat16), "n": torch.tensor(7)})
    layout = weights.layout_of(model)
    data = bytes(weights.read(model, layout))
    found = {s.name: data[layout.offsets[s.name] :][: s.size_bytes] for s in layout.specs}
    assert as_float64(view(found["w"], "bfloat16"), "bfloat16").tolist() == [1.5, -2.0]
    assert view(found["n"], "int64").tolist() == [7]


def test_the_delta_of_floats_is_a_difference_and_of_all_else_the_trained_value() -> None:
    model = module({"w": torch.tensor([1.0, 2.0]), "seen": torch.tensor(3), "on": torch.tensor([True, False])})
    layout = weights.layout_of(model)
    received = weights.read(model, layout)
    weights.load(model, layout, received)
    model.load_state_dict({"w": torch.tensor([1.5, 1.0]), "seen": torch.tensor(7), "on": torch.tensor([False, True])})
    change = module({"w": torch.zeros(2), "seen": torch.tensor(0), "on": torch.tensor([True, True])})
    weights.load(change, layout, weights.delta(model, layout, received))
    state = change.state_dict()
    assert state["w"].tolist() == [0.5, -1.0]
    assert state["seen"].item() == 7
    assert state["on"].tolist() == [False, True]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_narrow_delta_is_taken_wide_and_rounded_once(dtype: torch.dtype) -> None:
    before, after = torch.randn(1000).to(dtype), torch.randn(1000).to(dtype)
    model = module({"w": before.clone()})
    layout = weights.layout_of(model)
    received = weights.read(model, layout)
    model.w = after.clone()
    changed = weights.delta(model, layout, received)
    weights.load(model, layout, changed)
    assert torch.equal(model.state_dict()["w"], (after.float() - before.float()).to(dtype))


def test_tensors_that_do_not_lie_in_one_piece_travel() -> None:
    source, target = module({"w": torch.randn(3, 4).T}), module({"w": torch.zeros(3, 4).T})
    layout = weights.layout_of(source)
    weights.load(target, layout, weights.read(source, layout))
    assert same(source, target)


def test_tied_tensors_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
            self.two.weight = self.one.weight

    model, other = Tied(), Tied()
    layout = weights.layout_of(model)
    weights.load(other, layout, weights.read(model, layout))
    assert len(layout.specs) == 2
    assert other.one.weight is other.two.weight
    assert same(model, other)


def test_loading_changes_the_parameters_in_place() -> None:
    model = nn.Linear(2, 2)
    kept = model.weight
    layout = weights.layout_of(model)
    weights.load(model, layout, bytes(layout.size_bytes))
    assert model.weight is kept
    assert kept.requires_grad
    assert not kept.any()


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (module({"w": torch.zeros(2, dtype=torch.complex64)}), "complex64"),
        (module({"w": torch.zeros(2).to(torch.float8_e5m2)}), "float8_e5m2"),
        (module({"w": torch.eye(2).to_sparse()}), "sparse"),
        (nn.LazyLinear(3), "no shape yet"),
        (nn.Linear(1, 1, device="meta"), "is without numbers"),
    ],
)
def test_what_cannot_travel_is_refused_in_a_sentence(model: nn.Module, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        weights.layout_of(model)


@pytest.mark.parametrize("number", [float("nan"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_weights_that_no_mean_can_hold_are_refused_before_training(number: float, dtype: torch.dtype) -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("mask", torch.tensor([0.0, number], dtype=dtype))
    with pytest.raises(UsageError, match=r"tensor 'mask' has NaN or infinite values, .* persistent=False"):
        weights.read(model, weights.layout_of(model))
    model.register_buffer("mask", torch.tensor([0.0, number]), persistent=False)
    assert weights.read(model, weights.layout_of(model))


def test_state_that_is_no_tensor_is_refused() -> None:
    class Extra(nn.Module):
        def get_extra_state(self) -> object:
            return {"epoch": 3}

    with pytest.raises(UsageError, match="'_extra_state' is a dict, no tensor: make it a buffer"):
        weights.layout_of(Extra())


def test_other_tensors_than_the_version_has_are_named() -> None:
    version = Layout.of([TensorSpec("weight", "float32", (2, 3)), TensorSpec("bias", "float32", (2,))])
    with pytest.raises(LearnerFailed, match=r"other tensors than the version: weight float32\[2, 2\] should be"):
        weights.load(nn.Linear(2, 2), version, bytes(version.size_bytes))
    with pytest.raises(LearnerFailed, match=r"bias float32\[2\] is missing"):
        weights.load(nn.Linear(3, 2, bias=False), version, bytes(version.size_bytes))
    with pytest.raises(LearnerFailed, match="7 bytes where its tensors need 32"):
        weights.load(nn.Linear(3, 2), version, bytes(7))


def test_a_diverged_tensor_is_named() -> None:
    model = nn.Linear(2, 2)
    layout = weights.layout_of(model)
    received = weights.read(model, layout)
    with torch.no_grad():
        model.bias[1] = float("nan")
    with pytest.raises(LearnerFailed, match="training diverged: tensor bias has NaN; try a smaller learning rate"):
        weights.delta(model, layout, received)
    with torch.no_grad():
        model.bias[1] = float("inf")
    with pytest.raises(LearnerFailed, match="tensor bias has infinite values"):
        weights.delta(model, layout, received)


def test_training_must_keep_the_tensors_it_was_given() -> None:
    model = nn.Linear(2, 2)
    layout = weights.layout_of(model)
    received = weights.read(model, layout)
    with pytest.raises(LearnerFailed, match=r"bias float64\[2\] should be bias float32\[2\]"):
        weights.delta(model.double(), layout, received)
