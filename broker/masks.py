"""Keystreams added to words of a ring, or taken off: AES-256 in counter mode, tile by tile, in place.

Knows words and keys. Does not know whose keys they are nor what the words mean. A key serves one vector only; its
counter begins at two, where that of GCM with a nonce of zeros does (NIST SP 800-38D, 7.1). So what GCM makes of zeros
is this keystream, and OpenSSL makes it twice as fast as its plain counter mode where a processor has wide AES. Nobody
looks at GCM's tag.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import GCM
from numpy.typing import NDArray

TILE_BYTES = 256 * 1024
"""So much of the words, and of one keystream, stays in a core's cache."""
_BLOCK_BYTES = 16
_NONCE = bytes(12)

Words = NDArray[np.uint32] | NDArray[np.uint64]


class Mask(NamedTuple):
    """A keystream's key (32 bytes), and whether it is added or taken off."""

    key: bytes
    plus: bool


def apply(words: Words, masks: Iterable[Mask]) -> None:
    """Add each mask to the words, or take it off, in place; sums wrap."""
    streams = [
        (Cipher(AES(mask.key), GCM(_NONCE)).encryptor(), np.add if mask.plus else np.subtract) for mask in masks
    ]
    zeros, room = memoryview(bytes(TILE_BYTES)), bytearray(TILE_BYTES + _BLOCK_BYTES - 1)
    items = TILE_BYTES // words.itemsize
    for at in range(0, len(words), items):
        tile = words[at : at + items]
        fresh = np.frombuffer(room, words.dtype, len(tile))
        for stream, fold in streams:
            stream.update_into(zeros[: tile.nbytes], room)
            fold(tile, fresh, out=tile)
