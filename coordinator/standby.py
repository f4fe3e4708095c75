"""Waiting for one's turn to act for a run: at once if nobody does, else when the one who does is gone.

Knows how it shows that a coordinator is gone: the system gives back the lock of a process that has ended, and whoever
was stopped, or whose machine was lost, shows no sign of life. Does not know what a coordinator does; that two never
act at the same time, whatever shows, is `claim.py`'s work.
"""

import contextlib
import fcntl
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from broker.daemon import StoppedEarly
from broker.errors import UsageError
from coordinator.claim import last_beat

log = logging.getLogger(__name__)

LOCK = ".lock"
BEAT_S = 2.0
"""How often whoever acts gives a sign of life."""
STALE_S = 10.0
"""After so long without one, on the clock of whoever waits, it is taken for gone."""
LOOK_S = 0.25


@contextlib.contextmanager
def turn(folder: Path) -> Iterator[bool]:
    """Our turn, as soon as it comes; whether the one before may be there still, stopped or cut off.

    Raises:
        UsageError: the folder cannot be written.
        StoppedEarly: Ctrl-C came before it.
    """
    try:
        file = (folder / LOCK).open("w")
    except OSError as problem:
        raise UsageError(
            f"{folder} cannot be written ({problem.strerror}): make room or mend its permissions, then start again."
        ) from None
    with file:
        try:
            forced = not _waited(file, folder)
        except KeyboardInterrupt:
            raise StoppedEarly("stopped while another coordinator was at work.") from None
        yield forced


def _waited(file: IO[str], folder: Path) -> bool:
    """True when the lock is ours; False when it is held by somebody who gives no sign of life."""
    beat, since = last_beat(folder), time.monotonic()
    told = False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as problem:
            if not isinstance(problem, BlockingIOError) and not beat:
                return True  # the disk knows no locks, and nobody was ever here
        else:
            return True
        if not told:
            log.info("another coordinator is at work on %s: standing by until it is gone", folder)
            told = True
        now = time.monotonic()
        if (seen := last_beat(folder)) != beat:
            beat, since = seen, now
        if now - since > STALE_S:
            log.warning("no sign of life of the coordinator of %s for %.0f s: taking over", folder, now - since)
            return False
        time.sleep(LOOK_S)
