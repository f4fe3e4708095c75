"""Versions that come as changes of the one before: whoever follows has the same bits, and nobody is lost."""

import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from broker.link import Delivery, Outgoing
from broker.messages import Part, Task
from tests.system.rig import Federation, Lesson, federation, read
from tests.system.test_hosting import NAMES, hosting
from tests.system.test_rounds import when


def all_have_the_versions(fed: Federation, lessons: Iterable[Lesson]) -> int:
    """Whoever trained began with the version that is on the disk; how many trainings that were."""
    known = {number + 1: zlib.crc32(fed.store.load(number)[1]) for number in range(fed.store.plan.rounds)}
    count = 0
    for lesson in lessons:
        for number, checksum in lesson.received.items():
            assert checksum == known[number], f"round {number}"
            count += 1
    return count


def count_sent(fed: Federation) -> dict[str, int]:
    """How many workers were sent the whole, and how many a change."""
    sent = {"full": 0, "int8": 0, "bfloat16": 0}

    def look(what: Outgoing | Delivery) -> None:
        if isinstance(what, Outgoing) and isinstance(task := read(what), Task) and task.work == "train":
            sent[task.down] += len(what.keys)

    fed.hook = look
    return sent


@pytest.mark.parametrize("down", ["int8", "bfloat16"])
async def test_those_who_have_the_version_before_are_sent_its_change_and_have_the_same_bits(
    tmp_path: Path, down: str
) -> None:
    async with federation(tmp_path, rounds=4, down=down) as fed:
        sent = count_sent(fed)
        places = [fed.join(name) for name in ("a", "b", "c")]
        await fed.end()
        assert sent["full"] == 3
        assert sent[down] == 9
        assert all_have_the_versions(fed, [place.lesson for place in places]) == 12


async def test_hosted_workers_that_are_asked_now_and_then_have_the_same_bits(tmp_path: Path) -> None:
    plan: dict[str, Any] = {"rounds": 12, "cohort": 20, "quorum": 20, "down": "int8"}
    # whose lease ends is sent the whole: on a machine that has much to do many would be
    async with federation(tmp_path, **plan) as fed, hosting(fed, lease_s=60.0) as house:
        sent = count_sent(fed)
        fed.begin()
        await fed.until(lambda: len(fed.here()) == len(NAMES))
        await fed.end()
        assert [len(counted) for counted in fed.counted()] == [20] * 12
        assert all_have_the_versions(fed, house.lessons.values()) == 240
        assert sent["full"] >= 20
        assert sent["int8"] > 60


@pytest.mark.parametrize(("kind", "number"), [(Task, 2), (Part, 4), (Part, 5)])
async def test_who_loses_the_connection_is_sent_the_whole_again(tmp_path: Path, kind: type, number: int) -> None:
    async with federation(tmp_path, rounds=4, down="int8") as fed:
        places = [fed.join(name) for name in ("a", "b", "c")]
        places[2].wire.hook = when(kind, number, places[2].wire.drop)
        await fed.end()
        assert fed.counted() == [["a", "b", "c"]] * 4
        assert all_have_the_versions(fed, [place.lesson for place in places]) == 12


async def test_who_does_not_have_the_version_before_asks_for_the_whole(tmp_path: Path) -> None:
    async with federation(tmp_path, rounds=4, down="int8") as fed:
        places = [fed.join(name) for name in ("a", "b", "c")]

        def forget() -> None:
            places[2].worker.spool._held.clear()

        places[2].wire.hook = when(Task, 2, forget)
        sent = count_sent(fed)
        await fed.end()
        assert sent["full"] == 4
        assert fed.counted() == [["a", "b", "c"]] * 4
        assert all_have_the_versions(fed, [place.lesson for place in places]) == 12


@pytest.mark.parametrize("words", [{"format": "bfloat16"}, {"format": "int8"}, {"format": "top-k", "keep": 0.1}])
async def test_updates_travel_in_the_plans_format(tmp_path: Path, words: dict[str, object]) -> None:
    async with federation(tmp_path, rounds=2, **words) as fed:
        for name in ("a", "b", "c"):
            fed.join(name)
        await fed.end()
        assert fed.counted() == [["a", "b", "c"]] * 2
        assert fed.lines("round")[0]["bytes_up"] < 0.6 * fed.lines("round")[0]["bytes_down"] * 3
