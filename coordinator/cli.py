"""The coordinator's commands: `fluffle coordinator` and `fluffle status`.

Knows options and what is printed. Does not know how a version is made.
"""

import asyncio
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from broker import daemon, rabbit
from broker.daemon import StoppedEarly
from broker.options import BrokerUrl, SettingPairs, parse_settings
from coordinator import history, service, standby
from coordinator import plan as plans
from coordinator.store import Store

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder; `fluffle init` makes one.")]
PlanOptions = dict[str, Any]


def coordinator(
    run: RunFolder,
    broker: BrokerUrl,
    rounds: Annotated[int | None, typer.Option(help="Versions to make.")] = None,
    cohort: Annotated[int | None, typer.Option(help="Workers chosen for a round.")] = None,
    quorum: Annotated[int | None, typer.Option(help="Fewest updates that make a version.")] = None,
    round_s: Annotated[float | None, typer.Option(help="Seconds until a round stops waiting.")] = None,
    gather_s: Annotated[float | None, typer.Option(help="Seconds to wait at first for a full cohort.")] = None,
    schedule: Annotated[str | None, typer.Option(help="parallel or cyclic.")] = None,
    workers: Annotated[str | None, typer.Option(help="Only these: names with commas, in cyclic order.")] = None,
    how: Annotated[
        str | None, typer.Option("--format", help="How updates travel: float32, bfloat16, int8 or top-k.")
    ] = None,
    keep: Annotated[float | None, typer.Option(help="The part of its numbers that a top-k update sends.")] = None,
    down: Annotated[
        str | None, typer.Option(help="How versions travel: full, or their change as bfloat16 or int8.")
    ] = None,
    drains: Annotated[
        int, typer.Option(min=1, max=64, help="Updates received at once, each in memory of its size.")
    ] = service.DRAINS,
    settings: SettingPairs = None,
) -> None:
    """Make versions until the plan's rounds are done. Options change the plan until version 1 is made.

    Where another coordinator is at work on the run, stand by, and take over when it is gone.
    """
    store = Store.open(run)
    given = {
        "rounds": rounds,
        "cohort": cohort,
        "quorum": quorum,
        "round_s": round_s,
        "gather_s": gather_s,
        "schedule": schedule,
        "workers": tuple(workers.split(",")) if workers else None,
        "format": how,
        "keep": keep,
        "down": down,
    }
    changes: PlanOptions = {name: value for name, value in given.items() if value is not None}
    if settings:
        changes["settings"] = {**store.plan.settings, **parse_settings(settings)}
    daemon.start_log()
    daemon.mind_parent()
    with standby.turn(run) as forced:
        store = Store.open(run)  # as it is now
        store.begin_epoch()
        store.adopt(plans.change(store.plan, changes))
        daemon.run(lambda stop: _serve(store, broker, stop, drains=drains, forced=forced))


async def _serve(store: Store, broker: str, stop: asyncio.Event, *, drains: int, forced: bool) -> None:
    link = await rabbit.connect(broker, name=f"coordinator-{store.plan.run}")
    work = asyncio.create_task(service.serve(store, link, drains=drains, forced=forced))
    stopped = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait([work, stopped], return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise StoppedEarly(f"stopped at version {store.latest()}; the same command goes on from there.")
        await work
    finally:
        for task in (work, stopped):
            task.cancel()
        await asyncio.gather(work, stopped, return_exceptions=True)
        await link.close()


def status(
    run: RunFolder,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """What has happened in a run, and what is happening."""
    store = Store.open(run)
    lines, now = store.history(), store.now()
    points = history.curve(lines)
    if as_json:
        shown = [{"version": p.version, "scored": p.scored, "held_out": p.held_out} for p in points]
        found = {"run": store.plan.run, "version": store.latest(), "rounds": store.plan.rounds, "now": now}
        found["standby"] = standby.waiting(run)
        json.dump({**found, "versions": shown, "history": lines}, sys.stdout)
        sys.stdout.write("\n")
        return
    console = Console()
    console.print(f"run [bold]{store.plan.run}[/], learner {store.plan.learner}")
    console.print(
        f"version {store.latest()} of {store.plan.rounds}; {now.get('why', 'not started yet')}", highlight=False
    )
    if waits := standby.waiting(run):
        console.print(f"standing by: process {waits['process']} on {waits['machine']}", markup=False, highlight=False)
    rounds = {line["version"]: line for line in lines if line.get("event") == "round"}
    table = Table("version", "updates", "scored by its workers", "held out", "seconds", "MB down", "MB up")
    for point in points:
        line = rounds.get(point.version, {})
        table.add_row(
            str(point.version),
            f"{len(line['counted'])}/{len(line['cohort'])}" if line else "",
            _metrics(point.scored),
            "; ".join(_metrics(metrics) for metrics in point.held_out.values()),
            f"{line['seconds']:.2f}" if line else "",
            f"{line['bytes_down'] / 1e6:.2f}" if line else "",
            f"{line['bytes_up'] / 1e6:.2f}" if line else "",
        )
    console.print(table)
    for line in lines:
        if line.get("event") == "abandoned":
            console.print(f"round {line['round']}, attempt {line['attempt']}, abandoned: {line['why']}", markup=False)
        for worker, reason in line.get("refused", {}).items():
            console.print(f"round {line['round']}: {worker} gave nothing: {reason}", markup=False)
        for other in line.get("others", []):
            verdict, reason = other["verdict"], other["reason"]
            console.print(
                f"round {line['round']}: an update of {other['worker']} was {verdict}: {reason}", markup=False
            )


def _metrics(metrics: history.Metrics) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in metrics.items() if name != "examples")
