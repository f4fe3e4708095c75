"""Secrets of 32 bytes cut into shares, of which any `threshold` give the secret and fewer say nothing about it.

Knows the field of integers modulo p = 2^256 + 297, the smallest prime above 2^256, so that any 32 bytes are an item
of it (Shamir 1979). Does not know who holds a share: a share is told apart by its x, which is 1 for the first.
"""

from collections.abc import Callable, Mapping

PRIME = 2**256 + 297
SECRET_BYTES, SHARE_BYTES = 32, 33


def split(secret: bytes, shares: int, threshold: int, draw: Callable[[int], bytes]) -> list[bytes]:
    """Shares of 33 bytes for x = 1, 2, …; `draw(n)` gives n secret random bytes."""
    raise NotImplementedError


def combine(shares: Mapping[int, bytes]) -> bytes | None:
    """The secret of exactly as many shares (x → share) as the threshold; None where there is no such secret."""
    raise NotImplementedError
