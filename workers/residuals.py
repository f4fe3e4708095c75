"""What lossy formats have left out of a worker's updates: kept in files until it is made up for (error feedback).

Knows files, and when what is left out becomes what is owed. Does not know formats, nor what is in the files.

An update takes what is owed from one file and leaves what it could not tell in another. Once it has been accepted,
the second takes the place of the first; otherwise it is forgotten, for then nothing was told. A crash between the
verdict and that step makes the worker tell a little twice; it never tells less.
"""

from dataclasses import dataclass
from pathlib import Path

from broker.messages import Attempt

RUNS_MAX = 2
"""For so many runs a worker keeps what it owes, the newest ones."""
LEFT_MAX = 32
"""So many updates may have left something: more than are ever on their way, and none is forgotten that may count."""
OWED, LEFT = ".residual", ".left"


@dataclass(frozen=True, slots=True)
class Residual:
    """Where one update finds what is owed, if the file is there, and where it leaves what is owed then."""

    owed: Path
    left: Path


class Residuals:
    """One worker's, in a folder that may hold those of others, too; they outlive the process."""

    def __init__(self, folder: Path, worker: str) -> None:
        self._folder = folder
        self._worker = worker
        self._begun: dict[Path, None] = {}  # by this process; what one before it left is removed when that starts

    def of(self, of: Attempt) -> Residual:
        """The files for an update; one update of a run at a time."""
        stem = self._folder / f"{self._worker}.{of.run}"
        return Residual(stem.with_name(stem.name + OWED), stem.with_name(stem.name + LEFT))

    def begin(self, of: Attempt) -> Residual:
        """The files for an update that is to be made now; what others that came to nothing left must not pile up."""
        residual = self.of(of)
        self._begun.pop(residual.left, None)
        self._begun[residual.left] = None
        if len(self._begun) > LEFT_MAX:
            oldest = next(iter(self._begun))
            del self._begun[oldest]
            oldest.unlink(missing_ok=True)
        return residual

    def accept(self, of: Attempt) -> None:
        """The update counts: what it left out is owed now."""
        residual = self.of(of)
        if residual.left.exists():
            # among the files of all who are hosted here, and only if there are more now than before
            mine = () if residual.owed.exists() else self._folder.glob(f"{self._worker}.*{OWED}")
            residual.left.replace(residual.owed)
            for old in sorted(mine, key=lambda file: file.stat().st_mtime)[:-RUNS_MAX]:
                old.unlink()

    def forget(self, of: Attempt) -> None:
        """The update does not count: what was owed before it still is."""
        self.of(of).left.unlink(missing_ok=True)


def remove_left(folder: Path, but: set[tuple[str, str]]) -> None:
    """Forget what updates of an earlier process have left, but those of some workers to some runs."""
    kept = {f"{worker}.{run}{LEFT}" for worker, run in but}
    for file in folder.glob(f"*{LEFT}"):
        if file.name not in kept:
            file.unlink()
