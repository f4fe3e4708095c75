"""Noise on a sum, the clip that follows the norms, and what has been spent: arithmetic and one file."""

import json
import math
import secrets
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from broker.accountant import SPENT, Released, epsilon
from broker.errors import UsageError, WireError
from broker.formats import FORMATS
from broker.messages import Attempt
from broker.norms import SLACK
from broker.tensors import Layout, TensorSpec
from coordinator import plan as plans
from coordinator.aggregation import MEAN, digest
from coordinator.budget import FILE, Budget, counsel, last
from coordinator.plan import Plan
from coordinator.privacy import bit_noise, key_of, next_clip, noise_on_sum, veil
from coordinator.store import Store
from tests.summed import finished

MODEL = Layout.of([TensorSpec("w", "float32", (200_000,)), TensorSpec("n", "int64", (2,))])
WEIGHTS = memoryview(bytes(range(16)) + bytes(800_000))
PRIVATE = {"dp": "central", "dp_noise": 1.0, "dp_budget": 7.0, "clip": 0.5, "cohort": 3}


def plan(**changes: Any) -> Plan:
    return plans.make({"run": "r", "learner": "x", "seed": 7, "rounds": 9, **PRIVATE, **changes}, "it")


def private_sum(count: int, veiled: bytes | None) -> bytearray:
    sums = MEAN.init(MODEL, FORMATS["float32"])
    for number in range(count):
        delta = np.full(16 + 800_000, 0, np.uint8)
        delta[:8] = number + 1
        delta[16:].view("<f4")[:] = 1e-3
        MEAN.add(sums, 1, delta.data)
    sums.veil = veil(veiled, 0.5, noise=2.0, cohort=10) if veiled else None
    return finished(MEAN, sums, WEIGHTS)


# -- noise on the sum -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 4])
def test_the_version_is_the_sum_with_noise_over_the_cohort_of_the_plan_however_many_came(count: int) -> None:
    np.random.seed(0)  # noqa: NPY002 (nobody may make the noise a known one)
    made = private_sum(count, secrets.token_bytes(32))
    x = np.frombuffer(made[16:], "<f4").astype(float)
    deviation = 2.0 * 0.5 * (1 + SLACK) / 10
    assert float(x.mean()) == pytest.approx(count * 1e-3 / 10, abs=5 * deviation / math.sqrt(len(x)))
    assert float(x.std()) == pytest.approx(deviation, rel=0.01)
    assert made[:16] == WEIGHTS[:16]  # the largest integers would be one worker's own


def test_the_same_key_gives_the_same_version_and_another_one_another() -> None:
    keys = [secrets.token_bytes(32) for _ in range(2)]
    assert private_sum(2, keys[0]) == private_sum(2, keys[0]) != private_sum(2, keys[1])


def test_without_privacy_no_bit_is_another() -> None:
    made = private_sum(4, None)
    assert set(np.frombuffer(made[16:], "<f4")) == {np.float32(1e-3)}
    assert made[:16] == bytes([4] * 8 + [0] * 8)


def test_sums_are_told_apart_by_every_float_in_them() -> None:
    sums = MEAN.init(MODEL, FORMATS["float32"])
    delta = np.zeros(16 + 800_000, np.uint8)
    delta[16:].view("<f4")[-1] = 0.25
    MEAN.add(sums, 1, delta.data)
    before = digest(sums)
    delta[16:].view("<f4")[:] = 0
    MEAN.add(sums, 1, delta.data)
    assert digest(sums) == before
    delta[16:].view("<f4")[70_000] = 2.0**-52
    MEAN.add(sums, 1, delta.data)
    assert digest(sums) != before
    assert key_of(bytes(32), before) != key_of(bytes(32), digest(sums)) != key_of(bytes(31) + b"1", digest(sums))


# -- the clip -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cohort", "wanted"), [(20, 1.1547), (50, 1.0206), (100, 1.0050), (1000, 1.00005)]
)  # fmt: skip
def test_noise_is_split_between_sum_and_bits_as_andrew_et_al_do(cohort: int, wanted: float) -> None:
    assert noise_on_sum(1.0, cohort) == pytest.approx(wanted, abs=1e-4)
    together = noise_on_sum(1.0, cohort) ** -2 + (2 * bit_noise(cohort)) ** -2
    assert together**-0.5 == pytest.approx(1.0)


@pytest.mark.parametrize("start", [0.01, 100.0])
def test_the_clip_comes_to_the_median_norm_from_a_hundred_times_too_little_and_too_much(start: float) -> None:
    """With the sign the other way round, as somewhere, it runs away from the median for ever."""
    dice = np.random.default_rng(5)
    clip, cohort, late = start, 100, []
    for number in range(150):
        norms = np.exp(dice.standard_normal(cohort) / 2)  # of median 1
        key = key_of(secrets.token_bytes(32), bytes([number]))
        clip = next_clip(clip, int((norms <= clip).sum()), counted=cohort, cohort=cohort, key=key)
        late += [clip] if number >= 100 else []
    assert float(np.median(late)) == pytest.approx(1.0, rel=0.15)
    assert max(late) / min(late) < 2


def test_noise_on_the_bits_has_the_deviation_of_a_twentieth_of_the_cohort() -> None:
    clips = [next_clip(1.0, 50, counted=100, cohort=100, key=secrets.token_bytes(32)) for _ in range(2000)]
    assert float(np.std(np.log(clips))) == pytest.approx(0.2 * bit_noise(100) / 100, rel=0.1)
    nobody = [next_clip(1.0, 0, counted=0, cohort=100, key=secrets.token_bytes(32)) for _ in range(2000)]
    assert float(np.mean(np.log(nobody))) == pytest.approx(0.0, abs=1e-3)  # who is not there says nothing


# -- the plan -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dp": "none"}, "dp_noise, dp_budget, dp_population and dp_adaptive are for differential privacy: set dp"),
        ({"dp_noise": 0.0}, "dp = central needs dp_noise, the noise in clips"),
        ({"dp_budget": 0.0}, "and dp_budget, the largest epsilon"),
        ({"clip": 0.0}, "can hide an update of bounded norm only: give a clip"),
        ({"dp": "record", "dp_adaptive": True}, "dp_adaptive is for dp = central"),
        ({"dp": "distributed"}, "set privacy to secure"),
        ({"schedule": "cyclic"}, "is for parallel rounds"),
        ({"over_select": 2.0}, "an over_select of 1"),
        ({"keep_updates": True}, "updates that are kept undo the noise of dp = central"),
        ({"dp_population": 2}, r"the cohort \(3\) is larger than dp_population \(2\)"),
        ({"dp_population": 10, "dp_delta": 0.1}, r"dp_delta \(0.1\) must be well below 1 / 10"),
        ({"dp_population": 10, "quorum": 2}, "leave quorum out"),
        ({"dp_adaptive": True, "cohort": 10}, r"dp_noise \(1\) must be below a tenth of the cohort \(10\)"),
        ({"dp": "local"}, "dp must be 'none', 'central', 'distributed' or 'record'"),
    ],
)
def test_a_plan_that_would_not_be_private_is_refused_in_a_sentence(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        plan(**changes)


def test_a_plan_keeps_its_privacy_in_its_file(tmp_path: Path) -> None:
    given = plan(dp_population=12, dp_delta=1e-6)
    (tmp_path / plans.FILE).write_bytes(plans.to_toml(given))
    assert plans.read(tmp_path / plans.FILE) == given
    assert (given.population, given.rate, plan().rate) == (12, 0.25, 1.0)
    assert plans.digest(given) != plans.digest(plan())


def test_few_workers_are_told_what_it_costs_and_that_rows_can_be_hidden() -> None:
    pytest.importorskip("dp_accounting", reason="needs the extra `dp`")
    said = counsel(plan(cohort=4, dp_noise=4.0, dp_budget=10.0, dp_delta=1e-3, rounds=100))
    assert "hides one of 4 workers" in said
    assert "100 rounds are an epsilon of 10.2 with noise 4, 1.77 with noise 16" in said
    assert "dp = record hides a row, and makes sense" in said
    assert counsel(plan(cohort=60)) == counsel(plan(dp="record")) == ""


# -- what has been spent --------------------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path) -> Store:
    pytest.importorskip("dp_accounting", reason="needs the extra `dp`")
    return Store.create(tmp_path / "run", plan(), MODEL, WEIGHTS)


def of(number: int, attempt: int = 1) -> Attempt:
    return Attempt("r", number, attempt)


def test_what_was_spent_is_on_the_disk_before_there_is_noise_and_no_restart_forgets_it(store: Store) -> None:
    budget = Budget(store, 0, model=MODEL)
    assert budget.refusal() == ""
    budget.release(of(1), b"sum", counted=3, within=3)
    path = store.folder / FILE
    assert path.stat().st_mode & 0o777 == 0o600
    assert json.loads(path.read_bytes())["releases"] == 1
    budget.settle(1)
    assert json.loads(path.read_bytes())["seed"] == ""
    again = Budget(store, 1, model=MODEL)
    again.release(of(2), b"sum", counted=3, within=3)
    said = Budget(store, 2, model=MODEL).refusal()  # epsilon 4.38 after one, 6.57 after two
    assert said.startswith("the privacy budget is spent: epsilon is 6.5")
    assert "over dp_budget 7 (delta 1e-05)" in said
    with pytest.raises(WireError, match="the privacy budget is spent"):
        again.release(of(3), b"sum", counted=3, within=3)


def test_a_version_made_again_of_the_same_sum_has_the_same_noise_and_costs_nothing(store: Store) -> None:
    first = Budget(store, 0, model=MODEL).release(of(1), b"sum", counted=3, within=1)
    taken_up = Budget(store, 0, model=MODEL)
    assert taken_up.release(of(1), b"sum", counted=3, within=1) == first
    assert json.loads((store.folder / FILE).read_bytes())["releases"] == 1
    other = taken_up.release(of(1), b"another", counted=2, within=1)
    assert other.key != first.key  # else the difference of the two would be the sums'
    assert json.loads((store.folder / FILE).read_bytes())["releases"] == 2


def test_no_two_sums_are_released_of_those_whom_dice_have_drawn_once(tmp_path: Path) -> None:
    """Two of the same draw cost more than two of two draws, as which they would be counted: 3.5 in place of 1.9."""
    pytest.importorskip("dp_accounting", reason="needs the extra `dp`")
    of_one_draw = epsilon([Released(math.sqrt(0.5), 0.1, 1)], 1e-5)  # two sums with noise 1, of the same workers
    assert of_one_draw > 1.8 * epsilon([Released(1.0, 0.1, 2)], 1e-5)
    drawn = plan(dp_population=30, quorum=None, dp_budget=50.0)
    store = Store.create(tmp_path / "run", drawn, MODEL, WEIGHTS)
    first = Budget(store, 0, model=MODEL).release(of(1), b"sum", counted=3, within=1)
    taken_up = Budget(store, 0, model=MODEL)
    with pytest.raises(WireError, match="others are drawn"):
        taken_up.release(of(1), b"another", counted=2, within=1)
    assert taken_up.release(of(1), b"sum", counted=3, within=1) == first
    assert taken_up.release(of(1, 2), b"another", counted=2, within=1).key != first.key
    assert json.loads((store.folder / FILE).read_bytes())["releases"] == 2


def test_another_attempt_has_another_seed_and_so_has_a_forgotten_one(store: Store) -> None:
    budget = Budget(store, 0, model=MODEL)
    first = budget.release(of(1), b"sum", counted=3, within=1)
    budget.settle(1)
    assert budget.release(of(1), b"sum", counted=3, within=1).key != first.key
    with pytest.raises(WireError, match="spent"):
        budget.release(of(1, 2), b"sum", counted=3, within=1)


@pytest.mark.parametrize("damage", ["", "{", '{"releases": 1, "round": 1}', '{"spent": 3}', "[]"])
def test_a_run_that_does_not_know_what_it_spent_does_not_go_on(store: Store, damage: str) -> None:
    if damage:
        (store.folder / FILE).write_text(damage)
    with pytest.raises(UsageError, match=r"privacy\.json does not tell what has been spent of this run's privacy"):
        Budget(store, 2, model=MODEL)


def test_who_is_away_counts_when_another_says_that_its_budget_is_spent() -> None:
    """One liar would else end a run in a moment in which somebody is away."""
    refused = {"a": "", "b": "it raised", "c": "", "liar": f"{SPENT}: so it says"}
    assert last(None, refused, {"a", "b", "liar"}, least=3) == ""  # c may come back
    assert last(None, refused, set(), least=3) == ""
    fewer = refused | {"c": f"{SPENT}, too"}
    assert last(None, fewer, {"a", "b", "d"}, least=3) == ""
    assert last(None, fewer, {"a", "b"}, least=3) == f"c: {SPENT}, too; liar: {SPENT}: so it says"
    assert last(None, {"a": ""}, {"a"}, least=3) == ""


def test_a_clip_that_adapts_goes_on_where_it_was(tmp_path: Path) -> None:
    pytest.importorskip("dp_accounting", reason="needs the extra `dp`")
    adaptive = plan(dp_adaptive=True, clip=0.0, dp_noise=0.2, dp_budget=1e4, cohort=40)
    store = Store.create(tmp_path / "run", adaptive, MODEL, WEIGHTS)
    budget = Budget(store, 0, model=MODEL)
    assert budget.clip(1) == 0.1
    covered = budget.release(of(1), b"sum", counted=40, within=0)
    assert covered.deviation == pytest.approx(noise_on_sum(0.2, 40) * 0.1 * (1 + SLACK))
    later = Budget(store, 0, model=MODEL)
    assert later.clip(1) == 0.1  # that the version be the same, should it be made again
    assert later.clip(2) == budget.clip(2) == pytest.approx(0.1 * math.exp(0.2 * 0.5), rel=0.1)
