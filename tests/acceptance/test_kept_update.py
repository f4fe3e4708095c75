"""A real worker that is killed with a finished update of several parts sends it again, and trains nothing twice."""

from pathlib import Path

import pytest

from tests.acceptance.federation import Federation

pytestmark = [pytest.mark.timeout(180), pytest.mark.chaos]

# says on the disk each time that it trains; w2 waits to be let go
LEARNER = """
import time
from pathlib import Path
import torch
from torch import nn

def model():
    made = nn.Module()
    made.w = nn.Parameter(torch.zeros(1_000_000))
    return made

def data(source):
    return Path(source)

def train(model, data, settings):
    with data.with_suffix(".trained").open("a") as file:
        file.write(f"{settings['round']}\\n")
    while data.name == "w2" and not data.with_suffix(".go").exists():
        time.sleep(0.01)
    with torch.no_grad():
        model.w += torch.randn(1_000_000)
    return 1

def evaluate(model, data):
    return {}
"""


def kept(f: Federation, worker: str = "") -> list[Path]:
    return list((f.folder / "state").rglob(f"{worker}*.update"))


def test_a_worker_killed_with_a_finished_update_sends_it_again_and_trains_nothing_twice(
    federation: Federation,
) -> None:
    f = federation
    f.learner.write_text(LEARNER)
    finals = []
    for killed in (False, True):
        place = f.folder / f"killed-{killed}"
        place.mkdir()
        f.run = place / "run"

        def worker(name: str, place: Path = place) -> None:
            f.start(name, "worker", str(f.learner), "--name", name, "--data", str(place / name))

        f.fluffle("init", str(f.learner), str(f.run), "--seed", "5")
        f.coordinator("--rounds", "2", "--cohort", "2", "--quorum", "2")
        for name in ("w1", "w2"):
            worker(name)
        f.until(lambda: kept(f, "w1"))
        if killed:
            f.kill("w1")
            f.kill("coordinator")
            worker("w1")
            f.coordinator()
            f.until(lambda: "was finished before: sending it again" in f.log("w1"))
        (place / "w2.go").touch()
        assert f.wait("coordinator") == 0
        assert (place / "w1.trained").read_text().split() == ["1", "2"]
        assert (place / "w2.trained").read_text().split() == ["1", "2"]
        assert [(line["attempt"], sorted(line["counted"])) for line in f.rounds()] == [(1, ["w1", "w2"])] * 2
        finals.append(f.version(2))
        f.end()
        assert not kept(f)
    assert finals[0] == finals[1]
