"""`python faulty.py FOLDER MODULE:CLASS.METHOD,… COMMAND…`: a `fluffle` command that is killed where it is told.

At its first start the process dies (SIGKILL) when the first method is called for the first time, at the next start at
the second one, and so on: which have struck is told by files in FOLDER. Does not know what it kills.
"""

import importlib
import os
import signal
import sys
from pathlib import Path
from typing import Any


def strike(folder: Path, point: str) -> None:
    module, _, place = point.partition(":")
    owner, _, method = place.partition(".")
    struck = getattr(importlib.import_module(module), owner)

    def die(*_: Any, **__: Any) -> None:
        (folder / point).touch()
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(struck, method, die)


if __name__ == "__main__":
    folder, points = Path(sys.argv[1]), sys.argv[2].split(",")
    left = [point for point in points if not (folder / point).exists()]
    if left:
        strike(folder, left[0])
    sys.argv = ["fluffle", *sys.argv[3:]]
    from fluffle import main

    main()
