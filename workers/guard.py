"""The guard of the training process: `python -m workers.guard SOCKET MEMORY`, started by `training.py` alone.

It stands between the daemon and the training process, which it forks whenever the daemon asks: it has loaded torch
and nothing of the user's, so that a new one is there in milliseconds. Knows how that process ended, kills whatever
the learner has started when it ends or the daemon does, and lets only so much of what it prints into the log. Never
runs the user's code, and does not know what daemon and training process say to each other.

Whatever the daemon writes ends the training process that there is; if a socket comes with it, another one begins.
Into that socket the guard says the process id first, and last how the process ended: nothing is left of it then.
"""

import ctypes
import faulthandler
import gc
import os
import resource
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from broker.daemon import die_with
from workers.work import MEANT_FOR_DAEMON, Ended, bytes_of

PR_SET_CHILD_SUBREAPER = 36
LOG_BYTES, LOG_S = 64 * 1024, 60.0
"""At most so many bytes of what a learner prints reach the log in so many seconds."""
FIRST_TO_GO = "1000"  # of -1000 to 1000: whom the kernel kills when there is no memory left
FORKS = sys.platform == "linux"  # elsewhere the system's own libraries do not bear it: a fresh interpreter, then


def main() -> None:
    """Serve the daemon until it closes the socket, or is gone."""
    control = socket.socket(fileno=int(sys.argv[1]))
    control.set_inheritable(False)
    if FORKS:
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)  # what the learner's processes leave behind becomes ours
        import torch  # noqa: PLC0415 (not where it would be loaded for nothing)

        from workers import child  # noqa: F401, PLC0415 (as above)

        torch.optim.SGD([torch.zeros(1)], lr=0.1)  # loads what takes most learners' first task another second
        gc.collect()
        gc.freeze()  # the collector would write to, and so copy, the pages that are shared
    for number in MEANT_FOR_DAEMON:
        signal.signal(number, signal.SIG_IGN)
    Guard(control, int(sys.argv[2])).serve()


class Guard:
    """One training process at a time, of `memory_bytes` at most unless that is 0."""

    def __init__(self, control: socket.socket, memory_bytes: int) -> None:
        self._control = control
        self._memory_bytes = memory_bytes
        self._next: int | None = None
        self._leaving = False
        self._woken, self._wakes = socket.socketpair()
        self._woken.setblocking(False)
        self._wakes.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._wakes.fileno(), warn_on_full_buffer=False)

    def serve(self) -> None:
        """Keep one training process after another."""
        while not self._leaving:
            self._read_order(None)
            while self._next is not None:
                link, self._next = self._next, None
                self._keep(link)
                os.close(link)

    def _read_order(self, pid: int | None) -> None:
        """Wait for what the daemon wants; each order means the end of the training process that there is."""
        try:
            word, links, _, _ = socket.recv_fds(self._control, 1, 1)
        except ConnectionError:
            word, links = b"", []
        for link in links:
            os.set_inheritable(link, False)
            self._next = link
        self._leaving = not word
        if pid is not None:
            os.kill(pid, signal.SIGKILL)

    def _keep(self, link: int) -> None:
        """Fork a training process, and see to it until nothing is left of it."""
        printed, prints = os.pipe()
        kills = _kills_for_memory()
        me, pid = os.getpid(), os.fork()
        if pid == 0:
            self._be_child(link, prints, parent=me)
        os.close(prints)
        _say(link, {"pid": pid})
        log, status = _Log(printed), None
        watched = select.poll()
        for fd in (self._control.fileno(), self._woken.fileno(), printed):
            watched.register(fd, select.POLLIN)
        while status is None:
            for fd, _ in watched.poll():
                if fd == printed:
                    if not log.pass_on():
                        watched.unregister(fd)  # the learner has closed it
                elif fd == self._woken.fileno():
                    self._woken.recv(4096)
                    status = _reaped(pid)
                elif not self._leaving:
                    self._read_order(pid)
                    if self._leaving:
                        watched.unregister(fd)
        _end_what_is_left(pid)
        os.set_blocking(printed, False)
        log.finish()
        memory = status == -signal.SIGKILL and _kills_for_memory() > kills
        _say(link, {"ended": status, "memory": memory})

    def _be_child(self, link: int, prints: int, *, parent: int) -> None:
        """Become the training process."""
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.setsid()
            die_with(parent)
            for ours in (self._control, self._woken, self._wakes):
                ours.close()
            for fd in (1, 2):
                os.dup2(prints, fd)
            with suppress(OSError):
                Path("/proc/self/oom_score_adj").write_text(FIRST_TO_GO)
            if self._memory_bytes:
                resource.setrlimit(resource.RLIMIT_DATA, (self._memory_bytes, self._memory_bytes))
            if FORKS:
                from workers import child  # noqa: PLC0415 (loaded already)

                faulthandler.enable()
                child.serve(socket.socket(fileno=link))
            else:
                os.set_inheritable(link, True)
                os.execv(sys.executable, [sys.executable, "-P", "-m", "workers.child", str(link)])  # noqa: S606 (no shell is wanted)
        except BaseException:  # noqa: BLE001 (whatever it is, this process must never go on as another guard)
            traceback.print_exc()
        finally:
            os._exit(1)


class _Log:
    """What the training process prints, bounded."""

    def __init__(self, printed: int) -> None:
        self._printed = printed
        self._since, self._room, self._left_out = time.monotonic(), LOG_BYTES, 0

    def pass_on(self) -> bool:
        """Hand on what there is; False when there will be no more."""
        data = os.read(self._printed, LOG_BYTES)
        if time.monotonic() > self._since + LOG_S:
            self._tell()
            self._since, self._room = time.monotonic(), LOG_BYTES
        shown, self._room = data[: self._room], max(self._room - len(data), 0)
        self._left_out += len(data) - len(shown)
        _write(shown)
        return bool(data)

    def finish(self) -> None:
        """Hand on what is left; nobody prints any more."""
        with suppress(BlockingIOError):
            while self.pass_on():
                pass
        self._tell()
        os.close(self._printed)

    def _tell(self) -> None:
        if self._left_out:
            _write(f"\n… the learner has printed {self._left_out:,} bytes more.\n".encode())
            self._left_out = 0


def _write(data: bytes) -> None:
    with suppress(OSError):  # nobody reads the log
        while data:
            data = data[os.write(2, data) :]


def _say(link: int, what: Ended) -> None:
    with suppress(OSError), socket.socket(fileno=os.dup(link)) as line:  # the daemon may have hung up
        line.sendall(bytes_of(what))


def _reaped(pid: int) -> int | None:
    """The exit status of a process, if it has ended; others that were left to us are seen off with it."""
    status = None
    with suppress(ChildProcessError):
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            if found[0] == pid:
                status = os.waitstatus_to_exitcode(found[1])
    return status


def _end_what_is_left(pid: int) -> None:
    """Kill what the training process has started, and what that has: all of it becomes our child in the end."""
    if not FORKS:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
    spared = set[int]()
    while left := [each for each in _children() if each not in spared]:
        for each in left:
            try:
                os.kill(each, signal.SIGKILL)
                os.waitpid(each, 0)
            except PermissionError:  # a program that has become another user
                spared.add(each)


def _children() -> Iterator[int]:
    """Our children: not every kernel has a list of them."""
    me = str(os.getpid())
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended meanwhile
            if file.read_text(errors="replace").rpartition(")")[2].split()[1] == me:
                yield int(file.parent.name)


def _kills_for_memory() -> int:
    """How often the kernel has killed for want of memory."""
    with suppress(OSError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


if __name__ == "__main__":
    main()
