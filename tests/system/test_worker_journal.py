"""A worker that dies with a finished update: the next one sends it again, and nothing is trained twice."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from broker.link import Delivery, Outgoing
from broker.messages import Answer, Attempt, Part, Update
from tests.system.rig import BOUND_S, Federation, Lesson, expected, federation, read
from workers.journal import SUFFIX

ROUNDS = 3
AT = 2
OF = Attempt("test", AT, 1)
Point = Callable[[Any], bool]
POINTS: dict[str, Point] = {
    "a part of its update is sent": lambda message: part_of_a(message) and message.index == 0,
    "all parts of its update are sent": lambda message: part_of_a(message) and message.index == 2,
    "its update is said": lambda message: isinstance(message, Update) and (message.worker, message.of) == ("a", OF),
    "its update is accepted": lambda message: isinstance(message, Answer)
    and (message.verdict, message.of) == ("accepted", OF),
}  # fmt: skip


def part_of_a(message: Any) -> bool:
    return isinstance(message, Part) and message.payload.startswith(f"test/{AT}/1/") and "/a/" in message.payload


def kept(fed: Federation) -> list[str]:
    return [path.name for path in fed.folder.glob(f"spool-*/*{SUFFIX}")]


@pytest.mark.parametrize("point", POINTS, ids=lambda name: name.replace(" ", "-"))
@pytest.mark.parametrize("away", ["at once", "after the coordinator was killed, too"], ids=["alone", "both"])
async def test_a_worker_killed_when(tmp_path: Path, point: str, away: str) -> None:
    async with federation(tmp_path, rounds=ROUNDS, cohort=2, quorum=2) as fed, asyncio.TaskGroup() as group:
        lessons: list[Lesson] = []
        died = False

        async def replace() -> None:
            # when what is under way is written down: a kill in between would only make it train again
            await fed.until(lambda: any(name.startswith(f"a.test.{AT}.1") for name in kept(fed)))
            await fed.places["a"].die()
            if away != "at once":
                fed.kill()
            lessons.append(fed.join("a").lesson)

        def look(what: Outgoing | Delivery) -> Any:
            nonlocal died
            if died or not isinstance(what, Outgoing) or not POINTS[point](read(what)):
                return None
            died = True
            replacing = group.create_task(replace())
            hold = read(what)
            # whoever has sent this does not go on; the coordinator does
            return asyncio.wait([replacing], timeout=BOUND_S) if not isinstance(hold, Answer) else None

        fed.hook = look
        lessons += [fed.join("a").lesson]
        fed.join("b")
        fed.begin()
        await fed.end()
        assert died
        trained = sorted(number for lesson in lessons for train, number in lesson.done if train)
        # the next round may have begun by the time that an update is accepted, and has nothing to keep yet
        assert trained == [1, 2, 3] or (point.endswith("accepted") and trained == [1, 2, 3, 3])
        assert len(lessons) == 2
        assert fed.weights() == expected(fed.store.plan, [["a", "b"]] * ROUNDS)
        assert fed.counted() == [["a", "b"]] * ROUNDS
        await fed.until(lambda: not kept(fed))


async def test_a_worker_that_leaves_with_a_pending_update_keeps_it(tmp_path: Path) -> None:
    async with federation(tmp_path, rounds=2, cohort=2, quorum=2) as fed:
        a, b = fed.join("a", drain_s=0.05), fed.join("b")
        b.lesson.gate.clear()
        fed.begin()
        await fed.until(lambda: bool(kept(fed)))
        await a.leave()
        assert kept(fed) == ["a.test.1.1.update"]
        again = fed.join("a")
        b.lesson.gate.set()
        await fed.end()
        assert [number for train, number in again.lesson.done if train] == [2]
        assert fed.weights() == expected(fed.store.plan, [["a", "b"]] * 2)
        await fed.until(lambda: not kept(fed))


async def test_an_update_that_cannot_be_kept_is_sent_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("workers.outbox.keep", full)
    async with federation(tmp_path, rounds=2, cohort=1, quorum=1) as fed:
        fed.join("a")
        fed.begin()
        await fed.end()
        assert fed.counted() == [["a"]] * 2
    assert "the update cannot be kept on the disk (No space left on device)" in caplog.text
