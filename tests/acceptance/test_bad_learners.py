"""One worker whose learner does the worst in turn: each time a reason in `fluffle status`, the daemon as it was."""

import json
import re

import pytest

from tests.acceptance.federation import LEARNER, Federation
from tests.node import Node

pytestmark = pytest.mark.timeout(300)
LOOP = "not done within the 8 s of the task"
DEEDS = {
    "kept = []\nwhile True: kept.append(bytearray(50_000_000))": "MemoryError (it ran out of memory)",
    "kept = []\nwhile True: kept.append(torch.ones(9_000_000))": "(it ran out of memory)",
    "ctypes.string_at(0)": "signal 11 (a crash in native code)",
    "os.abort()": "signal 6 (aborted by native code)",
    "sys.exit(3)": "SystemExit: 3",
    "os._exit(3)": "ended by itself with status 3",
    "os.kill(os.getpid(), 9)": "signal 9 (killed)",
    "while True: pass": LOOP,
    "ctypes.PyDLL(None).pause()": LOOP,
    "signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\nre.match('(a+)+b', 'a' * 60)": LOOP,
    "os.closerange(0, 200)": "lost its socket",
    "if not os.fork():\n  os.setsid(), os.fork(), time.sleep(1000)\nos.abort()": "signal 6 (aborted by native code)",
    "if not os.fork(): sys.exit(4)\nraise OSError('copied')": "OSError: copied",
    "for _ in range(500): print('x' * 100_000)\nraise OSError('flooded')": "OSError: flooded",
    "class Odd(BaseException): pass\nraise Odd('not an error')": "Odd: not an error",
    "del model.weight": "object has no attribute 'weight'",
    "os.kill(os.getppid(), 9)\ntime.sleep(1000)": "gone, with its guard",  # the last: torch is loaded anew after it
}
AFTER = 5  # more rounds to do that in
# in every other round it trains as it should
BAD = f"""
import ctypes, os, re, signal, sys
{LEARNER}
well = train

def train(model, data, settings):
    deeds = {list(DEEDS)!r}
    if settings["round"] % 2 == 1 and settings["round"] < 2 * len(deeds):
        exec(deeds[settings["round"] // 2])
    return well(model, data, settings)
"""


def connections(node: Node, f: Federation) -> set[str]:
    """The broker's processes for a worker's connections; they are others after each reconnect."""
    vhost = f.env["FLUFFLE_BROKER"].rpartition("/")[2]
    listed = node.ctl("list_connections", "pid", "vhost", "client_properties", "--no-table-headers")
    return {line.split("\t")[0] for line in listed.splitlines() if f"\t{vhost}\t" in line and "worker-bad" in line}


def test_no_learner_can_hurt_the_daemon_and_each_deed_is_a_refusal_with_its_reason(
    federation: Federation, node: Node
) -> None:
    f, rounds = federation, 2 * len(DEEDS) + AFTER
    bad = f.folder / "bad.py"
    bad.write_text(BAD)
    f.fluffle("init", str(f.learner), str(f.run))
    f.worker("good")
    f.start("bad", "worker", str(bad), "--name", "bad", "--data", "bad", "--memory-mb", "800")
    options = ("--cohort", "2", "--quorum", "1", "--gather-s", "120", "--round-s", "8")
    f.coordinator(*options, "--rounds", str(rounds))
    f.until(f.rounds)
    before = connections(node, f)
    assert len(before) >= 3
    assert f.wait("coordinator") == 0
    assert connections(node, f) == before
    assert f.processes["bad"].poll() is None

    history = json.loads(f.fluffle("status", str(f.run), "--json"))["history"]
    made = {line["round"]: line for line in history if line["event"] == "round"}
    for number, (deed, reason) in enumerate(DEEDS.items()):
        refused, well = made[2 * number + 1], made[2 * number + 2]
        assert reason in refused["refused"].get("bad", ""), deed
        assert list(refused["counted"]) == ["good"], deed
        if number < len(DEEDS) - 1:
            assert sorted(well["counted"]) == ["bad", "good"], f"after {deed}: {well['refused']}"
    assert ["bad", "good"] in [sorted(made[number]["counted"]) for number in range(2 * len(DEEDS), rounds + 1)]
    assert "it ran out of memory" in " ".join(f.fluffle("status", str(f.run)).split())
    assert len(f.log("bad")) < 500_000
    assert not re.search(r"Traceback|never retrieved", f.log("bad"))
