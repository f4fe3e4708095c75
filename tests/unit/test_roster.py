"""Who is here, who may be chosen, and when there are enough."""

import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from broker.messages import Hello
from coordinator.roster import LEASE_S_MAX, WORKERS_MAX, Rest, Rests, Roster, choose_cohort, may_begin


def hello(worker: str, *, incarnation: str = "1", trains: bool = True, lease_s: float = 15.0) -> Hello:
    return Hello(worker, incarnation, "digits", trains, lease_s)


def roster_of(*workers: str) -> Roster:
    roster = Roster()
    for worker in workers:
        roster.hear(hello(worker), now=0)
    return roster


def test_a_worker_is_here_until_its_lease_ends() -> None:
    roster = roster_of("ada", "bob")
    assert roster.hear(hello("ada"), now=10)
    assert roster.lapse(now=14.9) == []
    assert roster.due_at == 15
    assert roster.lapse(now=15) == ["bob"]
    assert (roster.has("ada"), roster.has("bob")) == (True, False)
    assert roster.lapse(now=25) == ["ada"]
    assert roster.due_at == 25 + LEASE_S_MAX, "to look again now and then does no harm"


def test_those_whose_leases_end_together_are_named_in_order() -> None:
    assert roster_of("eve", "ada", "bob").lapse(now=15) == ["ada", "bob", "eve"]


def test_the_incarnation_is_the_one_that_was_said_last() -> None:
    roster = Roster()
    assert all(roster.hear(hello("ada", incarnation=incarnation), now=0) for incarnation in "1121")
    assert roster.incarnation("ada") == "1"
    assert roster.incarnation("bob") == ""


def test_a_worker_that_comes_back_after_its_lease_has_joined_anew() -> None:
    roster = roster_of("ada")
    roster.lapse(now=15)
    assert roster.hear(hello("ada"), now=16)
    assert roster.has("ada")


def test_after_deafness_every_lease_begins_anew_each_with_its_own_length() -> None:
    roster = roster_of("ada")
    roster.hear(hello("bob", lease_s=60), now=0)
    roster.renew(now=100)
    assert roster.lapse(now=114) == []
    assert roster.lapse(now=115) == ["ada"]
    assert roster.due_at == 160


def test_no_lease_is_longer_than_an_hour() -> None:
    roster = Roster()
    roster.hear(hello("ada", lease_s=1e7), now=0)
    assert roster.lapse(now=0) == []
    assert roster.due_at == LEASE_S_MAX == 3600


def test_who_leaves_is_gone_at_once_and_only_once() -> None:
    roster = roster_of("ada")
    assert roster.leave("ada")
    assert not roster.leave("ada")
    assert roster.trainers() == []


def test_a_full_roster_takes_nobody_new_and_keeps_those_it_has() -> None:
    roster = roster_of(*(f"w{n}" for n in range(WORKERS_MAX)))
    assert not roster.hear(hello("ada"), now=1)
    assert not roster.has("ada")
    assert roster.hear(hello("w0"), now=1)


def test_those_who_train_and_those_who_only_evaluate_are_kept_apart() -> None:
    roster = roster_of("eve", "ada")
    roster.hear(hello("zoe", trains=False), now=0)
    roster.hear(hello("kim", trains=False), now=0)
    assert roster.trainers() == ["ada", "eve"]
    assert roster.evaluators() == ["kim", "zoe"]


def test_only_the_invited_train_and_in_the_order_of_the_invitation() -> None:
    roster = roster_of("ada", "bob", "eve")
    assert roster.trainers(["eve", "away", "ada"]) == ["eve", "ada"]


# -- the cohort -----------------------------------------------------------------------------------------------------

WORKERS = [f"w{n}" for n in range(10)]


def test_the_same_dice_choose_the_same_cohort() -> None:
    first, second = (choose_cohort(WORKERS, 4, random.Random("7/3")) for _ in range(2))
    assert first == second
    assert first != choose_cohort(WORKERS, 4, random.Random("7/4"))


def test_a_cohort_has_its_size_no_doubles_and_keeps_the_order() -> None:
    chosen = choose_cohort(WORKERS[::-1], 4, random.Random(1))
    assert len(chosen) == 4
    assert chosen == sorted(set(chosen), reverse=True)


def test_when_too_few_are_here_all_of_them_are_the_cohort() -> None:
    assert choose_cohort(["b", "a"], 4, random.Random(0)) == ["b", "a"]
    assert choose_cohort([], 4, random.Random(0)) == []


def test_every_worker_is_as_likely_to_be_chosen_as_any_other() -> None:
    dice = random.Random(2026)
    rounds = 4000
    times = Counter(worker for _ in range(rounds) for worker in choose_cohort(WORKERS, 3, dice))
    expected = rounds * 3 / 10
    chi_squared = sum((times[worker] - expected) ** 2 / (expected * 0.7) for worker in WORKERS) * 0.9
    assert chi_squared < 27.9, times  # one in a thousand with 9 degrees of freedom


# -- rest -----------------------------------------------------------------------------------------------------------


def rests_after(*rounds: dict[str, str]) -> Rests:
    rests = Rests()
    for fared in rounds:
        rests.note(fared)
    return rests


def asked(rests: Rests, rounds: int, *, fails: bool = True) -> Iterator[bool]:
    """For so many rounds, whether eve was chosen; whenever she is, she fails, or not."""
    for _ in range(rounds):
        chosen = "eve" in rests.spare(["ada", "bob", "eve"], 2)
        rests.note({"ada": "", "bob": ""} | ({"eve": "no rows" if fails else ""} if chosen else {}))
        yield chosen


def test_who_fails_three_times_on_end_rests_for_two_rounds_with_the_last_reason() -> None:
    rests = rests_after({"eve": "no data"}, {"eve": "no room"})
    assert rests.present == {}
    assert rests.note({"ada": "", "eve": "no time"}) == {"eve": Rest(2, "no time")}
    assert rests.present == {"eve": Rest(2, "no time")}
    assert rests.spare(["ada", "bob", "eve"], 2) == ["ada", "bob"]
    rests.note({"ada": "", "bob": ""})
    assert rests.present == {"eve": Rest(1, "no time")}
    rests.note({"ada": "", "bob": ""})
    assert rests.present == {}
    assert rests.spare(["ada", "bob", "eve"], 2) == ["ada", "bob", "eve"]


def test_one_more_failure_after_a_rest_begins_the_next_twice_as_long_up_to_64_rounds() -> None:
    rests = rests_after(*[{"eve": "no rows"}] * 3)
    line = "".join(
        "x" if chosen else "." for chosen in asked(rests, 2 + 1 + 4 + 1 + 8 + 1 + 16 + 1 + 32 + 1 + 64 + 1 + 64 + 1)
    )
    assert line == "x".join("." * rest for rest in (2, 4, 8, 16, 32, 64, 64)) + "x"


def test_one_counted_update_clears_a_worker_entirely() -> None:
    rests = rests_after(*[{"eve": "no rows"}] * 3)
    assert list(asked(rests, 3, fails=False)) == [False, False, True]
    assert rests.note({"eve": "no rows"}) == rests.note({"eve": "no rows"}) == {}
    assert rests.note({"eve": "no rows"}) == {"eve": Rest(2, "no rows")}


def test_failures_on_both_sides_of_an_update_or_of_rounds_without_it_do_and_do_not_add_up() -> None:
    assert rests_after(*[{"eve": "x"}] * 2, {"eve": ""}, *[{"eve": "x"}] * 2).present == {}
    assert rests_after({"eve": "x"}, {"ada": ""}, {"eve": "x"}, {}, {"eve": "x"}).present == {"eve": Rest(2, "x")}


def test_who_rests_is_chosen_all_the_same_if_there_is_no_quorum_without() -> None:
    rests = rests_after(*[{"eve": "no rows", "bob": "no rows"}] * 3)
    assert rests.spare(["ada", "bob", "eve", "zoe"], 2) == ["ada", "zoe"]
    assert rests.spare(["ada", "bob", "eve"], 2) == ["ada", "bob", "eve"]
    assert rests.spare(["bob"], 2) == ["bob"]


def test_no_more_workers_are_remembered_than_a_roster_holds() -> None:
    rests = rests_after(
        {"first": "no"}, {f"w{n}": "no" for n in range(WORKERS_MAX)}, {"first": "no"}, {"first": "no"}
    )
    assert len(rests._records) == WORKERS_MAX
    assert rests.present == {}


# -- whether to begin -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("present", "waited_s", "begins", "why"),
    [
        (5, 0, True, "5 of 4 workers are here"),
        (4, 0, True, "4 of 4 workers are here"),
        (3, 20, False, "3 of 4 workers are here; the others have 30 s to join"),
        (3, 30, True, "3 of 4 workers are here, quorum 3"),
        (2, 0, False, "waiting for workers: 2 here, quorum 3"),
        (2, 1e9, False, "waiting for workers: 2 here, quorum 3"),
        (0, 1e9, False, "waiting for workers: 0 here, quorum 3"),
    ],
)
def test_a_round_begins_with_a_full_cohort_or_after_a_while_with_a_quorum(
    present: int, waited_s: float, begins: bool, why: str
) -> None:
    assert may_begin(present, 4, 3, waited_s=waited_s, gather_s=30) == (begins, why)


# -- lies ------------------------------------------------------------------------------------------------------------


def lied(times: int = 1) -> dict[str, dict[str, Any]]:
    return {"eve": {"times": times, "why": "junk"}}


def test_who_lies_three_times_in_a_run_rests_though_all_its_updates_were_counted() -> None:
    rests = Rests()
    assert rests.note({"ada": "", "eve": ""}, lied()) == {}
    assert rests.note({"ada": "", "eve": ""}) == {}
    assert rests.note({"ada": "", "eve": ""}, lied()) == {}
    assert rests.note({"ada": ""}, lied()) == {"eve": Rest(2, "junk")}
    assert rests.present == {"eve": Rest(2, "junk")}


def test_each_lie_after_the_third_begins_a_longer_rest() -> None:
    rests = Rests()
    assert rests.note({}, lied(3)) == {"eve": Rest(2, "junk")}
    assert rests.note({"eve": ""}, lied()) == {"eve": Rest(4, "junk")}
    assert rests.note({"eve": ""}) == {}, "what is counted is no reason to rest"
    assert rests.note({"eve": "no rows"}, lied(20)) == {"eve": Rest(8, "junk")}


def test_lies_and_failures_are_counted_apart() -> None:
    rests = Rests()
    for _ in range(2):
        assert rests.note({"eve": "no rows"}, lied()) == {}
    assert rests.note({"eve": ""}) == {}
    assert rests.note({"eve": "no rows"}) == {}
    assert rests.note({}, lied()) == {"eve": Rest(2, "junk")}


def test_for_the_invited_there_is_always_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coordinator.roster.WORKERS_MAX", 1)
    roster = Roster(["ada"])
    assert [roster.hear(hello(name), 0.0) for name in ("eve", "bob", "ada")] == [True, False, True]


def test_whoever_speaks_does_not_make_everyone_be_looked_at() -> None:
    looks = 0

    class Clock(float):
        """Counts how often it is compared."""

        __slots__ = ()

        def __add__(self, other: float) -> "Clock":
            return Clock(float(self) + other)

        def __lt__(self, other: float) -> bool:
            nonlocal looks
            looks += 1
            return float(self) < other

        def __le__(self, other: float) -> bool:
            return self < other or float(self) == other

        __gt__ = lambda self, other: not self <= other  # noqa: E731
        __ge__ = lambda self, other: not self < other  # noqa: E731

    roster = roster_of(*(f"w{number}" for number in range(1000)))
    for number in range(1000):
        now = Clock(1 + number / 1000)
        roster.hear(hello(f"w{number}"), now)
        assert roster.lapse(now) == []
        assert roster.due_at > now
    assert looks <= 10 * 1000
