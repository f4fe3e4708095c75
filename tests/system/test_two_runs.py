"""Two runs that ask the same workers at once: both are served, in turn, and neither loses a task to the other."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from broker.link import Delivery, Outgoing
from broker.messages import Claim
from coordinator.store import Store
from tests.system.rig import MODEL, Federation, expected, federation, plan, read, start_weights

NAMES = ("a", "b")
ROUNDS = 3
RUNS = {"test", "other"}


@asynccontextmanager
async def two_runs(folder: Path, **of_other: Any) -> AsyncIterator[tuple[Federation, Federation]]:
    """One broker and two runs on it; workers join the first."""
    async with federation(folder, rounds=ROUNDS, cohort=2, quorum=2) as fed:
        values = {"run": "other", "seed": 8, "rounds": ROUNDS, "cohort": 2, "quorum": 2}
        Store.create(folder / "other" / "run", plan(**values | of_other), MODEL, memoryview(start_weights()))
        other = Federation(folder / "other", fed.broker, fed.patch)
        yield fed, other
        await other.close()
        assert await other.depths() == {}


async def in_hand(fed: Federation, other: Federation) -> None:
    """Begin both; worker a has a task of each, and one of them is being done."""
    claims = set[str]()

    def look(what: Outgoing | Delivery) -> None:
        said = read(what)
        if isinstance(what, Outgoing) and isinstance(said, Claim) and said.worker == "a":
            claims.add(said.of.run)

    fed.hook = look
    for name in NAMES:
        fed.join(name)
    fed.places["a"].lesson.gate.clear()
    fed.begin()
    await fed.places["a"].lesson.began.wait()
    other.begin()
    await fed.until(lambda: claims == RUNS)


async def both_are_right(fed: Federation, other: Federation) -> None:
    """Both runs come to their end, with every worker in every round, at the first try."""
    for each in (fed, other):
        await each.end()
        assert each.counted() == [[*NAMES]] * ROUNDS
        assert [line["why"] for line in each.lines("abandoned")] == []
        assert [line["refused"] for line in each.lines("round")] == [{}] * ROUNDS
        assert each.weights() == expected(each.store.plan, [NAMES] * ROUNDS)


async def test_a_worker_that_two_runs_ask_at_once_serves_both_in_turn(tmp_path: Path) -> None:
    async with two_runs(tmp_path) as (fed, other):
        await in_hand(fed, other)
        fed.places["a"].lesson.gate.set()
        await both_are_right(fed, other)
        assert sorted(number for trains, number in fed.places["a"].lesson.done if trains) == [1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("who", ["worker", "coordinator", "connection"])
async def test_with_tasks_of_two_runs_in_hand_dies_the(tmp_path: Path, who: str) -> None:
    async with two_runs(tmp_path) as (fed, other):
        fed.patch.setattr("workers.outbox.STILL_S", 0.1)
        await in_hand(fed, other)
        place = fed.places["a"]
        if who == "worker":
            await place.die()
            place = fed.join("a")
        elif who == "coordinator":
            other.kill()
        else:
            place.wire.drop()
        place.lesson.gate.set()
        await both_are_right(fed, other)


async def test_what_waits_behind_another_run_until_its_deadline_is_refused_with_the_reason(tmp_path: Path) -> None:
    async with two_runs(tmp_path, round_s=1.0, quorum=1, rounds=1) as (fed, other):
        for name in NAMES:
            fed.join(name)
        fed.places["a"].lesson.gate.clear()
        fed.begin()
        await fed.places["a"].lesson.began.wait()
        await other.end()
        (line,) = other.lines("round")
        assert sorted(line["counted"]) == ["b"]
        assert "other runs had their turn" in line["refused"]["a"]
        fed.places["a"].lesson.gate.set()
        await fed.end()
        assert fed.counted() == [[*NAMES]] * ROUNDS
