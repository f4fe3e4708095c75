"""The coordinator's commands: `fluffle coordinator`, `fluffle status`, `fluffle verify` and `fluffle replay`.

Knows options and what is printed. Does not know how a version is made.
"""

import asyncio
import json
import logging
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic_core import to_jsonable_python
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from broker import daemon, rabbit
from broker.daemon import StoppedEarly
from broker.errors import UsageError
from broker.fields import counted, legible
from broker.invitation import Access, Invitation
from broker.link import Link
from broker.options import BrokerUrl, GiveUp, Insecure, Invite, RosterFile, SettingPairs, parse_settings, way_in
from broker.pinned import Roster, read_roster
from coordinator import history, service, standby, updates
from coordinator import plan as plans
from coordinator import replay as replaying
from coordinator import verify as verifying
from coordinator.budget import counsel
from coordinator.store import NOW, Store

log = logging.getLogger(__name__)

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder; `fluffle init` makes one.")]
OverSelect = Annotated[float | None, typer.Option(help="Ask so many times the cohort, close when it is in: 1 to 3.")]
Rule = Annotated[str | None, typer.Option(help="mean; or median, trimmed-mean, which a few liars cannot bend.")]
Trim = Annotated[int | None, typer.Option(help="How many trimmed-mean leaves out at both ends; 1.")]
How = Annotated[str | None, typer.Option("--format", help="How updates travel: float32, bfloat16, int8 or top-k.")]
Down = Annotated[str | None, typer.Option(help="How versions travel: full, or their change as bfloat16 or int8.")]
Privacy = Annotated[str | None, typer.Option(help="none, or secure: updates are added up in secret; needs --roster.")]
Threshold = Annotated[float | None, typer.Option(help="Secure: part of the neighbours that opens a secret, below 1.")]
KeepUpdates = Annotated[bool | None, typer.Option(help="Keep counted updates, to make versions again, for ever.")]
Drains = Annotated[int, typer.Option(min=1, max=64, help="Updates received at once, each in memory of its size.")]
Dp = Annotated[str | None, typer.Option(help="Differential privacy: of a worker, central or distributed; record.")]
DpPopulation = Annotated[int | None, typer.Option(help="Of how many workers dice draw each round's cohort.")]
DpAdaptive = Annotated[bool | None, typer.Option(help="Let the clip follow the median of the updates' norms.")]


def coordinator(
    run: RunFolder,
    broker: BrokerUrl = None,
    invite: Invite = None,
    rounds: Annotated[int | None, typer.Option(help="Versions to make.")] = None,
    cohort: Annotated[int | None, typer.Option(help="Workers chosen for a round.")] = None,
    over_select: OverSelect = None,
    quorum: Annotated[int | None, typer.Option(help="Fewest updates that make a version.")] = None,
    round_s: Annotated[float | None, typer.Option(help="Seconds until a round stops waiting.")] = None,
    gather_s: Annotated[float | None, typer.Option(help="Seconds to wait at first for a full cohort.")] = None,
    schedule: Annotated[str | None, typer.Option(help="parallel or cyclic.")] = None,
    workers: Annotated[str | None, typer.Option(help="Only these: names with commas, in cyclic order.")] = None,
    rule: Rule = None,
    trim: Trim = None,
    how: How = None,
    keep: Annotated[float | None, typer.Option(help="The part of its numbers that a top-k update sends.")] = None,
    down: Down = None,
    clip: Annotated[float | None, typer.Option(help="The largest norm of an update; longer: scaled down.")] = None,
    examples_max: Annotated[int | None, typer.Option(help="The most examples that an update counts for.")] = None,
    privacy: Privacy = None,
    ring_bits: Annotated[int | None, typer.Option(help="Secure: 32 or 64 bits a number.")] = None,
    min_cohort: Annotated[int | None, typer.Option(help="Secure: fewest updates in a sum, from 3.")] = None,
    threshold: Threshold = None,
    roster: RosterFile = None,
    keep_updates: KeepUpdates = None,
    dp: Dp = None,
    dp_noise: Annotated[float | None, typer.Option(help="Its noise, in clips.")] = None,
    dp_budget: Annotated[float | None, typer.Option(help="The largest epsilon; the run ends before it.")] = None,
    dp_delta: Annotated[float | None, typer.Option(help="The delta that belongs to it.")] = None,
    dp_population: DpPopulation = None,
    dp_adaptive: DpAdaptive = None,
    dp_row_clip: Annotated[float | None, typer.Option(help="record: the largest norm of a row's gradient.")] = None,
    drains: Drains = service.DRAINS,
    settings: SettingPairs = None,
    give_up_s: GiveUp = None,
    insecure: Insecure = False,
) -> None:
    """Make versions until the plan's rounds are done. Options change the plan until version 1 is made.

    Where another coordinator is at work on the run, stand by, and take over when it is gone.
    """
    given = locals()  # every option that is called as a setting of the plan
    access = way_in("coordinator", broker, invite=invite, insecure=insecure)
    store = Store.open(run)
    given |= {"run": None, "format": how, "workers": tuple(workers.split(",")) if workers else None}
    given["settings"] = {**store.plan.settings, **parse_settings(settings)} if settings else None
    changes = {each.name: given[each.name] for each in fields(plans.Plan) if given.get(each.name) is not None}
    plan = plans.change(store.plan, changes)
    _keys(store, plan, roster, access)  # what is wrong is said now, and not when it is our turn
    daemon.start_log()
    if said := counsel(plan):
        log.warning("%s", said)
    daemon.mind_parent()
    with standby.turn(run) as forced:
        store = Store.open(run)  # as it is now
        plan = plans.change(store.plan, changes)
        keys = _keys(store, plan, roster, access)
        store.begin_epoch()
        store.adopt(plan)
        connect = partial(rabbit.connect, access, name=f"coordinator-{store.plan.run}", give_up_s=give_up_s)

        async def begin(link: Link) -> None:
            # a large model takes its time: meanwhile signals are heard, and the broker hears of us
            coordinating = await asyncio.to_thread(service.Coordinator, store, link, drains=drains, keys=keys)
            await coordinating.serve(forced=forced)

        try:
            daemon.run(lambda stop: _serve(store, connect, stop, begin))
        finally:
            store.tidy()  # no thread writes any more


def _keys(store: Store, plan: plans.Plan, roster: Path | None, access: Access) -> Roster | None:
    """Whose keys count in a run that is about to take this plan. Nothing is written.

    Raises:
        UsageError: the plan comes too late; the roster is none, or a secure run has none.
    """
    store.would_change(plan)
    operator = Invitation.read(access.file).operator if access.file else ""
    keys = read_roster(roster, operator) if roster else None
    if plan.privacy == "secure" and not (keys and keys.workers):
        raise UsageError("a secure run needs to know whose keys count: give the operator's roster with --roster.")
    return keys


async def _serve(
    store: Store,
    connect: Callable[[], Awaitable[Link]],
    stop: asyncio.Event,
    begin: Callable[[Link], Coroutine[None, None, None]],
) -> None:
    link = await connect()
    work = asyncio.create_task(begin(link))
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
    invite: Invite = None,
) -> None:
    """What has happened in a run, and what is happening; and how long an invitation holds, if there is one."""
    store = Store.open(run)
    lines, (now, told), waits = [*store.history()], _present(store), standby.waiting(run)
    abandoned = history.last_abandoned(lines)
    points, kept = history.curve(lines), list(updates.sizes(run))
    if as_json:
        shown = [{"version": p.version, "scored": p.scored, "held_out": p.held_out} for p in points]
        found = {"run": store.plan.run, "version": store.latest(), "rounds": store.plan.rounds, "now": now}
        found |= {"contract": store.plan.contract, "learner_file": store.plan.learner_file}
        found |= {"updates_bytes": sum(kept), "abandoned": abandoned, "standby": waits}
        strict = to_jsonable_python({**found, "versions": shown, "history": lines}, inf_nan_mode="null")
        sys.stdout.write(f"{json.dumps(strict, allow_nan=False)}\n")
        return
    console = Console()

    def say(text: str) -> None:
        console.print(legible(text), markup=False, highlight=False, soft_wrap=True)

    say(f"run {store.plan.run}, learner {store.plan.learner}")
    say(f"version {store.latest()} of {store.plan.rounds}; {now.get('why', 'not started yet')}")
    for said in _said_of(store.plan, invite):
        say(said)
    if waits:
        say(f"standing by: process {waits['process']} on {waits['machine']}")
    for said in [*told, *(f"  {_abandoned(line)}" for line in filter(None, [abandoned])), *history.spent(lines)]:
        say(said)
    if kept:
        say(f"{counted(len(kept), 'update')} kept, {sum(kept) / 1e6:.2f} MB in all")
    rounds = {line.get("version"): line for line in lines if line.get("event") == "round"}
    table = Table("version", "updates", "workers", "held out", "s", "MB down", "MB up", padding=0)
    for point in points:
        line = rounds.get(point.version, {})
        table.add_row(
            str(point.version),
            f"{len(line.get('counted', ()))}/{len(line.get('cohort', ()))}" if line else "",
            escape(legible(_metrics(point.scored))),
            escape(legible("; ".join(_metrics(metrics) for metrics in point.held_out.values()))),
            f"{line['seconds']:.2f}" if "seconds" in line else "",
            f"{line['bytes_down'] / 1e6:.2f}" if "bytes_down" in line else "",
            f"{line['bytes_up'] / 1e6:.2f}" if "bytes_up" in line else "",
        )
    console.print(table)
    for said in _said_before(lines):
        say(said)


def _said_of(plan: plans.Plan, invite: Path | None) -> Iterator[str]:
    """What every worker's learner must be; as whom an invitation lets the coordinator in, and if it ends soon."""
    if plan.contract:  # a former fluffle did not say
        yield f"contract {plan.contract}" + (f", learner file {plan.learner_file}" if plan.learner_file else "")
    if invite:
        access = Access.invited(invite, "coordinator")
        yield from filter(None, (f"invited: {access.said}", access.expiry()))


def _said_before(lines: list[history.Line]) -> Iterator[str]:
    """What was out of the ordinary in each round: abandoned, refused, not counted, rested."""
    for line in lines:
        of = f"round {line.get('round')}"
        if line.get("event") == "abandoned":
            yield _abandoned(line)
        for worker, reason in line.get("refused", {}).items():
            yield f"{of}: {worker} gave nothing: {reason}"
        for other in line.get("others", []):
            verdict, reason, times = other["verdict"], other["reason"], other.get("times", 1)
            how = f"an update of {other['worker']} was {verdict}" + (f" {times} times" if times > 1 else "")
            yield f"{of}: {how}: {reason}"
        for worker, rest in line.get("rested", {}).items():
            yield f"{of}: {worker} began to rest for {counted(rest['rounds'], 'round')}: {rest['why']}"


def _present(store: Store) -> tuple[dict[str, Any], list[str]]:
    """What is happening, as the coordinator has left word; and the same for people."""
    now = store.now()
    try:
        if (left_s := now.get("deadline_s")) is not None:  # when that was written
            now["deadline_s"] = round(left_s - (time.time() - now["at"]), 1)
        return now, [*_said_now(now)]
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError):
        return {}, [f"{store.folder / NOW} does not say what a coordinator writes there"]


def _said_now(now: dict[str, Any]) -> Iterator[str]:
    """The round that is open: how it stands, who is waited for and why; and who rests, and why."""
    if "waiting" in now:  # a former fluffle did not say
        left_s = now.get("deadline_s") or 0.0
        when = f"the deadline is in {left_s:.0f} s" if left_s > 0 else "the deadline has passed"
        updates = f"{len(now['counted'])}/{len(now['cohort'])} updates, target {now['target']}"
        yield f"round {now['round']}, attempt {now['attempt']}: {updates}, quorum {now['quorum']}; {when}"
        yield from (f"  waits for {worker}: {why}" for worker, why in now["waiting"].items())
        yield from (f"  {worker} gives nothing: {reason}" for worker, reason in now["refused"].items())
    for worker, rest in now.get("resting", {}).items():
        asked = ", but is asked: there is no quorum without" if worker in now.get("cohort", ()) else ""
        yield f"  {worker} rests for {counted(rest['rounds'], 'more round')}{asked}: {rest['why']}"


def _abandoned(line: history.Line) -> str:
    return f"attempt {line.get('attempt')} at round {line.get('round')} was abandoned: {line.get('why')}"


def verify(
    run: RunFolder,
    remembered: Annotated[
        str, typer.Option("--chain", help="A chain that was printed before, which the history must still contain.")
    ] = "",
) -> None:
    """Whether a run is still what was written: plan, history, versions, kept updates. Exit status 1 if not."""
    findings, found = verifying.verify(run, remembered=remembered)
    sys.stdout.writelines(f"{legible(finding.said)}\n" for finding in findings)
    bad = sum(finding.bad for finding in findings)
    said = f"not as it was written, in {counted(bad, 'place')}" if bad else "all is well"
    sys.stdout.write(f"{said}: {found}\n")
    if bad:
        raise typer.Exit(1)


def replay(
    run: RunFolder,
    to: Annotated[int, typer.Option(min=1, help="The version to make again.")],
    start: Annotated[
        int | None, typer.Option("--from", min=0, help="The version to begin with; default: the one before.")
    ] = None,
) -> None:
    """Make a version again from the updates that were kept, and say whether the bits agree. Exit status 1 if not."""
    begin = to - 1 if start is None else start
    done = replaying.replay(Store.open(run), to, begin)
    of = f"from version {begin} and {counted(done.updates, 'update')}"
    if not done.differences:
        sys.stdout.write(f"version {to} made again {of} is the same, bit for bit\n")
        return
    sys.stdout.write(f"version {to} made again {of} is not the one in {run}:\n")
    sys.stdout.writelines(f"  {legible(difference)}\n" for difference in done.differences)
    raise typer.Exit(1)


def _metrics(metrics: history.Metrics) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in metrics.items() if name != "examples")
