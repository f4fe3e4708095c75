"""Keystreams added to words of a ring, or taken off: AES-256 in counter mode, tile by tile, in place.

Knows words and keys. Does not know whose keys they are nor what the words mean. A key serves one vector only; its
counter begins at zero.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

TILE_ITEMS = 64 * 1024
Words = NDArray[np.uint32] | NDArray[np.uint64]


class Mask(NamedTuple):
    """A keystream's key (32 bytes), and whether it is added or taken off."""

    key: bytes
    plus: bool


def apply(words: Words, masks: Iterable[Mask]) -> None:
    """Add each mask to the words, or take it off, in place; sums wrap."""
    raise NotImplementedError
