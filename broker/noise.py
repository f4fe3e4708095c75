"""Noise that hides one worker in a sum: Gaussian for whoever adds it to floats, discrete for whole numbers in a ring.

Pure. Knows keys, distributions and how much noise a ring has room for. Does not know whose sum it is, what it costs
(`accountant.py`), nor where keys come from: 256 bits from the system's own dice, used once. Whoever knows a key can
take its noise off again. numpy's and torch's dice are not used, for a learner or a plan may have sown them.

All of it is made of the words of AES-256 in counter mode. The same key gives the same noise, in parts of its own
(streams), so that threads may take turns.
"""

import math
from decimal import Decimal, localcontext
from typing import Any, NamedTuple

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR
from numpy.typing import NDArray

from broker.errors import UsageError

KEY_BYTES = 32
CHUNK_ITEMS = 64 * 1024
BITS_MIN, BITS_MAX = 4, 29
"""Bounds of `Grain.bits`: below 16, what is said of sums of discrete Gaussians is of no use; above 2^29, 64 bits."""
TAIL = 12.0
"""So many standard deviations of noise have room in the ring: beyond it is less than once in 10^32 numbers."""

NOISE_MIN = 1e-9
"""What less noise than this costs, in clips, is beyond numbers."""
_Words = NDArray[np.uint64]
_WHOLE = 2**63


class Words:
    """The words of one stream of a key, one after the other."""

    def __init__(self, key: bytes, stream: int) -> None:
        assert len(key) == KEY_BYTES
        self._cipher = Cipher(AES(key), CTR(stream.to_bytes(8, "big") + bytes(8))).encryptor()

    def draw(self, count: int) -> _Words:
        """The next words, uniform below 2^64."""
        return np.frombuffer(self._cipher.update(bytes(8 * count)), "<u8")


def gaussian(key: bytes, stream: int, count: int) -> NDArray[np.float64]:
    """So many normal numbers, of mean 0 and variance 1 (Box and Muller 1958); none is beyond ±8.6."""
    half = -(-count // 2)
    words = Words(key, stream).draw(2 * half) >> np.uint64(11)
    u = words.astype(np.float64)
    u[:half] += 1.0  # above 0
    u *= 2.0**-53
    size, angle = np.sqrt(-2.0 * np.log(u[:half])), (2.0 * np.pi) * u[half:]
    return np.concatenate([size * np.cos(angle), size * np.sin(angle)])[:count]


# -- whole numbers --------------------------------------------------------------------------------------------------


class Grain(NamedTuple):
    """How an update becomes whole numbers: times `scale`, and noise of standard deviation 2^`bits` of each worker."""

    scale: float
    bits: int


def _thresholds() -> tuple[_Words, _Words]:
    """Of v with probability ∝ e^(-v²/2): 2^63 · P(≤ v); and 2^63 · e^-v. Each is right to its last bit."""
    with localcontext() as context:
        context.prec = 60
        weights = [(Decimal(-v * v) / 2).exp() for v in range(11)]  # e^-60.5 is below 2^-63
        sums = [sum(weights[: v + 1], Decimal(0)) for v in range(10)]
        below = [int(_WHOLE * part / sum(weights)) for part in sums]
        return np.array(below, np.uint64), np.array([int(_WHOLE * Decimal(-v).exp()) for v in range(13)], np.uint64)


_BELOW, _POWERS = _thresholds()


def add_discrete(key: bytes, bits: int, words: NDArray[np.signedinteger[Any]]) -> None:
    """Add whole numbers x with probability ∝ exp(-x² / 2σ²), σ = 2^bits, to words with room for them, in place.

    Karney 2016 (arXiv 1303.6257, algorithm D), for many at once. σ is a power of two, so that every probability is a
    whole number of 2^-63, and there is no float in it whose rounding could tell on what was hidden.
    """
    assert 0 <= bits <= BITS_MAX
    for at in range(0, len(words), CHUNK_ITEMS):
        drawn, stop = Words(key, at // CHUNK_ITEMS), min(at + CHUNK_ITEMS, len(words))
        while at < stop:
            found = _tries(drawn, bits, (stop - at) * 3 // 2 + 16)[: stop - at]
            words[at : at + len(found)] += found.astype(words.dtype)
            at += len(found)  # noqa: PLW2901 (until the chunk is full)


def _tries(words: Words, bits: int, count: int) -> NDArray[np.int64]:
    """Those of so many tries that come to something: seven in ten."""
    shift = np.uint64(2 * bits + 1)
    first = words.draw(count)
    v = np.searchsorted(_BELOW, words.draw(count) >> np.uint64(1), side="right").astype(np.uint64)
    u = first & np.uint64(2**bits - 1)
    size = u + (v << np.uint64(bits))  # kept with probability exp(-(u² + 2uvσ) / 2σ²)
    exponent = u * (size + (v << np.uint64(bits)))
    keep = (words.draw(count) >> np.uint64(1)) < _POWERS[exponent >> shift]
    rest = (exponent & ((np.uint64(1) << shift) - np.uint64(1))) << (np.uint64(63) - shift)
    negative = first >> np.uint64(63) != 0
    keep &= _survive(words, rest) & ~(negative & (size == 0))  # there is one zero, not two
    found = size[keep].astype(np.int64)
    signed: NDArray[np.int64] = np.where(negative[keep], -found, found)
    return signed


def _survive(words: Words, exponents: _Words) -> NDArray[np.bool_]:
    """Each is True with probability e^(-x / 2^63): if the longest fall x > u₁ > u₂ > … is of even length."""
    even, at, last = np.ones(len(exponents), np.bool_), np.arange(len(exponents)), exponents
    while len(at):
        drawn = words.draw(len(at)) >> np.uint64(1)
        falls = drawn < last
        at, last = at[falls], drawn[falls]
        even[at] ^= True
    return even


def fit(clip: float, noise: float, *, least: int, most: int, ring_bits: int) -> Grain:
    """The finest grain for which the noisy sum of `most` updates has room in a ring.

    Args:
        clip: the largest norm of an update, C.
        noise: standard deviation of the noise on the sum, in clips, z.
        least: fewest workers whose noise is in the sum: together they make up z·C, whoever else drops out.
        most: most workers whose updates are in it.
        ring_bits: of a word.

    Raises:
        UsageError: there is no room.
    """
    room = 2 ** (ring_bits - 1) - 1 - most  # one of each worker is for rounding
    scale = room / (clip * (most + TAIL * noise * math.sqrt(most / least)))
    steps = noise * clip * scale / math.sqrt(least)
    bits = math.floor(math.log2(steps)) if 0 < steps < math.inf else 0
    if bits < BITS_MIN:
        remedy = "lower the cohort" if ring_bits == 64 else "set ring_bits to 64, lower the cohort"
        raise UsageError(
            f"a ring of {ring_bits} bits has no room for {most} workers with noise {noise:g}: "
            f"{remedy} or raise dp_noise."
        )
    bits = min(bits, BITS_MAX)
    return Grain(2.0**bits * math.sqrt(least) / (noise * clip), bits)


def multiplier(grain: Grain, clip: float, *, least: int, floats: int) -> float:
    """The noise multiplier of a Gaussian mechanism with the same Rényi divergences as a sum of discrete noise.

    Kairouz, Liu and Steinke 2021 (arXiv 2102.06387, theorem 1): the sum of n = `least` discrete Gaussians is
    ½ε²-concentrated for ε² = min(Δ²/nσ² + τd/2, (Δ/√n·σ + τ√d)²), τ = 10·Σ_{k<n} exp(-2π²σ²·k/(k+1)).
    Δ = scale·clip + √d/2: rounding moves each of the d floats by half a step.
    """
    sensitivity, deviation = grain.scale * clip + math.sqrt(floats) / 2, 2.0**grain.bits
    tau = 10 * sum(math.exp(-2 * (math.pi * deviation) ** 2 * k / (k + 1)) for k in range(1, least))
    ratio = sensitivity / (math.sqrt(least) * deviation)
    return 1 / min(math.sqrt(ratio**2 + tau * floats / 2), ratio + tau * math.sqrt(floats))
