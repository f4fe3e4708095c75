"""The container files say what the project says: its commands, its packages, its defaults. They run elsewhere."""

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer

import fluffle

ROOT = Path(__file__).parents[2]
COMPOSE = (ROOT / "docker-compose.yml").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def commands() -> list[list[str]]:
    """The words after `fluffle` of every service, with the defaults where the environment may say otherwise."""
    text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", COMPOSE)
    listed = [json.loads(words) for words in re.findall(r"^ +command: (\[.*?\])$", text, re.MULTILINE | re.DOTALL)]
    return [*listed, *(words.split() for words in re.findall(r"exec fluffle ([^\"]*)", text))]


def test_every_service_of_ours_is_found() -> None:
    assert sorted(words[0] for words in commands()) == ["coordinator", "init", "worker", "worker"]


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_the_command_line_understands_what_the_services_call(words: list[str]) -> None:
    command: Any = typer.main.get_command(fluffle.app)
    command.commands[words[0]].make_context(words[0], [*words[1:], *broker(words[0])])


def broker(name: str) -> list[str]:
    """What the services are told by their environment instead."""
    return [] if name == "init" else ["--broker", "amqp://rabbitmq/"]


def test_everything_that_is_installed_reaches_the_image() -> None:
    let_in = {line[1:].strip("/") for line in (ROOT / ".dockerignore").read_text().split() if line.startswith("!")}
    setuptools, project = PROJECT["tool"]["setuptools"], PROJECT["project"]
    packages = {package.split(".")[0] for package in setuptools["packages"]}
    modules = {f"{module}.py" for module in setuptools["py-modules"]}
    files = {"pyproject.toml", "constraints.txt", project["readme"], *project["license-files"]}
    assert let_in == packages | modules | files


def test_ports_are_published_on_this_machine_only() -> None:
    published = re.findall(r"^ +- (\S+):\d+$", COMPOSE, re.MULTILINE)
    assert len(published) == 2
    assert all(port.startswith("127.0.0.1:") for port in published)
