"""What a worker may not do to the broker of a secured federation: each act is tried, as a worker, and seen refused.

The broker is the RabbitMQ of this machine, whichever version that is.
"""

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import aio_pika
import pytest
from aio_pika.abc import AbstractChannel
from aiormq.exceptions import AMQPError, ChannelAccessRefused, ChannelPreconditionFailed, DeliveryError
from yarl import URL

from broker import topology
from broker.errors import BrokerRefused
from broker.federation import HELLOS_BYTES, WORKER_CHANNELS, WORKER_CONNECTIONS
from broker.invitation import Access
from broker.management import Management
from tests.acceptance.secured import Secured
from tests.certificates import Authority

pytestmark = pytest.mark.timeout(120)

Act = Callable[[AbstractChannel], Awaitable[Any]]
RUN = "digits"


@pytest.fixture(scope="module", autouse=True)
def _run(secured: Secured) -> None:
    """A coordinator's queues."""
    secured.declare(RUN)


@asynccontextmanager
async def channel_of(access: Access) -> AsyncIterator[AbstractChannel]:
    async with await aio_pika.connect(access.url, ssl_context=access.tls) as connection:
        yield await connection.channel()


def say(exchange: str, key: str, **properties: Any) -> Act:
    async def act(channel: AbstractChannel) -> None:
        to = await channel.get_exchange(exchange, ensure=False) if exchange else channel.default_exchange
        await to.publish(aio_pika.Message(b"x", **properties), key)

    return act


def queue(do: str, name: str, *words: Any, **how: Any) -> Act:
    async def act(channel: AbstractChannel) -> None:
        await getattr(await channel.get_queue(name, ensure=False), do)(*words, **how)

    return act


def exchange(do: str, name: str, *words: Any) -> Act:
    async def act(channel: AbstractChannel) -> None:
        await getattr(await channel.get_exchange(name, ensure=False), do)(*words)

    return act


def channel(do: str, *words: Any, **how: Any) -> Act:
    async def act(channel: AbstractChannel) -> None:
        await getattr(channel, do)(*words, **how)

    return act


async def nothing(_: object) -> None: ...


async def many(times: int, act: Callable[[Any], Awaitable[Any]], on: Any) -> None:
    for _ in range(times):
        await act(on)


OTHERS = ["fluffle.down.bob", "fluffle.control.bob", "fluffle.upload.bob", "fluffle.upload.ada", "fluffle.dead"]
RUNS = [topology.hello_queue(RUN), topology.inbox_queue(RUN)]
FORBIDDEN: dict[str, Act] = {
    "declare a queue": channel("declare_queue", "fluffle.mine", durable=True),
    "declare a queue that the broker names": channel("declare_queue", ""),
    "declare a queue in the place of its own": channel("declare_queue", "fluffle.down.ada", durable=False),
    "declare an exchange": channel("declare_exchange", "fluffle.mine", "direct"),
    "delete its own queue": queue("delete", "fluffle.down.ada", if_unused=False, if_empty=False),
    "delete another's queue": queue("delete", "fluffle.down.bob", if_unused=False, if_empty=False),
    "delete the coordinator's inbox": queue("delete", RUNS[1], if_unused=False, if_empty=False),
    "delete an exchange": exchange("delete", "fluffle.up"),
    "delete its own exchange": exchange("delete", "fluffle.upload.ada"),
    "bind its own exchange to another's": exchange("bind", "fluffle.upload.bob", "fluffle.upload.ada", "#"),
    "bind its own queue to what workers say": queue("bind", "fluffle.down.ada", "fluffle.up", "#"),
    "bind its own queue to another's tasks": queue("bind", "fluffle.down.ada", "fluffle.down", "bob"),
    "bind another's queue": queue("bind", "fluffle.upload.bob", "fluffle.up", "upload.ada"),
    "unbind its own queue": queue("unbind", "fluffle.down.ada", "fluffle.down", "ada"),
    "unbind another's queue": queue("unbind", "fluffle.down.bob", "fluffle.down", "bob"),
    "bind one exchange to another": exchange("bind", "fluffle.up", "fluffle.down", "bob"),
    "purge another's queue": queue("purge", "fluffle.down.bob"),
    "purge the coordinator's inbox": queue("purge", RUNS[1]),
    **{f"consume {name}": queue("consume", name, nothing) for name in [*OTHERS, *RUNS]},
    **{f"get from {name}": queue("get", name) for name in ["fluffle.down.bob", RUNS[1]]},
    **{
        f"say something with the key {key}": say("fluffle.up", key)
        for key in [
            "hello.bob", f"inbox.{RUN}.bob", "upload.bob", "upload.ada", "hello", "ada", "other.ada", "hello.ada.bob",
            f"inbox.{RUN}.x.ada", "hello.adam", "hello.x-ada", "HELLO.ada", "#", "",
        ]
    },
    **{
        f"publish to {name or 'the default exchange'} with the key {key}": say(name, key)
        for name, key in [
            ("fluffle.upload.bob", "upload.bob"),
            ("fluffle.down", "bob"), ("fluffle.down", "ada"), ("fluffle.control", "bob"), ("fluffle.dead", ""),
            ("amq.topic", "hello.ada"), ("amq.direct", "ada"), ("amq.fanout", ""), ("", "fluffle.down.bob"),
            ("", "fluffle.down.ada"), ("", RUNS[1]), ("", "nowhere"),
        ]
    },
}  # fmt: skip


@pytest.mark.parametrize("act", FORBIDDEN.values(), ids=FORBIDDEN)
async def test_the_broker_refuses_a_worker_to(act: Act, secured: Secured) -> None:
    async with channel_of(secured.access("ada")) as channel:
        with pytest.raises(ChannelAccessRefused, match="ACCESS_REFUSED"):
            await act(channel)


async def test_a_worker_may_do_what_it_is_for(secured: Secured) -> None:
    async with channel_of(secured.access("ada")) as channel:
        for key in ("hello.ada", f"inbox.{RUN}.ada"):
            await say("fluffle.up", key, user_id="ada")(channel)
        await say("fluffle.upload.ada", "upload.ada", user_id="ada")(channel)
        for name in ("fluffle.down.ada", "fluffle.control.ada"):
            await queue("purge", name)(channel)
            await queue("consume", name, nothing, exclusive=True)(channel)


async def test_nobody_speaks_in_anothers_name(secured: Secured) -> None:
    async with channel_of(secured.access("ada")) as channel:
        with pytest.raises(
            ChannelPreconditionFailed, match="user_id property set to 'bob' but authenticated user was"
        ):
            await say("fluffle.up", "hello.ada", user_id="bob")(channel)


@pytest.mark.parametrize("header", ["CC", "BCC"])
async def test_further_keys_in_a_header_reach_nobody_elses_queue(header: str, secured: Secured) -> None:
    """RabbitMQ 3.10 does not look at them: from where all speak they lead to coordinators, who see whose it is."""
    keys = {header: ["upload.bob", "#", "fluffle.upload.bob", "bob"]}
    async with channel_of(secured.access("ada")) as ada, channel_of(secured.access("coordinator")) as coordinator:
        queues = [f"fluffle.{kind}.bob" for kind in ("down", "control", "upload")]
        before = [await depth(coordinator, name) for name in queues]
        own = await depth(coordinator, "fluffle.upload.ada")
        await say("fluffle.upload.ada", "upload.ada", headers=keys)(ada)
        trick = say("fluffle.up", "hello.ada", headers=keys)
        if secured.version < (3, 13):
            await trick(ada)
        else:
            with pytest.raises(ChannelAccessRefused, match=r"write access to topic 'upload.bob'"):
                await trick(ada)
        assert [await depth(coordinator, name) for name in queues] == before
        assert await depth(coordinator, "fluffle.upload.ada") == own + 1


async def depth(channel: AbstractChannel, name: str) -> int:
    count = (await channel.declare_queue(name, passive=True)).declaration_result.message_count
    assert count is not None
    return count


async def test_a_worker_learns_of_anothers_queue_at_most_how_long_it_is(secured: Secured) -> None:
    """A passive declaration changes nothing; before 4.3 nobody is refused one."""
    async with channel_of(secured.access("ada")) as channel:
        ask = channel.declare_queue("fluffle.down.bob", passive=True)
        if secured.version < (4, 3):
            assert (await ask).declaration_result.message_count is not None
            return
        with pytest.raises(ChannelAccessRefused):
            await ask


async def test_a_worker_has_so_many_connections_and_channels(secured: Secured) -> None:
    access = secured.access("eve")
    held = [await aio_pika.connect(access.url, ssl_context=access.tls) for _ in range(WORKER_CONNECTIONS)]
    with pytest.raises((AMQPError, OSError)):
        await aio_pika.connect(access.url, ssl_context=access.tls, timeout=10)
    with pytest.raises((AMQPError, RuntimeError)):
        await many(WORKER_CHANNELS + 1, lambda _: held[0].channel(), None)
    for connection in held:
        await connection.close()
    async with channel_of(secured.access("bob")) as channel:
        await say("fluffle.upload.bob", "upload.bob")(channel)


async def test_only_a_workers_own_upload_queue_refuses_when_it_is_full(secured: Secured) -> None:
    small = {"pattern": r"^fluffle\.(upload|down)\.ada$", "definition": {"max-length": 2}, "apply-to": "queues"}
    secured.pages.ask("PUT", "operator-policies", "fluffle", "small", body=small)
    async with channel_of(secured.access("ada")) as ada, channel_of(secured.access("bob")) as bob:
        await secured.until(lambda: secured.queue("fluffle.upload.ada").get("operator_policy") == "small")
        with pytest.raises(DeliveryError):
            await many(8, say("fluffle.upload.ada", "upload.ada"), ada)
        await say("fluffle.up", f"inbox.{RUN}.ada")(ada)
        await say("fluffle.upload.bob", "upload.bob")(bob)
    async with channel_of(secured.access("coordinator")) as coordinator:
        for _ in range(8):
            await say("fluffle.down", "ada", headers={"BCC": ["bob"]})(coordinator)
    secured.pages.ask("DELETE", "operator-policies", "fluffle", "small")


async def test_only_so_much_waits_of_what_a_worker_says_as_a_sign_of_life(secured: Secured) -> None:
    """The queue's own bound is ten thousand of them, each as large as the broker takes."""
    hellos = topology.hello_queue(RUN)
    async with channel_of(secured.access("ada")) as ada, channel_of(secured.access("coordinator")) as coordinator:
        up = await ada.get_exchange("fluffle.up", ensure=False)
        await many(
            2 * HELLOS_BYTES // 15_000_000,
            lambda _: up.publish(aio_pika.Message(bytes(15_000_000)), "hello.ada"),
            None,
        )
        assert 0 < await depth(coordinator, hellos) * 15_000_000 <= HELLOS_BYTES


async def test_a_worker_has_no_other_vhost_and_no_pages(secured: Secured) -> None:
    access = secured.access("ada")
    with pytest.raises(AMQPError, match=r"got <Connection.Close"):
        await aio_pika.connect(access.url.with_path("//"), ssl_context=access.tls)
    login = "ada", access.url.password or ""
    with pytest.raises(BrokerRefused, match="401"):
        Management(URL(secured.federation.management), login, secured.ca).ask("GET", "overview")


async def test_nobody_comes_in_without_a_certificate_of_this_federation(
    secured: Secured, authority: Authority
) -> None:
    access = secured.access("ada")
    bare = ssl.create_default_context(cadata=secured.ca)
    foreign = replace(secured.invitation("ada"), **authority.issue("ada")._asdict()).context()
    for context in (bare, foreign):
        with pytest.raises((AMQPError, OSError)):
            await aio_pika.connect(access.url, ssl_context=context, timeout=10)
    for login in (("guest", "guest"), ("ada", "guess"), ("ada", ""), ("fluffle", secured.first_password)):
        url = access.url.with_user(login[0]).with_password(login[1])
        with pytest.raises(AMQPError, match=r"ACCESS_REFUSED - Login was refused"):
            await aio_pika.connect(url, ssl_context=access.tls, timeout=10)
    with pytest.raises((AMQPError, OSError)):
        await aio_pika.connect(access.url.with_scheme("amqp"), timeout=10)


async def test_nobody_but_the_broker_passes_for_the_broker(secured: Secured) -> None:
    """A worker that listens with its own certificate is found out by whoever connects."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    chain = secured.folder / "bobs.pem"
    bob = secured.invitation("bob")
    chain.write_text(bob.certificate + bob.key)
    server.load_cert_chain(chain)
    chain.unlink()
    listening = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0, ssl=server)
    async with listening:
        with pytest.raises(ssl.SSLCertVerificationError):
            await asyncio.open_connection(
                "127.0.0.1",
                listening.sockets[0].getsockname()[1],
                ssl=secured.access("ada").tls,
                server_hostname="localhost",
            )
