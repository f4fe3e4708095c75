"""Promise: the next model is the mean of what the workers learned, and the order in which they answer cannot matter.

Three hospitals train the same model, two numbers large, on data of their own. Each sends back how far its training
moved the two numbers, and how many patients it learned from. The coordinator moves the model by the mean of these
moves, in which every patient counts the same, wherever he was treated (McMahan et al. 2017, arXiv 1602.05629).

Floating-point addition gives another last digit in another order. Fluffle adds integers instead (ARCHITECTURE.md says
how): the same answers make the same model, to the last bit, whoever came first.
"""

from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from broker.formats import FORMATS
from broker.tensors import Layout, TensorSpec
from coordinator.aggregation import MEAN
from tests.summed import finished

MODEL = Layout((TensorSpec("weight", "float32", (2,)),))
START = np.array([0.5, -1.0], np.float32)

# who: (patients it learned from, how far its training moved the two numbers)
ANSWERS = {
    "berlin": (100, np.array([0.1, 1.0], np.float32)),
    "lyon": (200, np.array([0.2, 1e-9], np.float32)),
    "porto": (700, np.array([-0.3, -1.0], np.float32)),
}


def next_model(*who: str) -> NDArray[np.float32]:
    """The model after the answers of these hospitals have come in this order."""
    sums = MEAN.init(MODEL, FORMATS["float32"])
    for hospital in who:
        patients, moved = ANSWERS[hospital]
        MEAN.add(sums, patients, memoryview(moved.tobytes()))
    return np.frombuffer(finished(MEAN, sums, memoryview(START.tobytes())), np.float32)


def test_every_patient_counts_the_same() -> None:
    # (100 · 0.1 + 200 · 0.2 - 700 · 0.3) / 1000 = -0.16, and (100 · 1 + 200 · 1e-9 - 700 · 1) / 1000 = -0.6
    np.testing.assert_allclose(next_model("berlin", "lyon", "porto"), [0.5 - 0.16, -1.0 - 0.6], rtol=1e-6)


def test_whoever_answers_first_the_model_is_the_same_to_the_last_bit() -> None:
    models = {next_model(*order).tobytes() for order in permutations(ANSWERS)}
    assert len(models) == 1


def test_a_hospital_that_does_not_answer_is_left_out_and_the_others_count_as_before() -> None:
    np.testing.assert_allclose(next_model("berlin", "lyon")[0], 0.5 + (100 * 0.1 + 200 * 0.2) / 300, rtol=1e-6)
    np.testing.assert_array_equal(next_model("berlin"), START + ANSWERS["berlin"][1])
