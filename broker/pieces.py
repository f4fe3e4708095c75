"""Where the same tensors lie in two layouts, piece by piece: in a model's, and in that of a payload made from it.

Knows names, dtypes and places. Does not know what the floats mean, nor how one layout was made from the other.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from broker.tensors import FLOATS, ITEM_BYTES, Layout, Segment, view

CHUNK_ITEMS = 128 * 1024
"""No piece crosses a multiple of this: its temporaries stay in the cache, and those of many updates meet."""

Items = NDArray[np.generic]


class Piece(NamedTuple):
    """Floats `at` to `stop` of the model: where they lie in its bytes, and where in the payload's."""

    at: int
    stop: int
    ours: Segment
    theirs: Segment


def pieces(model: Layout, payload: Layout) -> Iterator[Piece]:
    """All floats that travel under their own names, cut where a run must not go on."""
    first = 0
    for ours, theirs in shared(model, payload):
        if ours.dtype not in FLOATS:
            continue
        at, end = first, first + (ours.stop - ours.start) // ITEM_BYTES[ours.dtype]
        while at < end:
            stop = min(end, at - at % CHUNK_ITEMS + CHUNK_ITEMS)
            yield Piece(at, stop, cut(ours, at - first, stop - first), cut(theirs, at - first, stop - first))
            at = stop
        first = end


def shared(model: Layout, payload: Layout) -> Iterator[tuple[Segment, Segment]]:
    """Where the tensors that travel under their own names lie in the model and in the payload, in the model's order.

    Those that are neighbours in both are taken together.
    """
    if payload is model:
        yield from ((segment, segment) for segment in model.segments)
        return
    dtypes = {spec.name: spec.dtype for spec in payload.specs}
    before: tuple[Segment, Segment] | None = None
    for spec in model.specs:
        if spec.name not in dtypes or not spec.items:
            continue
        ours = cut(Segment(spec.dtype, model.offsets[spec.name], 0), 0, spec.items)
        theirs = cut(Segment(dtypes[spec.name], payload.offsets[spec.name], 0), 0, spec.items)
        if before and (before[0].dtype, before[0].stop, before[1].stop) == (ours.dtype, ours.start, theirs.start):
            ours = Segment(ours.dtype, before[0].start, ours.stop)
            theirs = Segment(theirs.dtype, before[1].start, theirs.stop)
        elif before:
            yield before
        before = ours, theirs
    if before:
        yield before


def cut(segment: Segment, first: int, stop: int) -> Segment:
    """Items `first` to `stop` of a segment."""
    width = ITEM_BYTES[segment.dtype]
    return Segment(segment.dtype, segment.start + first * width, segment.start + stop * width)


def look(data: memoryview, segment: Segment) -> Items:
    """A segment's items as a view of `data`; bfloat16 as uint16."""
    return view(data[segment.start : segment.stop], segment.dtype)
