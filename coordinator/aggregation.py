"""How the updates of a round become one change: rules, as records of three functions.

To change how updates are averaged, change or add a rule here; the plan's `rule` names one of `RULES`.

Knows arithmetic. Does not know who sent what, rounds, files, or how an update is written (`broker/formats.py`). The
result is a pure function of the weights and the *set* of updates: the same bits in whatever order they are added.

The grid. A contribution `x = examples · delta`, exact in float64 for float32 deltas, is rounded once to a multiple of
2^-52 (to nearest, ties to even) and added up as an integer. Integer addition commutes, so order cannot matter.

Limbs. `low` counts steps of 2^-52 in int64: 8 bytes a float. As long as the bounds of all that was added to a chunk
of floats stay within 2^10, that is enough. Before it could overflow, its whole part is carried over to `high`, which
counts ones, and takes memory from then on for that chunk. `high · 2^52 + low` is the same integer whenever that
happens. At the end the carry is taken once more: one form for one sum. What both cannot hold is refused.

Speed. Every step is one call of numpy into memory that is there already: about 2.8 ns a float32 to add it and 3.3 for
the mean, twice that where `high` counts. Chunks have nothing to do with each other, so several threads may take one
each; who they are is the caller's business (`Spread`). Between two calls the event loop may take the interpreter and
keep it for a while; so a chunk as long as the caches will have it is better than a short one.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from hashlib import sha256
from itertools import groupby
from operator import itemgetter
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from broker.errors import WireError
from broker.files import Put
from broker.formats import CHUNK_ITEMS, Format, Run, count_floats
from broker.norms import SLACK, squares
from broker.pieces import Piece, look, pieces
from broker.tensors import FLOATS, Layout, are_finite, as_float64, from_float64, saturated
from coordinator.privacy import Veil

REACH = 2.0**51
"""Largest |examples · delta| of one item of one update."""
SUM_REACH = 2.0**62
"""Largest sum of such bounds over a round: the high limb can then never overflow."""
EXAMPLES_MAX = 2**40
"""Most examples of all updates of a round together."""
LOW_BITS = 52
ONE = 2.0**LOW_BITS  # in steps of the grid
LOW_REACH = 2.0**10  # · 2^52 is half of what an int64 holds


_Item = TypeVar("_Item")
_Made = TypeVar("_Made")


class Spread(Protocol):
    """Calls `work(item, seat)` for every item, perhaps several at a time; what it returned, in the items' order.

    Items are drawn one after another. Two calls at the same time have different seats, from 0 up. Should one raise,
    the rest is left, and that is raised when nobody is at work any more.
    """

    def __call__(self, work: Callable[[_Item, int], _Made], items: Iterable[_Item]) -> list[_Made]:
        """See above."""


def alone(work: Callable[[_Item, int], _Made], items: Iterable[_Item]) -> list[_Made]:
    """One item after another: the `Spread` of whoever has but one thread."""
    return [work(item, 0) for item in items]


class Sums:
    """What a round has added up so far: 8 bytes for every float of the model, whatever the number of updates.

    A chunk whose sums may grow beyond 2^10 takes another 8 bytes a float. One update is added at a time; the order
    does not matter.

    Args:
        layout: the tensors' places in the weights.
        fmt: how updates are written.
        seats: for how many at a time there are temporaries.
        clip: the largest norm of an update (`broker/norms.py`); 0 for any.

    Attributes:
        layout: the tensors' places in the weights.
        fmt: how updates are written.
        clip: the largest norm of an update, or 0.
        low: int64 sums in steps of 2^-52, one item for each float of the layout, in its order.
        high: int64 sums in ones.
        bounds: chunk → largest possible |low| · 2^-52 there; where a chunk is absent, `low` is void and the sum zero.
        carried: the chunks in which `high` counts; elsewhere it is void.
        largest: first byte in the layout → the largest value so far of each of the integers or booleans there.
        examples, updates: how many of each have been added.
        reach: the sum of the updates' bounds on |examples · delta|.
        steps: so many of `low` are one; another number only where a secure sum was put in place of a fold.
        veil: the noise under which the mean is released, if it is (`privacy.py`); every update was added as one
            example then.
    """

    def __init__(self, layout: Layout, fmt: Format, *, seats: int = 1, clip: float = 0.0) -> None:
        floats = count_floats(layout)
        self.layout = layout
        self.fmt = fmt
        self.clip = clip
        self.low = np.empty(floats, np.int64)
        self.high = np.empty(floats, np.int64)  # costs nothing until it is touched
        self.x = [np.empty(min(floats, CHUNK_ITEMS)) for _ in range(seats)]  # temporaries of one chunk
        self.y = [np.empty(min(floats, CHUNK_ITEMS)) for _ in range(seats)]
        self.clear()

    def clear(self) -> None:
        """Begin anew in the same memory; takes no time, since chunks are zeroed when they are first added to."""
        self.bounds: dict[int, float] = {}
        self.carried: set[int] = set()
        self.largest: dict[int, NDArray[np.generic]] = {}
        self.examples = 0
        self.updates = 0
        self.reach = 0.0
        self.steps = ONE
        self.veil: Veil | None = None


class Rule(NamedTuple):
    """Many updates into one change.

    `init(layout, fmt, seats=…, clip=…)` begins the first round, `Sums.clear` every other one. `add(sums, examples,
    update, spread=…)` folds one update in, wholly or (raising WireError) not at all. `finish(sums, weights, put,
    spread=…)` puts the next version's bytes, each piece good only during the call.
    """

    init: Callable[..., Sums]
    add: Callable[..., None]
    finish: Callable[..., None]


def add_weighted(sums: Sums, examples: int, update: memoryview, *, spread: Spread = alone) -> None:
    """Fold one update in: `sum += examples · delta`, and the largest of integers and booleans.

    Args:
        sums: changed in place, unless this raises.
        examples: how many rows the update learned from, 1 to 2^29 - 1.
        update: its bytes as `sums.fmt` writes them: deltas for floats, trained values for the rest.
        spread: who does the work, chunk by chunk.

    Raises:
        WireError: NaN, infinity, a norm above the clip, values beyond the grid's reach, booleans that are neither 0
            nor 1, what the format cannot decode; nothing has been added then.
    """
    others = list(sums.fmt.others(sums.layout, update))
    sizes = spread(lambda chunk, _: _sizes(chunk, sums.clip), _chunks(sums, update))
    norm = math.sqrt(sum(squared for _, squared in sizes))
    if norm > sums.clip * (1 + SLACK):
        raise WireError(f"its norm is {norm:.6g}, and the plan allows {sums.clip:.6g} (clip).")
    reaches = [examples * largest for largest, _ in sizes]
    reach = max(reaches, default=0.0)
    if reach > REACH:
        raise WireError(f"examples times the largest delta is {reach:.3g}, over the limit of {REACH:.3g}.")
    if sums.reach + reach > SUM_REACH or sums.examples + examples > EXAMPLES_MAX:
        raise WireError("the round's sum would leave its grid: lower the examples or the size of the deltas.")
    if any(segment.dtype == "bool" and values.view(np.uint8).max() > 1 for segment, values in others):
        raise WireError("the update holds a boolean that is neither 0 nor 1.")

    def fold(item: tuple[list[Run], float], seat: int) -> None:
        for run in item[0]:
            _fold(sums, run, examples, bound=item[1], seat=seat)

    spread(fold, zip(_chunks(sums, update), reaches, strict=True))
    for segment, values in others:
        before = sums.largest.get(segment.start)
        sums.largest[segment.start] = values.copy() if before is None else np.maximum(before, values)
    sums.examples += examples
    sums.updates += 1
    sums.reach += reach


def finish_mean(sums: Sums, weights: memoryview, put: Put, *, spread: Spread = alone) -> None:
    """The next version: `weights + Σ examples·delta / Σ examples` for floats, the largest value for the rest.

    Under a veil it is what `privacy.py` says.

    FedAvg (McMahan et al. 2017, arXiv 1602.05629, algorithm 1) with deltas in place of weights. The mean is taken
    once, in float64, and rounded once to the tensor's dtype; a float16 is at most the largest there is.

    Args:
        sums: what was added up; in the form of one limb, or two, afterwards.
        weights: the version before.
        put: is given the next version's bytes.
        spread: who does the work, chunk by chunk.

    Raises:
        WireError: the result is not finite in the tensor's dtype.
    """
    assert sums.updates > 0 or sums.veil
    for segment in sums.layout.segments:
        if segment.dtype not in FLOATS:
            found = None if sums.veil else sums.largest.get(segment.start)  # what is private does not say
            old = weights[segment.start : segment.stop]
            put(segment.start, old if found is None else found.view(np.uint8).data)

    def take(places: list[Piece], seat: int) -> None:
        for place in places:
            put(place.ours.start, _next(sums, weights, place, seat=seat))

    spread(take, _together(pieces(sums.layout, sums.layout), lambda place: place.at))


def _next(sums: Sums, weights: memoryview, place: Piece, *, seat: int) -> memoryview:
    """The next version of floats within one chunk, in memory that the seat's next call uses again."""
    old, dtype = look(weights, place.ours), place.ours.dtype
    mean = _mean(sums, slice(place.at, place.stop), seat=seat)
    y = sums.y[seat]
    mean += as_float64(old, dtype, out=y[: len(old)])
    after = from_float64(saturated(mean, dtype), dtype, out=y.view(old.dtype)[: len(old)])
    if not are_finite(after, dtype):
        raise WireError(f"the mean does not fit into {dtype}: the model has diverged.")
    return after.view(np.uint8).data


def _chunks(sums: Sums, update: memoryview) -> Iterator[list[Run]]:
    """The update's runs, those of one chunk together: whoever has a chunk has it alone."""
    return _together(sums.fmt.runs(sums.layout, update), _first)


def _together(items: Iterable[_Item], first: Callable[[_Item], int]) -> Iterator[list[_Item]]:
    """Items, whose first float `first` tells, by chunks."""
    numbered = ((first(item) // CHUNK_ITEMS, item) for item in items)
    return ([item for _, item in those] for _, those in groupby(numbered, itemgetter(0)))


def _first(run: Run) -> int:
    return int(run.where.start if isinstance(run.where, slice) else run.where[0])


def _sizes(runs: list[Run], clip: float) -> tuple[float, float]:
    """The largest |delta|, and, if there is a clip, the sum of their squares: one look while they are in the cache.

    Raises:
        WireError: one is not finite.
    """
    largest = 0.0
    for _, values in runs:
        here = max(float(values.max()), -float(values.min()))  # NaN anywhere makes both of them NaN
        if not math.isfinite(here):
            raise WireError("the update holds NaN or infinity: training has diverged there.")
        largest = max(largest, here)
    return largest, squares(runs) if clip else 0.0


def _fold(sums: Sums, run: Run, examples: int, *, bound: float, seat: int) -> None:
    """Add the contributions of one run, none of which is larger than `bound`."""
    where, values = run
    chunk = _first(run) // CHUNK_ITEMS
    split = bound > LOW_REACH / 2
    _make_room(sums, chunk, 0.5 if split else bound, seat=seat)
    x = sums.x[seat][: len(values)]
    np.copyto(x, values)
    x *= examples * ONE  # a power of two changes no digit: rounded, if at all, like examples · delta itself
    if split:
        _high(sums, chunk)
        whole = sums.y[seat][: len(values)]
        np.multiply(x, 1 / ONE, out=whole)
        np.rint(whole, out=whole)
        _add_whole(sums.high, where, whole)
        whole *= ONE
        x -= whole  # exact, and even steps were taken off: it rounds as it would have
    np.rint(x, out=x)
    _add_whole(sums.low, where, x)


def _add_whole(limb: NDArray[np.int64], where: slice | NDArray[np.int64], x: NDArray[np.float64]) -> None:
    """Add whole numbers, given as floats."""
    if isinstance(where, slice):
        part = limb[where]
        np.add(part, x, out=part, dtype=np.int64, casting="unsafe")  # faster than a cast and an addition
    else:
        limb[where] += x.astype(np.int64)  # no index comes twice


def part_of(chunk: int) -> slice:
    """A chunk's floats."""
    return slice(chunk * CHUNK_ITEMS, (chunk + 1) * CHUNK_ITEMS)


def _make_room(sums: Sums, chunk: int, grows: float, *, seat: int) -> None:
    """See to it that the chunk's low limb can grow by so many ones."""
    if chunk not in sums.bounds:
        sums.low[part_of(chunk)] = 0
        sums.bounds[chunk] = 0.0
    if sums.bounds[chunk] + grows > LOW_REACH:
        _carry(sums, chunk, seat=seat)
    sums.bounds[chunk] += grows


def _high(sums: Sums, chunk: int) -> NDArray[np.int64]:
    """The chunk's high limb, which counts from now on."""
    high = sums.high[part_of(chunk)]
    if chunk not in sums.carried:
        high[:] = 0
        sums.carried.add(chunk)
    return high


def _carry(sums: Sums, chunk: int, *, seat: int) -> None:
    """Bring the chunk's low limb back within ±2^51, its whole part into the high one: one form for one sum."""
    high, low = _high(sums, chunk), sums.low[part_of(chunk)]
    carry = sums.y[seat].view(np.int64)[: len(low)]
    np.add(low, 1 << (LOW_BITS - 1), out=carry)
    carry >>= LOW_BITS
    high += carry
    carry <<= LOW_BITS
    low -= carry
    sums.bounds[chunk] = 0.5


def _mean(sums: Sums, where: slice, *, seat: int) -> NDArray[np.float64]:
    """Σ examples·delta / Σ examples of floats within one chunk, in memory that the seat's next call uses again."""
    chunk = where.start // CHUNK_ITEMS
    _make_room(sums, chunk, 0.0, seat=seat)
    mean = sums.x[seat][: where.stop - where.start]
    if chunk in sums.carried:
        _carry(sums, chunk, seat=seat)
    np.copyto(mean, sums.low[where])
    if chunk in sums.carried:
        high = sums.y[seat][: len(mean)]
        np.copyto(high, sums.high[where])
        high *= ONE
        mean += high
    if sums.veil:
        mean /= ONE
        sums.veil.cover(mean, where.start)
    else:
        mean /= sums.examples * sums.steps
    return mean


def digest(sums: Sums) -> bytes:
    """What tells these sums of floats from any other; the same ones, added in another order, may have another."""
    found = sha256()
    for chunk in sorted(sums.bounds):
        found.update(chunk.to_bytes(8, "big") + bytes([chunk in sums.carried]))
        found.update(sums.low[part_of(chunk)].data)
        if chunk in sums.carried:
            found.update(sums.high[part_of(chunk)].data)
    return found.digest()


MEAN = Rule(Sums, add_weighted, finish_mean)
"""The mean weighted by examples."""
RULES = {"mean": MEAN}
