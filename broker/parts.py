"""Cutting a large payload into numbered parts, and putting it together again in whatever order they come.

Knows indices, lengths and checksums. Does not know queues, tensors' meaning or whose payload it is. Parts going
out look at the payload; coming in, they are received into their place if it can be told in time, else copied there.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from xxhash import xxh3_64_intdigest

from broker.errors import WireError
from broker.messages import Part, Payload, part_head

PART_BYTES = 1024 * 1024
"""The default: far under RabbitMQ 4's limit of 16 MiB a message, and about 1 ms of the event loop to send."""


class Aimed(NamedTuple):
    """A part on its way into its place: where its data begins in the message, where it goes, and what it will be."""

    at: int
    place: memoryview
    part: Part


Aim = Callable[[memoryview, int], Aimed | None]
"""Where the message that begins so, of so many bytes, is to land; None for anything but an awaited part."""


def split(payload: Payload, data: memoryview) -> Iterator[Part]:
    """The payload's parts in order. `data` holds its raw bytes, as long as its layout says; parts look at it."""
    assert len(data) == payload.layout.size_bytes
    for index, start in enumerate(range(0, len(data), payload.part_bytes)):
        piece = data[start : start + payload.part_bytes]
        yield Part(payload.id, index, xxh3_64_intdigest(piece), piece)


class Assembly:
    """A payload on its way in: parts land in their place in `data`, in any order, each at most once.

    Args:
        payload: what is awaited; its layout says how many bytes.
        data: where the parts land; a new bytearray unless given, else writable and exactly as long.
    """

    def __init__(self, payload: Payload, data: memoryview | None = None) -> None:
        self.payload = payload
        self.size_bytes = payload.layout.size_bytes
        self.data = memoryview(bytearray(self.size_bytes)) if data is None else data
        assert len(self.data) == self.size_bytes
        self._missing = set(range(-(-self.size_bytes // payload.part_bytes)))  # the last one may be shorter
        self._aimed: dict[int, memoryview] = {}

    @property
    def complete(self) -> bool:
        """Whether every part has landed."""
        return not self._missing

    @property
    def missing(self) -> int:
        """How many parts have not landed yet."""
        return len(self._missing)

    @property
    def arriving(self) -> bool:
        """Whether a part is being received into its place."""
        return any(index in self._missing for index in self._aimed)

    def aim(self, begins: memoryview, size: int) -> Aimed | None:
        """See `Aim`. What lands there counts when it is added; one place is never given twice."""
        head = part_head(begins)
        if head is None:
            return None
        payload, index, checksum, at, length = head
        if payload != self.payload.id or at + length != size or index not in self._missing or index in self._aimed:
            return None
        start = index * self.payload.part_bytes
        place = self._aimed[index] = self.data[start : start + self.payload.part_bytes]
        return Aimed(at, place, Part(payload, index, checksum, place)) if len(place) == length else None

    def add(self, part: Part) -> bool:
        """Put one part in its place; False when it was there already or belongs to another payload.

        Raises:
            WireError: an index outside the payload, another length than the index has, a wrong checksum.
        """
        if part.payload != self.payload.id:
            return False
        start = part.index * self.payload.part_bytes
        length = min(self.payload.part_bytes, self.size_bytes - start)
        if length <= 0:
            raise WireError(f"part {part.index} lies outside a payload of {self.size_bytes} bytes.")
        if len(part.data) != length:
            raise WireError(f"part {part.index} has {len(part.data)} bytes where {length} belong.")
        if xxh3_64_intdigest(part.data) != part.checksum:
            raise WireError(f"part {part.index} does not match its checksum.")
        if part.index not in self._missing:
            return False
        if part.data is not self._aimed.get(part.index):  # or it has been received there
            self.data[start : start + length] = part.data
        self._missing.discard(part.index)
        return True
