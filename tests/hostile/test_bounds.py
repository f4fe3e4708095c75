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
from broker.messages import MAP_MAX, Attempt, Goodbye, Refusal, Score, Step, encode
from broker.pact import Masked
from coordinator import history, scores
from tests.hostile.liar import LIAR, OF, RUN, a_liar_among_two, parts, update
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


LONG = {f"{number}".rjust(200, "\U0001f407"): 0.1 for number in range(MAP_MAX)}
"""As many metrics as one message may bring, under names that take twelve bytes a character in the history."""


async def test_metrics_that_would_fill_the_history_are_refused_with_the_reason(tmp_path: Path) -> None:
    """A liar, or a careless learner, reports a megabyte of metrics with its score and with its update."""
    async with a_liar_among_two(tmp_path, rounds=1) as (fed, liar):
        await liar.say(Score(OF, LIAR, 0, LONG))
        await liar.upload(parts())
        await liar.say(update(metrics=LONG))
        answer = await liar.answer()
        said = f"its 512 metrics would take {history.size_of(LONG)} bytes of the history, over the limit of 32768"
        assert (answer.verdict, answer.reason) == ("invalid", f"{said}: report fewer, or under shorter names")
        await liar.leave()
        assert fed.counted() == [["a", "b"]]
        assert fed.lines("round")[0]["refused"] == {LIAR: answer.reason}
        assert (fed.run / "history.jsonl").stat().st_size < 10_000


async def test_scores_under_names_without_number_do_not_fill_the_history_nor_crowd_out_whom_the_plan_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody says hello, to evaluate, under one name after another, and scores every version at length."""
    monkeypatch.setattr(scores, "SCORES_BYTES_MAX", 20_000)
    async with a_liar_among_two(tmp_path, rounds=1, workers=["a", "b", LIAR, "judge"]) as (fed, liar):
        long = {f"metric-{number}": 0.1 for number in range(MAP_MAX // 4)}
        for name in (*(f"ghost-{number}" for number in range(50)), "judge"):
            await liar.hello(worker=name, trains=False, lease_s=3000.0)
            await liar.say(Score(OF, name, 0, long), topology.inbox_key(RUN, name))
        await fed.until(lambda: "judge" in {line["worker"] for line in fed.lines("score")})
        assert fed.coordinator
        ghosts = [line for line in fed.lines("score") if line["worker"] != "judge"]
        assert 0 < sum(map(history.size_of, ghosts)) < 20_000
        assert len(fed.coordinator.desk.scores._judged) == len(ghosts) + 1
        for name in fed.here():
            if name.startswith(("ghost", "judge")):
                await liar.say(Goodbye(name, "done"), topology.hello_key(name))
        await liar.leave()
        assert fed.counted() == [["a", "b"]]


async def test_only_who_is_asked_for_the_last_score_is_remembered_with_one(tmp_path: Path) -> None:
    """Somebody says what it makes of the last version before anybody is asked, under many names, and later again."""
    async with a_liar_among_two(tmp_path, rounds=1) as (fed, liar):
        for number in range(50):
            name = f"ghost-{number}"
            await liar.hello(worker=name, lease_s=0.01)
            await liar.say(Score(Attempt(RUN, 0, 0), name, 0, {"loss": 1.0}), topology.inbox_key(RUN, name))
        await liar.hello(worker="last", lease_s=0.01)
        await asyncio.sleep(0.2)  # all of them are heard by then, and their leases have ended soon
        await fed.until(lambda: not any(name.startswith(("ghost", "last")) for name in fed.here()))
        assert fed.coordinator
        assert fed.coordinator.desk.scores.final == {}
        await liar.leave()
        assert fed.coordinator.desk.scores.final.keys() == {"a", "b"}
        assert fed.lines("final")[0]["workers"] == ["a", "b"]


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
