"""A version made again from the updates that were kept, to see whether it has the same bits.

Knows in what order a round puts versions together, as `service.py` does it. Does not change the run: what it makes
lies in files of its own, gone when it ends.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from broker.changes import encode_change
from broker.errors import UsageError, WireError
from broker.files import Put, checksum, draft_version, read_version
from broker.formats import FORMATS, format_of
from broker.pieces import CHUNK_ITEMS
from broker.tensors import FLOATS, ITEM_BYTES, Layout, as_float64, view
from coordinator import history, updates
from coordinator.aggregation import Sums
from coordinator.rooms import forgetting_put, read_lightly
from coordinator.rules import RULES
from coordinator.store import Store


class Outcome(NamedTuple):
    """What came of it: from how many updates, and in what the version differs; nothing when the bits agree."""

    updates: int
    differences: list[str]


def replay(store: Store, version: int, start: int) -> Outcome:
    """Make version `version` again, from version `start` and all updates that were counted since.

    Raises:
        UsageError: there is no such version, or something that it was made of is missing or damaged.
    """
    if not 0 <= start < version:
        raise UsageError(f"version {version} cannot be made from version {start}: name an earlier one that is kept.")
    lines = history.rounds(store.history())
    missing = next((number for number in range(start + 1, version + 1) if number not in lines), None)
    if missing:
        raise UsageError(f"the history of {store.folder} has no round that made version {missing}.")
    layout, weights = store.load(start)
    fmt = read_lightly(format_of(store.plan.format, keep=store.plan.kept))
    sums = RULES[store.plan.rule].init(layout, fmt, trim=store.plan.trims)
    count = 0
    with tempfile.TemporaryDirectory(prefix="fluffle-replay-") as folder:
        for number in range(start + 1, version + 1):
            count += len(lines[number]["counted"])
            try:
                weights = _made(store, lines[number], sums, (weights, Path(folder)))
            except WireError as problem:
                raise UsageError(f"the updates of version {number} do not add up: {problem}") from None
        return Outcome(count, list(_differences(store, version, layout, weights)))


def _counted(store: Store, line: dict[str, Any]) -> list[str]:
    """Who was counted in a round, in the cohort's order; their updates are there."""
    number, run = line["version"], store.folder
    missing = [worker for worker in line["counted"] if not updates.path(run, number, worker).is_file()]
    if missing or not line["counted"]:
        whose = ", ".join(sorted(missing)) or "its workers"
        raise UsageError(
            f"version {number} cannot be made again: the updates of {whose} are not in "
            f"{updates.folder_of(run, number)}. A run keeps them if its coordinator is begun with --keep-updates."
        )
    return [worker for worker in line["cohort"] if isinstance(worker, str) and worker in line["counted"]]


def _made(store: Store, line: dict[str, Any], sums: Sums, at: tuple[memoryview, Path]) -> memoryview:
    """The version that a round makes of its updates, turn by turn; see `service.Coordinator`."""
    (weights, folder), plan, number = at, store.plan, int(line["version"])
    before, rule, counted = weights, RULES[plan.rule], _counted(store, line)
    for turn in [counted] if plan.schedule == "parallel" else [[worker] for worker in counted]:
        sums.clear()
        for worker in turn:  # one file at a time: there may be thousands
            kept = updates.proven(store.folder, line, worker)
            if differs := sums.fmt.layout(sums.layout).difference(kept.layout):
                where = updates.path(store.folder, number, worker)
                raise UsageError(f"{where} has other tensors than this run: {differs}.")
            rule.add(sums, kept.examples, kept.data)
        began = weights

        def fill(put: Put, began: memoryview = began) -> None:
            rule.finish(sums, began, forgetting_put(put, began))

        weights = draft_version(folder / "version", sums.layout, fill, {})
    if plan.down != "full":
        dice = np.random.default_rng([plan.seed, number])
        encode_change(before, weights, sums.layout, FORMATS[plan.down], dice)
    return weights


def _differences(store: Store, version: int, layout: Layout, made: memoryview) -> Iterator[str]:
    """In what the version that lies in the run differs from the one that was made again, tensor by tensor."""
    noted, path = history.checksum_of(history.rounds(store.history()), version), store.path(version)
    as_noted = noted == checksum(made)
    try:
        theirs, weights, _ = read_version(path)
        said = layout.difference(theirs)
    except UsageError as problem:
        said = str(problem).rstrip(".")
    if said:
        yield f"{path}: {said}"
    else:
        for spec in layout.specs:
            part = slice(layout.offsets[spec.name], layout.offsets[spec.name] + spec.size_bytes)
            count, most = _apart(made[part], weights[part], spec.dtype)
            if count:
                yield f"{spec.name}: {count} of {spec.items} numbers, by at most {most:.6g}"
    if not as_noted and noted:
        yield "what was made again is not what the history speaks of, either"


def _apart(ours: memoryview, theirs: memoryview, dtype: str) -> tuple[int, float]:
    """How many items differ in a bit, and the largest difference of two."""
    count, most, step = 0, 0.0, CHUNK_ITEMS * ITEM_BYTES[dtype]
    for at in range(0, len(ours), step):
        a, b = view(ours[at : at + step], dtype), view(theirs[at : at + step], dtype)
        raw = f"u{ITEM_BYTES[dtype]}"
        differ = a.view(raw) != b.view(raw)
        if not differ.any():
            continue
        count += int(differ.sum())
        x, y = (as_float64(v[differ], dtype) if dtype in FLOATS else v[differ].astype(np.float64) for v in (a, b))
        with np.errstate(invalid="ignore", over="ignore"):
            most = max(most, float(np.abs(x - y).max()))
    return count, most
