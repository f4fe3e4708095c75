"""Twelve workers in one process over a real RabbitMQ: asked five at a time, killed together, leaving together."""

import re
import signal
from pathlib import Path

import pytest

from tests.acceptance.federation import Federation

pytestmark = pytest.mark.timeout(180)
MANY = 12
# a learner whose data is a file with one number, towards which it moves every weight halfway; one step a round
LEARNER = """
import time
from pathlib import Path
import torch
from torch import nn

def model():
    made = nn.Module()
    made.w = nn.Parameter(torch.zeros(SIZE))
    return made

def data(source):
    print(f"loading {source}")
    return float(Path(source).read_text())

def train(model, data, settings):
    time.sleep(settings.get("nap", 0.0))
    with torch.no_grad():
        model.w += (data - model.w) / 2
    return 1

def evaluate(model, data):
    return {"distance": float((model.w - data).abs().max()), "examples": 1}
"""


def shards(federation: Federation, size: int) -> str:
    """A shard for each worker but the seventh; the pattern of their names."""
    federation.learner.write_text(LEARNER.replace("SIZE", str(size)))
    folder = federation.folder / "shards"
    folder.mkdir()
    for index in range(1, MANY + 1):
        if index != 7:
            (folder / f"{index}-of-{MANY}").write_text(str(index))
    return str(folder / "{index}-of-{count}")


def host(federation: Federation, pattern: str) -> None:
    command = ("worker", str(federation.learner), "--many", str(MANY), "--name", "w", "--data", pattern)
    federation.start("host", *command)


@pytest.mark.parametrize("size", [3, 100_000], ids=["small", "in files"])
def test_hosted_workers_are_as_many_workers_each_with_its_own_data(federation: Federation, size: int) -> None:
    f = federation
    pattern = shards(f, size)
    f.fluffle("init", str(f.learner), str(f.run))
    host(f, pattern)
    f.coordinator("--rounds", "8", "--cohort", "5", "--quorum", "4", "--gather-s", "60")
    assert f.wait("coordinator") == 0
    seen = set[str]()
    for line in f.rounds():
        assert len(line["cohort"]) == 5
        assert set(line["counted"]) == set(line["cohort"]) - {"w-7"}
        if "w-7" in line["cohort"]:
            assert "FileNotFoundError" in line["refused"]["w-7"]
        seen |= set(line["cohort"])
    assert len(seen) > 8
    assert f.kill("host", signal.SIGTERM) == 0
    assert "12 workers have left" in f.log("host")
    # another process may have written between a line and its end
    loads = re.findall(rf"loading \S+/(\d+-of-{MANY})", f.log("host"))
    for name in seen - {"w-7"}:  # dice may have passed others over
        assert loads.count(f"{name.removeprefix('w-')}-of-{MANY}") == 1
    assert list(Path(f.folder / "state").rglob("*.models")) == []


@pytest.mark.chaos
def test_a_host_that_is_killed_returns_with_all_its_workers_and_the_run_goes_on(federation: Federation) -> None:
    f = federation
    pattern = shards(f, 100_000)
    f.fluffle("init", str(f.learner), str(f.run))
    host(f, pattern)
    f.coordinator("--rounds", "6", "--cohort", "6", "--quorum", "5", "--gather-s", "60", "--set", "nap=0.05")
    f.until(lambda: len(f.rounds()) >= 2)
    f.kill("host")
    host(f, pattern)
    assert f.wait("coordinator") == 0
    assert len(f.rounds()) == 6
    assert all(len(line["counted"]) >= 5 for line in f.rounds())
