"""Many workers in one process: one link, one training process, one folder, and each worker as if it were alone.

Knows how they are named, when they begin and what happens when one of them ends. Does not know what a worker does.
"""

import asyncio
import logging
from collections.abc import Sequence

from broker.errors import FluffleError
from workers.service import Worker
from workers.work import LEASE_S

log = logging.getLogger(__name__)

WORKERS_MAX = 10_000
"""Most workers of one process."""
HELLOS_PER_S = 60.0
"""Most signs of life that one process gives in a second, however many workers it has."""


def named(name: str, source: str, many: int) -> tuple[list[str], list[str]]:
    """Names, NAME-1 to NAME-N, and sources, in which `{index}` is the number and `{count}` how many there are."""
    numbers = range(1, many + 1)
    names = [f"{name}-{index}" for index in numbers]
    return names, [source.replace("{index}", str(index)).replace("{count}", str(many)) for index in numbers]


def lease_s(many: int) -> float:
    """How long each one's sign of life counts; three are given in that time."""
    return max(LEASE_S, 3 * many / HELLOS_PER_S)


async def serve(workers: Sequence[Worker], stop: asyncio.Event) -> None:
    """Let all of them work until `stop` is set. One that fails ends alone, and says why in the log.

    Raises:
        FluffleError, OSError: all have failed; the reason of the first that did.
    """
    if len(workers) > 1:
        log.info("%d workers begin, %s to %s", len(workers), workers[0].who.name, workers[-1].who.name)
    failures: list[Exception] = []

    async def one(worker: Worker) -> None:
        try:
            await worker.serve(stop)
        except (FluffleError, OSError) as problem:  # the second: its disk
            failures.append(problem)
            if len(workers) > 1:
                log.warning("%s has ended: %s", worker.who.name, problem)

    async with asyncio.TaskGroup() as group:
        for worker in workers:
            group.create_task(one(worker))
    if len(failures) == len(workers):
        raise failures[0]
    if len(workers) > 1:
        log.info("%d workers have left", len(workers) - len(failures))
