"""Cutting a large payload into numbered parts, and putting it together again in whatever order they come.

Knows indices, lengths and checksums. Does not know queues, tensors' meaning or whose payload it is. Parts going
out look at the payload; coming in, they are copied once, to their place.
"""

from collections.abc import Iterator

from xxhash import xxh3_64_intdigest

from broker.errors import WireError
from broker.messages import Part, Payload

PART_BYTES = 1024 * 1024
"""The default: far under RabbitMQ 4's limit of 16 MiB a message, and about 1 ms of the event loop to send."""


def part_count(payload: Payload) -> int:
    """How many parts carry the payload; 0 for a payload without bytes."""
    return -(-payload.layout.size_bytes // payload.part_bytes)


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
        self._missing = set(range(part_count(payload)))

    @property
    def complete(self) -> bool:
        """Whether every part has landed."""
        return not self._missing

    @property
    def missing(self) -> int:
        """How many parts have not landed yet."""
        return len(self._missing)

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
        self.data[start : start + length] = part.data
        self._missing.discard(part.index)
        return True
