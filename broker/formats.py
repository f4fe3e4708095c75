"""How an update is written on the wire: formats, as records of functions.

Knows bytes and arithmetic; the same input gives the same bits on every machine. Does not know who sends, where a
worker keeps its residual, nor how updates are added up.

| format   | how a float travels                                               | bytes, of float32's |
|----------|-------------------------------------------------------------------|---------------------|
| float32  | as it is, in its tensor's own dtype                               | 1                   |
| bfloat16 | rounded to bfloat16; those of 16-bit tensors as they are          | 0.5                 |
| int8     | a code times the scale of its block, rounded up or down by dice   | 0.251               |
| top-k    | index and value, of the largest only; the others count as zero    | 2 · keep            |

Integers and booleans are values, not deltas, and travel as they are, under their own names, in every format.

A payload has an ordinary layout that follows from the model's, so a receiver knows the one right layout before it
reads a byte. What is inside is not trusted: `runs` refuses scales and indices that lie; that decoded values are
finite is checked by whoever adds them (`coordinator/aggregation.py`, `broker/changes.py`).

Error feedback (Seide et al. 2014; Karimireddy et al. 2019, arXiv 1901.09847): what a format took from an update is
kept by its worker and added to the next, x = delta + residual, residual' = x − decoded(x). The sum of all that was
decoded and the last residual are the sum of all deltas: nothing is lost, only late.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from broker.errors import UsageError, WireError
from broker.pieces import CHUNK_ITEMS as CHUNK_ITEMS  # noqa: PLC0414 (no run crosses a multiple of it)
from broker.pieces import Items, Piece, cut, look, pieces, shared
from broker.tensors import FLOATS, Layout, Segment, TensorSpec

BLOCK_ITEMS = 1024
"""Most floats that share a scale in int8; a divisor of CHUNK_ITEMS."""
VALUE_MAX = 2.0**126
"""Largest |delta + residual| that a lossy format takes: its decoded value is finite in float32 and bfloat16."""
KEEP = 0.01
"""The part of its floats that top-k sends, unless the plan says another."""

_CODE_MAX = 127
_SCALE_MAX = 2.0**120  # a little above VALUE_MAX / _CODE_MAX; 128 times that is finite
_RESERVED = "~"  # begins the names of tensors that are a format's own
_SCALES, _CODES, _INDICES, _VALUES = "~scales", "~codes", "~indices", "~values"
_INT32_ITEMS_MAX = 2**31

Floats32 = NDArray[np.float32]


class Run(NamedTuple):
    """A stretch of decoded deltas; never empty.

    `where` is which floats they belong to, counted over all floats of the model in the layout's order: a slice or
    increasing indices, which cross neither a multiple of CHUNK_ITEMS nor the border between two dtypes of the model.
    `values` are float32, or float64 where a float64 tensor travels as it is.
    """

    where: slice | NDArray[np.int64]
    values: NDArray[np.floating]


class Pack(Protocol):
    """The payload that carries an update, in the places of `Format.layout(model)`; the delta itself if it is that.

    Args:
        model: the model's layout.
        delta: raw bytes in its places: deltas for floats, values for integers and booleans.
        residual: what this worker's updates have left out so far, an item for each float of the model
            (`count_floats`), zeros at first. **Changed in place** to what is left out now. None: no feedback.
            Formats that are not lossy leave it alone.
        dice: for stochastic rounding. The same dice give the same bytes, whichever version of numpy throws them.
        into: where to write, exactly as long as the payload; new memory unless given.

    Raises:
        WireError: NaN, infinity or a value beyond VALUE_MAX, in a lossy format; `residual` and `into` are half
            changed then.
        UsageError: a tensor's name is one that the format needs.
    """

    def __call__(
        self, model: Layout, delta: memoryview, *, residual: Floats32 | None,
        dice: np.random.Generator, into: memoryview | None = None,
    ) -> memoryview:  # fmt: skip
        """See above."""


class Format(NamedTuple):
    """A way to write an update.

    Attributes:
        lossy: whether `pack` wants a residual.
        layout: the model's layout → the payload's; UsageError when a tensor's name is one that the format needs.
        runs: (model's layout, payload) → all deltas, decoded chunk by chunk, in increasing order; floats in no run
            are zero. WireError before the first run if scales or indices lie.
        others: (model's layout, payload) → the model's segments of integers and booleans, with views of their values.
        pack: see `Pack`.
    """

    lossy: bool
    layout: Callable[[Layout], Layout]
    runs: Callable[[Layout, memoryview], Iterator[Run]]
    others: Callable[[Layout, memoryview], Iterator[tuple[Segment, Items]]]
    pack: Pack


class _Job(NamedTuple):
    """What `Pack` was given, and the payload in which to write the floats."""

    model: Layout
    delta: memoryview
    residual: Floats32 | None
    dice: np.random.Generator
    payload: Layout
    data: memoryview


def count_floats(model: Layout) -> int:
    """How many floats the model has: the length of a residual."""
    return sum(spec.items for spec in model.specs if spec.dtype in FLOATS)


def _format(
    layout: Callable[[Layout], Layout],
    runs: Callable[[Layout, Layout, memoryview], Iterator[Run]],
    write: Callable[[_Job], None],
    *,
    lossy: bool = True,
) -> Format:
    """The format whose payloads lie as `layout` says, are read by `runs` and written by `write`."""

    def pack(
        model: Layout, delta: memoryview, *, residual: Floats32 | None,
        dice: np.random.Generator, into: memoryview | None = None,
    ) -> memoryview:  # fmt: skip
        payload = layout(model)
        if payload is model and into is None:
            return delta
        data = memoryview(bytearray(payload.size_bytes)) if into is None else into
        assert (len(delta), len(data)) == (model.size_bytes, payload.size_bytes)
        assert residual is None or len(residual) == count_floats(model)
        for ours, theirs in shared(model, payload):
            if ours.dtype not in FLOATS:
                data[theirs.start : theirs.stop] = delta[ours.start : ours.stop]
        write(_Job(model, delta, residual, dice, payload, data))
        return data

    def others(model: Layout, data: memoryview) -> Iterator[tuple[Segment, Items]]:
        for ours, theirs in shared(model, layout(model)):
            if ours.dtype not in FLOATS:
                yield ours, look(data, theirs)

    return Format(lossy, layout, lambda model, data: runs(model, layout(model), data), others, pack)


def _own(payload: Layout, data: memoryview, name: str) -> Items:
    """A tensor of the format's own, flat."""
    spec = next(spec for spec in payload.specs if spec.name == name)
    return look(data, cut(Segment(spec.dtype, payload.offsets[name], 0), 0, spec.items))


def _beside_others(model: Layout, own: list[TensorSpec]) -> Layout:
    """The layout of a payload of the format's own tensors and the model's integers and booleans."""
    for spec in model.specs:
        if spec.name.startswith(_RESERVED):
            raise UsageError(
                f"the model's tensor {spec.name!r} is named like the tensors of the formats int8 and top-k, which "
                f"begin with {_RESERVED!r}: rename it in the learner, or choose another format in the plan."
            )
    return Layout.of([*own, *(spec for spec in model.specs if spec.dtype not in FLOATS)])


# -- as they are, and bfloat16 --------------------------------------------------------------------------------------


def _halved(model: Layout) -> Layout:
    """The model's tensors with bfloat16 in place of what is wider."""
    return Layout.of(
        TensorSpec(spec.name, "bfloat16", spec.shape) if spec.dtype in ("float64", "float32") else spec
        for spec in model.specs
    )


def _runs_plain(model: Layout, payload: Layout, data: memoryview) -> Iterator[Run]:
    for at, stop, _, theirs in pieces(model, payload):
        raw = look(data, theirs)
        plain = raw.view(np.float64) if theirs.dtype == "float64" else _as_float32(raw, theirs.dtype)
        yield Run(slice(at, stop), plain)


def _write_plain(job: _Job) -> None:
    for piece in pieces(job.model, job.payload):
        ours, theirs = piece.ours, piece.theirs
        if ours.dtype == theirs.dtype:
            job.data[theirs.start : theirs.stop] = job.delta[ours.start : ours.stop]
            continue
        x = _owed(job, piece)
        _check(np.abs(x))
        bits = x.view(np.uint32)
        rounded = ((bits >> 16) & 1) + 0x7FFF  # to nearest, ties to even; x is finite, so nothing overflows
        rounded += bits
        rounded &= 0xFFFF0000
        look(job.data, theirs)[:] = rounded >> 16
        _leave(job, piece, x, rounded.view(np.float32))


def _as_float32(raw: Items, dtype: str) -> Floats32:
    """The items of `view(…, dtype)`: exact but for float64; a view of what is float32 already."""
    if dtype == "bfloat16":  # the upper half of a float32
        return (raw.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # `_check` finds what is too large
        return raw.astype(np.float32, copy=False)


def _owed(job: _Job, piece: Piece) -> Floats32:
    """What a piece is to tell, x = delta + residual, in float32."""
    x = _as_float32(look(job.delta, piece.ours), piece.ours.dtype)
    if job.residual is None:
        return x
    with np.errstate(over="ignore", invalid="ignore"):  # `_check` looks
        summed: Floats32 = x + job.residual[piece.at : piece.stop]
    return summed


def _check(sizes: Floats32) -> None:
    """Refuse |x| that no lossy format carries."""
    if not sizes.max() <= VALUE_MAX:  # NaN is not, either
        raise WireError(
            f"the update holds NaN, infinity or values beyond {VALUE_MAX:.2g}, which only the format float32 would "
            "carry: training has diverged there."
        )


def _leave(job: _Job, piece: Piece, x: Floats32, decoded: Floats32) -> None:
    """Keep residual' = x − decoded."""
    if job.residual is not None:
        np.subtract(x, decoded, out=job.residual[piece.at : piece.stop])


# -- int8: a code for each float, a scale for each block ------------------------------------------------------------


def _borders(model: Layout) -> NDArray[np.int64]:
    """The first float of each block, and the end of the last.

    A block ends at every multiple of BLOCK_ITEMS and with its tensor: a bias must not share the scale of a
    BatchNorm's variance, which may move a million times as far.
    """
    lengths = [spec.items for spec in model.specs if spec.dtype in FLOATS]
    ends = np.cumsum([0, *lengths])
    return np.union1d(np.arange(0, ends[-1], BLOCK_ITEMS), ends).astype(np.int64)


def _layout_int8(model: Layout) -> Layout:
    scales = TensorSpec(_SCALES, "float32", (len(_borders(model)) - 1,))
    return _beside_others(model, [scales, TensorSpec(_CODES, "int8", (count_floats(model),))])


def _runs_int8(model: Layout, payload: Layout, data: memoryview) -> Iterator[Run]:
    scales = _own(payload, data, _SCALES).view(np.float32)
    codes = _own(payload, data, _CODES).view(np.int8)
    if len(scales) and not (scales.min() >= 0 and scales.max() <= _SCALE_MAX):  # NaN anywhere makes both of them NaN
        raise WireError(f"an int8 payload has a scale that is not within 0 and {_SCALE_MAX:.2g}.")
    borders = _borders(model)
    for at, stop, _, _ in pieces(model, model):
        first, last = np.searchsorted(borders, (at, stop))
        lengths = np.diff(borders[first : last + 1])
        yield Run(slice(at, stop), _decoded(codes[at:stop], np.repeat(scales[first:last], lengths)))


def _write_int8(job: _Job) -> None:
    scales = _own(job.payload, job.data, _SCALES).view(np.float32)
    codes = _own(job.payload, job.data, _CODES).view(np.int8)
    borders = _borders(job.model)
    for piece in pieces(job.model, job.model):
        x = _owed(job, piece)
        first, last = np.searchsorted(borders, (piece.at, piece.stop))
        largest = np.maximum.reduceat(np.abs(x), borders[first:last] - piece.at)
        _check(largest)
        # rounded up, so that no x / scale is beyond ±127; of a block of denormals, too, it is above 0
        here = np.where(largest > 0, np.nextafter(largest / np.float32(_CODE_MAX), np.float32(np.inf)), np.float32(0))
        scales[first:last] = here
        # any divisor will do for a block of zeros
        spread = np.repeat(np.where(here > 0, here, np.float32(1)), np.diff(borders[first : last + 1]))
        codes[piece.at : piece.stop] = _rounded(x / spread, job.dice)
        _leave(job, piece, x, _decoded(codes[piece.at : piece.stop], spread))


def _rounded(x: Floats32, dice: np.random.Generator) -> Floats32:
    """⌊x + u⌋ with u uniform in (0, 1): each x is rounded up as often as makes the mean x.

    u is one of the 2^16 numbers (n + 1/2) / 2^16, so the mean is right to 2^-17, and ±127 stays what it is. It is
    made of raw bits, because numpy promises them to stay the same, but not what its other methods make of them.
    """
    throws = dice.bit_generator.random_raw(-(-len(x) // 4)).view(np.uint16)[: len(x)]
    u = throws.astype(np.float32)
    u += np.float32(0.5)
    u *= np.float32(2.0**-16)
    u += x
    return np.floor(u, out=u)


def _decoded(codes: NDArray[np.int8], scales: Floats32) -> Floats32:
    """float32(scale · code): this, on both sides, is what a code means."""
    return codes.astype(np.float32) * scales


# -- top-k: the largest, by index -----------------------------------------------------------------------------------


def top_k(keep: float) -> Format:
    """Only the `max(1, ⌈keep · floats⌉)` floats with the largest |x| travel; `keep` is above 0 and at most 1.

    Of equal ones, those that come first in the model.
    """
    assert 0 < keep <= 1
    return _format(partial(_layout_top_k, keep), _runs_top_k, _write_top_k)


def _layout_top_k(keep: float, model: Layout) -> Layout:
    floats = count_floats(model)
    k = min(floats, max(1, math.ceil(keep * floats)))
    indices = TensorSpec(_INDICES, "int32" if floats <= _INT32_ITEMS_MAX else "int64", (k,))
    return _beside_others(model, [indices, TensorSpec(_VALUES, "float32", (k,))])


def _runs_top_k(model: Layout, payload: Layout, data: memoryview) -> Iterator[Run]:
    indices = _own(payload, data, _INDICES).astype(np.int64)
    values = _own(payload, data, _VALUES).view(np.float32)
    if len(indices) and not (indices[0] >= 0 and indices[-1] < count_floats(model) and (np.diff(indices) > 0).all()):
        raise WireError("a top-k payload has indices that are not increasing, or are outside of the model.")
    stops = [piece.stop for piece in pieces(model, model)]
    first = 0
    for last in np.searchsorted(indices, stops):
        if first < last:
            yield Run(indices[first:last], values[first:last])
        first = last


def _write_top_k(job: _Job) -> None:
    x = np.empty(count_floats(job.model), np.float32) if job.residual is None else job.residual
    for piece in pieces(job.model, job.model):
        x[piece.at : piece.stop] = _owed(job, piece)
    values = _own(job.payload, job.data, _VALUES).view(np.float32)
    if not len(values):
        return
    sizes = np.abs(x)
    _check(sizes)
    sizes.partition(len(x) - len(values))
    least = sizes[len(x) - len(values)]
    np.abs(x, out=sizes)
    above = np.flatnonzero(sizes > least)
    equal = np.flatnonzero(sizes == least)[: len(values) - len(above)]
    chosen = np.sort(np.concatenate([above, equal]))
    _own(job.payload, job.data, _INDICES)[:] = chosen
    values[:] = x[chosen]
    x[chosen] = 0


FORMATS: Mapping[str, Format] = {
    "float32": _format(lambda model: model, _runs_plain, _write_plain, lossy=False),
    "bfloat16": _format(_halved, _runs_plain, _write_plain),
    "int8": _format(_layout_int8, _runs_int8, _write_int8),
    "top-k": top_k(KEEP),
}
"""What a plan's `format` may name."""


def format_of(name: str, *, keep: float | None = None) -> Format:
    """The format of a plan or a task: one of FORMATS; `keep` is the part that top-k sends, unless KEEP."""
    return top_k(keep) if name == "top-k" and keep is not None else FORMATS[name]
