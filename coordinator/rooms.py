"""Where an upload lands: memory that is used again and again, or for large ones a file that only looks like memory.

Knows sizes and the disk. Does not know what lands.
"""

import mmap
import tempfile
from collections.abc import Iterator
from pathlib import Path

from broker.files import FORGET_BYTES, Put, forget, forgetting, reserve, trouble
from broker.formats import Format, Run
from broker.tensors import Layout

MEMORY_BYTES_MAX = 128 * 1024 * 1024
"""Larger uploads land in a file without a name: their bytes are the system's to keep, in its cache or on the disk."""


def read_lightly(fmt: Format) -> Format:
    """The format, read so that what has been added of a large upload does not stay in our memory."""

    def runs(model: Layout, payload: memoryview) -> Iterator[Run]:
        return forgetting(fmt.runs(model, payload), payload, lambda run: run.values.nbytes)

    return fmt._replace(runs=runs)


def forgetting_put(put: Put, looked_at: memoryview) -> Put:
    """`put`, with the same care for what is looked at on the way."""
    passed = 0

    def put_lightly(start: int, piece: memoryview) -> None:
        nonlocal passed
        put(start, piece)
        passed += len(piece)
        if passed >= FORGET_BYTES:
            passed = 0
            forget(looked_at)

    return put_lightly


def copied(folder: Path, data: memoryview) -> memoryview:
    """The same bytes in a file without a name in `folder`: many uploads may be set aside at once.

    Raises:
        UsageError: the disk has no room for them.
    """
    room = _file(folder, len(data))
    room[:] = data
    forget(room)
    return room


def _file(folder: Path, size_bytes: int) -> memoryview:
    what = f"{folder} has no room for an upload of {size_bytes} bytes"
    with trouble(what, "make some"), tempfile.TemporaryFile(dir=folder) as file:
        reserve(file.fileno(), size_bytes)
        return memoryview(mmap.mmap(file.fileno(), size_bytes))


class Room:
    """Room for one upload at a time.

    Args:
        folder: where files go; they have no name there, and are gone when this process is.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._room = memoryview(b"")

    def clear(self, size_bytes: int) -> memoryview:
        """Room of exactly this size; what was in it is void.

        Raises:
            UsageError: the disk has no room for it.
        """
        if len(self._room) != size_bytes:
            self._room = memoryview(b"")  # before the new one is made: never two at once
            small = size_bytes <= MEMORY_BYTES_MAX
            self._room = memoryview(bytearray(size_bytes)) if small else _file(self._folder, size_bytes)
        return self._room
