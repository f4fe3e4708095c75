"""Whether a run is still what was written: its plan, its history line by line, every version, every kept update.

Knows what must be in a run's folder, and what follows from what. Does not change anything, nor compute a version anew
(`replay.py`).
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from broker import chain
from broker.chain import Finding
from broker.errors import UsageError
from broker.files import checksum, read_version
from broker.tensors import Layout
from coordinator import history, updates
from coordinator import plan as plans
from coordinator.store import HISTORY, VERSIONS, Store

VERSION = re.compile(r"(\d{6,})\.safetensors")
DRAFT = re.compile(r"\..+\.new")
"""What is being written, or was when a coordinator died."""


def verify(folder: Path, *, remembered: str = "") -> tuple[list[Finding], str]:
    """What is to be said of a run, and one sentence on how far it goes.

    Args:
        folder: the run's.
        remembered: a chain that was printed before; it must still be in the history.

    Raises:
        UsageError: it is no run.
    """
    try:
        store = Store.open(folder)
    except UsageError as problem:
        if not (folder / plans.FILE).is_file():
            raise
        return [Finding(str(problem))], "nothing else has been looked at"
    data = (folder / HISTORY).read_bytes() if (folder / HISTORY).exists() else b""
    findings, last = chain.check(data, remembered=remembered)
    rounds = history.rounds(store.history())
    findings += _versions(store, rounds)
    findings += _kept(store, rounds)
    return findings, f"version {store.latest()} is the latest; the chain ends in {last or 'nothing'}"


def _versions(store: Store, rounds: dict[int, dict[str, Any]]) -> Iterator[Finding]:
    """What is wrong with the versions: one is missing, differs from its line, has none, or is none."""
    there: set[int] = set()
    for path in sorted((store.folder / VERSIONS).iterdir()):
        named = VERSION.fullmatch(path.name)
        if named and path == store.path(int(named[1])):
            there.add(int(named[1]))
        elif not DRAFT.fullmatch(path.name):
            yield Finding(f"{path} is not one of this run's versions: move it elsewhere.")
    first = min(there, default=0)
    if first:
        yield Finding(f"the versions before {first} are not kept: nothing can be said of them.", bad=False)
    layout: Layout | None = None
    for number in sorted({*range(first, max(there, default=-1) + 1), *(n for n in rounds if n > first)}):
        path = store.path(number)
        if number not in there:
            yield Finding(f"{path} is missing: restore it.")
            continue
        try:
            found, weights, about = read_version(path)
        except UsageError as problem:
            yield Finding(str(problem))
            continue
        layout = layout or found
        if said := _unlike(store, number, about) or layout.difference(found):
            yield Finding(f"{path} is not version {number} of this run: {said}.")
        yield from _noted(path, number, history.checksum_of(rounds, number), weights)


def _noted(path: Path, number: int, noted: str | None, weights: memoryview) -> Iterator[Finding]:
    """In what a version contradicts the history; a run that has made no version has no line for version 0 yet."""
    if noted and checksum(weights) != noted:
        yield Finding(f"{path} is not what the history speaks of: its bytes have changed. Restore it.")
    elif number and not noted:
        yield Finding(f"{path} has no line in the history; if its coordinator was stopped there, it will add one.")


def _unlike(store: Store, number: int, about: dict[str, str]) -> str:
    """In what a file's notes contradict where it lies; whoever puts a version 0 of their own there writes none."""
    wanted = {"fluffle_run": store.plan.run, "fluffle_version": str(number), "learner": store.plan.learner}
    return "; ".join(
        f"its {key} is {about[key]}, not {value}" for key, value in wanted.items() if about.get(key, value) != value
    )


def _kept(store: Store, rounds: dict[int, dict[str, Any]]) -> Iterator[Finding]:
    """What is wrong with the updates that the plan keeps; whole versions' may have been removed, to make room."""
    gone = []
    for number, line in sorted(rounds.items()) if store.plan.keep_updates else ():
        names = {path.name for path in updates.folder_of(store.folder, number).glob("*")}
        if not names:
            gone.append(str(number))
            continue
        for worker in sorted(line["counted"]):
            try:
                updates.proven(store.folder, line, worker)
            except UsageError as problem:
                yield Finding(str(problem))
        for name in sorted(names - {f"{worker}{updates.ENDING}" for worker in line["counted"]}):
            if not DRAFT.fullmatch(name):
                yield Finding(f"{updates.folder_of(store.folder, number) / name} was not counted: move it elsewhere.")
    if gone:
        yield Finding(f"the updates of version {', '.join(gone)} are not kept any more.", bad=False)
