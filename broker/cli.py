"""`fluffle broker`, `invite` and `revoke`: a private RabbitMQ node, and who may come in, there or to another broker.

Knows the commands and where such a node lives by default. Does not know how a node is run (`node.py`), nor how a
federation is secured (`secure.py`).
"""

from pathlib import Path
from typing import Annotated, Any

import typer

from broker import node
from broker import secure as securing
from broker.errors import UsageError
from broker.federation import FILE, Federation
from broker.options import state_folder

app = typer.Typer(no_args_is_help=True, help="A private RabbitMQ node on this machine, secured or not.")

Folder = Annotated[
    Path,
    typer.Option(
        "--dir",
        default_factory=lambda: state_folder("broker"),
        help="The node's folder.",
        show_default="~/.local/state/fluffle/broker",
    ),
]
Port = Annotated[
    int | None,
    typer.Option(min=1, max=65535, help="AMQP port on 127.0.0.1.", show_default="the one before, or a free one"),
]


@app.command()
def start(folder: Folder, port: Port = None) -> None:
    """Start the node unless it runs, and print its URL. It runs until `stop`."""
    url = node.start_detached(folder, port)
    if (folder / FILE).exists():
        _say(securing.apply(folder))
    typer.echo(_url(folder, url))


def _url(folder: Path, otherwise: str) -> str:
    return Federation.read(folder).url if (folder / FILE).exists() else otherwise


def _say(text: str) -> None:
    if text:
        typer.echo(text, err=True)


@app.command()
def stop(folder: Folder) -> None:
    """End the node; its queues and password are kept for the next start."""
    if not node.stop_detached(folder):
        typer.echo(f"no RabbitMQ node runs in {folder}", err=True)


@app.command()
def status(folder: Folder) -> None:
    """Print the URL of the node that runs; exit status 1 when none does. Says what certificates end soon."""
    _warn(folder)
    url = node.status(folder)
    if url is None:
        typer.echo(f"no RabbitMQ node runs in {folder}: `fluffle broker start --dir {folder}` starts one", err=True)
        raise typer.Exit(1)
    typer.echo(_url(folder, url))


def _warn(folder: Path) -> None:
    if (folder / FILE).exists():
        for ending in securing.endings(folder):
            _say(f"{ending}.")


@app.command()
def secure(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The operator's folder, and the private node's.")],
    host: Annotated[
        list[str] | None, typer.Option(help="How others reach the broker; more may follow.", show_default="localhost")
    ] = None,
    vhost: Annotated[str | None, typer.Option(help="RabbitMQ's virtual host.", show_default="fluffle")] = None,
    port: Annotated[int | None, typer.Option(help="Of amqps.", show_default="a free one")] = None,
    external: Annotated[
        bool | None, typer.Option("--external/--password", help="Log in by certificate alone, or by password, too.")
    ] = None,
    management: Annotated[
        str | None,
        typer.Option(
            envvar="FLUFFLE_MANAGEMENT",
            help="https://USER:PASSWORD@HOST:PORT of a RabbitMQ that is there already; without USER:PASSWORD of one "
            "that reads what is made here.",
        ),
    ] = None,
    renew: Annotated[bool, typer.Option(help="Make new certificates for the broker and the coordinator.")] = False,
    run: Annotated[bool, typer.Option("--start", help="Then start the private node.")] = False,
) -> None:
    """Make what a federation needs to be secure: authority, certificates, users, rights, limits, queues.

    Run it again to change or mend something; it changes nothing else. The coordinator's invitation is
    DIR/coordinator.fluffle.
    """
    given: dict[str, Any] = {"vhost": vhost, "port": port, "external": external, "management": management}
    given |= {"hosts": tuple(host) if host else None}
    changes = {name: value for name, value in given.items() if value is not None}
    left = securing.secure(folder, changes, renew=renew)
    if run:
        node.start_detached(folder)
        left = securing.apply(folder)
    _say(left)
    _warn(folder)
    typer.echo(f"{Federation.read(folder).url} is for whoever holds an invitation: {folder}/coordinator.fluffle")


OperatorKey = Annotated[
    Path | None,
    typer.Option("--operator", help="The operator's secret key, from keygen.", show_default="DIR/operator.key"),
]
Names = Annotated[list[str], typer.Argument(metavar="NAME...", help="Workers.")]


def invite(
    names: Names,
    folder: Folder,
    renew: Annotated[bool, typer.Option(help="Make a new certificate for who is invited already.")] = False,
    again: Annotated[bool, typer.Option(help="Invite also those who have been revoked.")] = False,
    operator: OperatorKey = None,
) -> None:
    """Let workers in, each with a login, rights and queues of its own; DIR/NAME.fluffle is all that it needs.

    Where there is an operator's key, for secret sums, too: the worker is put on DIR/roster.json, and that is signed.
    Whose own key is on it already keeps that; for others a secret key is drawn here, and is in the invitation.
    """
    refused = []
    for name in names:
        try:
            securing.invite(folder, name, renew=renew, again=again, operator=operator)
            typer.echo(f"{name}: {folder / name}.fluffle")
        except UsageError as problem:  # the others come in all the same
            refused.append(str(problem))
    _say(securing.apply(folder))
    if refused:
        raise UsageError(" ".join(refused))


def revoke(names: Names, folder: Folder, operator: OperatorKey = None) -> None:
    """End workers' parts at once: login, connections, queues; what still comes from them is not counted.

    Then they are taken off the roster.
    """
    revoked, refused = [], []
    for name in names:
        try:
            was = securing.revoke(folder, name)
            typer.echo(f"{name} is revoked{'' if was else ' already'}")
            revoked.append(name)
        except UsageError as problem:  # the others are out all the same
            refused.append(str(problem))
    for name in revoked:  # all are out before a key is looked for
        _say(securing.strike(folder, name, operator=operator))
    if refused:
        raise UsageError(" ".join(refused))
