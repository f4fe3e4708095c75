"""The figures of a measurement for people: one table, and one picture of how the cost grows.

Knows what a measured row holds and which figures are worth a line. Does not know how they were measured.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

from rich.table import Table

Measured = dict[str, Any]
"""A row as `round.measure` makes it and the JSON holds it."""

CPU_OF = {"coordinator": "coordinator", "workers": "workers, all", "children": "training, all", "broker": "broker"}
PEAK_OF = {
    "coordinator": "coordinator",
    "workers": "largest worker",
    "children": "largest training process",
    "broker": "broker",
}
PLOTTED_MIN = 1_000
"""Fewer parameters are a toy, whose cost does not grow with them."""
INK, PEERS_INK = "#222222", "#c8553d"
COLOURS = ("#1b6ca8", "#3a7d44", "#7b4f9e", "#b8860b", "#0f8b8d")
MARKS = ("s", "D", "^", "v")


def table(rows: list[Measured]) -> Table:
    """A column for each row that was measured, because there are more figures than rows."""
    shown = Table("", title="a round of Fluffle")
    for row in rows:
        shown.add_column(row["label"], justify="right")
    for what, figures in _lines(rows):
        shown.add_row(what, *figures)
    return shown


def _lines(rows: list[Measured]) -> Iterator[tuple[str, Iterable[str]]]:
    def each(figure: Callable[[Measured], str]) -> list[str]:
        return list(map(figure, rows))

    yield "worker processes", each(lambda r: str(r["hosts"]) + (" hosts" if r["hosts"] < r["workers"] else ""))
    yield "rounds counted", each(lambda r: str(r["seconds"]["counted"]))
    if any(row["lost"] for row in rows):
        yield "workers lost a round", each(lambda r: str(r["lost"]))
    yield "seconds a round, median", each(lambda r: _s(r["seconds"]))
    yield "  min to max", each(lambda r: _span(r["seconds"]))
    yield "MB/s, down to all and up", each(lambda r: _mb(r["path_bytes_per_s"]))
    yield "bare pump, MB/s", each(lambda r: _mb(r["pump_bytes_per_s"]))
    yield "  reached of it", each(lambda r: f"{100 * r['of_pump']:.1f} %")
    yield "memcpy, MB/s", each(lambda r: _mb(r["memcpy_bytes_per_s"]))
    yield "  reached of that", each(lambda r: f"{100 * r['of_memcpy']:.1f} %")
    for part, name in CPU_OF.items():
        yield f"CPU s a round, {name}", [_cpu(row["cpu_s"].get(part)) for row in rows]
    for part, name in PEAK_OF.items():
        yield f"peak MB, {name}", [_mb(row["peak_bytes"][part]) for row in rows]
    yield "MB out of the coordinator", each(lambda r: f"{r['coordinator_out_bytes'] / 1e6:.3f}")
    yield "MB up, from all workers", each(lambda r: f"{r['up_bytes'] / 1e6:.3f}")
    if any("tls" in row for row in rows):
        by = [row.get("tls", {}) for row in rows]
        yield "by mutual TLS, s", [_s(it["seconds"]) if it else "" for it in by]
        yield "  min to max", [_span(it["seconds"]) if it else "" for it in by]
        yield "  times plain", [f"{it['ratio']:.2f}" if it else "" for it in by]
        for part, name in CPU_OF.items():
            yield f"  CPU s, {name}", [_cpu(it["cpu_s"].get(part)) if it else "" for it in by]
    for name in _peers(rows):
        yield from _beside(name, [row.get("peers", {}).get(name, {}) for row in rows])


def _beside(name: str, theirs: list[dict[str, Any]]) -> Iterator[tuple[str, Iterable[str]]]:
    """A peer's lines; {} where it was not measured, and the reason stands elsewhere where it failed."""

    def each(figure: Callable[[dict[str, Any]], str]) -> list[str]:
        return ["failed" if "failed" in it else figure(it) if it else "" for it in theirs]

    yield f"{name}, s", each(lambda it: _s(it["seconds"]))
    yield "  min to max", each(lambda it: _span(it["seconds"]))
    yield "  ours / theirs", each(lambda it: f"{it['ratio']:.3f}" + (f" (aim {it['aim']})" if it["aim"] else ""))
    yield "  peak MB, its server", each(lambda it: _mb(it["server_peak_bytes"]))


def _s(seconds: dict[str, float]) -> str:
    return f"{seconds['median']:.3f}"


def _cpu(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:.3f}"


def _span(seconds: dict[str, float]) -> str:
    return f"{seconds['min']:.3f} to {seconds['max']:.3f}"


def _mb(count: float) -> str:
    return f"{count / 1e6:.3f}" if count < 1e6 else f"{count / 1e6:,.0f}"


def plot(rows: list[Measured], file: Path) -> None:
    """How seconds a round grow with workers, and with parameters where most rows have as many workers: a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.8), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    real = [row for row in rows if row["parameters"] >= PLOTTED_MIN]
    most = Counter(row["workers"] for row in real).most_common(1)
    alike = [row for row in real if most and row["workers"] == most[0][0]]
    for (parameters, line), colour in zip(_lines_by(real, "parameters"), cycle(COLOURS), strict=False):
        _line(left, line, x="workers", colour=colour, name=f"{_short(parameters)} parameters")
    for workers, line in _lines_by(alike, "workers"):  # one, or none
        _line(right, line, x="parameters", colour=INK, name=f"{workers} workers")
    for name, mark in zip(_peers(alike), MARKS, strict=False):
        met = [row for row in alike if "seconds" in row.get("peers", {}).get(name, {})]
        at, medians = [row["parameters"] for row in met], [row["peers"][name]["seconds"]["median"] for row in met]
        right.plot(at, medians, mark, color=PEERS_INK, mfc="none", label=name)
    for axes, x, of in ((left, "workers", real), (right, "parameters", alike)):
        _dress(axes, sorted({row[x] for row in of}))
    left.set(xlabel="workers", ylabel="seconds a round")
    right.set(xlabel="float32 parameters")
    figure.suptitle("What a round costs, without training", color=INK)
    figure.savefig(file, format="png")


def _lines_by(rows: list[Measured], what: str) -> list[tuple[int, list[Measured]]]:
    """The rows that are alike in it, each time in the order of their size."""
    values = sorted({row[what] for row in rows})
    return [(v, sorted((r for r in rows if r[what] == v), key=lambda r: float(r["path_bytes"]))) for v in values]


def _line(axes: Any, rows: list[Measured], *, x: str, colour: str, name: str) -> None:
    """Medians, with what lies between min and max, and the time that the pump takes for the same bytes."""
    at = [row[x] for row in rows]
    seconds = [row["seconds"] for row in rows]
    axes.vlines(at, [s["min"] for s in seconds], [s["max"] for s in seconds], color=colour, alpha=0.4)
    axes.plot(at, [s["median"] for s in seconds], "o-", color=colour, label=f"Fluffle, {name}")
    pumped = [row["path_bytes"] / row["pump_bytes_per_s"] for row in rows]
    axes.plot(at, pumped, "_--", color=colour, alpha=0.6, linewidth=1)


def _dress(axes: Any, at: list[int]) -> None:
    from matplotlib.ticker import LogFormatter

    axes.set(xscale="log", yscale="log")
    axes.set_xticks(at, [_short(x) for x in at])
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(LogFormatter())  # speaks up only where there is hardly a decade
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.1, y=0.1)
    if at:
        axes.plot([], [], "_--", color=INK, alpha=0.6, linewidth=1, label="bare pump, the same bytes")
        axes.legend(frameon=False, fontsize=8, labelcolor=INK)


def _short(count: int) -> str:
    """As rows are written: 0.1 M, 10 M."""
    return f"{count / 1e6:g} M" if count >= 100_000 else f"{count:,}"


def _peers(rows: list[Measured]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row.get("peers", ())))
