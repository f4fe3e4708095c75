"""Finished updates on a worker's disk: found again as they were, or not at all."""

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from xxhash import xxh3_64_digest

from broker.messages import PART_BYTES_MIN, Attempt, Payload, Task, Update
from broker.tensors import TensorSpec
from workers.journal import SUFFIX, Kept, Place, all_kept, forget, keep
from workers.residuals import LEFT, Residuals
from workers.spool import PAGE_BYTES, Slot, Spool

OF = Attempt("run-1", 7, 2)
LARGE = 64 * 1024 + 4


def update_of(worker: str, size: int, of: Attempt = OF) -> Update:
    return Update(
        of, worker, 6, 30, {"loss": 0.5}, Payload("p", PART_BYTES_MIN, (TensorSpec("w", "uint8", (size,)),))
    )


def task_of(update: Update) -> Task:
    return Task(update.of, "train", 6, 60.0, 1, {}, update.payload, format="int8")


def kept_of(folder: Path, worker: str, *, until: float | None = None) -> Kept:
    """A small update of a worker, whose bytes lie in a file of the folder."""
    update, place = update_of(worker, 5), Place("0.models", 0, 5, xxh3_64_digest(b"delta"))
    (folder / place.file).write_bytes(b"delta")
    return Kept(task_of(update), update, {"loss": 0.25}, time.time() + 60 if until is None else until, place)


def kept_in(spool: Spool, worker: str, content: int, of: Attempt = OF) -> Slot:
    """A large update of a worker, in a slot, written down."""
    slot, update = spool.take(LARGE), update_of(worker, LARGE, of)
    np.frombuffer(slot.data, np.uint8)[:] = content
    place = Place(slot.file[0].name, slot.file[1], LARGE, xxh3_64_digest(slot.data))
    keep(spool.folder, Kept(task_of(update), update, {}, time.time() + 60, place))
    return slot


def test_what_is_kept_is_found_again_as_it_was_until_it_is_forgotten(tmp_path: Path) -> None:
    one, other = kept_of(tmp_path, "ada"), kept_of(tmp_path, "bob")
    keep(tmp_path, one)
    keep(tmp_path, other)
    assert all_kept(tmp_path) == [one, other]
    assert not any(file.stat().st_mode & 0o077 for file in tmp_path.glob(f"*{SUFFIX}"))
    forget(tmp_path, "ada", OF)
    forget(tmp_path, "ada", OF)
    assert all_kept(tmp_path) == [other]


def test_what_nobody_waits_for_any_more_is_removed(tmp_path: Path) -> None:
    keep(tmp_path, kept_of(tmp_path, "ada", until=time.time() - 1))
    assert all_kept(tmp_path) == []
    assert not list(tmp_path.glob(f"*{SUFFIX}"))


@pytest.mark.parametrize("damage", ["cut", "changed", "renamed", "empty", "foreign"])
def test_what_is_damaged_is_said_to_be_and_removed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    keep(tmp_path, kept_of(tmp_path, "ada"))
    (path,) = tmp_path.glob(f"*{SUFFIX}")
    data = path.read_bytes()
    path.write_bytes(
        {"cut": data[:-3], "changed": data.replace(b"models", b"modems"), "empty": b""}.get(damage, data)
    )
    if damage == "renamed":
        path.rename(path.with_name(f"bob.run-1.7.2{SUFFIX}"))
    if damage == "foreign":
        path.write_bytes(b"a letter to the editor")
    assert all_kept(tmp_path) == []
    assert "is damaged" in caplog.text
    assert not list(tmp_path.glob(f"*{SUFFIX}"))


@pytest.mark.parametrize("name", ["../1.models", "/etc/passwd", "1.update", "x.models", ""])
def test_a_record_cannot_point_out_of_its_folder(tmp_path: Path, name: str) -> None:
    keep(tmp_path, replace(kept_of(tmp_path, "ada"), delta=Place(name, 0, 4, b"12345678")))
    assert all_kept(tmp_path) == []


def test_the_bytes_of_a_large_update_outlive_the_process_and_the_room_beside_them_is_used_again(
    tmp_path: Path,
) -> None:
    spool = Spool(tmp_path)
    slots = [spool.take(LARGE) for _ in range(3)]  # files of several slots
    mine = kept_in(spool, "ada", 7)
    files = {path.name for path in tmp_path.glob("*.models")}
    del slots, mine
    spool.remove()
    again = Spool(tmp_path)
    ((kept, slot),) = again.kept["ada"]
    assert kept.update == update_of("ada", LARGE)
    assert bytes(slot.data) == b"\7" * LARGE
    left = {path.name for path in tmp_path.glob("*.models")}
    assert left <= files
    assert len(left) == 1
    rooms = (tmp_path / left.pop()).stat().st_size // (-(-LARGE // PAGE_BYTES) * PAGE_BYTES)
    others = [again.take(LARGE) for _ in range(rooms - 1)]
    for other in others:
        np.frombuffer(other.data, np.uint8)[:] = 9
    assert bytes(slot.data) == b"\7" * LARGE
    assert len(list(tmp_path.glob("*.models"))) == 1
    forget(tmp_path, "ada", OF)
    del slot, others, other
    again.remove()
    assert not tmp_path.exists()


def test_a_large_update_whose_bytes_were_written_over_is_not_sent(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spool = Spool(tmp_path)
    slot = kept_in(spool, "ada", 7)
    slot.data[5] = 8
    del slot
    spool.remove()
    again = Spool(tmp_path)
    assert again.kept == {}
    assert "do not match their checksum" in caplog.text
    again.remove()
    assert not tmp_path.exists()


def test_two_runs_and_two_workers_keep_theirs_apart(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    other = Attempt("run-2", 1, 1)
    slots = [kept_in(spool, "ada", 1), kept_in(spool, "ada", 2, other), kept_in(spool, "bob", 3)]
    del slots
    spool.remove()
    again = Spool(tmp_path)
    found = {(w, kept.update.of.run): slot.data[0] for w, all_ in again.kept.items() for kept, slot in all_}
    assert found == {("ada", "run-1"): 1, ("ada", "run-2"): 2, ("bob", "run-1"): 3}
    fresh = again.take(LARGE)
    np.frombuffer(fresh.data, np.uint8)[:] = 9
    assert {slot.data[0] for all_ in again.kept.values() for _, slot in all_} == {1, 2, 3}
    again.kept.clear()
    again.remove()


def test_what_a_format_left_out_of_a_kept_update_is_kept_with_it(tmp_path: Path) -> None:
    keep(tmp_path, kept_of(tmp_path, "ada"))
    mine, others = Residuals(tmp_path, "ada").of(OF), Residuals(tmp_path, "ada").of(Attempt("run-2", 1, 1))
    for residual in (mine, others):
        residual.left.touch()
    spool = Spool(tmp_path)
    assert [path.name for path in tmp_path.glob(f"*{LEFT}")] == [mine.left.name]
    spool.kept.clear()
    spool.remove()
