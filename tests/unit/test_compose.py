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
    return [*listed, *(words.split() for words in re.findall(r"^ +fluffle ([^|\n]*)", text, re.MULTILINE))]


def test_every_service_of_ours_is_found() -> None:
    assert sorted(words[0] for words in commands()) == ["broker", "coordinator", "init", "invite", *["worker"] * 5]


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_the_command_line_understands_what_the_services_call(words: list[str]) -> None:
    command: Any = typer.main.get_command(fluffle.app)
    for depth, word in enumerate(words, 1):
        command = command.get_command(None, word)
        if not hasattr(command, "commands"):
            command.make_context(word, words[depth:])
            return
    pytest.fail("a group of commands, and no command of it")


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


def test_no_password_is_in_the_file_and_everybody_has_a_secret_of_its_own() -> None:
    assert not re.search(r"guest|amqp://|DEFAULT_PASS|DEFAULT_USER|5672", COMPOSE)
    assert not re.search(r"^ +FLUFFLE_[A-Z]*(PASSWORD|BROKER|MANAGEMENT):", COMPOSE, re.MULTILINE)
    services = dict(
        re.findall(
            r"^  ([\w-]+):(?: #.*)?\n((?:    .*\n)+)",
            COMPOSE.partition("\nservices:\n")[2].partition("\nconfigs:")[0],
            re.MULTILINE,
        )
    )
    invited = [re.search(r"/invitation/([\w-]+)\.fluffle", text) for text in services.values()]
    parties = {found[1] for found in invited if found}
    assert parties == {"coordinator", "worker-1", "worker-2", "worker-3", "worker-4", "held-out"}
    for name, text in services.items():
        secrets = set(re.findall(r"([\w-]+):/(?:federation|invitation)\S*", text.partition("volumes:")[2]))
        wanted = {name} if name in parties else {"rabbitmq": {"broker"}, "init": set()}.get(name, secrets)
        assert secrets == wanted, name
        if name in parties:
            assert f"{name}:/invitation:ro" in text


def test_the_broker_allocates_as_the_private_one_does() -> None:
    from broker.folder import Address, environment

    private = environment(ROOT, Address("x@localhost", 1, 2, 3, ""))["RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS"]
    ours = re.findall(r"(?:[+]\w+ \w+|-ssl \w+ \d+)", COMPOSE.partition("ADDITIONAL_ERL_ARGS:")[2])
    assert ours
    assert [words for words in ours if words not in private] == []
    assert [words for words in re.findall(r"[+]\w+ \w+", private) if words not in ours] == []
