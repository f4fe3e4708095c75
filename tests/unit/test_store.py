"""A run's folder: whatever dies when, every file is whole or absent, and what is wrong is said in a sentence."""

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from broker import chain
from broker.errors import UsageError, WireError
from broker.files import checksum, in_order
from broker.tensors import Layout, TensorSpec
from coordinator import plan as plans
from coordinator.plan import Plan
from coordinator.store import Store, new_run_name

LAYOUT = Layout.of([TensorSpec("w", "float32", (2,)), TensorSpec("b", "float32", (1,))])
ZERO = memoryview(bytes(LAYOUT.size_bytes))
ONE = memoryview(bytes(range(LAYOUT.size_bytes)))


def plan_of(**changes: Any) -> Plan:
    return plans.make({"run": "run-1", "learner": "digits", **changes})


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.create(tmp_path / "run", plan_of(), LAYOUT, ZERO)


def save(store: Store, version: int, weights: memoryview = ONE) -> None:
    store.save(version, LAYOUT, weights)


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# -- making and opening ---------------------------------------------------------------------------------------------


def test_a_new_run_has_a_plan_and_version_0(store: Store) -> None:
    opened = Store.open(store.folder)
    assert opened.plan == plan_of()
    assert opened.latest() == 0
    assert opened.load(0) == (LAYOUT, ZERO)
    assert ([*opened.history()], opened.now()) == ([], {})


def test_a_folder_that_holds_a_run_or_anything_else_is_left_alone(store: Store, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds a run already: choose another folder, or remove it first"):
        Store.create(store.folder, plan_of(), LAYOUT, ZERO)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    (tmp_path / "file").touch()
    for name in ("other", "file"):
        with pytest.raises(UsageError, match="is not an empty folder: choose another name for the run"):
            Store.create(tmp_path / name, plan_of(), LAYOUT, ZERO)
    assert [file.name for file in (tmp_path / "other").iterdir()] == ["thesis.tex"]


def test_an_empty_folder_may_become_a_run(tmp_path: Path) -> None:
    assert Store.create(tmp_path, plan_of(), LAYOUT, ZERO).latest() == 0


def test_a_folder_that_is_no_run_is_not_opened(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UsageError, match="is not a run: make one with `fluffle init LEARNER"):
            Store.open(folder)


def test_a_plan_without_version_0_is_not_a_run(store: Store) -> None:
    store.path(0).unlink()
    with pytest.raises(UsageError, match="has a plan but no version 0: make the run anew"):
        Store.open(store.folder)


def test_a_run_that_was_being_made_when_the_disk_filled_is_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UsageError, match="cannot be written"):
        Store.create(tmp_path / "run", plan_of(), LAYOUT, ZERO)
    with pytest.raises(UsageError, match="is not a run"):
        Store.open(tmp_path / "run")


@pytest.mark.parametrize(
    ("folder", "begins"),
    [("digits", "digits-"), ("My Run_1", "my-run-1-"), ("Größe", "gr--e-"), ("...", "run-"), ("x" * 100, "x" * 40)],
)
def test_a_runs_name_is_made_of_its_folders_and_never_the_same_twice(folder: str, begins: str) -> None:
    names = {new_run_name(Path("/data") / folder) for _ in range(3)}
    assert len(names) == 3
    for name in names:
        assert name.startswith(begins)
        assert plan_of(run=name).run == name


# -- versions -------------------------------------------------------------------------------------------------------


def test_the_latest_version_is_the_one_with_the_largest_number(store: Store) -> None:
    for version in (9, 10, 1_000_000):
        save(store, version)
    assert store.latest() == 1_000_000
    assert store.load(1_000_000) == (LAYOUT, ONE)


def test_a_version_whose_writing_was_cut_short_is_absent(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", full)
        with pytest.raises(UsageError, match="cannot be written"):
            save(store, 1)
    assert store.latest() == 0
    save(store, 1)
    assert store.load(1) == (LAYOUT, ONE)


def test_a_version_on_a_full_disk_is_reported_in_a_sentence(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UsageError) as caught:
        save(store, 1)
    said = "cannot be written (No space left on device): make room or mend its permissions, then start again."
    assert str(caught.value) == f"{store.folder} {said}"


def test_a_draft_is_no_version_until_it_is_sealed(store: Store) -> None:
    weights = store.draft(1, LAYOUT, in_order([ONE[:5], ONE[5:]]))
    assert weights == ONE
    assert store.latest() == 0
    store.seal(1)
    assert store.latest() == 1
    assert store.load(1) == (LAYOUT, weights)


def test_a_draft_on_a_full_disk_is_reported_in_a_sentence(store: Store) -> None:
    def pieces() -> Iterator[memoryview]:
        yield ONE
        full()

    with pytest.raises(UsageError, match=r"cannot be written \(No space left on device\): make room"):
        store.draft(1, LAYOUT, in_order(pieces()))
    with pytest.raises(UsageError, match="cannot be written"):
        store.seal(1)
    assert store.latest() == 0


def test_a_mean_that_has_diverged_is_not_blamed_on_the_disk(store: Store) -> None:
    def pieces() -> Iterator[memoryview]:
        yield ONE
        raise WireError("the model has diverged.")

    with pytest.raises(WireError, match="diverged"):
        store.draft(1, LAYOUT, in_order(pieces()))
    assert store.latest() == 0


def test_a_version_that_is_there_already_is_replaced_whole(store: Store) -> None:
    save(store, 1, ZERO)
    save(store, 1, ONE)
    assert store.load(1) == (LAYOUT, ONE)


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="macOS has no such call")
def test_a_version_that_is_safe_makes_room_in_the_cache_for_the_next(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_go = list[tuple[int, int, int, int]]()
    monkeypatch.setattr(os, "posix_fadvise", lambda number, *rest: let_go.append((os.fstat(number).st_ino, *rest)))
    save(store, 1)
    assert let_go == [(store.path(0).stat().st_ino, 0, 0, os.POSIX_FADV_DONTNEED)], "the one before, not the new one"
    store.path(1).unlink()
    save(store, 2)
    assert store.latest() == 2, "a version that was removed is nobody's trouble"


def test_a_damaged_version_is_named(store: Store) -> None:
    save(store, 1)
    store.path(1).write_bytes(store.path(1).read_bytes()[:-1])
    with pytest.raises(UsageError, match=r"000001\.safetensors is damaged or not a version"):
        store.load(1)


def test_a_version_that_is_not_what_the_history_speaks_of_is_not_begun_with(store: Store) -> None:
    start = checksum(ZERO)
    for version, told in ((1, {"start": start}), (2, {})):
        save(store, version)
        line = {"event": "round", "round": version, "attempt": 1, "version": version, "cohort": [], "counted": {}}
        store.note(store.vouched(line | told))
    path, again = store.path(2), Store.open(store.folder)
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    with pytest.raises(UsageError, match=r"000002\.safetensors is not the version 2 of this run's .* Restore it, or"):
        again.load(2)
    assert again.load(1) == (LAYOUT, ONE)
    store.path(0).write_bytes(store.path(1).read_bytes())
    with pytest.raises(UsageError, match=r"000000\.safetensors is not the version 0"):
        again.load(0)


def test_a_version_of_another_run_is_refused(store: Store, tmp_path: Path) -> None:
    other = Store.create(tmp_path / "other", plan_of(run="run-2"), LAYOUT, ONE)
    store.path(0).write_bytes(other.path(0).read_bytes())
    with pytest.raises(UsageError, match="is of the run run-2: put the right file back"):
        store.load(0)


def test_files_of_other_kinds_among_the_versions_are_passed_over(store: Store) -> None:
    for name in (".000007.safetensors.new", "best.safetensors", "000008.txt", ".tmp.safetensors"):
        (store.path(0).parent / name).touch()
    assert store.latest() == 0


# -- the plan -------------------------------------------------------------------------------------------------------


def test_the_plan_may_change_until_version_1_is_made_and_then_only_in_its_rounds(store: Store) -> None:
    store.adopt(plan_of(cohort=5, settings={"lr": 1}))
    assert Store.open(store.folder).plan.cohort == 5
    save(store, 1)
    store.adopt(plan_of(cohort=5, settings={"lr": 1}, rounds=99))
    assert Store.open(store.folder).plan == store.plan == plan_of(cohort=5, settings={"lr": 1}, rounds=99)
    with pytest.raises(UsageError, match="frozen since version 1: make another run to change cohort, quorum"):
        store.adopt(plan_of(cohort=6, quorum=1, settings={"lr": 1}, rounds=100))
    assert Store.open(store.folder).plan == store.plan == plan_of(cohort=5, settings={"lr": 1}, rounds=99)


def test_a_plan_that_changes_nothing_is_not_written(store: Store) -> None:
    by_hand = (store.folder / plans.FILE).read_text() + "\n# a remark of mine\n"
    (store.folder / plans.FILE).write_text(by_hand)
    store.adopt(plan_of())
    assert (store.folder / plans.FILE).read_text() == by_hand


# -- the history ----------------------------------------------------------------------------------------------------


def test_the_history_keeps_its_lines_in_order(store: Store) -> None:
    lines: list[dict[str, Any]] = [{"event": "round", "why": "a\u2028b\nc"}, {"event": "final", "n": 0.1}]
    for line in lines:
        store.note(line)
    assert [*Store.open(store.folder).history()] == lines


@pytest.mark.parametrize("left", range(len(b'{"event": "two"}\n')))
def test_a_line_torn_by_a_crash_is_passed_over_and_hurts_no_other(store: Store, left: int) -> None:
    store.note({"event": "one"})
    file = store.folder / "history.jsonl"
    file.write_bytes(file.read_bytes() + b'{"event": "two"}'[:left])
    store.note({"event": "three"})
    events = [line["event"] for line in store.history()]
    assert events == ["one", *(["two"] if left == 16 else []), "three"]


def test_the_chain_goes_on_from_the_last_line_that_is_whole_and_the_next_one_vouches_for_what_was_torn(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chain, "TAIL_BYTES", 16)  # the end of the history is found piece by piece
    file, stores = store.folder / "history.jsonl", [store, Store.open(store.folder)]
    for number, torn in enumerate([b"", b'{"event"', b"\0" * 100, b"", b'{"a":1}\n{"b', b"\n"]):
        stores[number % 2].note({"event": "round", "n": number, "why": "\u2028" * 20})
        with file.open("ab") as written:
            written.write(torn)
    findings, last = chain.check(file.read_bytes())
    assert [finding.said.partition(",")[0] for finding in findings] == [
        "line 3 was torn",
        "line 5 was torn",
        "lines 8 to 9 were torn",
        "line 11 was changed or added at the end: no line of this history reads so.",
    ]
    assert [finding.bad for finding in findings] == [False, False, False, True]
    assert last in file.read_text()
    assert [line["n"] for line in store.history() if "n" in line] == list(range(6))


def test_lines_that_are_not_ours_are_passed_over(store: Store) -> None:
    store.note({"event": "one"})
    file = store.folder / "history.jsonl"
    file.write_bytes(b"3\n[]\nnull\n\n\xff\xfe\nNaN\n" + file.read_bytes())
    assert [*store.history()] == [{"event": "one"}]


def test_a_history_that_cannot_be_written_is_reported_in_a_sentence(store: Store) -> None:
    (store.folder / "history.jsonl").mkdir()
    with pytest.raises(UsageError, match=r"cannot be written \(Is a directory\): make room"):
        store.note({})


def test_numbers_that_json_does_not_have_never_get_into_the_history(store: Store) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        store.note({"loss": float("nan")})
    assert [*store.history()] == []


# -- now -------------------------------------------------------------------------------------------------------------


def test_what_is_happening_is_what_was_said_last(store: Store) -> None:
    store.say_now({"phase": "open", "here": ("ada", "bob")})
    store.say_now({"phase": "done"})
    assert store.now() == {"phase": "done"}
    (store.folder / "now.json").write_text(json.dumps(["not", "ours"]))
    assert store.now() == {}


def test_the_line_of_a_version_that_was_saved_just_before_a_crash_is_noted_once(store: Store) -> None:
    lines = [{"event": "round", "round": number, "version": number} for number in (1, 2)]
    for number in (1, 2):
        store.journal.begin(number, "plan", ("a",), 0.0)
        store.journal.made(lines[number - 1])
        store.save(number, LAYOUT, ONE)
    store.note(lines[0])
    store.journal.flush()
    for _ in range(2):
        again = Store.open(store.folder)
        again.settle()
        assert [*again.history()] == [lines[0], lines[1] | {"weights": checksum(ONE)}]


def test_the_line_of_a_version_that_was_lost_is_not_noted(store: Store) -> None:
    store.journal.begin(1, "plan", ("a",), 0.0)
    store.journal.made({"event": "round", "round": 1, "version": 1})
    store.journal.flush()
    again = Store.open(store.folder)
    again.settle()
    assert [*again.history()] == []
