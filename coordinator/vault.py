"""The masked sum of a round that was released, and all that was said in it, in one file: `round.masked`.

Knows that file, and how pieces lie in a file. Does not know what the words or the messages mean, nor when it is
written. It says no more than the broker has seen: words that are masked, shares that are sealed, and, in the end,
those that were opened.
"""

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from xxhash import xxh3_64_digest

from broker.errors import WireError
from broker.masks import Words
from broker.messages import Ready, Step, decode, encode
from coordinator.claim import Claim, disk

FILE = "round.masked"
_LENGTH_BYTES, _DIGEST_BYTES = 8, 8


class Vault:
    """The one of a run.

    Args:
        folder: the run's.
        claim: whether it is ours to write.
    """

    def __init__(self, folder: Path, claim: Claim) -> None:
        self._path = folder / FILE
        self._claim = claim

    def keep(self, name: str, words: Words, said: Iterable[Ready | Step]) -> None:
        """Write it down; when this returns it survives a power failure.

        Args:
            name: of the sum; no other has it.
            words: the masked sum.
            said: in order.

        Raises:
            UsageError: the disk is full or not writable.
            RunEnded: another coordinator has taken over.
        """
        with disk(self._path.parent), self._claim.writing(self._path, mode=0o600) as file:
            file.writelines([*framed(name.encode()), *framed(words.data.cast("B"))])
            for each in said:
                file.writelines(framed(encode(each)))

    def add(self, said: Step) -> None:
        """One more; should a power failure take it, it is asked for again.

        Raises:
            UsageError, RunEnded: as for `keep`.
        """
        with disk(self._path.parent), self._claim.acting(), self._path.open("ab") as file:
            file.writelines(framed(encode(said)))

    def read(self, name: str) -> tuple[str, memoryview, list[Ready | Step]] | None:
        """Name and words of the sum whose name begins so, and what was said as far as it is whole; None without."""
        found = list[memoryview]()
        with contextlib.suppress(OSError, ValueError):
            found.extend(pieces(memoryview(self._path.read_bytes())))
        with contextlib.suppress(WireError):
            if len(found) > 1 and (called := str(found[0], "utf-8", "replace")).startswith(name):
                return called, found[1], [each for each in map(decode, found[2:]) if isinstance(each, Ready | Step)]
        return None

    def drop(self) -> None:
        """Remove it: its version is safe."""
        self._claim.remove(self._path)


def framed(piece: bytes | memoryview) -> tuple[bytes, bytes, bytes | memoryview]:
    """A piece as it is written."""
    return len(piece).to_bytes(_LENGTH_BYTES, "big"), xxh3_64_digest(piece), piece


def pieces(data: memoryview) -> Iterator[memoryview]:
    """What was framed.

    Raises:
        ValueError: the next one is torn, or damaged.
    """
    while data:
        at = _LENGTH_BYTES + _DIGEST_BYTES
        piece = data[at : at + int.from_bytes(data[:_LENGTH_BYTES], "big")]
        if xxh3_64_digest(piece) != data[_LENGTH_BYTES:at]:
            raise ValueError("it is torn, or does not match its checksum")
        yield piece
        data = data[at + len(piece) :]
