"""A run as a picture: loss and accuracy of every version.

Knows matplotlib, where it is installed. Does not know how a run is made.
"""

from pathlib import Path
from typing import Any

from coordinator import history
from coordinator.store import Store

FILE = "report.png"


def draw(store: Store, compared: dict[str, Any]) -> Path | None:
    """Draw the run's curve into its folder; None where matplotlib is not installed.

    Args:
        store: the run.
        compared: `alone`, `federated` and `pooled`, as `fluffle demo` prints them; drawn as levels.
    """
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 (an extra: everything else works without)
    except ImportError:
        return None
    points = history.curve(store.history())
    figure = Figure(figsize=(9, 4), layout="constrained")
    for metric, axes in zip(("accuracy", "loss"), figure.subplots(1, 2), strict=True):
        _line(axes, "mean over the workers", [(p.version, p.scored.get(metric)) for p in points])
        for who in sorted({who for p in points for who in p.held_out}):
            _line(axes, who, [(p.version, p.held_out.get(who, {}).get(metric)) for p in points])
        alone, pooled = compared["alone"].get(f"mean_{metric}"), compared["pooled"].get(metric)
        for label, level, style in (("a worker alone", alone, "--"), ("all data in one place", pooled, ":")):
            if level is not None:
                axes.axhline(level, linestyle=style, color="grey", label=label)
        axes.set_xlabel("version")
        axes.set_title(metric)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    path = store.folder / FILE
    figure.savefig(path, dpi=120)
    return path


def _line(axes: Any, label: str, values: list[tuple[int, float | None]]) -> None:
    known = [(version, value) for version, value in values if value is not None]
    if known:
        axes.plot(*zip(*known, strict=True), marker=".", label=label)
