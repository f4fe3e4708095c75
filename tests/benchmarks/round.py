"""What a round costs, as a user runs it: `make bench`, or `make bench ARGS="--rows 4x1M,2x40M --rounds 5"`.

Each row is a federation of its own. Beside it stand what the same machine does with less around it, a bare pump
through the same broker and a plain memcpy, and with `--peers` the same rounds in other systems, in turn with ours.
One table, one JSON and one picture come of it.

Knows which figures make a row, and how they compare. Does not know how any was measured, and judges nothing: no
figure here fails a build.
"""

import argparse
import json
import os
import platform
import shlex
import statistics
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

from broker.errors import FluffleError

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a file, it finds its neighbours where tests do
from tests.benchmarks import shown
from tests.benchmarks.federation import Figures, federate, periods
from tests.benchmarks.peers import PEERS, Peer, Said, install
from tests.benchmarks.pump import memcpy
from tests.benchmarks.rows import ALONE_MAX, WARMUP, Row, rows_of
from tests.node import server_version

FIGURES = Path("build/bench.json")
TURNS = 2
"""With peers, everybody's rounds are made in so many turns, one system after the other: a noisy minute hits all."""
WIDTH = 150

Pythons = dict[str, Path | str]
"""By the peers' names: a Python that has it, or why there is none."""


def measure(row: Row, folder: Path, pythons: Pythons, *, tls: bool = False) -> dict[str, Any]:
    """All figures of a row, in a new folder; with `tls` also of the same rounds by mutual TLS, in turn with these.

    Raises:
        FluffleError: our own rounds were not made, and why.
    """
    peers = [peer for peer in PEERS if peer.name in pythons and row.hosts == row.workers <= ALONE_MAX]
    tls = tls and row.hosts == row.workers
    turns = TURNS if peers or tls else 1
    turn = replace(row, rounds=-(-row.rounds // turns))
    ours: list[Figures] = []
    by_tls: list[Figures] = []
    theirs: dict[str, list[Said] | str] = {peer.name: [] for peer in peers}
    for number in range(turns):
        ours.append(federate(turn, folder / f"ours-{number}"))
        if tls:
            by_tls.append(federate(turn, folder / f"tls-{number}", tls=True))
        for peer in peers:
            theirs[peer.name] = meet(peer, pythons[peer.name], turn, folder, theirs[peer.name])
    figures = together(ours)
    if tls:
        secured = together(by_tls)
        ratio = secured["seconds"]["median"] / figures["seconds"]["median"]
        figures["tls"] = {"ratio": ratio, **{key: secured[key] for key in ("seconds", "cpu_s", "peak_bytes")}}
    if peers:
        ours_s = figures["seconds"]["median"]
        figures["peers"] = {peer.name: against(peer, theirs[peer.name], row, ours_s) for peer in peers}
    return {**asdict(row), **figures}


def meet(peer: Peer, python: Path | str, row: Row, folder: Path, before: list[Said] | str) -> list[Said] | str:
    """One more turn of a peer after those before; why there is none, once there was a reason."""
    if isinstance(python, str) or isinstance(before, str):
        return python if isinstance(python, str) else before
    place = folder / f"peer-{PEERS.index(peer)}-{len(before)}"
    place.mkdir()
    try:
        return [*before, peer.rounds(python, place, replace(row, rounds=min(row.rounds, peer.rounds_max)))]
    except (FluffleError, OSError, ValueError, LookupError) as problem:  # our own figures stand without it
        return f"{type(problem).__name__}: {problem}"


def together(turns: list[Figures]) -> dict[str, Any]:
    """One row of all turns: every round counts alike, peaks are the highest."""
    seconds = spread(each for turn in turns for each in turn.periods)
    path_bytes = turns[-1].down_bytes + turns[-1].up_bytes
    limits = {"pump": statistics.median(turn.pump_bytes_per_s for turn in turns), "memcpy": memcpy()}
    rate = path_bytes / seconds["median"]
    used = [turn.cpu_s for turn in turns if turn.cpu_s]
    return {
        "seconds": seconds,
        "path_bytes": path_bytes,
        "path_bytes_per_s": rate,
        "up_bytes": turns[-1].up_bytes,
        "coordinator_out_bytes": turns[-1].coordinator_out_bytes,
        "cpu_s": {part: statistics.mean(each[part] for each in used) for part in (used[0] if used else ())},
        "peak_bytes": {part: max(turn.peak_bytes[part] for turn in turns) for part in turns[0].peak_bytes},
        **{f"{name}_bytes_per_s": limit for name, limit in limits.items()},
        **{f"of_{name}": rate / limit for name, limit in limits.items()},
    }


def against(peer: Peer, turns: list[Said] | str, row: Row, ours_s: float) -> dict[str, Any]:
    """A peer's figures for a row; `ratio` is our median over its, `aim` what the ratio should be at most."""
    if isinstance(turns, str):
        return {"failed": turns}
    seconds = spread(each for turn in turns for each in periods(turn.at))
    peak = max(turn.server_peak_bytes for turn in turns)
    ratio = {"ratio": ours_s / seconds["median"], "aim": peer.aims.get((row.workers, row.parameters))}
    return {"seconds": seconds, **ratio, "server_peak_bytes": peak, "packages": peer.packages}


def spread(of: Iterable[float]) -> dict[str, float]:
    seconds = list(of)
    few = {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)}
    return {**few, "counted": len(seconds)}


def machine() -> dict[str, Any]:
    packages = ("fluffle", "torch", "numpy", "aio-pika", "uvloop", "msgpack")
    return {
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
        "python": platform.python_version(),
        "rabbitmq": server_version(),
        **{name: version(name) for name in packages},
    }


def options(words: list[str] | None) -> argparse.Namespace:
    asked = argparse.ArgumentParser(description="Measure what a round costs on this machine.")
    asked.add_argument(
        "--rows",
        default="default",
        help="WORKERSxPARAMETERS[@HOSTS][+secure[-LOST]], with commas: default,2x250M,64x1M@8,100x0.2M@4+secure-10; "
        "+secure adds up in secret, and LOST workers drop out of each round after they have dealt their shares",
    )
    asked.add_argument("--rounds", type=int, help=f"rounds that count, after {WARMUP} others; else by the row's size")
    asked.add_argument("--json", type=Path, default=FIGURES, metavar="FILE", help=f"all figures ({FIGURES})")
    asked.add_argument("--plot", type=Path, metavar="FILE", help="the picture (beside the figures, as .png)")
    asked.add_argument("--peers", type=Path, metavar="FOLDER", help="compare with others, installed below there")
    asked.add_argument("--tls", action="store_true", help="the same rounds by mutual TLS, too, in turn")
    asked.add_argument("--pip", type=shlex.split, default=[], metavar="WORDS", help="more words for pip, for peers")
    given = asked.parse_args(words)
    if given.rounds is not None and given.rounds < 1:
        asked.error("--rounds must be at least 1")
    try:
        given.rows = rows_of(given.rows, given.rounds)
    except ValueError as problem:
        asked.error(str(problem))
    given.plot = given.plot or given.json.with_suffix(".png")
    return given


def main(words: list[str] | None = None) -> int:
    given = options(words)
    out, done, failed = Console(highlight=False), list[dict[str, Any]](), dict[str, str]()
    if not out.is_terminal:
        out.width = WIDTH
    pythons: Pythons = {}
    for peer in PEERS if given.peers else ():
        out.print(f"installing {peer.name}, where it is missing …")
        try:
            pythons[peer.name] = install(peer, given.peers, given.pip)
        except (FluffleError, OSError) as problem:
            pythons[peer.name] = str(problem)
    for row in given.rows:
        out.print(f"measuring {row.label}: {row.all_rounds} rounds …")
        try:
            with tempfile.TemporaryDirectory(prefix="fluffle-bench-") as folder:
                done.append(measure(row, Path(folder), pythons, tls=given.tls))
        except Exception as problem:  # noqa: BLE001 - whatever it is, the other rows are not to be lost
            failed[row.label] = str(problem)
    tell(out, done, failed)
    about = machine()
    out.print(", ".join(f"{name} {value}" for name, value in about.items()), style="dim")
    for file in (given.json, given.plot):
        file.parent.mkdir(parents=True, exist_ok=True)
    given.json.write_text(json.dumps({"machine": about, "rows": done, "failed": failed}, indent=2) + "\n")
    shown.plot(done, given.plot)
    out.print(f"all figures: {given.json}, as a picture: {given.plot}")
    return 1 if failed else 0


def tell(out: Console, done: list[dict[str, Any]], failed: dict[str, str]) -> None:
    """The table, and why what is missing is missing; a peer that failed leaves our figures as they are."""
    if done:
        out.print(shown.table(done))
    missing = {
        f"{row['label']}, {name}": peer["failed"]
        for row in done
        for name, peer in row.get("peers", {}).items()
        if "failed" in peer
    }
    for what, why in (failed | missing).items():
        out.print(f"{what} failed: {why}", markup=False, style="red")


if __name__ == "__main__":
    sys.exit(main())
