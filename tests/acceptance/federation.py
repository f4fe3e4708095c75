"""Whole federations of real processes, for tests that kill them."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

from coordinator.store import Store
from fluffle import main
from tests.summed import mean_of
from workers import learner as learners
from workers import task
from workers.work import Work, task_seed

FLUFFLE = (sys.executable, "-P", "-m", "fluffle")
LEARNER = """
import time, zlib
import torch
from torch import nn

def model():
    return nn.Linear(4, 1)

def data(source):
    dice = torch.Generator().manual_seed(zlib.crc32(source.encode()))
    x = torch.randn(50, 4, generator=dice)
    return x, x.sum(1, keepdim=True)

def train(model, data, settings):
    time.sleep(settings.get("nap", 0.0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(5):
        batch = torch.randint(len(data[0]), (16,))
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(data[0][batch]), data[1][batch])
        loss.backward()
        optimizer.step()
    return len(data[0]), {"loss": loss.item()}

def evaluate(model, data):
    return {"loss": nn.functional.mse_loss(model(data[0]), data[1]).item(), "examples": len(data[0])}
"""
ENOUGH_S = 90.0
APART = {"broker", "coordinator", "demo", "worker"}
"""Commands for a process of their own: they start what outlives them, or change its log and its signals."""


def typed(*words: str, env: Mapping[str, str]) -> tuple[int, str, str]:
    """One command to its end: exit status, stdout, stderr. In this process if it may: torch loads for seconds."""
    if words[0] in APART:
        done = subprocess.run([*FLUFFLE, *words], env=env, capture_output=True, text=True, timeout=90, check=False)
        return done.returncode, done.stdout, done.stderr
    path, out, err = [*sys.path], io.StringIO(), io.StringIO()
    here = patch.dict(os.environ, env, clear=True), patch.object(sys, "argv", ["fluffle", *words])
    try:
        with here[0], here[1], redirect_stdout(out), redirect_stderr(err):
            main()
    except SystemExit as ended:
        return int(ended.code or 0), out.getvalue(), err.getvalue()
    finally:
        sys.path[:] = path  # which a learner's folder has joined
    raise AssertionError("a command always ends with a status")


class Federation:
    """A run and the processes that make it."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder = folder
        self.run = folder / "run"
        self.learner = folder / "slow.py"
        self.learner.write_text(LEARNER)
        self.env = {**os.environ, "FLUFFLE_BROKER": url, "XDG_STATE_HOME": str(folder / "state")}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def fluffle(self, *command: str, status: int = 0) -> str:
        """One command to its end; what it printed, on stderr if its status is not 0."""
        found, out, err = typed(*command, env=self.env)
        assert found == status, out + err
        return err if status else out

    def start(self, name: str, *command: str) -> None:
        self.launch(name, *FLUFFLE, *command)

    def launch(self, name: str, *command: str) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen([*command], env=self.env, stdout=log, stderr=log)

    def worker(self, name: str) -> None:
        self.start(name, "worker", str(self.learner), "--name", name, "--data", name)

    def coordinator(self, *options: str) -> None:
        self.start("coordinator", "coordinator", str(self.run), *options)

    def kill(self, name: str, number: int = signal.SIGKILL) -> int:
        process = self.processes[name]
        process.send_signal(number)
        return process.wait(ENOUGH_S)

    def wait(self, name: str) -> int:
        return self.processes[name].wait(ENOUGH_S)

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def until(self, what: Callable[[], Any]) -> None:
        """Wait for something that other processes will bring about."""
        end = time.monotonic() + ENOUGH_S
        while not what():
            assert time.monotonic() < end, "\n".join(f"{name}: {self.log(name)}" for name in self.processes)
            time.sleep(0.02)

    def history(self) -> list[dict[str, Any]]:
        with suppress(FileNotFoundError):
            return [json.loads(line) for line in (self.run / "history.jsonl").read_text().splitlines()]
        return []

    def rounds(self) -> list[dict[str, Any]]:
        return [line for line in self.history() if line["event"] == "round"]

    def version(self, number: int) -> bytes:
        """The tensors of a version; the header before them names the run, which differs from run to run."""
        raw = (self.run / "versions" / f"{number:06d}.safetensors").read_bytes()
        return raw[8 + int.from_bytes(raw[:8], "little") :]

    def undisturbed(self, rounds: int, workers: Sequence[str]) -> bytes:
        """What `version(rounds)` comes to if nothing happens: by a plain loop, in this process."""
        store, found = Store.open(self.run), learners.load(str(self.learner))
        places = {name: task.set_up(found, name) for name in workers}
        layout, weights = store.load(0)
        for number in range(1, rounds + 1):
            updates: list[tuple[int, bytes]] = []
            for name, place in places.items():
                seed = task_seed(store.plan.seed, number, name)
                work = Work(train=True, evaluate=False, seed=seed, settings={}, round=number)
                done = task.do(place, work, layout=layout, received=weights)
                assert done.examples
                assert done.delta
                updates.append((done.examples, bytes(done.delta)))
            weights = memoryview(mean_of(layout, weights, updates))
        return bytes(weights)

    def end(self) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                process.terminate()
        for process in self.processes.values():
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
