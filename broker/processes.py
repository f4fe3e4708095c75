"""Programs that are ended for certain, and nothing else with them.

Knows how to start a program that leads a session of its own (a Ctrl-C in the terminal does not reach it), how to
tell later, from any process, whether it still runs, and how to end it. Does not know what the programs are for.

Process ids are used again by other programs, so an id alone is never trusted: each program holds a lock on the file
in which its id is written, and the kernel lets go of that lock when the program, with all its children, is gone.
"""

import contextlib
import fcntl
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from broker.errors import UsageError

STOP_S = 15.0
"""How long a program may take to end by itself once it is asked to."""


@contextlib.contextmanager
def take(lock: Path) -> Iterator[int]:
    """Hold a lock: an open file, which shares the lock with every process that inherits it.

    Raises:
        UsageError: another process holds it.
    """
    held = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        if not locked(held, within_s=1):  # someone who merely asks, in `holder`, has it for an instant
            raise UsageError(f"{lock.stem} already runs in {lock.parent}: stop it, or choose another folder")
        os.ftruncate(held, 0)
        yield held
    finally:
        os.close(held)


def locked(held: int, *, within_s: float) -> bool:
    """Whether an open file's lock could be had in time."""
    until = time.monotonic() + within_s
    while True:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        if time.monotonic() > until:
            return False
        time.sleep(0.02)


def holder(lock: Path) -> int | None:
    """The id of the process, and of its group, that holds a lock; None when nobody does."""
    try:
        with lock.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return int(file.read() or 0) or None
            return None
    except FileNotFoundError:
        return None
    except PermissionError as error:
        raise UsageError(f"{lock.parent} belongs to another user: choose another folder") from error


def begin(
    command: list[str], *, env: dict[str, str], log: Path, cwd: Path | None = None, keeps: tuple[int, ...] = ()
) -> subprocess.Popen[bytes]:
    """Start a program that leads a session, and writes into `log`; the files it `keeps` stay open in it."""
    with log.open("ab") as out:
        return subprocess.Popen(
            command,
            env=env,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            pass_fds=keeps,
            start_new_session=True,
        )


def spawn(held: int, command: list[str], *, env: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    """Start a program that leads a session, and that keeps the lock `held` while it, or a child of it, lives."""
    process = begin(command, env=env, log=log, cwd=log.parent, keeps=(held,))
    os.write(held, str(process.pid).encode())
    return process


def end(lock: Path, grace_s: float) -> bool:
    """Ask the holder of a lock to end, and after `grace_s` make its whole group end; whether there was one."""
    pid = holder(lock)
    if pid is None:
        return False
    for send, what, bound_s in ((os.kill, signal.SIGTERM, grace_s), (os.killpg, signal.SIGKILL, STOP_S)):
        with contextlib.suppress(ProcessLookupError):
            send(pid, what)
        until = time.monotonic() + bound_s
        while holder(lock) is not None and time.monotonic() < until:
            time.sleep(0.02)
    return True
