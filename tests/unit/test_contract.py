"""Whether two learners are the same to a run: by their tensors, in one way on every machine, and by their file."""

import json
from dataclasses import replace
from hashlib import sha256

from hypothesis import given
from hypothesis import strategies as st

from broker.contract import Contract, fingerprint, other_file
from broker.messages import PART_BYTES_MIN, Attempt, Payload, Task
from broker.tensors import ITEM_BYTES, Layout, TensorSpec

MODEL = Layout.of([TensorSpec("w", "float32", (2, 3)), TensorSpec("ü", "bool", ())])
OTHER = Layout.of([TensorSpec("w", "float32", (3, 2)), TensorSpec("ü", "bool", ())])
MINE = Contract(fingerprint(MODEL), "f" * 64)
TASK = Task(Attempt("r", 1, 1), "train", 0, 1.0, 0, {}, Payload("p", PART_BYTES_MIN, MODEL.specs))
SPECS = st.builds(
    TensorSpec,
    st.sampled_from("abc"),
    st.sampled_from(sorted(ITEM_BYTES)),
    st.lists(st.integers(0, 3), max_size=3).map(tuple),
)
LAYOUTS = st.lists(SPECS, unique_by=lambda spec: spec.name, max_size=3).map(Layout.of)


def test_a_fingerprint_is_what_the_protocols_page_says() -> None:
    text = b'[1,[["w","float32",[2,3]],["\\u00fc","bool",[]]]]'
    assert json.loads(text)[1][1][0] == "ü"
    assert fingerprint(MODEL) == sha256(text).hexdigest()


@given(LAYOUTS, LAYOUTS)
def test_two_models_have_one_fingerprint_only_if_their_tensors_are_the_same(one: Layout, two: Layout) -> None:
    assert (fingerprint(one) == fingerprint(two)) == (one == two)


def test_a_run_that_says_nothing_of_its_learner_is_served_with_the_same_tensors() -> None:
    assert MINE.breach(TASK, MODEL, MODEL) == ""
    assert Contract().breach(TASK, MODEL, MODEL) == ""
    assert MINE.breach(TASK, MODEL, OTHER) == (
        "this worker's learner has other tensors than the version: w float32[2, 3] should be w float32[3, 2]."
    )


def test_another_contract_is_told_by_the_tensor_that_differs() -> None:
    named = replace(TASK, contract=fingerprint(MODEL), learner_file="f" * 64)
    assert MINE.breach(named, MODEL, MODEL) == ""
    strange = replace(TASK, contract=fingerprint(OTHER))
    assert MINE.breach(strange, MODEL, OTHER) == (
        f"this worker's learner is another than the run's: its contract is {MINE.tensors[:16]}…, the run's is "
        f"{fingerprint(OTHER)[:16]}…: w float32[2, 3] should be w float32[3, 2]."
    )
    assert "the tensors are the same" in MINE.breach(strange, MODEL, MODEL)


def test_another_file_is_told_by_both_hashes_where_the_run_is_pinned() -> None:
    pinned = replace(TASK, contract=fingerprint(MODEL), learner_file="0" * 64)
    assert MINE.breach(pinned, MODEL, MODEL) == other_file("f" * 64, "0" * 64)
    assert other_file("f" * 64, "0" * 64) == (
        f"this worker's learner is another than the run's: its file has the SHA-256 {'f' * 64}, not {'0' * 64}."
    )
    assert other_file("f" * 64, "f" * 64) == other_file("f" * 64, "") == other_file("", "") == ""
    assert "SHA-256 -, not" in other_file("", "0" * 64)
