"""A run's folder: plan.toml, versions/NNNNNN.safetensors, history.jsonl, and what an open round must not forget.

Knows files: every one is whole or absent, whatever dies when. Does not know rounds' rules, workers or the wire.
"""

import contextlib
import json
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from broker.chain import Chain, bare
from broker.errors import UsageError
from broker.files import Put, appending, checksum, draft_version, let_go, read_record, read_version, write_whole
from broker.tensors import Layout
from coordinator import plan as plans
from coordinator import updates
from coordinator.claim import Claim, disk
from coordinator.history import checksum_of, is_line, rounds
from coordinator.journal import Journal
from coordinator.plan import Plan

VERSIONS, HISTORY, NOW = "versions", "history.jsonl", "now.json"


class Store:
    """One run's folder, opened by `Store.open` or made by `Store.create`.

    Attributes:
        folder: where it is.
        plan: the plan as it stands in the folder.
        claim: whether it is ours to change.
        journal: the rounds in the making.
    """

    def __init__(self, folder: Path, plan: Plan) -> None:
        self.folder = folder
        self.plan = plan
        self.claim = Claim(folder)
        self.journal = Journal(folder, self.write)
        self._chain = Chain()

    @classmethod
    def create(cls, folder: Path, plan: Plan, layout: Layout, weights: memoryview) -> "Store":
        """A new run with version 0.

        Raises:
            UsageError: the folder holds something already, or cannot be written.
        """
        if (folder / plans.FILE).exists():
            raise UsageError(f"{folder} holds a run already: choose another folder, or remove it first.")
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UsageError(f"{folder} is not an empty folder: choose another name for the run.")
        store = cls(folder, plan)
        with disk(folder):
            (folder / VERSIONS).mkdir(parents=True, exist_ok=True)
            store.save(0, layout, weights)
            write_whole(folder / plans.FILE, plans.to_toml(plan))  # last: a folder with a plan is a whole run
        return store

    @classmethod
    def open(cls, folder: Path) -> "Store":
        """The run in a folder.

        Raises:
            UsageError: it is not a run, or its plan does not hold.
        """
        if not (folder / plans.FILE).is_file():
            raise UsageError(f"{folder} is not a run: make one with `fluffle init LEARNER {folder}`.")
        store = cls(folder, plans.read(folder / plans.FILE))
        if store.latest() is None:
            raise UsageError(f"{folder} has a plan but no version 0: make the run anew with `fluffle init`.")
        return store

    def adopt(self, plan: Plan) -> None:
        """Take another plan, unless versions have been made under the present one.

        Raises:
            UsageError: version 1 exists and more than `rounds` would change.
        """
        if self.would_change(plan):
            self.write(self.folder / plans.FILE, plans.to_toml(plan))
            self.plan = plan

    def would_change(self, plan: Plan) -> bool:
        """Whether to adopt a plan changes anything.

        Raises:
            UsageError: as `adopt`.
        """
        old, new = plans.as_dict(self.plan), plans.as_dict(plan)
        changed = {key for key in old | new if old.get(key) != new.get(key)}
        if self.latest() and (frozen := ", ".join(sorted(changed - {"rounds"}))):
            raise UsageError(f"{self.folder} is frozen since version 1: make another run to change {frozen}.")
        return bool(changed)

    def path(self, version: int) -> Path:
        """Where a version is, or would be."""
        return self.folder / VERSIONS / f"{version:06d}.safetensors"

    def latest(self) -> int | None:
        """The newest version's number; None when there is none."""
        names = (p.stem for p in (self.folder / VERSIONS).glob("*.safetensors"))
        return max((int(name) for name in names if name.isdecimal()), default=None)

    def draft(self, version: int, layout: Layout, fill: Callable[[Put], None]) -> memoryview:
        """Write a version without making it one yet; until `seal(version)` a crash leaves nothing of it.

        Args:
            version: its number. Only one draft of a version is kept; the bytes of a former one stay good.
            layout: the tensors' places.
            fill: puts the weights' bytes, all of them, in any order.

        Returns:
            The weights as they lie in the system's cache: they may be sent at once, and read as long as one likes.
            Until they are sealed they may be changed in place.

        Raises:
            UsageError: the disk is full or not writable. What `fill` raises leaves no draft, either.
        """
        about = {"fluffle_run": self.plan.run, "fluffle_version": str(version), "learner": self.plan.learner}
        with disk(self.folder):
            return draft_version(self.path(version), layout, fill, about, tag=self.claim.tag)

    def seal(self, version: int) -> None:
        """Make the draft of a version the version; when this returns it survives a power failure.

        Raises:
            UsageError: the disk is full or broken; the draft is gone then.
            RunEnded: another coordinator has taken over.
        """
        with disk(self.folder):
            self.claim.seal(self.path(version))
        let_go(self.path(version - 1))

    def save(self, version: int, layout: Layout, weights: memoryview) -> None:
        """Draft and seal a version.

        Raises:
            UsageError: the disk is full or not writable.
        """
        self.draft(version, layout, lambda put: put(0, weights))
        self.seal(version)

    def load(self, version: int) -> tuple[Layout, memoryview]:
        """A version's tensors, looked at where they lie in its file; read-only.

        Raises:
            UsageError: the file is damaged, belongs to another run, or is not what the history speaks of.
        """
        layout, weights, about = read_version(self.path(version))
        if about.get("fluffle_run", self.plan.run) != self.plan.run:
            raise UsageError(f"{self.path(version)} is of the run {about['fluffle_run']}: put the right file back.")
        about_it = (line for line in self.history() if line.get("version") in (version, version + 1))
        noted = checksum_of(rounds(about_it), version)
        if noted and checksum(weights) != noted:
            raise UsageError(
                f"{self.path(version)} is not the version {version} of this run's history: its bytes have changed "
                "since. Restore it, or remove it and all later ones to go on from the one before."
            )
        return layout, weights

    def vouched(self, line: dict[str, Any]) -> dict[str, Any]:
        """The line of a round, with the checksums of what it is about: its version, and the updates that are kept.

        A line that has the version's already is believed: whoever loads the version compares the two.

        Raises:
            UsageError: a version cannot be read.
        """
        number, found = line["version"], dict[str, Any]()
        if "weights" not in line:  # a journal of a former fluffle
            found["weights"] = checksum(read_version(self.path(number))[1])
        if self.plan.keep_updates:
            found["updates"] = updates.settle(self.folder, number, line["counted"])
        return line | found

    def note(self, line: dict[str, Any]) -> None:
        """Add a line to the history; it survives a power failure."""
        with disk(self.folder), self.claim.acting(), appending(self.folder / HISTORY, 0o666) as file:
            self._chain.append(file, line)
            os.fsync(file.fileno())

    def history(self) -> Iterator[dict[str, Any]]:
        """The history's lines in order, one at a time: many rounds of many workers are more than memory holds.

        Those that are torn, or say what no line says, are passed over.
        """
        path = self.folder / HISTORY
        with path.open("rb") if path.exists() else contextlib.nullcontext(()) as lines:
            for raw in lines:
                with contextlib.suppress(ValueError, RecursionError):
                    if is_line(line := json.loads(raw.decode(errors="replace"))):
                        yield bare(line)

    def begin_epoch(self) -> int:
        """Become the one who may change this run; what others write from now on is refused. Our number.

        Raises:
            UsageError: the folder cannot be written.
        """
        with disk(self.folder):
            epoch = self.claim.begin()
        for left in [*(self.folder / VERSIONS).glob(".*.new"), *self.folder.glob(".*.new")]:  # of those who are gone
            left.unlink(missing_ok=True)
        self.journal = Journal(self.folder, self.write)  # as whoever acted before has left it
        return epoch

    def tidy(self) -> None:
        """Leave no version behind that we have begun and not made safe: whoever goes on makes it again."""
        for left in (self.folder / VERSIONS).glob(f".*{self.claim.tag}.new"):
            left.unlink(missing_ok=True)

    def write(self, path: Path, data: bytes, *, mode: int = 0o666) -> None:
        """Write a file of the run's that is old or new and never half, also after a power failure.

        Raises:
            UsageError: the disk is full or not writable.
            RunEnded: another coordinator has taken over.
        """
        with disk(self.folder), self.claim.writing(path, mode=mode) as file:
            file.write(data)

    def settle(self) -> None:
        """Note the line of a version that was saved just before a crash, if it was."""
        latest = self.latest() or 0
        owed = [line for line in self.journal.lines() if line["version"] <= latest]
        for noted in self.history():
            owed = [line for line in owed if not line.items() <= noted.items()]
        for line in owed:
            self.note(self.vouched(line))

    def say_now(self, now: dict[str, Any]) -> None:
        """Leave word of what is happening, for `fluffle status`; may be lost in a crash."""
        if not self.claim.ours():  # another's word is newer
            return
        with disk(self.folder):
            write_whole(self.folder / NOW, json.dumps(now).encode(), durable=False)

    def now(self) -> dict[str, Any]:
        """What was last said to be happening; empty when nothing was."""
        with contextlib.suppress(OSError, ValueError, TypeError, RecursionError):
            return read_record(self.folder / NOW)
        return {}


def new_run_name(folder: Path) -> str:
    """A name for the wire: the folder's, as far as a name may be spelt so, and a few letters of chance."""
    spelt = "".join(c if c.isascii() and c.isalnum() else "-" for c in folder.resolve().name.lower()).strip("-")
    return f"{spelt[:40].strip('-') or 'run'}-{secrets.token_hex(4)}"
