"""Two workers of one name, as when a command is pasted into a second terminal."""

import asyncio
from pathlib import Path

import pytest

from broker.errors import UsageError
from broker.messages import Message
from tests.system.rig import Federation, Place, federation
from workers.service import Worker


async def first_ada(fed: Federation) -> Place:
    """One who is here when the other comes, and trains until her gate opens."""
    fed.lasting = False
    first = fed.join("ada")
    first.lesson.gate.clear()
    fed.begin()
    await fed.until(lambda: "ada" in fed.here())
    return first


async def test_the_second_of_two_workers_with_one_name_is_told_so_and_the_run_goes_on_with_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.post.NAMESAKE_S", 0.05)
    async with federation(tmp_path, rounds=3, cohort=1, quorum=1) as fed:
        first = await first_ada(fed)
        incarnation = fed.incarnation("ada")
        second = fed.join("ada")
        with pytest.raises(UsageError, match="another worker called ada is connected"):
            await second.task
        assert fed.incarnation("ada") == incarnation, "the second one has spoken in the name of the first"
        fed.places["first"] = first
        first.lesson.gate.set()
        await fed.end()
        assert fed.counted() == [["ada"]] * 3


async def test_the_second_of_two_workers_with_one_name_hears_nothing_that_is_said_to_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard, hear = list[Worker](), Worker._hear

    def hearing(worker: Worker, message: Message) -> None:
        heard.append(worker)
        hear(worker, message)

    monkeypatch.setattr(Worker, "_hear", hearing)
    monkeypatch.setattr("workers.post.NAMESAKE_S", 1.0)
    async with federation(tmp_path, rounds=6, cohort=1, quorum=1) as fed:
        first = await first_ada(fed)
        second = fed.join("ada")
        fed.places["first"] = first
        await asyncio.sleep(0.1)  # it has begun to listen to what it may listen to
        first.lesson.gate.set()
        await fed.end()
        assert first.worker in heard
        assert second.worker not in heard
        with pytest.raises(UsageError, match="another worker called ada is connected"):
            await second.task
