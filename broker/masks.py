"""Keystreams added to words of a ring, or taken off: AES-256 in counter mode, tile by tile, in place.

Knows words and keys. Does not know whose keys they are nor what the words mean. A key serves one vector only; its
counter begins at two, where that of GCM with a nonce of zeros does (NIST SP 800-38D, 7.1). So what GCM makes of zeros
is this keystream, too. Where a processor has wide AES, OpenSSL makes it twice as fast by GCM; elsewhere GCM takes
twice the time. Nobody looks at its tag.
"""

from collections.abc import Iterable
from functools import cache
from time import perf_counter
from typing import NamedTuple

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR, GCM
from numpy.typing import NDArray

TILE_BYTES = 128 * 1024
"""So much of the words, of one keystream and of zeros stays in a core's cache."""
_BLOCK_BYTES = 16
MODES: tuple[CTR | GCM, ...] = (CTR((2).to_bytes(_BLOCK_BYTES, "big")), GCM(bytes(12)))
"""Two ways to the same keystream."""

Words = NDArray[np.uint32] | NDArray[np.uint64]


class Mask(NamedTuple):
    """A keystream's key (32 bytes), and whether it is added or taken off."""

    key: bytes
    plus: bool


def apply(words: Words, masks: Iterable[Mask]) -> None:
    """Add each mask to the words, or take it off, in place; sums wrap."""
    mode = fastest()
    streams = [(Cipher(AES(mask.key), mode).encryptor(), np.add if mask.plus else np.subtract) for mask in masks]
    zeros, room = memoryview(bytes(TILE_BYTES)), bytearray(TILE_BYTES + _BLOCK_BYTES - 1)
    items = TILE_BYTES // words.itemsize
    for at in range(0, len(words), items):
        tile = words[at : at + items]
        fresh = np.frombuffer(room, words.dtype, len(tile))
        for stream, fold in streams:
            stream.update_into(zeros[: tile.nbytes], room)
            fold(tile, fresh, out=tile)


@cache
def fastest() -> CTR | GCM:
    """The mode that takes the least time on this processor, as it was when first asked for: a millisecond's work."""
    zeros, room = bytes(TILE_BYTES), bytearray(TILE_BYTES + _BLOCK_BYTES - 1)

    def seconds(mode: CTR | GCM) -> float:
        stream = Cipher(AES(bytes(32)), mode).encryptor()
        began = perf_counter()
        stream.update_into(zeros, room)
        return perf_counter() - began

    return min(MODES, key=lambda mode: min(seconds(mode) for _ in range(8)))
