"""Whole runs in one event loop: what a round counts, whom it waits for, and what is left when it is over."""

import asyncio
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from broker import topology
from broker.files import checksum
from broker.link import Delivery, Outgoing
from broker.messages import Answer, Part, Score, Task, Update
from tests.memory import MemoryLink
from tests.system.rig import MODEL, Federation, expected, federation, read

NAMES = ("a", "b", "c")


def when(kind: type[Any], number: int, then: Callable[[], None]) -> Callable[[Any], None]:
    """A hook that acts once: on the so-and-so-many-th message of a kind."""
    seen = itertools.count(1)

    def look(what: Outgoing | Delivery) -> None:
        if isinstance(read(what), kind) and next(seen) == number:
            then()

    return look


async def nothing_waits(fed: Federation) -> None:
    """Every queue is empty, and those of the run are gone."""
    await fed.close()
    assert await fed.depths() == {}
    link = MemoryLink(fed.broker)
    assert await link.depth(topology.inbox_queue("test")) is None
    assert await link.depth(topology.hello_queue("test")) is None


async def test_a_run_of_five_rounds_makes_what_the_sum_makes(tmp_path: Path) -> None:
    async with federation(tmp_path, rounds=5) as fed:
        for name in NAMES:
            fed.join(name)
        await fed.end()
        assert fed.weights() == expected(fed.store.plan, [NAMES] * 5)
        assert [line["event"] for line in fed.lines()] == ["round"] * 5 + ["final"]
        first, final = fed.lines()[0], fed.lines("final")[0]
        assert (first["round"], first["attempt"], first["version"]) == (1, 1, 1)
        assert first["why"] == "3/3 updates, quorum 3"
        assert first["metrics"] == pytest.approx({"loss": 1.0})
        assert first["bytes_down"] > 500_000
        assert first["bytes_up"] > 1_500_000
        assert (final["version"], final["workers"], final["scored"]["examples"]) == (5, ["a", "b", "c"], 30.0)
        await nothing_waits(fed)


async def test_the_bytes_of_a_version_are_summed_once_a_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    summed: list[str] = []

    def counting(data: memoryview) -> str:
        summed.append(checksum(data))
        return summed[-1]

    for module in ("service", "store", "updates"):
        monkeypatch.setattr(f"coordinator.{module}.checksum", counting)
    async with federation(tmp_path, rounds=3) as fed:
        for name in NAMES:
            fed.join(name)
        await fed.end()
        lines = fed.lines("round")
        assert summed == [lines[0]["start"], *(line["weights"] for line in lines)]
        assert summed[3] == checksum(fed.store.load(3)[1])


@pytest.mark.parametrize("order", list(itertools.permutations(NAMES)))
async def test_the_order_of_arrival_does_not_change_a_bit(tmp_path: Path, order: tuple[str, ...]) -> None:
    async with federation(tmp_path, rounds=1) as fed:
        fed.begin()
        places = [fed.join(name) for name in order]
        for place in places:
            place.lesson.gate.clear()
        arrived: list[str] = []
        for place in places:
            await place.lesson.began.wait()
        for place in places:
            place.lesson.gate.set()
            await fed.until(lambda: len(fed.store.now().get("counted", ())) > len(arrived) or bool(fed.lines()))
            arrived.append(place.name)
        await fed.end()
        assert fed.weights() == expected(fed.store.plan, [NAMES])


async def test_a_cyclic_run_goes_from_one_to_the_next_in_the_plans_order(tmp_path: Path) -> None:
    order = ("b", "c", "a")
    trained: list[str] = []

    def look(what: Outgoing | Delivery) -> None:
        message = read(what)
        if isinstance(message, Update) and isinstance(what, Outgoing):
            trained.append(message.worker)

    async with federation(tmp_path, rounds=2, schedule="cyclic", workers=list(order)) as fed:
        fed.hook = look
        for name in NAMES:
            fed.join(name)
        await fed.end()
        assert trained == [*order, *order]
        assert fed.weights() == expected(fed.store.plan, [order] * 2)
        assert fed.counted() == [list(NAMES)] * 2
        await nothing_waits(fed)


async def test_a_worker_that_joins_late_is_in_the_next_round(tmp_path: Path) -> None:
    async with federation(tmp_path, rounds=3, quorum=2, gather_s=0.01) as fed:
        fed.begin()
        places = [fed.join("a"), fed.join("b")]
        await fed.until(lambda: len(fed.lines("round")) == 1)
        for place in places:
            place.lesson.gate.clear()
        fed.join("c")
        await fed.until(lambda: "c" in fed.here())
        for place in places:
            place.lesson.gate.set()
        await fed.end()
        assert fed.counted()[0] == ["a", "b"]
        assert fed.counted()[-1] == ["a", "b", "c"]
        assert fed.weights() == expected(fed.store.plan, fed.counted())


async def test_a_worker_told_to_stop_finishes_its_job_and_says_goodbye(tmp_path: Path) -> None:
    async with federation(tmp_path, rounds=2, quorum=2) as fed:
        fed.begin()
        fed.join("a"), fed.join("b")
        leaving = fed.join("c")
        leaving.lesson.gate.clear()
        await leaving.lesson.began.wait()
        leaving.stop.set()
        leaving.lesson.gate.set()
        await leaving.leave()
        await fed.end()
        assert fed.counted() == [["a", "b", "c"], ["a", "b"]]
        assert fed.weights() == expected(fed.store.plan, fed.counted())


async def test_a_goodbye_closes_the_round_without_waiting_for_the_lease(tmp_path: Path) -> None:
    async with federation(tmp_path, rounds=1, quorum=2) as fed:
        fed.begin()
        fed.join("a"), fed.join("b")
        leaving = fed.join("c", lease_s=1000.0, drain_s=0.0)
        leaving.lesson.gate.clear()
        await leaving.lesson.began.wait()
        await leaving.leave()
        await fed.end()
        assert fed.lines("round")[0]["refused"] == {"c": "it left: it was told to stop"}
        assert fed.weights() == expected(fed.store.plan, [["a", "b"]])


async def test_a_worker_whose_lease_ends_is_not_waited_for_once_the_quorum_is_there(tmp_path: Path) -> None:
    async with federation(tmp_path, rounds=1, quorum=2) as fed:
        fed.begin()
        fed.join("a"), fed.join("b")
        dying = fed.join("c", lease_s=0.3)
        dying.lesson.gate.clear()
        await dying.lesson.began.wait()
        await dying.die()
        await fed.end()
        line = fed.lines("round")[0]
        assert sorted(line["counted"]) == ["a", "b"]
        assert line["seconds"] < 20 * dying.worker.who.lease_s
        assert fed.weights() == expected(fed.store.plan, [["a", "b"]])


async def test_a_worker_that_dies_and_returns_is_sent_the_task_again(tmp_path: Path) -> None:
    async with federation(tmp_path, rounds=1) as fed:
        fed.begin()
        fed.join("a"), fed.join("b")
        dying = fed.join("c")
        dying.lesson.gate.clear()
        await dying.lesson.began.wait()
        await dying.die()
        fed.join("c")
        await fed.end()
        assert fed.counted() == [list(NAMES)]
        assert fed.weights() == expected(fed.store.plan, [NAMES])


@pytest.mark.parametrize(
    ("kind", "number"),
    [(Task, 1), (Part, 2), (Part, 5), (Update, 1)],
    ids=["before its parts", "while parts arrive", "while uploading", "when it has said so"],
)
async def test_a_lost_connection_costs_a_worker_nothing_but_time(
    tmp_path: Path, kind: type[Any], number: int
) -> None:
    async with federation(tmp_path, rounds=1) as fed:
        fed.begin()
        fed.join("a"), fed.join("b")
        place = fed.join("c")
        place.wire.hook = when(kind, number, place.wire.drop)
        await fed.end()
        assert fed.counted() == [list(NAMES)]
        assert fed.weights() == expected(fed.store.plan, [NAMES])
        assert fed.lines("round")[0]["attempt"] == 1
        await nothing_waits(fed)


async def test_a_connection_lost_while_training_does_not_train_again(tmp_path: Path) -> None:
    async with federation(tmp_path, rounds=1) as fed:
        fed.begin()
        fed.join("a"), fed.join("b")
        place = fed.join("c")
        place.lesson.gate.clear()
        await place.lesson.began.wait()
        before = place.worker._incarnation
        place.wire.drop()
        await fed.until(lambda: place.worker._incarnation not in ("", before))
        await fed.until(lambda: fed.incarnation("c") == place.worker._incarnation)
        place.lesson.gate.set()
        await fed.end()
        assert fed.counted() == [list(NAMES)]
        assert place.lesson.done == [(True, 1), (False, 1)]
        assert fed.lines("round")[0]["bytes_down"] < 2 * MODEL.size_bytes  # nor is the version sent again
        await nothing_waits(fed)


async def test_an_abandoned_round_is_tried_again_and_says_why(tmp_path: Path) -> None:
    async with federation(tmp_path, rounds=1) as fed:
        fed.begin()
        fed.join("a"), fed.join("b")
        weary = fed.join("c")
        weary.lesson.fails = "ValueError: no rows"
        await fed.until(lambda: bool(fed.lines("abandoned")))
        weary.lesson.fails = ""
        await fed.end()
        abandoned = fed.lines("abandoned")[0]
        assert abandoned["why"] == (
            "2/3 updates, quorum 3: everyone who was asked has answered; c: ValueError: no rows"
        )
        assert abandoned["refused"] == {"c": "ValueError: no rows"}
        made = fed.lines("round")[0]
        assert made["attempt"] == len(fed.lines("abandoned")) + 1
        assert fed.weights() == expected(fed.store.plan, [NAMES])
        await nothing_waits(fed)


async def test_a_refusal_closes_the_round_at_once(tmp_path: Path) -> None:
    async with federation(tmp_path, rounds=1, quorum=2) as fed:
        fed.begin()
        fed.join("a"), fed.join("b")
        fed.join("c").lesson.fails = "ValueError: no rows"
        await fed.end()
        line = fed.lines("round")[0]
        assert line["refused"] == {"c": "ValueError: no rows"}
        assert line["why"] == "2/3 updates, quorum 2"
        assert fed.weights() == expected(fed.store.plan, [["a", "b"]])
        await nothing_waits(fed)


async def test_a_worker_that_hangs_costs_the_round_its_deadline_and_no_more(tmp_path: Path) -> None:
    async with federation(tmp_path, rounds=1, quorum=2, round_s=0.4) as fed:
        fed.begin()
        fed.join("a"), fed.join("b")
        hanging = fed.join("c")
        hanging.lesson.gate.clear()
        await fed.until(lambda: bool(fed.lines("round")))
        hanging.lesson.gate.set()
        await fed.end()
        assert fed.counted() == [["a", "b"]]
        assert fed.weights() == expected(fed.store.plan, [["a", "b"]])


async def test_an_update_that_comes_while_the_round_is_summed_up_is_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The deadline has passed and the sum is being taken in a thread: whoever comes now must not touch it."""
    async with federation(tmp_path, rounds=1, quorum=2, round_s=0.4) as fed:
        fed.begin()
        fed.join("a"), fed.join("b")
        slow = fed.join("c", lease_s=60.0)
        heard = asyncio.Event()
        to_thread = asyncio.to_thread

        def look(what: Outgoing | Delivery) -> None:
            if isinstance(read(what), Answer):
                heard.set()

        async def held(what: Any, /, *args: Any) -> Any:
            if what.__name__ == "_draft":
                slow.lesson.gate.set()
                await heard.wait()
            return await to_thread(what, *args)

        def task(*arguments: Any, **words: Any) -> Task:
            """The worker would give up at the deadline, too; this one does not keep to it."""
            return replace(asked(*arguments, **words), deadline_s=60.0)

        assert fed.coordinator is not None
        asked = fed.coordinator._task
        monkeypatch.setattr(fed.coordinator, "_task", task)
        monkeypatch.setattr("coordinator.service.asyncio.to_thread", held)
        slow.lesson.gate.clear()
        slow.wire.hook = look
        await fed.end()
        assert fed.counted() == [["a", "b"]]
        assert fed.weights() == expected(fed.store.plan, [["a", "b"]])
        assert [(line["worker"], line["verdict"]) for line in fed.lines("round")[0]["others"]] == [("c", "late")]


async def test_a_worker_that_returns_while_the_round_is_summed_up_does_not_undo_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its lease ended, the others were enough, the sum is being taken: the round is decided already."""
    async with federation(tmp_path, rounds=1, quorum=2) as fed:
        fed.begin()
        fed.join("a"), fed.join("b")
        dying = fed.join("c")
        to_thread = asyncio.to_thread

        async def held(what: Any, /, *args: Any) -> Any:
            if what.__name__ == "_draft":
                fed.join("c")
                await fed.until(lambda: "c" in fed.here())
            return await to_thread(what, *args)

        monkeypatch.setattr("coordinator.service.asyncio.to_thread", held)
        dying.lesson.gate.clear()
        await dying.lesson.began.wait()
        await dying.die()
        await fed.end()
        assert fed.lines("abandoned") == []
        assert fed.weights() == expected(fed.store.plan, [["a", "b"]])


async def test_a_worker_that_only_evaluates_scores_every_version(tmp_path: Path) -> None:
    async with federation(tmp_path, rounds=2) as fed:
        judge = fed.join("judge", trains=False)
        fed.begin()
        await fed.until(lambda: "judge" in fed.here())
        for name in NAMES:
            fed.join(name)
        await fed.end()
        assert [(line["version"], line["worker"]) for line in fed.lines("score")][-1] == (2, "judge")
        assert fed.counted() == [list(NAMES)] * 2
        assert all(not train for train, _ in judge.lesson.done)
        assert fed.lines("final")[0]["workers"] == list(NAMES)
        await nothing_waits(fed)


async def test_every_round_scores_the_version_that_it_began_with(tmp_path: Path) -> None:
    async with federation(tmp_path, rounds=2) as fed:
        for name in NAMES:
            fed.join(name)
        await fed.end()
        assert [line["scored"]["examples"] for line in fed.lines("round")] == [30.0, 30.0]


async def test_a_run_that_is_done_leaves_no_queues_when_started_again(tmp_path: Path) -> None:
    """The coordinator died after its last version and before it had tidied up."""
    async with federation(tmp_path, rounds=1) as fed:
        for name in NAMES:
            fed.join(name)
        fed.hook = when(Score, 4, fed.kill)
        await fed.end()
        assert fed.weights() == expected(fed.store.plan, [NAMES])
        await nothing_waits(fed)


async def test_a_broker_restarted_while_the_last_version_is_on_its_way_is_sent_it_again(tmp_path: Path) -> None:
    async with federation(tmp_path, rounds=1) as fed:
        restarted: list[Any] = []

        def look(what: Any) -> None:
            message = read(what)
            if isinstance(message, Task) and message.work == "evaluate" and not restarted:
                restarted.append(message)
                fed.broker.pause()
                fed.broker.forget()
                asyncio.get_running_loop().call_later(0.01, fed.broker.resume)

        fed.hook = look
        fed.begin()
        for name in NAMES:
            fed.join(name)
        await fed.end()
        final = fed.lines("final")[0]
        assert final["workers"] == list(NAMES)
        assert final["seconds"] < 4.0  # it is not the clock that ended it


@pytest.mark.parametrize("exchange", [topology.DOWN, topology.CONTROL, topology.UP])
async def test_an_exchange_that_was_deleted_by_hand_is_made_anew(tmp_path: Path, exchange: str) -> None:
    """Nobody consumes it, so nobody is told; and with it went all bindings to everybody's queues."""
    async with federation(tmp_path, rounds=3, cohort=2, quorum=2) as fed:
        removed = list[int]()

        def look(what: Outgoing | Delivery) -> None:
            message = read(what)
            if not removed and isinstance(message, Answer) and message.verdict == "accepted":
                removed.append(1)
                fed.broker.remove(exchange)

        fed.hook = look
        for name in ("a", "b"):
            fed.join(name)
        await fed.end()
        assert removed
        assert fed.counted() == [["a", "b"]] * 3


async def test_parts_that_were_asked_for_again_may_take_their_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with federation(tmp_path, rounds=1, cohort=1, quorum=1) as fed:
        fed.patch.setattr("coordinator.post.STALL_S", 5.0)
        post, uploads = fed.join("a").worker.post, 0
        upload = post.upload

        async def upload_late(*arguments: Any) -> None:
            nonlocal uploads
            uploads += 1
            if uploads > 1:
                await asyncio.sleep(0.3)  # many times as long as a coordinator takes to see that there is none
            await upload(*arguments)
            if uploads == 1:  # they are lost, before it is said that they are there
                fed.broker.pause()
                fed.broker.forget()
                fed.broker.resume()

        monkeypatch.setattr(post, "upload", upload_late)
        fed.begin()
        await fed.end()
        assert [line["attempt"] for line in fed.lines("round")] == [1]
        assert uploads == 2, "they are asked for once"
