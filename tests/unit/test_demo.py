"""The front door's own words, and what `fluffle demo` tells while it watches a run."""

import io
from importlib.metadata import version
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

import fluffle
import fluffle_demo
from coordinator.plan import Plan


def test_the_version_is_told_as_every_other_program_tells_its_own() -> None:
    done = CliRunner().invoke(fluffle.app, ["--version"])
    assert (done.exit_code, done.output) == (0, f"fluffle {version('fluffle')}\n")


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
    out = Console(file=io.StringIO(), width=200)
    fluffle_demo._watch(run, run, out)
    told = [line.split() for line in out.file.getvalue().splitlines() if line.startswith("version")]
    assert [words[1] for words in told] == ["0", "1", "2"]
    assert ["".join(words[2:]) for words in told] == [
        "workers:loss3.0000",
        "workers:loss2.0000held-out:loss7.0000",
        "workers:loss1.0000held-out:loss6.0000",
    ]
