"""One task in this process: what the learner is given, what it may return, and what becomes of its mistakes."""

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from broker.errors import FluffleError, LearnerFailed, UsageError
from broker.messages import EXAMPLES_MAX
from broker.tensors import Layout, TensorSpec
from workers import task, weights
from workers.learner import Learner
from workers.work import Outcome, Work, task_seed

BOTH = Work(train=True, evaluate=True, seed=11, settings={"lr": 0.5}, round=4)


def nudge(model: Any, data: Any, settings: dict[str, Any]) -> int:  # noqa: ARG001 (a learner's signature)
    with torch.no_grad():
        model.weight += 1
    return 3


def place(train: Callable[..., Any] = nudge, evaluate: Callable[..., Any] = lambda *_: {}, **more: Any) -> task.Place:
    learner = Learner("mine", more.get("model", lambda: nn.Linear(2, 1)), lambda source: source, train, evaluate)
    return task.set_up(learner, "rows")


def do(here: task.Place, work: Work = BOTH) -> Outcome:
    return task.do(here, work, layout=here.layout, received=bytes(here.layout.size_bytes))


def returning(value: Any) -> task.Place:
    return place(train=lambda *_: value)


def failure(here: task.Place) -> str:
    with pytest.raises(LearnerFailed) as caught:
        do(here)
    return str(caught.value)


def test_the_version_is_scored_as_it_was_received_and_then_trained() -> None:
    seen: list[object] = []

    def evaluate(model: Any, data: Any) -> dict[str, float]:
        seen.append(("evaluate", model.weight.sum().item(), model.training, torch.is_grad_enabled(), data))
        return {"loss": 2.0}

    def train(model: Any, data: Any, settings: dict[str, Any]) -> tuple[int, dict[str, float]]:
        seen.append(("train", model.weight.sum().item(), model.training, torch.is_grad_enabled(), settings))
        return nudge(model, data, settings), {"loss": 1.0}

    outcome = do(place(train, evaluate))
    assert seen == [
        ("evaluate", 0.0, False, False, "rows"),
        ("train", 0.0, True, True, {"lr": 0.5, "seed": 11, "round": 4}),
    ]
    assert (outcome.examples, outcome.metrics, outcome.scores) == (3, {"loss": 1.0}, {"loss": 2.0})
    assert np.frombuffer(outcome.delta or b"", np.float32).tolist() == [0.0, 1.0, 1.0]  # bias, weight


def test_only_what_was_asked_is_done() -> None:
    def never(*_: object) -> None:
        raise AssertionError

    scored = do(place(train=never), Work(train=False, evaluate=True, seed=1, settings={}, round=1))
    assert (scored.examples, scored.delta) == (None, None)
    trained = do(place(evaluate=never), Work(train=True, evaluate=False, seed=1, settings={}, round=1))
    assert trained.scores == {}


def test_the_dice_depend_on_the_seed_alone_and_not_on_having_been_evaluated() -> None:
    thrown: list[tuple[float, ...]] = []

    def throw(*_: object) -> tuple[float, ...]:
        return (random.random(), np.random.random(), torch.rand(()).item())  # noqa: NPY002 (the global dice are sown)

    def train(*_: object) -> int:
        thrown.append(throw())
        return 1

    def evaluate(*_: object) -> dict[str, float]:
        throw()
        return {}

    here = place(train, evaluate)
    do(here)
    do(here, Work(train=True, evaluate=False, seed=11, settings={}, round=9))
    do(here, Work(train=True, evaluate=False, seed=12, settings={}, round=9))
    do(here, Work(train=True, evaluate=False, seed=2**63 - 1, settings={}, round=9))
    assert thrown[0] == thrown[1]
    assert len(set(thrown)) == 3


def test_gradients_of_an_earlier_task_are_gone() -> None:
    def careless(model: Any, data: Any, settings: dict[str, Any]) -> int:  # noqa: ARG001 (a learner's signature)
        model.weight.sum().backward()
        with torch.no_grad():
            model.weight -= model.weight.grad
        return 1

    here = place(careless)
    assert do(here).delta == do(here).delta


@pytest.mark.parametrize("examples", [1, 7, EXAMPLES_MAX, np.int64(5), torch.tensor(5)])
def test_examples_may_be_any_whole_number_above_nothing(examples: Any) -> None:
    assert do(returning(examples)).examples == int(examples)
    assert do(returning((examples, {}))).examples == int(examples)


@pytest.mark.parametrize("returned", [None, True, 1.0, "3", {}, (1, 2, 3), [3], ({}, 3)])
def test_what_are_no_examples_are_refused(returned: Any) -> None:
    assert "it must return how many examples it learned from, a whole number" in failure(returning(returned))


@pytest.mark.parametrize(
    ("returned", "kind"), [(1.0, "a float"), ((1.0, {}), "a float"), ((None, {}), "None"), ((1, 2, 3), "a tuple")]
)
def test_what_stands_where_the_examples_belong_is_named(returned: Any, kind: str) -> None:
    assert f"train() returned {kind} where the number of examples belongs:" in failure(returning(returned))


@pytest.mark.parametrize("examples", [0, -1, EXAMPLES_MAX + 1])
def test_examples_out_of_bounds_are_refused(examples: int) -> None:
    assert f"says it learned from {examples} examples" in failure(returning(examples))


def test_metrics_may_be_any_numbers_and_those_not_finite_are_left_out_and_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    given = {"a": 1, "b": np.float32(2.5), "c": torch.tensor([3.0]), "d": True, "e": float("nan"), "f": 10**400}
    assert do(returning((1, given))).metrics == {"a": 1.0, "b": 2.5, "c": 3.0, "d": 1.0}
    assert [each.getMessage().partition(":")[0] for each in caplog.records] == [
        "train() returned the metric 'e' as nan",
        "train() returned the metric 'f' as inf",
    ]


@pytest.mark.filterwarnings("error")
def test_a_metric_may_still_hold_its_gradient() -> None:
    assert do(returning((1, {"loss": torch.tensor(2.0, requires_grad=True)}))).metrics == {"loss": 2.0}


@pytest.mark.parametrize(
    ("metrics", "said"),
    [
        ([1.0], "train() returned a list where a dict of metrics belongs."),
        ({"loss": "0.3"}, "train() returned the metric 'loss' as a str: it must be a number."),
        ({"loss": None}, "the metric 'loss' as None: it must be a number."),
        ({"loss": torch.zeros(2)}, "the metric 'loss' as a Tensor: it must be a number."),
        ({3: 1.0}, "a metric called '3': its name must be text"),
        ({"x" * 201: 1.0}, "its name must be text of at most 200 characters."),
        ({f"m{n}": 0.0 for n in range(600)}, "train() returned 600 metrics: at most 512 travel."),
    ],
)
def test_metrics_that_are_none_are_refused_by_name(metrics: Any, said: str) -> None:
    assert said in failure(returning((1, metrics)))


def test_what_evaluate_returns_is_checked_too() -> None:
    assert "evaluate() returned None where a dict" in failure(place(evaluate=lambda *_: None))


@pytest.mark.parametrize("kind", [RuntimeError, SystemExit, GeneratorExit, MemoryError, RecursionError])
def test_whatever_a_learner_raises_is_its_failure_told_with_its_place(kind: type[BaseException]) -> None:
    def inner() -> None:
        raise kind("bad\nluck")

    def train(*_: object) -> int:
        inner()
        return 1

    text = failure(place(train))
    why = " (it ran out of memory)" if kind is MemoryError else ""
    assert f"train() of the learner raised {kind.__name__}{why}: bad luck" in text
    assert re.search(r"← test_task.py line \d+, in inner ← test_task.py line \d+, in train: inner\(\)", text)


@pytest.mark.parametrize("method", ["state_dict", "load_state_dict", "eval", "train", "zero_grad"])
def test_what_the_methods_of_a_model_raise_is_the_learners_failure_too(method: str) -> None:
    def odd(*_: object, **__: object) -> None:
        raise ValueError("bad luck")

    here = place()
    setattr(here.model, method, odd)
    with pytest.raises(FluffleError, match=r"ValueError: bad luck ← test_task.py line \d+, in odd"):
        do(here)


def test_ctrl_c_while_a_learner_trains_is_no_failure_of_the_learner() -> None:
    def train(*_: object) -> int:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        do(place(train))


def test_a_learner_may_fail_and_the_next_task_is_not_the_worse_for_it() -> None:
    here = place(train=lambda model, _, settings: nudge(model, _, settings) / (settings["lr"] > 0))
    with pytest.raises(LearnerFailed, match="ZeroDivisionError"):
        do(here, Work(train=True, evaluate=False, seed=1, settings={"lr": 0}, round=1))
    here = place()
    assert do(here).delta == do(here).delta


def test_training_that_diverged_is_a_failure() -> None:
    def train(model: Any, *_: object) -> int:
        with torch.no_grad():
            model.weight.fill_(float("nan"))
        return 1

    assert "training diverged: tensor weight has NaN" in failure(place(train))


class Repeating(nn.Module):
    """Rows that point the same way: of a mask, of a filter that does not learn, and, if wanted, of one that does."""

    def __init__(self, *, learns: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(1, 2))
        self.register_buffer("mask", torch.ones(8, 9))
        self.blur = nn.Conv2d(1, 8, 3, bias=False).requires_grad_(learns)
        self.same = self.blur
        nn.init.ones_(self.blur.weight)


def received_by(model: nn.Module) -> Outcome:
    here = place(model=lambda: model)
    return task.do(here, BOTH, layout=here.layout, received=weights.read(model, here.layout))


def test_only_what_learns_may_not_look_made_for_reading_rows_off() -> None:
    assert received_by(Repeating(learns=False)).examples == 3
    with pytest.raises(LearnerFailed, match=r"7 of 8 rows of blur.weight point the same way.* model\(\) begins so"):
        received_by(Repeating(learns=True))


def test_another_model_than_the_versions_is_a_failure() -> None:
    version = Layout.of([TensorSpec("weight", "float32", (1, 2))])
    with pytest.raises(LearnerFailed, match="this worker's learner has other tensors than the version: bias"):
        task.do(place(), BOTH, layout=version, received=bytes(8))


def test_a_model_or_data_that_cannot_be_had_is_for_the_user_to_mend() -> None:
    with pytest.raises(UsageError, match=r"model\(\) of the learner mine returned a dict: return a torch nn.Module"):
        place(model=dict)
    with pytest.raises(UsageError, match=r"model\(\) of the learner mine failed: ZeroDivisionError"):
        place(model=lambda: 1 / 0)
    broken = Learner("mine", nn.Module, lambda source: Path(source).read_text(), nudge, place().learner.evaluate)
    with pytest.raises(UsageError, match=r"data\('/gone'\) of the learner mine failed: FileNotFoundError: .*/gone"):
        task.set_up(broken, "/gone")


def test_a_model_is_drawn_by_its_seed() -> None:
    learner = place().learner
    layout = weights.layout_of(task.new_model(learner))
    one, same, other = (weights.read(task.new_model(learner, seed=s), layout) for s in (1, 1, 2))
    assert one == same != other


def test_a_seed_is_one_workers_in_one_round() -> None:
    seeds = {task_seed(s, r, w) for s in range(5) for r in range(5) for w in ("ann", "ben")}
    assert len(seeds) == 50
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert task_seed(1, 2, "ann") == 7374289374610513475  # every worker everywhere must draw this
