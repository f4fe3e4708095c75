"""The training process as the daemon sees it: kept between tasks, replaced when it dies, and never left behind."""

import asyncio
import contextlib
import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
import uvloop

from broker.errors import LearnerFailed, UsageError
from broker.messages import Scalar
from broker.tensors import FLOATS, as_float64, view
from workers.training import Trainer
from workers.trial import try_learner
from workers.work import Done, Work

# a learner that does whatever the settings say, and says through a pipe that it has begun
LEARNER = """
import ctypes, os, subprocess, sys, time
import torch

def model():
    return torch.nn.Sequential(torch.nn.Linear(2, 1), torch.nn.BatchNorm1d(1))

def data(source):
    if source == "nowhere":
        raise ValueError("there is no such place.")
    if source == "abyss":
        os._exit(7)
    return {"tasks": 0}

def evaluate(model, data):
    return {"loss": float(model[0].weight.sum())}

def train(model, data, settings):
    data["tasks"] += 1
    print("learners may print")
    if "begun" in settings:
        with open(settings["begun"], "w") as pipe:
            pipe.write(settings.get("child") and str(subprocess.Popen(["sleep", "1000"]).pid) or "begun")
    what = settings.get("do")
    if what == "raise":
        raise RuntimeError("bad luck")
    if what == "exit":
        sys.exit(3)
    if what == "end":
        os._exit(3)
    if what == "crash":
        ctypes.string_at(0)
    if what == "be killed":
        os.kill(os.getpid(), 9)
    if what == "hang":
        ctypes.PyDLL(None).pause()  # for ever, and holding the interpreter's lock
    with torch.no_grad():
        model[0].weight += 1
        model[1].num_batches_tracked += 2
    return 5, {"tasks": data["tasks"]}
"""
SWIFT_S = 20.0


def work(*, train: bool = True, **settings: Scalar) -> Work:
    return Work(train=train, evaluate=True, seed=1, settings=settings, round=1)


@pytest.fixture
def learner(tmp_path: Path) -> str:
    path = tmp_path / "obedient.py"
    path.write_text(LEARNER)
    return str(path)


def open_files() -> list[str]:
    """What this process has open; but for /dev/null, which uvloop opens once and keeps."""
    links = []
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the listing itself was one of them
            links.append(str(link.readlink()))
    return sorted(link for link in links if link != "/dev/null")


@contextlib.asynccontextmanager
async def training(learner: str, folder: Path) -> AsyncIterator[Trainer]:
    """A started trainer, with version 0 in `folder`/start; afterwards nothing of it is left."""
    before = open_files()
    trainer = Trainer(learner, "here", folder)
    try:
        await trainer.draw(folder / "start", seed=0)
        yield trainer
    finally:
        pid = trainer.pid
        await trainer.stop()
        await trainer.stop()
    if pid is not None:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert open_files() == before


async def run(trainer: Trainer, folder: Path, asked: Work) -> Done:
    async with asyncio.timeout(SWIFT_S):
        return await trainer.run(asked, await trainer.start(), folder / "start")


def gone(pidfd: int) -> bool:
    """Wait for a process to end; its id cannot be mistaken for another's."""
    try:
        return bool(select.select([pidfd], [], [], SWIFT_S)[0])
    finally:
        os.close(pidfd)


async def begun(trainer: Trainer, folder: Path, asked: Work) -> tuple[asyncio.Task[Done], str]:
    """A task that is being trained, and what the learner wrote when it began."""
    pipe = folder / "begun"
    os.mkfifo(pipe)
    running = asyncio.create_task(
        run(trainer, folder, Work(True, True, 1, {**asked.settings, "begun": str(pipe)}, 1))
    )
    async with asyncio.timeout(SWIFT_S):
        said = await asyncio.to_thread(pipe.read_text)
    pipe.unlink()
    return running, said


async def test_tasks_share_the_data_and_a_learners_failure_costs_one_task_only(learner: str, tmp_path: Path) -> None:
    async with training(learner, tmp_path) as trainer:
        pid = trainer.pid
        first = await run(trainer, tmp_path, work())
        assert (first.examples, first.metrics) == (5, {"tasks": 1.0})
        assert first.delta_file == tmp_path / "start.delta"
        layout = await trainer.start()
        raw = first.delta_file.read_bytes()
        assert len(raw) == layout.size_bytes
        floats = [s for s in layout.segments if s.dtype in FLOATS]
        moved = np.concatenate([as_float64(view(raw[s.start : s.stop], s.dtype), s.dtype) for s in floats])
        assert sorted(moved) == pytest.approx([0, 0, 0, 0, 0, 1, 1])
        counter = raw[layout.offsets["1.num_batches_tracked"] :][:8]
        assert int.from_bytes(counter, "little") == 2  # a whole number travels as it is, not as a difference

        with pytest.raises(LearnerFailed, match=r"train\(\) of the learner raised RuntimeError: bad luck ← obedient"):
            await run(trainer, tmp_path, work(do="raise"))
        assert not first.delta_file.exists()
        with pytest.raises(LearnerFailed, match=r"train\(\) of the learner raised SystemExit: 3"):
            await run(trainer, tmp_path, work(do="exit"))
        scored = await run(trainer, tmp_path, work(train=False))
        assert (scored.examples, scored.delta_file, scored.scores) == (None, None, first.scores)
        assert (await run(trainer, tmp_path, work())).metrics == {"tasks": 4.0}
        assert trainer.pid == pid


async def test_a_process_that_dies_costs_its_task_and_the_next_one_has_a_new_process(
    learner: str, tmp_path: Path
) -> None:
    async with training(learner, tmp_path) as trainer:
        for do, said in (
            ("end", "ended by itself with status 3"),
            ("crash", r"ended with signal 11 \(a crash in native code\)"),
            ("be killed", r"ended with signal 9 \(killed: out of memory\?\)"),
        ):
            with pytest.raises(LearnerFailed, match=said):
                await run(trainer, tmp_path, work(do=do))
        assert (await run(trainer, tmp_path, work())).metrics == {"tasks": 1.0}

        assert trainer.pid is not None
        idle = os.pidfd_open(trainer.pid)
        os.kill(trainer.pid, signal.SIGKILL)
        assert gone(idle)
        assert (await run(trainer, tmp_path, work())).metrics == {"tasks": 1.0}


async def test_a_cancelled_task_ends_the_process_whatever_it_does_and_all_it_started(
    learner: str, tmp_path: Path
) -> None:
    async with training(learner, tmp_path) as trainer:
        running, started = await begun(trainer, tmp_path, work(do="hang", child=True))
        assert trainer.pid is not None
        pidfds = [os.pidfd_open(trainer.pid), os.pidfd_open(int(started))]
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        for pidfd in pidfds:
            assert gone(pidfd)
        assert (await run(trainer, tmp_path, work())).metrics == {"tasks": 1.0}


async def test_stopping_in_the_midst_of_a_task_is_a_failure_of_that_task(learner: str, tmp_path: Path) -> None:
    async with training(learner, tmp_path) as trainer:
        running, _ = await begun(trainer, tmp_path, work(do="hang"))
        await trainer.stop()
        with pytest.raises(LearnerFailed, match="ended with signal 9"):
            await running


async def test_what_the_user_can_mend_is_said_in_a_sentence(learner: str, tmp_path: Path) -> None:
    trainer = Trainer(learner, "nowhere", tmp_path)
    said = re.escape("data('nowhere') of the learner obedient failed: ValueError: there is no such place.")
    with pytest.raises(UsageError, match=said):
        await trainer.start()
    assert trainer.pid is None


async def test_a_process_that_dies_while_it_loads_the_data_is_a_failure(learner: str, tmp_path: Path) -> None:
    trainer = Trainer(learner, "abyss", tmp_path)
    with pytest.raises(LearnerFailed, match="ended by itself with status 7"):
        await trainer.start()
    assert trainer.pid is None


def test_the_same_works_on_the_loop_that_the_daemon_runs_on(learner: str, tmp_path: Path) -> None:
    async def all_of_it() -> None:
        async with training(learner, tmp_path) as trainer:
            running, _ = await begun(trainer, tmp_path, work(do="hang"))
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running

    uvloop.run(all_of_it())


DAEMON = """
import asyncio, sys
from pathlib import Path
from workers.training import Trainer
from workers.work import Work

async def main(learner, folder, begun):
    trainer = Trainer(learner, "here", folder)
    layout = await trainer.draw(folder / "start", seed=0)
    print(trainer.pid, flush=True)
    await trainer.run(Work(True, False, 1, {"do": "hang", "begun": begun}, 1), layout, folder / "start")

assert "torch" not in sys.modules
asyncio.run(main(sys.argv[1], Path(sys.argv[2]), sys.argv[3]))
"""


def test_the_process_dies_with_the_daemon(learner: str, tmp_path: Path) -> None:
    pipe = tmp_path / "begun"
    os.mkfifo(pipe)
    command = [sys.executable, "-c", DAEMON, learner, str(tmp_path), str(pipe)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as daemon:
        assert daemon.stdout is not None
        child = os.pidfd_open(int(daemon.stdout.readline()))
        assert pipe.read_text() == "begun"
        daemon.kill()
    assert gone(child)


def test_nothing_that_the_daemon_imports_imports_torch() -> None:
    code = "import sys, workers.training, workers.trial, workers.work; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_trial_measures_a_learner() -> None:
    report = try_learner("line", "here")
    assert (report.tensors, report.parameters, report.weights_bytes, report.examples) == (2, 2, 8, 64)
    assert report.after["loss"] < report.before["loss"] / 2
    assert report.warnings == ()


def test_a_trial_refuses_a_model_that_is_another_every_time(tmp_path: Path) -> None:
    path = tmp_path / "moody.py"
    path.write_text("""
import itertools, torch
sizes = itertools.count(2)
def model(): return torch.nn.Linear(next(sizes), 1)
def data(source): return None
def train(model, data, settings): return 1
def evaluate(model, data): return {}
""")
    with pytest.raises(
        UsageError, match=r"different tensors \(weight float32\[1, 3\] should be weight float32\[1, 2\]\)"
    ):
        try_learner(str(path), "")
