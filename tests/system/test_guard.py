"""What a learner can do to the process it runs in, and what the guard lets come of it: a reason, and nothing left."""

import asyncio
import contextlib
import os
import select
import signal
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from broker.errors import LearnerFailed
from tests.system.kept_guard import kept_guard
from workers.guard import LOG_BYTES
from workers.spool import Spool
from workers.training import Trainer
from workers.work import Done, Work

LEARNER = """
import ctypes, os, signal, subprocess, sys, time
import numpy, torch

def model():
    return torch.nn.Linear(2, 1)

def data(source):
    return {"tasks": 0, "kept": [], "more": {}}

def evaluate(model, data):
    return {}

def train(model, data, settings):
    data["tasks"] += 1
    exec(settings.get("code", ""))
    return 5, {"tasks": data["tasks"], **data["more"]}
"""
SWIFT_S = 20.0
# a process that leaves the group, the session and its parent, and says who it is; it must be gone all the same
ESCAPES = """
if not os.fork():
    os.setsid()
    if not os.fork():
        open({pipe!r}, "w").write(str(os.getpid()))
        time.sleep(1000)
    os._exit(0)
os.wait()
"""


@contextlib.asynccontextmanager
async def training(
    folder: Path, *, renew_after: int = 1000, memory_mb: int | None = None, own: bool = False
) -> AsyncIterator[Trainer]:
    """A trainer, with the guard that tests share unless it is to have its own."""
    path = folder / "learner.py"
    path.write_text(LEARNER)
    trainer = Trainer(str(path), Spool(folder / "models"), memory_mb=memory_mb, renew_after=renew_after)
    if not own:
        trainer._guard = kept_guard(memory_mb)
    try:
        yield trainer
    finally:
        await trainer.stop()
        trainer.spool.remove()


async def run(trainer: Trainer, code: str = "") -> Done:
    async with asyncio.timeout(SWIFT_S):
        layout, start = await trainer.draw(seed=0)
        settings = {"code": textwrap.dedent(code)}
        return await trainer.run(Work(True, False, 1, dict(settings), 1), layout, source="here", weights=start)


async def tasks(trainer: Trainer) -> float:
    """Train well; how many tasks this process has been given so far."""
    return (await run(trainer)).metrics["tasks"]


def pipe(folder: Path) -> str:
    os.mkfifo(folder / "pipe")
    return str(folder / "pipe")


def gone(pidfd: int) -> bool:
    try:
        return bool(select.select([pidfd], [], [], SWIFT_S)[0])
    finally:
        os.close(pidfd)


async def test_after_so_many_tasks_a_fresh_process_takes_over(tmp_path: Path) -> None:
    async with training(tmp_path, renew_after=2) as trainer:
        assert [await tasks(trainer) for _ in range(5)] == [1, 2, 1, 2, 1]


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (
            "while True: data['kept'].append(bytearray(50_000_000))",
            r"train\(\) .* MemoryError \(it ran out of memory\)",
        ),
        ("while True: data['kept'].append(numpy.ones(5_000_000))", r"MemoryError \(it ran out of memory\): Una"),
        ("while True: data['kept'].append(torch.ones(9_000_000))", r"RuntimeError \(it ran out of memory\): .*alloc"),
        ("while True: data['kept'].append(object())", r"MemoryError \(it ran out of memory\) ← "),
    ],
    ids=["bytes", "numpy", "torch", "many small objects"],
)
async def test_a_learner_that_takes_more_memory_than_it_may_is_told_so_and_its_process_renewed(
    tmp_path: Path, code: str, said: str
) -> None:
    async with training(tmp_path, memory_mb=700) as trainer:
        assert await tasks(trainer) == 1
        with pytest.raises(LearnerFailed, match=said):
            await run(trainer, code)
        assert await tasks(trainer) == 1


def eagerness(pid: str) -> int:
    """With which the kernel chooses it when memory runs out."""
    return int(Path(f"/proc/{pid}/oom_score_adj").read_text())


async def test_the_kernel_kills_the_training_process_first(tmp_path: Path) -> None:
    async with training(tmp_path) as trainer:
        await tasks(trainer)
        assert eagerness(str(trainer.pid)) == 1000
        assert eagerness("self") < 1000


async def test_what_a_learner_starts_ends_with_its_process_wherever_it_hides(tmp_path: Path) -> None:
    async with training(tmp_path, renew_after=1) as trainer:
        where = pipe(tmp_path)
        said, _ = await asyncio.gather(
            asyncio.to_thread(Path(where).read_text), run(trainer, ESCAPES.format(pipe=where))
        )
        hidden = os.pidfd_open(int(said))
        assert await tasks(trainer) == 1
        assert gone(hidden)


async def test_a_copy_of_the_process_that_returns_from_train_does_not_answer_for_it(tmp_path: Path) -> None:
    async with training(tmp_path) as trainer:
        for number in (1, 3, 5):
            assert (await run(trainer, "os.fork()")).metrics == {"tasks": number}
            assert await tasks(trainer) == number + 1


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("os.closerange(0, 200)", "lost its socket: the learner must not close files"),
        ("os.closerange(0, 200); [open('/dev/null') for _ in range(100)]", "lost its socket"),
        ("class Odd(BaseException): pass\nraise Odd('no error')", r"raised Odd: no error"),
        ("class Mute(RuntimeError):\n  def __str__(self): 1 / 0\nraise Mute", "Mute: its message cannot be read"),
        ("del model.weight", r"train changed which tensors|raised"),
        ("os.abort()", r"signal 6 \(aborted by native code\)"),
        ("os._exit(0)", "ended by itself with status 0"),
        ("os.kill(os.getppid(), 9); time.sleep(1000)", "gone, with its guard"),
    ],
)
async def test_whatever_else_a_learner_does_costs_its_task_only(tmp_path: Path, code: str, said: str) -> None:
    async with training(tmp_path, own="getppid" in code) as trainer:
        with pytest.raises(LearnerFailed, match=said):
            await run(trainer, code)
        assert (await run(trainer)).examples == 5


async def test_a_guard_that_was_killed_while_nothing_is_done_is_replaced_by_the_next_task(tmp_path: Path) -> None:
    async with training(tmp_path, own=True) as trainer:
        await run(trainer)
        assert trainer._guard._process is not None
        assert trainer._child is not None
        trainer._guard._process.kill()
        await trainer._child.ended
        assert (await run(trainer)).examples == 5


async def test_a_learner_that_prints_without_end_fills_no_log(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    async with training(tmp_path, own=True) as trainer:
        await run(trainer, "for _ in range(100): print('x' * 100_000); print('y' * 100_000, file=sys.stderr)")
    said = capfd.readouterr().err
    assert len(said) < LOG_BYTES + 1000
    assert "… the learner has printed 19,934,664 bytes more." in said


async def test_signals_meant_for_the_daemon_do_not_end_the_training_process(tmp_path: Path) -> None:
    async with training(tmp_path) as trainer:
        await tasks(trainer)
        assert trainer.pid is not None
        os.kill(trainer.pid, signal.SIGTERM)
        os.kill(trainer.pid, signal.SIGINT)
        assert await tasks(trainer) == 2


STARTS = """
from multiprocessing import get_context
program = subprocess.Popen(["sleep", "1000"])
copy = get_context("fork").Process(target=time.sleep, args=(1000,))
copy.start()
program.terminate()
copy.terminate()
program.wait()
copy.join()
assert (program.returncode, copy.exitcode) == (-15, -15)
"""
SPAWNS = """
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
    assert pool.submit(evaluate, None, None).result() == {}
"""


async def test_what_a_learner_starts_ends_when_the_learner_tells_it_to(tmp_path: Path) -> None:
    async with training(tmp_path) as trainer:
        await run(trainer, STARTS)


async def test_a_process_that_a_learner_begins_anew_finds_what_the_learner_defines(tmp_path: Path) -> None:
    async with training(tmp_path) as trainer:
        await run(trainer, SPAWNS)


async def test_a_metric_whose_name_is_no_text_that_travels_costs_no_task(tmp_path: Path) -> None:
    async with training(tmp_path) as trainer:
        assert (await run(trainer, r"data['more']['\ud800'] = 1")).metrics == {"tasks": 1, "?": 1}


DAEMON = """
import asyncio, sys
from pathlib import Path
from tests.system.test_guard import ESCAPES, run, training

async def main(folder, pipe):
    async with training(Path(folder), own=True) as trainer:
        await run(trainer, ESCAPES.format(pipe=pipe) + "time.sleep(1000)")

asyncio.run(main(*sys.argv[1:]))
"""


def test_when_the_daemon_is_killed_nothing_is_left_of_what_a_learner_has_started(tmp_path: Path) -> None:
    where = pipe(tmp_path)
    with subprocess.Popen([sys.executable, "-c", DAEMON, str(tmp_path), where]) as daemon:
        hidden = os.pidfd_open(int(Path(where).read_text()))
        daemon.kill()
    assert gone(hidden)
