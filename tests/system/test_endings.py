"""Rounds end, whoever hangs: a drain, a send, a worker that comes and goes; and what comes late is told as late."""

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import coordinator.post
import coordinator.round
from broker import topology
from broker.link import Delivery, Lane, Outgoing
from broker.messages import Attempt, Part, Task
from tests.hostile.liar import HONEST, LIAR, OF, RUN, a_liar_among_two, a_voice, parts, update
from tests.system.rig import expected, federation, read
from tests.system.test_rounds import NAMES, nothing_waits


@asynccontextmanager
async def never() -> AsyncIterator[Any]:
    """As consuming does while the broker is away."""
    await asyncio.Event().wait()
    yield


async def test_a_drain_that_cannot_begin_ends_with_the_time_of_a_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with federation(tmp_path, rounds=1, quorum=2, round_s=0.5) as fed:
        fed.begin()
        assert fed._wire
        consume = fed._wire.consume

        def dark(queue: str, **how: Any) -> AbstractAsyncContextManager[AsyncIterator[Delivery]]:
            return never() if queue == topology.upload_queue("c") else consume(queue, **how)

        monkeypatch.setattr(fed._wire, "consume", dark)
        for name in NAMES:
            fed.join(name)
        await fed.end()
        line = fed.lines("round")[0]
        assert line["refused"] == {"c": "3 of its parts did not come."}
        assert fed.weights() == expected(fed.store.plan, [["a", "b"]])


async def test_uploads_that_queue_behind_one_that_hangs_end_with_the_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is one drain, and b's trickles in it; c's waits behind it, is whole, and cannot wait for ever."""
    monkeypatch.setattr(coordinator.round, "DRAIN_S_MIN", 0.5)
    async with federation(tmp_path, rounds=1, quorum=1, round_s=0.5) as fed:
        fed.patch.setattr(coordinator.post, "STALL_S", 60.0)
        fed.patch.setattr(coordinator.post, "LOOK_S", 60.0)
        fed.drains = 1
        places = {name: fed.join(name) for name in NAMES}
        places["b"].lesson.gate.clear()
        places["c"].lesson.gate.clear()
        hung, release = asyncio.Event(), asyncio.Event()

        def hold(what: Outgoing | Delivery) -> Awaitable[object] | None:
            if not isinstance(what, Outgoing) and what.key == topology.upload_key("b") and not hung.is_set():
                hung.set()
                return release.wait()
            return None

        fed.hook = hold
        fed.begin()
        assert fed.coordinator
        monkeypatch.setattr(fed.coordinator.post, "drain", patient(fed.coordinator.post.drain))
        await fed.until(lambda: fed.store.now().get("counted") == ["a"])
        places["b"].lesson.gate.set()
        await hung.wait()
        places["c"].lesson.gate.set()
        await fed.end()
        line = fed.lines("round")[0]
        assert list(line["counted"]) == ["a"]
        assert line["why"] == "1/3 updates, quorum 1"
        assert 1.0 <= line["seconds"] < 5.0
        assert fed.weights() == expected(fed.store.plan, [["a"]])
        await nothing_waits(fed)


def patient(drain: Any) -> Any:
    """A drain with a bound beyond the turn's: only the turn's end can end it."""
    return lambda update, room, **_: drain(update, room, within_s=60.0)


async def test_sending_a_task_ends_with_the_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The broker takes the header of the first try's task and then nothing more."""
    async with federation(tmp_path, rounds=1, round_s=0.5) as fed:
        fed.begin()
        assert fed._wire
        publish = fed._wire.publish

        async def stuck(message: Outgoing, **how: Any) -> None:
            part = read(message)
            if message.lane is Lane.DOWN and isinstance(part, Part) and part.payload.startswith("test/1/1/"):
                await asyncio.Event().wait()
            await publish(message, **how)

        monkeypatch.setattr(fed._wire, "publish", stuck)
        for name in NAMES:
            fed.join(name)
        await fed.end()
        assert "the deadline has passed without a, b, c" in fed.lines("abandoned")[0]["why"]
        assert fed.lines("abandoned")[0]["seconds"] < 5.0
        assert fed.weights() == expected(fed.store.plan, [NAMES])


async def test_a_worker_that_loses_its_task_without_end_is_sent_it_so_often_and_no_more(tmp_path: Path) -> None:
    async with a_liar_among_two(tmp_path, rounds=1) as (fed, liar):
        assert fed.coordinator
        here = fed.coordinator.desk.open
        assert here

        def heard_as(incarnation: str) -> bool:
            return fed.incarnation(LIAR) == incarnation and not here.returned

        for number in range(100):
            await liar.hello(incarnation=f"another-{number}")
            await fed.until(partial(heard_as, f"another-{number}"))
            if LIAR in here.round.refused:
                break
        await liar.leave()
        line = fed.lines("round")[0]
        assert line["refused"] == {LIAR: "it has lost its task 33 times"}
        assert fed.weights() == expected(fed.store.plan, [HONEST])


# -- late -----------------------------------------------------------------------------------------------------------


async def test_the_update_of_an_abandoned_try_is_late_in_the_next_and_counted_in_none(tmp_path: Path) -> None:
    async with a_liar_among_two(tmp_path, rounds=1, round_s=0.5) as (fed, liar):
        await fed.until(lambda: bool(fed.lines("abandoned")))
        await liar.upload(parts())
        await liar.say(update())
        assert (await liar.answer()).verdict == "late"
        await liar.leave()
        others = [line for each in fed.lines() for line in each.get("others", []) if line["worker"] == LIAR]
        assert [line["verdict"] for line in others] == ["late"]
        assert fed.weights() == expected(fed.store.plan, [HONEST])
        assert await liar.left() == {}


async def test_what_comes_when_no_round_is_open_is_told_with_the_next_and_tallied(tmp_path: Path) -> None:
    """To whom it comes from nothing is said: that try may come again, where a folder was put back."""
    async with federation(tmp_path, cohort=2, quorum=2, rounds=1) as fed, a_voice(fed) as liar:
        fed.begin()

        def tallied() -> int:
            return sum(each.get("times", 1) for each in fed.coordinator.desk.facts.others) if fed.coordinator else 0

        for number in range(1, 4):
            await liar.say(update())
            await fed.until(lambda number=number: tallied() == number)  # type: ignore[misc]
        for name in HONEST:
            fed.join(name)
        await fed.end()
        late = {"worker": LIAR, "verdict": "late", "reason": "it is for round 1, which is over", "times": 3}
        assert fed.lines("round")[0]["others"] == [late]
        assert fed.weights() == expected(fed.store.plan, [HONEST])


@pytest.mark.parametrize("of", [OF, Attempt(RUN, 2, 0), Attempt(RUN, 0, 0)], ids=["round 1", "the last", "the first"])
async def test_updates_of_rounds_that_are_over_and_of_evaluations_are_late_while_the_last_version_is_scored(
    tmp_path: Path, of: Attempt
) -> None:
    async with federation(tmp_path, cohort=2, quorum=2, rounds=2) as fed, a_voice(fed) as liar:
        scores: list[Outgoing] = []

        def hold(what: Outgoing | Delivery) -> Awaitable[object] | None:
            if isinstance(what, Outgoing) and isinstance(message := read(what), Task) and message.work == "evaluate":
                scores.append(what)
                return gone_on.wait()
            return None

        gone_on, fed.hook = asyncio.Event(), hold
        for name in HONEST:
            fed.join(name)
        fed.begin()
        await fed.until(lambda: bool(scores))
        await liar.say(update(of=of))
        assert (await liar.answer()).verdict == "late"
        gone_on.set()
        await fed.end()
        assert fed.counted() == [list(HONEST)] * 2
        assert fed.weights() == expected(fed.store.plan, [HONEST] * 2)
