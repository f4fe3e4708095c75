"""One federation to measure: a private RabbitMQ, a coordinator and workers as real processes, and what they cost.

Its learner adds one to every parameter and so does nearly no training. Knows how to look from outside: at the run's
history, at /proc, at the broker's counters. Knows nothing of how a round is made.
"""

import asyncio
import itertools
import json
import math
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from broker import rabbit, topology
from broker.errors import RunEnded
from broker.federation import Federation, Party, definitions
from broker.files import read_version
from broker.folder import BROKER, free_ports
from broker.pinned import draw_keys
from broker.processes import holder
from tests.benchmarks import dropouts
from tests.benchmarks.pump import pump
from tests.benchmarks.rows import WARMUP, Row
from tests.benchmarks.troupe import Troupe, cpu_s, offspring, peak_bytes, troupe
from tests.certificates import Authority, secured
from tests.node import Node

ROW_S = 600.0
GATHER_S = "240"
FLUFFLE = (sys.executable, "-P", "-m", "fluffle")

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
class Figures:
    """What a federation cost: `periods` are the seconds of each round that counts, the rest is of one round."""

    periods: list[float]
    down_bytes: int
    up_bytes: int
    coordinator_out_bytes: float
    cpu_s: dict[str, float]
    peak_bytes: dict[str, int]
    pump_bytes_per_s: float


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


def federate(row: Row, folder: Path, *, tls: bool = False) -> Figures:
    """Make a row's rounds in a new folder, and then see what its broker can carry.

    Args:
        row: what is measured.
        folder: made.
        tls: everybody is invited, and comes by mutual TLS.

    Raises:
        FluffleError: they were not made, and why.
    """
    folder.mkdir()
    by, port = Authority(), next(free_ports())
    with Node(folder / "rabbitmq", conf=secured(folder, by, port) if tls else "") as node:
        run, learner, curtain = folder / "run", folder / "adds.py", folder / "curtain"
        learner.write_text(LEARNER.format(parameters=row.parameters, rounds=row.all_rounds))
        init(learner, run)
        end = time.monotonic() + ROW_S
        if tls:
            invite(node, row, by, f"amqps://localhost:{port}/")
        with troupe(folder, {} if tls else {"FLUFFLE_BROKER": node.url}) as company:
            start(company, row, learner, run)
            samples = watch(row, run / "history.jsonl", company, node, end)
            if not row.secure:
                company.until(lambda: len(list(folder.glob("waits-*"))) >= row.hosts, end)
            peaks, out_bytes = Crowd(company, node).peaks(), sent_by("coordinator", node)
            curtain.touch()
            company.until(lambda: company.running["coordinator"].poll() == 0, end)
        check(run / "versions" / f"{row.all_rounds:06d}.safetensors", row)
        lines = rounds_of(run / "history.jsonl")
        if row.secure:
            check_sums(lines, row)
        return Figures(
            periods=periods([line["at"] for line in lines]),
            down_bytes=lines[-1]["bytes_down"] * row.workers,
            up_bytes=lines[-1]["bytes_up"],
            # every version goes out once, and the last one once more, to be scored
            coordinator_out_bytes=out_bytes / (row.all_rounds + 1),
            cpu_s=cpu_a_round(samples),
            peak_bytes=peaks,
            pump_bytes_per_s=pump(node.url),
        )


def init(learner: Path | str, run: Path, *options: str) -> None:
    words = [*FLUFFLE, "init", str(learner), str(run), *options]
    made = subprocess.run(words, capture_output=True, text=True, check=False, timeout=ROW_S)
    if made.returncode:
        raise RunEnded(made.stderr.strip()[-300:])


SPARE = 3


def invite(node: Node, row: Row, by: Authority, broker: str) -> None:
    """Do what an operator does: users with their rights, queues, and an invitation for everyone."""
    workers = row.names
    parties = {name: Party("") for name in ("operator", "coordinator", *workers)}
    held = definitions(Federation("fluffle", ("localhost",), 5671, "https://localhost:15671", True, parties, {}))
    for may in held["permissions"]:
        name = may["user"]
        if name == "operator":  # as whom the benchmark does not come
            continue
        role = "worker" if name in workers else "coordinator"
        by.invite(name, broker, role=role).write(node.folder.parent / f"{name}.fluffle")
        node.ctl("add_user", name, "for a moment")
        node.ctl("clear_password", name)
        node.ctl("set_permissions", name, may["configure"], may["write"], may["read"])
    asyncio.run(declare(node.url, workers))


async def declare(url: str, workers: list[str]) -> None:
    link = await rabbit.connect(url, name="operator")
    for part in (topology.FEDERATION, *(topology.of_worker(name, invited=True) for name in workers)):
        await link.declare(part)
    await link.close()


def start(company: Troupe, row: Row, learner: Path, run: Path) -> None:
    plan, member = secrets_of(row, company.folder / "keys") if row.secure else ((), ())

    def invited(name: str) -> tuple[str, ...]:
        file = company.folder / f"{name}.fluffle"
        return ("--invite", str(file)) if file.exists() else ()

    dropping = (sys.executable, "-P", dropouts.__file__, ",".join(row.names), str(row.lost))
    work = (*(dropping if row.lost else FLUFFLE), "worker", str(learner))
    for number, share in enumerate(row.shares, 1):
        name = f"w{number}"
        many = ("--many", str(share)) if row.hosts < row.workers else ()
        place = ("--name", name, "--data", str(company.folder / "curtain"), "--state", str(company.folder / name))
        company.start(name, *work, *place, *many, *invited(name), *member)
    everyone = ("--cohort", str(row.workers), "--quorum", str(row.workers - row.lost), "--gather-s", GATHER_S)
    # in secure rounds nobody scores the last version, and so nothing holds the run up until it is looked at
    rounds = row.all_rounds + (SPARE if row.secure else 0)
    words = ("coordinator", str(run), "--rounds", str(rounds), *everyone, *invited("coordinator"), *plan)
    company.start("coordinator", *FLUFFLE, *words)


def secrets_of(row: Row, keys: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Options of the coordinator, and of each worker; everyone has a key and knows the others'."""
    roster = ("--roster", str(draw_keys(keys, row.names)))
    # ones everywhere have this norm
    clip = ("--clip", str(math.ceil(math.sqrt(row.parameters)) + 1), "--examples-max", "1")
    return ("--privacy", "secure", *clip, *roster), (*roster, "--identity", str(keys / "{name}.key"))


def check(version: Path, row: Row) -> None:
    _, weights, _ = read_version(version)
    if not (np.frombuffer(weights, np.float32) == row.all_rounds).all():
        raise RunEnded("the last version does not hold what was learned")


def check_sums(lines: list[dict[str, Any]], row: Row) -> None:
    """Whether in each round all had dealt, those who were to drop out did so then, and all others are in the sum.

    Raises:
        RunEnded: it was not so, and the row measures something else than it says.
    """
    for line in lines:
        dropping = dropouts.dropping(row.names, row.lost, line["round"])
        gone, left = line["secure"].get("gone"), line["secure"].get("of", ())
        if gone != dict.fromkeys(dropping, dropouts.WHY) or {*left} != {*row.names} - {*dropping}:
            raise RunEnded(
                f"round {line['round']} has {len(left)} updates in its sum and has lost {gone}, where it was to "
                f"lose {row.lost} of {row.workers} after they had dealt"
            )


Samples = list[tuple[int, dict[str, float]]]


def watch(row: Row, history: Path, company: Troupe, node: Node, end: float) -> Samples:
    """Wait for all rounds; the processor time used by then, each time that more rounds were done."""
    samples: Samples = []
    crowd: Crowd | None = None
    seen = made = 0

    def done() -> bool:
        nonlocal crowd, seen, made
        size = history.stat().st_size if history.exists() else 0
        if size > seen:
            seen, made = size, len(rounds_of(history))
            if made > (samples[-1][0] if samples else 0):
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
    whole = history.read_text().rpartition("\n")[0]  # the last line may be half written
    lines = map(json.loads, whole.splitlines())
    return [line for line in lines if line["event"] == "round"]


def periods(at: list[float]) -> list[float]:
    """From the end of each round that counts to the end of the next: nothing that a round needs is left out."""
    return [after - before for before, after in itertools.pairwise(at[WARMUP - 1 :])]


def sent_by(name: str, node: Node) -> int:
    """Bytes that the broker has received on the connections of one party."""
    listed = node.ctl("list_connections", "client_properties", "recv_oct")
    return sum(int(octets) for octets in re.findall(rf'"{name}-[^"]*"[^\n]*\t(\d+)$', listed, re.MULTILINE))
