"""The front door's own words, and what `fluffle demo` tells while it watches a run."""

import errno
import io
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

import fluffle
import fluffle_demo
from broker.fields import counted
from coordinator import standby
from coordinator.history import Point
from coordinator.plan import Plan


def test_the_version_is_told_as_every_other_program_tells_its_own() -> None:
    done = CliRunner().invoke(fluffle.app, ["--version"])
    assert (done.exit_code, done.output) == (0, f"fluffle {version('fluffle')}\n")


def test_a_terminal_that_knows_ascii_only_shows_all_the_rest() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fluffle", "try", "--help"],
        env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert "a name, ?" in done.stdout


@pytest.mark.parametrize("while_loading", ["typer", "coordinator.cli", "coordinator.service"])
def test_ctrl_c_while_a_command_loads_ends_it_without_a_word(while_loading: str) -> None:
    typed = f"""
import importlib.abc, signal, sys

class Pressed(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == {while_loading!r}:
            signal.raise_signal(signal.SIGINT)

sys.meta_path.insert(0, Pressed())
sys.argv = ["fluffle", "status", "run"]
import fluffle
fluffle.main()
"""
    done = subprocess.run([sys.executable, "-c", typed], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_sigterm_ends_a_command_as_ctrl_c_does_and_nothing_stays_behind(tmp_path: Path) -> None:
    typed = """
import signal, sys, tempfile
make = tempfile.mkdtemp

def made_and_told(*words):
    folder = make(*words)
    signal.raise_signal(signal.SIGTERM)
    return folder

tempfile.mkdtemp = made_and_told
sys.argv = ["fluffle", "try", "toy", "--data", "alice"]
import fluffle
fluffle.main()
"""
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", typed], env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_what_was_closed_before_a_command_began_does_not_become_a_file_of_ours(closed: str, tmp_path: Path) -> None:
    """A lock on it would be lost with the first program that is started, and a print could spoil a version."""
    code = f"""
import os, sys, fluffle
def app():
    print("out")
    print("err", file=sys.stderr)
    with open({str(tmp_path / "file")!r}, "w") as file:
        assert file.fileno() > 2 and os.get_inheritable(0) and os.get_inheritable(1) and os.get_inheritable(2)
fluffle.app = app
fluffle.main()
"""
    subprocess.run(["/bin/sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-c", code], check=True)


def test_options_are_looked_at_before_a_broker_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fluffle_demo, "Node", lambda _: pytest.fail("a broker was made"))
    typed = ["demo", "--learner", "toy", "--run", str(tmp_path / "run"), "--schedule", "spiral"]
    assert "schedule must be" in str(CliRunner().invoke(fluffle.app, typed).exception)
    assert not [*tmp_path.iterdir()]


def test_one_thing_is_told_as_one(tmp_path: Path) -> None:
    assert [counted(number, "row") for number in (0, 1, 2, 1000)] == ["0 rows", "1 row", "2 rows", "1,000 rows"]
    run = fluffle_demo.make_run("toy", tmp_path / "run", {})
    run.path(0).write_bytes(b"")
    done = CliRunner().invoke(fluffle.app, ["verify", str(run.folder)])
    assert done.exit_code == 1
    assert done.output.splitlines()[-1].startswith("not as it was written, in 1 place: "), done.output


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("--privacy secure --cohort 3 --clip 8 --examples-max 9 --roster nowhere.json", "nowhere.json"),
        ("--privacy secure --cohort 3 --clip 8 --examples-max 9", "give the operator's roster with --roster"),
        ("--clip 8", "is frozen since version 1: make another run to change clip"),
    ],
)
def test_a_coordinator_says_what_is_wrong_with_its_options_before_it_waits_for_its_turn_or_changes_anything(
    typed: str, said: str, tmp_path: Path
) -> None:
    run = fluffle_demo.make_run("toy", tmp_path / "run", {})
    if "frozen" in said:
        run.save(1, *run.load(0))
    before = (run.folder / "plan.toml").read_text()
    with standby.turn(run.folder):
        words = ["coordinator", str(run.folder), "--broker", "amqp://u:p@127.0.0.1:1", *typed.split()]
        assert said in str(CliRunner().invoke(fluffle.app, words).exception)
    assert (run.folder / "plan.toml").read_text() == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux's disk that is always full")
def test_an_output_that_takes_nothing_more_is_said_in_a_sentence() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "fluffle", "--version"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 2
    assert done.stderr.startswith("fluffle: the output, or room for temporary files, cannot be used: No space left")


@pytest.mark.parametrize(
    ("problem", "said"),
    [
        (
            FileNotFoundError(errno.ENOENT, "No usable temporary directory found"),
            "used: No usable temporary directory",
        ),
        (MemoryError(), "fluffle: there is not enough memory for this, or"),
    ],
)
def test_no_room_for_temporary_files_and_no_memory_are_said_in_a_sentence(
    problem: Exception, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def app() -> None:
        raise problem

    monkeypatch.setattr(fluffle, "app", app)
    with pytest.raises(SystemExit, match="2"):
        fluffle.main()
    assert said in capsys.readouterr().err


def test_a_version_that_nobody_has_scored_is_told_as_such() -> None:
    assert fluffle_demo._told(Point(3, {}, {})).endswith("not scored")


def test_on_sixty_columns_no_figure_of_the_status_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = {"accuracy": 0.987654, "loss": 1.234567}
    lines = [
        {"event": "round", "version": 1, "scored": scores, "seconds": 1, "bytes_down": 1, "bytes_up": 1},
        {"event": "score", "version": 0, "worker": "zoe", "metrics": scores},
    ]
    run = fluffle_demo.make_run("toy", tmp_path / "run", {})
    monkeypatch.setattr(type(run), "history", lambda _: lines)
    shown = CliRunner().invoke(fluffle.app, ["status", str(run.folder)], env={"COLUMNS": "60"}).output
    assert (shown.count("0.9877"), shown.count("1.235"), shown.count("…")) == (2, 2, 0), shown


class Run:
    """A run whose history has one line more each time it is looked at, and a company that is done with the last."""

    def __init__(self, *lines: dict[str, Any]) -> None:
        self.plan, self.shown, self.lines = Plan(run="r", learner="toy", rounds=2), 0, lines

    def done(self) -> bool:
        self.shown += 1
        return self.shown == len(self.lines)

    def history(self) -> list[dict[str, Any]]:
        return [*self.lines[: self.shown]]

    def now(self) -> dict[str, Any]:
        return {}

    def latest(self) -> int:
        return 0


def test_a_version_is_told_with_its_workers_scores_though_a_held_out_one_of_the_next_came_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fluffle_demo, "POLL_S", 0.0)
    run: Any = Run(
        {"event": "round", "version": 1, "scored": {"loss": 3.0}},
        {"event": "score", "version": 1, "worker": "held-out", "metrics": {"loss": 7.0}},
        {"event": "score", "version": 2, "worker": "held-out", "metrics": {"loss": 6.0}},
        {"event": "round", "version": 2, "scored": {"loss": 2.0}},
        {"event": "final", "version": 2, "scored": {"loss": 1.0}},
    )
    shown = io.StringIO()
    fluffle_demo._watch(run, run, Console(file=shown, width=200))
    told = [line.split() for line in shown.getvalue().splitlines() if line.startswith("version")]
    assert [words[1] for words in told] == ["0", "1", "2"]
    assert ["".join(words[2:]) for words in told] == [
        "workers:loss3.0000",
        "workers:loss2.0000held-out:loss7.0000",
        "workers:loss1.0000held-out:loss6.0000",
    ]
