"""How the updates of a round become one change: rules, as records of three functions.

To change how updates are averaged, change or add a rule here; the plan's `rule` names one of `RULES`.

Knows arithmetic. Does not know who sent what, rounds, files or the wire. The result is a pure function of the weights
and the *set* of updates: the same bits in whatever order they are added (DESIGN §6).

The grid. A contribution is `x = examples · delta`, exact in float64 for float32 deltas. It is put on a fixed grid in
two limbs: `high = round(x)` and `low = round((x - high) · 2^52)`, both within ±2^51, and added into int64 sums.
Integer addition commutes, so order cannot matter. The grid's step is 2^-52; what goes beyond its reach is refused.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from broker.errors import WireError
from broker.tensors import FLOATS, ITEM_BYTES, Layout, Segment, as_float64, from_float64, view

REACH = 2.0**51
"""Largest |examples · delta| of one item of one update."""
SUM_REACH = 2.0**62
"""Largest sum of such bounds over a round: the high limb can then never overflow."""
EXAMPLES_MAX = 2**40
"""Most examples of all updates of a round together."""
LOW_BITS = 52
CARRY_EVERY = 1024  # |low| grows by at most 2^51 an update, so 2^61 before its carry is taken
CHUNK_ITEMS = 16 * 1024  # float64 temporaries of 128 KiB stay in the cache

# Adding 1.5 · 2^52 to |x| ≤ 2^51 makes the last bit worth 1, so the processor rounds x to an integer (to nearest,
# ties to even), and the bits of the result are that integer plus the bits of the constant: rounding and conversion
# in two vectorised additions, several times faster than rint() and a cast.
_SHIFT = np.float64(1.5 * 2.0**52)
_SHIFT_BITS = np.int64(_SHIFT.view(np.int64))


class Sums:
    """What a round has added up so far: 16 bytes for every float of the model, whatever the number of updates.

    Attributes:
        layout: the tensors' places, the same for weights and updates.
        high, low: int64 sums, one item for each float of the layout, in its order.
        largest: raw bytes in the layout's places, used for integers and booleans: the largest value so far.
        examples, updates: how many of each have been added.
    """

    def __init__(self, layout: Layout) -> None:
        floats = sum((s.stop - s.start) // ITEM_BYTES[s.dtype] for s in layout.segments if s.dtype in FLOATS)
        self.layout = layout
        self.high = np.zeros(floats, np.int64)
        self.low = np.zeros(floats, np.int64)
        self.largest: dict[Segment, NDArray[np.generic]] = {}
        self.examples = 0
        self.updates = 0
        self.reach = 0.0


class Rule(NamedTuple):
    """Many updates into one change.

    `init(layout)` begins a round; `add(sums, examples, update)` folds one update in, wholly or (raising WireError)
    not at all; `finish(sums, weights)` is the next version's bytes.
    """

    init: Callable[[Layout], Sums]
    add: Callable[[Sums, int, memoryview], None]
    finish: Callable[[Sums, memoryview], bytearray]


def add_weighted(sums: Sums, examples: int, update: memoryview) -> None:
    """Fold one update in: `high, low += examples · delta`, and the largest of integers and booleans.

    Args:
        sums: changed in place, unless this raises.
        examples: how many rows the update learned from, 1 to 2^29 - 1.
        update: raw bytes in the layout's places: deltas for floats, trained values for the rest.

    Raises:
        WireError: NaN, infinity, values beyond the grid's reach, booleans that are neither 0 nor 1; nothing has
            been added then.
    """
    assert len(update) == sums.layout.size_bytes
    reach = examples * _largest_delta(sums.layout, update)
    if reach > REACH:
        raise WireError(f"examples times the largest delta is {reach:.3g}, over the limit of {REACH:.3g}.")
    if sums.reach + reach > SUM_REACH or sums.examples + examples > EXAMPLES_MAX:
        raise WireError("the round's sum would leave its grid: lower the examples or the size of the deltas.")
    at = 0
    for segment, items in _chunks(sums.layout, update):
        if segment.dtype in FLOATS:
            values = as_float64(items, segment.dtype)
            _fold(values * examples, sums.high[at : at + len(values)], sums.low[at : at + len(values)])
            at += len(values)
    for segment in sums.layout.segments:
        if segment.dtype not in FLOATS:
            values_now = view(update[segment.start : segment.stop], segment.dtype)
            before = sums.largest.get(segment)
            sums.largest[segment] = values_now.copy() if before is None else np.maximum(before, values_now)
    sums.examples += examples
    sums.updates += 1
    sums.reach += reach
    if sums.updates % CARRY_EVERY == 0:
        for start in range(0, len(sums.low), CHUNK_ITEMS):
            _carry(sums.high[start : start + CHUNK_ITEMS], sums.low[start : start + CHUNK_ITEMS])


def finish_mean(sums: Sums, weights: memoryview) -> bytearray:
    """The next version: `weights + Σ examples·delta / Σ examples` for floats, the largest value for the rest.

    FedAvg (McMahan et al. 2017, arXiv 1602.05629, algorithm 1) with deltas in place of weights. The mean is taken
    once, in float64, and rounded once to the tensor's dtype.

    Raises:
        WireError: the result is not finite in the tensor's dtype.
    """
    assert sums.updates > 0
    result = bytearray(weights)
    target = memoryview(result)
    at = 0
    for segment, items in _chunks(sums.layout, target):
        if segment.dtype in FLOATS:
            stop = at + len(items)
            high, low = sums.high[at:stop], sums.low[at:stop]
            _carry(high, low)
            mean = low.astype(np.float64)
            mean *= 2.0**-LOW_BITS
            mean += high
            mean /= float(sums.examples)
            mean += as_float64(items, segment.dtype)
            items[:] = from_float64(mean, segment.dtype)
            if not np.isfinite(as_float64(items, segment.dtype)).all():
                raise WireError(f"the mean does not fit into {segment.dtype}: the model has diverged.")
            at = stop
    for segment, values in sums.largest.items():
        view(target[segment.start : segment.stop], segment.dtype)[:] = values
    return result


def _fold(x: NDArray[np.float64], high: NDArray[np.int64], low: NDArray[np.int64]) -> None:
    """Add the contributions `x` (used up) to both limbs."""
    shifted = x + _SHIFT
    high += shifted.view(np.int64)
    high -= _SHIFT_BITS
    shifted -= _SHIFT
    x -= shifted  # exact: what rounding left, |x| ≤ 1/2
    x *= 2.0**LOW_BITS
    x += _SHIFT
    low += x.view(np.int64)
    low -= _SHIFT_BITS


def _carry(high: NDArray[np.int64], low: NDArray[np.int64]) -> None:
    """Bring the low limb back within ±2^51, its whole part into the high one: one form for one sum."""
    carry = (low + (1 << (LOW_BITS - 1))) >> LOW_BITS
    high += carry
    low -= carry << LOW_BITS


def _largest_delta(layout: Layout, update: memoryview) -> float:
    """The largest |delta| of all floats.

    Raises:
        WireError: a float that is not finite, a boolean that is neither 0 nor 1.
    """
    largest = 0.0
    for segment, items in _chunks(layout, update):
        if segment.dtype in FLOATS:
            plain = as_float64(items, segment.dtype) if segment.dtype == "bfloat16" else items
            here = max(float(plain.max()), -float(plain.min()))  # NaN anywhere makes both of them NaN
            if not np.isfinite(here):
                raise WireError("the update holds NaN or infinity: training has diverged there.")
            largest = max(largest, here)
        elif segment.dtype == "bool" and items.view(np.uint8).max() > 1:
            raise WireError("the update holds a boolean that is neither 0 nor 1.")
    return largest


def _chunks(layout: Layout, data: memoryview) -> Iterator[tuple[Segment, NDArray[np.generic]]]:
    """Every segment in runs of at most CHUNK_ITEMS, as arrays that look into `data`."""
    for segment in layout.segments:
        step = CHUNK_ITEMS * ITEM_BYTES[segment.dtype]
        for start in range(segment.start, segment.stop, step):
            yield segment, view(data[start : min(start + step, segment.stop)], segment.dtype)


MEAN = Rule(Sums, add_weighted, finish_mean)
"""The mean weighted by examples."""

RULES = {"mean": MEAN}
