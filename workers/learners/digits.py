"""Handwritten digits (8 × 8 pixels, from scikit-learn) on workers that each see mostly some of the ten digits.

So it is with real federations: one clinic sees other cases than the next. A worker alone never learns the digits that
it hardly sees; together they learn all ten. One part of the rows, "held-out", is given to no worker that trains.

Needs the extra `demo`: pip install 'fluffle[demo]'.
"""

import itertools
import zlib
from urllib.parse import parse_qsl

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

HELD_OUT = 360  # of 1797 rows
ALPHA = 0.5  # how alike the workers' digits are: 100 is all alike, 0.1 is one or two digits each
ROWS_MIN = 36  # of any worker
DRAWN = 300  # rows of a source "draw:TEXT"


def model():
    """64 pixels in, a score for each of the ten digits out."""
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def data(source):
    """Pixels (n × 64, from 0 to 1) and digits (n), of one of these sources.

    "2/4"                       the second of four workers
    "2/4?alpha=0.1&seed=7"      the same, split more unevenly, and with other dice
    "draw:TEXT"                 an uneven sample that depends on the text only: for workers that cannot be counted
    "pooled"                    all rows of all workers
    "held-out"                  the rows that no worker has
    """
    pixels, digits = load_digits(return_X_y=True)
    shuffled = np.random.default_rng(0).permutation(len(digits))
    held_out, rows = shuffled[:HELD_OUT], shuffled[HELD_OUT:]
    if source == "held-out":
        rows = held_out
    elif source.startswith("draw:"):
        rows = draw(rows, digits, source)
    elif source != "pooled":
        rows = share(rows, digits, source)
    return torch.tensor(pixels[rows] / 16, dtype=torch.float32), torch.tensor(digits[rows])


def train(model, data, settings):
    """Some steps of stochastic gradient descent. Settings: steps, lr, momentum, batch.

    The number of steps does not depend on how many rows there are, so that a worker alone, the federation and the
    pooled data are compared at equal work.
    """
    x, y = data
    optimizer = torch.optim.SGD(
        model.parameters(), lr=settings.get("lr", 0.1), momentum=settings.get("momentum", 0.9)
    )
    if "private" in settings:  # the plan's dp is record: batches and noise are not the learner's to choose
        train_privately(model, optimizer, data, settings)
        return len(x)
    dice = torch.Generator().manual_seed(settings.get("seed", 0))
    total, steps = 0.0, settings.get("steps", 40)
    for _ in range(steps):
        batch = torch.randint(len(x), (settings.get("batch", 32),), generator=dice)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
        loss.backward()
        optimizer.step()
        total += loss.item()
    return len(x), {"loss": total / steps}


def train_privately(model, optimizer, data, settings):
    """The same number of steps, on batches that are drawn anew; no metrics, for they would tell of the rows."""
    loader = DataLoader(TensorDataset(*data), batch_size=settings.get("batch", 32))
    model, optimizer, loader = settings["private"](model, optimizer, loader)
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    for x, y in itertools.islice(batches, settings.get("steps", 40)):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def evaluate(model, data):
    """The mean cross entropy, and the fraction of digits read rightly."""
    x, y = data
    scores = model(x)
    right = scores.argmax(dim=1) == y
    loss = nn.functional.cross_entropy(scores, y)
    return {"loss": loss.item(), "accuracy": right.float().mean().item(), "examples": len(x)}


def demo(workers, seed):
    """That many workers with uneven digits; the score is taken on the rows that none of them has."""
    return {
        "workers": {f"worker-{k}": f"{k}/{workers}?seed={seed}" for k in range(1, workers + 1)},
        "held_out": "held-out",
        "pooled": "pooled",
        "settings": {"lr": 0.1, "steps": 40},
        "rounds": 25,
    }


def share(rows, digits, source):
    """The rows of worker K of N, for a source "K/N", which may end in "?alpha=…&seed=…"."""
    which, _, rest = source.partition("?")
    options = {"alpha": str(ALPHA), "seed": "0", **dict(parse_qsl(rest))}
    try:
        k, n = (int(number) for number in which.split("/"))
        alpha, seed = float(options.pop("alpha")), int(options.pop("seed"))
        possible = 1 <= k <= n <= len(rows) // ROWS_MIN and alpha > 0 and seed >= 0 and not options
    except ValueError:
        possible = False
    if not possible:
        raise ValueError(
            f"{source!r} is no source: write K/N (worker K of N, at most {len(rows) // ROWS_MIN}), "
            "K/N?alpha=0.1&seed=7, draw:TEXT, pooled or held-out."
        )
    return split(rows, digits, n, alpha, np.random.default_rng(seed))[k - 1]


def split(rows, digits, n, alpha, dice):
    """All rows shared out among n workers; each digit's shares are drawn from a Dirichlet distribution.

    Workers left with too few rows take some from the one with the most.
    """
    workers = [[] for _ in range(n)]
    for digit in range(10):
        those = dice.permutation(rows[digits[rows] == digit])
        cuts = np.cumsum(dice.dirichlet([alpha] * n))[:-1] * len(those)
        for worker, part in zip(workers, np.split(those, cuts.astype(int)), strict=True):
            worker.extend(part)
    for worker in workers:
        while len(worker) < ROWS_MIN:
            worker.append(max(workers, key=len).pop())
    return workers


def draw(rows, digits, text):
    """An uneven sample of the rows, the same for the same text."""
    dice = np.random.default_rng(zlib.crc32(text.encode()))
    weight = dice.dirichlet([ALPHA] * 10)[digits[rows]] + 1e-6
    return dice.choice(rows, DRAWN, replace=False, p=weight / weight.sum())
