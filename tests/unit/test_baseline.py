"""Why federate: alone each worker falls behind what all rows in one place would teach."""

from pathlib import Path

import pytest
from safetensors.torch import save_file

from broker.errors import UsageError
from workers import learner, task
from workers.baseline import Request, baseline


def version(where: str, folder: Path) -> str:
    path = folder / "000000.safetensors"
    save_file(task.new_model(learner.load(where), seed=0).state_dict(), path)
    return str(path)


def test_a_worker_alone_learns_less_than_all_rows_would_teach(tmp_path: Path) -> None:
    digits = learner.load("digits")
    assert digits.demo is not None
    plan = digits.demo(4, 0)
    few = dict(list(plan["workers"].items())[:2])
    request = Request(
        learner="digits",
        workers=few,
        weights=version("digits", tmp_path),
        rounds=6,
        settings=plan["settings"],
        pooled=plan["pooled"],
        held_out=plan["held_out"],
    )
    found = baseline(request)
    assert list(found["alone"]) == list(few)
    assert found["pooled"]["examples"] == 360
    assert all(alone["accuracy"] < found["pooled"]["accuracy"] - 0.05 for alone in found["alone"].values())


def test_the_same_request_is_answered_the_same(tmp_path: Path) -> None:
    request = Request("line", {"ann": "a"}, version("line", tmp_path), rounds=2)
    assert baseline(request) == baseline(request)
    assert baseline(request)["pooled"] is None


def test_without_held_out_rows_the_pooled_ones_judge(tmp_path: Path) -> None:
    found = baseline(Request("toy", {"bob": "bob"}, version("toy", tmp_path), rounds=1, pooled="everyone"))
    assert found["alone"]["bob"]["examples"] == 4


def test_a_source_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nobody here is called 'carol'"):
        baseline(Request("toy", {"carol": "carol"}, version("toy", tmp_path), rounds=1))
