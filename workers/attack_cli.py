"""`fluffle attack`: what a server could read off updates of handwritten digits, as a table and a picture.

Knows which scenes are shown and how. Does not know how rows are read off: `attack.py` does.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from broker.errors import UsageError

WORK = 600  # rows that a line of the table is worth
ACROSS = 9  # scenes beside each other in the picture
Shown = tuple[Any, Any]
"""A scene and what was found, of `attack.py`, which loads torch."""


def attack(
    seed: Annotated[int, typer.Option(help="Of rows, models and noise.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder for attack.png and attack.json.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the table as JSON.")] = False,
) -> None:
    """Read digits off updates, as a curious or a malicious server could: what averages, masks and noise are worth."""
    if out is not None:  # found out now, and not when minutes of work are done
        out.mkdir(parents=True, exist_ok=True)
        (out / "attack.json").touch()
        _figure(1.0, 1.0)
    x, y = _extra("sklearn.datasets", "load_digits", "`fluffle attack`")(return_X_y=True)
    x /= 16.0  # pixels
    from workers.attack import Scene, classroom  # noqa: PLC0415 - torch takes seconds to load: not for --help
    from workers.learners.toy import ROWS  # noqa: PLC0415

    shown = list[Shown]()
    for scene in (Scene(what=what, **facts) for what, facts in _lines()):
        trials = max(5, min(100, WORK // (scene.workers * scene.rows)))
        shown.append((scene, scene.play(x, y, trials=trials, seed=seed)))
    told = [asdict(scene) | asdict(found) for scene, found in shown]
    for each in told:
        del each["shown"]  # the pictures
    if as_json:
        sys.stdout.write(json.dumps(told) + "\n")
    else:
        _show(shown)
        for name, said in classroom({name: ROWS[name] for name in ("bob", "alice")}):
            Console().print(f"The classroom, off {name}'s delta: {said}", highlight=False)
    if out is not None:
        (out / "attack.json").write_text(json.dumps(told, indent=1) + "\n")
        _picture(shown, out / "attack.png")


def _extra(module: str, name: str, what: str) -> Any:
    try:
        return getattr(import_module(module), name)
    except ImportError:
        raise UsageError(f"{what} needs scikit-learn and matplotlib: pip install 'fluffle[demo]'.") from None


def _lines() -> Iterator[tuple[str, dict[str, Any]]]:
    for kind in ("linear", "mlp"):
        one, ten = {"model": kind, "workers": 1, "rows": 1}, {"model": kind, "workers": 10, "rows": 1}
        for n in (1, 8, 64):
            yield "one update", {**one, "rows": n}
        yield "one update, 20 steps", {**one, "steps": 20}
        yield "one update, as int8", {**one, "format": "int8"}
        for m, n in ((2, 1), (2, 8), (2, 64), (10, 1), (10, 8), (10, 64), (50, 1), (50, 8)):
            yield "mean", {"model": kind, "workers": m, "rows": n}
        yield "one masked update", {**one, "defence": "secure"}
        yield "one update, noise z = 0.01", {**one, "defence": "dp", "z": 0.01}
        yield "one update, noise z = 1", {**one, "defence": "dp"}
        yield "mean, noise z = 1", {**ten, "defence": "dp"}
    imprint = {**ten, "rows": 8, "imprint": True}
    yield "mean, imprint", imprint
    yield "mean, imprint, noise z = 1", {**imprint, "defence": "dp"}


def _show(shown: list[Shown]) -> None:
    console = Console()
    table = Table(
        "model", "the server sees", "workers", "rows each", "clear", "rounds with one", "best, dB", "claimed"
    )
    for scene, each in shown:
        table.add_row(
            scene.model, scene.what, str(scene.workers), str(scene.rows), f"{each.clear / each.rows:.1%}",
            f"{each.rounds:.0%}", f"{each.median_db:.0f} (top {each.top_db:.0f})",
            f"{each.right} right of {each.claimed}" if not scene.imprint else "",
        )  # fmt: skip
    console.print(table)
    console.print(
        "Clear: rows that come back over 40 dB, where nobody sees a difference; a picture of chance has 5 to 8 dB. "
        "Best: of a round's rows, the median and the top over all rounds. Who does not know the rows claims what two "
        "neurons agree on. In a secure round the server sees masked updates, and the plain mean of all.",
        highlight=False,
    )


def _figure(width: float, height: float) -> Any:
    figure = _extra("matplotlib.figure", "Figure", "the picture")
    return figure(figsize=(width, height), layout="constrained")


def _picture(shown: list[Shown], path: Path) -> None:
    bands = -(-len(shown) // ACROSS)
    figure = _figure(1.25 * ACROSS, 3.1 * bands)
    for at, (scene, each) in enumerate(shown):
        band, column = divmod(at, ACROSS)
        for row, pixels in enumerate(each.shown):
            axes = figure.add_subplot(2 * bands, ACROSS, (2 * band + row) * ACROSS + column + 1)
            axes.imshow(pixels.clip(0, 1).reshape(8, 8), cmap="gray", vmin=0, vmax=1)
            axes.set_axis_off()
            said = f"{scene.model}, {scene.workers} × {scene.rows}\n" + scene.what.replace(", ", ",\n")
            axes.set_title(f"read: {each.median_db:.0f} dB" if row else said, fontsize=7)
    figure.suptitle("a row, and below it what a server reads of it: model, workers × rows, what it sees", fontsize=9)
    figure.savefig(path, dpi=140)
