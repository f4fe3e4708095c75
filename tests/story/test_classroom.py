"""The classroom: training by messages is training. What bob and alice send adds up to what one plain loop learns."""

import numpy as np
import pytest
import torch
from torch import nn

from workers import learner, task, weights
from workers.work import Work

ROUNDS = 10


def plain_loop(model: nn.Module) -> list[float]:
    """The loop that anybody would write who had everybody's rows."""
    bob = torch.tensor([[0.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0], [0.0]])
    alice = torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([[1.0], [1.0]])
    losses = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(ROUNDS):
        for x, y in (bob, alice):
            optimizer.zero_grad()
            loss = ((model(x) - y) ** 2).sum()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


def test_bob_and_alice_by_turns_learn_what_the_plain_loop_learns() -> None:
    toy = learner.load("toy")
    places = [task.set_up(toy, "bob"), task.set_up(toy, "alice")]
    plain = task.new_model(toy, seed=7)
    layout = weights.layout_of(plain)
    version = weights.read(plain, layout)
    losses = []
    for number in range(1, ROUNDS + 1):
        for place in places:
            work = Work(train=True, evaluate=False, seed=0, settings={"lr": 0.1}, round=number)
            outcome = task.do(place, work, layout=layout, received=version)
            assert outcome.delta is not None
            assert outcome.examples == 2
            losses.append(outcome.metrics["loss"])
            version = bytearray(np.frombuffer(version, np.float32) + np.frombuffer(outcome.delta, np.float32))

    assert losses == pytest.approx(plain_loop(plain), abs=1e-6)
    learned = np.frombuffer(version, np.float32)
    assert learned == pytest.approx(np.frombuffer(weights.read(plain, layout), np.float32), abs=1e-6)
    assert max(losses[-2:]) < 0.05


def test_neither_learns_alone_what_both_learn_together() -> None:
    toy = learner.load("toy")
    everyone = task.set_up(toy, "everyone")
    alone = task.set_up(toy, "bob")
    version = weights.read(task.new_model(toy, seed=7), alone.layout)
    for number in range(1, ROUNDS + 1):
        work = Work(train=True, evaluate=False, seed=0, settings={}, round=number)
        task.do(alone, work, layout=alone.layout, received=version)
        version = weights.read(alone.model, alone.layout)
    score = Work(train=False, evaluate=True, seed=0, settings={}, round=ROUNDS)
    assert task.do(everyone, score, layout=alone.layout, received=version).scores["accuracy"] == 0.5
