"""Room for models on their way between the broker and the training process, used again from round to round.

Knows where models lie and that the disk may be full. Does not know what is in them, nor when they are wanted.

A model lies in a file that both processes map, and whose pages are written over in the next round: making and mapping
a new file would cost as much as filling it.
"""

import fcntl
import mmap
import os
from collections import deque
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import NamedTuple
from weakref import ReferenceType, WeakValueDictionary, finalize, ref

import numpy as np

from broker.changes import apply_change
from broker.errors import LearnerFailed, UsageError
from broker.files import opened, reserve, trouble
from broker.formats import Format
from broker.messages import Payload
from broker.parts import Assembly
from broker.tensors import Layout
from workers.journal import Kept, Place, all_kept
from workers.residuals import remove_left

FILE_BYTES = 64 * 1024 * 1024
"""How large a file of several slots may become: a thousand workers must not need a thousand open files."""
HELD_MAX = 2
"""How many versions stay here for many workers, who may have different ones; for a worker alone it is one."""
SIZES_MAX = 8
"""Of so many sizes there is room that nobody uses; a coordinator may ask for an update of another one each time."""
PAGE_BYTES = mmap.PAGESIZE
SUFFIX = ".models"


class Slot:
    """Room for one model's bytes; free again when nobody looks at `data` any more, whoever that was.

    Attributes:
        data: the bytes, writable.
        file: what else maps them: the file and the first byte in it.
    """

    def __init__(self, data: memoryview, file: tuple[Path, int]) -> None:
        self.data = data
        self.file = file


class Landing:
    """A payload whose parts are landing, once for all workers of this process that were sent it.

    Attributes:
        slot: where they land.
        parts: those that have landed.
        base: the weights of which they are the change, where they are one and `weights` is not there yet.
        room: where the weights are made then.
        weights: the version's weights, when they have been made of what landed.
    """

    def __init__(self, payload: Payload, slot: Slot) -> None:
        self.slot = slot
        self.parts = Assembly(payload, slot.data)
        self.base: Slot | None = None
        self.weights: Slot | None = None
        self.room: Slot | None = None
        self._alone = Lock()

    def unfold(self, layout: Layout, fmt: Format) -> None:
        """Make the weights in `room`, of the base and the change that landed, unless another thread has.

        Raises:
            WireError: the change lies.
        """
        with self._alone:
            if self.weights is None:
                assert self.base is not None
                assert self.room is not None
                apply_change(self.base.data, self.slot.data, layout, fmt, self.room.data)
                self.weights, self.base = self.room, None


class Held(NamedTuple):
    """A version that a worker has claimed: run and number, and its landing for as long as the spool holds it."""

    name: tuple[str, int]
    landing: ReferenceType[Landing]

    @property
    def weights(self) -> Slot | None:
        """The version's weights, if they are still here."""
        landing = self.landing()
        return None if landing is None else landing.weights


class Spool:
    """One process's folder of models. What an earlier process left there is removed, but for finished updates.

    Args:
        folder: where.
        workers: how many use it.

    Attributes:
        in_use: how many slots of files somebody looks at.
        kept: worker → finished updates of an earlier process, and their bytes.

    Raises:
        UsageError: the folder cannot be used, or another process uses it.
    """

    def __init__(self, folder: Path, *, workers: int = 1) -> None:
        self.folder = folder = folder.absolute()
        self.in_use = 0
        self._free: dict[int, list[tuple[Path, mmap.mmap, int]]] = {}
        self._slots: dict[int, int] = {}
        self._files = 0
        self._removed = False
        self._landings: WeakValueDictionary[str, Landing] = WeakValueDictionary()
        self._held: deque[Landing] = deque(maxlen=min(workers, HELD_MAX))
        with trouble(f"{folder} cannot be used for this worker's files", "choose another with --state"):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = _locked(folder)
            self.kept = self._recover(all_kept(folder))

    def take(self, size_bytes: int) -> Slot:
        """Room for so many bytes, whatever is in them.

        Raises:
            LearnerFailed: there is none.
        """
        free = self._free[size_bytes] = self._free.pop(size_bytes, [])  # the last to be taken is the last there
        if not free:
            self._forget_sizes()
            self._make_file(size_bytes, free)
        path, mapped, at = free.pop()
        return self._slot(path, mapped, Place(path.name, at, size_bytes, b""))

    def _slot(self, path: Path, mapped: mmap.mmap, place: Place) -> Slot:
        # whoever looks at the bytes keeps this array alive, also a transport that has not let go of them yet
        room = np.frombuffer(mapped, np.uint8, count=place.size_bytes, offset=place.at)
        self.in_use += 1
        finalize(room, self._put_back, place.size_bytes, (path, mapped, place.at)).atexit = False
        return Slot(room.data, (path, place.at))

    def expect(self, payload: Payload) -> Landing:
        """Where the parts of a payload land: the same place for all that expect the same payload at the same time.

        Raises:
            LearnerFailed: there is no room for it.
        """
        landing = self._landings.get(payload.id)
        if landing is None or landing.parts.payload != payload:
            landing = Landing(payload, self.take(payload.layout.size_bytes))
            self._landings[payload.id] = landing
        return landing

    def hold(self, name: tuple[str, int], landing: Landing) -> Held:
        """Keep a version that was claimed: others may be sent it, too, and the next may come as a change of it.

        Only the newest few stay.
        """
        if landing not in self._held:
            self._held.append(landing)
        return Held(name, ref(landing))

    def remove(self) -> None:
        """Remove all models, and the folder if nothing else is in it; whoever looks at a model may go on looking.

        Finished updates that have no verdict stay, for the next process. May be called twice, also when another has
        the folder by then.
        """
        if self._removed:
            return
        self._removed = True
        self._remove_files(all_kept(self.folder))
        self.kept.clear()
        self._free.clear()
        self._held.clear()
        self._slots.clear()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        with suppress(OSError):
            self.folder.rmdir()

    def _put_back(self, size_bytes: int, room: tuple[Path, mmap.mmap, int]) -> None:
        self.in_use -= 1
        self._free.setdefault(size_bytes, []).append(room)

    def _forget_sizes(self) -> None:
        """Remove the files of sizes that were not wanted for long, as far as nobody uses them."""
        for size_bytes, rooms in [*self._free.items()][:-SIZES_MAX]:
            if len(rooms) == self._slots.get(size_bytes, 0):
                for path in {path for path, _, _ in rooms}:
                    path.unlink(missing_ok=True)
                del self._free[size_bytes]
                self._slots.pop(size_bytes, None)

    def _make_file(self, size_bytes: int, free: list[tuple[Path, mmap.mmap, int]]) -> None:
        """As many slots more as there are already, so that many need few files and a few no more than they use."""
        pitch = _pitch(size_bytes)
        count = max(1, min(self._slots.get(size_bytes, 0), FILE_BYTES // pitch))
        path = self.folder / f"{self._files}{SUFFIX}"
        self._files += 1
        what = f"this worker's disk has no room for {count * pitch:,} bytes of models"
        remedy = f"make room in {self.folder}, or choose another folder with --state"
        with trouble(what, remedy, error=LearnerFailed):
            try:
                with opened(path, "w+b", 0o600) as file:  # updates give rows away
                    reserve(file.fileno(), count * pitch)
                    mapped = mmap.mmap(file.fileno(), count * pitch)
            except OSError:
                path.unlink(missing_ok=True)
                raise
        self._slots[size_bytes] = self._slots.get(size_bytes, 0) + count
        free.extend((path, mapped, at) for at in range(0, count * pitch, pitch))

    def _remove_files(self, but: list[Kept]) -> None:
        """All that only this process can use, but for finished updates."""
        needed = {kept.delta.file for kept in but}
        for left in self.folder.glob(f"*{SUFFIX}"):
            if left.name not in needed:
                left.unlink()
        remove_left(self.folder, {(kept.update.worker, kept.update.of.run) for kept in but})

    def _recover(self, found: list[Kept]) -> dict[str, list[tuple[Kept, Slot]]]:
        """Finished updates by worker, each in a slot as when it was made; what else is in their files is free."""
        self._remove_files(found)
        places = [kept.delta for kept in found]
        files = {place.file: self._opened(place) for place in places}
        recovered: dict[str, list[tuple[Kept, Slot]]] = {}
        for kept in found:
            slot = self._slot(self.folder / kept.delta.file, files[kept.delta.file], kept.delta)
            recovered.setdefault(kept.update.worker, []).append((kept, slot))
        taken = {(place.file, place.at) for place in places}
        for place in places:
            rooms = self._free.setdefault(place.size_bytes, [])
            for at in range(0, len(files[place.file]), _pitch(place.size_bytes)):
                if (place.file, at) not in taken:
                    taken.add((place.file, at))
                    rooms.append((self.folder / place.file, files[place.file], at))
        return recovered

    def _opened(self, place: Place) -> mmap.mmap:
        path = self.folder / place.file
        self._files = max(self._files, 1 + int(path.stem))
        with path.open("r+b") as file:
            mapped = mmap.mmap(file.fileno(), 0)
        self._slots[place.size_bytes] = self._slots.get(place.size_bytes, 0) + len(mapped) // _pitch(place.size_bytes)
        return mapped


def _pitch(size_bytes: int) -> int:
    """From one slot to the next: whole pages, one at least."""
    return -(-max(size_bytes, 1) // PAGE_BYTES) * PAGE_BYTES


def _locked(folder: Path) -> int | None:
    """The folder, held for this process as long as it lives; None where the disk cannot do that.

    Raises:
        UsageError: another process holds it.
    """
    number = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(number)
        raise UsageError(f"{folder} is in use: give this worker another --name, or another --state.") from None
    except OSError:  # some network disks know no locks
        os.close(number)
        return None
    return number
