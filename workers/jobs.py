"""Tasks on their way from a queue to the training: whose parts are landing, and what is claimed and not trained yet.

Knows records, and which tasks are the same. Does not know when anything happens to them (`service.py`).
"""

import asyncio
from dataclasses import dataclass

from broker.link import Delivery
from broker.messages import Task
from workers.spool import Landing
from workers.work import Done


@dataclass(slots=True)
class Arrival:
    """A task whose parts are landing; `header` is acknowledged when it is claimed."""

    task: Task
    header: Delivery
    landing: Landing
    due_at: float


@dataclass(slots=True, eq=False)
class Job:
    """A claimed task that is not trained yet."""

    task: Task
    landing: Landing | None  # until it is trained; others of this process may need it meanwhile
    due_at: float
    work: asyncio.Task[Done | None] | None = None


def is_same(task: Task, known: Task) -> bool:
    """Whether a task that has come is one that we have: of the same try, and with the same weights or their change.

    Of one that an earlier process has done we know what its update was called, which begins with the weights' name.
    """
    weights = task.payload.id.removesuffix("/change")
    return task.of == known.of and f"{known.payload.id}/".startswith(f"{weights}/")
