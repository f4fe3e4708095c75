"""Named tensors as one run of bytes, described by a small checked header.

Knows names, dtypes, shapes and where each tensor lies. Does not know torch: bytes are looked at through numpy, so
the coordinator needs none; `workers/weights.py` turns a module into these bytes and back.

The order is canonical: by dtype, larger items first, then by name. So every tensor is aligned without padding, equal
dtypes lie side by side, and two parties with the same tensors agree on every offset without telling each other. It is
the order in which safetensors writes a file, so that a version's file holds these bytes as they are.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray

from broker.errors import WireError
from broker.fields import check_for

# name on the wire → bytes an item, in canonical order: sizes must not grow, or tensors would not be aligned.
# numpy has no bfloat16: it is seen as uint16 and widened by `as_float64`.
ITEM_BYTES = {
    "int64": 8, "float64": 8, "float32": 4, "int32": 4, "bfloat16": 2, "float16": 2, "int16": 2,
    "int8": 1, "uint8": 1, "bool": 1,
}  # fmt: skip
_RANK = {dtype: rank for rank, dtype in enumerate(ITEM_BYTES)}
FLOATS = frozenset({"float64", "float32", "float16", "bfloat16"})
TENSORS_MAX = 20_000
NAME_LENGTH_MAX = 512
NAME = re.compile(rf"(?!__metadata__\Z)[^\ud800-\udfff]{{1,{NAME_LENGTH_MAX}}}")  # which safetensors can write
DIMENSIONS_MAX = 16
PAYLOAD_BYTES_MAX = 1 << 40


_FLOAT16_MAX = 65504.0


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor's description: its name in the state dict, its dtype's name, its shape (empty: a scalar)."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def items(self) -> int:
        """How many numbers the tensor holds; 1 for a scalar, 0 when a dimension is 0."""
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        """Bytes of the raw tensor."""
        return self.items * ITEM_BYTES[self.dtype]

    def __str__(self) -> str:
        return f"{self.name} {self.dtype}{list(self.shape)}"


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch `[start, stop)` of the bytes in which all items have one dtype."""

    dtype: str
    start: int
    stop: int


@dataclass(frozen=True)
class Layout:
    """Where each tensor lies in a payload. `specs` must be in canonical order: see `Layout.of`."""

    specs: tuple[TensorSpec, ...]

    @classmethod
    def of(cls, specs: Iterable[TensorSpec]) -> "Layout":
        """The layout of these tensors, put in canonical order and checked.

        Raises:
            WireError: an unknown dtype, a repeated name, a negative dimension, too many or too large tensors.
        """
        layout = cls(tuple(sorted(specs, key=_canonical)))
        layout.check()
        return layout

    def check(self) -> None:
        """Refuse a layout that a stranger sent and that does not keep the rules.

        Raises:
            WireError: as for `of`, and when the tensors are not in canonical order.
        """
        if len(self.specs) > TENSORS_MAX:
            raise WireError(f"a payload of {len(self.specs)} tensors is over the limit of {TENSORS_MAX}.")
        for spec in self.specs:
            _check_spec(spec)
        keys = [_canonical(spec) for spec in self.specs]
        if len({spec.name for spec in self.specs}) != len(keys):
            raise WireError("two tensors of one payload have the same name.")
        if keys != sorted(keys):
            raise WireError("the tensors of a payload are not in canonical order.")
        if self.size_bytes > PAYLOAD_BYTES_MAX:
            raise WireError(f"a payload of {self.size_bytes} bytes is over the limit of {PAYLOAD_BYTES_MAX}.")

    @cached_property
    def size_bytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(spec.size_bytes for spec in self.specs)

    @cached_property
    def offsets(self) -> dict[str, int]:
        """Name of each tensor → its first byte."""
        offsets, at = {}, 0
        for spec in self.specs:
            offsets[spec.name] = at
            at += spec.size_bytes
        return offsets

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """The payload as stretches of one dtype each, in order, without gaps; none is empty."""
        segments: list[Segment] = []
        at = 0
        for spec in self.specs:
            stop = at + spec.size_bytes
            if segments and segments[-1].dtype == spec.dtype:
                segments[-1] = Segment(spec.dtype, segments[-1].start, stop)
            elif stop > at:
                segments.append(Segment(spec.dtype, at, stop))
            at = stop
        return tuple(segments)

    def difference(self, other: "Layout") -> str:
        """In words, the first way in which `other` differs from this layout; empty when they are equal."""
        if self.specs == other.specs:
            return ""
        mine, theirs = ({s.name: s for s in layout.specs} for layout in (self, other))
        for name, spec in mine.items():
            if name not in theirs:
                return f"{spec} is missing"
            if theirs[name] != spec:
                return f"{theirs[name]} should be {spec}"
        return f"{next(s for n, s in theirs.items() if n not in mine)} is not part of the model"


def described(value: Any, where: str) -> tuple[TensorSpec, ...]:
    """The tensors that a stranger's message describes, all that keep the rules; checked once, and one tuple.

    For a thousand workers say the same of a thousand tensors, round after round.

    Raises:
        WireError: as for `Layout.of`, they are not in canonical order, or are no descriptions; `where` is named.
    """
    try:
        return _described(msgpack.packb(value), where)
    except ValueError:  # msgpack's, which can read what is nested deeper than it can write
        raise WireError(f"{where} is nested too deep.") from None


@lru_cache(maxsize=4)
def _described(packed: bytes, where: str) -> tuple[TensorSpec, ...]:
    specs: tuple[TensorSpec, ...] = check_for(tuple[TensorSpec, ...])(msgpack.unpackb(packed), where)
    Layout(specs).check()
    return specs


def _canonical(spec: TensorSpec) -> tuple[int, str]:
    return _RANK.get(spec.dtype, len(_RANK)), spec.name


def _check_spec(spec: TensorSpec) -> None:
    if spec.dtype not in ITEM_BYTES:
        raise WireError(f"tensor {spec.name[:80]!r} is {spec.dtype[:40]!r}, which does not travel: take float32.")
    if NAME.fullmatch(spec.name) is None:
        raise WireError(f"a tensor's name must have 1 to {NAME_LENGTH_MAX} characters, and not be __metadata__.")
    if len(spec.shape) > DIMENSIONS_MAX or any(not 0 <= n <= PAYLOAD_BYTES_MAX for n in spec.shape):
        raise WireError(f"tensor {spec.name[:80]!r} has an impossible shape.")


def view(data: memoryview | bytes | bytearray, dtype: str) -> NDArray[np.generic]:
    """The items of raw bytes as a flat array without a copy; bfloat16 is seen as uint16.

    Writable where `data` is.
    """
    return np.frombuffer(data, np.uint16 if dtype == "bfloat16" else np.dtype(dtype))


def as_float64(
    raw: NDArray[np.generic], dtype: str, *, out: NDArray[np.float64] | None = None
) -> NDArray[np.float64]:
    """The values of `view(…, dtype)`, exact for all four float dtypes, in `out` or else in a new array."""
    wide = np.empty(raw.shape) if out is None else out
    with np.errstate(invalid="ignore"):  # some NaNs complain of being widened; they stay NaN
        # a bfloat16 is the upper half of a float32
        np.copyto(wide, (raw.astype(np.uint32) << 16).view(np.float32) if dtype == "bfloat16" else raw)
    return wide


def are_finite(raw: NDArray[np.generic], dtype: str) -> bool:
    """Whether the values of `view(…, dtype)` are all finite."""
    if dtype == "bfloat16":
        return bool(((raw.view(np.uint16) & 0x7F80) != 0x7F80).all())  # an exponent of ones: infinite or NaN
    return bool(np.isfinite(raw).all())


def saturated(values: NDArray[np.float64], dtype: str) -> NDArray[np.float64]:
    """Values brought within the largest that `dtype` has, where one hostile update can take weights beyond: float16.

    An infinite weight would end every round in which somebody sends it; the largest is as bad, and no worse.
    """
    return np.clip(values, -_FLOAT16_MAX, _FLOAT16_MAX) if dtype == "float16" else values


def from_float64(
    values: NDArray[np.float64], dtype: str, *, out: NDArray[np.generic] | None = None
) -> NDArray[np.generic]:
    """Values rounded to `dtype`, to nearest, ties to even, in `out` or else in a new array; bfloat16 as uint16.

    A value too large for the dtype becomes infinite, which the caller must look for.
    """
    rounded = np.empty(values.shape, np.uint16 if dtype == "bfloat16" else np.dtype(dtype)) if out is None else out
    with np.errstate(over="ignore"):
        if dtype != "bfloat16":
            np.copyto(rounded, values, casting="same_kind")
            return rounded
        narrow = values.astype(np.float32)
    # rounding twice (float64 → float32 → bfloat16) differs from rounding once only on a tie that the first
    # rounding made; it is the same on every machine, which is what a version needs
    bits = narrow.view(np.uint32)
    rounded[...] = np.where(np.isnan(narrow), 0x7FC0, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)
    return rounded
