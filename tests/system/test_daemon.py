"""How a daemon ends: asked once, asked twice, or because its event loop hangs; and what does not end it."""

import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

DAEMON = """
import asyncio, sys, time
from broker import daemon
from fluffle import main as under_exit_statuses
import fluffle

async def stubborn(stop):
    print("here", flush=True)
    try:
        await stop.wait()
        print("stopping", flush=True)
        await asyncio.sleep(1000)
    finally:
        HOLDS

async def hangs(stop):
    print("here", flush=True)
    time.sleep(1000)

async def turns(stop):
    print("here", flush=True)
    await stop.wait()

daemon.NOW_S = 0.2
fluffle.app = lambda: daemon.run(WHAT, hang_s=HANG_S)
under_exit_statuses()
"""
SWIFT_S = 20.0


@contextmanager
def daemon(what: str, *, hang_s: float = 60.0, holds: str = "pass") -> Iterator[subprocess.Popen[str]]:
    code = DAEMON.replace("WHAT", what).replace("HANG_S", str(hang_s)).replace("HOLDS", holds)
    words = [sys.executable, "-c", code]
    with subprocess.Popen(words, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "here\n"
            yield process
        finally:
            process.kill()


def said(process: subprocess.Popen[str]) -> str:
    return process.communicate(timeout=SWIFT_S)[1]


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    "holds", ["pass", "await asyncio.sleep(1000)", "time.sleep(1000)", "await asyncio.to_thread(time.sleep, 1000)"]
)
def test_a_second_signal_means_now_whatever_holds_the_daemon(second: signal.Signals, holds: str) -> None:
    with daemon("stubborn", holds=holds) as process:
        process.send_signal(signal.SIGTERM)
        assert process.stdout is not None
        assert process.stdout.readline() == "stopping\n"
        process.send_signal(second)
        assert said(process) == "fluffle: stopped at once.\n"
        assert process.returncode == 3


def test_a_loop_that_hangs_ends_the_process_and_shows_where_it_hung() -> None:
    with daemon("hangs", hang_s=0.4) as process:
        words = said(process)
        assert process.returncode == 4
        assert "in hangs" in words
        assert words.splitlines()[-1] == (
            "fluffle: the event loop has hung for 0.4 s, see above: ended, to be started anew."
        )


def test_a_process_that_is_stopped_for_longer_than_a_loop_may_hang_goes_on_afterwards() -> None:
    with daemon("turns", hang_s=1.0) as process:
        for _ in range(3):
            process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, process.pid, os.WSTOPPED)
            ended = os.pidfd_open(process.pid)
            assert not select.select([ended], [], [], 1.5)[0]  # time must pass: it is what the watchdog must not see
            process.send_signal(signal.SIGCONT)
            assert not select.select([ended], [], [], 0.5)[0]
            os.close(ended)
        process.send_signal(signal.SIGTERM)
        assert said(process) == ""
        assert process.returncode == 0
