"""`fluffle demo`, as a newcomer types it."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.acceptance.federation import FLUFFLE

pytestmark = pytest.mark.timeout(240)
ROWS = {
    "bob": (torch.tensor([[0.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0], [0.0]])),
    "alice": (torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([[1.0], [1.0]])),
}


def demo(folder: Path, *options: str) -> dict[str, object]:
    done = subprocess.run(
        [*FLUFFLE, "demo", "--json", "--run", str(folder), *options],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    figures: dict[str, object] = json.loads(done.stdout)
    return figures


def losses(folder: Path) -> list[tuple[str, float]]:
    lines = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    rounds = [line for line in lines if line["event"] == "round"]
    return [(who, line["counted"][who]["metrics"]["loss"]) for line in rounds for who in line["cohort"]]


@pytest.mark.chaos
def test_the_classroom_in_turns_equals_the_plain_loop(tmp_path: Path) -> None:
    run = tmp_path / "run"
    demo(run, "--learner", "toy", "--schedule", "cyclic")
    model = torch.nn.Linear(2, 1)
    model.load_state_dict(load_file(run / "versions/000000.safetensors"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expected = []
    for _ in range(10):
        for who, (x, y) in ROWS.items():
            optimizer.zero_grad()
            loss = ((model(x) - y) ** 2).sum()
            loss.backward()
            optimizer.step()
            expected.append((who, loss.item()))
    found = losses(run)
    assert [who for who, _ in found] == [who for who, _ in expected]
    assert [loss for _, loss in found] == pytest.approx([loss for _, loss in expected], abs=1e-6)
    final = load_file(run / "versions/000010.safetensors")
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(final[name], tensor, atol=1e-6, rtol=0)


@pytest.mark.chaos
def test_the_classroom_in_parallel_learns_more_every_round(tmp_path: Path) -> None:
    run = tmp_path / "run"
    figures = demo(run, "--learner", "toy")
    lines = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    scored = [line["scored"]["loss"] for line in lines if line["event"] in ("round", "final")]
    assert len(scored) == 11
    assert all(later < earlier for earlier, later in pairwise(scored))
    assert figures["workers"] == 2
    assert figures["rounds"] == 10
    assert {p.name for p in run.iterdir()} >= {"plan.toml", "versions", "history.jsonl", "report.png", "log"}


def test_digits_answer_why_one_would_federate(tmp_path: Path) -> None:
    figures = json.loads(json.dumps(demo(tmp_path / "run")))
    federated, alone = figures["federated"]["accuracy"], figures["alone"]["mean_accuracy"]
    assert federated >= figures["pooled"]["accuracy"] - 0.02
    assert federated >= alone + 0.05
    assert figures["bytes_down"] > 0
    assert figures["bytes_up"] > figures["bytes_down"]


@pytest.mark.parametrize(
    ("number", "reached"), [(signal.SIGINT, "versions/000003.safetensors"), (signal.SIGTERM, "plan.toml")]
)
def test_ctrl_c_and_sigterm_leave_no_process_and_no_half_written_file(
    number: signal.Signals, reached: str, tmp_path: Path, processes_with: Callable[[str], list[str]]
) -> None:
    run, scratch = tmp_path / "run", tmp_path / "tmp"
    scratch.mkdir()
    process = subprocess.Popen(
        [
            *FLUFFLE,
            "demo",
            "--learner",
            "line",
            "--data",
            "a",
            "--data",
            "b",
            "--rounds",
            "100000",
            "--run",
            str(run),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env={**os.environ, "TMPDIR": str(scratch)},
    )
    until = time.monotonic() + 90
    while not (run / reached).exists() and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert b"Traceback" not in said
    assert not processes_with(str(run))
    assert not [*run.rglob(".*.new"), *scratch.glob("fluffle-*")]
    for version in (run / "versions").iterdir():
        load_file(version)
