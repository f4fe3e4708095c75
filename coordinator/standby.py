"""Waiting for one's turn to act for a run: at once if nobody does, else when the one who does is gone.

Knows how it shows that a coordinator is gone: the system gives back the lock of a process that has ended, and whoever
was stopped, or whose machine was lost, shows no sign of life. Does not know what a coordinator does; that two never
act at the same time, whatever shows, is `claim.py`'s work.
"""

import contextlib
import fcntl
import json
import logging
import os
import platform
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from broker.daemon import StoppedEarly
from broker.files import write_whole
from coordinator.claim import beat, disk, last_beat, locked

log = logging.getLogger(__name__)

LOCK, WAITS = ".lock", "standby.json"
BEAT_S = 2.0
"""How often whoever acts gives a sign of life."""
STALE_S = 10.0
"""After so long without one, on the clock of whoever waits, it is taken for gone."""
LOOK_S = 0.25


@contextlib.contextmanager
def turn(folder: Path) -> Iterator[bool]:
    """Our turn, as soon as it comes; whether the one before may be there still, stopped or cut off.

    While it lasts those who stand by are shown that we are here, whatever takes long: to load a model, to write one.

    Raises:
        UsageError: the folder cannot be written.
        StoppedEarly: Ctrl-C came before it.
    """
    try:
        with disk(folder):
            file, forced = _waited(folder)
    except KeyboardInterrupt:
        raise StoppedEarly("stopped while another coordinator was at work.") from None
    with file, _beating(file, folder):
        yield forced


@contextlib.contextmanager
def _beating(file: IO[str], folder: Path) -> Iterator[None]:
    """Give signs of life, until another lock is in the place of ours: then another gives them."""
    over = threading.Event()

    def give() -> None:
        while _is_in_force(file, folder):
            beat(folder)
            if over.wait(BEAT_S):
                return

    thread = threading.Thread(target=give, name="beats", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def waiting(folder: Path) -> dict[str, Any] | None:
    """Who stands by for a run: its `process` on its `machine`; None when nobody has said so lately."""
    try:
        found: dict[str, Any] = json.loads((folder / WAITS).read_bytes())
        return found if abs(time.time() - found["at"]) < STALE_S else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _waited(folder: Path) -> tuple[IO[str], bool]:
    """The lock, which is ours now, and whether we took it from somebody who gives no sign of life."""
    file = (folder / LOCK).open("a")
    seen, since = last_beat(folder), time.monotonic()
    said_at = float("-inf")
    try:
        while True:
            if _taken(file, seen):
                if _is_in_force(file, folder):
                    return file, False
                file.close()  # somebody has put another in its place meanwhile
                file = (folder / LOCK).open("a")
                continue
            if said_at < 0:
                log.info("another coordinator is at work on %s: standing by until it is gone", folder)
            now = time.monotonic()
            if now - said_at > BEAT_S:
                said_at = now
                waits = {"process": os.getpid(), "machine": platform.node(), "at": time.time()}
                with contextlib.suppress(OSError):  # another that stands by may be at it; it is for people alone
                    write_whole(folder / WAITS, json.dumps(waits).encode(), durable=False)
            if (now_seen := last_beat(folder)) != seen:
                seen, since = now_seen, now
            if now - since > STALE_S and (taken := _wrested(folder, seen)):
                log.warning("no sign of life of the coordinator of %s for %.0f s: taking over", folder, now - since)
                file.close()
                return taken, True
            time.sleep(LOOK_S)
    except BaseException:
        file.close()
        raise
    finally:
        if said_at >= 0:
            (folder / WAITS).unlink(missing_ok=True)


def _taken(file: IO[str], seen: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as problem:
        return not isinstance(problem, BlockingIOError) and not seen  # a disk without locks, and nobody was ever here
    return True


def _is_in_force(file: IO[str], folder: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), (folder / LOCK).stat())
    return False


def _wrested(folder: Path, seen: int) -> IO[str] | None:
    """A lock of ours in the place of the one that is held; None if somebody has given a sign of life after all.

    Whoever held that one holds nothing any more, and those who wait for it find that out: they wait for us.
    """
    with locked(folder):
        if last_beat(folder) != seen:
            return None
        beside = folder / f"{LOCK}.new"
        file = beside.open("w")
        with contextlib.suppress(OSError):  # see `_taken`
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        beside.replace(folder / LOCK)
        beat(folder)
    return file
