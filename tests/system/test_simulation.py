"""Coordinator, workers, broker, network and disk in one loop with a clock that jumps; see `simulation.py`.

A seed that fails is told with the last that happened, and with the command that lets all of it happen again.
"""

import gc
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from coordinator.claim import Claim
from tests.system.simulation import Failed, Simulation

ROOT = Path(__file__).resolve().parents[2]
SEEDS, CHAOS = range(50), range(50, 1050)
BLOCK = 10  # a test is so many seeds
BLOCKS = [
    pytest.param(seeds[at : at + BLOCK], id=f"{seeds[at]}-{seeds[at + BLOCK - 1]}", marks=marks)
    for seeds, marks in ((SEEDS, ()), (CHAOS, pytest.mark.chaos))
    for at in range(0, len(seeds), BLOCK)
]


@pytest.fixture(autouse=True)
def _only_what_is_new_is_collected() -> Iterator[None]:
    """Each simulation has its garbage collected: to look through all of torch for it took a third of the time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize("seeds", BLOCKS)
def test_whatever_breaks_each_version_follows_from_the_one_before_and_who_was_counted(
    tmp_path: Path, record_property: Any, seeds: range
) -> None:
    failed, faults = [], Counter[str]()
    for seed in seeds:
        simulation = Simulation(seed, tmp_path / str(seed))
        try:
            simulation.go()
        except Failed as problem:
            failed.append(str(problem))
        faults += simulation.adversary.faults
    record_property("faults", {f"simulated: {kind}": count for kind, count in faults.items()})
    assert not failed, "\n\n".join(failed)


def test_a_seed_is_the_same_each_time_whatever_the_process(tmp_path: Path) -> None:
    here = [Simulation(seed, tmp_path / str(seed)) for seed in (23, 29)]
    for simulation in here:
        simulation.go()
        assert simulation.adversary.faults
    told = subprocess.run(
        [sys.executable, "-m", "tests.system.simulation", *(str(each.seed) for each in here), "--quiet"],
        cwd=ROOT, env=os.environ | {"PYTHONHASHSEED": "1"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = [line.rpartition(" ")[2] for line in told.stdout.splitlines()]
    assert found == [each.digest.hexdigest() for each in here]


@pytest.mark.chaos
def test_a_coordinator_that_never_looks_whether_it_was_followed_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def go_through() -> None:
        for seed in SEEDS:
            Simulation(seed, tmp_path / str(seed)).go()

    monkeypatch.setattr(Claim, "ours", lambda _: True)
    with pytest.raises(Failed, match=r"again, with all that happens: python -m tests\.system\.simulation \d+"):
        go_through()
