"""Finished updates that have no verdict yet, kept on the disk: a worker that died sends them again untrained.

Knows one small file for each, and where the update's bytes lie: in a slot that the spool maps.
Does not know when an update is sent, nor what becomes of it.

A killed process loses nothing of what it has written or mapped: the system has it. A power failure may; nothing is
synced here, because whatever does not match its checksum afterwards is trained again, to the same bits.
"""

import contextlib
import logging
import re
import time
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import msgpack
from xxhash import xxh3_64, xxh3_64_digest

from broker.errors import WireError
from broker.files import write_whole
from broker.messages import Attempt, Metrics, Score, Task, Update, decode, encode

log = logging.getLogger(__name__)

SUFFIX = ".update"
CHECK_BYTES = 8
PIECE_BYTES = 1024 * 1024
FILE = re.compile(r"[0-9]{1,9}\.models")
"""What files of slots are called."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where in a folder's file an update's bytes lie, and their XXH3."""

    file: str
    at: int
    size_bytes: int
    check: bytes


@dataclass(frozen=True, slots=True)
class Kept:
    """A finished update.

    Attributes:
        task: what was asked.
        update: what is said of it.
        scores: what evaluate said of the version that it was made from.
        until: when nobody will wait for it any more, in seconds since 1970.
        delta: where its bytes are.
        model: of a secure round: see `work.Done`.
    """

    task: Task
    update: Update
    scores: Metrics
    until: float
    delta: Place
    model: bytes = b""


def keep(folder: Path, kept: Kept) -> None:
    """Write it down.

    Raises:
        OSError: the disk is full or not writable.
    """
    record = {
        "task": encode(kept.task), "update": encode(kept.update), "until": kept.until,
        "score": encode(Score(kept.update.of, kept.update.worker, kept.update.version, kept.scores)),
        "delta": astuple(kept.delta), "model": kept.model,
    }  # fmt: skip
    packed: bytes = msgpack.packb(record)
    path = _path(folder, kept.update.worker, kept.update.of)
    write_whole(path, xxh3_64_digest(packed) + packed, durable=False, mode=0o600)


def forget(folder: Path, worker: str, of: Attempt) -> None:
    """It has its verdict, or nobody waits for it."""
    _path(folder, worker, of).unlink(missing_ok=True)


def all_kept(folder: Path) -> list[Kept]:
    """What an earlier process has kept here and may still be waited for; the rest is removed, and why is logged."""
    found = []
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        try:
            kept = _read(path)
            if time.time() < kept.until:
                found.append(kept)
                continue
        except (OSError, ValueError, KeyError, TypeError, WireError, msgpack.UnpackException) as problem:
            log.warning("%s is damaged (%s): what it held will be trained again", path, problem)
        with contextlib.suppress(OSError):
            path.unlink()
    return found


def _read(path: Path) -> Kept:
    data = path.read_bytes()
    if xxh3_64_digest(data[CHECK_BYTES:]) != data[:CHECK_BYTES]:
        raise ValueError("it does not match its checksum")
    record: dict[str, Any] = msgpack.unpackb(data[CHECK_BYTES:])
    task, update, score = (decode(record[name]) for name in ("task", "update", "score"))
    place, until = Place(*record["delta"]), record["until"]
    if not (isinstance(task, Task) and isinstance(update, Update) and isinstance(score, Score)):
        raise ValueError("it does not say what a kept update says")  # noqa: TRY004 (as of all that is damaged)
    if type(until) is not float or path != _path(path.parent, update.worker, update.of):
        raise ValueError("it is not what a kept update of this name says")
    if FILE.fullmatch(place.file) is None or not 0 <= place.at < place.at + place.size_bytes < 2**63:
        raise ValueError("it names a place that is none of ours")
    with (path.parent / place.file).open("rb") as file:
        file.seek(place.at)
        sum_, left = xxh3_64(), place.size_bytes
        while piece := file.read(min(left, PIECE_BYTES)):  # a model need not fit into memory for this
            sum_.update(piece)
            left -= len(piece)
        if left or sum_.digest() != place.check:
            raise ValueError("its bytes do not match their checksum")
    return Kept(task, update, score.metrics, until, place, model=record.get("model", b""))


def _path(folder: Path, worker: str, of: Attempt) -> Path:
    return folder / f"{worker}.{of.run}.{of.round}.{of.attempt}{SUFFIX}"
