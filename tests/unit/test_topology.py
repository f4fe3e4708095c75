"""The exchanges and queues: as PROTOCOL.md has them, limited, and with nothing that some RabbitMQ refuses."""

import re
from importlib.resources import files

import pytest

from broker import fields, messages, topology
from broker.topology import Queue, Topology

PAGE = (files(messages.__package__) / "PROTOCOL.md").read_text("utf-8")
ALL = (topology.FEDERATION, topology.of_worker("WORKER"), topology.of_run("RUN"))
QUEUES = [queue for part in ALL for queue in part.queues]
INVITED = topology.of_worker("WORKER", invited=True)
EXCHANGES = [exchange for part in ALL for exchange in part.exchanges]
# all that RabbitMQ 3.10, 4.0 and 4.3 take for a classic queue, and nothing that only some do: x-queue-version=1,
# x-queue-mode, x-delivery-limit, x-consumer-timeout and mirroring are each refused by one of them
TAKEN_BY_ALL = {"x-queue-type", "x-overflow", "x-max-length", "x-max-length-bytes", "x-message-ttl", "x-expires"}


def rows(head: str) -> list[list[str]]:
    """The rows of the page's table whose first column has this head."""
    table = re.search(rf"^\| {head} \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
    assert table
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in table[1].splitlines()]


def test_the_page_lists_the_exchanges_there_are() -> None:
    kinds = [(f"`{e.name}`", e.kind + ", auto-delete" * e.passing) for e in EXCHANGES]
    assert [(name, kind) for name, kind, _ in rows("exchange")] == kinds


def test_the_page_lists_the_queues_with_their_bindings_and_arguments() -> None:
    bound = {binding.queue: binding for part in ALL for binding in part.bindings}

    def row(queue: Queue) -> list[str]:
        arguments = " ".join(f"{key}={value}" for key, value in queue.arguments.items())
        binding = bound[queue.name]
        return [
            f"`{queue.name}`",
            f"`{binding.exchange}`",
            f"`{binding.key}`" if binding.key else "",
            f"`{arguments}`",
        ]

    assert [found[:4] for found in rows("queue")] == [row(queue) for queue in QUEUES]
    assert all(found[4] for found in rows("queue")), "say who publishes and who consumes"
    invited = [[row(queue)[0], row(queue)[3]] for queue in INVITED.queues]
    assert rows("queue of an invited worker") == invited


def test_the_page_has_the_routing_keys() -> None:
    for key in (topology.hello_key("WORKER"), topology.inbox_key("RUN", "WORKER"), topology.upload_key("WORKER")):
        assert f"`{key}`" in PAGE


def test_an_invited_workers_queues_stay_have_the_same_bindings_and_tighter_limits() -> None:
    usual = topology.of_worker("WORKER")
    assert INVITED.bindings == usual.bindings
    for queue, other in zip(INVITED.queues, usual.queues, strict=True):
        assert (queue.name, queue.arguments["x-overflow"]) == (other.name, other.arguments["x-overflow"])
        assert "x-expires" not in queue.arguments
        assert {"x-max-length", "x-max-length-bytes"} <= queue.arguments.keys()
        limits = queue.arguments.keys() & other.arguments.keys() - {"x-queue-type", "x-overflow"}
        assert all(int(queue.arguments[limit]) <= int(other.arguments[limit]) for limit in limits)


@pytest.mark.parametrize("queue", [*QUEUES, *INVITED.queues], ids=lambda queue: queue.name)
def test_every_queue_has_a_type_a_limit_and_no_argument_that_some_rabbitmq_refuses(queue: Queue) -> None:
    arguments = queue.arguments
    assert arguments.keys() <= TAKEN_BY_ALL
    assert arguments["x-queue-type"] == "classic"
    assert arguments["x-overflow"] in ("drop-head", "reject-publish")
    assert {"x-max-length", "x-max-length-bytes"} & arguments.keys()
    numbers = [value for value in arguments.values() if not isinstance(value, str)]
    assert all(type(value) is int and value > 0 for value in numbers)
    assert int(arguments.get("x-expires", 1)) < 2**32  # RabbitMQ's timers end there


def test_what_the_coordinator_broadcasts_to_never_refuses_a_copy() -> None:
    overflow = {queue.name: queue.arguments["x-overflow"] for queue in QUEUES}
    assert overflow[topology.down_queue("WORKER")] == overflow[topology.control_queue("WORKER")] == "drop-head"
    assert overflow[topology.upload_queue("WORKER")] == overflow[topology.inbox_queue("RUN")] == "reject-publish"


def test_every_binding_joins_an_exchange_and_a_queue_that_exist() -> None:
    for part in ALL:
        for binding in part.bindings:
            assert binding.exchange in {exchange.name for exchange in EXCHANGES}
            assert binding.queue in {queue.name for queue in part.queues}


def matches(key: str, pattern: str) -> bool:
    """Whether a topic exchange delivers `key` to a binding with `pattern`."""
    return re.fullmatch(re.escape(pattern).replace(r"\*", "[^.]*"), key) is not None


def reached(key: str, *parts: Topology, exchange: str = topology.UP) -> list[str]:
    bindings = [binding for part in parts for binding in part.bindings if binding.exchange == exchange]
    return [binding.queue for binding in bindings if matches(key, binding.key)]


def test_what_a_worker_says_reaches_every_run_or_the_run_that_is_meant_and_its_parts_only_its_own_queue() -> None:
    parts = (topology.of_run("one"), topology.of_run("two"), topology.of_worker("ada"), topology.of_worker("bob"))
    assert reached(topology.hello_key("ada"), *parts) == ["fluffle.hello.one", "fluffle.hello.two"]
    assert reached(topology.inbox_key("two", "ada"), *parts) == ["fluffle.inbox.two"]
    for key in ("#", topology.upload_key("bob")):
        assert reached(key, *parts, exchange=topology.upload_queue("ada")) == []
    assert reached(topology.upload_key("bob"), *parts, exchange="fluffle.upload.bob") == ["fluffle.upload.bob"]


def test_names_fit_into_what_amqp_allows_and_stay_out_of_rabbitmqs_own() -> None:
    longest = "w" * 63
    assert re.fullmatch(fields.NAME, longest)
    keys = [topology.inbox_key(longest, longest)]
    for part in (topology.FEDERATION, topology.of_worker(longest), topology.of_run(longest)):
        keys += [exchange.name for exchange in part.exchanges] + [queue.name for queue in part.queues]
    assert all(len(key) <= 255 and not key.startswith("amq.") for key in keys)
