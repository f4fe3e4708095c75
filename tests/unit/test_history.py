"""Lines of the history: means that one worker cannot spoil, and the curve read back from them."""

import json
import math

from hypothesis import given, settings
from hypothesis import strategies as st

from broker.messages import Attempt
from coordinator import history
from coordinator.history import Facts, Point
from coordinator.round import Round


def round_of(*workers: str) -> Round:
    done = Round(Attempt("run", 3, 2), [workers], quorum=1, turn_s=60)
    done.begin_turn(0)
    return done


def count(done: Round, worker: str, examples: int) -> None:
    done.accept(worker)
    done.count(worker, examples)


def test_a_mean_is_weighted_and_examples_are_summed() -> None:
    weighted = [(100.0, {"loss": 1.0, "examples": 7.0}), (300.0, {"loss": 2.0, "examples": 5.0})]
    assert history.mean_metrics(weighted) == {"loss": 1.75, "examples": 12.0}


def test_a_metric_that_only_some_report_is_averaged_over_those() -> None:
    weighted = [(1.0, {"loss": 4.0}), (1.0, {"accuracy": 0.5}), (3.0, {"loss": 8.0})]
    assert history.mean_metrics(weighted) == {"loss": 7.0, "accuracy": 0.5}


def test_nothing_has_no_mean_and_no_weight_none_either() -> None:
    assert history.mean_metrics([]) == {}
    assert history.mean_metrics([(0.0, {"loss": 1.0})]) == {}


FINITE = st.floats(allow_nan=False, allow_infinity=False)
METRICS = st.dictionaries(st.sampled_from(["loss", "examples"]), FINITE)


@given(st.lists(st.tuples(st.floats(0, 1.7e308), METRICS), max_size=4))
@settings(max_examples=100, deadline=None)
def test_no_metrics_whatever_make_a_mean_that_json_cannot_hold(
    weighted: list[tuple[float, dict[str, float]]],
) -> None:
    json.dumps(history.mean_metrics(weighted), allow_nan=False)


def test_scores_are_weighted_by_the_examples_they_were_judged_on() -> None:
    scored = {"ada": {"loss": 1.0, "examples": 1.0}, "bob": {"loss": 4.0, "examples": 2.0}}
    assert history.scores(scored) == {"loss": 3.0, "examples": 3.0}
    assert history.scores({"ada": {"loss": 1.0}, "bob": {"loss": 3.0}}) == {"loss": 2.0}
    assert history.scores({"ada": {"loss": 1.0, "examples": -5.0}}) == {"examples": -5.0}


def test_a_rounds_line_says_who_was_counted_and_who_was_not_and_why() -> None:
    done = round_of("bob", "ada", "eve")
    count(done, "bob", 300)
    count(done, "ada", 100)
    done.refuse("eve", "no data")
    facts = Facts(
        trained={"ada": {"loss": 1.0}, "bob": {"loss": 2.0}},
        scored={"ada": {"loss": 3.0}, "zoe": {"loss": 99.0}},
        bytes_down=5,
        bytes_up=7,
    )
    line = history.round_line(done, facts, why="2/3 updates, quorum 1", seconds=1.23456, at=1000.98765)
    assert line == {
        "event": "round",
        "round": 3,
        "attempt": 2,
        "version": 3,
        "at": 1000.988,
        "why": "2/3 updates, quorum 1",
        "cohort": ["bob", "ada", "eve"],
        "counted": {
            "ada": {"examples": 100, "metrics": {"loss": 1.0}},
            "bob": {"examples": 300, "metrics": {"loss": 2.0}},
        },
        "refused": {"eve": "no data"},
        "failed": {"eve": "no data"},
        "declined": {},
        "others": [],
        "struck": {},
        "rested": {},
        "metrics": {"loss": 1.75},
        "scored": {"loss": 3.0},
        "seconds": 1.235,
        "bytes_down": 5,
        "bytes_up": 7,
    }
    assert json.loads(json.dumps(line, allow_nan=False)) == line


def test_an_abandoned_rounds_line_names_no_version() -> None:
    line = history.abandoned_line(round_of("ada"), Facts(), why="0/1 updates", seconds=1, at=2)
    assert line["event"] == "abandoned"
    assert "version" not in line
    assert (line["round"], line["attempt"], line["why"]) == (3, 2, "0/1 updates")


def test_the_curve_puts_each_score_to_the_version_it_was_given_to() -> None:
    first, second = round_of("ada"), round_of("ada")
    second.of = Attempt("run", 4, 1)
    count(first, "ada", 1)
    count(second, "ada", 1)
    lines = [
        history.score_line(2, "zoe", {"loss": 9.0}, at=0),
        history.abandoned_line(first, Facts(scored={"ada": {"loss": 77.0}}), why="", seconds=0, at=0),
        history.round_line(first, Facts(scored={"ada": {"loss": 4.0}}), why="", seconds=0, at=0),
        history.round_line(second, Facts(scored={"ada": {"loss": 3.0}}), why="", seconds=0, at=0),
        history.score_line(4, "zoe", {"loss": 5.0}, at=0),
        history.score_line(4, "kim", {"loss": 6.0}, at=0),
        history.final_line(4, {"bob": {"loss": 2.0}, "ada": {"loss": 1.0}}, seconds=0, at=0),
    ]
    assert history.curve(lines) == [
        Point(2, {"loss": 4.0}, {"zoe": {"loss": 9.0}}),
        Point(3, {"loss": 3.0}, {}),
        Point(4, {"loss": 1.5}, {"zoe": {"loss": 5.0}, "kim": {"loss": 6.0}}),
    ]


def test_a_version_that_nobody_has_scored_is_on_the_curve_all_the_same() -> None:
    made = round_of("ada")
    count(made, "ada", 1)
    lines = [history.round_line(made, Facts(scored={"ada": {"loss": 4.0}}), why="", seconds=0, at=0)]
    assert history.curve(lines) == [Point(2, {"loss": 4.0}, {}), Point(3, {}, {})]


def test_nothing_has_no_curve_and_lines_of_another_kind_are_passed_over() -> None:
    assert history.curve([]) == []
    assert history.curve([{"event": "party"}, {}]) == []


def test_a_score_alone_is_a_point_without_the_workers_mean() -> None:
    (point,) = history.curve([history.score_line(1, "zoe", {"loss": 1.0}, at=math.pi)])
    assert point == Point(1, {}, {"zoe": {"loss": 1.0}})
