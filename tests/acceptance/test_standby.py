"""Two real coordinators of one run: the second waits, takes over, and the first can do no harm any more."""

import contextlib
import fcntl
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from coordinator.claim import LOCK
from tests.acceptance.federation import Federation

pytestmark = pytest.mark.timeout(180)
ROUNDS, WORKERS = 8, ["w1", "w2"]
PLAN = ("--rounds", str(ROUNDS), "--cohort", "2", "--quorum", "2")


def begin(f: Federation) -> None:
    """Two workers, a coordinator, and a second one that stands by, when the first is at work."""
    for name in WORKERS:
        f.worker(name)
    f.fluffle("init", str(f.learner), str(f.run), "--seed", "3", "--set", "nap=0.3")
    f.coordinator(*PLAN)
    f.until((f.run / "epoch").exists)
    f.start("second", "coordinator", str(f.run), *PLAN)
    f.until(lambda: "standing by until it is gone" in f.log("second"))


def stop(coordinator: subprocess.Popen[bytes], run: Path) -> None:
    """Stop a coordinator, but not while it writes: until it goes on or is ended, nobody else may then."""
    with (run / LOCK).open("a") as lock:
        for _ in range(100):
            coordinator.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, coordinator.pid, os.WSTOPPED)
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            coordinator.send_signal(signal.SIGCONT)
            time.sleep(0.02)
    pytest.fail("the coordinator never lets go of its run")


def assert_whole(f: Federation) -> None:
    assert f.version(ROUNDS) == f.undisturbed(ROUNDS, WORKERS)
    assert [(line["round"], sorted(line["counted"])) for line in f.rounds()] == [
        (number, WORKERS) for number in range(1, ROUNDS + 1)
    ]


def test_a_standby_takes_over_from_a_coordinator_that_is_killed(
    federation: Federation, record_property: Callable[[str, object], None]
) -> None:
    f = federation
    begin(f)
    f.until(lambda: len(f.rounds()) >= 2)
    f.kill("coordinator")
    killed_at, made = time.monotonic(), len(f.rounds()) + 1  # one may have been made and not noted
    f.until(lambda: len(f.rounds()) > made)
    took_s = time.monotonic() - killed_at
    record_property("measured", f"from kill -9 to the standby's next round: {took_s:.1f} s")
    assert took_s < 15.0
    assert f.wait("second") == 0
    assert "goes on with w1, w2" in f.log("second")
    assert all(line["attempt"] == 1 for line in f.rounds() if line["round"] < made)
    assert_whole(f)


def test_a_coordinator_that_was_stopped_and_has_been_followed_ends_and_does_no_harm(
    federation: Federation, record_property: Callable[[str, object], None]
) -> None:
    f = federation
    begin(f)
    f.until(lambda: len(f.rounds()) >= 2)
    first = f.processes["coordinator"]
    stop(first, f.run)
    stopped_at = time.monotonic()
    made = len(f.rounds())
    try:
        f.until(lambda: len(f.rounds()) > made)
        took_s = time.monotonic() - stopped_at
        record_property("measured", f"from SIGSTOP to the standby's next round: {took_s:.1f} s")
        assert took_s < 30.0
    finally:
        first.send_signal(signal.SIGCONT)
    assert f.wait("coordinator") == 1
    assert "another coordinator has taken over the run" in f.log("coordinator").splitlines()[-1]
    assert f.wait("second") == 0
    assert "no sign of life of the coordinator" in f.log("second")
    assert_whole(f)


@pytest.mark.chaos
def test_a_standby_ends_well_when_there_is_nothing_left_to_do(federation: Federation) -> None:
    f = federation
    begin(f)
    assert f.wait("coordinator") == 0
    assert f.wait("second") == 0
    assert f"all {ROUNDS} rounds" in f.log("second")
    assert len(f.rounds()) == ROUNDS
