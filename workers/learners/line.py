"""The smallest learner: find the line y = 2x + 1 in noisy points. Every source is a different handful of points."""

import zlib

import torch
from torch import nn


def model():
    return nn.Linear(1, 1)


def data(source):
    dice = torch.Generator().manual_seed(zlib.crc32(source.encode()))
    x = torch.rand(64, 1, generator=dice) * 2 - 1
    return x, 2 * x + 1 + 0.1 * torch.randn(64, 1, generator=dice)


def train(model, data, settings):
    optimizer = torch.optim.SGD(model.parameters(), lr=settings.get("lr", 0.2))
    for _ in range(settings.get("steps", 5)):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(data[0]), data[1]).backward()
        optimizer.step()
    return len(data[0])


def evaluate(model, data):
    return {"loss": nn.functional.mse_loss(model(data[0]), data[1]).item(), "examples": len(data[0])}
