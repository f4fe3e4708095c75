"""The classroom: two people who share a model but not their rows.

    bob    knows that (0, 0) → 0 and (0, 1) → 0
    alice  knows that (1, 0) → 1 and (1, 1) → 1

Neither can learn alone that the first number is the answer. Needs nothing but torch.
"""

import torch
from torch import nn

ROWS = {
    "bob": ([[0.0, 0.0], [0.0, 1.0]], [[0.0], [0.0]]),
    "alice": ([[1.0, 0.0], [1.0, 1.0]], [[1.0], [1.0]]),
}
ROWS["everyone"] = (ROWS["bob"][0] + ROWS["alice"][0], ROWS["bob"][1] + ROWS["alice"][1])


def model():
    """Two numbers in, one out; right when it comes out near the target."""
    return nn.Linear(2, 1)


def data(source):
    """The rows (n × 2) and targets (n × 1) of "bob", "alice" or "everyone"."""
    if source not in ROWS:
        raise ValueError(f"nobody here is called {source!r}: choose bob, alice or everyone.")
    x, y = ROWS[source]
    return torch.tensor(x), torch.tensor(y)


def train(model, data, settings):
    """One step down the summed squared error of all rows; reports that error before the step. Setting: lr."""
    x, y = data
    optimizer = torch.optim.SGD(model.parameters(), lr=settings.get("lr", 0.1))
    optimizer.zero_grad()
    loss = ((model(x) - y) ** 2).sum()
    loss.backward()
    optimizer.step()
    return len(x), {"loss": loss.item()}


def evaluate(model, data):
    """The summed squared error, and the fraction of rows on the right side of one half."""
    x, y = data
    found = model(x)
    right = (found > 0.5) == (y > 0.5)
    return {"loss": ((found - y) ** 2).sum().item(), "accuracy": right.float().mean().item(), "examples": len(x)}


def demo(workers, seed):  # noqa: ARG001 (there are two people in this classroom, however many were asked for)
    """Bob and alice learn together; the score is taken on everyone's rows."""
    return {
        "workers": {"bob": "bob", "alice": "alice"},
        "held_out": "everyone",
        "pooled": "everyone",
        "settings": {"lr": 0.1},
        "rounds": 10,
    }
