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
    pieces = (drawn[at : at + _DRAW_BYTES] for at in range(0, len(drawn), _DRAW_BYTES))
    known = [int.from_bytes(each, "big") % PRIME for each in (secret, *pieces)]  # at 0, 1, …, threshold − 1
    factors = (_factors(tuple(range(threshold)), x) for x in range(threshold, shares + 1))
    beyond = (sum(map(mul, each, known)) % PRIME for each in factors)
    return [y.to_bytes(SHARE_BYTES, "big") for y in (*known[1:], *beyond)]


def combine(shares: Mapping[int, bytes]) -> bytes | None:
    """The secret of exactly as many shares (x → share) as the threshold; None where there is no such secret."""
    found = sum(map(mul, _factors(tuple(shares), 0), (int.from_bytes(s, "big") for s in shares.values()))) % PRIME
    return found.to_bytes(SECRET_BYTES, "big") if found < 2 ** (8 * SECRET_BYTES) else None


@lru_cache(maxsize=256)
def _factors(xs: tuple[int, ...], at: int) -> tuple[int, ...]:
    """Lagrange's: Π (x_j − at) / (x_j − x_i) over all j ≠ i, for each x_i; one inversion serves them all."""
    above = math.prod(x - at for x in xs)
    below = [math.prod(other - x for other in xs if other != x) for x in xs]
    multiple = math.lcm(*below)
    inverse = pow(multiple, -1, PRIME)
    return tuple(above // (x - at) * (multiple // b) * inverse % PRIME for x, b in zip(xs, below, strict=True))
