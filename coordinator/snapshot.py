"""What a long round has added up so far, in one file that is whole or absent: `round.sums`.

Knows how sums lie in memory and on the disk. Does not know when they are worth writing down, nor who was asked.

It spares those who were counted from sending again what they sent before the coordinator died. It is never needed:
whoever was counted keeps an update until its version is safe. So it need not survive a power failure, and one that is
torn, damaged or another round's is said to be, and removed.
"""

import json
import logging
import mmap
import shutil
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np

from coordinator.aggregation import Sums, part_of
from coordinator.claim import Claim
from coordinator.history import Facts
from coordinator.round import Round
from coordinator.vault import framed, pieces

log = logging.getLogger(__name__)

FILE = "round.sums"
_FACTS = "trained", "scored", "others", "struck", "bytes_down", "bytes_up", "within"


class _Unwanted(Exception):
    """The sums are not to be written down any more."""


class Snapshot:
    """The one of a run.

    Args:
        folder: the run's.
        claim: whether it is ours to write.
    """

    def __init__(self, folder: Path, claim: Claim) -> None:
        self._path = folder / FILE
        self._claim = claim

    def write(self, of: list[Any], tally: dict[str, Any], sums: Sums, *, wanted: Callable[[], bool]) -> bool:
        """Write down the sums, unless they are `wanted` no longer meanwhile; whether they are there now.

        Args:
            of: tells them from those of any other round or plan.
            tally: what else is to be found again, as JSON.
            sums: nobody adds to them meanwhile.
            wanted: asked between two pieces.

        Raises:
            RunEnded: another coordinator has taken over.
        """
        try:
            if shutil.disk_usage(self._path.parent).free < 2 * (sums.low.nbytes + sums.high.nbytes):
                return False  # the room is the next version's
            with self._claim.writing(self._path, durable=False, mode=0o600) as file:
                for piece in _pieces(of, tally, sums):
                    if not wanted():
                        raise _Unwanted  # noqa: TRY301 (so that nothing is sealed)
                    file.writelines(framed(piece))
        except _Unwanted:
            return False
        except OSError as problem:
            log.warning("the sums of the open round cannot be written down (%s); it goes on all the same", problem)
            return False
        return True

    def read(self, of: list[Any], sums: Sums) -> dict[str, Any] | None:
        """Fill the sums, which are clear, with those written down for `of`; the tally, or None if there are none."""
        try:
            with self._path.open("rb") as file:
                data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            return _filled(of, sums, [*pieces(data)])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError) as problem:
            sums.clear()
            log.warning("%s is of no use (%s): whoever was counted is asked again", self._path, problem)
            self.drop()
            return None

    def drop(self) -> None:
        """Remove it: its round is over."""
        self._claim.remove(self._path)


def naming(round_: Round, plan: str) -> list[Any]:
    """What tells the sums of this round, under the plan of this digest, from any other's."""
    return [*astuple(round_.of), plan, list(round_.cohort)]


def tally_of(round_: Round, facts: Facts) -> dict[str, Any]:
    """Who was counted and who refused so far, and what is known of them, as it is now."""
    known = {name: copy(getattr(facts, name)) for name in _FACTS}
    return known | {"counted": dict(round_.counted), "refused": dict(round_.refused)}


def recall(tally: dict[str, Any], round_: Round, facts: Facts) -> None:
    """Let the round and its facts be as they were."""
    for worker, examples in tally["counted"].items():
        round_.count(worker, examples)
    for worker, reason in tally["refused"].items():
        round_.refuse(worker, reason)
    for name in _FACTS:
        setattr(facts, name, tally[name])


def _pieces(of: list[Any], tally: dict[str, Any], sums: Sums) -> Iterator[bytes | memoryview]:
    low, high, others = sorted(sums.bounds), sorted(sums.carried), sorted(sums.largest)
    head = {
        "of": of, "tally": tally, "low": [(chunk, sums.bounds[chunk]) for chunk in low], "high": high,
        "others": others,
        "sums": [sums.examples, sums.updates, sums.reach],
    }  # fmt: skip
    yield json.dumps(head, allow_nan=False).encode()
    for limb, chunks in ((sums.low, low), (sums.high, high)):
        yield from (limb[part_of(chunk)].data.cast("B") for chunk in chunks)
    yield from (sums.largest[start].tobytes() for start in others)


def _filled(of: list[Any], sums: Sums, found: list[memoryview]) -> dict[str, Any]:
    """See `Snapshot.read`.

    Raises:
        ValueError: it is damaged, or another round's; KeyError, TypeError, IndexError likewise.
    """
    head: dict[str, Any] = json.loads(bytes(found.pop(0)))
    if head["of"] != of:
        raise ValueError("it is of another round")
    for limb, chunks in ((sums.low, [chunk for chunk, _ in head["low"]]), (sums.high, head["high"])):
        for chunk in chunks:
            limb[part_of(chunk)] = np.frombuffer(found.pop(0), np.int64)
    places = {place.start: place for place in sums.layout.segments}
    for place in [places[start] for start in head["others"]]:
        sums.largest[place.start] = np.frombuffer(found.pop(0), place.dtype).copy()
    if found:
        raise ValueError("it is of another model")
    sums.bounds, sums.carried = dict(head["low"]), set(head["high"])
    sums.examples, sums.updates, sums.reach = head["sums"]
    tally: dict[str, Any] = head["tally"]
    return tally
