"""What workers make of versions: evaluators as each version comes, and everyone who is asked of the last one.

Knows which scores become lines of the history, and how many. Does not know who is sent a version, nor the scores that
a cohort's workers send in a round, which are in that round's line.
"""

import logging
import time
from collections.abc import Iterable
from typing import Any

from coordinator import history
from coordinator.history import Metrics
from coordinator.roster import WORKERS_MAX
from coordinator.store import Store

log = logging.getLogger(__name__)

SCORES_BYTES_MAX = 256 * 1024
"""So much of the history scores of one version may take that come from workers whom the plan does not name."""


class Scores:
    """Of one run.

    Attributes:
        final: worker → its score of the last version, for everyone who was asked for one; None until it comes.
    """

    def __init__(self, store: Store) -> None:
        self.final: dict[str, Metrics | None] = {}
        self._store = store
        self._judged: dict[str, int] = {}  # evaluator → the last version of which its score was noted
        self._bytes = 0  # what scores have taken since the present version was made

    def made(self) -> None:
        """There is another version."""
        self._bytes = 0

    def take(self, worker: str, version: int, metrics: Metrics) -> None:
        """Note an evaluator's score of a version, once; of evaluators there may be many, who come and go."""
        if not metrics or self._judged.get(worker, -1) >= version:
            return
        line = history.score_line(version, worker, metrics, at=time.time())
        self._bytes += history.size_of(line)
        if self._bytes > SCORES_BYTES_MAX and worker not in self._store.plan.workers:
            log.warning("the score of %s for version %d is left out: there are too many", worker, version)
            return
        self._judged[worker] = version
        let_oldest_go(self._judged, WORKERS_MAX)
        self._store.note(line)

    def note_final(self, version: int, evaluators: Iterable[str], *, seconds: float) -> None:
        """Note what came of the last version: a line for each evaluator, and one for all others together."""
        told, judges = {worker: metrics for worker, metrics in self.final.items() if metrics}, [*evaluators]
        for worker in filter(told.get, judges):
            self._store.note(history.score_line(version, worker, told[worker], at=time.time()))
        scored = {worker: metrics for worker, metrics in told.items() if worker not in judges}
        self._store.note(history.final_line(version, scored, seconds=seconds, at=time.time()))


def let_oldest_go(known: dict[Any, Any], most: int) -> None:
    """Of names that come and go there may be more than are here, and of versions more than anybody asks for."""
    while len(known) > most:
        del known[next(iter(known))]
