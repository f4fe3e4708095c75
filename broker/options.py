"""What the command lines have in common: the option for the broker, settings as text, where state is kept.

Does not know what any command does.
"""

import os
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from broker.errors import UsageError
from broker.invitation import Access, Role
from broker.messages import Scalar

BROKER, INVITE = "FLUFFLE_BROKER", "FLUFFLE_INVITE"

BrokerUrl = Annotated[
    str | None, typer.Option("--broker", envvar=BROKER, help="amqps://USER:PASSWORD@HOST:PORT/VHOST")
]
Invite = Annotated[
    Path | None, typer.Option("--invite", envvar=INVITE, metavar="FILE", help="An invitation, in place of --broker.")
]
Insecure = Annotated[
    bool, typer.Option("--insecure", envvar="FLUFFLE_INSECURE", help="Let --broker name another machine without TLS.")
]
SettingPairs = Annotated[
    list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="A setting for the learner's train().")
]

RosterFile = Annotated[
    Path | None, typer.Option("--roster", help="Secure rounds: who may take part, and whose keys they are.")
]
GiveUp = Annotated[
    float | None,
    typer.Option(min=0, help="End with status 4 once RabbitMQ was out of reach for so long; default: wait for ever."),
]


def way_in(role: Role, broker: str | None, *, invite: Path | None, insecure: bool) -> Access:
    """How a command reaches the broker. What was typed counts for more than what the environment says.

    Raises:
        UsageError: none is said, or two are, or it is of no use.
    """
    if broker and invite:
        if broker == os.environ.get(BROKER):
            broker = None
        elif str(invite) != os.environ.get(INVITE):
            raise UsageError("--broker and --invite both say where the broker is: leave one out.")
    if broker:
        return Access.at(broker, insecure=insecure)
    if invite:
        return Access.invited(invite, role)
    raise UsageError("where the broker is must be said: --invite FILE, or --broker URL.")


def parse_settings(pairs: list[str] | None) -> dict[str, Scalar]:
    """`["lr=0.1", "name=x"]` as settings: numbers, true and false as such, anything else as text.

    Raises:
        UsageError: a pair without `=`, or a name that each task gives another value.
    """
    settings: dict[str, Scalar] = {}
    for pair in pairs or []:
        name, equals, text = pair.partition("=")
        if not equals or not name:
            raise UsageError(f"--set takes NAME=VALUE, not {pair!r}.")
        if name in ("seed", "round", "private"):
            raise UsageError(f"--set cannot set {name}, which every task brings itself: take another name.")
        settings[name] = _value(text)
    return settings


def _value(text: str) -> Scalar:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text


def state_folder(*names: str) -> Path:
    """Where this user's programs keep what is neither configuration nor worth backing up."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state").joinpath("fluffle", *names)
