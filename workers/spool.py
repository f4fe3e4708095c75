"""Files between the broker and the training process: weights on their way in, deltas on their way out.

Knows where they lie and that the disk may be full. Does not know what is in them, nor when they are wanted.
"""

import contextlib
import mmap
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from broker.errors import LearnerFailed, UsageError
from broker.link import Delivery
from broker.messages import Task
from broker.parts import Assembly


class Spool:
    """A worker's folder of tensors. What an earlier process left there is removed.

    Raises:
        UsageError: the folder cannot be used.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            for left in [*folder.glob("*.weights"), *folder.glob("*.delta")]:
                left.unlink()
        except OSError as problem:
            raise UsageError(
                f"{folder} cannot be used for this worker's files ({problem.strerror}): choose another with --state."
            ) from None

    def expect(self, task: Task, header: Delivery) -> "Arrival":
        """Room for a task's weights.

        Raises:
            LearnerFailed: there is none.
        """
        of = task.of
        return Arrival(task, header, self.folder / f"{of.run}-{of.round}-{of.attempt}.weights")

    def clear(self, weights_file: Path) -> None:
        """Remove a job's files."""
        weights_file.unlink(missing_ok=True)
        weights_file.with_suffix(".delta").unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove the folder and all that is in it."""
        shutil.rmtree(self.folder, ignore_errors=True)


class Arrival:
    """A task whose parts are landing in its file.

    Attributes:
        task: the header.
        header: its delivery, acknowledged when the task is claimed.
        assembly: where the parts go.
    """

    def __init__(self, task: Task, header: Delivery, file: Path) -> None:
        self.task = task
        self.header = header
        self._file = file
        size_bytes = task.payload.layout.size_bytes
        try:
            with file.open("w+b") as opened:
                _reserve(opened.fileno(), size_bytes)
                self._map = mmap.mmap(opened.fileno(), size_bytes) if size_bytes else None
        except OSError as problem:
            file.unlink(missing_ok=True)
            raise LearnerFailed(
                f"this worker's disk has no room for {size_bytes} bytes of weights ({problem.strerror})."
            ) from None
        self.assembly = Assembly(task.payload, memoryview(self._map) if self._map else None)

    def finish(self) -> Path:
        """The file, whole; nothing more may land in it."""
        self._release()
        return self._file

    def drop(self) -> None:
        """Forget it, and its file."""
        self._release()
        self._file.unlink(missing_ok=True)

    def _release(self) -> None:
        self.assembly.data.release()
        if self._map:
            self._map.close()


def _reserve(number: int, size_bytes: int) -> None:
    """Room on the disk, not a sparse file: writing to a mapped one on a full disk would kill the process."""
    if hasattr(os, "posix_fallocate") and size_bytes:
        os.posix_fallocate(number, 0, size_bytes)
    else:  # macOS cannot
        os.truncate(number, size_bytes)


@contextlib.contextmanager
def read_file(file: Path) -> Iterator[memoryview]:
    """The bytes of a file, mapped, without reading it into memory."""
    with file.open("rb") as opened:
        if not os.fstat(opened.fileno()).st_size:
            yield memoryview(b"")
            return
        with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as data:
            yield data
