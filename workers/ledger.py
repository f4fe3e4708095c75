"""The worker's own account: what it was asked for, what it refused, what left, what became of it. `NAME.ledger`.

Knows how a line is written so that nobody can change it later without a trace (`broker/chain.py`), and how the file
is read. Does not know when something is written (`owner.py`, `outbox.py`), nor how it is shown.

No coordinator can write here: of what it says only short texts are told, with whatever is not for the eye escaped.
Nor can it fill the disk with refusals and scores: an hour has only so many of them, and how many there were is told.
"""

import contextlib
import json
import math
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock
from typing import Any

from broker.chain import AFTER_TORN, CHAIN, Chain
from broker.errors import GaveUp, LearnerFailed, UsageError
from broker.fields import escaped
from broker.files import appending, sync, trouble
from broker.options import state_folder
from broker.pact import COHORT_MAX

SUFFIX = ".ledger"
TEXT_MAX, ENTRIES_MAX = 500, COHORT_MAX
"""Characters of a text in a line, and names in a list, which may be those of all in a sum; what is longer is cut."""

FLOOD_MAX, SCORED_MAX, FLOOD_S = 100, 1000, 3600.0
FLOODS = {"refused": FLOOD_MAX, "alarm": FLOOD_MAX, "evaluate": SCORED_MAX, "score": SCORED_MAX}
"""Of each of these events or kinds of task so many lines in FLOOD_S seconds: others cause them as often as they like.

Scores leave, so it is said before they do that further ones are only counted. Whatever is trained is written: the
policy's `rounds_a_day` is for that.
"""

Line = dict[str, Any]


class Ledger:
    """One worker's, in a folder that is its process's alone; it outlives the process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._chain, self._alone = Chain(), Lock()  # what is done in secret is noted by a thread
        self._floods: dict[str, tuple[float, int]] = {}  # event → since when, and how many
        self._named = False  # the folder has the file's name, also after a power failure

    def write(self, event: str, **facts: Any) -> None:
        """Add a line; it survives a power failure once `keep` has returned.

        Raises:
            LearnerFailed: the disk is full or not writable.
            GaveUp: the folder was moved or removed.
        """
        line = {"event": event, "at": round(time.time(), 3)} | {name: plain(fact) for name, fact in facts.items()}
        with self._alone:
            if (kind := facts.get("work", event)) in FLOODS and not self._has_room(kind, line):
                return
            with _disk(), appending(self.path, 0o600) as file:
                self._chain.append(file, line)

    def _has_room(self, kind: str, line: Line) -> bool:
        """Whether one more is written; the last before a pause says so, the next after it how many were not."""
        now, most, (since, count) = line["at"], FLOODS[kind], self._floods.get(kind, (-math.inf, 0))
        if not 0 <= now - since < FLOOD_S:  # a clock may be set back
            line |= {"unwritten": count - most} if count > most else {}
            since, count = now, 0
        self._floods[kind] = since, count + 1
        line |= {"further": f"are counted only, for {FLOOD_S:g} s"} if count == most - 1 else {}
        return count < most

    def keep(self) -> None:
        """See to it that what was written stays written. Takes as long as the disk does; call it in a thread.

        Raises:
            LearnerFailed: the disk is full or broken.
        """
        with _disk():
            sync(self.path)
            if not self._named:
                sync(self.path.parent)
                self._named = True

    def read(self) -> list[Line]:
        """All its lines in order; torn ones are passed over.

        Raises:
            LearnerFailed: they cannot be read.
        """
        with _disk("read"):
            return [*lines(self.path.read_bytes())] if self.path.exists() else []


@contextlib.contextmanager
def _disk(what: str = "written") -> Iterator[None]:
    remedy = "without it nothing leaves, so make room on its disk, or choose another folder with --state"
    with trouble(f"this worker's ledger cannot be {what}", remedy, error=LearnerFailed):
        try:
            yield
        except FileNotFoundError as gone:
            raise GaveUp(
                f"{gone.filename} is gone, with its folder: a worker that is started anew makes both."
            ) from None


def lines(data: bytes) -> Iterator[Line]:
    """The lines in a ledger's bytes, whoever has written them."""
    for raw in data.split(b"\n"):
        with contextlib.suppress(ValueError, RecursionError):
            line = json.loads(raw)
            if isinstance(line, dict) and isinstance(line.get("event"), str):
                yield line


def find(folder: Path | None, worker: str) -> Path:
    """Where a worker's ledger is: in `folder`, or where it is if nothing else was said when the worker was started.

    Raises:
        UsageError: nowhere.
    """
    # one of many has its number behind the name of them all
    homes = [folder] if folder else [state_folder("workers", each) for each in (worker, worker.rpartition("-")[0])]
    paths = [home / f"{worker}{SUFFIX}" for home in homes]
    for path in paths:
        if path.is_file():
            return path
    raise UsageError(f"there is no ledger {paths[0]}: name the worker with --name, and its folder with --state.")


def moment(line: Line) -> datetime | None:
    """When a line was written, in local time; None if somebody else has written it, and what is no time."""
    with contextlib.suppress(KeyError, TypeError, ValueError, OverflowError, OSError):
        return datetime.fromtimestamp(line["at"], UTC).astimezone()
    return None


def told(line: Line) -> tuple[str, ...]:
    """A line for people: when, what, run, round, who asked, and what else it says."""
    when, left = moment(line), plain(line)
    first = [str(left.pop(name, "")) for name in ("event", "run", "round", "asked_by")]
    rest = (
        f"{name} {', '.join(map(str, fact)) if isinstance(fact, list) else fact}"
        for name, fact in left.items()
        if name not in ("at", CHAIN, AFTER_TORN)
    )
    return f"{when:%Y-%m-%d %H:%M:%S}" if when else "?", *first, "; ".join(rest)


def plain(fact: Any) -> Any:
    """A fact as it may stand in a line: bounded, and nothing in it that a terminal would obey."""
    if isinstance(fact, str):
        return escaped(fact[:TEXT_MAX])[:TEXT_MAX]
    if isinstance(fact, Mapping):
        return {plain(name): plain(value) for name, value in [*fact.items()][:ENTRIES_MAX]}
    if isinstance(fact, list | tuple):
        return [plain(each) for each in fact[:ENTRIES_MAX]]
    return str(fact) if isinstance(fact, float) and not math.isfinite(fact) else fact
