"""The worker's commands: `fluffle worker`, `fluffle try`, `fluffle ledger` and `fluffle evaluate`.

Knows options and what is printed. Does not know how a task is done.
"""

import asyncio
import json
import re
import socket
import sys
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table
from rich.text import Text

from broker import daemon, options, rabbit
from broker.chain import check
from broker.errors import UsageError
from broker.fields import NAME, NAME_RULE, counted, legible
from broker.invitation import Access, Invitation
from broker.link import Link
from broker.pinned import identity_of, read_identity, read_roster
from workers import host
from workers import learner as learners
from workers import ledger as ledgers
from workers import policy as policies
from workers.masking import Member
from workers.post import Shared
from workers.service import Worker
from workers.spool import Spool
from workers.training import RENEW_AFTER, Seat, Trainer
from workers.trial import Report, score, try_learner
from workers.work import Who

MEMORY_MB_MIN = 512
"""Torch alone takes half of it."""
LearnerName = Annotated[
    str, typer.Argument(metavar="LEARNER", help=f"A file.py, a module, or one of: {', '.join(learners.EXAMPLES)}.")
]
Source = Annotated[str, typer.Option("--data", help="What the learner's data() is given: a path, a name, …")]
State = Annotated[Path | None, typer.Option(help="Folder for this worker's files.")]
Threads = Annotated[int, typer.Option(min=1, help="Threads that torch computes with; results may depend on it.")]


def worker(
    learner: LearnerName,
    data: Source,
    broker: options.BrokerUrl = None,
    invite: options.Invite = None,
    name: Annotated[str | None, typer.Option(help="Unique in the federation; default: this machine's name.")] = None,
    many: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=host.WORKERS_MAX,
            help="Be so many workers, NAME-1, NAME-2, …; in --data, {index} is each one's number and {count} N.",
            metavar="N",
        ),
    ] = None,
    evaluate_only: Annotated[bool, typer.Option(help="Score versions, never train.")] = False,
    state: State = None,
    policy: Annotated[
        Path | None, typer.Option(help="The data owner's rules, a TOML file: what is served, when, what may leave.")
    ] = None,
    threads: Threads = 1,
    memory_mb: Annotated[
        int | None, typer.Option(min=MEMORY_MB_MIN, help="Of the training process, with torch; default: no limit.")
    ] = None,
    renew_after: Annotated[int, typer.Option(min=1, help="Tasks until a fresh training process.")] = RENEW_AFTER,
    roster: options.RosterFile = None,
    identity: Annotated[Path | None, typer.Option(help="Secure: its secret key; {name} in it is its name.")] = None,
    give_up_s: options.GiveUp = None,
    insecure: options.Insecure = False,
) -> None:
    """Stay beside the data: train what is sent here, and send back what changed. Ends on SIGTERM or Ctrl-C.

    The task in hand is finished first; a second signal ends it at once, with exit status 3. Status 4: it gave up.
    """
    access = options.way_in("worker", broker, invite=invite, insecure=insecure)
    if access.vouched and (many is not None or name not in (None, access.user)):
        raise UsageError(f"{access.file} invites {access.user} and nobody else: leave --name and --many out.")
    called = name if name is not None else access.user if access.vouched else _name_of_machine()
    names, sources = ([called], [data]) if many is None else host.named(called, data, many)
    if NAME.fullmatch(names[-1]) is None:
        raise UsageError(f"a worker cannot be called {names[-1]!r}: a name is {NAME_RULE}.")
    known = learners.learner_name(learner)
    lease_s, hosted = host.lease_s(len(names)), many is not None
    if policy is not None:
        policies.read(policy)
    trains = not evaluate_only
    members = _members(names, roster=roster, identity=identity, file=access.file, trains=trains)
    whos = [
        Who(each, known, trains=trains, lease_s=lease_s, hosted=hosted, policy=policy, member=members.get(each))
        for each in names
    ]
    daemon.start_log()  # the spool tells what it finds damaged
    spool = Spool(state or options.state_folder("workers", called), workers=len(names))
    trainer = Trainer(learner, spool, threads=threads, memory_mb=memory_mb, renew_after=renew_after)
    connect = partial(rabbit.connect, access, name=f"worker-{names[0]}", give_up_s=give_up_s)
    daemon.run(lambda stop: _serve(whos, sources, trainer, connect, stop))


def _members(
    names: list[str], *, roster: Path | None, identity: Path | None, file: Path | None, trains: bool
) -> dict[str, Member]:
    """Who each of them is in secure rounds; nobody, if it takes no part in any.

    An invitation (`file`) may hold the worker's own key, and whose signature the roster must have, which then the
    coordinator shows.

    Raises:
        UsageError: one of the files is missing, or is not what it should be.
    """
    invited = Invitation.read(file) if file else None
    operator, seed = (invited.operator, invited.identity) if invited else ("", "")
    if not (roster or identity or (operator and trains)):
        return {}
    if not (roster or operator):
        raise UsageError("secure rounds take --roster, whom to trust, too: ask the operator for it.")
    if not (identity or seed):
        raise UsageError("secure rounds take --identity, this worker's own key, too: `fluffle keygen` makes one.")
    known, members = read_roster(roster, operator) if roster else None, dict[str, Member]()
    for name in names:
        key = read_identity(Path(str(identity).replace("{name}", name))) if identity else identity_of(seed)
        if known:
            known.vouch(name, key)
        members[name] = Member(name, key, known.workers if known else {}, operator=bytes.fromhex(operator))
    return members


async def _serve(
    whos: list[Who], sources: list[str], trainer: Trainer, connect: Callable[[], Awaitable[Link]], stop: asyncio.Event
) -> None:
    try:
        link = await connect()
        shared = Shared(link, trainer.spool, workers=len(whos))
        try:
            await trainer.start()
            # the first one's data shows at once whether it can be loaded; that of many others may never be needed
            seats = (Seat(trainer, source, at_once=not i) for i, source in enumerate(sources))
            await host.serve([Worker(who, shared, seat) for who, seat in zip(whos, seats, strict=True)], stop)
        finally:
            await link.close()
            await trainer.stop()
    finally:
        trainer.spool.remove()


def try_(
    learner: LearnerName,
    data: Source,
    settings: options.SettingPairs = None,
    threads: Threads = 1,
    invite: options.Invite = None,
) -> None:
    """Check a learner without any broker: one task, timed and looked at; and the invitation, if there is one."""
    access = Access.invited(invite, "worker") if invite else None
    report = try_learner(learner, data, settings=options.parse_settings(settings), threads=threads)
    console, table = Console(), _shown(report)
    if access:
        table.add_row("invited", escape(access.said))
    console.print(table)
    for warning in filter(None, [*report.warnings, access.expiry() if access else ""]):
        console.print(f"[yellow]warning:[/] {escape(warning)}", highlight=False)
    if not report.warnings:
        console.print("[green]fine[/]: this learner is ready for a federation.")


def _shown(report: Report) -> Table:
    table, done, specs = Table("", Column(overflow="fold"), show_header=False), report.done, report.layout.specs
    numbers = counted(sum(spec.items for spec in specs), "number")
    table.add_row("model", f"{numbers} in {counted(len(specs), 'tensor')}")
    table.add_row("travels each way, each round", f"{report.layout.size_bytes / 1e6:.3f} MB")
    table.add_row("contract", report.contract.tensors)
    table.add_row("learner file", report.contract.file)
    table.add_row("loading learner and data", f"{report.ready_s:.2f} s")
    table.add_row("one task", f"{done.seconds:.2f} s, {counted(done.examples or 0, 'example')}")
    table.add_row("train said", _metrics(done.metrics))
    table.add_row("evaluate before", _metrics(done.scores))
    table.add_row("evaluate after", _metrics(report.after))
    return table


def ledger(
    name: Annotated[str | None, typer.Option(help="The worker's; this machine's name if not given.")] = None,
    state: State = None,
    verify: Annotated[bool, typer.Option("--verify", help="Whether it is as it was written, and its end.")] = False,
    remembered: Annotated[
        str, typer.Option("--chain", help="A chain that was printed before, which must still be there.")
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """What a worker was asked for, what it refused, what has left it and what became of that.

    Exit status 1 if it is not as it was written, where that is looked at: with --verify, --chain or --json.
    """
    called = name if name is not None else _name_of_machine()
    path = ledgers.find(state, called)
    data = path.read_bytes()
    lines, (findings, last) = [*ledgers.lines(data)], check(data, "ledger", remembered=remembered)
    bad = sum(each.bad for each in findings)
    if as_json:
        found = {"worker": called, "lines": lines, "chain": last, "findings": [each._asdict() for each in findings]}
        sys.stdout.write(json.dumps(found) + "\n")
    elif verify or remembered:
        said = f"not as it was written, in {counted(bad, 'place')}" if bad else "all is well"
        sys.stdout.writelines(f"{each.said}\n" for each in findings)
        sys.stdout.write(f"{said}: {counted(len(lines), 'line')} in {path}; the chain ends in {last or 'nothing'}\n")
    else:
        table, bad = Table("when", "what", "run", "round", "asked by", ""), 0
        for line in lines:
            table.add_row(*map(Text, ledgers.told(line)))
        Console().print(table)
    if bad:
        raise typer.Exit(1)


def evaluate(
    learner: LearnerName,
    version: Annotated[Path, typer.Argument(metavar="VERSION-FILE", help="versions/NNNNNN.safetensors of a run.")],
    data: Source,
    threads: Threads = 1,
) -> None:
    """Score a version on data of one's own."""
    Console().print(_metrics(score(learner, version, data, threads=threads)))


def _metrics(metrics: dict[str, float]) -> str:
    return escape(legible(", ".join(f"{name} {value:.4g}" for name, value in metrics.items()))) or "nothing"


def _name_of_machine() -> str:
    return re.sub(r"[^a-z0-9]+", "-", socket.gethostname().lower()).strip("-")[:63].strip("-") or "worker"
