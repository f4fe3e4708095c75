"""The front door: one command line over the three rooms.

Knows the commands' names, where each of them is, and exit statuses. Does not know how any of the rooms works.
"""

try:
    import errno
    import io
    import os
    import signal
    import sys
    from importlib import import_module
    from importlib.metadata import version as installed_version
    from types import FrameType
    from typing import Annotated, Any

    import typer
    from typer.core import TyperGroup
    from typer.main import get_group

    from broker.errors import FluffleError, UsageError
    from broker.fields import legible
except KeyboardInterrupt:  # typer takes care of it from then on
    raise SystemExit(130) from None

COMMANDS = {
    "demo": "fluffle_demo.demo", "try": "workers.cli.try_", "init": "fluffle_demo.init",
    "coordinator": "coordinator.cli.coordinator", "worker": "workers.cli.worker", "status": "coordinator.cli.status",
    "verify": "coordinator.cli.verify", "replay": "coordinator.cli.replay", "ledger": "workers.cli.ledger",
    "evaluate": "workers.cli.evaluate", "attack": "workers.attack_cli.attack", "invite": "broker.cli.invite",
    "revoke": "broker.cli.revoke", "keygen": "broker.roster_cli.keygen", "broker": "broker.cli.app",
    "roster": "broker.roster_cli.app",
}  # fmt: skip
"""Where each of them is, in the order in which --help lists them."""


class Commands(TyperGroup):
    """What is typed after `fluffle`, each loaded when it is asked for: all their libraries take half a second."""

    def list_commands(self, _ctx: Any) -> list[str]:
        """All names."""
        return [*COMMANDS]

    def get_command(self, _ctx: Any, cmd_name: str) -> Any:
        """The command, or group of commands, of a name; None if there is none."""
        if cmd_name not in COMMANDS:
            return None
        room, _, name = COMMANDS[cmd_name].rpartition(".")
        found, alone = getattr(import_module(room), name), typer.Typer()
        if isinstance(found, typer.Typer):
            alone.add_typer(found, name=cmd_name)
        else:
            alone.command(cmd_name)(found)
        return get_group(alone).commands[cmd_name]


app = typer.Typer(
    name="fluffle", cls=Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)


def main() -> None:
    """Run the command line.

    Exit status 2 for what the user can mend, 3 for stopped early, 4 for given up: start it anew; 1 for other trouble.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) < 3:  # was closed, as by `<&-`: no file or lock may have it
        os.set_inheritable(number, True)
    os.close(number)
    sys.stdout, sys.stderr = sys.stdout or os.fdopen(1, "w"), sys.stderr or os.fdopen(2, "w")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without … or ε still shows all the rest
    signal.signal(signal.SIGTERM, _as_ctrl_c)  # whatever is temporary goes with us
    try:
        app()
    except FluffleError as problem:
        _end(str(problem), problem.status)
    except MemoryError:
        _end("there is not enough memory for this, or this process may not have it.")
    except OSError as problem:
        if problem.filename is None and problem.errno not in (errno.ENOENT, errno.ENOSPC):  # a fault of ours
            raise
        _end(f"{problem.filename or 'the output, or room for temporary files,'} cannot be used: {problem.strerror}.")


def _as_ctrl_c(_number: int, frame: FrameType | None) -> None:
    """What Ctrl-C does just now: a running event loop is cancelled, and not torn in the midst of a step."""
    now = signal.getsignal(signal.SIGINT)
    (now if callable(now) else signal.default_int_handler)(signal.SIGINT, frame)


def _end(said: str, status: int = UsageError.status) -> None:
    sys.stderr.write(f"fluffle: {legible(said)}\n")
    sys.exit(status)


def _version(asked: bool) -> None:
    if asked:
        sys.stdout.write(f"fluffle {installed_version('fluffle')}\n")
        raise typer.Exit


Version = Annotated[bool, typer.Option("--version", is_eager=True, callback=_version, help="Say which it is.")]


@app.callback()
def front(*, version: Version = False) -> None:
    """Federated learning for PyTorch over RabbitMQ."""


if __name__ == "__main__":
    main()
