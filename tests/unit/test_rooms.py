"""Room for uploads: the same memory again and again, and files for those that are too large for it."""

import mmap
import os
from pathlib import Path

import pytest

import coordinator.rooms
from broker.errors import UsageError
from broker.files import forget
from coordinator.rooms import Room


def test_uploads_of_one_size_share_their_memory(tmp_path: Path) -> None:
    room = Room(tmp_path)
    first = room.clear(1000)
    assert len(first) == 1000
    assert room.clear(1000) is first
    assert len(room.clear(2000)) == 2000


def test_a_large_upload_lies_in_a_file_that_leaves_no_trace_and_keeps_what_is_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coordinator.rooms, "MEMORY_BYTES_MAX", 1000)
    data = Room(tmp_path).clear(50_000)
    assert isinstance(data.obj, mmap.mmap)
    data[:] = os.urandom(1000) * 50
    before = bytes(data)
    forget(data)
    assert data == before
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coordinator.rooms, "MEMORY_BYTES_MAX", 1000)
    with pytest.raises(UsageError, match=r"has no room for an upload of 1152921504606846976 bytes \(.+\): make some"):
        Room(tmp_path).clear(1 << 60)
