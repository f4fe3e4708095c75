"""A worker that dies with a finished update: the next one sends it again, and nothing is trained twice."""

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
from xxhash import xxh3_64_digest

from broker.errors import LinkError
from broker.link import Delivery, Outgoing
from broker.messages import Answer, Attempt, Part, Payload, Task, Update
from tests.system.rig import BOUND_S, MODEL, Federation, Lesson, expected, federation, read
from workers.journal import SUFFIX
from workers.outbox import SENT_MAX, Outbox
from workers.owner import Owner
from workers.post import Post
from workers.residuals import Residuals
from workers.spool import Spool
from workers.work import Done, Who

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


@pytest.mark.parametrize("lost", ["upload", "say"])
async def test_an_update_waits_for_a_broker_that_is_away_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, lost: str
) -> None:
    async with federation(tmp_path, rounds=2, cohort=1, quorum=1) as fed:
        place = fed.join("a")
        post, uploads = place.worker.post, 0
        real, upload = getattr(post, lost), post.upload

        async def counted(payload: Payload, data: memoryview) -> None:
            nonlocal uploads
            uploads += 1
            await upload(payload, data)

        async def in_vain(*what: Any) -> None:
            if lost == "say" and not isinstance(what[0], Update):
                await real(*what)
                return
            fed.broker.pause()
            monkeypatch.setattr(post, lost, counted if lost == "upload" else real)
            raise LinkError("the broker did not take it within 300 s.")

        monkeypatch.setattr(post, "upload", counted)
        monkeypatch.setattr(post, lost, in_vain)
        fed.begin()
        await fed.until(lambda: "the update waits for the broker" in caplog.text)
        await fed.until(lambda: kept(fed) == ["a.test.1.1.update"])
        fed.broker.resume()
        await fed.end()
        assert place.lesson.done.count((True, 1)) == 1
        assert uploads == 2, "each update once"
        assert fed.weights() == expected(fed.store.plan, [["a"]] * 2)
        await fed.until(lambda: not kept(fed))


async def test_what_a_kept_update_left_out_is_owed_when_the_next_process_hears_that_it_counts(tmp_path: Path) -> None:
    async with federation(tmp_path, rounds=1, cohort=2, quorum=2, format="int8") as fed:
        a, b = fed.join("a"), fed.join("b")
        b.lesson.gate.clear()
        fed.begin()
        await fed.until(lambda: bool(kept(fed)))
        residual = Residuals(a.worker.spool.folder, "a").of(Attempt("test", 1, 1))
        residual.left.write_bytes(b"what is left")
        await a.die()
        again = fed.join("a")
        assert residual.left.exists()
        b.lesson.gate.set()
        await fed.end()
        await fed.until(residual.owed.exists)
        assert residual.owed.read_bytes() == b"what is left"
        assert not residual.left.exists()
        assert not any(trained for trained, _ in again.lesson.done)


async def test_an_update_that_is_given_up_is_not_written_down_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its bytes are still being summed, for its record, when newer ones take its place."""
    let = threading.Event()

    def slowly(data: memoryview) -> bytes:
        assert let.wait(BOUND_S)
        return xxh3_64_digest(data)

    class Stuck:
        async def upload(self, *_: Any) -> None:
            await asyncio.Event().wait()

    monkeypatch.setattr("workers.outbox.xxh3_64_digest", slowly)
    spool = Spool(tmp_path / "spool")
    outbox = Outbox(
        "a", cast(Post, Stuck()), owner=Owner(Who("a", "lesson"), spool.folder),
        residuals=Residuals(spool.folder, "a"), tell=lambda *_: None, rest=lambda: None,
    )  # fmt: skip
    payload, works = Payload("p", 262144, MODEL.specs), []

    def start(work: Any) -> asyncio.Task[None]:
        works.append(asyncio.create_task(work))
        return works[-1]

    def keeping() -> set[Any]:
        return asyncio.all_tasks() - {asyncio.current_task(), *works}

    for number in range(1, SENT_MAX + 2):
        task = Task(Attempt("test", number, 1), "train", number - 1, 60.0, 0, {}, payload)
        outbox.put(task, Done(1, {}, {}, spool.take(MODEL.size_bytes), 0.0, MODEL), start)
        async with asyncio.timeout(BOUND_S):
            while len(keeping()) < number:  # noqa: ASYNC110 - tasks ring no bell when they begin
                await asyncio.sleep(0.001)
    at_it = keeping()
    let.set()
    await asyncio.wait(at_it, timeout=BOUND_S)
    names = sorted(path.name for path in spool.folder.glob(f"*{SUFFIX}"))
    for work in works:
        work.cancel()
    await asyncio.wait(works)
    spool.remove()
    assert names == ["a.test.2.1.update", "a.test.3.1.update"]


async def test_an_update_waits_for_its_verdict_whatever_another_run_asks_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The coordinator of one run is away; that of another, which has the same workers, is not."""
    monkeypatch.setattr("workers.outbox.VERDICT_S", 0.0)

    class Away:
        async def upload(self, *_: Any) -> None:
            pass

        async def say(self, _: Any) -> None:
            pass

    spool, works = Spool(tmp_path / "spool"), list[asyncio.Task[None]]()
    outbox = Outbox(
        "a", cast(Post, Away()), owner=Owner(Who("a", "lesson"), spool.folder),
        residuals=Residuals(spool.folder, "a"), tell=lambda *_: None, rest=lambda: None,
    )  # fmt: skip

    def start(work: Any) -> asyncio.Task[None]:
        works.append(asyncio.create_task(work))
        return works[-1]

    def task(run: str, number: int) -> Task:
        called = f"{run}/{number}/1/1"
        return Task(Attempt(run, number, 1), "train", number - 1, 60.0, 0, {}, Payload(called, 262144, MODEL.specs))

    outbox.put(task("one", 1), Done(1, {}, {}, spool.take(MODEL.size_bytes), 0.0, MODEL), start)
    outbox.hurry(task("another", 1))
    await asyncio.wait(works, timeout=0.2)
    kept = spool.folder / f"a.one.1.1{SUFFIX}"
    assert kept.exists()
    assert outbox.tasks == [task("one", 1)]
    outbox.hurry(task("one", 2))
    await asyncio.wait(works, timeout=BOUND_S)
    assert outbox.tasks == []
    assert not kept.exists()
    spool.remove()
