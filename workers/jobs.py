"""A task on its way from a queue to the training, and which tasks are the same.

Knows a record. Does not know when anything happens to it (`service.py`).
"""

import asyncio
from dataclasses import dataclass

from broker.link import Delivery
from broker.messages import Task
from workers.spool import Landing


@dataclass(slots=True, eq=False)
class Job:
    """A task whose parts are landing, or have landed.

    Attributes:
        header: acknowledged when the task is claimed, or its parts are waited for no more.
        landing: where the parts land.
        due_at: when it is refused if it is not done.
        work: the doing of it, once all parts are here; other runs' tasks may have their turn before.
        begun: its turn has come.
    """

    task: Task
    header: Delivery
    landing: Landing
    due_at: float
    work: asyncio.Task[None] | None = None
    begun: bool = False


def is_same(task: Task, known: Task) -> bool:
    """Whether a task that has come is one that we have: of the same try, with the same weights or their change."""
    one, other = (each.payload.id.removesuffix("/change") for each in (task, known))
    return task.of == known.of and one == other
