"""How far an update moves a model, and how it is kept within a bound: L2 norms of deltas.

Pure. Knows arithmetic on payloads, whatever their format. Does not know who has set a bound, nor what breaks of it.

The norm is over all floats of a model together, ‖Δ‖ = √Σ δ², in float64 over the layout's order; integers and
booleans are values, not deltas, and count for nothing. It says of an update what the clipping of DP-SGD says of a
gradient (Abadi et al. 2016, arXiv 1607.00133, algorithm 1): Δ / max(1, ‖Δ‖ / clip).
"""

import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from broker.formats import Format, Run
from broker.pieces import look, pieces
from broker.tensors import Layout, as_float64, from_float64

CLIP_MIN = 1e-30
"""With a smaller bound float32 has no noise, and float64 cannot count."""
SLACK = 1e-3
"""A receiver allows so much more than the bound: two sides may round a sum of squares differently."""


def squares(runs: Iterable[Run]) -> float:
    """Σ δ² of the deltas in these runs, in float64; infinite where that is beyond it. The same bits each time."""
    with np.errstate(over="ignore"):  # numpy's own sum is pairwise, and does not depend on threads as BLAS's does
        return sum(float(np.square(run.values, dtype=np.float64).sum()) for run in runs)


def clip(fmt: Format, model: Layout, payload: memoryview, most: float) -> float:
    """Scale the floats of an update down until its norm, as it will be decoded, is at most `most`.

    What a format rounds away of a larger update may have made it longer; so this is done with what is written, too.
    In every format decoded deltas are products of the payload's floats: scales, values or the deltas themselves.
    Each is rounded towards zero, so that rounding lengthens nothing. What is taken away is lost, not owed.

    Args:
        fmt: how the payload is written.
        model: the model's layout.
        payload: changed in place where it is too long; deltas must be finite.
        most: above 0.

    Returns:
        The norm that it had.
    """
    norm = math.sqrt(squares(fmt.runs(model, payload)))
    if norm > most:
        layout = fmt.layout(model)
        for piece in pieces(layout, layout):
            items = look(payload, piece.ours)
            _scale(items, piece.ours.dtype, most / norm)
    return norm


def _scale(items: NDArray[np.generic], dtype: str, factor: float) -> None:
    """Multiply items of `view(…, dtype)` in place by a factor below 1, rounding towards zero."""
    exact = as_float64(items, dtype) * factor
    items[:] = from_float64(exact, dtype)
    longer = np.abs(as_float64(items, dtype)) > np.abs(exact)
    # a float's bits, without the sign, count its size in steps
    items.view(f"u{items.itemsize}")[longer] -= 1
