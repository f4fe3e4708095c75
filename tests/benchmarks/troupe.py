"""Processes to measure, and what the kernel says of them.

Knows how to start them, wait for them and end them, how to find a port for them, and how to read /proc. Does not know
what they do.
"""

import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from broker.daemon import PARENT
from broker.errors import RunEnded

STOP_S = 20.0
POLL_S = 0.01
MARK = "FLUFFLE_TROUPE"
"""Environment variable: by it we know those that ours have started, whoever their parent is by now."""
TICKS_S = os.sysconf("SC_CLK_TCK")


class Troupe:
    """The processes of one measurement, each with a log of its own; none outlives this process."""

    def __init__(self, folder: Path, env: dict[str, str]) -> None:
        self.folder = folder
        self.env = {**os.environ, **env, PARENT: str(os.getpid()), MARK: str(folder)}
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, *command: str) -> None:
        with (self.folder / f"{name}.log").open("wb") as log:
            self.running[name] = subprocess.Popen(
                command, env=self.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def words(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace").strip()

    def until(self, what: Callable[[], bool], end: float) -> None:
        """Wait until `what` is true, nobody having failed; `end` is on time.monotonic()'s clock."""
        while not what():
            for name, process in self.running.items():
                if process.poll():
                    raise RunEnded(f"{name} ended with status {process.returncode}: {self.words(name)[-300:]}")
            if time.monotonic() > end:
                last = "; ".join(f"{name}: {self.words(name)[-200:]}" for name in self.running)
                raise RunEnded(f"not done in time: {last}")
            time.sleep(POLL_S)

    def stop(self) -> None:
        """End them, and whatever they have left behind."""
        for process in self.running.values():
            process.terminate()
        until = time.monotonic() + STOP_S
        for process in self.running.values():
            try:
                process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for pid in self.left():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def left(self) -> list[int]:
        """Processes that inherited our mark and run."""
        mark, found = f"{MARK}={self.folder}".encode(), []
        for environ in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):
                if mark in environ.read_bytes().split(b"\0"):
                    found.append(int(environ.parent.name))
        return found


@contextmanager
def troupe(folder: Path, env: dict[str, str]) -> Iterator[Troupe]:
    made = Troupe(folder, env)
    try:
        yield made
    finally:
        made.stop()


def peak_bytes(pid: int) -> int:
    """The most memory that a process ever held; 0 where there is no /proc, as on macOS."""
    with suppress(OSError):
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
        return int(found[1]) * 1024 if found else 0
    return 0


def cpu_s(pid: int) -> float:
    """Seconds of processor time that a process has used so far, in all its threads."""
    with suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS_S
    return 0.0


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody listens on."""
    with ExitStack() as probes:
        sockets = [probes.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]


def listens(port: int) -> bool:
    """Whether somebody listens there."""
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def offspring(pid: int) -> list[int]:
    """All processes below one."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found[1:]
