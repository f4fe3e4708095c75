"""A version as a file, and files that are whole or absent. Both sides and people hand version files around.

Knows the safetensors format by its library, and how a disk keeps what it was given. Does not know runs or rounds.
"""

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from broker.errors import UsageError, WireError
from broker.tensors import Layout, TensorSpec

# safetensors' names for dtypes → ours
_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip


def write_version(path: Path, layout: Layout, weights: memoryview, about: dict[str, str]) -> None:
    """Write named tensors as a safetensors file, whole or not at all, without a copy of them.

    Raises:
        UsageError: there are no tensors to write.
        OSError: the disk is full or not writable.
    """
    if not layout.specs:
        raise UsageError("the model has no tensors, so there is nothing to learn: give it parameters.")
    flat = np.frombuffer(weights, np.uint8)  # keeps the bytes in place while they are written
    tensors = {
        spec.name: safetensors.TensorSpec(
            dtype=spec.dtype,
            shape=list(spec.shape),
            data_ptr=flat.ctypes.data + layout.offsets[spec.name],
            data_len=spec.size_bytes,
        )
        for spec in layout.specs
    }
    with _beside(path, durable=True) as beside:
        try:
            safetensors.serialize_file(tensors, beside, about)
        except safetensors.SafetensorError as problem:  # its word for a full disk
            raise OSError(errno.EIO, str(problem)) from None


def read_version(path: Path) -> tuple[Layout, bytearray, dict[str, str]]:
    """The tensors and the notes of a safetensors file.

    Raises:
        UsageError: it cannot be read, is damaged, or holds tensors that do not travel.
    """
    try:
        raw = path.read_bytes()
        found: list[tuple[str, Any]] = safetensors.deserialize(raw)  # type: ignore[no-untyped-call]  # its stub has no types here
        specs = [TensorSpec(name, _DTYPES[t["dtype"]], tuple(t["shape"])) for name, t in found]
        layout = Layout.of(specs)
    except OSError as problem:
        raise UsageError(f"{path} cannot be read: {problem.strerror}.") from None
    except (safetensors.SafetensorError, WireError, KeyError) as problem:
        raise UsageError(f"{path} is damaged or not a version ({problem}): restore it, or remove it.") from None
    weights = bytearray(layout.size_bytes)
    for name, tensor in found:
        start = layout.offsets[name]
        weights[start : start + len(tensor["data"])] = tensor["data"]
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    return layout, weights, header.get("__metadata__", {})


def write_whole(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Write a file so that it is old or new and never half; `durable`: also after a power failure.

    Raises:
        OSError: the disk is full or not writable.
    """
    with _beside(path, durable=durable) as beside:
        beside.write_bytes(data)


@contextlib.contextmanager
def _beside(path: Path, *, durable: bool) -> Iterator[Path]:
    """A file to write beside `path`, renamed over it when it is done and, if wanted, on the disk."""
    beside = path.with_name(f".{path.name}.new")
    beside.touch()
    mode = beside.stat().st_mode  # as the user's umask has it; safetensors puts a private file in its place
    yield beside
    beside.chmod(mode)
    if durable:
        _sync(beside)
    beside.replace(path)
    if durable:
        _sync(path.parent)


def _sync(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
