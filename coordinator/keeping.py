"""The sums of a long round, written down now and then for the coordinator after this one.

Knows when that is worth it, and whose sums they are. Does not know how they are added up (`desk.py`), nor the file
(`snapshot.py`).
"""

import asyncio
import logging
import time
from collections.abc import Callable

from broker.messages import Attempt
from coordinator import plan as plans
from coordinator.aggregation import Sums
from coordinator.opened import Open
from coordinator.snapshot import Snapshot, naming, recall, tally_of
from coordinator.store import Store

log = logging.getLogger(__name__)

KEEP_S = 10.0
"""A turn that has taken so long has its sums written down, and again after as long."""
KEEP_SHARE = 20  # of the time, at most one part in so many goes into that


class Keeping:
    """One run's.

    Args:
        store: the run's folder.
        sums: what is added up.
        adding: held by whoever adds.
    """

    def __init__(self, store: Store, sums: Sums, adding: asyncio.Lock) -> None:
        self._plan = store.plan
        self._sums = sums
        self._adding = adding
        self._snapshot = Snapshot(store.folder, store.claim)
        self._kept: tuple[Attempt, int] | None = None  # whose sums are written down, and of how many updates
        self._turn_at = 0.0

    def begin_turn(self) -> None:
        """A turn begins now."""
        self._turn_at = time.monotonic()

    def made(self, of: Attempt) -> None:
        """The version is safe that this attempt has made."""
        if self._kept and self._kept[0] == of:
            self.forget()

    async def keep(self, opened: Callable[[], Open | None]) -> None:
        """Write down what a long turn has added up, now and then, for ever."""
        pause_s = KEEP_S
        while True:
            await asyncio.sleep(pause_s)
            pause_s, began_at = KEEP_S, time.monotonic()
            async with self._adding:
                if (here := opened()) and began_at - self._turn_at >= KEEP_S:
                    await self._keep(here, opened)
                    pause_s = max(KEEP_S, KEEP_SHARE * (time.monotonic() - began_at))

    async def _keep(self, here: Open, opened: Callable[[], Open | None]) -> None:
        kept, round_ = (here.round.of, self._sums.updates), here.round
        if kept == self._kept or self._plan.rule != "mean":  # the workers keep what is only set aside
            return
        if self._plan.schedule == "cyclic":  # such a round begins again with its first turn
            return
        if not 0 < self._sums.updates == len(round_.counted):  # these are the sums of a turn that is over
            return
        names, tally = naming(round_, plans.digest(self._plan)), tally_of(round_, here.facts)

        def wanted() -> bool:
            return here is opened() and round_.outcome is None

        if await asyncio.to_thread(self._snapshot.write, names, tally, self._sums, wanted=wanted):
            self._kept = kept
            log.debug("%s: the sum of %d updates is written down", *kept)

    async def take_up(self, here: Open) -> None:
        """Go on with the sums that were written down for a round, if they were; nobody may be heard yet."""
        names = naming(here.round, plans.digest(self._plan))
        async with self._adding:
            tally = await asyncio.to_thread(self._snapshot.read, names, self._sums)
            if tally is None:
                return
            recall(tally, here.round, here.facts)
        self._kept = here.round.of, self._sums.updates
        log.info("%s: updates of %s are in the sum already", here.round.of, ", ".join(tally["counted"]))

    def forget(self) -> None:
        """What was written down is of no use any more."""
        self._snapshot.drop()
        self._kept = None
