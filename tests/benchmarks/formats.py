"""What each wire format costs and what it loses: `python tests/benchmarks/formats.py`.

For each way of sending updates and versions: a run on digits with four unlike workers, for the accuracy after equal
rounds on rows that no worker has; and rounds with 10 million parameters, for the seconds and the bytes.

Knows which ways there are. Judges nothing.
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a file, it finds its neighbours where tests do
from tests.benchmarks.federation import FLUFFLE, init, periods, rounds_of
from tests.benchmarks.troupe import Troupe, troupe
from tests.node import Node

WORKERS = 4
DIGITS_ROUNDS, LARGE_ROUNDS = 25, 8
SEEDS = (0, 1, 2)
ENOUGH_S = 240.0
WAYS = (
    ("float32", "full"), ("bfloat16", "full"), ("int8", "full"), ("top-k 0.1", "full"), ("top-k 0.01", "full"),
    ("float32", "int8"), ("int8", "int8"),
)  # fmt: skip
PARAMETERS = 10_000_000

# Deltas of many sizes, as training makes them; the same numbers in the same round, whoever asks.
LARGE = """
import torch
from torch import nn

def model():
    made = nn.Module()
    made.w = nn.Parameter(torch.zeros({parameters}))
    return made

def data(source):
    return torch.randn({parameters}, generator=torch.Generator().manual_seed(1)) / 100

def train(model, data, settings):
    with torch.no_grad():
        model.w += data
    return 1

def evaluate(model, data):
    return {{}}
"""


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="fluffle-formats-") as name:
        accuracies, costs = learn(Path(name) / "digits"), carry(Path(name) / "large")
    table = Table("updates", "versions", "MB up, a worker", "MB down", "seconds a round", "accuracy on digits")
    for way, accuracy, (up, down, seconds) in zip(WAYS, accuracies, costs, strict=True):
        table.add_row(*way, f"{up:.2f}", f"{down:.2f}", f"{seconds:.2f}", f"{100 * accuracy:.2f} %")
    Console().print(table)


def learn(folder: Path) -> list[float]:
    """The accuracy that each way comes to on digits that no worker has, the mean of several seeds."""
    folder.mkdir()
    with Node(folder / "rabbitmq") as node, troupe(folder, {"FLUFFLE_BROKER": node.url}) as company:
        for number in range(1, WORKERS + 1):
            work(company, "digits", f"w{number}", f"{number}/{WORKERS}")
        work(company, "digits", "held-out", "held-out", "--evaluate-only")
        return [
            statistics.mean(
                last_score(coordinate(company, "digits", way, rounds=DIGITS_ROUNDS, seed=seed)) for seed in SEEDS
            )
            for way in WAYS
        ]


def carry(folder: Path) -> list[tuple[float, float, float]]:
    """For each way, the MB that one update and one version weigh, and the seconds of a round."""
    folder.mkdir()
    learner, costs = folder / "large.py", []
    learner.write_text(LARGE.format(parameters=PARAMETERS))
    with Node(folder / "rabbitmq") as node, troupe(folder, {"FLUFFLE_BROKER": node.url}) as company:
        for number in range(1, WORKERS + 1):
            work(company, str(learner), f"w{number}", "")
        for way in WAYS:
            lines = rounds_of(coordinate(company, str(learner), way, rounds=LARGE_ROUNDS, seed=0))
            seconds = statistics.median(periods([line["at"] for line in lines]))
            costs.append((lines[-1]["bytes_up"] / WORKERS / 1e6, lines[-1]["bytes_down"] / 1e6, seconds))
    return costs


def work(company: Troupe, learner: str, name: str, source: str, *more: str) -> None:
    place = ("--name", name, "--data", source, "--state", str(company.folder / name))
    company.start(name, *FLUFFLE, "worker", learner, *place, *more)


def coordinate(company: Troupe, learner: str, way: tuple[str, str], *, rounds: int, seed: int) -> Path:
    """Make a run to its end; its history."""
    (form, _, keep), down = way[0].partition(" "), way[1]
    run = company.folder / f"{form}-{keep}-{down}-{seed}"
    init(learner, run, "--seed", str(seed))
    options = ("--format", form, "--down", down, *(("--keep", keep) if keep else ()))
    names = ",".join(f"w{number}" for number in range(1, WORKERS + 1))
    everyone = ("--cohort", str(WORKERS), "--quorum", str(WORKERS), "--workers", names)
    words = ("--rounds", str(rounds), *everyone, *options)
    company.start(run.name, *FLUFFLE, "coordinator", str(run), *words)
    company.until(lambda: company.running[run.name].poll() == 0, time.monotonic() + ENOUGH_S)
    del company.running[run.name]
    return run / "history.jsonl"


def last_score(history: Path) -> float:
    """The accuracy of the last version on the rows that no worker has."""
    lines = [json.loads(line) for line in history.read_text().splitlines()]
    scores = [line for line in lines if line["event"] == "score"]
    return float(scores[-1]["metrics"]["accuracy"])


if __name__ == "__main__":
    main()
