"""A run begun from a learner's model, and a whole federation on one machine: `fluffle demo`.

Knows how broker, coordinator and workers are put together. Does not know how any of them works.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, chdir, closing, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn
from rich.table import Table

from broker import wording
from broker.contract import fingerprint
from broker.daemon import PARENT
from broker.errors import FluffleError, RunEnded, UsageError
from broker.fields import counted, legible
from broker.folder import LOG
from broker.invitation import Access
from broker.node import Node, find_server
from broker.options import BROKER, INVITE, Insecure, SettingPairs, parse_settings
from broker.pinned import draw_keys
from broker.processes import begin
from coordinator import history, report
from coordinator import plan as plans
from coordinator.store import Store, new_run_name
from workers.cli import LearnerName

POLL_S = 0.1
SECURE = {"clip": 8.0, "examples_max": 2048}
"""Of a demonstration with secure rounds: how long an update may be, and for how many examples it counts."""
STOP_S = 20.0
HELD_OUT = "held-out"


def make_run(learner: str, run: Path, values: dict[str, Any], *, pin: bool = False) -> Store:
    """A run of the learner's model: its folder, its plan, and version 0. `pin`: of this very learner file.

    Raises:
        UsageError: a setting, the learner or the folder is not as it must be.
    """
    plan = plans.make({"run": new_run_name(run), "learner": learner, **values}, "these options")
    # here and not above: torch takes two seconds to load, and no other command needs it in this process
    from workers import learner as learners  # noqa: PLC0415
    from workers import task, weights  # noqa: PLC0415

    with chdir("."):  # a learner may go elsewhere, but paths are as they were typed
        found = learners.load(learner)
        model = task.new_model(found, seed=plan.seed)
        layout = weights.layout_of(model)
        drawn = memoryview(weights.read(model, layout))
    plan = plans.change(plan, {"contract": fingerprint(layout), "learner_file": found.file if pin else ""})
    return Store.create(run, plan, layout, drawn)


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


_scratch = partial(tempfile.TemporaryDirectory, prefix="fluffle-")


@dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True))
class Cast:
    """Who takes part in a demonstration, as a learner's `demo()` says it. Each value is a source for `data()`."""

    workers: Annotated[dict[str, str], Field(min_length=1)]
    held_out: str | None
    pooled: str | None
    settings: dict[str, Any]
    rounds: int


def demo(
    learner: Annotated[str, typer.Option(help="As for `fluffle worker`.")] = "digits",
    workers: Annotated[int, typer.Option(min=1, max=64, help="How many workers, where the learner can choose.")] = 4,
    rounds: Annotated[int | None, typer.Option(min=1, help="Versions to make.")] = None,
    schedule: Annotated[str, typer.Option(help="parallel or cyclic.")] = "parallel",
    privacy: Annotated[str, typer.Option(help="none, or secure: nobody sees a worker's update.")] = "none",
    broker_url: Annotated[str | None, typer.Option("--broker", help="This RabbitMQ; default: a private one.")] = None,
    run: Annotated[Path | None, typer.Option(help="The run's folder; default: fluffle-demo.")] = None,
    data: Annotated[list[str] | None, typer.Option(help="A worker's source; give one for each worker.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Begins all dice.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as one JSON object.")] = False,
    insecure: Insecure = False,
) -> None:
    """Train one model across several workers through RabbitMQ, and say whether it was worth it."""
    if broker_url:
        Access.at(broker_url, insecure=insecure)  # or everybody would find out alone
    else:
        find_server()
    out = Console(stderr=as_json, highlight=False)
    folder = run or _free_folder(Path("fluffle-demo"))
    cast = _cast(learner, workers, data or [], seed)
    values = {
        "rounds": rounds or cast.rounds,
        "cohort": len(cast.workers),
        "quorum": len(cast.workers),
        "schedule": schedule,
        **({"privacy": privacy, **SECURE} if privacy != "none" else {}),
        "workers": tuple(cast.workers),
        "gather_s": 120.0,
        "seed": seed,
        "settings": cast.settings,
    }
    store = make_run(learner, folder, values)  # before RabbitMQ, which takes seconds: every option is looked at here
    logs = store.folder / "log"
    logs.mkdir()
    try:
        with ExitStack() as stack:
            out.print("starting RabbitMQ …" if broker_url is None else "using the RabbitMQ given")
            url = broker_url or stack.enter_context(_broker(stack.enter_context(_scratch()), logs)).url
            began_at = time.monotonic()
            _play(store, cast, url, out)
            seconds = time.monotonic() - began_at
        out.print("comparing with each worker alone, and with all data in one place …")
        figures = _figures(store, cast, _compare(store, cast), seconds)
    except KeyboardInterrupt:
        out.print(f"stopped; what there is of the run is in {escape(str(folder))}/")
        raise
    picture = report.draw(store, figures)
    if as_json:
        sys.stdout.write(json.dumps(figures) + "\n")
    else:
        _show(out, figures, store, cast)
    if picture is None:
        out.print("no picture: it takes matplotlib, which `pip install 'fluffle\\[demo]'` brings")


def _free_folder(wanted: Path) -> Path:
    names = (wanted if n == 1 else wanted.with_name(f"{wanted.name}-{n}") for n in range(1, 10_000))
    return next(name for name in names if not name.exists())


def _cast(learner: str, workers: int, sources: list[str], seed: int) -> Cast:
    from workers import learner as learners  # noqa: PLC0415 (see make_run)

    with chdir("."):  # see make_run
        found = learners.load(learner)
    if sources:
        return Cast({f"worker-{k}": source for k, source in enumerate(sources, 1)}, None, None, {}, 10)
    if found.demo is None:
        raise UsageError(f"the learner {learner!r} has no demo(): give each worker's source with --data.")
    whose = f"demo() of the learner {found.name}"
    with chdir("."), learners.blaming(f"{whose} failed:"):
        said = dict(found.demo(workers, seed))
    return wording.make(Cast, said, whose)


def _broker(folder: str, logs: Path) -> Node:
    """A RabbitMQ for as long as this takes; its log stays, for whoever asks why it did not start."""
    node = Node(Path(folder))
    (node.folder / LOG).symlink_to(logs.absolute() / "rabbitmq.log")
    return node


def _play(store: Store, cast: Cast, url: str, out: Console) -> None:
    """Start everyone, watch until the coordinator is done, and send everyone home.

    Raises:
        RunEnded: the coordinator or a worker failed.
    """
    with _scratch() as state, closing(Company(url, store.folder / "log", Path(state))) as company:
        keys, roster, member = store.folder / "keys", tuple[str, ...](), tuple[str, ...]()
        if store.plan.privacy == "secure":
            roster = ("--roster", str(draw_keys(keys, [*cast.workers])))
            member = (*roster, "--identity", str(keys / "{name}.key"))
        company.start("coordinator", "coordinator", str(store.folder), *roster)
        for name, source in cast.workers.items():
            company.start(name, "worker", store.plan.learner, "--name", name, "--data", source, *member)
        if cast.held_out is not None:
            options = ("--name", HELD_OUT, "--data", cast.held_out, "--evaluate-only")
            company.start(HELD_OUT, "worker", store.plan.learner, *options)
        _watch(store, company, out)


class Company:
    """The processes of a demonstration; each writes its log into a file named after it."""

    def __init__(self, url: str, logs: Path, state: Path) -> None:
        self._logs = logs
        self._state = state
        # in the environment, because every user of the machine can read a command line
        self._env = {**os.environ, BROKER: url, PARENT: str(os.getpid()), "FLUFFLE_INSECURE": "1"}
        self._env.pop(INVITE, None)
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, *command: str) -> None:
        """Start one `fluffle` command in a session of its own, so that Ctrl-C in the terminal is ours alone."""
        state = ("--state", str(self._state / name)) if command[0] == "worker" else ()
        words = [sys.executable, "-P", "-m", "fluffle", *command, *state]
        self._running[name] = begin(words, env=self._env, log=self._logs / f"{name}.log")

    def done(self) -> bool:
        """Whether the coordinator has ended well.

        Raises:
            RunEnded: somebody has ended who should not have.
        """
        for name, process in self._running.items():
            status = process.poll()
            if status is not None and (name != "coordinator" or status != 0):
                log = self._logs / f"{name}.log"
                last = log.read_text(errors="replace").strip().splitlines()[-1:] or ["nothing"]
                raise RunEnded(f"{name} ended with status {status}: {last[0]} (all of it: {log})")
        return self._running["coordinator"].poll() == 0

    def close(self) -> None:
        """Ask everyone to leave, and see to it."""
        for process in self._running.values():
            process.terminate()
        until = time.monotonic() + STOP_S
        for process in self._running.values():
            try:
                process.wait(max(0.1, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _watch(store: Store, company: Company, out: Console) -> None:
    """Show a line for every version, and what is happening meanwhile, until the last is made."""
    columns = "round", MofNCompleteColumn(), BarColumn(bar_width=24), TimeElapsedColumn(), "{task.description}"
    told = 0
    with Progress(*columns, console=out, transient=True) as progress:
        bar = progress.add_task("starting the workers", total=store.plan.rounds)
        done = False
        while not done:
            done = company.done()
            lines = [*store.history()]
            made = sum(line.get("event") == "round" for line in lines)
            for point in history.curve(lines)[told:]:
                if done or point.version < made:  # its workers score a version in the round that makes the next
                    progress.print(_told(point), soft_wrap=True)
                    told += 1
            now = store.now()
            progress.update(
                bar, completed=store.latest() or 0, description=escape(now.get("why", "starting the workers"))
            )
            time.sleep(POLL_S)


def _told(point: history.Point) -> str:
    def words(metrics: history.Metrics) -> str:
        told = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items() if name != "examples")
        return escape(legible(told)) or "not scored"

    held_out = "".join(f"   [dim]{who}:[/] {words(metrics)}" for who, metrics in point.held_out.items())
    return f"version {point.version:>3}   [dim]workers:[/] {words(point.scored)}{held_out}"


def _compare(store: Store, cast: Cast) -> dict[str, Any]:
    """What each worker would have learned alone and what all data together would have given, with equal work."""
    from workers.baseline import Request, baseline  # noqa: PLC0415 (see make_run)

    plan = store.plan
    request = Request(
        plan.learner, cast.workers, str(store.path(0).absolute()), plan.rounds, plan.seed, dict(plan.settings),
        pooled=cast.pooled, held_out=cast.held_out,
    )  # fmt: skip
    try:
        with chdir("."), redirect_stdout(sys.stderr):  # what the learner prints must not come between the JSON
            return baseline(request)
    except FluffleError as problem:
        raise RunEnded(f"the comparison failed: {problem}") from problem


def _figures(store: Store, cast: Cast, compared: dict[str, Any], seconds: float) -> dict[str, Any]:
    lines = [*store.history()]
    rounds = [line for line in lines if line["event"] == "round"]
    last = max(history.curve(lines), key=lambda point: (bool(point.scored or point.held_out), point.version))
    federated = last.held_out.get(HELD_OUT, last.scored)
    alone: dict[str, dict[str, float]] = compared["alone"]
    pooled: dict[str, float] = compared["pooled"] or {}
    mean = history.mean_metrics((1.0, metrics) for metrics in alone.values())
    return {
        "learner": store.plan.learner,
        "workers": len(cast.workers),
        "version": last.version,
        "rounds": len(rounds),
        "federated": {"accuracy": federated.get("accuracy"), "loss": federated.get("loss")},
        "alone": {
            "mean_accuracy": mean.get("accuracy"),
            "mean_loss": mean.get("loss"),
            "accuracy": {name: metrics.get("accuracy") for name, metrics in alone.items()},
        },
        "pooled": {"accuracy": pooled.get("accuracy"), "loss": pooled.get("loss")},
        "bytes_down": sum(line["bytes_down"] for line in rounds),
        "bytes_up": sum(line["bytes_up"] for line in rounds),
        "seconds": round(seconds, 2),
        "run": str(store.folder),
    }


def _show(out: Console, figures: dict[str, Any], store: Store, cast: Cast) -> None:
    """The table that answers why one would federate, and what to type next."""

    def row(what: str, accuracy: float | None, loss: float | None) -> None:
        percent = "" if accuracy is None else f"{100 * accuracy:.1f} %"
        if percent or loss is not None:
            table.add_row(what, percent, "" if loss is None else f"{loss:.4f}")

    judged = "scored by one who never trains" if cast.held_out else "on the workers' own data"
    table = Table("why federate?", "accuracy", "loss", title=f"version {figures['version']}, {judged}")
    for name, accuracy in figures["alone"]["accuracy"].items():
        row(f"{name} alone", accuracy, None)
    row("a worker alone, on average", figures["alone"]["mean_accuracy"], figures["alone"]["mean_loss"])
    row("the federation", figures["federated"]["accuracy"], figures["federated"]["loss"])
    row("all data in one place", figures["pooled"]["accuracy"], figures["pooled"]["loss"])
    out.print(table)
    rounds, down, up = counted(figures["rounds"], "round"), figures["bytes_down"] / 1e6, figures["bytes_up"] / 1e6
    out.print(f"{rounds} in {figures['seconds']:.1f} s; {down:.2f} MB down, {up:.2f} MB up")
    learner, run, last = escape(store.plan.learner), escape(str(store.folder)), store.path(store.latest() or 0)
    source = escape(cast.held_out or next(iter(cast.workers.values())))
    out.print(
        f"""
The run is in [bold]{run}/[/]: plan.toml, versions/, history.jsonl, report.png, log/. Next:
  fluffle status {run}
  fluffle evaluate {learner} {escape(str(last))} --data '{source}'
  fluffle demo --learner toy --schedule cyclic      the classroom where it began
  fluffle try my_learner.py --data my_data          a learner of your own""",
        soft_wrap=True,
    )
