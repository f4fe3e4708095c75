"""What can be read off updates: rows of data, from gradients and deltas, with formulas and without searching.

Pure mathematics on arrays: knows the first layer of a network and how the pixels of a row stand in its gradient. Does
not know federations; who sees what is made up here, too, so that it can be measured. Used by `fluffle attack` alone.

For z = W x + b and one row, dL/dW_i = δ_i x and dL/db_i = δ_i: each neuron with δ_i ≠ 0 has the row, x = dW_i / db_i
(Phong et al. 2018, proposition 2). The learning rate cancels, so the delta of the weights does as well. Of several
rows a neuron shows the mean of those that it was active for, which may be just one: averaging alone is no defence.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from broker.formats import FORMATS
from broker.masks import Mask, apply
from broker.ring import Form, encode, ring_of
from broker.tensors import Layout, TensorSpec

Floats = NDArray[np.float64]
Defence = Literal["none", "secure", "dp"]

CLASSES = 10
LEARNING_RATE = 0.1
EXACT = 1e-5  # a row whose every pixel is nearer than this has been read off
PSNR_MAX = 200.0
CLEAR_DB = 40.0
AGREE = 1e-3  # two neurons that show the same picture, as root of the mean square, show a single row
IMPRINT_WIDTH = 1024


def network(kind: str, pixels: int, *, width: int = 64, seed: int = 0) -> nn.Sequential:
    """`linear`: pixels → 10; `mlp`: pixels → width → 10, with ReLU. A fresh start drawn with `seed`."""
    torch.manual_seed(seed)
    if kind == "linear":
        return nn.Sequential(nn.Linear(pixels, CLASSES))
    return nn.Sequential(nn.Linear(pixels, width), nn.ReLU(), nn.Linear(width, CLASSES))


def imprinted(pixels: int, brightness: Floats, *, width: int = IMPRINT_WIDTH, seed: int = 0) -> nn.Sequential:
    """What a malicious server sends in place of an MLP: a first layer that sorts rows by their brightness.

    Every neuron weighs all pixels alike and has another threshold, the quantiles of `brightness`; the second layer
    treats all neurons alike. The difference of two neighbours' gradients is of the rows between their thresholds
    alone (Fowl et al. 2022, "Robbing the Fed").
    """
    model = network("mlp", pixels, width=width, seed=seed)
    first, last = model[0], model[2]
    assert isinstance(first, nn.Linear)
    assert isinstance(last, nn.Linear)
    with torch.no_grad():
        first.weight.fill_(1 / pixels)
        first.bias.copy_(-torch.from_numpy(np.quantile(brightness, (np.arange(width) + 0.5) / width)))
        last.weight.copy_(last.weight[:, :1].expand_as(last.weight))
    return model


def delta(model: nn.Sequential, x: Floats, y: NDArray[Any], *, steps: int = 1) -> list[Floats]:
    """Trained minus received weights after `steps` steps of gradient descent on all rows, a list in torch's order."""
    trained = copy.deepcopy(model)
    optimizer = torch.optim.SGD(trained.parameters(), lr=LEARNING_RATE)
    rows, labels = torch.from_numpy(x).float(), torch.from_numpy(y).long()
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(trained(rows), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    pairs = zip(trained.parameters(), model.parameters(), strict=True)
    return [(now - then).detach().double().numpy() for now, then in pairs]


def mean(updates: list[list[Floats]]) -> list[Floats]:
    """What a server sees that sees averages only."""
    return [np.mean(each, axis=0) for each in zip(*updates, strict=True)]


def flat(update: list[Floats]) -> tuple[Layout, memoryview]:
    """An update as bytes in a layout, as it travels."""
    layout = Layout.of([TensorSpec(f"{n:03d}", "float32", each.shape) for n, each in enumerate(update)])
    return layout, memoryview(np.concatenate([each.ravel() for each in update]).astype("<f4").tobytes())


def apart(numbers: Floats, like: list[Floats]) -> list[Floats]:
    """The tensors in a row of all their numbers."""
    ends = np.cumsum([each.size for each in like])
    return [part.reshape(each.shape) for part, each in zip(np.split(numbers, ends[:-1]), like, strict=True)]


def written(update: list[Floats], name: str, dice: np.random.Generator) -> list[Floats]:
    """What is left of an update in one of the formats."""
    layout, raw = flat(update)
    form = FORMATS[name]
    left = np.zeros(layout.size_bytes // 4, np.float32) if form.lossy else None
    numbers = np.zeros(layout.size_bytes // 4)
    for run in form.runs(layout, form.pack(layout, raw, residual=left, dice=dice)):
        numbers[run.where] = run.values
    return apart(numbers, update)


def masked(update: list[Floats], dice: np.random.Generator, *, clip: float = 1.0, cohort: int = 10) -> list[Floats]:
    """What the server sees of one update in a secure round, taken for numbers: real words under real masks."""
    update = clipped(update, clip)
    layout, raw = flat(update)
    form = Form(ring_of(32, clip=clip, examples_max=64, cohort=cohort), layout)
    words = encode(form, raw, examples=1, metrics={})
    apply(words, [Mask(dice.bytes(32), plus=True) for _ in range(cohort)])
    return apart(form.signed(words)[: form.floats] / form.ring.scale, update)


def clipped(update: list[Floats], clip: float) -> list[Floats]:
    """Scaled down to an L2 norm of at most `clip`."""
    norm = float(np.sqrt(sum((each**2).sum() for each in update)))
    return [each * min(1.0, clip / max(norm, 1e-300)) for each in update]


def noisy(total: list[Floats], dice: np.random.Generator, *, z: float, clip: float = 1.0) -> list[Floats]:
    """A sum of updates that were clipped to `clip`, with the noise of differential privacy, N(0, (z · clip)²)."""
    return [each + dice.normal(0.0, z * clip, each.shape) for each in total]


def pictures(seen: list[Floats], *, imprint: bool = False) -> Floats:
    """Every row that the first layer's gradient shows: n × pixels; nothing of neurons that were never active."""
    weight, bias = seen[0], seen[1]
    if imprint:  # each bin alone
        weight, bias = weight - np.roll(weight, -1, axis=0), bias - np.roll(bias, -1)
    active = np.abs(bias) > 1e-12
    return weight[active] / bias[active][:, None]


def guess(seen: list[Floats]) -> Floats:
    """The row that a single row's gradient shows best: of the neuron that moved most."""
    which = int(np.abs(seen[1]).argmax())
    bias = seen[1][which]
    picture: Floats = seen[0][which] / (bias or 1.0)
    return picture


def claims(found: Floats) -> Floats:
    """What an attacker who does not know the rows would claim: pictures that two neurons agree on, each once."""
    said: list[Floats] = []
    near = AGREE**2 * found.shape[1]
    for at, picture in enumerate(found):
        if not np.isfinite(picture).all() or np.ptp(picture) < AGREE:
            continue
        same = ((found[at + 1 :] - picture) ** 2).sum(1) < near
        if same.any() and not any(((picture - other) ** 2).sum() < near for other in said):
            said.append(picture)
    return np.array(said).reshape(-1, found.shape[1])


def psnr(found: Floats, row: Floats) -> float:
    """How near a picture is to a row, in dB: 10 · log10(1 / mean square error), at most 200; pixels are 0 to 1.

    What is shown is a picture, so what is beyond black and white counts as that.
    """
    error = float(((np.clip(np.nan_to_num(found), 0, 1) - row) ** 2).mean())
    return min(PSNR_MAX, -10 * np.log10(error)) if error > 0 else PSNR_MAX


def best(found: Floats, rows: Floats) -> tuple[Floats, Floats]:
    """For each row the nearest of the pictures, and how near it is in dB: with an oracle, for measuring."""
    if not len(found):
        return np.zeros_like(rows), np.full(len(rows), psnr(np.zeros(rows.shape[1]), rows[0]))
    shown = np.clip(np.nan_to_num(found), 0, 1)
    nearest = [shown[int(((shown - row) ** 2).mean(1).argmin())] for row in rows]
    return np.array(nearest), np.array([psnr(each, row) for each, row in zip(nearest, rows, strict=True)])


@dataclass(frozen=True, slots=True)
class Found:
    """What an attack of one kind has read off.

    Attributes:
        rows: how many rows there were to be read, over all trials.
        exact: how many came back with every pixel nearer than 1e-5.
        clear: how many came back so that nobody would see a difference: over 40 dB.
        rounds: the part of the trials in which at least one was clear.
        median_db, top_db: of each trial's best row.
        claimed, right: what an attacker without an oracle would say it has read, and how much of it is so.
        shown: a row of the first trial and what was read of it.
    """

    rows: int
    exact: int
    clear: int
    rounds: float
    median_db: float
    top_db: float
    claimed: int
    right: int
    shown: tuple[Floats, Floats]


@dataclass(frozen=True, slots=True)
class Scene:
    """Who does what: `workers` with `rows` each train an MLP or a linear model for `steps`, and the server looks.

    Attributes:
        defence: `none`: the server sees the mean (of one worker: its update); `secure`: one masked update; `dp`: the
            mean with noise z.
        imprint: the server sends a model made for reading rows off.
        format: how updates are written.
        what: what the server sees, in words.
    """

    model: Literal["linear", "mlp"]
    workers: int
    rows: int
    defence: Defence = "none"
    steps: int = 1
    z: float = 1.0
    imprint: bool = False
    format: str = "float32"
    what: str = ""

    def play(self, x: Floats, y: NDArray[Any], *, trials: int, seed: int) -> Found:
        """Attack `trials` rounds, each with rows and a model drawn anew from `x` (n × pixels, 0 to 1) and `y`."""
        dice = np.random.default_rng([seed, self.workers, self.rows])
        tops, shown = list[float](), None
        exact = clear = claimed = right = hit = 0
        for trial in range(trials):
            rows, seen = self._round(x, y, dice, seed=seed + trial)
            single = self.workers * self.rows == 1
            found = pictures(seen, imprint=self.imprint)
            nearest, db = best(guess(seen)[None] if single else found, rows)
            exact += int((np.abs(nearest - rows).max(1) < EXACT).sum())
            clear += int((db > CLEAR_DB).sum())
            hit += bool((db > CLEAR_DB).any())
            tops.append(float(db.max()))
            said = claims(found) if not self.imprint else found[:0]  # an imprint needs no second look
            claimed += len(said)
            right += sum(bool(max(psnr(picture, row) for row in rows) > CLEAR_DB) for picture in said)
            shown = shown or (rows[int(db.argmax())], nearest[int(db.argmax())])
        assert shown is not None
        total = trials * self.workers * self.rows
        return Found(total, exact, clear, hit / trials, float(np.median(tops)), max(tops), claimed, right, shown)

    def _round(
        self, x: Floats, y: NDArray[Any], dice: np.random.Generator, *, seed: int
    ) -> tuple[Floats, list[Floats]]:
        """The rows that everyone had, and what the server sees."""
        model = imprinted(x.shape[1], x.mean(1)) if self.imprint else network(self.model, x.shape[1], seed=seed)
        chosen = dice.permutation(len(x))[: self.workers * self.rows]
        mine = [chosen[at : at + self.rows] for at in range(0, len(chosen), self.rows)]
        if self.defence == "secure":  # each is masked, so the server looks at the first one's words
            return x[mine[0]], masked(delta(model, x[mine[0]], y[mine[0]], steps=self.steps), dice)
        updates = [written(delta(model, x[each], y[each], steps=self.steps), self.format, dice) for each in mine]
        if self.defence == "dp":
            total = [each * self.workers for each in mean([clipped(update, 1.0) for update in updates])]
            return x[chosen], noisy(total, dice, z=self.z)
        return x[chosen], mean(updates)


def classroom(rows: dict[str, tuple[list[list[float]], list[list[float]]]]) -> Iterator[tuple[str, str]]:
    """What is read off each person's delta in the classroom: a linear model of two inputs, one step, two rows each.

    dW / db is the mean of the rows, each weighted by its error: a column that is the same in both is read exactly.
    """
    for name, (inputs, targets) in rows.items():
        torch.manual_seed(0)
        model = nn.Linear(2, 1)
        loss = ((model(torch.tensor(inputs)) - torch.tensor(targets)) ** 2).sum()
        weight, bias = torch.autograd.grad(loss, list(model.parameters()))
        first, second = (weight[0] / bias).tolist()
        yield name, f"first column {first:.4f}, second column {second:.4f} (weighted mean of the rows)"
