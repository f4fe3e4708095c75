"""`fluffle broker`: a private RabbitMQ node on this machine, for a first try or a federation on one machine.

Knows the commands and where such a node lives by default. Does not know how a node is run: `node.py` does.
"""

import os
from pathlib import Path
from typing import Annotated

import typer

from broker import node

app = typer.Typer(no_args_is_help=True, help="A private RabbitMQ node on this machine.")

Folder = Annotated[
    Path | None, typer.Option("--dir", help="The node's folder.", show_default="~/.local/state/fluffle/broker")
]
Port = Annotated[
    int | None, typer.Option(help="AMQP port on 127.0.0.1.", show_default="the one before, or a free one")
]


def default_folder() -> Path:
    """Where a node lives that nobody gave a folder: the user's state folder."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "fluffle" / "broker"


@app.command()
def start(folder: Folder = None, port: Port = None) -> None:
    """Start the node unless it runs, and print its URL. It runs until `stop`."""
    typer.echo(node.start_detached(folder or default_folder(), port))


@app.command()
def stop(folder: Folder = None) -> None:
    """End the node; its queues and password are kept for the next start."""
    folder = folder or default_folder()
    if not node.stop_detached(folder):
        typer.echo(f"no RabbitMQ node runs in {folder}", err=True)


@app.command()
def status(folder: Folder = None) -> None:
    """Print the URL of the node that runs; exit status 1 when none does."""
    folder = folder or default_folder()
    url = node.status(folder)
    if url is None:
        typer.echo(f"no RabbitMQ node runs in {folder}: `fluffle broker start` starts one", err=True)
        raise typer.Exit(1)
    typer.echo(url)
