"""Some of the attacks again, through a real RabbitMQ: what our own stand-in for it might not let through, or forgive.

One coordinator, two honest workers and a liar, all in this process; each attack comes while both of the honest ones
train, and the run must end with what the two have learned, to the last bit.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import cast

import pytest

import coordinator.service
from broker import frames, rabbit, topology
from broker.invitation import Access
from broker.link import Link, Outgoing
from broker.messages import MESSAGE_BYTES_MAX, Hello, Refusal, encode
from coordinator.service import Coordinator
from coordinator.store import Store
from tests.hostile.liar import HONEST, LIAR, OF, RUN, changed, packed, parts, update
from tests.system.rig import MODEL, Lesson, expected, plan, start_weights
from workers.post import Shared
from workers.service import Worker
from workers.spool import Spool
from workers.training import Seat
from workers.work import Who

Attack = Callable[[Link], Awaitable[None]]


async def say(
    link: Link, body: bytes, key: str = topology.inbox_key(RUN, LIAR), *, exchange: str = topology.UP
) -> None:
    await link.publish(Outgoing(exchange, (key,), body), within_s=10.0)


async def keys_that_are_no_text(link: Link) -> None:
    """Routing keys may be any bytes; a client that cannot read one must not take the connection for broken."""
    for _ in range(3):
        await say(link, b"\xc1", "hello.\udcff\udcfe")
        await say(link, b"\xc1", f"inbox.{RUN}.\udc80\x1b[2J")


async def mail_beyond_the_limit(link: Link) -> None:
    for _ in range(4):
        await say(link, b"\0" * (MESSAGE_BYTES_MAX + 100_000))
    await say(link, packed(Refusal(OF, LIAR, "no"), reason="n" * 1_000_000))


async def words_about_a_message_that_fill_a_frame(link: Link) -> None:
    """A broker of ours takes frames of a megabyte, and hands on whole what stands before a body."""
    told = (("x", "y" * 700_000),)
    for key in (topology.inbox_key(RUN, LIAR), topology.hello_key(LIAR)):
        await link.publish(
            Outgoing(topology.UP, (key,), encode(Refusal(OF, "other", "no")), headers=told), within_s=10.0
        )


async def uploads_that_lie(link: Link) -> None:
    for piece in (b"\xc1", encode(changed(parts()[0], checksum=1)), *[encode(changed(parts()[0], data=b""))] * 300):
        await say(link, piece, topology.upload_key(LIAR), exchange=topology.upload_queue(LIAR))
    await say(link, encode(update()))


async def names_without_number(link: Link) -> None:
    for number in range(300):
        name = f"ghost-{number}"
        await say(link, encode(Hello(name, "1", "lesson", True, 3000.0)), topology.hello_key(name))
        await say(link, encode(update(worker=name)), topology.inbox_key(RUN, name))


@pytest.mark.parametrize(
    ("attack", "seen"),
    [
        (keys_that_are_no_text, "somebody"),
        (mail_beyond_the_limit, LIAR),
        (words_about_a_message_that_fill_a_frame, LIAR),
        (uploads_that_lie, LIAR),
        (names_without_number, "ghost-0"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
async def test_the_round_closes_with_the_others_bits(
    tmp_path: Path, vhost_url: str, monkeypatch: pytest.MonkeyPatch, attack: Attack, seen: str
) -> None:
    monkeypatch.setattr(
        frames, "_short", lambda text: bytes([len(raw := text.encode(errors="surrogateescape"))]) + raw
    )
    monkeypatch.setattr(coordinator.service, "FINAL_S_MAX", 0.2)
    settled = plan(rounds=1, cohort=2, quorum=2, workers=list(HONEST))
    Store.create(tmp_path / "run", settled, MODEL, memoryview(start_weights()))
    store = Store.open(tmp_path / "run")
    async with contextlib.AsyncExitStack() as stack, asyncio.timeout(40.0):

        async def link(name: str) -> Link:
            made = await rabbit.connect(Access.at(vhost_url), name=name)
            stack.push_async_callback(made.close)
            return made

        stop, lessons = asyncio.Event(), []
        group = await stack.enter_async_context(asyncio.TaskGroup())
        running = group.create_task(Coordinator(store, await link("coordinator")).serve())
        for name in HONEST:
            spool = Spool(tmp_path / name)
            lessons.append(lesson := Lesson(spool))
            lesson.gate.clear()
            worker = Worker(Who(name, "lesson"), Shared(await link(name), spool), cast(Seat, lesson))
            group.create_task(worker.serve(stop))
        for lesson in lessons:
            await lesson.began.wait()
        liar = await link(LIAR)
        await liar.declare(topology.of_worker(LIAR))
        await attack(liar)
        while await liar.depth(topology.inbox_queue(RUN)):  # noqa: ASYNC110 - the broker announces no such thing
            await asyncio.sleep(0.01)
        for lesson in lessons:
            lesson.gate.set()
        await running
        stop.set()
    (line,) = [line for line in store.history() if line["event"] == "round"]
    assert sorted(line["counted"]) == [*HONEST]
    assert bytearray(store.load(1)[1]) == expected(settled, [HONEST])
    assert seen in {other["worker"] for other in line["others"]}
