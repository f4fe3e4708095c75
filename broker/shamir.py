"""Secrets of 32 bytes cut into shares, of which any `threshold` give the secret and fewer say nothing about it.

Knows the field of integers modulo p = 2^256 + 297, the smallest prime above 2^256, so that any 32 bytes are an item
of it (Shamir 1979). Does not know who holds a share: a share is told apart by its x, which is 1 for the first.

Python's integers do not take the same time for all values. Whoever can measure that on the machine of a worker could
as well read its memory.
"""

import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from operator import mul

PRIME = 2**256 + 297
SECRET_BYTES, SHARE_BYTES = 32, 33
_DRAW_BYTES = 48  # reduced modulo p, so many are uniform but for 2^-127


def split(secret: bytes, shares: int, threshold: int, draw: Callable[[int], bytes]) -> list[bytes]:
    """Shares of 33 bytes for x = 1, 2, …; `draw(n)` gives n secret random bytes.

    The first threshold − 1 shares are drawn: with the secret they determine the polynomial, as coefficients would.
    """
    assert len(secret) == SECRET_BYTES
    assert 1 <= threshold <= shares
    drawn = draw(_DRAW_BYTES * (threshold - 1))
    places = range(0, len(drawn), _DRAW_BYTES)
    first = [int.from_bytes(drawn[at : at + _DRAW_BYTES], "big") % PRIME for at in places]
    values = int.from_bytes(secret, "big"), *first
    beyond = (sum(map(mul, factors, values)) % PRIME for factors in _beyond(threshold, shares))
    return [y.to_bytes(SHARE_BYTES, "big") for y in (*first, *beyond)]


@lru_cache(maxsize=256)
def _beyond(known: int, shares: int) -> tuple[tuple[int, ...], ...]:
    """For x = known, …, shares: Lagrange's factors of the values at 0, 1, …, known − 1, which are small and whole."""
    return tuple(
        tuple((-1) ** (known - 1 - i) * math.comb(x, i) * math.comb(x - 1 - i, known - 1 - i) for i in range(known))
        for x in range(known, shares + 1)
    )


def combine(shares: Mapping[int, bytes]) -> bytes | None:
    """The secret of exactly as many shares (x → share) as the threshold; None where there is no such secret."""
    factors = _at_zero(tuple(shares))
    found = sum(f * int.from_bytes(s, "big") for f, s in zip(factors, shares.values(), strict=True)) % PRIME
    return found.to_bytes(SECRET_BYTES, "big") if found < 2 ** (8 * SECRET_BYTES) else None


@lru_cache(maxsize=256)
def _at_zero(xs: tuple[int, ...]) -> tuple[int, ...]:
    """Lagrange's factors: Π x_j / (x_j − x_i) over all j ≠ i."""
    others = {x: [other for other in xs if other != x] for x in xs}
    below = (math.prod(other - x for other in others[x]) for x in xs)
    return tuple(math.prod(others[x]) * pow(b, -1, PRIME) % PRIME for x, b in zip(xs, below, strict=True))
