"""Whether a model that was sent to be trained looks like one made for reading rows off its updates.

Pure: knows the received weights as arrays. Does not know the learner; what its tensors are called and how they are
shaped is checked where they are loaded (`weights.py`), and which of them no gradient reaches is told.

An imprint (Fowl et al. 2022, "Robbing the Fed"; `attack.imprinted`) needs a layer whose neurons all look at the same
thing, with thresholds of their own: rows of one weight matrix that point the same way. Rows drawn at random, trained,
or all zero do not.
"""

import math
from collections.abc import Container

import numpy as np

from broker.tensors import FLOATS, Layout, TensorSpec, as_float64, view

ROWS_LOOKED_AT = 256
WIDTH_MIN, WIDTH_MAX = 8, 4096  # of rows; of longer ones the beginning is looked at
DIGITS = 4  # to which two rows' directions agree
SHARE = 8  # of the rows, one in so many may repeat another


def suspicion(layout: Layout, weights: memoryview, *, fixed: Container[str] = ()) -> str:
    """Why the weights (raw bytes in `layout`) should not be trained on; empty if nothing is wrong with them.

    What is `fixed` is not looked at: no gradient of it tells of a row, and masks and filters do repeat themselves.
    """
    looked_at = (spec for spec in layout.specs if spec.dtype in FLOATS and spec.name not in fixed)
    return next(filter(None, (_repeats(spec, layout, weights) for spec in looked_at)), "")


def _repeats(spec: TensorSpec, layout: Layout, weights: memoryview) -> str:
    shape, at = spec.shape, layout.offsets[spec.name]
    width = math.prod(shape[1:]) if len(shape) > 1 else 0
    if width < WIDTH_MIN or shape[0] < 3:
        return ""
    rows = view(weights[at : at + spec.size_bytes], spec.dtype).reshape(shape[0], width)
    chosen = np.unique(np.linspace(0, shape[0] - 1, min(shape[0], ROWS_LOOKED_AT)).astype(int))
    looked = as_float64(rows[chosen, :WIDTH_MAX], spec.dtype)
    looked = looked[np.abs(looked).max(1) > 0]
    lead = looked[np.arange(len(looked)), np.abs(looked).argmax(1)]
    directions = np.round(looked / lead[:, None], DIGITS) + 0.0
    repeated = len(directions) - len(np.unique(directions, axis=0))
    if repeated <= max(2, len(looked) // SHARE):
        return ""
    return (
        f"{repeated} of {len(looked)} rows of {spec.name} point the same way, as in a model made for reading data "
        "off its updates: ask whoever sent it; if the learner's own model() begins so, let it draw them at random."
    )
