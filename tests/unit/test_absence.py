"""When a daemon gives up waiting for RabbitMQ: never, unless it was told to."""

import asyncio
import socket

import pytest

from broker import rabbit
from broker.errors import GaveUp
from broker.invitation import Access
from broker.lanes import Absence
from broker.link import Outgoing
from broker.topology import Topology


async def test_who_was_told_no_bound_waits_for_ever() -> None:
    absence = Absence(None)
    for _ in range(100):
        absence.goes_on("nobody answers.")


async def test_only_an_absence_without_a_break_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: now)
    absence = Absence(10)
    absence.goes_on("nobody answers.")
    now = 9.0
    absence.goes_on("nobody answers.")
    absence.over()
    now = 15.0
    absence.goes_on("nobody answers.")
    now = 25.0
    with pytest.raises(GaveUp, match=r"^RabbitMQ was out of reach for 10 s and more; gave up: nobody answers\.$"):
        absence.goes_on("nobody answers.")


async def asked_of(link: rabbit.RabbitLink, what: str) -> None:
    if what == "publish":
        await link.publish(Outgoing("x", ("y",), b""))
    elif what == "declare":
        await link.declare(Topology())
    else:
        async with link.consume("q"):
            pass


@pytest.mark.parametrize("what", ["publish", "consume", "declare"])
async def test_whatever_waits_for_rabbitmq_gives_up_with_it(what: str) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        url = f"amqp://a:b@127.0.0.1:{silent.getsockname()[1]}/"
        link = rabbit.RabbitLink(Access.at(url), "nobody", 30, 0.2)
        try:
            async with asyncio.timeout(20):
                with pytest.raises(GaveUp, match=r"out of reach for 0\.2 s and more; gave up: .*127\.0\.0\.1"):
                    await asked_of(link, what)
        finally:
            await link.close()
