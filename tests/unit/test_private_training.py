"""Training that hides every row: by Opacus, with noise of its own, on the user's own model; and what it has cost."""

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from broker.accountant import Released
from broker.errors import LearnerFailed
from broker.messages import Attempt, Noise, Payload, Task
from broker.parts import PART_BYTES
from broker.tensors import Layout
from workers import child, learner, task, weights
from workers.learner import Learner
from workers.owner import Owner
from workers.policy import Policy
from workers.privacy import Private, secret_dice
from workers.spending import Spending
from workers.work import Done, Outcome, Work

ROWS = Noise("row", 1.0, 1.0, 1e-5, 8.0)
TASK = Task(Attempt("r", 4, 1), "train", 3, 60.0, 0, {}, Payload("p", PART_BYTES, ()), noise=ROWS)
WORK = Work(
    train=True, evaluate=False, seed=11, settings={}, round=4, row_noise=1.0, row_clip=0.5,
    steps=("ada.steps", "r", 4, 1),
)  # fmt: skip
DATA = TensorDataset(torch.zeros(64, 3), torch.zeros(64, 2))


def line() -> nn.Module:
    return nn.Linear(3, 2)


def train(model: nn.Module, data: Any, settings: dict[str, Any]) -> int:
    """One step at rate 1 on rows whose gradients are all zero: what changes is the noise."""
    torch.manual_seed(0)  # as learners will
    np.random.seed(0)  # noqa: NPY002
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    loader = DataLoader(data, batch_size=len(data), generator=torch.Generator().manual_seed(0))
    model, optimizer, loader = settings["private"](model, optimizer, loader)
    for x, y in loader:
        optimizer.zero_grad()
        ((model(x) - y) ** 2 * 0).mean().backward()
        optimizer.step()
    return len(data)


def done(train: Any = train, model: Any = line, work: Work = WORK) -> tuple[Outcome, Layout, task.Place]:
    place = task.set_up(Learner("x", model, lambda _: DATA, train, lambda *_: {"loss": 0.0}), "")
    received = weights.read(place.model, place.layout)
    return task.do(place, work, layout=place.layout, received=received), place.layout, place


@pytest.fixture(autouse=True)
def _where_steps_are_put_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def put_down() -> list[Any]:
    """Noise, rate and number of the steps that the task has taken."""
    *whose, taken = json.loads(Path("ada.steps").read_bytes())
    assert whose == ["r", 4, 1]
    return cast(list[Any], taken)


@pytest.fixture
def _opacus() -> None:
    pytest.importorskip("opacus", reason="needs the extra `dp`")


@pytest.mark.usefixtures("_opacus")
def test_a_step_has_noise_of_its_own_whatever_the_learner_has_sown() -> None:
    deltas = []
    for _ in range(60):
        outcome, _, place = done()
        assert outcome.delta is not None
        deltas.append(np.frombuffer(outcome.delta, "<f4").copy())
        assert put_down() == [[1.0, 1.0, 1]]
        assert list(place.model.state_dict()) == ["weight", "bias"]
    noise = np.concatenate(deltas)
    assert len({delta.tobytes() for delta in deltas}) == 60
    assert float(noise.std()) == pytest.approx(1.0 * 0.5 / 64, rel=5 / math.sqrt(2 * len(noise)))


@pytest.mark.usefixtures("_opacus")
def test_what_is_found_out_about_rows_without_noise_does_not_travel() -> None:
    outcome, _, _ = done(lambda *given: (train(*given), {"loss": 0.125}))
    assert (outcome.examples, outcome.metrics, outcome.scores) == (64, {}, {})


@pytest.mark.usefixtures("_opacus")
def test_the_model_is_left_as_it_was_and_trains_again_with_and_without() -> None:
    _, layout, place = done()
    assert not place.model._forward_hooks
    assert not any(vars(parameter) for parameter in place.model.parameters())
    received = weights.read(place.model, layout)
    task.do(place, WORK, layout=layout, received=received)
    assert put_down() == [[1.0, 1.0, 1]]
    plain = Work(train=True, evaluate=True, seed=1, settings={}, round=1)
    forgot = task.Place(place.learner, place.model, place.data, layout)
    with pytest.raises(LearnerFailed, match="KeyError: 'private'"):
        task.do(forgot, plain, layout=layout, received=received)


@pytest.mark.usefixtures("_opacus")
@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf, 1e30])
def test_a_row_whose_gradient_is_no_number_is_not_to_be_seen(odd: float) -> None:
    """With weights of its choice a coordinator may have it so that some rows have such a gradient, and others not."""

    def crafted(model: nn.Module, _: Any, settings: dict[str, Any]) -> int:
        rows = torch.tensor([[odd, 0, 0], [3.0, 4.0, 0]])
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        loader = DataLoader(TensorDataset(rows), batch_size=2)
        model, optimizer, loader = settings["private"](model, optimizer, loader)
        model(rows).mean().backward()
        optimizer.step()
        assert put_down() == [[1e-6, 1.0, 1]], "the process may end now"
        return len(rows)

    work = dataclasses.replace(WORK, row_noise=1e-6)
    outcome, _, _ = done(crafted, lambda: nn.Linear(3, 2, bias=False), work)
    delta = np.frombuffer(cast(bytes, outcome.delta), "<f4")
    # of two rows each counts for half a clip, and here one of them for nothing
    assert np.linalg.norm(delta) == pytest.approx(0.25, rel=1e-3)
    assert abs(delta[0]) == pytest.approx(0.25 * 0.6 / math.sqrt(2), rel=1e-3)


@pytest.mark.usefixtures("_opacus")
@pytest.mark.parametrize("kind", ["format", "learner", "numbers"])
def test_steps_with_noise_that_come_before_a_failure_are_put_down(kind: str) -> None:
    """What they have come to can be seen by it: whether a noisy gradient, times so much, is a number still."""
    pupil, last = child.Pupil(), Learner("x", line, lambda _: DATA, train, lambda *_: {})

    def overflows(model: nn.Module, data: Any, settings: dict[str, Any]) -> int:
        examples = train(model, data, settings)
        if kind == "learner":
            raise ValueError("its loss is no number")
        with torch.no_grad():
            cast(nn.Linear, model).weight.fill_(math.inf if kind == "numbers" else torch.finfo(torch.float32).max)
        return examples

    pupil._renew(dataclasses.replace(last, train=overflows))
    rooms = {"weights": bytearray(32), "delta": bytearray(16)}
    pupil._room = lambda where: memoryview(rooms[cast(str, where)])  # type: ignore[method-assign]
    work = dataclasses.asdict(dataclasses.replace(WORK, format="bfloat16"))
    with pytest.raises(LearnerFailed):
        pupil.on_task(
            {"source": "", "work": work, "specs": None, "weights": "weights", "delta": "delta", "residual": None}
        )
    assert put_down() == [[1.0, 1.0, 1]]


@pytest.mark.usefixtures("_opacus")
def test_a_learner_that_trains_without_noise_sends_nothing() -> None:
    with pytest.raises(
        LearnerFailed, match="train\\(\\) does not know how: let it train with model, optimizer, loader"
    ):
        done(lambda *_: 64)


@pytest.mark.usefixtures("_opacus")
def test_a_model_that_mixes_rows_is_refused_with_what_to_do() -> None:
    with pytest.raises(
        LearnerFailed, match=r"the model has 1 \(BatchNorm1d\), which mixes the rows .* put GroupNorm"
    ):
        done(model=lambda: nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)))


@pytest.mark.usefixtures("_opacus")
def test_the_wrapper_is_for_the_tasks_model_and_for_one_optimizer() -> None:
    private = Private(model := line(), WORK)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with pytest.raises(ValueError, match="with the model that train"):
        private(line(), optimizer, DataLoader(DATA))
    private(model, optimizer, DataLoader(DATA))
    with pytest.raises(ValueError, match="once a task"):
        private(model, optimizer, DataLoader(DATA))
    with private:
        pass


@pytest.mark.usefixtures("_opacus")
def test_the_digits_are_learned_with_noise() -> None:
    pytest.importorskip("sklearn", reason="needs the extra `demo`")
    place = task.set_up(learner.load("digits"), "pooled")
    received = weights.read(place.model, place.layout)
    settings: dict[str, bool | int | float | str] = {"lr": 1.0, "momentum": 0.0, "steps": 60, "batch": 64}
    work = dataclasses.replace(WORK, settings=settings, row_clip=1.0)
    outcome = task.do(place, work, layout=place.layout, received=received)
    assert outcome.examples
    assert put_down() == [[1.0, 1 / 23, 60]]
    with torch.no_grad():
        assert place.learner.evaluate(place.model, place.data)["accuracy"] > 0.5  # 0.75 or so; guessing is 0.1


def test_the_dice_for_batches_are_in_a_state_that_no_seed_gives() -> None:
    throws = [torch.rand(20_000, generator=secret_dice()) for _ in range(2)]
    assert not torch.equal(*throws)
    for each in throws:
        assert float(each.mean()) == pytest.approx(0.5, abs=5 * 0.29 / math.sqrt(20_000))
        assert torch.histc(each, 10, 0, 1).tolist() == pytest.approx([2000] * 10, rel=0.2)


def test_without_opacus_the_worker_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "opacus", SimpleNamespace())
    with pytest.raises(
        LearnerFailed, match=r"needs opacus, install it on the worker with: pip install 'fluffle\[dp\]'"
    ):
        done()


# -- what it has cost -----------------------------------------------------------------------------------------------


@pytest.fixture
def _dp_accounting() -> None:
    pytest.importorskip("dp_accounting", reason="needs the extra `dp`")


def owner(most: float = math.inf) -> Owner:
    return cast(Owner, SimpleNamespace(policy=Policy(epsilon_max=most), note=lambda *_, **__: None))


@pytest.mark.usefixtures("_dp_accounting")
def test_what_a_worker_has_spent_outlives_it(tmp_path: Path) -> None:
    spending, once = Spending(tmp_path, "ada", owner()), [Released(4.0, 1.0, 1)]
    first = spending.spend("r", ROWS, once)
    assert first == pytest.approx(0.926, abs=1e-3)
    file = tmp_path / "ada.privacy"
    assert file.stat().st_mode & 0o777 == 0o600
    again = Spending(tmp_path, "ada", owner())
    assert again.spend("r", ROWS, once) > first
    assert json.loads(file.read_bytes()) == {"r": [[4.0, 1.0, 2, False]]}
    assert Spending(tmp_path, "bob", owner()).spend("r", ROWS, once) == first


def fails(spending: Spending, steps: int) -> str:
    """What is told of a task of which so many steps are put down."""
    Path("ada.steps").write_text(json.dumps([*dataclasses.astuple(TASK.of), [(4.0, 1.0, steps)]]))
    return spending.told(TASK, LearnerFailed("it has failed"))


@pytest.mark.usefixtures("_dp_accounting")
def test_nothing_is_spent_beyond_the_plans_budget_or_the_owners(tmp_path: Path) -> None:
    spending, spent = Spending(tmp_path, "ada", owner(2.0)), tmp_path / "ada.privacy"
    assert fails(spending, 2) == "it has failed"
    with pytest.raises(
        LearnerFailed, match=r"the privacy budget is spent: epsilon would be 1\.\d+, and the plan allows 1"
    ):
        spending.spend("other", Noise("row", 1, 1, 1e-5, 1.0), [Released(4.0, 1.0, 2)])
    with pytest.raises(LearnerFailed, match=r"would be 2\.\d+, and the owner of the data allows 2"):
        spending.spend("other", ROWS, [Released(4.0, 1.0, 3)])  # 1.35 for one run, 1.7 for the other: they add up
    spending.begin(TASK, Layout(()), WORK)
    assert "the owner of the data allows 2" in fails(spending, 3)  # of what cannot be paid not even that is told
    assert spending.told(TASK, LearnerFailed("it has failed")) == "it has failed"
    assert json.loads(spent.read_bytes()) == {"r": [[4.0, 1.0, 2, False]]}
    assert fails(spending, 1) == "it has failed"
    assert "the owner of the data allows 2" in fails(Spending(tmp_path, "ada", owner(2.0)), 2)


@pytest.mark.usefixtures("_dp_accounting")
def test_steps_whose_worker_has_died_are_counted_whatever_is_allowed(tmp_path: Path) -> None:
    spending = Spending(tmp_path, "ada", owner(2.0))
    work = spending.begin(TASK, Layout(()), dataclasses.replace(WORK, steps=("", "", 0, 0)))
    assert work.steps == (str(tmp_path / "ada.steps"), "r", 4, 1)
    Path(work.steps[0]).write_text('["r", 4, 1, [[4.0, 0.5, 70], [4.0, 1.0, 20]]]')
    again = Spending(tmp_path, "ada", owner(2.0))
    counted = json.loads((tmp_path / "ada.privacy").read_bytes())
    assert counted == {"r": [[4.0, 0.5, 70, False], [4.0, 1.0, 20, False]]}
    with pytest.raises(LearnerFailed, match="the privacy budget is spent"):
        again.begin(TASK, Layout(()), WORK)


@pytest.mark.usefixtures("_dp_accounting")
def test_an_update_of_which_no_steps_are_put_down_stays_here(tmp_path: Path) -> None:
    spending, done = Spending(tmp_path, "ada", owner()), Done(3, {}, {}, None, 0.0, Layout(()))
    with pytest.raises(LearnerFailed, match=r"ada\.steps does not tell of this update's steps"):
        spending.pay(TASK, done)
    Path("ada.steps").write_text('["r", 4, 1, [[4.0, 1.0, 1]]]')
    assert spending.pay(TASK, done).metrics == {"epsilon": pytest.approx(0.926, abs=1e-3)}
    assert not Path("ada.steps").exists()


@pytest.mark.usefixtures("_dp_accounting")
@pytest.mark.parametrize("damage", ["{", "[]", '{"r": 3}'])
@pytest.mark.parametrize("file", ["privacy", "steps"])
def test_a_worker_that_does_not_know_what_it_spent_spends_nothing(tmp_path: Path, file: str, damage: str) -> None:
    (tmp_path / f"ada.{file}").write_text(damage)
    with pytest.raises(LearnerFailed, match=rf"ada\.{file} does not tell w"):
        Spending(tmp_path, "ada", owner()).begin(TASK, Layout(()), WORK)
