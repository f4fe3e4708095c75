"""Files that are whole or absent, and versions that other programs can read."""

import errno
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from broker.errors import UsageError
from broker.files import read_version, write_version, write_whole
from broker.tensors import ITEM_BYTES, Layout, TensorSpec, view

LAYOUT = Layout.of(TensorSpec(f"a.{dtype}", dtype, (2, 3)) for dtype in ITEM_BYTES)
WEIGHTS = bytearray(range(1, 7)) * (LAYOUT.size_bytes // 6 - 1) + b"\0\1\0\1\0\1"
ABOUT = {"fluffle_run": "run-1", "learner": "ünïcode"}


def test_a_version_is_read_as_it_was_written(tmp_path: Path) -> None:
    layout = Layout.of([*LAYOUT.specs, TensorSpec("scalar", "float32", ()), TensorSpec("none", "int64", (3, 0))])
    weights = bytearray(i % 2 for i in range(layout.size_bytes))
    write_version(tmp_path / "v", layout, memoryview(weights), ABOUT)
    assert read_version(tmp_path / "v") == (layout, weights, ABOUT)


def test_torch_reads_the_same_numbers_from_a_version_and_we_from_torch(tmp_path: Path) -> None:
    write_version(tmp_path / "v", LAYOUT, memoryview(WEIGHTS), {})
    tensors = load_file(tmp_path / "v")
    assert set(tensors) == set(LAYOUT.offsets)
    for spec in LAYOUT.specs:
        at = LAYOUT.offsets[spec.name]
        ours = view(WEIGHTS[at : at + spec.size_bytes], spec.dtype)
        theirs = tensors[spec.name]
        assert tuple(theirs.shape) == (2, 3)
        theirs = theirs.view(torch.uint16) if spec.dtype == "bfloat16" else theirs
        np.testing.assert_array_equal(theirs.numpy().reshape(-1), ours)
    save_file(tensors, tmp_path / "w")
    assert read_version(tmp_path / "w") == (LAYOUT, WEIGHTS, {})


def test_a_file_that_is_absent_or_a_folder_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read: No such file or directory"):
        read_version(tmp_path / "absent")
    with pytest.raises(UsageError, match="cannot be read: Is a directory"):
        read_version(tmp_path)


def test_a_damaged_version_is_refused_wherever_it_was_cut(tmp_path: Path) -> None:
    write_version(tmp_path / "v", LAYOUT, memoryview(WEIGHTS), ABOUT)
    whole = (tmp_path / "v").read_bytes()
    for length in (0, 1, 7, 8, 20, len(whole) - len(WEIGHTS), len(whole) - 1):
        (tmp_path / "v").write_bytes(whole[:length])
        with pytest.raises(UsageError, match=r"/v is damaged or not a version \(.*\): restore it, or remove it\.$"):
            read_version(tmp_path / "v")


@pytest.mark.parametrize(
    "header",
    [
        b"{}}",
        b"[]",
        b'{"w":{"dtype":"F8_E4M3","shape":[1],"data_offsets":[0,1]}}',
        b'{"w":{"dtype":"F32","shape":[9],"data_offsets":[0,4]}}',
        b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,400]}}',
        b'{"":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
    ],
)
def test_a_file_whose_header_lies_is_refused(tmp_path: Path, header: bytes) -> None:
    (tmp_path / "v").write_bytes(struct.pack("<Q", len(header)) + header + bytes(1 if b"F8" in header else 4))
    with pytest.raises(UsageError, match="is damaged or not a version"):
        read_version(tmp_path / "v")


def test_a_model_without_tensors_is_not_a_version(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match="the model has no tensors, so there is nothing to learn: give it parameters"
    ):
        write_version(tmp_path / "v", Layout(()), memoryview(b""), {})
    assert not list(tmp_path.iterdir())


def test_files_are_as_readable_as_the_user_has_all_files(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_version(tmp_path / "v", LAYOUT, memoryview(WEIGHTS), {})
        write_whole(tmp_path / "f", b"data")
    finally:
        os.umask(before)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in "vf"] == [0o640, 0o640]


@pytest.mark.parametrize("durable", [True, False])
def test_a_file_is_replaced_whole_and_nothing_else_stays(tmp_path: Path, durable: bool) -> None:
    write_whole(tmp_path / "f", b"a long content", durable=durable)
    write_whole(tmp_path / "f", b"short", durable=durable)
    assert (tmp_path / "f").read_bytes() == b"short"
    assert [file.name for file in tmp_path.iterdir()] == ["f"]


def test_a_crash_before_the_renaming_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write_version(tmp_path / "v", LAYOUT, memoryview(WEIGHTS), ABOUT)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_version(tmp_path / "v", LAYOUT, memoryview(bytes(LAYOUT.size_bytes)), {})
    with pytest.raises(OSError, match="No space left"):
        write_whole(tmp_path / "v", b"new")
    assert read_version(tmp_path / "v") == (LAYOUT, WEIGHTS, ABOUT)


def test_what_an_earlier_crash_left_is_written_over(tmp_path: Path) -> None:
    (tmp_path / ".f.new").write_bytes(b"half a file, longer than the new one")
    write_whole(tmp_path / "f", b"new")
    assert (tmp_path / "f").read_bytes() == b"new"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_is_not_there_is_an_error_of_the_disk(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        write_version(tmp_path / "absent" / "v", LAYOUT, memoryview(WEIGHTS), {})


def test_what_safetensors_says_of_a_full_disk_is_an_error_of_the_disk_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import safetensors

    def full(*_: object) -> None:
        raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors, "serialize_file", full)
    with pytest.raises(OSError, match="No space left on device"):
        write_version(tmp_path / "v", LAYOUT, memoryview(WEIGHTS), {})
