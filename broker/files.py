"""A version as a file, and files that are whole or absent. Both sides and people hand version files around.

Knows the safetensors format, and how a disk keeps what it was given. Does not know runs or rounds.

The order of a layout is the order of a safetensors file, so that after its header a file holds the very bytes that
travel: a version is written once, piece by piece, and then looked at through the system's cache instead of read. Only
the header is made here, for the library's own writer wants all bytes at once; it is what the library would write, to
the byte (but for the order of the notes, which it leaves to chance). Reading a header, and mistrusting it, is the
library's work.
"""

import contextlib
import json
import mmap
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from threading import Lock
from typing import IO, Any, TypeVar

import safetensors
from xxhash import xxh3_128

from broker.errors import FluffleError, UsageError, WireError
from broker.tensors import Layout, TensorSpec

_Item = TypeVar("_Item")

# safetensors' names for dtypes → ours
_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
_CODES = {ours: theirs for theirs, ours in _DTYPES.items()}
FORGET_BYTES = 64 * 1024 * 1024  # smaller models stay in sight


Put = Callable[[int, memoryview], None]
"""Writes a piece, and where it begins among the tensors' bytes; from several threads at once, if they like."""


def in_order(pieces: Iterable[memoryview]) -> Callable[[Put], None]:
    """What `draft_version` wants of bytes that come from first to last, however cut."""

    def fill(put: Put) -> None:
        at = 0
        for piece in pieces:
            put(at, piece)
            at += len(piece)

    return fill


def draft_version(
    path: Path, layout: Layout, fill: Callable[[Put], None], about: dict[str, str], *, tag: str = ""
) -> memoryview:
    """Write named tensors beside `path`, where nobody looks, until `seal(path)` makes them the file there.

    Args:
        path: where the file will be. A former draft for it is forgotten; its memory lives on where it is in use.
        layout: the tensors' places.
        fill: puts their bytes, all of them, in any order.
        about: notes for the header.
        tag: tells this draft from others for the same path.

    Returns:
        The bytes of the draft as they lie in the system's cache, at no cost in memory of our own. They may be changed
        in place until they are sealed, and may be read as long as one likes.

    Raises:
        UsageError: there are no tensors to write.
        OSError: the disk is full or not writable. Then there is no draft; nor when `fill` raises.
    """
    if not layout.specs:
        raise UsageError("the model has no tensors, so there is nothing to learn: give it parameters.")
    header = _header(layout, about)
    with written(path, tag) as file:
        number, turn = file.fileno(), Lock()

        def put(start: int, piece: memoryview) -> None:
            written = 0
            while written < len(piece):
                with turn:  # the system lets one at a time write to a file, and whoever waits there keeps a core busy
                    written += os.pwrite(number, piece[written:], len(header) + start + written)

        os.pwrite(number, header, 0)
        fill(put)
        assert os.fstat(number).st_size == len(header) + layout.size_bytes
        return memoryview(_mapped(number))[len(header) :]


def seal(
    path: Path,
    *,
    durable: bool = True,
    tag: str = "",
    guard: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
) -> None:
    """Let what was written beside `path` take its place at once; `durable`: also after a power failure.

    What takes long comes first; the step itself is taken within `guard`, which may refuse it.

    Raises:
        OSError: the disk is full or broken.
    """
    beside = _beside(path, tag)
    try:
        if durable:
            sync(beside)
        with guard():
            beside.replace(path)
    except BaseException as problem:
        # what a disk has failed to keep once, it may claim to have kept the next time
        _give_up(beside, path, problem)
        raise
    if durable:
        sync(path.parent)


def read_version(path: Path) -> tuple[Layout, memoryview, dict[str, str]]:
    """The tensors and the notes of a safetensors file.

    The bytes are looked at where they lie; only if others wrote them in another order, or out of step with the items'
    sizes, they are a copy. Nobody may shorten the file while they are in use; to replace it is safe.

    Raises:
        UsageError: it cannot be read, is damaged, or holds tensors that do not travel.
    """
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            layout, places, about = _read_header(path)
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))[8 + size :]
    except OSError as problem:
        raise UsageError(f"{path} cannot be read: {problem.strerror}.") from None
    except (safetensors.SafetensorError, WireError, KeyError) as problem:
        raise UsageError(f"{path} is damaged or not a version ({problem}): restore it, or remove it.") from None
    as_ours = all(places[spec.name] == layout.offsets[spec.name] for spec in layout.specs if spec.items)
    if as_ours and size % 8 == 0:
        return layout, data, about
    weights = bytearray(layout.size_bytes)
    for spec in layout.specs:
        start, place = layout.offsets[spec.name], places[spec.name]
        weights[start : start + spec.size_bytes] = data[place : place + spec.size_bytes]
    return layout, memoryview(weights).toreadonly(), about


def forget(data: memoryview) -> None:
    """Give back the memory in which a mapped file's bytes are seen; looked at again, they come from the cache again.

    For models so large that what has been sent must not stay. Bytes that are not mapped are left alone; a mapping of
    no file, or a private one, would be lost.
    """
    if isinstance(data.obj, mmap.mmap):
        data.obj.madvise(mmap.MADV_DONTNEED)


def forgetting(items: Iterable[_Item], looked_at: memoryview, size: Callable[[_Item], int]) -> Iterator[_Item]:
    """Hand the items on; every FORGET_BYTES, by their `size`, `forget` what is looked at on the way."""
    passed = 0
    for item in items:
        yield item
        passed += size(item)
        if passed >= FORGET_BYTES:
            forget(looked_at)
            passed = 0


def checksum(data: memoryview) -> str:
    """XXH3-128 of some bytes, in hex; of a large file that is mapped, nothing stays in memory."""
    found = xxh3_128()
    pieces = (data[at : at + FORGET_BYTES] for at in range(0, len(data), FORGET_BYTES))
    for piece in forgetting(pieces, data, len):
        found.update(piece)
    return found.hexdigest()


def write_whole(path: Path, data: bytes, *, durable: bool = True, mode: int | None = None) -> None:
    """Write a file so that it is old or new and never half; `durable`: also after a power failure.

    `mode` is who may read it; what the process' umask says unless given.

    Raises:
        OSError: the disk is full or not writable.
    """
    with written(path, mode=0o666 if mode is None else mode) as file:
        if mode is not None:
            os.fchmod(file.fileno(), mode)
        file.write(data)
    seal(path, durable=durable)


@contextlib.contextmanager
def trouble(
    what: str, remedy: str, *, error: type[FluffleError] = UsageError, of: tuple[type[Exception], ...] = (OSError,)
) -> Iterator[None]:
    """Make one sentence of what the disk refuses meanwhile, or a file does not say: `what`, why, and the remedy."""
    try:
        yield
    except of as problem:
        why = getattr(problem, "strerror", None) or problem
        raise error(f"{what} ({str(why).rstrip('.')}): {remedy}.") from None


UNREADABLE = OSError, ValueError, TypeError
"""Of a record that is damaged, or not to be had."""


def read_record(path: Path) -> dict[str, Any]:
    """A map that was written as JSON; empty if there is no such file.

    Raises:
        UNREADABLE: it cannot be read, or is none.
    """
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    if not isinstance(found, dict):
        raise TypeError("it is no map")
    return found


def _header(layout: Layout, about: dict[str, str]) -> bytes:
    """What stands before the tensors: the length, and JSON filled up with spaces so that every tensor is aligned."""
    fields: dict[str, Any] = {"__metadata__": dict(sorted(about.items()))} if about else {}
    for spec in layout.specs:
        start = layout.offsets[spec.name]
        offsets = [start, start + spec.size_bytes]
        fields[spec.name] = {"dtype": _CODES[spec.dtype], "shape": spec.shape, "data_offsets": offsets}
    text = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _read_header(path: Path) -> tuple[Layout, dict[str, int], dict[str, str]]:
    """The tensors of a file, where each begins after the header, and the notes."""
    specs, places, at = [], {}, 0
    with safetensors.safe_open(path, "numpy") as found:
        for name in found.offset_keys():
            tensor = found.get_slice(name)
            spec = TensorSpec(name, _DTYPES[tensor.get_dtype()], tuple(tensor.get_shape()))
            specs.append(spec)
            places[name] = at
            at += spec.size_bytes
        return Layout.of(specs), places, found.metadata() or {}


def reserve(number: int, size_bytes: int) -> None:
    """Give an open file room on the disk: to write to a mapped sparse one on a full disk would kill the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(number, 0, size_bytes)
    else:  # macOS cannot
        os.truncate(number, size_bytes)


def let_go(path: Path) -> None:
    """A file is safe on the disk, and nobody looks at it any more: its room in the system's cache is for others.

    What is written next takes that room. Left to itself the cache would grow by each version, and a virtual machine
    has to ask for memory that it has not used before, which takes longer than to write.
    """
    if hasattr(os, "posix_fadvise"):  # macOS has not
        with contextlib.suppress(OSError), path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _mapped(number: int) -> mmap.mmap:
    """A file as memory. What is not large is there at once: to be shown page after page takes longer."""
    small = os.fstat(number).st_size <= FORGET_BYTES
    return mmap.mmap(number, 0, flags=mmap.MAP_SHARED | (getattr(mmap, "MAP_POPULATE", 0) if small else 0))


def _beside(path: Path, tag: str = "") -> Path:
    return path.with_name(f".{path.name}{tag}.new")


@contextlib.contextmanager
def written(path: Path, tag: str = "", *, mode: int = 0o666) -> Iterator[IO[bytes]]:
    """A new file beside `path`, which `seal` puts there; gone again if something is raised. `tag`: as for a draft."""
    beside = _beside(path, tag)
    beside.unlink(missing_ok=True)  # a crash may have left it; or it is an older draft, which may still be in use
    try:
        with opened(beside, "x+b", mode) as file:
            yield file
    except BaseException as problem:
        _give_up(beside, path, problem)
        raise


def _give_up(beside: Path, path: Path, problem: BaseException) -> None:
    """Leave nothing behind; a full disk does not say by itself of which file it speaks."""
    beside.unlink(missing_ok=True)
    if isinstance(problem, OSError) and problem.filename is None:
        problem.filename = str(path)


def appending(path: Path, mode: int) -> IO[bytes]:
    """A file to be read and added to, made if missing; one that leads elsewhere is none: others may have sent it."""
    return opened(path, "ab+", mode, also=os.O_NOFOLLOW)


def opened(path: Path, how: str, mode: int, *, also: int = 0) -> IO[bytes]:
    """A file that is opened as `how` says and with `also`, system flags; `mode` are its permissions if it is made."""
    return open(path, how, opener=lambda name, flags: os.open(name, flags | also, mode))


def sync(path: Path) -> None:
    """See to it that a file, or a folder with the names in it, survives a power failure."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
