"""A round's decisions: time goes in, and out comes a phase or a verdict, with its reason in words."""

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.messages import PART_BYTES_MIN, Attempt, Payload, Update
from broker.tensors import Layout, TensorSpec
from coordinator.round import REISSUES_MAX, WHY_MAX, Phase, Round, Verdict, judge

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


def test_who_is_revoked_is_a_stranger_from_then_on_and_is_not_waited_for() -> None:
    here = parallel(quorum=1)
    count(here, "ada")
    here.accept("bob")
    for worker in ("ada", "bob", "eve", "zoe"):
        here.revoke(worker, "its invitation was revoked")
    assert not here.takes("bob")
    assert here.counted == {"ada": 10}
    assert here.refused == dict.fromkeys(("bob", "eve"), "its invitation was revoked")
    for worker in ("ada", "bob", "eve"):
        assert here.judge(OF, worker) == (Verdict.STRANGER, f"{worker} belongs to the federation no more")
    assert here.phase(1)[0] is Phase.CLOSED
    assert here.fared == {"ada": ""}


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
    assert [*here.outstanding] == ["eve"]


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


# -- the target -----------------------------------------------------------------------------------------------------


def over_selected() -> Round:
    """Two are enough; three were asked at 0."""
    begun = Round(OF, [["ada", "bob", "eve"]], quorum=1, turn_s=TURN_S, target=2)
    begun.begin_turn(0)
    return begun


def test_it_closes_as_soon_as_the_target_is_reached() -> None:
    here = over_selected()
    count(here, "bob")
    assert here.phase(1) == (Phase.OPEN, "waiting for ada, eve")
    count(here, "eve")
    assert here.turn_over(1) == (True, "the target is reached")
    assert here.phase(1) == (Phase.CLOSED, "2/3 updates, quorum 1: the target is reached")
    assert here.fared == {"bob": "", "eve": ""}


def test_what_is_being_received_when_the_target_is_reached_is_not_counted() -> None:
    here = over_selected()
    here.accept("ada")
    assert here.takes("ada")
    count(here, "bob", "eve")
    assert not here.takes("ada")
    assert here.phase(1)[0] is Phase.CLOSED
    here.end_turn(1)
    assert [*here.outstanding] == ["ada"]
    assert "ada" not in here.fared


def test_an_update_after_the_target_is_late_even_before_the_turn_has_ended() -> None:
    here = over_selected()
    count(here, "bob", "eve")
    assert here.judge(OF, "ada") == (Verdict.LATE, "the target of round 7 is reached: 2 updates are counted")


def test_fewer_workers_than_the_target_are_waited_for_as_ever() -> None:
    here = Round(OF, [["ada", "bob"]], quorum=1, turn_s=TURN_S, target=4)
    here.begin_turn(0)
    count(here, "ada")
    assert here.phase(1) == (Phase.OPEN, "waiting for bob")
    count(here, "bob")
    assert here.phase(1) == (Phase.CLOSED, "2/2 updates, quorum 1")


# -- how everyone has fared -----------------------------------------------------------------------------------------


def test_who_refuses_lies_goes_away_or_is_silent_has_failed_and_who_says_goodbye_has_not() -> None:
    here = Round(OF, [["a", "b", "c", "d", "e", "f"]], quorum=1, turn_s=TURN_S)
    here.begin_turn(0)
    count(here, "a")
    here.withdraw("b", "ValueError: no rows")
    here.refuse("c", "part 3 does not match its checksum.")
    here.lose("d")
    here.leave("e", "it left: it was told to stop")
    here.end_turn(600)
    assert here.fared == {
        "a": "",
        "b": "ValueError: no rows",
        "c": "part 3 does not match its checksum.",
        "d": "it went away and owed an update",
        "f": "nothing came from it within 600 s",
    }


def test_who_was_ready_for_a_secure_sum_and_is_not_in_it_has_failed_whatever_it_says() -> None:
    """Else a few could be ready in every round, say goodbye, come back, and end each sum."""
    here = parallel()
    count(here, "ada", "bob", "eve")
    here.leave("bob", "it left: for a while")
    here.decline("eve", "not at this hour")
    for worker in ("bob", "eve"):
        here.drop_out(worker, "it dropped out of the secure sum")
    assert here.fared == {"ada": "", "bob": "it dropped out of the secure sum"}
    assert here.declined == {"eve": "not at this hour"}


def test_a_secure_sum_that_is_lost_is_a_failure_of_whose_fault_it_was_or_of_all() -> None:
    known, unknown = parallel(), parallel()
    for here in (known, unknown):
        count(here, "ada", "bob", "eve")
    known.go_without("bob dealt false shares.", {"bob"})
    unknown.go_without("the masked words do not add up.")
    assert [*known.fared] == ["bob"]
    assert [*unknown.fared] == ["ada", "bob", "eve"]
    assert [here.phase(0)[0] for here in (known, unknown)] == [Phase.CLOSED] * 2


def test_a_goodbye_after_a_refusal_does_not_undo_it() -> None:
    here = parallel()
    here.withdraw("eve", "no data")
    here.leave("eve", "it left")
    assert here.fared == {"eve": "no data"}


def test_who_was_not_asked_yet_has_not_failed() -> None:
    here = cyclic()
    here.end_turn(600)
    assert here.fared == {"ada": "nothing came from it within 600 s"}
    here.begin_turn(600)
    here.lose("bob")
    here.end_turn(601)
    assert here.fared["bob"] == "it went away and owed an update"
    assert "eve" not in here.fared


def test_who_is_waited_for_is_said_with_the_reason() -> None:
    here = Round(OF, [["a", "b", "c", "d", "e"]], quorum=1, turn_s=TURN_S)
    here.begin_turn(0)
    count(here, "e")
    here.accept("a")
    here.lose("b")
    here.claimed.add("c")
    assert here.waits_for == {
        "a": "its update is being received",
        "b": "it is away and may return",
        "c": "it trains or uploads",
        "d": "it has not got the whole task yet",
    }


def test_a_worker_that_loses_its_task_again_and_again_is_sent_it_only_so_often() -> None:
    here = parallel()
    assert all(here.reissue("eve") for _ in range(REISSUES_MAX))
    assert not here.reissue("eve")
    assert here.refused == {"eve": "it has lost its task 33 times"}


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


def test_an_update_of_an_evaluation_is_late_whatever_is_open() -> None:
    evaluation = Attempt("run", 6, 0)
    assert judge(update(MODEL, evaluation), parallel(), MODEL)[0] is Verdict.LATE
    assert judge(update(MODEL, evaluation), None, MODEL)[0] is Verdict.LATE


def test_an_update_while_the_round_is_summed_up_is_late_and_a_second_copy_of_one_that_counts_a_duplicate() -> None:
    here = parallel()
    count(here, "ada")
    here.accept("bob")
    here.end_turn(1200)
    said = (Verdict.LATE, "round 7 is being summed up")
    assert judge(Update(OF, "eve", 6, 10, {}, Payload("p", PART_BYTES_MIN, MODEL.specs)), here, MODEL) == said
    assert judge(update(MODEL), here, MODEL)[0] is Verdict.DUPLICATE


# -- whatever happens, in whatever order ----------------------------------------------------------------------------

COHORT = ("a", "b", "c", "d", "e")
EVENTS = ("update", "add", "added", "lies", "refuses", "leaves", "lost", "back", "loses its task")
STRAYS = (OF, OF, OF, Attempt("run", 7, 2), Attempt("run", 6, 1), Attempt("run", 6, 0), Attempt("other", 7, 1))
STEP = st.tuples(
    st.sampled_from(EVENTS), st.sampled_from((*COHORT, "stranger")), st.sampled_from(STRAYS), st.floats(0, 40)
)


class Desk:
    """What the desk does with a round: it receives several, and adds one at a time if that is still wanted."""

    def __init__(self, here: Round) -> None:
        self.here = here
        self.received: list[str] = []
        self.adding = ""
        self.sum: list[str] = []
        self.now = 0.0

    def step(self, event: str, worker: str, of: Attempt) -> None:
        here = self.here
        if event == "update":
            verdict, reason = judge(
                Update(of, worker, 6, 1, {}, Payload("p", PART_BYTES_MIN, MODEL.specs)), here, MODEL
            )
            assert isinstance(verdict, Verdict)
            assert reason
            if verdict is Verdict.ACCEPTED:
                assert of == OF
                assert worker in here.asked
                here.accept(worker)
                self.received.append(worker)
        elif event == "add" and not self.adding and self.received:
            worker = self.received.pop()
            self.adding = worker if here.takes(worker) else ""
        elif event in ("added", "lies"):
            self.finish(lies=event == "lies")
        elif event == "refuses":
            here.withdraw(worker, "no rows")
        elif event == "leaves":
            here.leave(worker, "it left")
        elif event == "lost":
            here.lose(worker)
        elif (event == "back" and here.find(worker)) or (event == "loses its task" and worker in here.outstanding):
            here.reissue(worker)

    def finish(self, *, lies: bool = False) -> None:
        if self.adding and lies:
            self.here.refuse(self.adding, "NaN")
        elif self.adding:
            self.here.count(self.adding, 1)
            self.sum.append(self.adding)
        self.adding = ""

    def end_turn(self) -> None:
        self.here.end_turn(self.now)
        self.finish()
        for worker in self.received:
            assert not self.here.takes(worker)
        self.received.clear()


def holds(here: Round, desk: Desk) -> None:
    counted, refused, owing = set(here.counted), set(here.refused), set(here.outstanding)
    assert len(counted) <= here.target
    assert not counted & refused
    assert not (counted | refused) & owing
    assert set(here.asked) <= counted | refused | owing
    assert sorted(counted) == sorted(desk.sum)  # nothing is half counted


def turns_of(cyclic_: bool) -> Iterator[list[str]]:
    yield from ([worker] for worker in COHORT) if cyclic_ else [list(COHORT)]


@given(st.lists(STEP, max_size=120), st.booleans(), st.integers(1, 5), st.integers(1, 5))
@settings(max_examples=400, deadline=None)
def test_a_round_always_ends_and_counts_whole_updates_no_more_than_its_target(
    steps: list[tuple[str, str, Attempt, float]], cyclic_: bool, quorum: int, target: int
) -> None:
    target = len(COHORT) if cyclic_ else max(target, quorum)
    here = Round(OF, list(turns_of(cyclic_)), quorum=quorum, turn_s=100.0, target=target)
    desk, left = Desk(here), iter(steps)
    while here.has_turn:
        here.begin_turn(desk.now)
        began_at = desk.now
        while not here.turn_over(desk.now)[0]:
            event, worker, of, passes_s = next(left, ("nothing", "a", OF, 40.0))
            desk.step(event, worker, of)
            holds(here, desk)
            desk.now += passes_s
            assert here.turn_over(desk.now)[1]
            assert here.turn_over(desk.now)[0] or desk.now < began_at + 200  # twice `turn_s`, and no more
        desk.end_turn()
        holds(here, desk)
        before = here.outcome, dict(here.counted)
        for worker in COHORT:  # it has ended, whoever comes or goes
            desk.step("update", worker, OF)
            desk.step("add", worker, OF)
            here.find(worker)
            here.lose(worker)
        assert (here.outcome, here.counted) == before
    assert here.outcome is not None
    assert here.outcome[0] is (Phase.CLOSED if len(here.counted) >= quorum else Phase.ABANDONED)
    assert {worker for worker, why in here.fared.items() if not why} == set(here.counted)


def test_why_a_round_was_abandoned_is_said_at_a_length_that_can_be_read_however_many_have_refused() -> None:
    names = [f"w{number}" for number in range(1000)]
    crowd = Round(OF, [names], quorum=1000, turn_s=60)
    crowd.begin_turn(0)
    for name in names:
        crowd.refuse(name, "x" * 1000)
    phase, why = crowd.phase(1)
    assert phase is Phase.ABANDONED
    assert why.startswith("0/1000 updates, quorum 1000: everyone who was asked has answered; w0: xxx")
    assert len(why) == WHY_MAX


def test_twice_as_many_workers_are_twice_the_work_and_not_four_times() -> None:
    looks = 0

    class Name(str):
        """Counts how often it is looked at."""

        __slots__ = ()

        def __eq__(self, other: object) -> bool:
            nonlocal looks
            looks += 1
            return str(self) == other

        def __hash__(self) -> int:
            nonlocal looks
            looks += 1
            return hash(str(self))

    def looks_of(many: int) -> int:
        nonlocal looks
        here = Round(OF, [[Name(number) for number in range(many)]], quorum=many, turn_s=TURN_S)
        here.begin_turn(0)
        here.lose("0")  # of many somebody is always away
        looks = 0
        for worker in [Name(number) for number in reversed(range(many))]:
            assert here.find(worker)
            here.turn_over(1)
            count(here, worker)
            here.turn_over(1)
        assert here.phase(1)[0] is Phase.CLOSED
        return looks

    assert looks_of(200) < 2.5 * looks_of(100)


def test_of_many_who_are_waited_for_only_the_first_are_named() -> None:
    crowd = Round(OF, [[f"w{number}" for number in range(100)]], quorum=1, turn_s=TURN_S)
    crowd.begin_turn(0)
    assert crowd.phase(1)[1] == f"waiting for {', '.join(f'w{number}' for number in range(12))}, others"
    assert [*crowd.waits_for] == [f"w{number}" for number in range(100)]
