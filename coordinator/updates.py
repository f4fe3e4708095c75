"""Updates that are kept: `updates/000012/WORKER.update`, what version 12 was made of, where the plan wants that.

Knows these files. Does not know who counts, nor how updates add up. A file is an update's bytes as they travelled, in
the form of a version's file: safetensors, with notes of whose it is, and a checksum of its bytes.
"""

import contextlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from broker.errors import UsageError
from broker.files import FORGET_BYTES, checksum, draft_version, forgetting, in_order, read_version, sync
from broker.messages import Update
from broker.tensors import Layout
from coordinator.claim import Claim, disk

FOLDER, ENDING = "updates", ".update"


class Kept(NamedTuple):
    """A kept update, as its file says; whether the bytes match `check` has not been looked at."""

    data: memoryview
    layout: Layout
    attempt: int
    examples: int
    check: str


def folder_of(run: Path, version: int) -> Path:
    """Where the updates are of which a version was made."""
    return run / FOLDER / f"{version:06d}"


def path(run: Path, version: int, worker: str) -> Path:
    """Where a worker's update is, or would be."""
    return folder_of(run, version) / f"{worker}{ENDING}"


def keep(update: Update, data: memoryview, layout: Layout, *, run: Path, claim: Claim) -> None:
    """Write an update from where it lies; when this returns it survives a power failure.

    Raises:
        UsageError: the disk is full or not writable.
        RunEnded: another coordinator has taken over.
    """
    of, where = update.of, path(run, update.of.round, update.worker)
    about = {"fluffle_run": of.run, "worker": update.worker, "round": str(of.round), "attempt": str(of.attempt)}
    about |= {"examples": str(update.examples), "check": checksum(data)}
    pieces = (data[at : at + FORGET_BYTES] for at in range(0, len(data), FORGET_BYTES))
    with disk(where):
        if not where.parent.is_dir():
            where.parent.mkdir(mode=0o700, parents=True, exist_ok=True)  # who reads an update reads its rows
            for above in (where.parent.parent, run):
                sync(above)
        draft_version(where, layout, in_order(forgetting(pieces, data, len)), about, tag=claim.tag)
        claim.seal(where)


def read(run: Path, version: int, worker: str) -> Kept:
    """A kept update.

    Raises:
        UsageError: it is not there, is damaged, or is another's.
    """
    where = path(run, version, worker)
    layout, data, about = read_version(where)
    if (about.get("worker"), about.get("round")) != (worker, str(version)):
        raise UsageError(f"{where} is not the update of {worker} for version {version}: put the right file back.")
    try:
        return Kept(data, layout, int(about["attempt"]), int(about["examples"]), about["check"])
    except (KeyError, ValueError):
        raise UsageError(f"{where} does not say what a kept update says: restore it.") from None


def proven(run: Path, line: dict[str, Any], worker: str) -> Kept:
    """A kept update that is, to the byte, the one that a round's line has counted.

    Raises:
        UsageError: as for `read`, and when it differs from what the line says.
    """
    where, kept = path(run, line["version"], worker), read(run, line["version"], worker)
    noted = line.get("updates", {}).get(worker)
    if checksum(kept.data) != kept.check or noted not in (None, kept.check):
        raise UsageError(f"{where} is not what was counted: its bytes have changed since; restore it.")
    if (kept.attempt, kept.examples) != (line["attempt"], line["counted"][worker]["examples"]):
        raise UsageError(f"{where} is of another attempt, or tells other examples, than were counted: restore it.")
    return kept


def settle(run: Path, version: int, counted: Collection[str]) -> dict[str, str]:
    """The round is closed: keep only what it has counted. The checksum of each of these, as far as they are there."""
    for found in folder_of(run, version).glob("*"):
        if found.name.endswith((ENDING, ".new")) and found.name.removesuffix(ENDING) not in counted:
            found.unlink(missing_ok=True)
    checks = {}
    for worker in sorted(counted):
        with contextlib.suppress(UsageError):  # that it is missing will be said by whoever needs it
            checks[worker] = read(run, version, worker).check
    return checks


def sizes(run: Path) -> Iterator[int]:
    """The size of each kept update, in bytes."""
    for found in (run / FOLDER).glob(f"*/*{ENDING}"):
        with contextlib.suppress(FileNotFoundError):
            yield found.stat().st_size
