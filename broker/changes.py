"""The way down of a change: from the version before to the next, in one of the formats in which updates travel.

Knows how the coordinator makes a version from its change, and how a worker makes the same one. Does not know who has
which version, nor that a version can also be sent whole.

There is no error feedback here: a residual would be a state that no version shows, to be kept through every restart.
Instead the coordinator takes what it has encoded at its word. The next version *is* old + decoded, so whoever applies
the change to the version before has the next to the last bit. What rounding does to a change is nothing in the mean
with int8, and at most 2^-9 of each float's own change with bfloat16.
"""

import numpy as np

from broker.errors import WireError
from broker.formats import Format
from broker.pieces import look, pieces
from broker.tensors import Layout, as_float64, from_float64, saturated


def encode_change(
    old: memoryview, new: memoryview, layout: Layout, fmt: Format, dice: np.random.Generator
) -> memoryview:
    """The change from `old` to `new` as a payload, and in `new` the version that it leads to.

    The difference is taken in float64 and rounded once to the tensor's dtype.

    Args:
        old: the version before: raw weights in the layout's places.
        new: the exact next version; **overwritten** with old + decoded, which is the version to save and announce.
        layout: the model's.
        fmt: how to write it: float32, bfloat16 or int8.
        dice: for stochastic rounding.

    Raises:
        WireError: the change or what it leads to is not finite: the model has diverged. `new` is spoilt then.
        UsageError: a tensor's name is one that the format needs.
    """
    for _, _, place, _ in pieces(layout, layout):
        before, after = look(old, place), look(new, place)
        if place.dtype == "float32":  # rounds as by way of float64 (Figueroa 1995), several times faster
            with np.errstate(over="ignore", invalid="ignore"):
                np.subtract(after, before, out=after)
        else:
            change = as_float64(after, place.dtype) - as_float64(before, place.dtype)
            after[:] = from_float64(saturated(change, place.dtype), place.dtype)
    encoded = memoryview(bytearray(fmt.layout(layout).size_bytes))
    fmt.pack(layout, new, residual=None, dice=dice, into=encoded)
    apply_change(old, encoded, layout, fmt, new)
    return encoded


def apply_change(old: memoryview, encoded: memoryview, layout: Layout, fmt: Format, target: memoryview) -> None:
    """Write old + decoded, in float64, rounded once to the tensor's dtype: the same bits on both sides.

    Integers and booleans are the payload's.

    Args:
        old: raw weights in the layout's places.
        encoded: what `encode_change` made.
        layout: the model's.
        fmt: how it is written.
        target: where the next version is written; may be `old` itself.

    Raises:
        WireError: scales that lie, or weights that are not finite; `target` is half written then.
    """
    for (at, stop, place, _), run in zip(pieces(layout, layout), fmt.runs(layout, encoded), strict=True):
        assert run.where == slice(at, stop), "only formats that tell every float can change a version"
        before, after = look(old, place), look(target, place)
        with np.errstate(over="ignore", invalid="ignore"):
            if place.dtype == "float32" == run.values.dtype:  # as above
                np.add(before, run.values, out=after)
            else:
                wide = as_float64(before, place.dtype) + run.values
                after[:] = from_float64(saturated(wide, place.dtype), place.dtype)
            finite = np.isfinite(after if place.dtype == "float32" else as_float64(after, place.dtype)).all()
        if not finite:
            raise WireError("a change leads to weights that are not finite: the model has diverged.")
    for segment, values in fmt.others(layout, encoded):
        look(target, segment)[:] = values
