"""What the broker in memory does beyond the contract: time under control, restarts, turns."""

import pytest

from broker.errors import LinkError
from broker.link import Outgoing
from broker.topology import Binding, Exchange, Queue, Topology
from tests.memory import MemoryBroker, MemoryLink, _fits


def inbox(**arguments: int) -> Topology:
    limits = {"x-" + key.replace("_", "-"): value for key, value in arguments.items()}
    return Topology((Exchange("post", "direct"),), (Queue("a", limits),), (Binding("post", "a", "a"),))


def to_a(body: bytes, *, persistent: bool = True) -> Outgoing:
    return Outgoing("post", ("a",), body, persistent=persistent)


async def test_messages_older_than_the_queue_allows_are_gone() -> None:
    now = 0.0
    link = MemoryLink(MemoryBroker(clock=lambda: now))
    await link.declare(inbox(message_ttl=1000))
    await link.publish(to_a(b"old"))
    now = 0.9
    await link.publish(to_a(b"young"))
    now = 1.0
    assert await link.depth("a") == 1
    async with link.consume("a") as deliveries:
        assert (await anext(deliveries)).body == b"young"


async def test_a_restart_forgets_what_is_not_persistent() -> None:
    broker = MemoryBroker()
    link = MemoryLink(broker)
    await link.declare(inbox())
    await link.publish(to_a(b"kept"))
    await link.publish(to_a(b"lost", persistent=False))
    async with link.consume("a") as deliveries:
        held = [await anext(deliveries) for _ in range(2)]
        broker.pause()
        broker.forget()
        broker.resume()
        with pytest.raises(LinkError):
            await anext(deliveries)
    await held[0].ack()
    assert await link.depth("a") == 1


async def test_a_dropped_link_leaves_others_alone() -> None:
    broker = MemoryBroker()
    one, other = MemoryLink(broker), MemoryLink(broker)
    await one.declare(inbox())
    async with one.consume("a", prefetch=1) as ours, other.consume("a", prefetch=1) as theirs:
        await one.publish(to_a(b"1"))
        await one.publish(to_a(b"2"))
        assert (await anext(ours)).body == b"1"
        second = await anext(theirs)
        one.drop()
        with pytest.raises(LinkError):
            await anext(ours)
        await second.ack()
        again = await anext(theirs)
        assert again.body == b"1"


@pytest.mark.parametrize(
    ("pattern", "fitting", "other"),
    [
        ("hello.*", ["hello.w1"], ["hello", "hello.w1.x", "inbox.w1"]),
        ("inbox.red.*", ["inbox.red.w1"], ["inbox.blue.w1", "inbox.red"]),
        ("#", ["", "a", "a.b.c"], []),
        ("a.#", ["a", "a.b", "a.b.c"], ["b", "ab"]),
        ("#.z", ["z", "a.z", "a.b.z"], ["z.a"]),
    ],
)
def test_topics_fit_word_by_word(pattern: str, fitting: list[str], other: list[str]) -> None:
    assert all(_fits("topic", pattern, key) for key in fitting)
    assert not any(_fits("topic", pattern, key) for key in other)
