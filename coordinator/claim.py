"""Who may act for a run: one coordinator at a time, on one machine or on several that share a disk.

Knows three small files of the run's folder. Does not know what is done under a claim, nor how to wait for one
(`standby.py`).

`epoch` holds a number that every coordinator raises before it does anything else. Whatever changes the run is done
within `acting`, under a lock that the next coordinator must take to raise the number: a coordinator that was stopped,
or cut off, and comes back when another has taken over finds that out before it has changed anything. Workers are told
the number in all that they are sent, and ignore a lower one than they have heard.
"""

import contextlib
import fcntl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from broker.errors import RunEnded, UsageError
from broker.files import seal, trouble, write_whole, written
from broker.messages import COUNT_MAX

EPOCH, LOCK = "epoch", ".epoch.lock"


class Claim:
    """The right to act for the run in a folder, from `begin` on, until another coordinator begins.

    Attributes:
        epoch: our number; 0 before `begin`, when nobody is asked whether we may act.
    """

    def __init__(self, folder: Path) -> None:
        self.epoch = 0
        self._folder = folder
        self._mark: tuple[int, int] | None = None

    def begin(self) -> int:
        """Raise the epoch; it is ours, and that of whoever acted before is over.

        It is as high as the seconds since 1970 at the least: what the file says may be lost, or be an older backup's,
        and workers would not listen.

        Raises:
            OSError: the folder cannot be written.
        """
        with locked(self._folder):
            self.epoch = max(read_epoch(self._folder) + 1, int(time.time()))
            write_whole(self._folder / EPOCH, str(self.epoch).encode())
            self._mark = self._looks()
        return self.epoch

    def ours(self) -> bool:
        """Whether nobody else has begun since; costs a look at one file."""
        return self.epoch == 0 or self._looks() == self._mark

    def check(self) -> None:
        """Go on only if nobody else has begun since.

        Raises:
            RunEnded: somebody has.
            UsageError: the run is gone.
        """
        if not self.ours():
            if self._looks() is None:
                raise UsageError(f"{self._folder / EPOCH} is gone: put the run back where it was, then start again.")
            raise RunEnded(f"another coordinator has taken over the run in {self._folder}: this one ends.")

    @contextlib.contextmanager
    def acting(self) -> Iterator[None]:
        """Nobody else begins meanwhile; for what takes no longer than a disk takes.

        Raises:
            RunEnded: somebody has begun before.
        """
        if self.epoch == 0:
            yield
            return
        with locked(self._folder):
            self.check()
            yield

    @property
    def tag(self) -> str:
        """Drafts of two coordinators have different names."""
        return f".{self.epoch}" if self.epoch else ""

    @contextlib.contextmanager
    def writing(self, path: Path, *, durable: bool = True, mode: int = 0o666) -> Iterator[IO[bytes]]:
        """A new file, which is the one at `path` when all is written; `durable` and `mode` as in `files.write_whole`.

        Raises:
            OSError: the disk is full or not writable.
            RunEnded: somebody has begun before.
        """
        with written(path, self.tag, mode=mode) as file:
            yield file
        self.seal(path, durable=durable)

    def seal(self, path: Path, *, durable: bool = True) -> None:
        """Let what was written beside `path` take its place; see `files.seal`.

        Raises:
            OSError: the disk is full or broken.
            RunEnded: somebody has begun before.
        """
        try:
            seal(path, durable=durable, tag=self.tag, guard=self.acting)
        except OSError:
            self.check()  # whoever has begun has removed what we had written
            raise

    def remove(self, path: Path) -> None:
        """Let there be no such file.

        Raises:
            RunEnded: somebody has begun before.
        """
        with self.acting():
            path.unlink(missing_ok=True)

    def _looks(self) -> tuple[int, int] | None:
        """What tells one epoch's file from another's: it is never written over, but replaced."""
        with contextlib.suppress(FileNotFoundError):
            seen = (self._folder / EPOCH).stat()
            return seen.st_ino, seen.st_mtime_ns
        return None


def disk(folder: Path) -> contextlib.AbstractContextManager[None]:
    """Whatever the disk refuses meanwhile becomes a UsageError."""
    return trouble(f"{folder} cannot be written", "make room or mend its permissions, then start again")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Nobody else takes over, or changes anything, meanwhile."""
    with (folder / LOCK).open("a") as file:  # no more than that: when it was changed last is a sign of life
        with contextlib.suppress(OSError):  # some network disks know no locks; the look at the file is left then
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def read_epoch(folder: Path) -> int:
    """The number of whoever acts for a run, or has acted last; 0 if nobody has, or if the file says what none is."""
    with contextlib.suppress(OSError, ValueError):
        return epoch if 0 <= (epoch := int((folder / EPOCH).read_text())) < COUNT_MAX else 0
    return 0


def beat(folder: Path) -> None:
    """Show whoever waits that somebody acts; may be lost in a crash."""
    with contextlib.suppress(OSError):
        (folder / LOCK).touch()


def last_beat(folder: Path) -> int:
    """What changes with every beat; 0 when there was none."""
    with contextlib.suppress(OSError):
        return (folder / LOCK).stat().st_mtime_ns
    return 0
