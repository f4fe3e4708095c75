"""A coordinator that dies at any step of a round goes on inside it; one that is followed does no harm.

Each step is found by what happens there, not by the clock. A worker that has finished is never asked to train again.
"""

import asyncio
import itertools
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import coordinator.post
import coordinator.store
from broker import topology
from broker.chain import bare
from broker.errors import RunEnded, UsageError
from broker.link import Delivery, Outgoing
from broker.messages import Answer, Attempt, Claim, Part, Refusal, Score, Task, Update
from broker.tensors import Layout, TensorSpec
from coordinator.claim import read_epoch
from coordinator.journal import Journal
from coordinator.post import Post
from coordinator.service import Coordinator
from coordinator.snapshot import FILE, Snapshot
from coordinator.store import Store
from tests.memory import MemoryBroker
from tests.system.rig import Federation, Wire, expected, federation, learned, plan, read, start_weights
from tests.system.simulation import median
from workers.work import task_seed

NAMES = ("a", "b", "c")
ROUNDS = 3
AT = 2  # the round in which it dies

Point = Callable[[Outgoing | Delivery], bool]


def published(kind: type[Any], count: int = 1, **fields: Any) -> Callable[[], Point]:
    return lambda: nth(count, lambda what: isinstance(what, Outgoing) and is_a(what, kind, fields))


def delivered(kind: type[Any], count: int = 1, **fields: Any) -> Callable[[], Point]:
    return lambda: nth(count, lambda what: not isinstance(what, Outgoing) and is_a(what, kind, fields))


def nth(count: int, point: Point) -> Point:
    seen = 0

    def look(what: Outgoing | Delivery) -> bool:
        nonlocal seen
        seen += point(what)
        return seen == count

    return look


def is_a(what: Outgoing | Delivery, kind: type[Any], fields: dict[str, Any]) -> bool:
    message = read(what)
    if isinstance(message, Part):
        _, number, *others = message.payload.split("/")  # going up, the worker's name and a word of chance follow
        return kind is Part and int(number) == AT and ("up" in fields) == (len(others) > 2)
    if not isinstance(message, kind) or message.of.round != AT:
        return False
    return all(getattr(message, name) == value for name, value in fields.items())


# what happens in the course of a round, in order
POINTS = {
    "the task is sent": published(Task),
    "the first part of the version is sent": published(Part),
    "the last part of the version is sent": published(Part, 3),
    "a worker has claimed": delivered(Claim),
    "all workers have claimed": delivered(Claim, 3),
    "a score has come": delivered(Score),
    "the first update has come": delivered(Update),
    "a part of an update has come": delivered(Part, up=True),
    "the last part of an update has come": delivered(Part, 3, up=True),
    "an update is added and the next one comes": delivered(Part, 5, up=True),
    "the last update has come": delivered(Update, 3),
    "all parts of all updates have come": delivered(Part, 9, up=True),
    "it is said that updates are accepted": published(Answer, verdict="accepted"),
}


@pytest.mark.parametrize("point", POINTS, ids=lambda name: name.replace(" ", "-"))
async def test_a_coordinator_killed_when(tmp_path: Path, point: str) -> None:
    await kill_at(tmp_path, point)


@pytest.mark.parametrize("point", ["it is said that updates are accepted", "all parts of all updates have come"])
async def test_a_round_asks_more_workers_than_messages_may_be_unacknowledged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    """Those of whose updates the messages are gone say them again to the coordinator after this one."""
    monkeypatch.setattr(coordinator.post, "INBOX_PREFETCH", 2)
    monkeypatch.setattr(coordinator.post, "INBOX_SPARE", 1)
    await kill_at(tmp_path, point)


async def kill_at(folder: Path, point: str) -> None:
    async with federation(folder, rounds=ROUNDS) as fed:
        reached, killed, safe = POINTS[point](), False, 0

        def look(what: Outgoing | Delivery) -> None:
            nonlocal killed, safe
            if not killed and reached(what):
                killed = True
                fed.kill()
                safe = fed.store.latest() or 0

        fed.hook = look
        await run_through(fed)
        assert killed
        assert_as_undisturbed(fed, lost=safe < AT - 1)


@pytest.mark.parametrize(
    ("owner", "method"),
    [(Journal, "begin"), (Store, "draft"), (Journal, "flush"), (Store, "seal"), (Store, "note")],
    ids=lambda each: each if isinstance(each, str) else each.__name__.lower(),
)
@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_coordinator_killed_beside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, owner: type[Any], method: str, when: str
) -> None:
    """It dies right before or right after it writes; what it has written by then stands."""
    original, loop, calls = getattr(owner, method), asyncio.get_running_loop(), 0

    async with federation(tmp_path, rounds=ROUNDS) as fed:

        def dying(*arguments: Any, **words: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls != AT:
                return original(*arguments, **words)
            if when == "after":
                original(*arguments, **words)
            loop.call_soon_threadsafe(fed.kill)
            raise asyncio.CancelledError

        monkeypatch.setattr(owner, method, dying)
        await run_through(fed)
        assert calls > AT
        assert_as_undisturbed(fed, lost=True)


def assert_as_undisturbed(fed: Federation, *, lost: bool = False) -> None:
    """`lost`: a version may have been sent before it was safe, and been made again.

    What had been asked of it is asked of its like by another try then, and trained again.
    """
    assert fed.weights() == expected(fed.store.plan, [NAMES] * ROUNDS)
    attempts = [(line["round"], line["attempt"]) for line in fed.lines("round")]
    allowed = [[(1, 1), (2, second), (3, third)] for second, third in ((1, 1), (1, 2), (2, 1))]
    assert attempts in (allowed if lost else allowed[:1])
    assert fed.counted() == [list(NAMES)] * ROUNDS
    assert all(len(line["scored"]) for line in fed.lines("round"))
    for place in fed.places.values() if attempts == allowed[0] and not lost else ():
        assert [number for train, number in place.lesson.done if train] == [1, 2, 3], place.name


async def run_through(fed: Federation) -> None:
    fed.begin()
    for name in NAMES:
        fed.join(name)
    await fed.end()


async def test_whoever_was_asked_is_waited_for_after_a_restart_and_nobody_else_is_asked(tmp_path: Path) -> None:
    async with federation(tmp_path, rounds=1, cohort=2, quorum=2) as fed:
        a, b = fed.join("a"), fed.join("b")
        for place in (a, b):
            place.lesson.gate.clear()
        fed.begin()
        await asyncio.gather(a.lesson.began.wait(), b.lesson.began.wait())
        await b.die()
        await die(fed)
        fed.join("c")
        a.lesson.gate.set()
        fed.begin()
        await fed.until(lambda: "c" in fed.here() and bool(fed.coordinator and fed.coordinator.desk.open))
        assert fed.coordinator is not None
        assert fed.coordinator.desk.open is not None
        await fed.until(lambda: list(fed.coordinator.desk.open.round.counted) == ["a"])  # type: ignore[union-attr]
        fed.join("b")
        await fed.end()
        assert fed.counted() == [["a", "b"]]
        assert fed.weights() == expected(fed.store.plan, [["a", "b"]])


async def die(fed: Federation) -> None:
    """The coordinator dies, and is dead when this returns."""
    fed.kill()
    await asyncio.wait([fed._serving] if fed._serving else [])
    await fed._bury()


async def restart(fed: Federation) -> None:
    """The coordinator dies, and is started again when it is dead."""
    await die(fed)
    fed.begin()


def put_back(fed: Federation, backup: Path) -> None:
    """The run's folder is as it was when it was copied."""
    shutil.rmtree(fed.run)
    shutil.copytree(backup, fed.run)


@pytest.mark.parametrize("damaged", [False, True], ids=["whole", "damaged"])
async def test_whoever_is_in_the_sums_that_were_written_down_sends_nothing_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, *, damaged: bool
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr("coordinator.keeping.KEEP_S", 0.01)
    async with federation(tmp_path, rounds=2) as fed:
        sent_again: list[str] = []

        def look(what: Outgoing | Delivery) -> None:
            message = read(what)
            if isinstance(what, Outgoing) and isinstance(message, Answer) and message.verdict == "resend":
                sent_again.extend(what.keys)

        fed.hook = look
        fed.begin()
        fed.join("c").lesson.gate.clear()
        fed.join("a")
        fed.join("b")
        written = fed.run / FILE
        desk = fed.coordinator.desk if fed.coordinator else None
        await fed.until(lambda: written.exists() and bool(desk and desk.keeping._kept and desk.keeping._kept[1] == 2))
        if damaged:
            written.write_bytes(written.read_bytes()[:-100])
        await restart(fed)
        fed.places["c"].lesson.gate.set()
        await fed.end()
        assert (f"{FILE} is of no use" in caplog.text) is damaged
        told = (f"updates of {names} are in the sum already" in caplog.text for names in ("a, b", "b, a"))
        assert any(told) is not damaged  # whoever was first
        assert {"a", "b"} & set(sent_again) == ({"a", "b"} if damaged else set())
        assert fed.weights() == expected(fed.store.plan, [NAMES] * 2)
        assert [line["attempt"] for line in fed.lines("round")] == [1, 1]
        assert sorted(fed.lines("round")[0]["scored"]) == ["examples", "sum"]
        assert sorted(fed.lines("round")[0]["metrics"]) == ["loss"]
        for place in fed.places.values():
            assert [number for train, number in place.lesson.done if train] == [1, 2], place.name
        assert not written.exists()


async def test_whoever_is_in_the_sums_that_were_written_down_may_be_gone_for_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coordinator.keeping.KEEP_S", 0.01)
    async with federation(tmp_path, rounds=1) as fed:
        fed.begin()
        for name in NAMES:
            fed.join(name)
        fed.places["c"].lesson.gate.clear()
        desk = fed.coordinator.desk if fed.coordinator else None
        await fed.until(lambda: bool(desk and desk.keeping._kept and desk.keeping._kept[1] == 2))
        await fed.places["a"].die()
        await restart(fed)
        fed.places["c"].lesson.gate.set()
        await fed.end()
        assert fed.counted() == [list(NAMES)]
        assert_bits(fed, 1)


async def test_updates_that_are_only_set_aside_are_sent_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a rule that needs all of them at once there is no sum to write down."""
    monkeypatch.setattr("coordinator.keeping.KEEP_S", 0.01)
    async with federation(tmp_path, rounds=1, rule="median") as fed:
        fed.begin()
        for name in NAMES:
            fed.join(name)
        fed.places["c"].lesson.gate.clear()
        desk = fed.coordinator.desk if fed.coordinator else None
        await fed.until(lambda: bool(desk and len(desk.sums.whole) == 2))
        await asyncio.sleep(0.1)
        assert not (fed.run / FILE).exists()
        await restart(fed)
        fed.places["c"].lesson.gate.set()
        await fed.end()
        start = start_weights()
        updates = [learned(task_seed(fed.store.plan.seed, 1, name), start) for name in NAMES]
        assert fed.weights() == median(start, updates)
        assert [place.lesson.done.count((True, 1)) for place in fed.places.values()] == [1, 1, 1]


async def test_short_rounds_never_write_their_sums_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(*_: Any, **__: Any) -> bool:
        pytest.fail("a short round")

    monkeypatch.setattr(Snapshot, "write", write)
    async with federation(tmp_path, rounds=ROUNDS) as fed:
        await run_through(fed)


@pytest.mark.parametrize("rounds", [1, 2])
async def test_a_version_that_was_saved_without_saying_so_is_said_to_be_by_the_next_coordinator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rounds: int
) -> None:
    async with federation(tmp_path, rounds=rounds) as fed:
        accepted: list[str] = []
        tell, fails = Post.tell_all, [True]

        async def dying(self: Post, *arguments: Any) -> None:
            if fails and fails.pop():
                fed.kill()
                await asyncio.sleep(60)
            await tell(self, *arguments)

        def look(what: Outgoing | Delivery) -> None:
            message = read(what)
            if isinstance(what, Outgoing) and isinstance(message, Answer) and message.of.round == 1:
                accepted.extend([message.verdict] * len(what.keys))

        fed.hook = look
        monkeypatch.setattr(Post, "tell_all", dying)
        await run_through(fed)
        assert accepted[:3] == ["accepted"] * 3
        assert set(accepted) == {"accepted"}
        await fed.until(lambda: not any(place.worker._in_hand for place in fed.places.values()))
        assert_bits(fed, rounds)


def assert_bits(fed: Federation, rounds: int) -> None:
    assert fed.weights() == expected(fed.store.plan, [NAMES] * rounds)


async def test_a_round_that_asked_for_something_else_is_begun_anew(tmp_path: Path) -> None:
    async with federation(tmp_path, rounds=1) as fed:
        for name in NAMES:
            fed.join(name).lesson.gate.clear()
        fed.begin()
        await asyncio.gather(*(place.lesson.began.wait() for place in fed.places.values()))
        await die(fed)
        store = fed.store
        store.adopt(type(store.plan)(**{**vars(store.plan), "seed": 8}))
        for place in fed.places.values():
            place.lesson.gate.set()
        await fed.end()
        assert fed.lines("round")[0]["attempt"] == 2
        assert fed.weights() == expected(fed.store.plan, [NAMES])


async def test_a_coordinator_that_has_been_followed_ends_and_does_no_harm(tmp_path: Path) -> None:
    async with federation(tmp_path, rounds=ROUNDS) as fed:
        followed = asyncio.Event()

        def look(what: Outgoing | Delivery) -> None:
            message = read(what)
            if isinstance(message, Update) and message.of.round == AT and not followed.is_set():
                followed.set()

        fed.hook = look
        first = fed.begin()
        for name in NAMES:
            fed.join(name)
        await followed.wait()
        wire, former = Wire(fed.broker), read_epoch(fed.store.folder)
        second = Coordinator(fed.store, wire)
        serving = asyncio.create_task(second.serve(forced=True))
        with pytest.raises(RunEnded, match="another coordinator has taken over"):
            await first
        await fed._bury()
        await asyncio.wait_for(serving, 20)
        await wire.close()
        assert second.post.epoch > former
        assert_as_undisturbed(fed)


async def test_of_two_copies_of_a_run_on_one_broker_the_second_ends_and_the_first_does_not_notice(
    tmp_path: Path,
) -> None:
    async with federation(tmp_path, rounds=ROUNDS) as fed:
        fed.patch.setattr(coordinator.post, "RIVAL_S", 0.05)
        places = [fed.join(name) for name in NAMES]
        for place in places:
            place.lesson.gate.clear()
        fed.begin()
        for place in places:
            await place.lesson.began.wait()
        shutil.copytree(fed.run, tmp_path / "copy")
        copy, wire = Store.open(tmp_path / "copy"), Wire(fed.broker)
        with pytest.raises(UsageError, match="run test is at work on this broker, in another folder"):
            await asyncio.wait_for(Coordinator(copy, wire).serve(), 20)
        await wire.close()
        for place in places:
            place.lesson.gate.set()
        await fed.end()
        assert (copy.latest(), [*copy.history()]) == (0, [])
        assert_as_undisturbed(fed)


async def test_of_two_copies_of_a_run_one_ends_also_where_the_broker_was_away_and_the_other_was_quicker(
    tmp_path: Path,
) -> None:
    async with federation(tmp_path, rounds=ROUNDS) as fed:
        fed.patch.setattr(coordinator.post, "RIVAL_S", 0.05)
        serving = fed.begin()
        await fed.until(lambda: "phase" in fed.store.now())
        other = Wire(fed.broker)
        fed.broker.pause()
        for queue in (topology.hello_queue("test"), topology.inbox_queue("test")):
            fed.broker.consume(queue, prefetch=1, alone=True)
        fed.broker.resume()
        with pytest.raises(UsageError, match="end one of them; a copy of a run needs a broker"):
            await asyncio.wait_for(asyncio.shield(serving), 20)
        await other.close()
        await fed._bury()


async def test_workers_do_not_listen_to_a_coordinator_that_has_been_followed_and_say_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with federation(tmp_path, rounds=1) as fed:
        for name in NAMES:
            fed.join(name)
        await run_through_as(fed, epoch=5)
        done = {name: list(place.lesson.done) for name, place in fed.places.items()}
        wire = Wire(fed.broker)
        former = Coordinator(fed.store, wire)
        former.post.epoch = 4
        await former.post.declare()
        here = former._open(list(NAMES))
        here.round.begin_turn(asyncio.get_running_loop().time())
        await former._send(here, list(NAMES))
        await fed.until(lambda: all(not place.worker._landing for place in fed.places.values()))
        await fed.until(lambda: not any(waiting(fed, name) for name in NAMES))
        await wire.close()
        assert {name: place.lesson.done for name, place in fed.places.items()} == done
        said = "a former coordinator of test is not heard (clocks set back? start anew)"
        assert [each.levelname for each in caplog.records if said in each.getMessage()] == ["WARNING"] * len(NAMES)


def waiting(fed: Federation, name: str) -> int:
    """How many messages a worker has not settled yet."""
    queue = fed.broker.queue(topology.down_queue(name))
    return len(queue.ready) + sum(len(consumer.unacked) for consumer in queue.consumers) if queue else 0


async def run_through_as(fed: Federation, *, epoch: int) -> None:
    """A run whose coordinator is the so-and-so-many-th."""
    (fed.run / "epoch").write_text(str(epoch - 1))
    fed.begin()
    await fed.end()


@pytest.mark.parametrize("how", ["unsafe", "restored"])
async def test_what_was_trained_on_a_lost_version_is_never_taken_for_another_s_however_often_its_round_is_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """a, which is asked in round 2 alone, trains all the time on a version that is gone.

    It was never made safe, or the folder is put back as it was before it.
    """
    seal, over, lost = Store.seal, threading.Event(), list[int]()

    def dying(self: Store, version: int) -> None:
        if version and not lost and how == "unsafe":
            lost.append(version)
            over.wait(20)
            raise OSError("its process is dead")
        seal(self, version)

    monkeypatch.setattr(Store, "seal", dying)
    async with federation(tmp_path, rounds=2, cohort=2, quorum=2, seed=11) as fed:
        places = {name: fed.join(name) for name in "cd"}
        places["d"].lesson.gate.clear()
        fed.begin()
        await places["d"].lesson.began.wait()
        places |= {name: fed.join(name) for name in "ab"}
        places["a"].lesson.gate.clear()
        await fed.until(lambda: len(fed.here()) == 4)
        shutil.copytree(fed.run, tmp_path / "backup")
        places["d"].lesson.gate.set()
        await places["a"].lesson.began.wait()
        await places["d"].die()
        shutil.rmtree(tmp_path / "spool-d", ignore_errors=True)
        if how == "restored":
            await fed.until(lambda: fed.store.latest() == 1)
        fed.kill()
        over.set()
        await asyncio.wait([fed._serving] if fed._serving else [])
        await fed._bury()
        if how == "restored":
            put_back(fed, tmp_path / "backup")
        fed.begin()
        await fed.until(lambda: {"a", "b", "c"} <= set(fed.here()))
        fed.join("d").lesson.fails = "its disk is a new one"
        await fed.until(lambda: bool(fed.coordinator and fed.coordinator.desk.version == 1))
        places["a"].lesson.gate.set()
        await fed.end()
        assert len(fed.lines("abandoned")) == 3
        assert fed.counted() == [["b", "c"], ["a", "b"]]
        assert fed.weights() == expected(fed.store.plan, fed.counted())


def counted_by_now(fed: Federation) -> set[str]:
    """Who is in the sum of the round that is open."""
    here = fed.coordinator.desk.open if fed.coordinator else None
    return set(here.round.counted) if here else set()


@pytest.mark.parametrize("how", ["restored", "damaged"])
async def test_workers_listen_to_a_coordinator_of_a_folder_that_is_older_than_what_they_have_heard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    began_at = itertools.count(1_000_000_000)
    monkeypatch.setattr("coordinator.claim.time", SimpleNamespace(time=lambda: next(began_at)), raising=False)
    asked, all_asked = list[Task](), asyncio.Event()

    def look(what: Outgoing | Delivery) -> Any:
        """What is said of updates that come before their round is open again reaches workers after its task."""
        message = read(what)
        if isinstance(message, Task) and not isinstance(what, Outgoing):
            asked.append(message)
            if len(asked) >= len(NAMES):
                all_asked.set()
        late = isinstance(message, Answer) and message.verdict == "late"
        return all_asked.wait() if late and not isinstance(what, Outgoing) else None

    async with federation(tmp_path, rounds=2, round_s=15.0) as fed:
        fed.hook = look
        fed.join("c").lesson.gate.clear()
        fed.begin()
        await fed.until(lambda: "c" in fed.here())
        shutil.copytree(fed.run, tmp_path / "backup")
        for name in ("a", "b"):
            fed.join(name)
        await fed.places["c"].lesson.began.wait()
        for _ in range(2):
            await restart(fed)
            await fed.until(lambda: counted_by_now(fed) == {"a", "b"})
        await die(fed)
        if how == "restored":
            put_back(fed, tmp_path / "backup")
        else:
            (fed.run / "epoch").write_text("")
        asked.clear()
        all_asked.clear()
        fed.places["c"].lesson.gate.set()
        await fed.end()
        assert fed.lines("abandoned") == []
        assert_bits(fed, 2)


async def lose_b(fed: Federation) -> None:
    """It dies, comes back, and leaves without having trained again."""
    await fed.places["b"].die()
    b = fed.join("b", drain_s=0.05)
    b.lesson.gate.clear()
    await fed.until(lambda: "b" in fed.here())
    await b.leave()


async def test_a_turn_that_has_other_weights_after_a_restart_is_trained_from_these(tmp_path: Path) -> None:
    async with federation(tmp_path, rounds=1, quorum=2, schedule="cyclic", workers=list(NAMES)) as fed:
        trained = asyncio.Event()

        def look(what: Outgoing | Delivery) -> None:
            message = read(what)
            if isinstance(message, Update) and message.worker == "c" and not trained.is_set():
                trained.set()
                fed.kill()

        fed.hook = look
        fed.begin()
        for name in NAMES:
            fed.join(name)
        await trained.wait()
        await restart(fed)
        await lose_b(fed)  # c has trained from what a and b have made
        await fed.end()
        assert fed.counted() == [["a", "c"]]
        assert fed.weights() == expected(fed.store.plan, [["a", "c"]])
        assert [number for train, number in fed.places["c"].lesson.done if train] == [1, 1]


async def test_an_update_from_the_weights_of_another_turn_is_not_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    async with federation(tmp_path, rounds=1, quorum=2, schedule="cyclic", workers=list(NAMES)) as fed:
        fed.begin()
        for name in NAMES:
            fed.join(name)
        c, saying, may_say = fed.places["c"].worker.post, asyncio.Event(), asyncio.Event()
        say = c.say

        async def say_late(message: Any) -> None:
            if isinstance(message, Update):
                saying.set()
                await may_say.wait()
            await say(message)

        c.say = say_late  # type: ignore[method-assign]
        await saying.wait()
        await restart(fed)
        await lose_b(fed)
        desk = fed.coordinator.desk if fed.coordinator else None
        await fed.until(lambda: bool(desk and desk.open and desk.open.turn == 3))
        may_say.set()
        await fed.end()
        assert "c has trained from other weights: asking for another" in caplog.text
        assert fed.counted() == [["a", "c"]]
        assert fed.weights() == expected(fed.store.plan, [["a", "c"]])


async def trained_once_under(fed: Federation, look: Callable[[Outgoing | Delivery], None]) -> None:
    """A run of one round, in which nothing is lost whatever `look` does, and `b` trains no second time."""
    fed.hook = look
    fed.begin()
    for name in NAMES:
        fed.join(name)
    await fed.end()
    assert fed.weights() == expected(fed.store.plan, [NAMES])
    assert [number for train, number in fed.places["b"].lesson.done if train] == [1]


async def test_an_update_that_was_lost_with_the_inbox_is_said_again_when_its_turn_has_come_again(
    tmp_path: Path,
) -> None:
    async with federation(tmp_path, rounds=1, schedule="cyclic", workers=list(NAMES)) as fed:
        lost: list[Update] = []

        def look(what: Outgoing | Delivery) -> None:
            message = read(what)
            if isinstance(message, Update) and message.worker == "b" and not lost:
                lost.append(message)
                fed.kill()
                fed.broker.delete(topology.inbox_queue("test"))

        await trained_once_under(fed, look)
        assert lost
        assert [line["attempt"] for line in fed.lines("round")] == [1]


async def test_a_refusal_that_was_lost_with_the_inbox_is_said_again_and_its_round_waits_for_nobody(
    tmp_path: Path,
) -> None:
    async with federation(tmp_path, rounds=1, quorum=2) as fed:
        said: list[Refusal] = []

        def look(what: Outgoing | Delivery) -> None:
            message = read(what)
            if isinstance(message, Refusal) and isinstance(what, Outgoing):
                said.append(message)
                if len(said) == 1:
                    fed.broker.delete(topology.inbox_queue("test"))

        fed.hook = look
        fed.begin()
        for name in NAMES:
            fed.join(name)
        fed.places["b"].lesson.fails = "a disk is full"
        await fed.end()  # within 20 s; its deadline is minutes away
        assert said[:2] == [said[0]] * 2
        assert {each.of.attempt for each in said[2:]} <= {0}  # the last version is not scored either
        assert fed.lines("round")[0]["refused"] == {"b": "a disk is full"}
        assert fed.counted() == [["a", "c"]]


async def test_a_broker_that_has_lost_everything_in_the_midst_of_an_upload_is_furnished_anew_by_whoever_notices_first(
    tmp_path: Path,
) -> None:
    async with federation(tmp_path, rounds=1) as fed:
        lost: list[Part] = []

        def look(what: Outgoing | Delivery) -> None:
            message = read(what)
            if isinstance(message, Part) and isinstance(what, Outgoing) and "/b/" in message.payload and not lost:
                lost.append(message)
                fed.broker.wipe()

        await trained_once_under(fed, look)
        assert lost


async def test_a_coordinator_that_begins_holds_of_a_long_history_only_a_line_or_two(tmp_path: Path) -> None:
    """Of many rounds with many workers it is more than a machine's memory holds."""
    held = most = 0

    class Line(dict[str, Any]):
        def __init__(self, line: dict[str, Any]) -> None:
            nonlocal held, most
            super().__init__(bare(line))
            held += 1
            most = max(most, held)

        def __del__(self) -> None:
            nonlocal held
            held -= 1

    async with federation(tmp_path, rounds=300) as fed:
        store = fed.store
        made = {"event": "round", "attempt": 1, "cohort": ["a"], "counted": {"a": {"examples": 1}}, "weights": ""}
        for number in range(1, 300):
            store.note(made | {"round": number, "version": number})
        store.save(299, *store.load(0))
        fed.patch.setattr(coordinator.store, "bare", Line)
        fed.begin()
        assert fed.coordinator
        known = [fed.coordinator.desk.has_counted(Attempt("test", number, 1), "a") for number in (299, 236, 235)]
        assert known == [True, True, False]
        assert most <= 4


async def test_a_run_whose_task_no_worker_would_take_is_refused_when_its_coordinator_begins(tmp_path: Path) -> None:
    """Else each of its rounds would be abandoned, for ever."""
    model = Layout.of(TensorSpec(f"{number:0300}", "int8", ()) for number in range(13_000))
    store = Store.create(tmp_path / "run", plan(), model, memoryview(bytearray(model.size_bytes)))
    with pytest.raises(UsageError, match=r"a task of \d+ bytes is over the limit of 4194304.*take fewer tensors"):
        Coordinator(store, Wire(MemoryBroker()))
