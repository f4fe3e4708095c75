"""One task done in this process: the user's functions called in order, and what they return checked.

Knows the learner's promises. Does not know processes, files or the wire; whatever the user's code does wrong comes
out as LearnerFailed with a sentence, and anything else that comes out is a fault of ours.
"""

import logging
import math
import operator
import random
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import nn

from broker.errors import LearnerFailed, UsageError
from broker.messages import EXAMPLES_MAX, KEY_MAX, MAP_MAX
from broker.tensors import Layout
from workers import weights
from workers.imprint import suspicion
from workers.learner import Learner, blaming
from workers.privacy import KEY as PRIVATE
from workers.privacy import UNUSED, Private
from workers.work import Outcome, Work

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Place:
    """A learner set up beside its data: what a worker makes once and every task uses again."""

    learner: Learner
    model: nn.Module
    data: Any
    layout: Layout


def set_up(learner: Learner, source: str) -> Place:
    """Load the data and make the model, both once.

    Raises:
        UsageError: data() or model() raised, or the model cannot travel.
    """
    data, model = load_data(learner, source), new_model(learner)
    return Place(learner, model, data, weights.layout_of(model))


def load_data(learner: Learner, source: str) -> Any:
    """What the learner's data() makes of a source.

    Raises:
        UsageError: it raised.
    """
    with blaming(f"data({source!r}) of the learner {learner.name} failed:"):
        return learner.data(source)


def new_model(learner: Learner, *, seed: int = 0) -> nn.Module:
    """A fresh model of the learner's, its random start drawn with `seed`.

    Raises:
        UsageError: model() raised, or returned something else than a torch module.
    """
    _sow(seed)
    with blaming(f"model() of the learner {learner.name} failed:"):
        model = learner.model()
    if not isinstance(model, nn.Module):
        raise UsageError(f"model() of the learner {learner.name} returned {_kind(model)}: return a torch nn.Module.")
    return model


def do(
    place: Place, work: Work, *, layout: Layout, received: weights.Raw, into: weights.Raw | None = None
) -> Outcome:
    """Load the weights, evaluate them, train, and take the difference, as far as `work` asks.

    The result is a function of the arguments alone, as far as the learner's is: dice are sown from `work.seed` before
    each step, so training is the same whether or not it was evaluated before.

    Args:
        place: the learner beside its data; its model is overwritten.
        work: what to do.
        layout: which tensors are in `received`.
        received: the version's raw weights.
        into: where the delta is written, exactly as long as `received`; new memory unless given.

    Raises:
        LearnerFailed: the learner raised, returned what it must not, diverged, or is another than the version's; or
            the weights look made for reading the data off its update.
    """
    model = place.model
    if work.train and (suspicious := suspicion(layout, memoryview(received), fixed=_fixed(model))):
        raise LearnerFailed(suspicious)
    with blaming("the learner's model cannot be given the version's weights:", LearnerFailed):
        model.zero_grad(set_to_none=True)  # nothing of an earlier task may leak into this one
        weights.load(model, layout, received)
    scores: dict[str, float] = {}
    if work.evaluate:
        _sow(work.seed)
        with torch.no_grad(), blaming("evaluate() of the learner raised", LearnerFailed):
            model.eval()
            scores = _metrics(place.learner.evaluate(model, place.data), "evaluate")
    if not work.train:
        return Outcome(None, {}, scores, None)
    settings: dict[str, Any] = {**work.settings, "seed": work.seed, "round": work.round}
    with blaming("train() of the learner's model raised", LearnerFailed):
        model.train()
    private = Private(model, work) if work.row_noise else None
    if private:
        settings[PRIVATE] = private
    _sow(work.seed)
    with private or nullcontext():  # with gradients, whatever the learner's code has switched off elsewhere
        with torch.enable_grad(), blaming("train() of the learner raised", LearnerFailed):
            examples, metrics = _trained(place.learner.train(model, place.data, settings))
        if private and not private.released:
            raise LearnerFailed(UNUSED)
        delta = weights.delta(model, layout, received, into=into)
    if private:  # what was learned of rows without noise does not travel
        return Outcome(examples, {}, {}, delta)
    return Outcome(examples, metrics, scores, delta)


def _fixed(model: nn.Module) -> set[str]:
    """Buffers and frozen parameters, by all their names."""
    with blaming("the tensors of the learner's model cannot be listed:", LearnerFailed):
        tensors = chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
        return {name for name, tensor in tensors if not tensor.requires_grad}


def _sow(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 (a learner may well use numpy's global dice)
    if _has_accelerator():
        torch.manual_seed(seed)
    else:  # the same dice; looking for each accelerator anew takes longer than training a small model
        torch.default_generator.manual_seed(seed)


@cache
def _has_accelerator() -> bool:
    """Whether torch has dice of other devices to sow; before 2.6 it could not say so."""
    return not hasattr(torch, "accelerator") or torch.accelerator.is_available()


def _trained(returned: Any) -> tuple[int, dict[str, float]]:
    found, metrics = returned if isinstance(returned, tuple) and len(returned) == 2 else (returned, {})
    counted: Any = None if isinstance(found, bool) else found
    try:
        examples = operator.index(counted)
    except TypeError:
        raise LearnerFailed(
            f"train() returned {_kind(found)} where the number of examples belongs: it must return how many examples "
            "it learned from, a whole number, or that and a dict of metrics."
        ) from None
    if not 1 <= examples <= EXAMPLES_MAX:
        raise LearnerFailed(f"train() says it learned from {examples} examples: it must be 1 to {EXAMPLES_MAX}.")
    return examples, _metrics(metrics, "train")


def _metrics(found: Any, name: str) -> dict[str, float]:
    """The learner's metrics as plain floats, without those that are not finite."""
    if not isinstance(found, Mapping):
        raise LearnerFailed(f"{name}() returned {_kind(found)} where a dict of metrics belongs.")
    if len(found) > MAP_MAX:
        raise LearnerFailed(f"{name}() returned {len(found)} metrics: at most {MAP_MAX} travel.")
    metrics = {}
    for key, value in found.items():
        if not isinstance(key, str) or len(key) > KEY_MAX:
            raise LearnerFailed(
                f"{name}() returned a metric called {str(key)[:40]!r}: "
                f"its name must be text of at most {KEY_MAX} characters."
            )
        number = _number(value, f"{name}() returned the metric {key!r} as")
        if math.isfinite(number):
            metrics[key] = number
        else:
            log.warning("%s() returned the metric %r as %s: left out, for no mean can hold it", name, key, number)
    return metrics


def _number(value: Any, said: str) -> float:
    plain: Any = None if isinstance(value, str | bytes) else value  # float("1") would do, and hide a mistake
    try:
        return float(plain.detach() if isinstance(plain, torch.Tensor) else plain)  # or torch warns
    except OverflowError:
        return math.inf
    except (TypeError, ValueError, RuntimeError):
        raise LearnerFailed(f"{said} {_kind(value)}: it must be a number.") from None


def _kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
