"""A guard that one test leaves for the next: to start another, which loads torch, takes seconds.

Between two tests it has nothing to guard. How guards begin and end is for tests that have one of their own.
"""

import asyncio
import socket
import subprocess

from workers.guarded import Guard

_KEPT: dict[int, "KeptGuard"] = {}


class KeptGuard(Guard):
    def __init__(self, memory_bytes: int) -> None:
        super().__init__(1, memory_bytes)
        self._control, theirs = socket.socketpair()
        with theirs:
            words, how = self._program(theirs)
            self._kept = subprocess.Popen(words, **how)

    async def leave(self) -> None:
        """Not yet; but what a trainer has closed is closed in one of the loop's next turns."""
        await asyncio.sleep(0.01)

    def end(self) -> None:
        if self._control is not None:
            self._control.close()
        self._kept.wait(20)


def kept_guard(memory_mb: int | None = None) -> KeptGuard:
    memory_bytes = (memory_mb or 0) * 1_000_000
    if memory_bytes not in _KEPT:
        _KEPT[memory_bytes] = KeptGuard(memory_bytes)
    return _KEPT[memory_bytes]


def end_all() -> None:
    while _KEPT:
        _KEPT.popitem()[1].end()
