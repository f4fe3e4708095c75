"""Who may act for a run: whoever has begun last, and nobody else, however late the others notice."""

import fcntl
import os
import threading
import time
from pathlib import Path
from typing import IO, Any

import pytest

from broker.daemon import StoppedEarly
from broker.errors import RunEnded, UsageError
from broker.files import in_order
from broker.tensors import Layout, TensorSpec
from coordinator import plan as plans
from coordinator import standby
from coordinator.claim import EPOCH, Claim, beat, last_beat, read_epoch
from coordinator.store import Store

LAYOUT = Layout.of([TensorSpec("w", "float32", (2,))])
ZERO, ONE = memoryview(bytes(8)), memoryview(bytes(range(8)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Store.create(tmp_path / "run", plans.make({"run": "r", "learner": "x"}), LAYOUT, ZERO).folder


def test_every_one_that_begins_has_a_higher_number(tmp_path: Path) -> None:
    numbers = [Claim(tmp_path).begin() for _ in range(3)]
    assert numbers == sorted({*numbers})
    assert read_epoch(tmp_path) == numbers[-1]


def test_whoever_takes_up_a_copy_that_was_put_back_has_a_higher_number_than_any_that_workers_have_heard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def begun(at: float) -> int:
        monkeypatch.setattr(time, "time", lambda: at)
        return Claim(tmp_path).begin()

    begun(1000)
    copy = (tmp_path / EPOCH).read_bytes()
    assert [begun(at) for at in (1010.5, 1020, 900)] == [1010, 1020, 1021]  # also where a clock was set back
    (tmp_path / EPOCH).write_bytes(copy)
    assert begun(1030) == 1030


@pytest.mark.parametrize("content", ["", "x", "-5", "\x00", str(2**53), "9" * 400])
def test_a_damaged_number_does_not_keep_anybody_from_beginning(tmp_path: Path, content: str) -> None:
    (tmp_path / EPOCH).write_text(content)
    assert read_epoch(tmp_path) == 0
    before = int(time.time())
    assert Claim(tmp_path).begin() >= before  # workers have heard the one that is lost


def test_whoever_has_been_followed_may_not_act(tmp_path: Path) -> None:
    former, latter = Claim(tmp_path), Claim(tmp_path)
    former.begin()
    with former.acting():
        pass
    latter.begin()
    assert not former.ours()
    assert latter.ours()
    with pytest.raises(RunEnded, match="another coordinator has taken over the run"), former.acting():
        pytest.fail("it may not")
    with latter.acting():
        pass


def test_that_a_run_was_moved_or_removed_is_not_taken_for_another_coordinator(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    claim = Claim(tmp_path / "run")
    claim.begin()
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="epoch is gone: put the run back where it was, then start again"):
        claim.check()
    (tmp_path / "elsewhere").rename(tmp_path / "run")
    claim.check()


def test_nobody_begins_while_somebody_acts(tmp_path: Path) -> None:
    former, latter, began = Claim(tmp_path), Claim(tmp_path), threading.Event()
    former.begin()

    def begin() -> None:
        latter.begin()
        began.set()

    following = threading.Thread(target=begin)
    with former.acting():
        following.start()
        assert not began.wait(0.1)
        former.check()
    following.join(20)
    assert began.is_set()


def test_a_store_that_has_been_followed_changes_nothing_more(folder: Path) -> None:
    former, latter = Store.open(folder), Store.open(folder)
    former.begin_epoch()
    former.draft(1, LAYOUT, in_order([ONE]))
    latter.begin_epoch()
    latter.save(1, LAYOUT, ZERO)
    latter.note({"event": "round", "version": 1})
    latter.say_now({"phase": "theirs"})
    former.say_now({"phase": "ours"})
    before = sorted((file, file.read_bytes()) for file in folder.rglob("*") if file.is_file())
    for act in (
        lambda: former.seal(1),
        lambda: former.note({"event": "round", "version": 1}),
        lambda: former.journal.begin(2, "plan", ("a",), 0.0),
        lambda: former.adopt(plans.make({"run": "r", "learner": "x", "rounds": 99})),
    ):
        with pytest.raises(RunEnded):
            act()
    assert former.now() == {"phase": "theirs"}
    assert sorted((file, file.read_bytes()) for file in folder.rglob("*") if file.is_file()) == before


def test_two_never_write_the_same_draft(folder: Path) -> None:
    former, latter = Store.open(folder), Store.open(folder)
    former.begin_epoch()
    latter.begin_epoch()
    theirs = latter.draft(1, LAYOUT, in_order([ZERO]))
    former.draft(1, LAYOUT, in_order([ONE]))  # it has not noticed yet
    latter.seal(1)
    assert latter.load(1)[1] == theirs == ZERO


def test_who_ends_takes_its_own_drafts_away_and_no_other(folder: Path) -> None:
    former, latter = Store.open(folder), Store.open(folder)
    former.begin_epoch()
    latter.begin_epoch()
    latter.draft(1, LAYOUT, in_order([ZERO]))
    former.draft(1, LAYOUT, in_order([ONE]))
    former.tidy()
    assert len([*folder.rglob(".*.new")]) == 1
    latter.seal(1)
    assert latter.load(1)[1] == ZERO


# -- waiting --------------------------------------------------------------------------------------------------------


def test_the_turn_comes_at_once_where_nobody_acts(folder: Path) -> None:
    for _ in range(2):
        with standby.turn(folder) as forced:
            assert forced is False


def test_the_turn_comes_as_soon_as_the_one_before_is_gone(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    held = (folder / standby.LOCK).open("w")
    fcntl.flock(held, fcntl.LOCK_EX)
    looks: list[float] = []

    def look(pause_s: float) -> None:
        looks.append(pause_s)
        beat(folder)
        if len(looks) == 3:
            held.close()

    monkeypatch.setattr("coordinator.standby.time.sleep", look)
    with standby.turn(folder) as forced:
        assert forced is False
    assert len(looks) == 3
    assert caplog.text.count("standing by until it is gone") == 1


def test_whoever_gives_no_sign_of_life_is_not_waited_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("coordinator.standby.time.monotonic", lambda: now[0])
    with (folder / standby.LOCK).open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        beat(folder)

        def look(_: float) -> None:
            now[0] += 1.0
            if now[0] == 5.0:
                beat(folder)

        monkeypatch.setattr("coordinator.standby.time.sleep", look)
        with standby.turn(folder) as forced:
            assert forced is True
    assert 5.0 + standby.STALE_S < now[0] <= 5.0 + standby.STALE_S + 2.0


def test_whoever_took_over_from_one_that_is_stopped_is_waited_for_when_that_one_is_gone(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, taken = [0.0], list[bool]()
    monkeypatch.setattr("coordinator.standby.time.monotonic", lambda: now[0])
    stopped = (folder / standby.LOCK).open("w")
    fcntl.flock(stopped, fcntl.LOCK_EX)

    def look(_: float) -> None:
        now[0] += 1.0
        if len(taken) == 1:
            stopped.close()  # the third, which waits for the lock that was held at first, gets that one now
            beat(folder)
        if now[0] > 100.0:
            raise KeyboardInterrupt

    monkeypatch.setattr("coordinator.standby.time.sleep", look)
    with standby.turn(folder) as forced:
        taken.append(forced)
        assert forced is True
        with pytest.raises(StoppedEarly), standby.turn(folder):
            pytest.fail("it has no turn")
    with standby.turn(folder) as forced:
        assert forced is False


def test_whoever_waits_for_a_lock_that_was_replaced_waits_for_the_other_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped, looks = (folder / standby.LOCK).open("w"), list[IO[str] | None]()
    fcntl.flock(stopped, fcntl.LOCK_EX)
    beat(folder)

    def look(_: float) -> None:
        looks.append(standby._wrested(folder, last_beat(folder)) if not looks else None)
        if len(looks) == 2:
            stopped.close()
        if len(looks) == 4 and looks[0]:
            looks[0].close()

    monkeypatch.setattr("coordinator.standby.time.sleep", look)
    with standby.turn(folder) as forced:
        assert forced is False
    assert len(looks) == 4


def test_several_stand_by_and_none_of_them_ends_because_of_another(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(standby, "BEAT_S", 0.0)
    monkeypatch.setattr(standby, "LOOK_S", 0.0005)
    held, ends = (folder / standby.LOCK).open("w"), list[bool | Exception]()
    fcntl.flock(held, fcntl.LOCK_EX)
    beat(folder)

    def stand_by() -> None:
        try:
            with standby.turn(folder) as forced:
                ends.append(forced)
        except UsageError as problem:
            ends.append(problem)

    waiting = [threading.Thread(target=stand_by) for _ in range(3)]
    for each in waiting:
        each.start()
    waiting[0].join(1.0)
    assert not ends
    held.close()
    for each in waiting:
        each.join(20)
    assert ends == [False] * 3


def test_who_stands_by_is_shown_while_it_does(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held, shown = (folder / standby.LOCK).open("w"), list[dict[str, Any] | None]()
    fcntl.flock(held, fcntl.LOCK_EX)
    assert standby.waiting(folder) is None

    def look(_: float) -> None:
        shown.append(standby.waiting(folder))
        held.close()

    monkeypatch.setattr("coordinator.standby.time.sleep", look)
    with standby.turn(folder):
        assert standby.waiting(folder) is None
    assert [who and who["process"] for who in shown] == [os.getpid()]


def test_waiting_can_be_given_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("coordinator.standby.time.sleep", interrupted)
    with (folder / standby.LOCK).open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(StoppedEarly, match="stopped while another coordinator"), standby.turn(folder):
            pytest.fail("it has no turn")


def test_a_folder_that_cannot_be_written_is_reported_in_a_sentence(folder: Path) -> None:
    (folder / standby.LOCK).mkdir()
    with pytest.raises(UsageError, match=r"cannot be written \(Is a directory\)"), standby.turn(folder):
        pytest.fail("it has no turn")


def test_beats_can_be_told_apart(tmp_path: Path) -> None:
    assert last_beat(tmp_path) == 0
    seen = set()
    for _ in range(3):
        beat(tmp_path)
        seen.add(last_beat(tmp_path))
        time.sleep(0.02)  # a disk's clock is coarse
    assert len(seen) == 3


def test_whoever_has_the_turn_gives_signs_of_life_from_then_on_and_while_its_own_thread_is_busy(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(standby, "BEAT_S", 0.005)
    seen = set()
    with standby.turn(folder):
        for _ in range(20_000):
            seen.add(last_beat(folder))
            if len(seen) == 4:
                break
            threading.Event().wait(0.001)
    assert len(seen) == 4, "it was busy with something else, such as a large model"


def test_whoever_was_followed_gives_no_signs_of_life_in_the_name_of_the_other(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(standby, "BEAT_S", 0.005)
    with standby.turn(folder):
        (beats,) = [each for each in threading.enumerate() if each.name == "beats"]
        (folder / "theirs").touch()
        (folder / "theirs").replace(folder / standby.LOCK)
        beats.join(20)
        assert not beats.is_alive()
