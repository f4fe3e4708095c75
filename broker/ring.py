"""Updates as words of a ring, in which sums are exact and masks vanish: Z_2^32 or Z_2^64, little-endian, unsigned.

Knows how an update becomes words and what a sum of words says. Does not know keys, rounds, nor who adds.

Floats. A worker's contribution to the mean is `examples · delta`, as everywhere; here it is rounded once, to nearest,
to a multiple of 2^-grid instead of 2^-52 (`coordinator/aggregation.py`), and kept in two's complement. The grid is
the finest power of two for which the ring has room: cohort · examples_max · clip · 2^grid < 2^(bits - 1), with 0.4 %
to spare.

Integers and booleans. Their plain rule, the largest, cannot be had from a sum. Here it is the mean of the workers,
each counting once, rounded to nearest and halves up: what is equal everywhere stays as it is, a BatchNorm's counter
moves by the mean, a boolean goes with the majority.

Numbers. Those, the examples and the metrics (`examples · value` in steps of 2^-17) follow the floats, in the same
words: whoever adds learns their sums only. A number is cut into four limbs of 16 bits, the highest one signed, a word
each, so that sums of up to 2^15 of them fit any ring.

Noise. Where workers add some (`noise.py`), the scale is its own and no power of two, each update counts as one
example, and the sum is divided by the plan's cohort. What has no noise does not travel: integers and booleans stay as
they were, and there are no metrics.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from broker.errors import UsageError, WireError
from broker.formats import count_floats
from broker.masks import Words
from broker.noise import TAIL, Grain, fit
from broker.norms import CLIP_MIN
from broker.pieces import CHUNK_ITEMS, look, pieces
from broker.tensors import FLOATS, ITEM_BYTES, Layout, Segment, TensorSpec, as_float64

ADDENDS_MAX = 2**15
"""Most updates in one sum."""
EXAMPLES_MAX = 2**29
METRIC_MAX = 2.0**16
"""A metric beyond this counts as this."""
GRID_MAX = 52
"""The grid of `coordinator/aggregation.py`: no finer one would be kept."""
STEPS_MIN = 16
"""So many steps at least lie between zero and the largest delta of a single example."""
_SLACK = 1 + 2.0**-9  # clipping in float32 ends a little above the clip
_METRIC_BITS = 17  # examples · |value| has 62 bits then
_LIMB_BITS, _LIMBS = 16, 4


@dataclass(frozen=True, slots=True)
class Ring:
    """Words of `bits` and what one step of a float's word means: see `ring_of`.

    Attributes:
        bits: 32 or 64.
        scale: so many steps are one of `examples · delta`.
        limit: largest |delta| of one item, a little above the plan's clip.
        examples_max: more examples than this count as this.
        cohort: for how many there is room; with noise the divisor of their sum.
        grain: of the noise, if there is any.
    """

    bits: int
    scale: float
    limit: float
    examples_max: int
    cohort: int
    grain: Grain | None = None

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the words."""
        return np.dtype(f"<u{self.bits // 8}")


def ring_of(bits: int, *, clip: float, examples_max: int, cohort: int, noise: float = 0.0, least: int = 1) -> Ring:
    """The ring of a plan.

    Args:
        bits: of a word.
        clip: the largest norm of an update.
        examples_max: the most examples that one counts for; 1 where there is noise.
        cohort: most workers whose updates are in a sum.
        noise: its standard deviation in clips, on a sum in which it is that of `least` workers; 0 for none.
        least: fewest of them.

    Raises:
        UsageError: no such words; no clip, or one that is not finite; the ring is too small for so many workers,
            examples and noise.
    """
    if bits not in (32, 64):
        raise UsageError(f"the words of a secure sum have 32 or 64 bits, not {bits}.")
    if not CLIP_MIN <= clip < math.inf:
        raise UsageError(f"a secure sum needs a bound of what is added, and clip is {clip:g}: set it above 0.")
    if not 1 <= examples_max <= EXAMPLES_MAX:
        raise UsageError(f"a secure sum needs examples_max within 1 and {EXAMPLES_MAX}, and it is {examples_max}.")
    if not 1 <= cohort <= ADDENDS_MAX:
        raise UsageError(f"a secure sum takes at most {ADDENDS_MAX} workers, and the plan asks {cohort}.")
    limit = clip * _SLACK
    if noise:
        if examples_max != 1:
            raise UsageError(f"with noise a worker counts as one example, not {examples_max}: set examples_max to 1.")
        grain = fit(clip, noise, least=least, most=cohort, ring_bits=bits)
        return Ring(bits, grain.scale, limit, 1, cohort, grain)
    room = (2 ** (bits - 1) - 1) // cohort  # for one worker
    largest = Fraction(limit) * Fraction(_SLACK) * examples_max  # float64 rounds it, by 2^-53 of it at the most
    grid = min(GRID_MAX, (int(room / largest)).bit_length() - 1)
    if grid < 0 or clip * 2.0**grid < STEPS_MIN:
        remedy = "set ring_bits to 64, or lower them" if bits == 32 else "lower them"
        raise UsageError(
            f"a ring of {bits} bits is too small for {cohort} workers, clip {clip:g} and examples_max "
            f"{examples_max}: {remedy} (a worker with more examples than examples_max counts as having that many)."
        )
    return Ring(bits, 2.0**grid, limit, examples_max, cohort)


@dataclass(frozen=True)
class Form:
    """What the words of a masked update stand for: all floats, all integers and booleans, the examples, the metrics.

    Attributes:
        ring: see there.
        model: the model's layout.
        metrics: names, in the order in which they travel.
    """

    ring: Ring
    model: Layout
    metrics: tuple[str, ...] = ()

    @cached_property
    def floats(self) -> int:
        """How many of the words are floats; they come first."""
        return count_floats(self.model)

    @cached_property
    def others(self) -> tuple[Segment, ...]:
        """The places of integers and booleans, where they travel."""
        return () if self.ring.grain else tuple(each for each in self.model.segments if each.dtype not in FLOATS)

    @cached_property
    def words(self) -> int:
        """How many words a masked update has."""
        others = sum((each.stop - each.start) // ITEM_BYTES[each.dtype] for each in self.others)
        return self.floats + _LIMBS * (others + 1 + len(self.metrics))

    @cached_property
    def layout(self) -> Layout:
        """As a payload: one tensor of integers called `~masked`."""
        return Layout.of([TensorSpec("~masked", f"int{self.ring.bits}", (self.words,))])

    def signed(self, words: Words) -> NDArray[np.signedinteger[Any]]:
        """The words as what they stand for, in the same memory."""
        return words.view(f"<i{words.itemsize}")


class Counted(NamedTuple):
    """What a sum says beside the model: all examples, and the mean of each metric, weighted by examples."""

    examples: int
    metrics: dict[str, float]


def encode(
    form: Form, update: memoryview, *, examples: int, metrics: Mapping[str, float], into: memoryview | None = None
) -> Words:
    """An update as words, before any noise or mask.

    Args:
        form: what is to be written.
        update: raw bytes in the model's layout: deltas for floats, values for integers and booleans.
        examples: how many rows it learned from, from 1.
        metrics: values of at least `form.metrics`; beyond ±2^20 they count as that.
        into: where to write, exactly as long as `form.layout`; new memory unless given.

    Raises:
        WireError: NaN, infinity, a delta above the ring's limit, a metric that is missing or not finite; `into` is
            half written then.
    """
    ring, counts = form.ring, min(examples, form.ring.examples_max)
    words = np.empty(form.words, ring.dtype) if into is None else np.frombuffer(into, ring.dtype)
    assert len(words) == form.words
    assert counts >= 1
    signed, scratch = form.signed(words), np.empty(min(form.floats, CHUNK_ITEMS))
    for piece in pieces(form.model, form.model):
        x = as_float64(look(update, piece.ours), piece.ours.dtype, out=scratch[: piece.stop - piece.at])
        largest = max(float(x.max()), -float(x.min()))  # NaN anywhere makes both of them NaN
        if not math.isfinite(largest):
            raise WireError("the update holds NaN or infinity: training has diverged there.")
        if largest > ring.limit:
            raise WireError(
                f"the update's largest delta is {largest:.3g}, over the limit of {ring.limit:.3g}: clip it."
            )
        x *= counts * ring.scale
        np.rint(x, out=x)
        np.copyto(signed[piece.at : piece.stop], x, casting="unsafe")
    behind = [counts, *(round(counts * each * 2**_METRIC_BITS) for each in _values(form, metrics))]
    others = (look(update, each).astype(np.int64) for each in form.others)
    numbers = np.concatenate([*others, np.array(behind, np.int64)])
    for place, limbs in enumerate(signed[form.floats :].reshape(_LIMBS, -1)):
        limbs[:] = numbers >> _LIMB_BITS * place & (2**_LIMB_BITS - 1 if place < _LIMBS - 1 else -1)
    return words


def _values(form: Form, metrics: Mapping[str, float]) -> Iterator[float]:
    for name in form.metrics:
        value = metrics.get(name, math.nan)
        if not math.isfinite(value):
            raise WireError(f"the metric {name[:40]!r} of this update is missing or not finite.")
        yield max(-METRIC_MAX, min(METRIC_MAX, value))


def _numbers(form: Form, total: Words) -> NDArray[np.object_]:
    """The sums of all numbers, as Python's integers."""
    limbs = form.signed(total)[form.floats :].reshape(_LIMBS, -1).astype(object)
    found: NDArray[np.object_] = limbs.T @ np.array([1 << _LIMB_BITS * place for place in range(_LIMBS)], object)
    return found


def counted(form: Form, total: Words, updates: int) -> Counted:
    """What is behind the model in an unmasked sum of so many updates.

    Its floats are no longer than all clips together, what rounding adds, and, where there is noise, that: of d normal
    numbers together it is within √d + 12 deviations but for once in 10^31 sums.

    Raises:
        WireError: the words are no sum of updates.
    """
    ring, root = form.ring, math.sqrt(form.floats)
    examples, *metrics = _numbers(form, total)[-1 - len(form.metrics) :]
    floats = (form.signed(total)[piece.at : piece.stop] for piece in pieces(form.model, form.model))
    length = math.sqrt(sum(float(np.square(each, dtype=np.float64).sum()) for each in floats))
    most = examples * ring.limit * ring.scale + updates * root / 2
    most += math.sqrt(updates) * 2.0**ring.grain.bits * (root + TAIL) if ring.grain else 0.0
    if not (updates <= examples <= updates * ring.examples_max and length <= most):
        raise WireError("the masked words do not add up to updates: a worker has sent others, or other masks.")
    means = (value / (examples << _METRIC_BITS) for value in metrics)
    return Counted(examples, dict(zip(form.metrics, means, strict=True)))


def means_of_others(form: Form, total: Words, updates: int) -> dict[int, NDArray[np.generic]]:
    """First byte in the model → the mean of so many updates for each of the integers or booleans there."""
    found, numbers = dict[int, NDArray[np.generic]](), _numbers(form, total)
    for segment in form.others:
        items = (segment.stop - segment.start) // ITEM_BYTES[segment.dtype]
        means, numbers = (2 * numbers[:items] + updates) // (2 * updates), numbers[items:]
        found[segment.start] = (means % 2**64).astype(np.uint64).view(np.int64).astype(segment.dtype)
    return found
