"""The training process as the daemon sees it: kept between tasks, replaced when it dies, and never left behind."""

import asyncio
import contextlib
import errno
import gc
import math
import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvloop

from broker.contract import Contract, fingerprint
from broker.errors import LearnerFailed, UsageError
from broker.formats import count_floats, format_of
from broker.messages import Attempt, Scalar
from broker.norms import squares
from broker.tensors import FLOATS, Layout, TensorSpec, as_float64, view
from tests.system.kept_guard import kept_guard
from workers import guarded
from workers.guarded import Guard
from workers.learner import load
from workers.residuals import Residual, Residuals
from workers.spool import Spool
from workers.training import Trainer
from workers.trial import try_learner
from workers.work import Done, Work

# a learner that does whatever the settings say, and says through a pipe that it has begun
LEARNER = """
import ctypes, os, subprocess, sys, time
import numpy, torch

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
    if what == "nap":
        time.sleep(0.2)
    if what == "widen":
        model.double()
    if what == "mind":
        numpy.seterr(all="raise")
        settings["tiny"] = 1e-40
    if what == "hang":
        ctypes.PyDLL(None).pause()  # for ever, and holding the interpreter's lock
    with torch.no_grad():
        if what == "drift":
            model[0].bias += 0.123456
            model[0].weight += torch.tensor([[0.0625, -0.765432]])
        model[0].weight += settings.get("tiny", 1)
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
    """What this process has open, but for /dev/null, which uvloop opens once and keeps.

    And but for removed models, at which a test may still look, or the traceback of an error.
    """
    gc.collect()  # what another test has left must not be cleared away while we look
    links = []
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the listing itself was one of them
            links.append(str(link.readlink()))
    return sorted(link for link in links if link != "/dev/null" and not link.endswith(".models (deleted)"))


@contextlib.asynccontextmanager
async def training(learner: str, folder: Path, *, guard: Guard | None = None) -> AsyncIterator[Trainer]:
    """A started trainer, with the guard that tests share or another; afterwards nothing of it is left."""
    guard = guard or kept_guard()
    gc.collect()  # what other tests have left to be collected holds files
    before = open_files()
    trainer = Trainer(learner, Spool(folder / "models"))
    trainer._guard = guard
    try:
        await trainer.start("here")
        yield trainer
    finally:
        pid = trainer.pid
        await trainer.stop()
        await trainer.stop()
        trainer.spool.remove()
    if pid is not None:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert open_files() == before
    assert not trainer.spool.folder.exists()


async def run(trainer: Trainer, asked: Work, source: str = "here", residual: Residual | None = None) -> Done:
    async with asyncio.timeout(SWIFT_S):
        layout, start = await trainer.draw(seed=0)
        return await trainer.run(asked, layout, source=source, weights=start, residual=residual)


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
    running = asyncio.create_task(run(trainer, Work(True, True, 1, {**asked.settings, "begun": str(pipe)}, 1)))
    async with asyncio.timeout(SWIFT_S):
        said = await asyncio.to_thread(pipe.read_text)
    pipe.unlink()
    return running, said


async def test_tasks_share_the_data_and_a_learners_failure_costs_one_task_only(learner: str, tmp_path: Path) -> None:
    async with training(learner, tmp_path, guard=Guard(1, 0)) as trainer:
        pid = trainer.pid
        first = await run(trainer, work())
        assert (first.examples, first.metrics) == (5, {"tasks": 1.0})
        assert first.delta is not None
        layout = await trainer.start()
        raw = first.delta.data
        assert len(raw) == layout.size_bytes
        floats = [s for s in layout.segments if s.dtype in FLOATS]
        moved = np.concatenate([as_float64(view(raw[s.start : s.stop], s.dtype), s.dtype) for s in floats])
        assert sorted(moved) == pytest.approx([0, 0, 0, 0, 0, 1, 1])
        counter = raw[layout.offsets["1.num_batches_tracked"] :][:8]
        assert int.from_bytes(counter, "little") == 2  # a whole number travels as it is, not as a difference

        with pytest.raises(LearnerFailed, match=r"train\(\) of the learner raised RuntimeError: bad luck ← obedient"):
            await run(trainer, work(do="raise"))
        with pytest.raises(LearnerFailed, match=r"train\(\) of the learner raised SystemExit: 3"):
            await run(trainer, work(do="exit"))
        scored = await run(trainer, work(train=False))
        assert (scored.examples, scored.delta, scored.scores) == (None, None, first.scores)
        again = await run(trainer, work())
        assert again.metrics == {"tasks": 4.0}
        assert again.delta is not None
        assert again.delta.data == raw
        assert trainer.pid == pid
        assert trainer.spool.in_use == 2
        del first, again, raw, counter
        assert trainer.spool.in_use == 0


async def test_each_source_has_its_data_and_they_share_one_model(learner: str, tmp_path: Path) -> None:
    async with training(learner, tmp_path) as trainer:
        for source, tasks in (("here", 1), ("there", 1), ("here", 2), ("there", 2)):
            assert (await run(trainer, work(), source)).metrics == {"tasks": tasks}
        with pytest.raises(LearnerFailed, match=r"data\('nowhere'\) of the learner obedient failed: ValueError"):
            await run(trainer, work(), "nowhere")
        assert (await run(trainer, work(), "there")).metrics == {"tasks": 3}


async def test_a_train_that_changes_the_models_tensors_costs_one_task_only(learner: str, tmp_path: Path) -> None:
    async with training(learner, tmp_path) as trainer:
        with pytest.raises(LearnerFailed, match=r"train changed which tensors the model has: 0.bias float64\[1\]"):
            await run(trainer, work(do="widen"))
        assert (await run(trainer, work())).metrics == {"tasks": 2}


async def test_a_delta_for_which_the_disk_has_no_room_costs_one_task_only(
    learner: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with training(learner, tmp_path) as trainer:
        layout, start = await trainer.draw(seed=0)
        with monkeypatch.context() as full:
            full.setattr(os, "posix_fallocate", no_room)
            with pytest.raises(LearnerFailed, match=r"disk has no room for 4,096 bytes of models \(No space left"):
                await trainer.run(work(), layout, source="here", weights=start)
        assert (await trainer.run(work(), layout, source="here", weights=start)).metrics == {"tasks": 1}
        del start


@pytest.mark.parametrize("name", ["bfloat16", "int8", "top-k"])
async def test_what_a_format_leaves_out_of_an_update_is_made_up_for(learner: str, tmp_path: Path, name: str) -> None:
    residuals, rounds = Residuals(tmp_path, "ann"), 10
    async with training(learner, tmp_path) as trainer:
        layout = await trainer.start()

        async def updated(number: int, name: str) -> np.ndarray[Any, np.dtype[np.float32]]:
            """The update as the coordinator reads it."""
            asked = Work(True, False, number, {"do": "drift"}, number, format=name, keep=0.2)
            residual = residuals.of(Attempt("run", number, 1))
            done = await run(trainer, asked, residual=residual)
            assert done.delta is not None
            assert name == "float32" or not residual.left.stat().st_mode & 0o077
            assert done.layout == format_of(name, keep=0.2).layout(layout)
            decoded = np.zeros(count_floats(layout), np.float32)
            for where, values in format_of(name, keep=0.2).runs(layout, done.delta.data):
                decoded[where] = values
            return decoded

        exact = await updated(1, "float32")
        assert not residuals.of(Attempt("run", 1, 1)).left.exists()
        total = np.zeros_like(exact)
        for number in range(1, rounds + 1):
            first, again = await updated(number, name), await updated(number, name)
            assert (first == again).all(), "a training that was repeated must give the same bytes"
            residuals.accept(Attempt("run", number, 1))
            total += again
        file = residuals.of(Attempt("run", 1, 1)).owed
        owed = np.fromfile(file, np.float32, count=count_floats(layout))
        assert owed.any()
        np.testing.assert_allclose(total + owed, rounds * exact, rtol=1e-5, atol=1e-5)
        whole = file.read_bytes()
        for damage in (whole[:3] + bytes([whole[3] ^ 64]) + whole[4:], whole[:-8] + bytes(8), whole[:-1]):
            file.write_bytes(damage)
            spoilt = await updated(rounds + 1, name)
            file.unlink()
            assert (spoilt == await updated(rounds + 1, name)).all(), "nothing is known of what is owed then"


async def test_what_a_format_leaves_out_needs_room_on_the_disk(learner: str, tmp_path: Path) -> None:
    async with training(learner, tmp_path) as trainer:
        asked = Work(True, False, 1, {}, 1, format="int8")
        nowhere = Residuals(tmp_path / "gone", "ann").of(Attempt("run", 1, 1))
        with pytest.raises(LearnerFailed, match=r"what the format int8 leaves out .* cannot be kept \(No such file"):
            await run(trainer, asked, residual=nowhere)
        assert (await run(trainer, asked)).examples == 5


def no_room(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


async def test_a_process_that_dies_costs_its_task_and_the_next_one_has_a_new_process(
    learner: str, tmp_path: Path
) -> None:
    async with training(learner, tmp_path) as trainer:
        for do, said in (
            ("end", "ended by itself with status 3"),
            ("crash", r"ended with signal 11 \(a crash in native code\)"),
            ("be killed", r"ended with signal 9 \(killed\)"),
        ):
            with pytest.raises(LearnerFailed, match=said):
                await run(trainer, work(do=do))
        assert (await run(trainer, work())).metrics == {"tasks": 1.0}

        assert trainer.pid is not None
        idle = os.pidfd_open(trainer.pid)
        os.kill(trainer.pid, signal.SIGKILL)
        assert gone(idle)
        assert (await run(trainer, work())).metrics == {"tasks": 1.0}


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
        assert (await run(trainer, work())).metrics == {"tasks": 1.0}
        for pidfd in pidfds:
            assert gone(pidfd)


async def test_of_a_task_that_nobody_waits_for_any_more_nobody_hears_how_it_failed(
    learner: str, tmp_path: Path
) -> None:
    heard: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, what: heard.append(what))
    async with training(learner, tmp_path) as trainer:
        running, _ = await begun(trainer, tmp_path, work(do="hang"))
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
    del running
    gc.collect()
    assert not heard


async def test_a_cancelled_task_that_soon_ends_by_itself_costs_no_process(learner: str, tmp_path: Path) -> None:
    async with training(learner, tmp_path) as trainer:
        pid, trainer.patience_s = trainer.pid, SWIFT_S
        running, _ = await begun(trainer, tmp_path, work(do="nap"))
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert (await run(trainer, work())).metrics == {"tasks": 2.0}
        assert trainer.pid == pid


async def test_stopping_in_the_midst_of_a_task_is_a_failure_of_that_task(learner: str, tmp_path: Path) -> None:
    async with training(learner, tmp_path) as trainer:
        running, _ = await begun(trainer, tmp_path, work(do="hang"))
        await trainer.stop()
        with pytest.raises(LearnerFailed, match="ended with signal 9"):
            await running


async def test_stopping_while_torch_is_loaded_does_not_wait_for_it(
    learner: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guarded, "END_S", 1000.0)
    trainer = Trainer(learner, Spool(tmp_path / "models"))
    starting = asyncio.create_task(trainer.start("here"))
    while trainer._child is None:  # noqa: ASYNC110 - there is no event to wait for
        await asyncio.sleep(0.001)
    guard = trainer._guard._process
    assert guard
    starting.cancel()
    await trainer.stop()
    assert guard.returncode == -signal.SIGTERM  # which it ignores when it has loaded all
    trainer.spool.remove()


async def test_what_the_user_can_mend_is_said_in_a_sentence(learner: str, tmp_path: Path) -> None:
    async with training(learner, tmp_path) as trainer:
        said = re.escape("data('nowhere') of the learner obedient failed: ValueError: there is no such place.")
        with pytest.raises(UsageError, match=said):
            await trainer.start("nowhere")


async def test_a_learner_that_cannot_be_loaded_leaves_no_process(tmp_path: Path) -> None:
    trainer = Trainer(str(tmp_path / "gone.py"), Spool(tmp_path / "models"))
    with pytest.raises(UsageError, match="there is no learner file"):
        await trainer.start()
    assert trainer.pid is None
    await trainer.stop()  # the guard, which waits for a better learner
    trainer.spool.remove()


async def test_a_process_that_dies_while_it_loads_the_data_is_a_failure(learner: str, tmp_path: Path) -> None:
    async with training(learner, tmp_path) as trainer:
        with pytest.raises(LearnerFailed, match="ended by itself with status 7"):
            await trainer.start("abyss")
        assert trainer.pid is None


def test_the_same_works_on_the_loop_that_the_daemon_runs_on(learner: str, tmp_path: Path) -> None:
    async def all_of_it() -> None:
        async with training(learner, tmp_path, guard=Guard(1, 0)) as trainer:
            running, _ = await begun(trainer, tmp_path, work(do="hang"))
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running

    uvloop.run(all_of_it())


DAEMON = """
import asyncio, sys
from pathlib import Path
from workers.spool import Spool
from workers.training import Trainer
from workers.work import Work

async def main(learner, folder, begun):
    trainer = Trainer(learner, Spool(folder))
    layout, start = await trainer.draw(seed=0)
    print(trainer.pid, flush=True)
    asked = Work(True, False, 1, {"do": "hang", "begun": begun}, 1)
    await trainer.run(asked, layout, source="here", weights=start)

assert "torch" not in sys.modules
asyncio.run(main(sys.argv[1], Path(sys.argv[2]), sys.argv[3]))
"""


def test_the_process_dies_with_the_daemon(learner: str, tmp_path: Path) -> None:
    pipe = tmp_path / "begun"
    os.mkfifo(pipe)
    command = [sys.executable, "-c", DAEMON, learner, str(tmp_path / "models"), str(pipe)]
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
    assert (len(report.layout.specs), report.layout.size_bytes, report.done.examples) == (2, 8, 64)
    assert report.after["loss"] < report.done.scores["loss"] / 2
    assert report.warnings == ()
    line = [TensorSpec("weight", "float32", (1, 1)), TensorSpec("bias", "float32", (1,))]
    assert report.contract == Contract(fingerprint(Layout.of(line)), load("line").file)


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


# -- bounds ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["float32", "bfloat16", "int8", "top-k"])
async def test_a_learner_that_lets_numpy_raise_where_numbers_vanish_is_no_bar_to_small_updates(
    learner: str, tmp_path: Path, name: str
) -> None:
    async with training(learner, tmp_path) as trainer:
        layout = await trainer.start()
        weights = trainer.spool.take(layout.size_bytes)
        weights.data[:] = bytes(layout.size_bytes)
        asked = replace(work(do="mind"), format=name, keep=0.7, clip=0.25)
        done = await trainer.run(asked, layout, source="here", weights=weights)
        assert done.within


@pytest.mark.parametrize("name", ["float32", "bfloat16", "int8", "top-k"])
async def test_an_update_is_scaled_down_to_the_tasks_clip_with_the_same_bits_each_time(
    learner: str, tmp_path: Path, name: str
) -> None:
    fmt, made = format_of(name, keep=0.7), []
    async with training(learner, tmp_path) as trainer:
        layout = await trainer.start()
        for clip in (0.0, 0.25, 0.25):
            weights = trainer.spool.take(layout.size_bytes)
            weights.data[:] = bytes(layout.size_bytes)
            asked = replace(work(do="drift"), format=name, keep=0.7, clip=clip)
            done = await trainer.run(asked, layout, source="here", weights=weights)
            assert done.delta is not None
            made.append((math.sqrt(squares(fmt.runs(layout, done.delta.data))), bytes(done.delta.data)))
            assert done.examples == 5
    assert made[0][0] > 1
    assert 0.2 < made[1][0] <= 0.25 * (1 + 1e-6)
    assert made[1] == made[2]
