"""What a trial concludes from two deltas of one task, and how it makes the trained weights without torch."""

import numpy as np
import pytest
import torch
from torch import nn

from broker.changes import apply_change
from broker.formats import FORMATS
from broker.tensors import Layout, TensorSpec
from workers import trial, weights

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
