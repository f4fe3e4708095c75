"""Training under which no row can be told: DP-SGD by Opacus, put around what the learner trains with.

Knows torch and Opacus, an extra that is loaded when it is asked for. Does not know what has been spent
(`spending.py`), nor whose rows these are.

A learner needs one line for it, and imports nothing: where its task is private, `settings["private"]` is there, and

    model, optimizer, loader = settings["private"](model, optimizer, loader)

gives it what to train with in their place: batches of rows drawn by dice of their own (Poisson sampling), each row's
gradient cut to a norm of `clip`, their sum with noise (Abadi et al. 2016, arXiv 1607.00133, algorithm 1). What the
learner does besides, with other batches or another optimizer, nobody sees: its code is the data owner's to read.

Neither noise nor batches come from dice that the learner or the plan can sow: the noise is `broker/noise.py`'s, since
torch's own would tell its next numbers to whoever knows enough of the last ones, and knows a seed of 32 bits only.
"""

import json
import os
import secrets
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from broker.errors import LearnerFailed
from broker.files import opened
from broker.noise import KEY_BYTES, gaussian
from workers.work import Work

KEY = "private"
"""Under which name a learner finds this in its settings."""
UNUSED = (
    f"the plan asks for privacy of every row (dp = record), and train() does not know how: let it train with model, "
    f"optimizer, loader = settings[{KEY!r}](model, optimizer, loader)."
)
_WORDS, _WORDS_AT = 624, 24  # of the state of torch's dice on the processor, and where they begin in it


class Private:
    """What goes around the training of one task; within it, call it and train.

    Args:
        model: the task's.
        work: the task; of which standard deviation the noise on a step's sum of gradients is, in clips; the clip, the
            largest norm of a row's gradient; and where steps are put down.

    Raises:
        LearnerFailed: Opacus is not installed, or the model mixes the rows of a batch.
    """

    def __init__(self, model: nn.Module, work: Work) -> None:
        try:
            from opacus import PrivacyEngine  # noqa: PLC0415 (an extra, and it takes seconds to load)
            from opacus.validators import ModuleValidator  # noqa: PLC0415
        except ImportError:
            raise LearnerFailed(
                "the plan's dp = record needs opacus, install it on the worker with: pip install 'fluffle[dp]'"
            ) from None
        if wrong := ModuleValidator.validate(model, strict=False):
            mixing = ", ".join(
                f"{name or 'itself'} ({type(part).__name__})" for name, part in model.named_modules()
                if isinstance(part, nn.modules.batchnorm._BatchNorm)  # noqa: SLF001 (torch has no other name for all)
            )  # fmt: skip
            raise LearnerFailed(
                f"the model has {mixing}, which mixes the rows of a batch, so that no row's part can be cut: "
                "put GroupNorm or LayerNorm in its place in model(), and make the run anew."
                if mixing
                else f"the model cannot be trained under dp = record: {wrong[0]}"
            )
        self._model, self._work = model, work
        with warnings.catch_warnings(action="ignore"):  # its dice are not secure, it says: they are not used
            self._engine: Any = PrivacyEngine(accountant="rdp")
        self._wrapped: Any = None

    def __call__(self, model: nn.Module, optimizer: Any, loader: Any) -> tuple[Any, Any, Any]:
        """What to train with in place of these three."""
        if self._wrapped is not None or model is not self._model:
            raise ValueError(f"settings[{KEY!r}] is called once a task, with the model that train() was given")
        warnings.filterwarnings("ignore", "Full backward hook is firing")  # as it should, for rows need no gradient
        self._engine.secure_rng = secret_dice()
        self._wrapped, optimizer, loader = self._engine.make_private(
            module=model, optimizer=optimizer, data_loader=loader, noise_multiplier=self._work.row_noise,
            max_grad_norm=self._work.row_clip, poisson_sampling=True,
        )  # fmt: skip
        optimizer.clip_and_accumulate = partial(_cut, optimizer, optimizer.clip_and_accumulate)
        key = secrets.token_bytes(KEY_BYTES)
        optimizer.add_noise = partial(_add_noise, optimizer, self._work.row_noise * self._work.row_clip, key, count())
        optimizer.attach_step_hook(partial(self._put_down, optimizer.step_hook))
        return self._wrapped, optimizer, loader

    @property
    def released(self) -> list[tuple[float, float, int]]:
        """Noise, rate and number of the steps that were taken."""
        return [(float(noise), float(rate), int(times)) for noise, rate, times in self._engine.accountant.history]

    def _put_down(self, count_it: Callable[[Any], None], optimizer: Any) -> None:
        """A step has its noise, and nobody has seen it yet: whatever becomes of this process, it counts."""
        count_it(optimizer)
        os.pwrite(self._file.fileno(), json.dumps([*self._work.steps[1:], self.released]).encode(), 0)

    def __enter__(self) -> None:
        self._file = opened(Path(self._work.steps[0]), "wb", 0o600)

    def __exit__(self, *_: object) -> None:
        """Leave the model as it was."""
        self._file.close()
        if self._wrapped is not None:
            self._wrapped.to_standard_module()
        for parameter in self._model.parameters():
            parameter.__dict__.pop("summed_grad", None)


def secret_dice() -> torch.Generator:
    """Dice in a state that nobody knows, all of it: torch makes it of 32 bits of a seed."""
    dice = torch.Generator()
    state = dice.get_state()
    words = state[_WORDS_AT : _WORDS_AT + 8 * _WORDS].view(torch.int64)
    words[:] = torch.frombuffer(bytearray(secrets.token_bytes(4 * _WORDS)), dtype=torch.int32).to(torch.int64)
    words &= 0xFFFFFFFF
    return dice.set_state(state)


def _cut(optimizer: Any, clip: Callable[[], None]) -> None:
    """Opacus' `DPOptimizer.clip_and_accumulate`; a gradient that is no number cannot be cut, and counts for nothing.

    A coordinator could make weights under which some rows have such ones, and see by the failure that they are there.
    """
    for parameter in optimizer.params:
        parameter.grad_sample.nan_to_num_(0.0, 0.0, 0.0)
    clip()


def _add_noise(optimizer: Any, deviation: float, key: bytes, streams: Iterator[int]) -> None:
    """What Opacus' `DPOptimizer.add_noise` does, with other noise."""
    from opacus.optimizers.optimizer import _mark_as_processed  # noqa: PLC0415 (see above)

    for parameter in optimizer.params:
        summed: Tensor = parameter.summed_grad
        noise = torch.from_numpy(gaussian(key, next(streams), summed.numel())).to(summed).view_as(summed)
        parameter.grad = (summed + deviation * noise).view_as(parameter)
        _mark_as_processed(summed)
