"""The front door: one command line over the three rooms, and `fluffle demo`.

Knows the commands' names and exit statuses. Does not know how any of the rooms works.
"""

import errno
import io
import sys
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Annotated

import typer

import broker.cli
import broker.roster_cli
import coordinator.cli
import workers.attack_cli
import workers.cli
from broker.errors import FluffleError, UsageError
from broker.fields import legible
from broker.options import SettingPairs, parse_settings
from coordinator import plan as plans
from coordinator.store import Store
from fluffle_demo import demo, make_run
from workers.cli import LearnerName

app = typer.Typer(name="fluffle", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def main() -> None:
    """Run the command line.

    Exit status 2 for what the user can mend, 3 for stopped early, 4 for given up: start it anew; 1 for other trouble.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without … or ε still shows all the rest
    try:
        app()
    except FluffleError as problem:
        sys.stderr.write(f"fluffle: {legible(str(problem))}\n")
        sys.exit(problem.status)
    except OSError as problem:
        if problem.filename is None and problem.errno not in (errno.ENOENT, errno.ENOSPC):  # a fault of ours
            raise
        of = problem.filename or "the output, or room for temporary files,"
        sys.stderr.write(f"fluffle: {legible(str(of))} cannot be used: {problem.strerror}.\n")
        sys.exit(UsageError.status)


def _version(asked: bool) -> None:
    if asked:
        sys.stdout.write(f"fluffle {installed_version('fluffle')}\n")
        raise typer.Exit


Version = Annotated[bool, typer.Option("--version", is_eager=True, callback=_version, help="Say which it is.")]


@app.callback()
def front(*, version: Version = False) -> None:
    """Federated learning for PyTorch over RabbitMQ."""


def init(
    learner: LearnerName,
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A folder to make.")],
    seed: Annotated[int, typer.Option(min=0, help="Begins all dice: first weights, cohorts, training.")] = 0,
    settings: SettingPairs = None,
    pin_learner: Annotated[
        bool, typer.Option(help="Let workers train only with the very same learner file, bit for bit.")
    ] = False,
    if_missing: Annotated[bool, typer.Option(help="Leave a run alone that is there already.")] = False,
) -> None:
    """Make a run: its folder, its plan, and version 0 from the learner's model()."""
    if if_missing and (run / plans.FILE).exists():
        store = Store.open(run)
        sys.stdout.write(f"{run} holds the run {store.plan.run} already\n")
        return
    store = make_run(learner, run, {"seed": seed, "settings": parse_settings(settings)}, pin=pin_learner)
    sys.stdout.write(f"{run} is ready: run {store.plan.run}, version 0 is {store.path(0)}\n")


app.command()(demo)  # here, and not at each function, because this is the order in which --help lists them
app.command(name="try")(workers.cli.try_)
app.command()(init)
for command in (
    coordinator.cli.coordinator, workers.cli.worker, coordinator.cli.status, coordinator.cli.verify,
    coordinator.cli.replay, workers.cli.ledger, workers.cli.evaluate, workers.attack_cli.attack,
    broker.cli.invite, broker.cli.revoke, broker.roster_cli.keygen,
):  # fmt: skip
    app.command()(command)
app.add_typer(broker.cli.app, name="broker", help="A private RabbitMQ node on this machine, secured or not.")
app.add_typer(broker.roster_cli.app, name="roster")

if __name__ == "__main__":
    main()
