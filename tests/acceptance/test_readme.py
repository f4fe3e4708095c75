"""What the README says one may type, typed."""

import os
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import typer

from coordinator import plan
from fluffle import app
from workers import policy

README = Path(__file__).parents[2] / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.timeout(180)
def test_the_readmes_learner_and_commands_do_what_it_says(tmp_path: Path) -> None:
    (learner,) = blocks("python")
    (tmp_path / "my_learner.py").write_text(learner)
    script = "set -eu\n" + "\n".join(blocks("bash"))
    env = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "XDG_STATE_HOME": str(tmp_path / "state"),
    }
    done = subprocess.run(
        ["/bin/bash", "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "this learner is ready for a federation" in done.stdout
    assert "version 5 of 5; version 5 is made" in done.stdout
    assert "carol" not in done.stderr.partition("abandoned")[2]
    accuracy = float(re.findall(r"accuracy ([0-9.]+)", done.stdout)[-1])
    assert accuracy > 0.6


def test_the_readmes_policy_is_one_and_names_every_rule(tmp_path: Path) -> None:
    (text,) = blocks("toml")
    (tmp_path / "policy.toml").write_text(text.replace("# epsilon_max", "epsilon_max"))
    told = policy.read(tmp_path / "policy.toml")
    assert (told.rounds_a_day, told.metrics, told.epsilon_max) == (50, ("loss",), 8)
    assert not [each.name for each in fields(policy.Policy) if each.name not in text]


@pytest.mark.parametrize("line", re.findall(r"\nfluffle coordinator my-run (.*?)(?=  |\n)", README.read_text()))
def test_every_coordinator_of_the_readme_has_a_plan_that_holds(line: str) -> None:
    command: Any = typer.main.get_command(app)
    given = (
        command.get_command(None, "coordinator").make_context("coordinator", ["my-run", *shlex.split(line)]).params
    )
    given |= {"format": given["how"], "learner": "x", "run": "my-run", "settings": {}}
    plan.make({each.name: given[each.name] for each in fields(plan.Plan) if given.get(each.name) is not None}, line)


def test_every_file_is_in_the_readmes_map_or_beside_one_that_is() -> None:
    text = README.read_text()
    for room in ("broker", "coordinator", "workers"):
        for file in (README.parent / room).glob("*.py"):
            assert file.name == "__init__.py" or file.name in text, f"{room}/{file.name} is not in the README's map"
