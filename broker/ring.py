"""Updates as words of a ring, in which sums are exact and masks vanish: Z_2^32 or Z_2^64, little-endian, unsigned.

Knows how an update becomes words and what a sum of words says. Does not know masks, keys, rounds nor who adds.

Floats. A worker's contribution to the mean is `examples · delta`, as everywhere; here it is rounded once, to nearest,
to a multiple of 2^-grid instead of 2^-52 (`coordinator/aggregation.py`), and kept in two's complement. The grid is
the finest that the ring has room for: cohort · (examples_max · clip · 2^grid + 1) < 2^(bits - 1).

Integers and booleans. Their plain rule, the largest, cannot be had from a sum. Here it is the mean of the workers,
each counting once, rounded to nearest and halves up: what is equal everywhere stays as it is, a BatchNorm's counter
moves by the mean, a boolean goes with the majority.

Numbers. Examples and metrics travel behind, in the same words: whoever adds learns their sums only. An integer is cut
into limbs of 16 bits, so that sums of up to 2^15 of them fit any ring.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from broker.masks import Words
from broker.tensors import Layout


@dataclass(frozen=True, slots=True)
class Ring:
    """Words of `bits` and what one step of a float's word means: see `ring_of`.

    Attributes:
        bits: 32 or 64.
        grid: a step is 2^-grid of `examples · delta`.
        limit: largest |delta| of one item, a little above the plan's clip.
        examples_max: more examples than this count as this.
    """

    bits: int
    grid: int
    limit: float
    examples_max: int


def ring_of(bits: int, *, clip: float, examples_max: int, cohort: int) -> Ring:
    """The ring of a plan.

    Raises:
        UsageError: no clip, or one that is not finite; the ring is too small for so many workers and examples.
    """
    raise NotImplementedError


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
    def words(self) -> int:
        """How many words a masked update has."""
        raise NotImplementedError

    @cached_property
    def layout(self) -> Layout:
        """As a payload: one tensor of integers called `~masked`."""
        raise NotImplementedError


class Counted(NamedTuple):
    """What a sum says beside the model: all examples, and the mean of each metric, weighted by examples."""

    examples: int
    metrics: dict[str, float]


def encode(
    form: Form, update: memoryview, *, examples: int, metrics: Mapping[str, float], into: memoryview | None = None
) -> Words:
    """An update as words, before any mask.

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
    raise NotImplementedError


def counted(form: Form, total: Words) -> Counted:
    """What is behind the model in an unmasked sum.

    Raises:
        WireError: the sum cannot be one of updates: no examples.
    """
    raise NotImplementedError
