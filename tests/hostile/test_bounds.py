"""What a stranger may repeat without end: memory, time and the log stay bounded, whatever is said and how often."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pamqp.frame
import pytest
from pamqp import commands

from broker import frames, topology
from broker.amqp import Connection
from broker.errors import WireError
from broker.invitation import Access
from broker.link import Delivery, Outgoing
from broker.messages import Refusal, Step, encode
from broker.pact import Masked
from tests.memory import MemoryLink
from tests.system.rig import SECURE, federation, read, secure_expected

FIVE = ("a", "b", "c", "d", "e")


async def test_who_says_that_other_masked_words_are_there_again_and_again_is_not_waited_for_each_time(
    tmp_path: Path,
) -> None:
    """One of a secure cohort announces words without number, none of which are there: the others' are added."""
    async with federation(tmp_path, **SECURE, rounds=1, cohort=5, quorum=4) as fed:
        for name in FIVE:
            fed.join(name)
        voice, most, lied = MemoryLink(fed.broker), 0, False

        async def lie(what: Outgoing | Delivery) -> None:
            nonlocal most, lied
            if fed.coordinator:
                most = max(most, fed.coordinator.desk.uploads.qsize())
            message = None if isinstance(what, Outgoing) or what.key.startswith("upload") else read(what)
            if lied or not isinstance(message, Step) or not isinstance(message.says, Masked):
                return
            lied, payload = True, message.payload
            assert payload
            for number in range(50):
                said = replace(message, worker="e", payload=replace(payload, id=f"none/{number}"))
                key = topology.inbox_key(said.of.run, "e")
                await voice.publish(Outgoing(topology.UP, (key,), encode(said)))

        fed.hook = lie
        await fed.end()
        assert lied
        assert most <= len(FIVE)
        assert fed.lines("abandoned") == []
        assert fed.counted() == [list("abcd")]
        assert fed.weights() == secure_expected(fed.store.plan, [FIVE[:4]])
        await voice.close()


async def test_what_strangers_refuse_and_vow_in_a_secure_sum_is_not_in_the_history(tmp_path: Path) -> None:
    """Somebody speaks in a secure sum under a hundred names, none of which was asked, and refuses at length."""
    async with federation(tmp_path, **SECURE, rounds=1, cohort=5, quorum=4) as fed:
        for name in FIVE:
            fed.join(name)
        voice, lied = MemoryLink(fed.broker), False

        async def lie(what: Outgoing | Delivery) -> None:
            nonlocal lied
            message = None if isinstance(what, Outgoing) or what.key.startswith("upload") else read(what)
            if lied or not isinstance(message, Step) or not isinstance(message.says, Masked):
                return
            lied = True
            for number in range(100):
                name = f"ghost-{number}"
                for said in (replace(message, worker=name), Refusal(message.of, name, "x" * 4096)):
                    key = topology.inbox_key(said.of.run, name)
                    await voice.publish(Outgoing(topology.UP, (key,), encode(said)))

        fed.hook = lie
        await fed.end()
        assert lied
        assert fed.counted() == [[*FIVE]]
        assert fed.lines("round")[0]["secure"]["gone"] == {}
        await voice.close()


async def test_tables_in_tables_end_a_connection_and_nothing_else() -> None:
    """A broker greets with a table in a table in a table …"""
    inner = b""
    while len(inner) < 100_000:
        inner = b"\0F" + len(inner).to_bytes(4, "big") + inner
    greeting = b"\0\x0a\0\x0a\0\x09" + len(inner).to_bytes(4, "big") + inner + bytes(8)
    frame = memoryview(frames.method(0, greeting))
    connection = Connection("test")
    while frame and connection.alive:
        room = connection.get_buffer(-1)[: len(frame)]
        room[:] = frame[: len(room)]
        connection.buffer_updated(len(room))
        frame = frame[len(room) :]
    assert await connection.lost == "what comes is not AMQP"


@pytest.mark.parametrize("frame_bytes", [1, 8, 4095])
async def test_a_broker_that_wants_frames_in_which_nothing_fits_is_none(frame_bytes: int) -> None:
    """No body would ever be cut into such frames to its end."""
    connection = Connection("test")
    greeting = asyncio.create_task(connection.greet(Access.at("amqp://127.0.0.1/"), 0))
    await asyncio.sleep(0)
    for said in (commands.Connection.Start(), commands.Connection.Tune(0, frame_bytes, 0)):
        frame = pamqp.frame.marshal(said, 0)
        connection.get_buffer(-1)[: len(frame)] = frame
        connection.buffer_updated(len(frame))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    async with asyncio.timeout(5.0):
        with pytest.raises(WireError, match="is not AMQP"):
            await greeting
    connection.abort("the end")
