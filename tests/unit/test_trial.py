"""What a trial concludes from two deltas of one task, and how it makes the trained weights without torch."""

import io

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

from broker.changes import apply_change
from broker.contract import Contract
from broker.formats import FORMATS
from broker.tensors import Layout, TensorSpec
from workers import trial, weights
from workers.cli import _shown
from workers.work import Done

LAYOUT = Layout.of([TensorSpec("w", "float32", (2,)), TensorSpec("seen", "int64", ())])


def delta(w: list[float], seen: int = 0) -> memoryview:
    return memoryview(np.int64(seen).tobytes() + np.array(w, np.float32).tobytes())


def test_a_learner_that_does_its_work_is_not_warned_about() -> None:
    assert trial._looked_at(LAYOUT, delta([0, 0.5]), delta([0, 0.5])) == ()


def test_a_train_that_changes_no_weights_is_warned_about() -> None:
    (warning,) = trial._looked_at(LAYOUT, delta([0, 0], seen=3), delta([0, 0], seen=3))
    assert warning.startswith("train() changed no weights")


def test_a_train_that_is_different_every_time_is_warned_about() -> None:
    (warning,) = trial._looked_at(LAYOUT, delta([0, 0.5]), delta([0, 0.25]))
    assert warning.startswith("train() with the same seed twice gave two different results")
    assert "keep nothing, like an optimizer, for the next task" in warning


def test_what_is_to_be_compared_is_shown_whole_on_any_terminal() -> None:
    done = Done(1, {}, {}, None, 0.1, LAYOUT)
    report = trial.Report(LAYOUT, Contract("a" * 64, "b" * 64), 0.1, done, after={}, warnings=())
    shown = io.StringIO()
    Console(file=shown, width=60).print(_shown(report))
    cells = "".join(line.split("│")[2].strip() for line in shown.getvalue().splitlines() if line.count("│") == 3)
    assert "a" * 64 + "b" * 64 in cells
    assert "1 example" in cells.split("b")[-1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_what_was_received_and_the_delta_make_the_trained_weights(dtype: torch.dtype) -> None:
    model = nn.BatchNorm1d(3, dtype=dtype)
    layout = weights.layout_of(model)
    received = weights.read(model, layout)
    with torch.no_grad():
        model.weight.add_(0.5)
    model.register_buffer("num_batches_tracked", torch.tensor(4))
    changed = memoryview(weights.delta(model, layout, received))
    apply_change(memoryview(received), changed, layout, FORMATS["float32"], memoryview(received))
    assert received == weights.read(model, layout)
