"""What must not be forgotten of the rounds in the making, in one small file that is whole or absent: `round.json`.

Knows that file, and which attempts have been used. Does not know how a round goes, nor when it is asked.

Two tries are kept as a rule: the open one, and the one before, whose version may not be on the disk yet. Should that
version be lost, its round is made again by the same attempt, or by others, and the open one, which was asked for
something that never came to be, by another in any case: it is kept, too, until its round comes.
"""

import json
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from xxhash import xxh3_64_hexdigest

from broker.wording import Name

log = logging.getLogger(__name__)

FILE = "round.json"


@dataclass(frozen=True, slots=True)
class Try:
    """A try at a round.

    Attributes:
        round: which version it is to make.
        attempt: its number; no two tries at a round have the same.
        plan: a digest of the plan's settings that decide what updates are made of.
        cohort: who was asked, in order; empty when the try is over without a version.
        until: when its (first) turn stops waiting, in seconds since 1970.
        serial: the last secure sum that was begun in it.
        released: in that sum something was revealed, so there must be no other.
        line: the history's, once the version has been made of what was counted.
    """

    round: int
    attempt: int
    plan: str
    cohort: tuple[Name, ...]
    until: float
    line: dict[str, Any] | None = None
    serial: int = 1
    released: bool = False


_TRIES = TypeAdapter(list[Try])


class Journal:
    """A run's, as it was when the last coordinator wrote it.

    Args:
        folder: the run's.
        write: writes a file that is whole or absent, and survives a power failure.
    """

    def __init__(self, folder: Path, write: Callable[[Path, bytes], None]) -> None:
        self._path = folder / FILE
        self._write = write
        self._first = 1
        self._written = True
        self.tries: list[Try] = []
        try:
            self.tries = _read(self._path)
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as problem:
            log.warning("%s is damaged (%r): a round that was open is begun anew", self._path, problem)
            # whatever has been used is lower: nothing that comes late is taken for new
            self._first = int(time.time())

    def resume(self, number: int, plan: str, *, lost: Try | None = None) -> Try | None:
        """The try at a round that was open, if it was asked for what this plan would ask for.

        `lost` is that try, where it is found elsewhere and not here any more.
        """
        if lost and not self._at(number):
            self.tries.append(lost)
            self._save()
        found = self._at(number)
        if found and found.cohort and found.plan != plan:
            log.warning("round %d was begun under other settings, or for another run: it is begun anew", number)
        return found if found and found.cohort and found.plan == plan else None

    def begin(self, number: int, plan: str, cohort: tuple[str, ...], until: float) -> int:
        """A new try at a round; its attempt."""
        last = self._at(number)
        attempt = last.attempt + 1 if last else self._first
        self._void_after(number)
        self.tries = [each for each in self.tries if each.round >= number - 1 and each is not last]
        self.tries.append(Try(number, attempt, plan, cohort, until))
        self._save()
        return attempt

    def made(self, line: dict[str, Any]) -> None:
        """The try at the line's round has made its version; `flush` before that is safe, or begin the next one."""
        self._void_after(line["round"])
        self._change(line["round"], at_once=False, line=line)

    def next_sum(self, number: int) -> tuple[int, bool]:
        """Another secure sum begins in a try at a round: its serial, unless the one before it was released."""
        found = self._at(number)
        assert found
        if not found.released:
            self._change(number, serial=found.serial + 1)
            return found.serial + 1, False
        return found.serial, True

    def release(self, number: int) -> None:
        """From now on something may be revealed in the present secure sum of a round."""
        self._change(number, released=True)

    def abandon(self, number: int) -> None:
        """The try at a round is over without a version."""
        self._change(number, cohort=())

    def flush(self) -> None:
        """See to it that all this is on the disk."""
        if not self._written:
            self._save()

    def lines(self) -> list[dict[str, Any]]:
        """Lines of versions that may have been saved without having been noted."""
        return [each.line for each in self.tries if each.line]

    def _at(self, number: int) -> Try | None:
        return next((each for each in self.tries if each.round == number), None)

    def _void_after(self, number: int) -> None:
        """A round's version is still to come: tries at later rounds were asked for one that never came to be."""
        self.tries = [replace(each, cohort=(), line=None) if each.round > number else each for each in self.tries]

    def _change(self, number: int, *, at_once: bool = True, **changes: Any) -> None:
        self.tries = [replace(each, **changes) if each.round == number else each for each in self.tries]
        self._written = False
        if at_once:
            self._save()

    def _save(self) -> None:
        tries = [asdict(each) for each in self.tries]
        self._write(self._path, json.dumps({"check": _digest(tries), "tries": tries}).encode())
        self._written = True


def _read(path: Path) -> list[Try]:
    found = json.loads(path.read_bytes())
    if found["check"] != _digest(found["tries"]):
        raise ValueError("it does not match its checksum")
    tries = _TRIES.validate_python(found["tries"])
    if not all(isinstance(line["version"], int) for line in (each.line for each in tries) if line):
        raise ValueError("it does not say what a journal says")
    return tries


def _digest(tries: list[dict[str, Any]]) -> str:
    return xxh3_64_hexdigest(json.dumps(tries, sort_keys=True).encode())
