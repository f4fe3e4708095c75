"""Two runs that ask the same workers at once: both are served, in turn, and neither loses a task to the other."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest

import workers.post
from broker import topology
from broker.link import Delivery, Lane, Outgoing, publish_parts
from broker.messages import PART_BYTES_MIN, Attempt, Claim, Payload, Refusal, Task, Update
from broker.parts import split
from coordinator.post import Post
from coordinator.store import Store
from tests.memory import MemoryBroker, MemoryLink
from tests.system.rig import BOUND_S, MODEL, Federation, expected, federation, plan, read, start_weights
from workers.outbox import SENT_MAX_OF_ALL, Outbox
from workers.owner import Owner
from workers.residuals import Residuals
from workers.spool import Spool
from workers.work import Done, Who

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


@pytest.mark.parametrize("there", [True, False], ids=["that_is_there", "that_is_gone"])
async def test_parts_of_another_run_are_left_to_its_coordinator(monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    """Whoever took them would have them sent again, into the hands of a third. One that is gone is not waited for."""
    monkeypatch.setattr("coordinator.post.RETRY_S", 0.01)
    monkeypatch.setattr("coordinator.post.LOOK_S", 10.0 if there else 0.05)
    link = MemoryLink(MemoryBroker())
    for part in (topology.FEDERATION, topology.of_worker("a")):
        await link.declare(part)
    data, queue = memoryview(start_weights()), topology.upload_queue("a")
    updates = {run: update_of(run) for run in ("other", "test")}
    for each in updates.values():
        await publish_parts(link, split(each.payload, data), queue, (topology.upload_key("a"),), lane=Lane.UP)
    posts = {run: Post(link, run, 1) for run in updates}
    async with asyncio.timeout(BOUND_S):
        mine = asyncio.create_task(
            posts["test"].drain(updates["test"], memoryview(start_weights()), within_s=BOUND_S)
        )
        await asyncio.sleep(0.05)
        if there:
            assert await posts["other"].drain(updates["other"], memoryview(start_weights()), within_s=BOUND_S)
        assert await mine
    assert await link.depth(topology.control_queue("a")) == await link.depth(queue) == 0, "nothing was sent again"
    await link.close()


def update_of(run: str) -> Update:
    of = Attempt(run, 1, 1)
    return Update(of, "a", 0, 1, {}, Payload(f"{run}/1/1/1-x/a/y", PART_BYTES_MIN, MODEL.specs))


async def test_an_update_that_is_given_up_for_those_of_other_runs_is_refused(tmp_path: Path) -> None:
    """Its coordinator would wait for nothing, until its deadline."""
    said: list[Any] = []

    class Away:
        async def uploads(self) -> int:
            return 0

        async def upload(self, *_: Any) -> None:
            pass

        async def say(self, message: Any) -> None:
            said.append(message)

    spool, works = Spool(tmp_path / "spool"), list[asyncio.Task[None]]()
    outbox = Outbox(
        "a", cast(workers.post.Post, Away()), owner=Owner(Who("a", "lesson"), spool.folder),
        residuals=Residuals(spool.folder, "a"), tell=lambda *_: None, rest=lambda: None,
    )  # fmt: skip

    def start(work: Any) -> asyncio.Task[None]:
        works.append(asyncio.create_task(work))
        return works[-1]

    for number in range(SENT_MAX_OF_ALL + 1):
        payload = Payload(f"run-{number}/1/1/1-x", PART_BYTES_MIN, MODEL.specs)
        task = Task(Attempt(f"run-{number}", 1, 1), "train", 0, 60.0, 0, {}, payload)
        outbox.put(task, Done(1, {}, {}, spool.take(MODEL.size_bytes), 0.0, MODEL), start)
    await asyncio.wait(works, timeout=0.2)
    assert [message.of.run for message in said if isinstance(message, Refusal)] == ["run-0"]
    for work in works:
        work.cancel()
    await asyncio.wait(works)
    spool.remove()
