"""What is happening, said when it changes: a line in the log, and soon the run's `now.json`, for `fluffle status`.

Knows what stands in that file. Does not know how it is written, nor why anything happens: reasons are handed in.
"""

import asyncio
import logging
import time
from typing import Any

from coordinator.desk import Desk
from coordinator.store import Store

log = logging.getLogger(__name__)

NOW_S = 0.2
"""How far `now.json` may lag behind an open round."""


class Now:
    """The present of one run."""

    def __init__(self, store: Store, desk: Desk) -> None:
        self._store = store
        self._desk = desk
        self._said = "", ""  # phase and why
        self._written: dict[str, Any] = {}
        self._writing: asyncio.TimerHandle | None = None

    def say(self, phase: str, why: str) -> None:
        """Say what is happening. While a round is open, how it stands may have changed even if that has not."""
        if why != self._said[1]:
            self._said = phase, why
            log.log(logging.INFO if phase != "open" else logging.DEBUG, "%s", why)
            if phase != "open":
                self._write()
        if phase == "open" and self._writing is None:  # things change faster than anyone looks
            self._writing = asyncio.get_running_loop().call_later(NOW_S, self._write)

    def _write(self) -> None:
        if self._writing:
            self._writing.cancel()
            self._writing = None
        if (now := self._picture()) != self._written:
            self._written = now
            left_s = self._desk.open.round.deadline_at - time.monotonic() if self._desk.open else None
            self._store.say_now(now | {"at": time.time(), "deadline_s": left_s})

    def _picture(self) -> dict[str, Any]:
        """All but what the clock adds."""
        (phase, why), roster, here = self._said, self._desk.roster, self._desk.open
        now = {
            "phase": phase, "why": why, "version": self._desk.version, "rounds": self._store.plan.rounds,
            "here": [*roster.trainers(), *roster.evaluators()],
            "resting": {w: {"rounds": rest.rounds, "why": rest.why} for w, rest in self._desk.rests.present.items()},
        }  # fmt: skip
        return now | here.round.picture if here else now
