"""What formats leave out: owed once the update counts, forgotten when it does not, kept for a few runs."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from broker.messages import Attempt
from workers.residuals import LEFT_MAX, RUNS_MAX, Residuals


def trained(residuals: Residuals, of: Attempt, what: str) -> None:
    """An update has left something out."""
    residuals.of(of).left.write_text(what)


def owed(residuals: Residuals, of: Attempt) -> str:
    file = residuals.of(of).owed
    return file.read_text() if file.exists() else "nothing"


def test_what_an_accepted_update_left_out_is_owed_and_nothing_else(tmp_path: Path) -> None:
    mine = Residuals(tmp_path, "ann")
    first, again, second = Attempt("run", 1, 1), Attempt("run", 1, 2), Attempt("run", 2, 1)
    trained(mine, first, "first")
    mine.forget(first)
    assert owed(mine, first) == "nothing"
    trained(mine, again, "again")
    mine.accept(again)
    mine.accept(again)  # said twice
    mine.forget(again)
    assert owed(mine, second) == "again"
    trained(mine, second, "second")
    assert owed(mine, second) == "again"
    assert owed(Residuals(tmp_path, "an"), second) == "nothing"
    assert owed(mine, Attempt("other", 2, 1)) == "nothing"


def test_what_updates_that_came_to_nothing_have_left_does_not_fill_the_disk(tmp_path: Path) -> None:
    """A policy lets them not leave, or a coordinator ends each of its runs just before: nobody forgets these."""
    mine, other = Residuals(tmp_path, "ann"), Residuals(tmp_path, "ann-2")
    trained(other, Attempt("run", 1, 1), "x")
    for number in range(3 * LEFT_MAX):
        mine.begin(Attempt(f"run-{number}", 1, 1)).left.write_text("x")
    mine.accept(Attempt(f"run-{3 * LEFT_MAX - 8}", 1, 1))
    assert owed(mine, Attempt(f"run-{3 * LEFT_MAX - 8}", 2, 1)) == "x"
    assert len([*tmp_path.glob("ann.*")]) == LEFT_MAX
    assert other.of(Attempt("run", 1, 1)).left.exists()


def test_what_is_owed_to_old_runs_is_forgotten(tmp_path: Path) -> None:
    mine, hers = Residuals(tmp_path, "ann"), Residuals(tmp_path, "ann-2")
    for number in range(5):
        for each in (mine, hers):
            of = Attempt(f"run-{number}", 1, 1)
            trained(each, of, "x")
            os.utime(each.of(of).left, (number, number))
            each.accept(of)
    assert len(list(tmp_path.iterdir())) == 2 * RUNS_MAX
    assert [owed(mine, Attempt(f"run-{number}", 2, 1)) for number in (2, 3, 4)] == ["nothing", "x", "x"]


def test_whoever_is_hosted_with_many_looks_through_all_their_files_once_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks, found = 0, Path.glob

    def glob(folder: Path, pattern: str) -> Iterator[Path]:
        nonlocal looks
        looks += 1
        return found(folder, pattern)

    monkeypatch.setattr(Path, "glob", glob)
    mine = Residuals(tmp_path, "ann")
    for number in range(1, 10):
        of = Attempt("run", number, 1)
        trained(mine, of, "x")
        mine.accept(of)
    assert looks == 1
