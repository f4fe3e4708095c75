"""Real processes over a real RabbitMQ: they join late, are killed, leave, and come back; the run goes on."""

import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.acceptance.federation import Federation
from tests.node import Node

pytestmark = pytest.mark.timeout(180)


@pytest.mark.chaos
def test_a_run_ends_with_all_its_rounds_though_workers_come_late_die_and_leave(federation: Federation) -> None:
    f = federation
    f.fluffle("init", str(f.learner), str(f.run))
    f.coordinator("--rounds", "8", "--cohort", "3", "--quorum", "1", "--gather-s", "60", "--set", "nap=0.5")
    for name in ("w1", "w2", "w3"):
        f.worker(name)
    f.until(lambda: len(f.rounds()) >= 2)
    f.kill("w2")
    assert f.kill("w3", signal.SIGTERM) == 0
    assert f.wait("coordinator") == 0
    assert [line["round"] for line in f.rounds()] == list(range(1, 9))
    assert f.rounds()[0]["cohort"] == ["w1", "w2", "w3"]
    assert list(f.rounds()[-1]["counted"]) == ["w1"]
    assert "w3 has left" in f.log("w3")
    assert f.kill("w1", signal.SIGTERM) == 0


@pytest.mark.chaos
def test_the_same_run_twice_gives_the_same_bits(federation: Federation) -> None:
    f = federation
    for name in ("w1", "w2"):
        f.worker(name)
    finals = []
    for again in ("first", "second"):
        f.run = f.folder / again
        f.fluffle("init", str(f.learner), str(f.run), "--seed", "7")
        f.coordinator("--rounds", "5", "--cohort", "2", "--quorum", "2")
        assert f.wait("coordinator") == 0
        finals.append(f.version(5))
    assert finals[0] == finals[1]
    assert finals[0] != f.version(4)


def test_a_killed_coordinator_goes_on_and_ends_with_the_bits_of_an_undisturbed_run(
    federation: Federation, record_property: Callable[[str, object], None]
) -> None:
    f = federation
    for name in ("w1", "w2"):
        f.worker(name)
    f.fluffle("init", str(f.learner), str(f.run), "--seed", "3", "--set", "nap=0.2")
    f.coordinator("--rounds", "6", "--cohort", "2", "--quorum", "2")
    f.until(lambda: len(f.rounds()) >= 2)
    f.kill("coordinator")
    killed_at, made = time.monotonic(), len(f.rounds()) + 1  # one may have been made and not noted
    f.coordinator()
    f.until(lambda: len(f.rounds()) > made)
    took_s = time.monotonic() - killed_at
    record_property("measured", f"from kill -9 to the restarted coordinator's next round: {took_s:.1f} s")
    assert took_s < 10.0
    assert f.wait("coordinator") == 0
    assert len(f.rounds()) == 6
    assert f.version(6) == f.undisturbed(6, ["w1", "w2"])


@pytest.mark.chaos
def test_a_worker_killed_in_the_middle_of_a_round_returns_and_the_round_waits_for_it(federation: Federation) -> None:
    f = federation
    f.fluffle("init", str(f.learner), str(f.run))
    f.coordinator("--rounds", "4", "--cohort", "2", "--quorum", "2", "--set", "nap=1.0")
    for name in ("w1", "w2"):
        f.worker(name)
    f.until(lambda: len(f.rounds()) >= 1)
    f.kill("w2")
    f.worker("w2")
    assert f.wait("coordinator") == 0
    assert [sorted(line["counted"]) for line in f.rounds()] == [["w1", "w2"]] * 4
    assert "w2 is back and has lost its task" in f.log("coordinator")


@pytest.mark.chaos
def test_a_broker_killed_in_the_middle_of_a_run_is_survived(tmp_path: Path) -> None:
    with Node(tmp_path / "rabbitmq") as node:
        f = Federation(tmp_path, node.url)
        try:
            f.fluffle("init", str(f.learner), str(f.run))
            f.coordinator("--rounds", "6", "--cohort", "2", "--quorum", "2", "--set", "nap=0.3")
            for name in ("w1", "w2"):
                f.worker(name)
            f.until(lambda: len(f.rounds()) >= 2)
            node.kill()
            node.restart()
            assert f.wait("coordinator") == 0
            assert [sorted(line["counted"]) for line in f.rounds()] == [["w1", "w2"]] * 6
        finally:
            f.end()


def test_a_worker_with_another_model_is_refused_with_the_difference_and_the_run_goes_on(
    federation: Federation,
) -> None:
    f = federation
    f.fluffle("init", str(f.learner), str(f.run))
    f.coordinator("--rounds", "2", "--cohort", "2", "--quorum", "1", "--gather-s", "60")
    f.worker("w1")
    f.start("other", "worker", "digits", "--name", "other", "--data", "1/4")
    assert f.wait("coordinator") == 0
    for line in f.rounds():
        assert list(line["counted"]) == ["w1"]
        assert "this worker's learner is another than the run's: its contract is " in line["refused"]["other"]
    assert f.kill("other", signal.SIGTERM) == 0


def test_a_learner_that_raises_costs_its_worker_the_round_and_nothing_else(federation: Federation) -> None:
    f = federation
    broken = f.folder / "broken.py"
    broken.write_text(f.learner.read_text().replace("time.sleep(settings", "1 / 0; time.sleep(settings"))
    f.fluffle("init", str(f.learner), str(f.run))
    f.coordinator("--rounds", "2", "--cohort", "2", "--quorum", "1", "--gather-s", "60")
    f.worker("w1")
    f.start("broken", "worker", str(broken), "--name", "broken", "--data", "x")
    assert f.wait("coordinator") == 0
    assert "ZeroDivisionError" in f.rounds()[0]["refused"]["broken"]
    assert f.processes["broken"].poll() is None
    assert "ZeroDivisionError" in f.fluffle("status", str(f.run))
