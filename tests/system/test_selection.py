"""Who is asked: more than are needed, so that nobody waits for the slowest; and for a while not who keeps failing."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from broker import topology
from broker.link import Delivery, Outgoing
from broker.messages import Closed, Part, Refusal
from coordinator.roster import Rest
from fluffle import app
from tests.system.rig import Federation, Place, expected, federation, read
from tests.system.test_rounds import NAMES, nothing_waits

FAILS = "ValueError: no rows"


def heard(place: Place, kind: type[Any]) -> list[Any]:
    """What of one kind the worker will have received."""
    found: list[Any] = []

    def look(what: Outgoing | Delivery) -> None:
        message = read(what)
        if not isinstance(what, Outgoing) and isinstance(message, kind):
            found.append(message)

    place.wire.hook = look
    return found


def fails(place: Place, times: int) -> None:
    """The worker's learner raises so many times, and never again."""
    place.lesson.fails, said = FAILS, iter(range(1, times + 1))

    def mend(what: Outgoing | Delivery) -> None:
        if isinstance(what, Outgoing) and isinstance(read(what), Refusal) and next(said) == times:
            place.lesson.fails = ""

    place.wire.hook = mend


def cohorts(fed: Federation) -> list[str]:
    """Who was asked, try by try."""
    return ["".join(line["cohort"]) for line in fed.lines() if line["event"] in ("round", "abandoned")]


# -- over-selection -------------------------------------------------------------------------------------------------


async def test_a_round_closes_at_its_target_and_nobody_waits_for_a_slow_worker(tmp_path: Path) -> None:
    async with federation(tmp_path, rounds=3, cohort=2, quorum=2, over_select=1.5) as fed:
        for name in ("a", "b"):
            fed.join(name)
        slow = fed.join("slow")
        slow.lesson.gate.clear()  # never opens while the run lasts
        closed = heard(slow, Closed)
        await fed.end()
        assert cohorts(fed) == ["abslow"] * 3
        assert fed.counted() == [["a", "b"]] * 3
        assert [line["why"] for line in fed.lines("round")] == ["2/3 updates, quorum 2: the target is reached"] * 3
        assert [line["refused"] for line in fed.lines("round")] == [{}] * 3
        assert [line["rested"] for line in fed.lines("round")] == [{}] * 3  # it is slow, and has not failed
        assert fed.weights() == expected(fed.store.plan, [["a", "b"]] * 3)
        await fed.until(lambda: len(closed) == 3)
        assert closed[0].reason == "it is closed: 2/3 updates, quorum 2: the target is reached"
        slow.lesson.gate.set()
        await nothing_waits(fed)


async def test_what_is_being_received_when_the_target_is_reached_is_left(tmp_path: Path) -> None:
    """c's update is accepted and half its parts have come when a and b are counted."""
    async with federation(tmp_path, rounds=2, cohort=2, quorum=2, over_select=1.5) as fed:
        for patience in ("LOOK_S", "STALL_S"):  # the rest of them is slow, not lost
            fed.patch.setattr(f"coordinator.post.{patience}", 60.0)
        places = {name: fed.join(name) for name in NAMES}
        for name in ("a", "b"):
            places[name].lesson.gate.clear()
        at_it, never, closed = asyncio.Event(), asyncio.Event(), heard(places["c"], Closed)

        def hold(what: Outgoing | Delivery) -> Awaitable[object] | None:
            if isinstance(what, Outgoing) or what.key != topology.upload_key("c") or at_it.is_set():
                return None
            message = read(what)
            if isinstance(message, Part) and message.index == 1:
                at_it.set()
                return never.wait()
            return None

        fed.hook = hold
        fed.begin()
        await at_it.wait()
        for name in ("a", "b"):
            places[name].lesson.gate.set()
        await fed.end()
        first = fed.lines("round")[0]
        assert sorted(first["counted"]) == ["a", "b"]
        assert first["why"] == "2/3 updates, quorum 2: the target is reached"
        assert (first["refused"], first["others"], first["rested"]) == ({}, [], {})
        assert fed.weights() == expected(fed.store.plan, fed.counted())
        await fed.until(lambda: any(message.of.round == 1 for message in closed))
        await nothing_waits(fed)


async def test_what_waits_to_be_added_when_the_target_is_reached_is_not_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """a is being added, b and c are received whole and wait for their turn; with b the target is reached."""
    async with federation(tmp_path, rounds=1, cohort=2, quorum=2, over_select=1.5) as fed:
        fed.drains = 3
        places = [fed.join(name) for name in NAMES]
        for place in places:
            place.lesson.gate.clear()
        begun, go_on, to_thread, added = asyncio.Event(), asyncio.Event(), asyncio.to_thread, []

        async def held(what: Any, /, *args: Any) -> Any:
            if what.__name__ == "_add":
                added.append(args[0])
                begun.set()
                await go_on.wait()
            return await to_thread(what, *args)

        monkeypatch.setattr("coordinator.desk.asyncio.to_thread", held)
        fed.begin()
        assert fed.coordinator
        adding: Any = fed.coordinator.desk._adding

        def queue(length: int) -> bool:
            return len(adding._waiters or ()) == length

        places[0].lesson.gate.set()
        await begun.wait()
        for number, place in enumerate(places[1:], 1):
            place.lesson.gate.set()
            await fed.until(partial(queue, number))
        go_on.set()
        await fed.end()
        assert fed.counted() == [["a", "b"]]
        assert len(added) == 2
        assert fed.weights() == expected(fed.store.plan, [["a", "b"]])
        await nothing_waits(fed)


@pytest.mark.parametrize("first", ["ab", "bc", "ac"])
async def test_a_version_is_a_function_of_the_set_that_was_counted(tmp_path: Path, first: str) -> None:
    async with federation(tmp_path, rounds=1, cohort=2, quorum=1, over_select=1.5) as fed:
        for place in [fed.join(name) for name in NAMES]:
            if place.name not in first:
                place.lesson.gate.clear()
        await fed.end()
        assert fed.counted() == [list(first)]
        assert fed.weights() == expected(fed.store.plan, [first])


async def test_a_round_that_asks_more_than_its_target_closes_with_fewer_if_the_others_cannot(tmp_path: Path) -> None:
    async with federation(tmp_path, rounds=1, cohort=2, quorum=1, over_select=1.5) as fed:
        places = [fed.join(name) for name in NAMES]
        for place in places[1:]:
            fails(place, 99)
        await fed.end()
        assert fed.counted() == [["a"]]
        assert fed.lines("round")[0]["why"] == "1/3 updates, quorum 1"


# -- rest -----------------------------------------------------------------------------------------------------------


async def test_a_worker_that_keeps_failing_is_rested_and_comes_back(tmp_path: Path) -> None:
    async with federation(tmp_path, rounds=11, quorum=2) as fed:
        for name in ("a", "b"):
            fed.join(name)
        fails(fed.join("c"), times=4)
        await fed.end()
        assert cohorts(fed) == ["abc", "abc", "abc", "ab", "ab", "abc", "ab", "ab", "ab", "ab", "abc"]
        rested = {line["round"]: line["rested"] for line in fed.lines("round") if line["rested"]}
        assert rested == {3: {"c": {"rounds": 2, "why": FAILS}}, 6: {"c": {"rounds": 4, "why": FAILS}}}
        assert fed.counted() == [["a", "b"]] * 10 + [list(NAMES)]
        assert fed.weights() == expected(fed.store.plan, fed.counted())
        await nothing_waits(fed)


async def test_the_coordinator_after_this_one_knows_who_rests(tmp_path: Path) -> None:
    async with federation(tmp_path, rounds=4, quorum=2) as fed:
        for name in ("a", "b"):
            fed.join(name)
        fails(fed.join("c"), times=4)
        await fed.end()
        assert [line["failed"] for line in fed.lines("round")] == [{"c": FAILS}] * 3 + [{}]
        await fed.begin()
        assert fed.coordinator
        assert fed.coordinator.desk.rests.present == {"c": Rest(1, FAILS)}


async def test_a_worker_that_should_rest_is_asked_all_the_same_if_there_is_no_quorum_without(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with federation(tmp_path, rounds=1) as fed:
        for name in ("a", "b"):
            fed.join(name)
        fails(fed.join("c"), times=3)
        await fed.end()
        assert cohorts(fed) == ["abc"] * 4
        assert [line["rested"] for line in fed.lines("abandoned")] == [{}, {}, {"c": {"rounds": 2, "why": FAILS}}]
        assert fed.weights() == expected(fed.store.plan, [NAMES])
    assert "c should rest, but there is no quorum without: asked all the same" in caplog.text


async def test_a_worker_that_dies_again_and_again_rests(tmp_path: Path) -> None:
    why = "it went away and owed an update"
    async with federation(tmp_path, rounds=60, quorum=2, gather_s=0.0) as fed:
        fed.join("a", lease_s=1000.0), fed.join("b", lease_s=1000.0)

        def failed() -> list[dict[str, Any]]:
            return [line for line in fed.lines() if line["event"] in ("round", "abandoned") and line["failed"]]

        fed.begin()
        for _ in range(20):  # more than three: it may begin with a task of a round that closed when it died before
            dying = fed.join("c", lease_s=0.3)
            dying.lesson.gate.clear()
            await dying.lesson.began.wait()
            await dying.die()
            await fed.until(lambda: "c" not in fed.here())
            if len(failed()) >= 3:
                break
        await fed.end()
        assert [line["failed"] for line in failed()][:3] == [{"c": why}] * 3
        assert [line["rested"] for line in failed()][:3] == [{}, {}, {"c": {"rounds": 2, "why": why}}]
        assert fed.counted() == [["a", "b"]] * 60


async def test_a_worker_that_says_that_it_is_stopping_has_not_failed(tmp_path: Path) -> None:
    async with federation(tmp_path, rounds=1, quorum=2) as fed:
        fed.begin()
        fed.join("a"), fed.join("b")
        leaving = fed.join("c", lease_s=1000.0, drain_s=0.0)
        leaving.lesson.gate.clear()
        await leaving.lesson.began.wait()
        await leaving.leave()
        await fed.end()
        assert fed.lines("round")[0]["refused"] == {"c": "it left: it was told to stop"}
        assert fed.coordinator
        assert fed.coordinator.desk.rests._records == {}


# -- what `fluffle status` says -------------------------------------------------------------------------------------


def status(fed: Federation) -> tuple[dict[str, Any], str]:
    """As JSON, and as people see it."""
    said, shown = (CliRunner().invoke(app, ["status", str(fed.run), *more]) for more in (["--json"], []))
    assert (said.exit_code, shown.exit_code) == (0, 0), (said.output, shown.output)
    return json.loads(said.output), shown.output


async def until_status(fed: Federation, holds: Callable[[dict[str, Any]], bool]) -> tuple[dict[str, Any], str]:
    await fed.until(lambda: holds(fed.store.now()))
    return status(fed)


async def test_status_says_how_the_open_round_stands_who_is_waited_for_and_who_rests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    async with federation(tmp_path, rounds=4, quorum=2, round_s=600.0) as fed:
        for name in ("a", "b"):
            fed.join(name)
        fails(fed.join("c"), times=3)
        held = fed.places["b"].lesson
        fed.begin()
        await fed.until(lambda: len(fed.lines("round")) == 2)
        held.gate.clear()
        found, shown = await until_status(
            fed, lambda now: now.get("round") == 4 and now["counted"] == ["a"] and "trains" in str(now["waiting"])
        )
        now = found["now"]
        assert (now["phase"], now["why"]) == ("open", "round 4: waiting for b")
        assert (now["attempt"], now["quorum"], now["target"], now["cohort"]) == (1, 2, 3, ["a", "b"])
        assert now["waiting"] == {"b": "it trains or uploads"}
        assert now["resting"] == {"c": {"rounds": 2, "why": FAILS}}
        assert 500 < now["deadline_s"] <= 600
        assert found["abandoned"] is None
        assert "round 4, attempt 1: 1/2 updates, target 3, quorum 2; the deadline is in" in shown
        assert "waits for b: it trains or uploads" in shown
        assert f"c rests for 2 more rounds: {FAILS}" in shown
        assert f"round 3: c began to rest for 2 rounds: {FAILS}" in shown
        held.gate.set()
        await fed.end()


async def test_status_says_why_the_last_try_was_abandoned_until_the_version_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    async with federation(tmp_path, rounds=1) as fed:
        for name in ("a", "b"):
            fed.join(name)
        fails(fed.join("c"), times=3)
        held = fed.places["b"].lesson
        fed.begin()
        await fed.until(lambda: len(fed.lines("abandoned")) == 3)
        held.gate.clear()
        found, shown = await until_status(fed, lambda now: now.get("attempt") == 4 and len(now["counted"]) == 2)
        why = f"2/3 updates, quorum 3: everyone who was asked has answered; c: {FAILS}"
        assert (found["abandoned"]["attempt"], found["abandoned"]["why"]) == (3, why)
        assert f"attempt 3 at round 1 was abandoned: {why}" in shown
        assert f"c rests for 2 more rounds, but is asked: there is no quorum without: {FAILS}" in shown
        held.gate.set()
        await fed.end()
        assert status(fed)[0]["abandoned"] is None
