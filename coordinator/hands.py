"""The threads that add and average: `aggregation.Spread`, for as many cores as there are.

Knows threads, and that a generator may be asked by one at a time. Does not know what the work is.
"""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import TypeVar

SEATS = max(1, min(4, os.cpu_count() or 1))
"""More would only wait for memory."""
_Item = TypeVar("_Item")
_Made = TypeVar("_Made")


class Hands:
    """As many threads as there are seats, one of which is the caller's own."""

    def __init__(self) -> None:
        self._others = ThreadPoolExecutor(max(1, SEATS - 1), thread_name_prefix="hand")

    def spread(self, work: Callable[[_Item, int], _Made], items: Iterable[_Item]) -> list[_Made]:
        """See `aggregation.Spread`."""
        drawn, made = enumerate(items), dict[int, _Made]()
        turn, failed = Lock(), list[BaseException]()

        def help_out(seat: int) -> None:
            try:
                while not failed:
                    with turn:
                        found = next(drawn, None)
                    if found is None:
                        return
                    made[found[0]] = work(found[1], seat)
            except BaseException as problem:  # noqa: BLE001 - it is raised where the work was asked for
                failed.append(problem)

        helping = [self._others.submit(help_out, seat) for seat in range(1, SEATS)]
        help_out(0)
        for other in helping:
            if not other.cancel():
                other.result()
        if failed:
            raise failed[0]
        return [made[place] for place in range(len(made))]

    def rest(self) -> None:
        """End the threads, when their work is done."""
        self._others.shutdown()
