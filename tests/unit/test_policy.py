"""What the data's owner allows: every rule alone, at every minute of the day, in one sentence to who is refused."""

import math
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from broker import wording
from broker.errors import UsageError
from workers import policy
from workers.policy import DAY_MINUTES, Asked, Policy

ASKED = Asked("digits-1", "digits", "coordinator", trains=True, cohort=4, size_bytes=1000)
NOON = 12 * 60


def made(**rules: Any) -> Policy:
    return wording.make(Policy, rules, "policy.toml")


def refused(rules: Policy, asked: Asked = ASKED, *, minute: int = NOON, done_today: int = 0) -> str:
    """Why, in one sentence that begins as all of them do; empty if nothing stands in the way."""
    said = rules.permits(asked, minute=minute, done_today=done_today)
    assert not said or re.fullmatch(r"the policy of the data's owner [^.\n]+(\.[^.\n]+)*\.", said), said
    return said.removeprefix("the policy of the data's owner ").removesuffix(".")


asked = st.builds(
    Asked, st.text(max_size=9), st.text(max_size=9), st.text(max_size=9), st.booleans(),
    st.integers(0, 10**6), st.integers(0, 2**40), secure=st.booleans(),
)  # fmt: skip


@given(asked, st.integers(0, DAY_MINUTES - 1), st.integers(0, 10**6))
def test_a_worker_without_rules_serves_whatever_is_asked(asked: Asked, minute: int, done: int) -> None:
    assert Policy().permits(asked, minute=minute, done_today=done) == ""
    assert Policy().permits_leaving(1, None) == Policy().permits_leaving(1, 0.0) == ""  # no rows held out to score on
    assert Policy().permits_leaving(1, -3.0) == ""
    assert Policy().may_leave({"loss": 1.0}) == {"loss": 1.0}


MINUTES = st.integers(0, DAY_MINUTES - 1)


def clock(minute: int) -> str:
    return f"{minute // 60:02d}:{minute % 60:02d}"


@given(MINUTES, st.integers(1, DAY_MINUTES - 1), MINUTES)
@example(NOON, 60, NOON)
@example(NOON, 60, NOON + 60)
@example(22 * 60, 8 * 60, 22 * 60)
@example(22 * 60, 8 * 60, 6 * 60)
def test_hours_are_open_from_their_first_minute_and_before_their_last_also_over_midnight(
    start: int, length: int, minute: int
) -> None:
    stop = (start + length) % DAY_MINUTES
    rules = made(hours=[f"{clock(start)}-{clock(stop)}"])
    assert rules.is_open(minute) == ((minute - start) % DAY_MINUTES < length)
    said = refused(rules, minute=minute)
    hours = f"{clock(start)}-{clock(stop)}"
    assert said == ("" if rules.is_open(minute) else f"serves at {hours} only, by its clock it is {clock(minute)}")


@given(st.lists(st.tuples(MINUTES, st.integers(1, DAY_MINUTES - 1)), min_size=1, max_size=4), MINUTES)
def test_several_hours_are_open_where_one_of_them_is(windows: list[tuple[int, int]], minute: int) -> None:
    each = [f"{clock(start)}-{clock((start + length) % DAY_MINUTES)}" for start, length in windows]
    assert made(hours=each).is_open(minute) == any(made(hours=[one]).is_open(minute) for one in each)


def test_a_whole_day_and_one_that_ends_at_midnight_are_written_with_24() -> None:
    assert all(made(hours=["00:00-24:00"]).is_open(minute) for minute in range(DAY_MINUTES))
    evening = made(hours=["18:30-24:00"])
    assert [minute for minute in range(DAY_MINUTES) if evening.is_open(minute)] == [*range(18 * 60 + 30, DAY_MINUTES)]


@given(st.integers(0, 50), st.integers(0, 100))
def test_after_so_many_rounds_a_day_no_more_is_trained_but_versions_are_still_scored(most: int, done: int) -> None:
    rules = made(rounds_a_day=most)
    assert bool(refused(rules, done_today=done)) == (done >= most)
    assert refused(rules, replace(ASKED, trains=False), done_today=done) == ""


@given(st.integers(1, 100), st.integers(0, 100), st.booleans())
def test_a_small_cohort_is_not_trained_for(least: int, cohort: int, trains: bool) -> None:
    said = refused(made(cohort_min=least), replace(ASKED, cohort=cohort, trains=trains))
    assert said == (f"asks for a cohort of {least} at the least" if trains and cohort < least else "")


@given(st.integers(1, 2**40), st.integers(0, 2**40))
def test_a_model_that_is_too_large_is_not_received(most: int, size: int) -> None:
    said = refused(made(model_bytes_max=most), replace(ASKED, size_bytes=size))
    assert bool(said) == (size > most)


@pytest.mark.parametrize(
    ("rules", "change", "said"),
    [
        ({"runs": ["digits-*", "toy"]}, {"run": "other"}, "does not serve this run"),
        ({"runs": []}, {}, "does not serve this run"),
        ({"learners": ["digits"]}, {"learner": "digits2"}, "does not allow this learner"),
        ({"coordinators": ["coordinator", "second-?"]}, {"coordinator": "third"}, "does not serve this coordinator"),
        ({"coordinators": ["coordinator"]}, {"coordinator": ""}, "does not serve this coordinator"),
        ({"privacy": "secure"}, {"secure": False}, "serves secure rounds only"),
        ({"privacy": "secure"}, {"trains": False}, "serves secure rounds only"),
    ],
)
def test_who_is_not_served_learns_the_rule_and_no_name_that_it_holds(
    rules: dict[str, Any], change: dict[str, Any], said: str
) -> None:
    assert refused(made(**rules), replace(ASKED, **change)) == said
    if rules.get("runs") != []:
        assert refused(made(**rules), replace(ASKED, secure=True)) == ""


def test_figures_leave_by_name_and_what_few_rows_have_made_does_not() -> None:
    rules = made(metrics=["loss", "acc*"], examples_min=32)
    assert rules.may_leave({"loss": 1.0, "accuracy": 0.5, "auc": 0.4, "examples": 3}) == {
        "loss": 1.0,
        "accuracy": 0.5,
    }
    assert made(metrics=[]).may_leave({"loss": 1.0}) == {}
    assert rules.permits_leaving(32, None) == rules.permits_leaving(None, 32.0) == ""
    for few in ((31, None), (100, 31.0), (None, 0.0)):
        assert rules.permits_leaving(*few).endswith("asks for 32 examples a task at the least.")


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ({"hour": []}, "hour is not a setting"),
        ({"hours": "22:00-06:00"}, "hours must be a list of names"),
        ({"hours": ["22-6"]}, "hours: '22-6' must be like \"22:00-06:30\""),
        ({"hours": ["24:01-06:00"]}, "hours: '24:01-06:00' must be like \"22:00-06:30\""),
        ({"hours": ["09:60-10:00"]}, "hours: '09:60-10:00' must be like \"22:00-06:30\""),
        ({"hours": ["10:00-10:00"]}, "hours: 10:00-10:00 is no time of a day: from 00:00 to 24:00 is all of it"),
        ({"hours": ["24:00-06:00"]}, "hours: 24:00-06:00 is no time of a day: from 00:00 to 24:00 is all of it"),
        ({"runs": [1]}, "runs must be text"),
        ({"runs": [""]}, "runs must not be empty"),
        ({"rounds_a_day": -1}, "rounds_a_day must be at least 0"),
        ({"rounds_a_day": 1.5}, "rounds_a_day must be a whole number"),
        ({"rounds_a_day": True}, "rounds_a_day must be a whole number"),
        ({"cohort_min": -1}, "cohort_min must be at least 0"),
        ({"examples_min": -1}, "examples_min must be at least 0"),
        ({"privacy": "none"}, "privacy must be 'any' or 'secure'"),
        ({"threshold_min": 1.0}, "threshold_min must be below 1"),
        ({"epsilon_max": math.nan}, "epsilon_max must be at least 0"),
        ({"log": "all"}, "log must be 'metrics', 'tasks' or 'refusals'"),
    ],
)
def test_a_rule_that_is_none_is_named(rules: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=f"^policy.toml: {re.escape(said)}\\.$"):
        made(**rules)


def test_a_policy_is_read_from_its_file_or_the_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    with pytest.raises(UsageError, match=r"policy\.toml cannot be read: No such file"):
        policy.read(path)
    path.write_text('hours = ["22:00-06:30"]\nepsilon_max = 4\n')
    assert policy.read(path) == made(hours=["22:00-06:30"], epsilon_max=4.0)
    for wrong in (b"hours = [", b"\xff"):
        path.write_bytes(wrong)
        with pytest.raises(UsageError, match=r"policy\.toml is not TOML"):
            policy.read(path)


def test_every_rule_is_told_where_it_is_made() -> None:
    told = re.findall(r"^        (\w+): ", Policy.__doc__ or "", re.MULTILINE)
    assert told == [field.name for field in fields(Policy)]
