"""The exchanges, queues and bindings of a federation, as data.

Does not know what travels through them, nor how they are declared: that is the link's work.

Queues belong to workers, and two to each run; every name here appears in PROTOCOL.md. All queues are classic,
durable and limited, and carry no argument that RabbitMQ 3.10, 4.0 or 4.3 refuses. Changing an argument of a queue
that exists is refused by RabbitMQ, so these are part of the protocol's version.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

DAY_MS = 24 * 3600 * 1000
GIB = 1 << 30

DOWN = "fluffle.down"  # coordinator → workers: tasks and their parts, routing key = worker
CONTROL = "fluffle.control"  # coordinator → workers: answers and closings, routing key = worker
UP = "fluffle.up"  # workers → coordinators: hello.W, inbox.RUN.W
DEAD = "fluffle.dead"  # what was refused, with the reason in a header

OPERATOR = "operator"
"""The broker's user that says goodbye for a worker which has been revoked."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """An exchange: durable, of the given kind; `passing`: gone with the last queue that is bound to it."""

    name: str
    kind: str
    passing: bool = False


@dataclass(frozen=True, slots=True)
class Queue:
    """A durable classic queue with its limits."""

    name: str
    arguments: Mapping[str, int | str]


@dataclass(frozen=True, slots=True)
class Binding:
    """Messages of `exchange` whose routing key matches `key` go to `queue`."""

    exchange: str
    queue: str
    key: str


@dataclass(frozen=True, slots=True)
class Topology:
    """What must exist before messages flow; declared in this order."""

    exchanges: tuple[Exchange, ...] = ()
    queues: tuple[Queue, ...] = ()
    bindings: tuple[Binding, ...] = ()


def down_queue(worker: str) -> str:
    """Tasks and their parts for one worker."""
    return f"fluffle.down.{worker}"


def control_queue(worker: str) -> str:
    """Small messages for one worker; they never wait behind parts."""
    return f"fluffle.control.{worker}"


def upload_queue(worker: str) -> str:
    """Parts of one worker's updates; and the exchange that leads there and nowhere else."""
    return f"fluffle.upload.{worker}"


def hello_queue(run: str) -> str:
    """Signs of life from all workers, for one run's coordinator."""
    return f"fluffle.hello.{run}"


def inbox_queue(run: str) -> str:
    """Claims, scores, updates and refusals for one run's coordinator."""
    return f"fluffle.inbox.{run}"


def hello_key(worker: str) -> str:
    """Routing key on `UP` of a sign of life."""
    return f"hello.{worker}"


def inbox_key(run: str, worker: str) -> str:
    """Routing key on `UP` of a small message to one run's coordinator."""
    return f"inbox.{run}.{worker}"


def upload_key(worker: str) -> str:
    """Routing key, on the way to `upload_queue`, of a part of an update."""
    return f"upload.{worker}"


def _queue(name: str, *, overflow: str, **limits: int) -> Queue:
    arguments: dict[str, int | str] = {"x-queue-type": "classic", "x-overflow": overflow}
    arguments.update({"x-" + key.replace("_", "-"): value for key, value in limits.items()})
    return Queue(name, MappingProxyType(arguments))


FEDERATION = Topology(
    exchanges=(
        Exchange(DOWN, "direct"),
        Exchange(CONTROL, "direct"),
        Exchange(UP, "topic"),
        Exchange(DEAD, "fanout"),
    ),
    queues=(_queue(DEAD, overflow="drop-head", max_length=1000, message_ttl=7 * DAY_MS),),
    bindings=(Binding(DEAD, DEAD, ""),),
)


def of_worker(worker: str, *, invited: bool = False) -> Topology:
    """One worker's three queues, and the exchange of its uploads.

    The two that the coordinator publishes to drop their oldest when full: refusing there would refuse everyone's
    copy of a broadcast. The upload queue refuses instead, so that a worker can fill only its own; on an exchange that
    it shared with others' it could fill them, too, where RabbitMQ does not look at further keys in a header (3.10).

    Those of an `invited` worker, which may not declare them itself, stay until somebody deletes them. Their limits
    are tighter, in messages, too: tiny ones cost the broker much more than their bytes.
    """
    down, control, upload = down_queue(worker), control_queue(worker), upload_queue(worker)
    week = 7 * DAY_MS
    parts = {"max_length_bytes": 8 * GIB, "message_ttl": DAY_MS, "expires": week}
    small = {"max_length": 256, "message_ttl": DAY_MS, "expires": week}
    if invited:
        parts = {"max_length": 20_000, "max_length_bytes": 4 * GIB, "message_ttl": DAY_MS}
        small = {"max_length": 256, "max_length_bytes": GIB // 16, "message_ttl": DAY_MS}
    return Topology(
        exchanges=(Exchange(upload, "direct", passing=True),),
        queues=(
            _queue(down, overflow="drop-head", **parts),
            _queue(control, overflow="drop-head", **small),
            _queue(upload, overflow="reject-publish", **parts),
        ),
        bindings=(
            Binding(DOWN, down, worker),
            Binding(CONTROL, control, worker),
            Binding(upload, upload, upload_key(worker)),
        ),
    )


def of_run(run: str) -> Topology:
    """One run's two queues: hellos drop their oldest, everything else is refused when full and sent again."""
    hello, inbox = hello_queue(run), inbox_queue(run)
    week = 7 * DAY_MS
    return Topology(
        queues=(
            _queue(hello, overflow="drop-head", max_length=10_000, message_ttl=60_000, expires=week),
            _queue(inbox, overflow="reject-publish", max_length=100_000, max_length_bytes=GIB, expires=week),
        ),
        bindings=(Binding(UP, hello, hello_key("*")), Binding(UP, inbox, inbox_key(run, "*"))),
    )
