"""Thirty workers in one process, ten of them asked in a round: to the coordinator they are thirty workers."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import pytest

from broker import topology
from broker.errors import UsageError
from broker.messages import Task
from tests.memory import MemoryLink
from tests.system.rig import BOUND_S, LEASE_S, MODEL, Federation, Lesson, Wire, expected, federation
from tests.system.test_rounds import when
from workers import host
from workers.ledger import SUFFIX
from workers.post import Shared
from workers.service import Worker
from workers.spool import Spool
from workers.training import Seat
from workers.work import Who

MANY = 30
NAMES = tuple(f"w-{index}" for index in range(1, MANY + 1))


@dataclass(slots=True)
class House:
    """One process's workers."""

    wire: Wire
    spool: Spool
    lessons: dict[str, Lesson]
    workers: list[Worker]
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    serving: asyncio.Task[None] | None = None

    async def leave(self) -> None:
        """As SIGTERM does."""
        assert self.serving is not None
        self.stop.set()
        async with asyncio.timeout(BOUND_S):
            await self.serving


@asynccontextmanager
async def hosting(
    fed: Federation, names: tuple[str, ...] = NAMES, *, lease_s: float = LEASE_S
) -> AsyncIterator[House]:
    """Workers that share a link and a folder, and train one after another; at the end nothing of them is left."""
    spool, wire, turn = Spool(fed.folder / "models", workers=len(names)), Wire(fed.broker, fed.hook), asyncio.Lock()
    shared, lessons = Shared(wire, spool, workers=len(names)), {name: Lesson(spool, turn=turn) for name in names}
    whos = [Who(name, "lesson", lease_s=lease_s, drain_s=5.0, hosted=True) for name in names]
    house = House(wire, spool, lessons, [Worker(who, shared, cast(Seat, lessons[who.name])) for who in whos])
    fed.names.update(names)
    house.serving = asyncio.create_task(host.serve(house.workers, house.stop))
    try:
        yield house
    finally:
        for lesson in lessons.values():
            lesson.gate.set()
        house.stop.set()
        await asyncio.wait([house.serving])
        await wire.close()
        spool.remove()
    assert spool.in_use == 0
    assert {path.suffix for path in spool.folder.glob("*")} <= {SUFFIX}


async def test_a_sampled_cohort_of_hosted_workers_makes_what_workers_alone_would_make(tmp_path: Path) -> None:
    async with federation(tmp_path, rounds=4, cohort=10, quorum=10) as fed, hosting(fed) as house:
        fed.begin()
        await fed.until(lambda: len(fed.here()) == MANY)
        await fed.end()
        assert fed.weights() == expected(fed.store.plan, fed.counted())
        cohorts = [line["cohort"] for line in fed.lines("round")]
        assert [len(cohort) for cohort in cohorts] == [10] * 4
        assert len({tuple(cohort) for cohort in cohorts}) == 4
        assert fed.lines("final")[0]["workers"] == sorted(NAMES)
        await house.leave()
        assert await fed.depths() == {}


async def test_hosted_workers_take_the_room_of_a_few_versions_and_their_own_updates(tmp_path: Path) -> None:
    async with federation(tmp_path, rounds=3, cohort=MANY, quorum=MANY) as fed, hosting(fed) as house:
        most = 0

        def look(_: object) -> None:
            nonlocal most
            most = max(most, house.spool.in_use)

        house.wire.hook = look
        await fed.end()
        assert fed.counted() == [sorted(NAMES)] * 3
        versions, updates = 4, 2 * MANY  # landing, held, in training; without a verdict, and the next one
        assert MANY < most <= versions + updates
        size_bytes = sum(file.stat().st_size for file in house.spool.folder.iterdir())
        assert size_bytes < 2 * (versions + updates) * MODEL.size_bytes


async def test_a_lost_connection_costs_hosted_workers_nothing_but_time(tmp_path: Path) -> None:
    async with federation(tmp_path, rounds=2, cohort=MANY, quorum=MANY) as fed, hosting(fed) as house:
        house.wire.hook = when(Task, 7, house.wire.drop)
        await fed.end()
        assert fed.counted() == [sorted(NAMES)] * 2
        assert fed.weights() == expected(fed.store.plan, [sorted(NAMES)] * 2)


async def test_a_broker_that_has_lost_everything_is_told_all_again(tmp_path: Path) -> None:
    """Another RabbitMQ under the same address: no exchange is there, and no queue."""
    async with federation(tmp_path, rounds=1, cohort=5, quorum=5) as fed, hosting(fed, NAMES[:5]) as house:
        await fed.until(lambda: all(worker._incarnation for worker in house.workers))
        fed.broker.pause()
        for name in NAMES[:5]:
            for queue in (topology.down_queue(name), topology.control_queue(name), topology.upload_queue(name)):
                fed.broker.delete(queue)
        fed.broker._exchanges.clear()
        fed.broker.resume()
        await fed.end()
        assert fed.counted() == [sorted(NAMES[:5])]


async def test_a_hosted_worker_whose_name_is_taken_ends_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("workers.post.NAMESAKE_S", 0.05)
    async with federation(tmp_path, rounds=1, cohort=5, quorum=5) as fed:
        other = MemoryLink(fed.broker)
        for each in (topology.FEDERATION, topology.of_worker("w-3")):
            await other.declare(each)
        async with other.consume(topology.down_queue("w-3"), alone=True), hosting(fed, NAMES[:6]):
            await fed.end()
            said = "w-3 has ended: another worker called w-3 is connected"
            await fed.until(lambda: said in caplog.text)
        assert fed.counted() == [["w-1", "w-2", "w-4", "w-5", "w-6"]]
        await other.close()


async def test_when_no_hosted_worker_can_work_the_reason_is_told(tmp_path: Path) -> None:
    async with federation(tmp_path) as fed, hosting(fed, NAMES[:3]) as house:
        for lesson in house.lessons.values():
            lesson.unready = "data('x') failed"
        assert house.serving is not None
        with pytest.raises(UsageError, match=r"data\('x'\) failed"):
            await house.serving


async def test_hosted_workers_told_to_stop_finish_their_work_and_say_goodbye(tmp_path: Path) -> None:
    async with federation(tmp_path, rounds=2, cohort=6, quorum=3) as fed, hosting(fed, NAMES[:6]) as house:
        fed.begin()
        first = house.lessons["w-1"]
        for lesson in house.lessons.values():
            lesson.gate.clear()
        await asyncio.wait(
            [asyncio.ensure_future(each.began.wait()) for each in house.lessons.values()],
            return_when=asyncio.FIRST_COMPLETED,
        )
        house.stop.set()
        for lesson in house.lessons.values():
            lesson.gate.set()
        await house.leave()
        await fed.until(lambda: bool(fed.lines("round")))
        assert len(fed.counted()[0]) == 6
        await fed.until(lambda: fed.here() == [])
        assert first.done == [(True, 1)]
