"""The masked sum of a round that was released, and all that was said in it, in one file: `round.masked`.

Knows that file. Does not know what the words or the messages mean, nor when it is written. It says no more than the
broker has seen: words that are masked, shares that are sealed, and, in the end, those that were opened.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

from xxhash import xxh3_64_digest

from broker.errors import WireError
from broker.files import seal, written
from broker.masks import Words
from broker.messages import Ready, Step, decode, encode
from coordinator.claim import Claim

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
            OSError: the disk is full or not writable.
            RunEnded: another coordinator has taken over.
        """
        pieces: list[bytes | memoryview] = [name.encode(), words.data.cast("B"), *map(encode, said)]
        with written(self._path, tag := f".{self._claim.epoch}") as file:
            for piece in pieces:
                file.writelines(_framed(piece))
        seal(self._path, tag=tag, guard=self._claim.acting)

    def add(self, said: Step) -> None:
        """One more; should a power failure take it, it is asked for again."""
        with self._claim.acting(), self._path.open("ab") as file:
            file.writelines(_framed(encode(said)))

    def read(self, name: str) -> tuple[memoryview, list[Ready | Step]] | None:
        """The words, and what was said as far as it is whole; None if there is nothing of this name."""
        try:
            pieces = _pieces(memoryview(self._path.read_bytes()))
            if bytes(next(pieces, b"")) == name.encode() and (words := next(pieces, None)) is not None:
                said = [decode(piece) for piece in pieces]
                return words, [each for each in said if isinstance(each, Ready | Step)]
        except (OSError, WireError):
            pass
        return None

    def drop(self) -> None:
        """Remove it: its version is safe."""
        with self._claim.acting():
            self._path.unlink(missing_ok=True)


def _framed(piece: bytes | memoryview) -> tuple[bytes, bytes, bytes | memoryview]:
    return len(piece).to_bytes(_LENGTH_BYTES, "big"), xxh3_64_digest(piece), piece


def _pieces(data: memoryview) -> Iterator[memoryview]:
    """What was framed, until something is torn."""
    while data:
        at = _LENGTH_BYTES + _DIGEST_BYTES
        piece = data[at : at + int.from_bytes(data[:_LENGTH_BYTES], "big")]
        if xxh3_64_digest(piece) != data[_LENGTH_BYTES:at]:
            return
        yield piece
        data = data[at + len(piece) :]
