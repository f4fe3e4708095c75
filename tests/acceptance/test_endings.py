"""How real daemons end: what is in hand is finished on the first signal, nothing is waited for on the second."""

import signal
import time
from pathlib import Path

import pytest

from tests.acceptance.federation import Federation
from tests.node import Node

pytestmark = pytest.mark.timeout(180)
NOW_S = 2.0


def begin(f: Federation, *, nap_s: float, rounds: int) -> None:
    """A run with one worker; returns when it is training for the first round."""
    f.learner.write_text(
        f.learner.read_text().replace("    time.sleep", "    print('training', flush=True)\n    time.sleep")
    )
    f.fluffle("init", str(f.learner), str(f.run))
    f.coordinator("--rounds", str(rounds), "--cohort", "1", "--quorum", "1", "--set", f"nap={nap_s}")
    f.worker("w1")
    f.until(lambda: "training" in f.log("w1"))


def told_twice(f: Federation, name: str) -> float:
    """Send SIGTERM, and once it has been heard SIGINT; how long it took from there."""
    f.processes[name].send_signal(signal.SIGTERM)
    f.until(lambda: "stopping when" in f.log(name))
    began_at = time.monotonic()
    assert f.kill(name, signal.SIGINT) == 3
    return time.monotonic() - began_at


def test_a_worker_that_is_told_to_stop_finishes_its_task_first(federation: Federation) -> None:
    f = federation
    begin(f, nap_s=2.0, rounds=1)
    assert f.kill("w1", signal.SIGTERM) == 0
    assert f.wait("coordinator") == 0
    assert list(f.rounds()[0]["counted"]) == ["w1"]
    assert "stopping when" in f.log("w1")
    assert f.log("w1").splitlines()[-1].endswith("w1 has left")


def test_a_worker_that_is_told_twice_leaves_at_once_and_its_training_with_it(federation: Federation) -> None:
    f = federation
    begin(f, nap_s=1000.0, rounds=1)
    # generous to a busy machine; what is promised is 2 s, and the process sees to that itself
    assert told_twice(f, "w1") < NOW_S + 3
    assert f.log("w1").splitlines()[-1] == "fluffle: stopped at once."
    assert "Traceback" not in f.log("w1")


def test_a_coordinator_that_is_told_to_stop_goes_on_from_there_when_it_is_started_again(
    federation: Federation,
) -> None:
    f = federation
    begin(f, nap_s=0.5, rounds=4)
    f.until(lambda: len(f.rounds()) >= 1)
    assert f.kill("coordinator", signal.SIGTERM) == 3
    said = f.log("coordinator").splitlines()[-1]
    assert said.startswith("fluffle: stopped at version ")
    assert said.endswith("; the same command goes on from there.")
    f.coordinator()
    f.processes["coordinator"].send_signal(signal.SIGTERM)  # before it can have heard of anything
    f.processes["coordinator"].send_signal(signal.SIGINT)
    assert f.wait("coordinator") in (3, -signal.SIGTERM)
    f.coordinator()
    assert f.wait("coordinator") == 0
    assert [line["round"] for line in f.rounds()] == [1, 2, 3, 4]
    assert "Traceback" not in f.log("coordinator")


@pytest.mark.chaos
def test_both_daemons_give_up_when_the_broker_is_away_for_longer_than_they_were_told_to_wait(tmp_path: Path) -> None:
    with Node(tmp_path / "rabbitmq") as node:
        f = Federation(tmp_path, node.url)
        try:
            f.fluffle("init", str(f.learner), str(f.run))
            f.start("w1", "worker", str(f.learner), "--name", "w1", "--data", "w1", "--give-up-s", "1")
            f.coordinator("--rounds", "1000", "--cohort", "1", "--quorum", "1", "--give-up-s", "1")
            f.until(lambda: len(f.rounds()) >= 2)
            node.kill()
            for name in ("w1", "coordinator"):
                assert f.wait(name) == 4
                assert "fluffle: RabbitMQ was out of reach for 1 s and more; gave up: " in f.log(name)
                assert "Traceback" not in f.log(name)
        finally:
            f.end()
