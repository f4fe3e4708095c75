"""The promises of `broker/link.py`, kept by RabbitMQ and in memory alike."""

import asyncio
import uuid

import pytest

from broker.errors import BrokerRefused, LinkClosed, LinkError, NoRoom, QueueInUse, Unroutable
from broker.link import BROADCAST_MAX, Lane, Outgoing, publish_parts, read
from broker.messages import PART_BYTES_MIN, Part, Payload
from broker.parts import PART_BYTES, Assembly, split
from broker.tensors import TensorSpec
from broker.topology import FEDERATION, UP, Binding, Exchange, Topology, hello_key, inbox_key, of_run, of_worker
from tests.contract.ground import Ground, direct, hold, queue, take, to

MIB = 1024 * 1024


async def test_messages_arrive_in_the_order_they_were_published(ground: Ground) -> None:
    link = await ground.link()
    await link.declare(direct(queue("a")))
    sent = [b"%d" % i for i in range(20)]
    for body in sent:
        await link.publish(to("a", body))
    assert await take(link, "a", 20) == sent


async def test_a_consumer_that_waits_gets_what_comes_later(ground: Ground) -> None:
    one, other = await ground.link(), await ground.link()
    await one.declare(direct(queue("a")))
    async with one.consume("a") as deliveries:
        waiting = asyncio.ensure_future(anext(deliveries))
        await other.publish(to("a", b"later"))
        delivery = await waiting
        assert (delivery.body, delivery.key) == (b"later", "a")
        await delivery.ack()


@pytest.mark.parametrize("size", [0, 7 * MIB // 2])
async def test_bodies_of_any_bytes_arrive_whole(ground: Ground, size: int) -> None:
    link = await ground.link()
    await link.declare(direct(queue("a")))
    body = bytes(range(256)) * (size // 256)
    await link.publish(to("a", body))
    assert await take(link, "a", 1) == [body]


async def test_acked_messages_are_gone_and_unacked_ones_come_again_when_their_consumer_leaves(ground: Ground) -> None:
    link = await ground.link()
    await link.declare(direct(queue("a")))
    for body in (b"1", b"2", b"3"):
        await link.publish(to("a", body))
    async with link.consume("a") as deliveries:
        await (await anext(deliveries)).ack()
        second = await anext(deliveries)
        assert second.body == b"2"
    assert await link.depth("a") == 2
    await second.ack()  # void: it changes nothing
    again = await hold(link, "a", 2)
    assert [delivery.body for delivery in again] == [b"2", b"3"]


async def test_unacked_messages_come_again_when_their_link_is_closed(ground: Ground) -> None:
    one, other = await ground.link(), await ground.link()
    await one.declare(direct(queue("a")))
    await one.publish(to("a", b"1"))
    async with one.consume("a") as deliveries:
        await anext(deliveries)
        await one.close()
    (again,) = await hold(other, "a", 1)
    assert again.body == b"1"


async def test_no_more_than_prefetch_are_unacked(ground: Ground) -> None:
    link = await ground.link()
    await link.declare(direct(queue("a")))
    for i in range(10):
        await link.publish(to("a", b"%d" % i))
    async with link.consume("a", prefetch=3) as deliveries:
        held = [await anext(deliveries) for _ in range(3)]
        assert await link.depth("a") == 7
        await held[0].ack()
        assert (await anext(deliveries)).body == b"3"


async def test_one_publish_reaches_every_queue_its_keys_lead_to(ground: Ground) -> None:
    link = await ground.link()
    await link.declare(direct(queue("a"), queue("b"), queue("c")))
    longest = tuple(f"{i:063}" for i in range(BROADCAST_MAX - 2))
    await link.publish(Outgoing("post", ("a", *longest, "b"), b"all"))
    assert [await link.depth(name) for name in ("a", "b", "c")] == [1, 1, 0]
    (delivery,) = await hold(link, "b", 1)
    assert (delivery.body, delivery.key) == (b"all", "a")


async def test_parts_reach_more_receivers_than_one_publish_can_name(ground: Ground) -> None:
    link = await ground.link()
    await link.declare(direct(queue("0"), queue("1500"), queue("2099")))
    payload, data = _payload(PART_BYTES_MIN)
    keys = tuple(str(i) for i in range(2100))
    await publish_parts(link, split(payload, data), "post", keys, lane=Lane.DOWN)
    assert [await link.depth(name) for name in ("0", "1500", "2099")] == [1, 1, 1]


@pytest.mark.parametrize("aimed", [False, True])
async def test_parts_of_a_large_payload_make_the_same_bytes(ground: Ground, *, aimed: bool) -> None:
    link = await ground.link()
    await link.declare(direct(queue("a")))
    payload, data = _payload(20 * MIB)
    assembly = Assembly(payload)
    aim = assembly.aim if aimed else None

    async def receive() -> None:
        async with link.consume("a", lane=Lane.UP, prefetch=8, aim=aim) as deliveries:
            while not assembly.complete:
                delivery = await anext(deliveries)
                part = read(delivery)
                assert isinstance(part, Part)
                assert assembly.add(part)
                await delivery.ack()

    async with asyncio.TaskGroup() as group:
        group.create_task(receive())
        sent = await publish_parts(link, split(payload, data), "post", ("a",), lane=Lane.DOWN)
    assert sent > 20 * MIB
    assert assembly.data == data
    assert await link.depth("a") == 0


async def test_what_no_queue_takes_is_said(ground: Ground) -> None:
    link = await ground.link()
    await link.declare(direct(queue("a")))
    with pytest.raises(Unroutable, match="post for nobody"):
        await link.publish(to("nobody"))
    with pytest.raises(Unroutable):
        await link.publish(Outgoing("no-such-exchange", ("a",), b""))


async def test_a_message_without_an_exchange_harms_no_other(ground: Ground) -> None:
    link = await ground.link()
    await link.declare(direct(queue("a")))
    lost = [link.publish(Outgoing("no-such-exchange", ("a",), b"")) for _ in range(3)]
    kept = [link.publish(to("a", b"%d" % i)) for i in range(3)]
    said = await asyncio.gather(
        *(each for pair in zip(lost, kept, strict=True) for each in pair), return_exceptions=True
    )
    assert [type(each) for each in said] == [Unroutable, type(None)] * 3
    seen = set[bytes]()  # some may have come twice: what was not confirmed yet was published again
    while len(seen) < 3:
        seen |= set(await take(link, "a", 1))
    assert seen == {b"0", b"1", b"2"}


async def test_publishing_to_a_full_queue_waits_for_room_and_holds_up_nobody_else(ground: Ground) -> None:
    link = await ground.link()
    await link.declare(direct(queue("full", max_length=2, overflow="reject-publish"), queue("free")))
    for body in (b"1", b"2"):
        await link.publish(to("full", body))
    waiting = asyncio.ensure_future(link.publish(to("full", b"3")))
    for _ in range(10):
        await link.publish(to("free"))
    assert not waiting.done()
    assert await take(link, "full", 1) == [b"1"]
    await waiting
    assert await take(link, "full", 2) == [b"2", b"3"]


async def test_publishing_to_a_full_queue_gives_up_in_time(ground: Ground) -> None:
    link = await ground.link()
    await link.declare(direct(queue("full", max_length_bytes=4, overflow="reject-publish")))
    await link.publish(to("full", b"1234"))
    with pytest.raises(NoRoom, match=r"within 0\.3 s"):
        await link.publish(to("full", b"5"), within_s=0.3)


async def test_a_queue_that_does_not_refuse_drops_its_oldest(ground: Ground) -> None:
    link = await ground.link()
    await link.declare(direct(queue("a", max_length=2, overflow="drop-head")))
    for body in (b"1", b"2", b"3", b"4"):
        await link.publish(to("a", body))
    assert await take(link, "a", 2) == [b"3", b"4"]


async def test_hellos_reach_every_run_and_messages_of_a_run_only_its_own(ground: Ground) -> None:
    link = await ground.link()
    for topology in (FEDERATION, of_worker("w1"), of_run("red"), of_run("blue")):
        await link.declare(topology)
    await link.publish(Outgoing(UP, (hello_key("w1"),), b"hello"))
    await link.publish(Outgoing(UP, (inbox_key("blue", "w1"),), b"update"))
    assert [await link.depth(f"fluffle.hello.{run}") for run in ("red", "blue")] == [1, 1]
    assert [await link.depth(f"fluffle.inbox.{run}") for run in ("red", "blue")] == [0, 1]


async def test_a_lost_connection_ends_its_consumers_and_voids_their_deliveries(ground: Ground) -> None:
    link = await ground.link()
    await link.declare(direct(queue("a")))
    await link.publish(to("a", b"1"))
    async with link.consume("a") as deliveries:
        void = await anext(deliveries)
        ground.cut()
        with pytest.raises(LinkError):
            await anext(deliveries)
        with pytest.raises(LinkError):
            await anext(deliveries)
    await void.ack()
    async with link.consume("a") as deliveries:
        again = await anext(deliveries)
        assert again.body == b"1"
        await again.ack()


async def test_publishing_and_consuming_wait_for_a_broker_that_is_away(ground: Ground) -> None:
    link = await ground.link()
    await link.declare(direct(queue("a")))
    ground.leave()
    with pytest.raises(LinkError, match=r"within 0\.3 s"):
        await link.publish(to("a"), within_s=0.3)
    waiting = [asyncio.ensure_future(link.publish(to("a", b"1"))), asyncio.ensure_future(take(link, "a", 1))]
    await asyncio.wait(waiting, timeout=0.3)
    assert not any(each.done() for each in waiting)
    ground.come_back()
    assert await asyncio.gather(*waiting) == [None, [b"1"]]


async def test_a_publish_that_is_cancelled_harms_no_other(ground: Ground) -> None:
    link = await ground.link()
    await link.declare(direct(queue("a")))
    publishing = [asyncio.ensure_future(link.publish(to("a", bytes(MIB)))) for _ in range(8)]
    await asyncio.sleep(0)
    for each in publishing[::2]:
        each.cancel()
    said = await asyncio.gather(*publishing, return_exceptions=True)
    assert said[1::2] == [None] * 4
    await link.publish(to("a", b"after"))


async def test_a_queue_that_is_missing_or_deleted_ends_consuming(ground: Ground) -> None:
    link = await ground.link()
    await link.declare(direct(queue("a")))
    with pytest.raises(LinkError, match="no queue b"):
        await take(link, "b", 1)
    async with link.consume("a") as deliveries:
        await link.delete("a")
        with pytest.raises(LinkError, match="a was deleted"):
            await anext(deliveries)


async def test_a_queue_that_one_wants_alone_has_one_consumer(ground: Ground) -> None:
    one, other = await ground.link(), await ground.link()
    await one.declare(direct(queue("a")))
    for alone_first, alone_second in ((True, True), (True, False), (False, True)):
        async with one.consume("a", alone=alone_first):
            with pytest.raises(QueueInUse, match="someone else"):
                async with other.consume("a", alone=alone_second):
                    pass
    async with other.consume("a", alone=True) as deliveries:
        await one.publish(to("a", b"1"))
        assert (await anext(deliveries)).body == b"1"


async def test_purging_drops_what_waits_and_deleting_all(ground: Ground) -> None:
    link = await ground.link()
    await link.declare(direct(queue("a")))
    for _ in range(3):
        await link.publish(to("a"))
    assert await link.depth("a") == 3
    assert await link.purge("a") == 3
    assert await link.depth("a") == 0
    await link.delete("a")
    assert await link.depth("a") is None
    assert await link.purge("a") == 0
    await link.delete("a")


async def test_declaring_twice_is_fine_and_otherwise_is_refused(ground: Ground) -> None:
    link = await ground.link()
    for _ in range(2):
        await link.declare(direct(queue("a", max_length=2)))
    with pytest.raises(BrokerRefused, match="a"):
        await link.declare(direct(queue("a", max_length=3)))
    with pytest.raises(BrokerRefused, match="post"):
        await link.declare(Topology(exchanges=(Exchange("post", "topic"),)))
    with pytest.raises(BrokerRefused, match="declare it"):
        await link.declare(Topology(bindings=(Binding("nothing", "a", "a"),)))
    await link.publish(to("a", b"still here"))


async def test_a_closed_link_says_so_and_may_be_closed_again(ground: Ground) -> None:
    link = await ground.link()
    await link.declare(direct(queue("a", max_length=0, overflow="reject-publish")))
    publishing = asyncio.ensure_future(link.publish(to("a", b"no room")))
    async with link.consume("a") as deliveries:
        receiving = asyncio.ensure_future(anext(deliveries))
        await asyncio.wait({publishing, receiving}, timeout=0.2)
        await link.close()
        for waiting in (publishing, receiving):
            with pytest.raises(LinkClosed):
                await waiting
    await link.close()
    with pytest.raises(LinkClosed):
        await link.publish(to("a"))
    with pytest.raises(LinkClosed):
        await take(link, "a", 1)
    with pytest.raises(LinkClosed):
        await link.depth("a")


def _payload(size_bytes: int) -> tuple[Payload, memoryview]:
    data = memoryview(bytes(range(251)) * (size_bytes // 251 + 1))[:size_bytes]
    tensors = (TensorSpec("weight", "float32", (size_bytes // 4,)),)
    return Payload(uuid.uuid4().hex, min(PART_BYTES, size_bytes), tensors), data
