"""What becomes of channels and connections at awkward moments, without a broker."""

import asyncio
from typing import Any, cast

import pamqp.frame
import pytest
from pamqp import commands

from broker import amqp, rabbit
from broker.channels import Channel
from broker.errors import BrokerRefused, LinkError
from broker.invitation import Access
from broker.link import Lane, Outgoing


def connection(lanes: int = 10) -> amqp.Connection:
    """One that is open, to nobody."""
    made = amqp.Connection("test")
    made._numbers = range(1, lanes)
    return made


async def test_a_connection_that_was_lost_opens_no_channel_on_which_somebody_would_wait_for_ever() -> None:
    lost = connection()
    lost.abort("the cable was cut")
    with pytest.raises(LinkError, match="the cable was cut"):
        lost.open(confirms=True)


@pytest.mark.parametrize("garbage", [b"HTTP/1.1 400", b"\x01\x00\x01\x00\x00\x00\x01!!!!"])
async def test_garbage_on_an_open_connection_is_a_connection_that_was_lost_for_whoever_waits_on_it(
    garbage: bytes,
) -> None:
    broken = connection()
    publishing = asyncio.create_task(broken.open(confirms=True).publish(Outgoing("fluffle.up", ("hello.a",), b"x")))
    await asyncio.sleep(0)
    broken.get_buffer(0)[: len(garbage)] = garbage
    broken.buffer_updated(len(garbage))
    with pytest.raises(LinkError, match="what comes is not AMQP"):
        await publishing
    assert not broken.alive


async def test_a_channel_that_is_closed_while_it_opens_takes_no_other_answer_for_that_to_its_close() -> None:
    channel = connection().open(prefetch=5)
    closing = asyncio.create_task(channel.close())
    await asyncio.sleep(0)
    for answer, over in (
        (commands.Channel.OpenOk(), False), (commands.Basic.QosOk(), False), (commands.Channel.CloseOk(), True),
    ):  # fmt: skip
        channel.take_method(pamqp.frame.marshal(answer, 1)[7:-1])
        for _ in range(5):
            await asyncio.sleep(0)
        assert closing.done() is over, answer
    await closing


async def test_a_consumer_that_is_cancelled_while_it_leaves_does_not_hold_its_queue(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    link, open_ = rabbit.RabbitLink(Access.at("amqp://a:b@127.0.0.1:1/"), "w1", 30, None), connection()
    channel = open_.open()
    started = asyncio.Event()

    async def start(*_: object, **__: object) -> tuple[amqp.Connection, Channel]:
        return open_, channel

    async def leave(_: Channel) -> bool:
        started.set()
        await asyncio.Event().wait()
        return True

    monkeypatch.setattr(rabbit.RabbitLink, "_start", start)
    monkeypatch.setattr(Channel, "leave", leave)
    monkeypatch.setattr("broker.channels.CLOSE_S", 0.01)

    async def consume() -> None:
        async with link.consume("q"):
            pass

    task = asyncio.create_task(consume())
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert channel.ended is not None, "its consumer is there still, and holds the queue"


async def test_once_let_in_a_refusal_of_the_next_connection_is_taken_for_an_upheaval_that_passes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As where RabbitMQ has been started anew and has not read its users yet."""
    answers: list[Any] = [connection(), BrokerRefused("RabbitMQ does not know w1: check."), connection()]

    async def connect(*_: object) -> amqp.Connection:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return cast("amqp.Connection", answer)

    monkeypatch.setattr("broker.amqp.connect", connect)
    link = rabbit.RabbitLink(Access.at("amqp://a:b@127.0.0.1:1/"), "w1", 30, None)
    await link.open()
    assert (await link._lanes[Lane.UP].connection()).alive
    assert not answers


async def test_whoever_was_never_let_in_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async def connect(*_: object) -> amqp.Connection:
        raise BrokerRefused("RabbitMQ does not know w1: check.")

    monkeypatch.setattr("broker.amqp.connect", connect)
    link = rabbit.RabbitLink(Access.at("amqp://a:b@127.0.0.1:1/"), "w1", 30, None)
    with pytest.raises(BrokerRefused):
        await link.open()
