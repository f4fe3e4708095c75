"""Plans: checked once, in sentences that name the setting; frozen; the same after a trip through TOML."""

import tomllib
from collections.abc import Mapping
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.errors import UsageError
from broker.formats import FORMATS
from broker.messages import KEY_MAX, MAP_MAX, TEXT_MAX
from coordinator import plan as plans
from coordinator.plan import Plan

LEAST = {"run": "run-1", "learner": "digits"}
SETTING = (
    "must be a finite number of at most 64 bits, true, false, or text of at most 4096 characters, "
    "under a name of at most 200"
)
NAME = "must be 1 to 63 of a-z, 0-9 and '-', beginning and ending with a letter or digit"


def refused(changes: Mapping[str, Any]) -> str:
    with pytest.raises(UsageError) as caught:
        plans.make({**LEAST, **changes}, "plan.toml")
    said = str(caught.value)
    assert said.startswith("plan.toml: ")
    assert said.endswith(".")
    return said.removeprefix("plan.toml: ").removesuffix(".")


def test_a_run_and_a_learner_are_enough_for_a_plan() -> None:
    plan = plans.make(LEAST)
    assert (plan.rounds, plan.cohort, plan.least, plan.schedule, plan.workers) == (10, 2, 2, "parallel", ())


@pytest.mark.parametrize(("cohort", "least"), [(1, 1), (2, 2), (3, 2), (4, 3), (10, 7)])
def test_the_quorum_is_two_thirds_of_the_cohort_rounded_up_unless_given(cohort: int, least: int) -> None:
    assert plans.make({**LEAST, "cohort": cohort}).least == least
    assert plans.make({**LEAST, "cohort": cohort, "quorum": 1}).least == 1


@pytest.mark.parametrize(
    ("cohort", "over_select", "asks"),
    [(4, 1, 4), (4, 1.0, 4), (4, 1.3, 6), (3, 1.1, 4), (10, 1.1, 11), (100, 1.1, 110), (100, 1.3, 130), (2, 3, 6)],
)
def test_over_selection_asks_so_many_times_the_cohort_rounded_up(cohort: int, over_select: float, asks: int) -> None:
    plan = plans.make({**LEAST, "cohort": cohort, "over_select": over_select})
    assert plan.asks == asks
    assert plan.least == plans.make({**LEAST, "cohort": cohort}).least


def test_a_list_that_has_at_least_one_to_spare_may_be_over_selected_from() -> None:
    assert plans.make({**LEAST, "over_select": 3, "workers": ["a", "b", "c"]}).asks == 6


def test_updates_and_versions_travel_as_they_are_unless_the_plan_says_otherwise() -> None:
    plan = plans.make(LEAST)
    assert (plan.format, plan.keep, plan.down) == ("float32", None, "full")
    assert "keep" not in plans.as_dict(plan)


def test_top_k_keeps_a_hundredth_unless_told() -> None:
    assert plans.make({**LEAST, "format": "top-k"}).kept == 0.01
    assert plans.make({**LEAST, "format": "top-k", "keep": 1}).kept == 1.0


def test_a_plan_names_every_format_there_is() -> None:
    hints = get_type_hints(Plan)
    assert get_args(hints["format"]) == tuple(FORMATS)
    assert set(get_args(hints["down"])) - {"full"} < set(FORMATS)


def test_a_plan_is_frozen() -> None:
    plan = plans.make(LEAST)
    with pytest.raises(FrozenInstanceError):
        plan.rounds = 3  # type: ignore[misc]  # that is the point


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"cohort": 3, "quorum": 4}, "the quorum (4) is above the cohort (3): lower it"),
        ({"cohort": 3, "workers": ["a"]}, "the cohort (3) is above the 1 listed workers: lower it"),
        (
            {"over_select": 1.3, "schedule": "cyclic"},
            (
                "a cyclic round asks one worker after another, so that more of them (over_select is 1.3) only take "
                "longer: set it to 1"
            ),
        ),
        (
            {"over_select": 1.5, "workers": ["a", "b"]},
            (
                "over_select (1.5) asks more workers than the cohort (2), and the list of workers names no more: "
                "name more, lower the cohort or set over_select to 1"
            ),
        ),
        ({"workers": ["a", "b", "a"]}, "a worker is listed twice: name each once"),
        ({"rule": "krum"}, "there is no rule 'krum': choose one of mean, trimmed-mean, median"),
        ({"trim": 1}, "trim is for the rule trimmed-mean, and the rule is mean: leave trim out"),
        ({"trim": 1, "rule": "median"}, "trim is for the rule trimmed-mean, and the rule is median: leave trim out"),
        (
            {"rule": "median"},
            "median leaves out 1 at both ends, and the quorum is 2: raise it and cohort to 3",
        ),
        (
            {"rule": "trimmed-mean", "trim": 2, "cohort": 6},
            "trimmed-mean leaves out 2 at both ends, and the quorum is 4: raise it and cohort to 5",
        ),
        (
            {"rule": "median", "schedule": "cyclic", "cohort": 5},
            "a cyclic turn has one update, of which median can leave nothing out: set rule to mean",
        ),
        ({"keep": 0.1}, "keep is for the format top-k, and the format is float32: leave keep out"),
        ({"keep": 0.1, "format": "int8"}, "keep is for the format top-k, and the format is int8: leave keep out"),
        (
            {"down": "int8", "schedule": "cyclic"},
            "a cyclic round has no use for changes (down is int8): set it to full",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes: Mapping[str, Any], said: str) -> None:
    assert refused(changes) == said


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"run": None}, "run must be text"),
        ({"run": "Run_1"}, f"run {NAME}"),
        ({"run": "a\n"}, f"run {NAME}"),
        ({"learner": ""}, "learner must not be empty"),
        ({"learner": "x" * 4097}, "learner must have at most 4096 characters"),
        ({"rounds": 0}, "rounds must be at least 1"),
        ({"rounds": 10**9 + 1}, "rounds must be at most 1000000000"),
        ({"rounds": 1.5}, "rounds must be a whole number"),
        ({"rounds": True}, "rounds must be a whole number"),
        ({"cohort": "two"}, "cohort must be a whole number"),
        ({"over_select": 0.9}, "over_select must be at least 1"),
        ({"over_select": 3.1}, "over_select must be at most 3"),
        ({"over_select": float("nan")}, "over_select must be at most 3"),
        ({"over_select": "1.3"}, "over_select must be a number"),
        ({"quorum": 0}, "quorum must be at least 1"),
        ({"quorum": "x"}, "quorum must be a whole number"),
        ({"round_s": 1e-300}, "round_s must be at least 0.1"),
        ({"clip": 1e-31}, "clip (1e-31) must be 0, for any norm, or at least 1e-30"),
        (
            {"dp": "record", "dp_noise": 1.0, "dp_budget": 8.0, "dp_row_clip": 5e-324},
            "dp_row_clip must be at least 1e-30",
        ),
        ({"dp": "record", "dp_noise": 1.0, "dp_budget": 8.0, "dp_delta": 1e-20}, "dp_delta must be at least 1e-12"),
        (
            {"dp": "central", "dp_noise": 1e-300, "dp_budget": 8.0, "clip": 1.0},
            "dp = central needs dp_noise, the noise in clips (1.0 is usual), and dp_budget, the largest epsilon",
        ),
        ({"round_s": float("nan")}, "round_s must be at most 2592000"),
        ({"round_s": True}, "round_s must be a number"),
        ({"gather_s": -1}, "gather_s must be at least 0"),
        ({"schedule": "random"}, "schedule must be 'parallel' or 'cyclic'"),
        ({"workers": "ada"}, "workers must be a list of names"),
        ({"workers": ["Ada"]}, f"workers {NAME}"),
        ({"rule": 5}, "rule must be text"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"part_bytes": 8}, "part_bytes must be at least 262144"),
        ({"part_bytes": 10**7}, "part_bytes must be at most 3670016"),
        ({"part_bytes": 300_001}, "part_bytes must be a multiple of 8"),
        ({"format": "int4"}, "format must be 'float32', 'bfloat16', 'int8' or 'top-k'"),
        ({"format": "top-k", "keep": 0}, "keep must be above 0"),
        ({"format": "top-k", "keep": 1.01}, "keep must be at most 1"),
        ({"format": "top-k", "keep": float("nan")}, "keep must be at most 1"),
        ({"format": "top-k", "keep": "1 %"}, "keep must be a number"),
        ({"down": "top-k"}, "down must be 'full', 'bfloat16' or 'int8'"),
        ({"lr": 0.1}, "lr is not a setting"),
        ({"settings": 5}, "settings must be a table of names and values"),
        ({"settings": {"a": [1]}}, f"settings.a {SETTING}"),
        ({"settings": {"a": None}}, f"settings.a {SETTING}"),
        ({"settings": {"a": float("nan")}}, f"settings.a {SETTING}"),
        ({"settings": {"a": float("inf")}}, f"settings.a {SETTING}"),
        ({"settings": {"a": 10**400}}, f"settings.a {SETTING}"),
        ({"settings": {"a": "x" * (TEXT_MAX + 1)}}, f"settings.a {SETTING}"),
        ({"settings": {"x" * (KEY_MAX + 1): 1}}, f"settings.{'x' * 40} {SETTING}"),
        ({"settings": {str(n): n for n in range(MAP_MAX + 1)}}, "settings may have at most 512 entries"),
    ],
)
def test_a_value_out_of_bounds_is_refused_by_the_name_of_its_setting(changes: Mapping[str, Any], said: str) -> None:
    assert refused(changes) == said


@pytest.mark.parametrize("missing", ["run", "learner"])
def test_what_every_plan_needs_is_asked_for(missing: str) -> None:
    with pytest.raises(UsageError, match=f"^the plan: {missing} is missing\\.$"):
        plans.make({key: value for key, value in LEAST.items() if key != missing})


def test_settings_keep_their_types() -> None:
    given_settings = {"a": True, "b": 1, "c": 1.0, "d": "1", "e": 2**63 - 1}
    kept = plans.make({**LEAST, "settings": given_settings}).settings
    assert kept == given_settings
    assert [type(value) for value in kept.values()] == [bool, int, float, str, int]


@given(
    rounds=st.integers(1, 10**9),
    quorum=st.none() | st.integers(1, 4),
    round_s=st.floats(0.1, 30 * 24 * 3600),
    over_select=st.floats(1, 3),
    workers=st.just(()) | st.just(("w-1", "a", "b", "z9", "c")),
    format=st.sampled_from(sorted(FORMATS)),
    down=st.sampled_from(["full", "bfloat16", "int8"]),
    keep_updates=st.booleans(),
    values=st.dictionaries(
        st.text(max_size=9),
        st.booleans()
        | st.integers(-(2**63), 2**63 - 1)
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(),
        max_size=4,
    ),
)
@settings(max_examples=60, deadline=None)
def test_a_plan_comes_back_from_toml_as_it_was(**values: Any) -> None:
    chosen = {**LEAST, "cohort": 4, **values, "settings": values["values"]}
    del chosen["values"]
    plan = plans.make(chosen)
    text = plans.to_toml(plan).decode()
    assert text.startswith("# The plan of this run.")
    assert plans.make(tomllib.loads(text)) == plan


def test_a_file_that_is_absent_or_not_toml_or_not_a_plan_is_refused_by_its_path(tmp_path: Path) -> None:
    file = tmp_path / "plan.toml"
    with pytest.raises(UsageError, match=r"plan\.toml cannot be read: No such file or directory\."):
        plans.read(file)
    for content in (b"run = ", b"\xff"):
        file.write_bytes(content)
        with pytest.raises(UsageError, match=r"plan\.toml is not TOML \(.*\): mend it or restore it\."):
            plans.read(file)
    file.write_bytes(b'run = "a"\n')
    with pytest.raises(UsageError, match=r"plan\.toml: learner is missing\."):
        plans.read(file)


def test_a_plan_is_read_as_it_was_written(tmp_path: Path) -> None:
    plan = plans.make({**LEAST, "workers": ["b", "a"], "settings": {"lr": 0.1}})
    (tmp_path / "plan.toml").write_bytes(plans.to_toml(plan))
    assert plans.read(tmp_path / "plan.toml") == plan


def test_a_change_is_checked_like_everything_else_and_leaves_the_plan_as_it_was() -> None:
    plan = plans.make({**LEAST, "cohort": 4, "quorum": 3})
    assert plans.change(plan, {}) == plan
    changed = plans.change(plan, {"cohort": 5, "settings": {"lr": 1}})
    assert isinstance(changed, Plan)
    assert (changed.cohort, changed.quorum, changed.settings) == (5, 3, {"lr": 1})
    assert (plan.cohort, plan.settings) == (4, {})
    with pytest.raises(UsageError, match=r"^these options: the quorum \(3\) is above the cohort \(2\): lower it\.$"):
        plans.change(plan, {"cohort": 2})


# -- secure rounds --------------------------------------------------------------------------------------------------

SECURE: dict[str, Any] = {
    "run": "r", "learner": "l", "cohort": 5, "privacy": "secure", "clip": 4.0, "examples_max": 64,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"clip": 0.0}, "clip is 0"),
        ({"cohort": 2}, "below min_cohort"),
        ({"min_cohort": 6}, "below min_cohort"),
        ({"min_cohort": 2}, "min_cohort must be at least 3"),
        ({"schedule": "cyclic"}, "schedule is cyclic"),
        ({"schedule": "asynchronous"}, "schedule must be 'parallel' or 'cyclic'"),
        ({"rule": "median"}, "rule is median, which needs the updates of single workers .* or privacy to none"),
        ({"keep_updates": True}, "keep_updates is True, which needs the updates of single workers"),
        ({"format": "int8"}, "format is int8"),
        ({"ring_bits": 16}, "ring_bits"),
        ({"threshold": 0.4}, "threshold"),
        ({"examples_max": 2**29 - 1}, "a ring of 32 bits is too small"),
        ({"clip": 1e9, "ring_bits": 32}, "a ring of 32 bits is too small"),
    ],
)
def test_what_cannot_be_added_up_in_secret_is_refused_with_the_reason(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        plans.make(SECURE | changed)


def test_a_secure_run_closes_no_round_with_fewer_than_its_least_cohort() -> None:
    assert plans.make(SECURE | {"quorum": 1, "min_cohort": 4}).least == 4
    assert plans.make(SECURE).ring.bits == 32
