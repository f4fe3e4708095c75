"""What only a real RabbitMQ can do: refuse, break off, fall silent, die and come back."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aio_pika
import pytest
from yarl import URL

from broker.errors import BrokerRefused, LinkClosed, LinkError, UsageError
from broker.invitation import Access
from broker.link import Lane, Outgoing, publish_parts
from broker.messages import PART_BYTES_MIN, Payload
from broker.parts import Assembly, split
from broker.rabbit import connect
from broker.tensors import TensorSpec
from tests.contract.ground import RabbitGround, direct, hold, queue, take, to
from tests.node import Node


@asynccontextmanager
async def listener(answer: bytes) -> AsyncIterator[int]:
    """Something that listens, is no RabbitMQ, and says `answer` to whoever comes."""

    async def meet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(8)
        writer.write(answer)
        writer.close()

    server = await asyncio.start_server(meet, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


@pytest.mark.parametrize(
    "url", ["", "localhost", "http://localhost", "amqp://", "amqp://u:secret@h:99999", "amqp://h:x"]
)
async def test_a_url_that_is_none_is_refused_without_repeating_it(url: str) -> None:
    with pytest.raises(UsageError, match="must look like amqps://") as told:
        await connect(url, name="w1")
    assert "secret" not in str(told.value)


async def test_what_is_awaited_is_received_into_its_place(rabbit_ground: RabbitGround) -> None:
    link = await rabbit_ground.link()
    await link.declare(direct(queue("a")))
    size = 4 * PART_BYTES_MIN
    payload = Payload("p", PART_BYTES_MIN, (TensorSpec("w", "uint8", (size,)),))
    data, assembly = memoryview(bytes(range(256)) * (size // 256)), Assembly(payload)
    await publish_parts(link, split(payload, data), "post", ("a",), lane=Lane.DOWN)
    async with link.consume("a", lane=Lane.UP, aim=assembly.aim) as deliveries:
        while not assembly.complete:
            delivery = await anext(deliveries)
            assert delivery.part is not None
            assert not delivery.body
            assembly.add(delivery.part)
            await delivery.ack()
    assert assembly.data == data


@pytest.mark.parametrize("host", ["127.0.0.1:1", "no-such-host.invalid:5672"])
async def test_nobody_there_is_said_with_what_to_do(host: str) -> None:
    with pytest.raises(
        UsageError, match=f"no RabbitMQ answers at {host}: start one with `fluffle broker start`"
    ) as told:
        await connect(Access.at(f"amqp://u:secret@{host}/", insecure=True), name="w1")
    assert not isinstance(told.value, BrokerRefused)


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"AMQP\0\1\0\0" + bytes(20)])
async def test_another_server_on_the_port_is_no_rabbitmq(answer: bytes) -> None:
    async with listener(answer) as port:
        with pytest.raises(BrokerRefused, match="is not RabbitMQ"):
            await connect(f"amqp://127.0.0.1:{port}/", name="w1")


async def test_a_server_that_hangs_up_without_a_word_may_be_a_rabbitmq_that_is_starting() -> None:
    async with listener(b"") as port:
        with pytest.raises(UsageError, match="no RabbitMQ answers"):
            await connect(f"amqp://127.0.0.1:{port}/", name="w1")


async def test_a_wrong_password_is_refused_without_repeating_it(
    vhost_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    url = str(URL(vhost_url).with_password("wrong-secret"))
    with pytest.raises(BrokerRefused, match="refuses the password of user fluffle"):
        await connect(url, name="w1")
    assert "wrong-secret" not in caplog.text


async def test_a_wrong_vhost_is_refused_by_name(vhost_url: str) -> None:
    with pytest.raises(BrokerRefused, match="does not let user fluffle into vhost nowhere"):
        await connect(str(URL(vhost_url).with_path("/nowhere")), name="w1")


async def test_tls_that_the_port_does_not_speak_is_refused(vhost_url: str) -> None:
    with pytest.raises(BrokerRefused, match="no trusted TLS"):
        await connect(str(URL(vhost_url).with_scheme("amqps")), name="w1")


async def test_operators_see_who_is_connected_by_which_lane(node: Node, vhost_url: str) -> None:
    link = await connect(vhost_url, name="worker w1")
    await link.declare(direct(queue("a")))
    for lane in (Lane.CONTROL, Lane.UP):
        await link.publish(Outgoing("post", ("a",), b"", lane))
    listing = json.loads(node.ctl("list_connections", "vhost", "client_properties", "--formatter", "json"))
    names = {
        words[-1]
        for each in listing
        if each["vhost"] == URL(vhost_url).path[1:]
        for words in each["client_properties"]
        if words[0] == "connection_name"
    }
    assert names == {"worker w1 asking", "worker w1 control", "worker w1 up"}
    await link.close()


async def test_a_user_without_the_right_is_told_what_was_not_allowed(node: Node, vhost_url: str) -> None:
    url = URL(vhost_url)
    user = f"guest-of-{url.path[1:]}"
    node.ctl("add_user", user, "pass")
    node.ctl("set_permissions", "-p", url.path[1:], user, "^$", "^$", "^$")
    host, guest = (
        await connect(vhost_url, name="host"),
        await connect(str(url.with_user(user).with_password("pass")), name="guest"),
    )
    await host.declare(direct(queue("a")))
    with pytest.raises(BrokerRefused, match="ACCESS_REFUSED"):
        await guest.declare(direct(queue("a")))
    with pytest.raises(BrokerRefused, match=r"publishing to post .*ACCESS_REFUSED"):
        await guest.publish(to("a"))
    with pytest.raises(BrokerRefused, match=r"consuming a .*ACCESS_REFUSED"):
        await hold(guest, "a", 1)
    await asyncio.gather(host.close(), guest.close())


async def test_connections_that_the_operator_closes_come_back(
    node: Node, vhost_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "broker")
    link = await connect(vhost_url, name="w1")
    await link.declare(direct(queue("a")))
    async with link.consume("a", lane=Lane.DOWN) as deliveries:
        vhost = URL(vhost_url).path[1:]
        await asyncio.to_thread(node.ctl, "close_all_connections", "--vhost", vhost, "tea time")
        with pytest.raises(LinkError, match="tea time"):
            await anext(deliveries)
    await link.publish(to("a", b"after"))
    assert await take(link, "a", 1) == [b"after"]
    await link.close()
    said = [record.message for record in caplog.records if record.name.startswith("broker")]
    where = f"{URL(vhost_url).host}:{URL(vhost_url).port}"
    assert f"w1 control: connected to {where}" in said
    assert f"w1 control: lost the connection to {where}: CONNECTION_FORCED - tea time" in said
    assert f"w1 control: connected again to {where}" in said
    assert sum("lost the connection" in each for each in said) == 2


async def test_a_silent_network_is_noticed_and_what_was_being_published_arrives(rabbit_ground: RabbitGround) -> None:
    link = await rabbit_ground.link(heartbeat_s=2)
    await link.declare(direct(queue("a"), queue("b")))
    async with link.consume("a") as deliveries:
        rabbit_ground.proxy.flow.clear()
        publishing = asyncio.ensure_future(link.publish(to("b", b"through")))
        with pytest.raises(LinkError, match="no sign of life"):
            await anext(deliveries)
        assert not publishing.done()
        rabbit_ground.cut()  # the connections that the broker still believes in
        rabbit_ground.proxy.flow.set()
    await publishing
    assert (await take(link, "b", 1)) == [b"through"]


async def test_a_link_is_closed_in_time_though_the_network_is_silent(rabbit_ground: RabbitGround) -> None:
    link = await rabbit_ground.link()
    await link.declare(direct(queue("a")))
    before = asyncio.all_tasks()
    rabbit_ground.proxy.flow.clear()
    publishing = asyncio.ensure_future(link.publish(to("a", bytes(8_000_000))))
    await asyncio.wait({publishing}, timeout=0.2)
    async with asyncio.timeout(7):
        await link.close()
    with pytest.raises(LinkClosed):
        await publishing
    assert asyncio.all_tasks() <= before


async def test_persistent_messages_survive_a_broker_that_is_killed(tmp_path: Path) -> None:
    with Node(tmp_path / "rabbitmq") as node:
        link = await connect(node.url, name="w1")
        await link.declare(direct(queue("a")))
        await link.publish(to("a", b"kept"))
        await link.publish(Outgoing("post", ("a",), b"lost", persistent=False))
        await asyncio.to_thread(node.settle)
        async with link.consume("a") as deliveries:
            assert [(await anext(deliveries)).body for _ in range(2)] == [b"kept", b"lost"]
            node.kill()
            with pytest.raises(LinkError):
                await anext(deliveries)
        publishing = asyncio.ensure_future(link.publish(to("a", b"meanwhile")))
        await asyncio.to_thread(node.restart)
        await publishing
        assert await take(link, "a", 2) == [b"kept", b"meanwhile"]
        await link.close()


async def test_a_queue_that_somebody_else_holds_for_himself_alone_is_refused_and_not_asked_for_again_and_again(
    vhost_url: str,
) -> None:
    link = await connect(vhost_url, name="w1")
    async with asyncio.timeout(30), await aio_pika.connect(vhost_url) as other, other.channel() as channel:
        await channel.declare_queue("a", exclusive=True)
        with pytest.raises(BrokerRefused, match="RESOURCE_LOCKED"):
            await link.declare(direct(queue("a")))
    await link.close()
