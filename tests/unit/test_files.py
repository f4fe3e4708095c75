"""Files that are whole or absent, and versions that other programs can read."""

import errno
import os
import resource
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from broker import files
from broker.errors import UsageError, WireError
from broker.files import draft_version, forget, forgetting, in_order, read_version, seal, write_whole
from broker.tensors import ITEM_BYTES, Layout, TensorSpec, view

LAYOUT = Layout.of(TensorSpec(f"a.{dtype}", dtype, (2, 3)) for dtype in ITEM_BYTES)
WEIGHTS = memoryview(bytes(range(1, 7)) * (LAYOUT.size_bytes // 6 - 1) + b"\0\1\0\1\0\1")
ZEROS = memoryview(bytes(LAYOUT.size_bytes))
ABOUT = {"fluffle_run": "run-1", "learner": "ünïcode"}


def write_version(path: Path, layout: Layout, weights: memoryview, about: dict[str, str]) -> None:
    draft_version(path, layout, in_order([weights]), about)
    seal(path)


def written_by_safetensors(layout: Layout, weights: memoryview, about: dict[str, str] | None) -> bytes:
    flat = np.frombuffer(weights, np.uint8)
    tensors = {
        spec.name: safetensors.TensorSpec(
            dtype=spec.dtype,
            shape=spec.shape,
            data_ptr=flat.ctypes.data + layout.offsets[spec.name],
            data_len=spec.size_bytes,
        )
        for spec in layout.specs
    }
    return safetensors.serialize(tensors, about)


def test_a_version_is_read_as_it_was_written(tmp_path: Path) -> None:
    layout = Layout.of([*LAYOUT.specs, TensorSpec("scalar", "float32", ()), TensorSpec("none", "int64", (3, 0))])
    weights = memoryview(bytes(i % 2 for i in range(layout.size_bytes)))
    write_version(tmp_path / "v", layout, weights, ABOUT)
    assert read_version(tmp_path / "v") == (layout, weights, ABOUT)


NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=5).filter(
    lambda n: n != "__metadata__"
)
SPECS = st.lists(
    st.builds(
        TensorSpec, NAMES, st.sampled_from(sorted(ITEM_BYTES)), st.lists(st.integers(0, 3), max_size=3).map(tuple)
    ),
    unique_by=lambda spec: spec.name,
    min_size=1,
    max_size=8,
)


# safetensors shuffles its notes, so there is at most one
@given(SPECS, st.dictionaries(NAMES, st.text(st.characters(exclude_categories=["Cs"]), max_size=5), max_size=1))
@settings(max_examples=60, deadline=None)
def test_a_file_is_the_one_that_safetensors_would_have_written(
    tmp_path_factory: pytest.TempPathFactory, specs: list[TensorSpec], about: dict[str, str]
) -> None:
    path = tmp_path_factory.getbasetemp() / "same"
    layout = Layout.of(specs)
    weights = memoryview(bytes(i % 2 for i in range(layout.size_bytes)))
    write_version(path, layout, weights, about)
    assert path.read_bytes() == written_by_safetensors(layout, weights, about or None)
    assert read_version(path) == (layout, weights, about)


def test_torch_reads_the_same_numbers_from_a_version_and_we_from_torch(tmp_path: Path) -> None:
    write_version(tmp_path / "v", LAYOUT, WEIGHTS, {})
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


def test_tensors_in_another_order_or_out_of_step_are_put_in_their_places(tmp_path: Path) -> None:
    b, a = (
        b'"b":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}',
        b'"a":{"dtype":"F64","shape":[],"data_offsets":[8,16]}',
    )
    for header in (b"{%b,%b}" % (b, a), b"{%b,%b}    " % (a, b)):
        (tmp_path / "v").write_bytes(struct.pack("<Q", len(header)) + header + struct.pack("<2fd", 1, 2, 3))
        layout, weights, _ = read_version(tmp_path / "v")
        assert [spec.name for spec in layout.specs] == ["a", "b"]
        assert weights == struct.pack("<d2f", 3, 1, 2)
        assert weights.readonly
    for spaces in range(8):
        header = b'{"a":{"dtype":"F64","shape":[],"data_offsets":[0,8]}}' + b" " * spaces
        (tmp_path / "v").write_bytes(struct.pack("<Q", len(header)) + header + struct.pack("<d", 3))
        found = view(read_version(tmp_path / "v")[1], "float64")
        assert found.tolist() == [3]
        assert found.flags.aligned


def test_a_file_that_is_absent_or_a_folder_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read: No such file or directory"):
        read_version(tmp_path / "absent")
    with pytest.raises(UsageError, match="cannot be read: Is a directory"):
        read_version(tmp_path)


def test_a_damaged_version_is_refused_wherever_it_was_cut(tmp_path: Path) -> None:
    write_version(tmp_path / "v", LAYOUT, WEIGHTS, ABOUT)
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
        write_version(tmp_path / "v", LAYOUT, WEIGHTS, {})
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

    write_version(tmp_path / "v", LAYOUT, WEIGHTS, ABOUT)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_version(tmp_path / "v", LAYOUT, ZEROS, {})
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
        write_version(tmp_path / "absent" / "v", LAYOUT, WEIGHTS, {})


# -- drafts ---------------------------------------------------------------------------------------------------------


def cut(weights: memoryview, size: int = 7) -> list[memoryview]:
    return [weights[start : start + size] for start in range(0, len(weights), size)]


def test_a_draft_can_be_read_at_once_and_is_no_version_until_it_is_sealed(tmp_path: Path) -> None:
    weights = draft_version(tmp_path / "v", LAYOUT, in_order(cut(WEIGHTS)), ABOUT)
    assert weights == WEIGHTS
    assert not (tmp_path / "v").exists()
    seal(tmp_path / "v")
    assert read_version(tmp_path / "v") == (LAYOUT, weights, ABOUT)
    assert [file.name for file in tmp_path.iterdir()] == ["v"]


def test_what_is_changed_in_a_draft_is_in_the_version(tmp_path: Path) -> None:
    weights = draft_version(tmp_path / "v", LAYOUT, in_order([ZEROS]), ABOUT)
    weights[:] = WEIGHTS
    seal(tmp_path / "v")
    assert read_version(tmp_path / "v")[1] == WEIGHTS


def test_another_draft_takes_the_place_of_one_that_stays_readable(tmp_path: Path) -> None:
    first = draft_version(tmp_path / "v", LAYOUT, in_order([WEIGHTS]), {})
    second = draft_version(tmp_path / "v", LAYOUT, in_order([ZEROS]), {})
    seal(tmp_path / "v")
    assert first == WEIGHTS
    assert second == ZEROS == read_version(tmp_path / "v")[1]


def test_a_version_that_is_read_stays_readable_when_another_takes_its_place(tmp_path: Path) -> None:
    write_version(tmp_path / "v", LAYOUT, WEIGHTS, {})
    _, weights, _ = read_version(tmp_path / "v")
    write_version(tmp_path / "v", LAYOUT, ZEROS, {})
    assert weights == WEIGHTS
    assert weights.readonly


def test_of_a_draft_that_cannot_be_finished_nothing_stays(tmp_path: Path) -> None:
    def pieces() -> Iterator[memoryview]:
        yield WEIGHTS[:5]
        raise WireError("the model has diverged.")

    with pytest.raises(WireError, match="diverged"):
        draft_version(tmp_path / "v", LAYOUT, in_order(pieces()), {})
    assert not list(tmp_path.iterdir())


def test_a_draft_for_which_there_is_no_room_is_an_error_of_the_disk_and_nothing_stays(tmp_path: Path) -> None:
    layout = Layout.of([TensorSpec("w", "uint8", (300_000,))])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            draft_version(tmp_path / "v", layout, in_order(cut(memoryview(bytes(300_000)), 10_000)), {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_a_draft_that_the_disk_does_not_keep_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    draft_version(tmp_path / "v", LAYOUT, in_order([WEIGHTS]), {})
    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output error"):
        seal(tmp_path / "v")
    assert not list(tmp_path.iterdir())


# -- memory ---------------------------------------------------------------------------------------------------------


def mapped_bytes() -> int:
    """How much of this process's memory shows files."""
    return int(Path("/proc/self/statm").read_text().split()[2]) * resource.getpagesize()


def test_a_large_version_is_forgotten_and_read_again_from_its_file(tmp_path: Path) -> None:
    layout = Layout.of([TensorSpec("w", "uint8", (8 * 2**20,))])
    piece = memoryview(bytes(range(256)) * 2**12)
    draft = draft_version(tmp_path / "v", layout, in_order([piece] * 8), {})
    seal(tmp_path / "v")
    for data in (draft, read_version(tmp_path / "v")[1]):
        assert data[-(2**20) :] == piece
        assert sum(data[::4096]) == 0
        seen = mapped_bytes()
        forget(data[5:])
        assert mapped_bytes() < seen - 7 * 2**20
        assert data[: 2**20] == piece


def test_what_is_looked_at_on_the_way_does_not_pile_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Layout.of([TensorSpec("w", "uint8", (8 * 2**20,))])
    old = draft_version(tmp_path / "v", layout, in_order(cut(memoryview(bytes(8 * 2**20)), 2**20)), {})

    def looking() -> Iterator[memoryview]:
        for piece in cut(old, 2**20):
            sum(piece[::4096])
            yield piece

    monkeypatch.setattr(files, "FORGET_BYTES", 2**21)
    before = mapped_bytes()
    seen = [mapped_bytes() - before for _ in forgetting(looking(), old, len)]
    assert len(seen) == 8
    assert max(seen) < 3 * 2**20


def test_what_no_file_holds_is_not_forgotten() -> None:
    forget(WEIGHTS)
    assert WEIGHTS[:6] == bytes(range(1, 7))
