"""A round's decisions: time goes in, and out comes a phase or a verdict, with its reason in words."""

import pytest

from broker.messages import PART_BYTES_MIN, Attempt, Payload, Update
from broker.tensors import Layout, TensorSpec
from coordinator.round import Phase, Round, Verdict, judge

OF = Attempt("run", 7, 1)
TURN_S = 600.0
MODEL = Layout((TensorSpec("w", "float32", (2,)),))


def parallel(*, quorum: int = 2) -> Round:
    """ada, bob and eve were asked at 0 and have until 600."""
    begun = Round(OF, [["ada", "bob", "eve"]], quorum=quorum, turn_s=TURN_S)
    assert begun.begin_turn(0) == ("ada", "bob", "eve")
    return begun


def cyclic(*, quorum: int = 2) -> Round:
    """ada was asked at 0, bob and eve come after her."""
    begun = Round(OF, [["ada"], ["bob"], ["eve"]], quorum=quorum, turn_s=TURN_S)
    assert begun.begin_turn(0) == ("ada",)
    return begun


def count(here: Round, *workers: str) -> None:
    for worker in workers:
        assert here.judge(OF, worker) == (Verdict.ACCEPTED, "in time")
        here.accept(worker)
        here.count(worker, 10)


# -- phases ---------------------------------------------------------------------------------------------------------


def test_it_is_open_while_somebody_may_still_answer() -> None:
    here = parallel()
    assert here.phase(0) == (Phase.OPEN, "waiting for ada, bob, eve")
    count(here, "bob")
    assert here.phase(599.9) == (Phase.OPEN, "waiting for ada, eve")


def test_it_waits_for_everyone_even_when_the_quorum_is_there() -> None:
    here = parallel()
    count(here, "ada", "bob")
    assert here.phase(1) == (Phase.OPEN, "waiting for eve")


def test_it_closes_at_once_when_everyone_has_answered() -> None:
    here = parallel()
    count(here, "eve", "ada", "bob")
    assert here.phase(1) == (Phase.CLOSED, "3/3 updates, quorum 2")


def test_it_closes_at_the_deadline_with_a_quorum() -> None:
    here = parallel()
    count(here, "ada", "bob")
    assert here.turn_over(600) == (True, "the deadline has passed without eve")
    assert here.phase(600) == (Phase.CLOSED, "2/3 updates, quorum 2")


def test_it_is_abandoned_at_the_deadline_without_a_quorum() -> None:
    here = parallel()
    count(here, "ada")
    why = "1/3 updates, quorum 2: the deadline has passed without bob, eve"
    assert here.phase(600) == (Phase.ABANDONED, why)


def test_the_deadline_waits_for_an_upload_that_is_arriving() -> None:
    here = parallel()
    count(here, "ada")
    here.accept("eve")
    assert here.phase(1199.9) == (Phase.OPEN, "receiving from eve")
    here.count("eve", 5)
    assert here.phase(1199.9) == (Phase.CLOSED, "2/3 updates, quorum 2")


def test_an_upload_that_is_still_arriving_as_long_again_after_the_deadline_is_left() -> None:
    here = parallel()
    count(here, "ada", "bob")
    here.accept("eve")
    assert here.ends_at == 1200
    assert here.turn_over(1200) == (True, "the time for uploads has passed without eve")
    assert here.takes("eve")
    here.end_turn(1200)
    assert not here.takes("eve")
    assert here.outcome == (Phase.CLOSED, "2/3 updates, quorum 2")
    assert here.outstanding == ("eve",)


def test_a_deadline_of_seconds_leaves_a_minute_for_what_was_accepted_before_it() -> None:
    here = Round(OF, [["ada"]], quorum=1, turn_s=0.5)
    here.begin_turn(100)
    here.accept("ada")
    assert (here.deadline_at, here.ends_at) == (100.5, 160.5)
    assert not here.turn_over(160)[0]
    assert here.turn_over(160.5)[0]


def test_an_upload_that_turns_out_to_be_invalid_is_waited_for_no_more() -> None:
    here = parallel()
    here.accept("eve")
    here.refuse("eve", "part 3 does not match its checksum.")
    assert here.turn_over(1) == (False, "waiting for ada, bob")
    why = "0/3 updates, quorum 2: the deadline has passed without ada, bob; eve: part 3 does not match its checksum."
    assert here.phase(600) == (Phase.ABANDONED, why)


def test_a_worker_that_leaves_while_its_upload_arrives_is_counted_all_the_same() -> None:
    here = parallel()
    count(here, "ada", "bob")
    here.accept("eve")
    here.withdraw("eve", "it left: it was told to stop")
    assert here.phase(1) == (Phase.OPEN, "receiving from eve")
    here.count("eve", 5)
    assert here.phase(1) == (Phase.CLOSED, "3/3 updates, quorum 2")
    assert here.refused == {}


def test_a_worker_that_withdraws_is_waited_for_no_more() -> None:
    here = parallel()
    count(here, "ada", "bob")
    here.withdraw("eve", "it left: it was told to stop")
    assert here.phase(1) == (Phase.CLOSED, "2/3 updates, quorum 2")
    assert here.refused == {"eve": "it left: it was told to stop"}


def test_when_everyone_refuses_it_is_abandoned_at_once_with_all_their_reasons() -> None:
    here = parallel()
    for worker, reason in (("ada", "no room"), ("bob", "no data"), ("eve", "no time")):
        here.refuse(worker, reason)
    why = "0/3 updates, quorum 2: everyone who was asked has answered; ada: no room; bob: no data; eve: no time"
    assert here.phase(1) == (Phase.ABANDONED, why)


def test_a_lost_worker_is_not_waited_for_once_the_quorum_is_there() -> None:
    here = parallel()
    count(here, "ada")
    here.lose("eve")
    assert here.phase(1) == (Phase.OPEN, "waiting for bob")
    count(here, "bob")
    assert here.turn_over(1) == (True, "eve went away")
    assert here.phase(1) == (Phase.CLOSED, "2/3 updates, quorum 2")


def test_lost_workers_are_waited_for_until_the_deadline_while_the_quorum_is_missing() -> None:
    here = parallel()
    count(here, "ada")
    here.lose("bob")
    here.lose("eve")
    assert here.phase(599) == (Phase.OPEN, "waiting for bob, eve to return")
    assert here.phase(600)[0] is Phase.ABANDONED


def test_a_worker_that_returns_owes_its_update_again() -> None:
    here = parallel()
    here.lose("eve")
    assert here.find("eve")
    assert here.phase(1) == (Phase.OPEN, "waiting for ada, bob, eve")
    count(here, "eve")


@pytest.mark.parametrize("owed", ["counted", "refused", "arriving", "not asked"])
def test_a_worker_that_returns_owes_nothing_if_it_has_answered_or_was_not_asked(owed: str) -> None:
    here = parallel()
    if owed == "counted":
        count(here, "eve")
    elif owed == "refused":
        here.refuse("eve", "no data")
    elif owed == "arriving":
        here.accept("eve")
    here.lose("eve")
    assert not here.find("zoe" if owed == "not asked" else "eve")


def test_who_has_been_counted_cannot_be_refused_any_more_nor_strangers_ever() -> None:
    here = parallel()
    count(here, "ada")
    here.refuse("ada", "it left")
    here.refuse("zoe", "I am not in this")
    assert here.refused == {}
    assert here.counted == {"ada": 10}


# -- turns ----------------------------------------------------------------------------------------------------------


def test_a_cyclic_round_asks_one_after_another_each_with_a_deadline_of_its_own() -> None:
    here = cyclic(quorum=3)
    count(here, "ada")
    assert here.phase(100) == (Phase.OPEN, "next is the turn of bob")
    assert here.begin_turn(100) == ("bob",)
    assert here.turn_over(699) == (False, "waiting for bob")
    count(here, "bob")
    assert here.begin_turn(700) == ("eve",)
    assert not here.has_turn
    count(here, "eve")
    assert here.phase(701) == (Phase.CLOSED, "3/3 updates, quorum 3")


def test_a_turn_without_an_answer_is_passed_over() -> None:
    here = cyclic()
    assert here.turn_over(600) == (True, "the deadline has passed without ada")
    assert here.phase(600) == (Phase.OPEN, "next is the turn of bob")
    here.begin_turn(600)
    here.lose("bob")
    assert here.turn_over(601) == (True, "bob went away")
    here.begin_turn(601)
    here.lose("eve")
    assert here.turn_over(602) == (False, "waiting for eve to return")
    assert here.phase(1201) == (Phase.ABANDONED, "0/3 updates, quorum 2: the deadline has passed without eve")


def test_an_update_belongs_into_the_turn_of_its_worker() -> None:
    here = cyclic()
    assert here.judge(OF, "bob") == (Verdict.LATE, "the turn of bob in round 7 has not come")
    here.begin_turn(600)
    assert here.judge(OF, "ada") == (Verdict.LATE, "the turn of ada in round 7 is over")
    assert here.judge(OF, "bob") == (Verdict.ACCEPTED, "in time")


# -- verdicts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("of", "worker", "verdict"),
    [
        (OF, "ada", (Verdict.ACCEPTED, "in time")),
        (OF, "zoe", (Verdict.STRANGER, "zoe was not asked in round 7")),
        (Attempt("other", 7, 1), "ada", (Verdict.STRANGER, "it is for the run other, this is run")),
        (Attempt("run", 6, 1), "ada", (Verdict.LATE, "it is for round 6, this is round 7")),
        (Attempt("run", 7, 2), "ada", (Verdict.LATE, "it is for round 7, attempt 2, this is round 7")),
    ],
)
def test_an_update_is_judged_by_what_it_was_made_for(of: Attempt, worker: str, verdict: tuple[Verdict, str]) -> None:
    assert parallel().judge(of, worker) == verdict


def test_the_second_of_two_updates_is_a_duplicate_while_the_first_arrives_and_after() -> None:
    here = parallel()
    here.accept("ada")
    assert here.judge(OF, "ada")[0] is Verdict.DUPLICATE
    here.count("ada", 10)
    assert here.judge(OF, "ada") == (Verdict.DUPLICATE, "an update of ada is counted in round 7 already")


def test_an_update_after_a_refusal_is_late() -> None:
    here = parallel()
    here.refuse("ada", "no data")
    assert here.judge(OF, "ada") == (Verdict.LATE, "ada is out of round 7: no data")


def test_a_lost_worker_whose_update_comes_after_all_is_in_time() -> None:
    here = parallel()
    here.lose("ada")
    count(here, "ada")


def update(layout: Layout, of: Attempt = OF) -> Update:
    return Update(of, "ada", 6, 10, {}, Payload("p", PART_BYTES_MIN, layout.specs))


def test_an_update_with_other_tensors_than_the_models_is_invalid() -> None:
    other = Layout((TensorSpec("w", "float32", (3,)),))
    assert judge(update(MODEL), parallel(), MODEL) == (Verdict.ACCEPTED, "in time")
    why = "its tensors are not those that the plan asks for: w float32[3] should be w float32[2]"
    assert judge(update(other), parallel(), MODEL) == (Verdict.INVALID, why)


def test_an_update_between_two_rounds_is_late() -> None:
    assert judge(update(MODEL), None, MODEL) == (Verdict.LATE, "it is for round 7, which is over")


def test_an_update_that_is_late_is_not_called_invalid() -> None:
    other = Layout((TensorSpec("w", "float32", (3,)),))
    assert judge(update(other, Attempt("run", 6, 1)), parallel(), MODEL)[0] is Verdict.LATE
