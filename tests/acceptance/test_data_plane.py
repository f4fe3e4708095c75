"""Models and updates on their way through a real RabbitMQ: in every format, and through an alarm."""

import shutil
import time
from pathlib import Path

import pytest

from tests.acceptance.federation import Federation
from tests.node import Node

pytestmark = pytest.mark.timeout(180)


@pytest.mark.chaos
def test_a_memory_alarm_makes_everything_wait_and_then_go_on(tmp_path: Path) -> None:
    with Node(tmp_path / "rabbitmq") as node:
        f = Federation(tmp_path, node.url)
        try:
            f.fluffle("init", str(f.learner), str(f.run))
            for name in ("w1", "w2"):
                f.worker(name)
            f.coordinator("--rounds", "8", "--cohort", "2", "--quorum", "2", "--set", "nap=0.3")
            f.until(lambda: len(f.rounds()) >= 2)
            node.ctl("set_vm_memory_high_watermark", "absolute", "1MB")
            f.until(lambda: any("RabbitMQ takes nothing for now: low on memory" in f.log(who) for who in f.processes))
            made = len(f.rounds())
            time.sleep(3.0)  # nothing is to happen: there is no event to wait for
            assert len(f.rounds()) <= made + 1
            node.ctl("set_vm_memory_high_watermark", "0.4")
            assert f.wait("coordinator") == 0
            assert [sorted(line["counted"]) for line in f.rounds()] == [["w1", "w2"]] * 8
            assert any("RabbitMQ takes messages again" in f.log(who) for who in f.processes)
        finally:
            f.end()


# how updates and versions travel, and how much larger the loss may be than with float32
WAYS = (
    (("--format", "bfloat16"), 1e-2),
    (("--format", "int8"), 1e-2),
    (("--format", "top-k", "--keep", "0.4"), 1.0),
    (("--down", "bfloat16"), 5e-2),
    (("--format", "int8", "--down", "int8"), 5e-2),
)


@pytest.mark.chaos
def test_every_format_learns_and_its_dice_fall_the_same_way_again(federation: Federation) -> None:
    f = federation
    for name in ("w1", "w2"):
        f.worker(name)
    begun, once, again = (f.folder / run for run in ("begun", "once", "again"))
    for run in (begun, once, again):  # workers remember by a run's name what they have left out of it
        f.fluffle("init", str(f.learner), str(run), "--seed", "5")

    def learn(run: str, *options: str, start: Path = begun) -> tuple[bytes, float]:
        """The last version's tensors, and its loss."""
        f.run = f.folder / run
        shutil.copytree(start, f.run)
        f.coordinator("--rounds", "6", "--cohort", "2", "--quorum", "2", *options)
        assert f.wait("coordinator") == 0
        return f.version(6), f.history()[-1]["scored"]["loss"]

    exact, loss = learn("exact")
    for n, (way, loses) in enumerate(WAYS[:-1]):
        version, lossy = learn(f"run-{n}", *way)
        assert version != exact, way
        assert lossy < loss + loses, way
    way, loses = WAYS[-1]
    version, lossy = learn("last", *way, start=once)
    assert lossy < loss + loses
    assert learn("last-again", *way, start=again) == (version, lossy)


@pytest.mark.chaos
def test_changes_go_down_to_those_who_follow_and_all_to_whoever_comes_back(federation: Federation) -> None:
    f = federation
    for name in ("w1", "w2"):
        f.worker(name)
    f.fluffle("init", str(f.learner), str(f.run))
    f.coordinator("--rounds", "6", "--cohort", "2", "--quorum", "2", "--set", "nap=0.3", "--down", "int8")
    f.until(lambda: len(f.rounds()) >= 2)
    f.kill("w2")
    f.worker("w2")
    assert f.wait("coordinator") == 0
    assert [sorted(line["counted"]) for line in f.rounds()] == [["w1", "w2"]] * 6


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--format", "zip"), "format must be 'float32', 'bfloat16', 'int8' or 'top-k'"),
        (("--keep", "0.5"), "keep is for the format top-k, and the format is float32: leave keep out"),
        (("--format", "top-k", "--keep", "0"), "keep must be above 0"),
        (("--down", "int8", "--schedule", "cyclic"), "a cyclic round has no use for changes"),
    ],
)
def test_formats_that_are_none_are_refused_in_a_sentence(
    federation: Federation, words: tuple[str, ...], said: str
) -> None:
    federation.fluffle("init", str(federation.learner), str(federation.run))
    assert said in federation.fluffle("coordinator", str(federation.run), *words, status=2)
