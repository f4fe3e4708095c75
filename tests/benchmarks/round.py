"""What a round costs, as a user runs it: `make bench`, or `make bench ARGS="--rows 4x1M,2x40M --rounds 5"`.

Each row is a federation of its own: a private RabbitMQ, a coordinator and workers as real processes, and a learner
that adds one to every parameter and so does nearly no training. Beside it stand what the same machine does with less
around it: a bare pump of parts through the same broker, a plain memcpy, and with `--flower PYTHON` a round of Flower.

Knows how to measure from outside: the run's history, /proc, the broker's counters. Knows nothing of how a round is
made, and judges nothing: no figure here fails a build.
"""

import argparse
import itertools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from broker.errors import FluffleError, RunEnded
from broker.files import read_version
from broker.folder import BROKER
from broker.node import Node, server_version
from broker.processes import holder

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a file, it finds its neighbours where tests do
from tests.benchmarks import beside
from tests.benchmarks.troupe import Troupe, cpu_s, offspring, peak_bytes, troupe

WARMUP = 2  # the first rounds pay for connections, page faults and torch's first steps
SCALES = {"": 1, "k": 1_000, "M": 1_000_000, "G": 1_000_000_000}
ROW_S = 300.0

# Version n holds n everywhere. Whoever scores the last one waits for the curtain: everybody is alive and at rest
# then, and can be measured.
LEARNER = """
import os, time
from pathlib import Path
import torch
from torch import nn

def model():
    made = nn.Module()
    made.w = nn.Parameter(torch.zeros({parameters}))
    return made

def data(source):
    return Path(source)

def train(model, data, settings):
    with torch.no_grad():
        model.w += 1
    return 1

def evaluate(model, data):
    if model.w[0] == {rounds}:
        data.with_name(f"waits-{{os.getpid()}}").touch()
        while not data.exists():
            time.sleep(0.01)
    return {{}}
"""


@dataclass(frozen=True, slots=True)
class Row:
    """What one row measures; `rounds` are those that count, after WARMUP others."""

    label: str
    workers: int
    parameters: int
    rounds: int

    @property
    def all_rounds(self) -> int:
        return WARMUP + self.rounds


class Crowd:
    """Who is measured, by part: `coordinator`, `workers` (the daemons), `children` (which train), `broker`."""

    def __init__(self, company: Troupe, node: Node) -> None:
        daemons = {name: each.pid for name, each in company.running.items()}
        broker = holder(node.folder / BROKER) or 0
        self.pids: dict[str, list[int]] = {
            "coordinator": [daemons.pop("coordinator")],
            "workers": list(daemons.values()),
            "children": [child for pid in daemons.values() for child in offspring(pid)],
            "broker": [broker, *offspring(broker)],
        }

    def cpu(self) -> dict[str, float]:
        return {part: sum(map(cpu_s, pids)) for part, pids in self.pids.items()}

    def peaks(self) -> dict[str, int]:
        """The largest of each part's processes."""
        return {part: max(map(peak_bytes, pids), default=0) for part, pids in self.pids.items()}


def measure(row: Row, folder: Path, flower: str | None) -> dict[str, Any]:
    """All figures of a row."""
    with Node(folder / "rabbitmq") as node:
        figures = federate(row, folder, node)
        figures |= {"pump_bytes_per_s": beside.pump(node.url), "memcpy_bytes_per_s": beside.memcpy()}
    for name in ("pump", "memcpy"):
        figures[f"of_{name}"] = figures["path_bytes_per_s"] / figures[f"{name}_bytes_per_s"]
    if flower is not None:
        try:
            figures["flower"] = against(flower, row, folder, figures["seconds"]["median"])
        except (FluffleError, OSError, ValueError) as problem:  # our own figures stand without it
            figures["flower_failed"] = str(problem)
    return {**asdict(row), **figures}


def federate(row: Row, folder: Path, node: Node) -> dict[str, Any]:
    run, learner, curtain = folder / "run", folder / "adds.py", folder / "curtain"
    learner.write_text(LEARNER.format(parameters=row.parameters, rounds=row.all_rounds))
    fluffle = (sys.executable, "-P", "-m", "fluffle")
    made = subprocess.run(
        [*fluffle, "init", str(learner), str(run)], capture_output=True, text=True, check=False, timeout=ROW_S
    )
    if made.returncode:
        raise RunEnded(made.stderr.strip()[-300:])
    end = time.monotonic() + ROW_S
    with troupe(folder, {"FLUFFLE_BROKER": node.url}) as company:
        for n in range(1, row.workers + 1):
            place = ("--name", f"w{n}", "--data", str(curtain), "--state", str(folder / f"w{n}"))
            company.start(f"w{n}", *fluffle, "worker", str(learner), *place)
        everyone = ("--cohort", str(row.workers), "--quorum", str(row.workers), "--gather-s", "120")
        company.start("coordinator", *fluffle, "coordinator", str(run), "--rounds", str(row.all_rounds), *everyone)
        samples = watch(row, run / "history.jsonl", company, node, end)
        company.until(lambda: len(list(folder.glob("waits-*"))) == row.workers, end)
        peaks, out_bytes = Crowd(company, node).peaks(), sent_by("coordinator", node)
        curtain.touch()
        company.until(lambda: company.running["coordinator"].poll() == 0, end)
    _, weights, _ = read_version(run / "versions" / f"{row.all_rounds:06d}.safetensors")
    if not (np.frombuffer(weights, np.float32) == row.all_rounds).all():
        raise RunEnded("the last version does not hold what was learned")
    lines = rounds_of(run / "history.jsonl")
    seconds = spread(periods([line["at"] for line in lines[WARMUP - 1 :]]))
    path_bytes = lines[-1]["bytes_down"] * row.workers + lines[-1]["bytes_up"]
    return {
        "seconds": seconds,
        "path_bytes": path_bytes,
        "path_bytes_per_s": path_bytes / seconds["median"],
        "cpu_s": cpu_a_round(samples),
        "peak_bytes": peaks,
        # every version goes out once, and the last one once more, to be scored
        "coordinator_out_bytes": out_bytes / (row.all_rounds + 1),
    }


def against(flower: str, row: Row, folder: Path, ours_s: float) -> dict[str, Any]:
    """Flower's figures for a row, each round measured from its beginning to the beginning of the next."""
    sizes = {"workers": row.workers, "parameters": row.parameters, "rounds": row.all_rounds + 1}
    said = beside.flower(flower, folder / "flower", **sizes)
    seconds = spread(periods(said["at"][WARMUP:]))
    peak = {"server_peak_bytes": said["server_peak_bytes"]}
    return {"seconds": seconds, "times_as_long": seconds["median"] / ours_s, **peak}


Samples = list[tuple[int, dict[str, float]]]


def watch(row: Row, history: Path, company: Troupe, node: Node, end: float) -> Samples:
    """Wait for all rounds; the processor time used by then, each time that more rounds were done."""
    samples: Samples = []
    crowd: Crowd | None = None

    def done() -> bool:
        nonlocal crowd
        made = history.read_bytes().count(b'"event": "round"') if history.exists() else 0
        if made >= 1 and made > (samples[-1][0] if samples else 0):
            crowd = crowd or Crowd(company, node)
            samples.append((made, crowd.cpu()))
        return made >= row.all_rounds

    company.until(done, end)
    return samples


def cpu_a_round(samples: Samples) -> dict[str, float]:
    """Seconds of processor time a round, by part; empty when the rounds went by too fast to look twice."""
    (first, before), (last, after) = next((s for s in samples if s[0] >= WARMUP), samples[0]), samples[-1]
    return {part: (after[part] - before[part]) / (last - first) for part in after} if last > first else {}


def rounds_of(history: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, history.read_text().splitlines())
    return [line for line in lines if line["event"] == "round"]


def periods(at: list[float]) -> list[float]:
    """From the end of each round to the end of the next: nothing that a round needs is left out."""
    return [after - before for before, after in itertools.pairwise(at)]


def spread(seconds: list[float]) -> dict[str, float]:
    return {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)}


def sent_by(name: str, node: Node) -> int:
    """Bytes that the broker has received on the connections of one party."""
    listed = node.ctl("list_connections", "client_properties", "recv_oct")
    return sum(int(octets) for octets in re.findall(rf'"{name}-[^"]*"[^\n]*\t(\d+)$', listed, re.MULTILINE))


def rows_of(text: str, rounds: int) -> list[Row]:
    """`2xtoy,4x1M` as rows."""
    rows = []
    for word in text.split(","):
        found = re.fullmatch(r"(\d+)x(?:toy|(\d+(?:\.\d+)?)([kMG]?))", word.strip())
        if found is None:
            raise argparse.ArgumentTypeError(f"{word!r} is not a row: write WORKERSxPARAMETERS, as in 4x1M or 2xtoy")
        parameters = 3 if found[2] is None else int(float(found[2]) * SCALES[found[3]])
        rows.append(Row(word.strip().replace("x", " × "), int(found[1]), parameters, rounds))
    return rows


def machine() -> dict[str, Any]:
    packages = ("fluffle", "torch", "numpy", "aio-pika", "uvloop", "msgpack")
    return {
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
        "python": platform.python_version(),
        "rabbitmq": server_version(),
        **{name: version(name) for name in packages},
    }


def table(rows: list[dict[str, Any]]) -> Table:
    """A column for each row that was measured, because there are more figures than rows."""

    def times(seconds: dict[str, float]) -> str:
        return f"{seconds['median']:.3f} ({seconds['min']:.3f} to {seconds['max']:.3f})"

    def mb(count: float) -> str:
        return f"{count / 1e6:.3g}" if count < 1e6 else f"{count / 1e6:,.0f}"

    parts = ("coordinator", "workers", "children", "broker")
    lines: dict[str, Callable[[dict[str, Any]], str]] = {
        "seconds a round": lambda r: times(r["seconds"]),
        "MB/s, all the way": lambda r: mb(r["path_bytes_per_s"]),
        "bare pump, MB/s": lambda r: mb(r["pump_bytes_per_s"]),
        "  reached of it": lambda r: f"{100 * r['of_pump']:.3g} %",
        "memcpy, MB/s": lambda r: mb(r["memcpy_bytes_per_s"]),
        "  reached of that": lambda r: f"{100 * r['of_memcpy']:.3g} %",
    }
    shown = Table("", *(row["label"] for row in rows), title="a round of Fluffle")
    for what, figure in lines.items():
        shown.add_row(what, *map(figure, rows))
    for part in parts:
        seconds = (row["cpu_s"].get(part) for row in rows)
        shown.add_row(f"CPU s a round, {part}", *("" if s is None else f"{s:.3f}" for s in seconds))
    for part in parts:
        shown.add_row(f"peak MB, {part}", *(mb(row["peak_bytes"][part]) for row in rows))
    shown.add_row("MB out of the coordinator", *(f"{row['coordinator_out_bytes'] / 1e6:.3f}" for row in rows))
    theirs = [row.get("flower") for row in rows]
    if any(theirs):
        shown.add_row("Flower, seconds a round", *(times(it["seconds"]) if it else "" for it in theirs))
        shown.add_row("  times as long", *(f"{it['times_as_long']:.2f}" if it else "" for it in theirs))
        shown.add_row("  peak MB, its server", *(mb(it["server_peak_bytes"]) if it else "" for it in theirs))
    return shown


def main(words: list[str] | None = None) -> int:
    asked = argparse.ArgumentParser(description="Measure what a round costs on this machine.")
    asked.add_argument("--rows", default="2xtoy,4x1M,4x10M", help="WORKERSxPARAMETERS, with commas: 4x1M,2x40M")
    asked.add_argument("--rounds", type=int, default=10, help=f"rounds that count, after {WARMUP} others")
    asked.add_argument("--flower", metavar="PYTHON", help="a Python that has flwr 1.13, to compare with")
    asked.add_argument("--json", type=Path, metavar="FILE", help="write all figures there, too")
    given = asked.parse_args(words)
    try:
        rows = rows_of(given.rows, given.rounds)
    except argparse.ArgumentTypeError as problem:
        asked.error(str(problem))
    if given.rounds < 1:
        asked.error("--rounds must be at least 1")
    out, done = Console(highlight=False), list[dict[str, Any]]()
    failed: dict[str, str] = {}
    for row in rows:
        out.print(f"measuring {row.label}: {row.all_rounds} rounds …")
        try:
            with tempfile.TemporaryDirectory(prefix="fluffle-bench-") as folder:
                done.append(measure(row, Path(folder), given.flower))
        except Exception as problem:  # noqa: BLE001 - whatever it is, the other rows are not to be lost
            failed[row.label] = str(problem)
        else:
            failed |= {f"{row.label}, Flower": done[-1]["flower_failed"]} if "flower_failed" in done[-1] else {}
    for what, why in failed.items():
        out.print(f"{what} failed: {why}", markup=False, style="red")
    about = machine()
    if done:
        out.print(table(done))
    out.print(", ".join(f"{name} {value}" for name, value in about.items()), style="dim")
    if given.json:
        given.json.write_text(json.dumps({"machine": about, "rows": done, "failed": failed}, indent=2) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
