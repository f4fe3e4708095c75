"""A torch module's weights as the raw bytes that travel, and back.

Knows torch's tensors, dtypes and devices, and the canonical layout of `broker/tensors.py`. Does not know files, tasks
or who sent the bytes.

Weights are everything in a module's state dict, so buffers such as BatchNorm's statistics travel too. Bytes are
looked at in place: each tensor is copied once, from the module into the payload or from the payload into the module.
"""

import math
from collections.abc import Iterator, Mapping
from mmap import mmap

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from broker.errors import LearnerFailed, UsageError, WireError
from broker.tensors import FLOATS, ITEM_BYTES, Layout, TensorSpec
from workers.learner import blaming

Raw = bytes | bytearray | memoryview | mmap
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in ITEM_BYTES}
CHUNK_ITEMS = 64 * 1024  # what of two models and a delta stays in a core's cache


def layout_of(model: nn.Module) -> Layout:
    """Where each tensor of the model's state dict lies in a payload.

    Raises:
        UsageError: the state dict cannot be had, or holds something that cannot travel: no tensor, no shape yet, a
            sparse tensor, an exotic dtype (complex, float8, quantised).
    """
    return _layout_of(_state(model))


def _state(model: nn.Module) -> dict[str, Tensor]:
    """The model's state dict, for which its own code may be called."""
    with blaming("state_dict() of the learner's model failed:"):
        return {str(name): tensor for name, tensor in model.state_dict().items()}


def _layout_of(state: Mapping[str, Tensor]) -> Layout:
    specs = []
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise UsageError(f"the model's state {name!r} is a {type(tensor).__name__}, no tensor: make it a buffer.")
        if is_lazy(tensor):
            raise UsageError(f"the model's tensor {name!r} has no shape yet: run one batch through it in model().")
        if tensor.is_meta or tensor.layout != torch.strided:
            kind = "without numbers" if tensor.is_meta else "sparse"
            raise UsageError(f"the model's tensor {name!r} is {kind}, and only dense tensors travel.")
        specs.append(TensorSpec(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)))
    try:
        return Layout.of(specs)
    except WireError as problem:
        raise UsageError(f"the learner's model cannot travel: {problem}") from problem


def read(model: nn.Module, layout: Layout, *, into: Raw | None = None) -> Raw:
    """The model's weights as raw bytes in the order of `layout`, which must be `layout_of(model)`.

    They are written to `into`, exactly as long, or else to new memory.

    Raises:
        UsageError: one is not finite.
    """
    data = bytearray(layout.size_bytes) if into is None else into
    state = _state(model)
    for spec, place in _tensors(layout, data):
        place.copy_(state[spec.name])
        if not torch.isfinite(place).all():
            raise UsageError(
                f"the model's tensor {spec.name!r} has NaN or infinite values, which no mean can hold: give it "
                "others in model(), or, if it is a buffer that never changes, register it with persistent=False."
            )
    return data


def load(model: nn.Module, layout: Layout, data: Raw) -> None:
    """Put the weights in `data`, laid out as `layout`, into the model.

    Raises:
        LearnerFailed: the model has other tensors than `layout`, or the bytes have another length.
    """
    if difference := _difference(layout, _state(model)):
        raise LearnerFailed(
            f"this worker's learner has other tensors than the version: {difference}; "
            "give the worker the learner that the run was made with."
        )
    if len(data) != layout.size_bytes:
        raise LearnerFailed(f"the version has {len(data)} bytes where its tensors need {layout.size_bytes}.")
    model.load_state_dict({spec.name: tensor for spec, tensor in _tensors(layout, data)})


def delta(model: nn.Module, layout: Layout, received: Raw, *, into: Raw | None = None) -> Raw:
    """What training changed, as raw bytes: floats trained − received, integers and booleans the trained value.

    The difference of 16-bit floats is taken in float32 and rounded once.

    Args:
        model: the trained module.
        layout: the tensors of `received`, and of the result.
        received: the weights from which training began.
        into: where to write, exactly as long as `received`; new memory unless given.

    Raises:
        LearnerFailed: the trained weights are not finite, or training changed which tensors the model has.
    """
    state = _state(model)
    if difference := _difference(layout, state):
        raise LearnerFailed(f"train changed which tensors the model has: {difference}; it must keep them.")
    changed = bytearray(layout.size_bytes) if into is None else into
    for (spec, place), (_, before) in zip(_tensors(layout, changed), _tensors(layout, received), strict=True):
        trained = state[spec.name].detach().cpu()
        if spec.dtype not in FLOATS:
            place.copy_(trained)
        elif not _subtract(trained, before, place):
            what = "NaN" if torch.isnan(trained).any() else "infinite values"
            raise LearnerFailed(f"training diverged: tensor {spec.name} has {what}; try a smaller learning rate.")
    return changed


def _difference(layout: Layout, state: Mapping[str, Tensor]) -> str:
    """In words, how the tensors of a model's state dict differ from `layout`; empty when equal."""
    try:
        return layout.difference(_layout_of(state))
    except UsageError as problem:
        return str(problem)


def _subtract(trained: Tensor, before: Tensor, place: Tensor) -> bool:
    """Write trained − before to `place`, a stretch at a time that stays in the cache; whether all of it is finite.

    The sum of a stretch is finite only if every item is, and takes a fraction of the time to look at each.
    """
    items, wide = trained.numel(), torch.promote_types(trained.dtype, torch.float32)
    step = CHUNK_ITEMS if trained.is_contiguous() else max(items, 1)
    trained, before, place = trained.reshape(-1), before.view(-1), place.view(-1)
    for at in range(0, items, step):
        part = slice(at, at + step)
        if wide == trained.dtype:
            torch.sub(trained[part], before[part], out=place[part])
        else:
            place[part] = trained[part].to(wide) - before[part].to(wide)
        # many huge ones can make an infinite sum without being so themselves
        if not math.isfinite(place[part].sum(dtype=wide)) and not torch.isfinite(place[part]).all():
            return False
    return True


def _tensors(layout: Layout, data: Raw) -> Iterator[tuple[TensorSpec, Tensor]]:
    """Each tensor of the raw bytes, looked at in place; of read-only bytes, which torch cannot look at, a copy."""
    whole = memoryview(data)
    for spec in layout.specs:
        dtype = DTYPES[spec.dtype]
        if spec.items == 0:  # torch refuses to look at no bytes
            yield spec, torch.empty(spec.shape, dtype=dtype)
            continue
        start = layout.offsets[spec.name]
        piece = whole[start : start + spec.size_bytes]
        yield spec, torch.frombuffer(bytearray(piece) if whole.readonly else piece, dtype=dtype).view(spec.shape)
