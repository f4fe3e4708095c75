"""Attacks with a story, on a running coordinator: each costs at most its own contribution, and the reason is kept.

Beside `test_coordinator.py`, which has the lies that are one message or one upload: here they aim at others' rounds,
at memory, at terminals, or at whoever reads the history. Again a liar was asked beside two honest workers.
"""

import asyncio
import dataclasses
import logging
import math
import re
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import coordinator.post
import coordinator.roster
import coordinator.service
from broker import daemon, topology
from broker.errors import LearnerFailed, UsageError, WireError
from broker.fields import legible
from broker.formats import FORMATS, format_of
from broker.messages import (
    EXAMPLES_MAX,
    MESSAGE_BYTES_MAX,
    Attempt,
    Claim,
    Payload,
    Refusal,
    Score,
    Secure,
    Task,
    Update,
    decode,
    encode,
)
from broker.norms import SLACK, squares
from broker.parts import split
from broker.tensors import TensorSpec, view
from coordinator.round import REISSUES_MAX
from coordinator.store import Store
from fluffle import app
from tests.hostile.liar import (
    ASKED,
    DELTA,
    HONEST,
    LIAR,
    OF,
    PAYLOAD,
    RUN,
    Liar,
    a_liar_among_two,
    a_voice,
    changed,
    packed,
    parts,
    update,
)
from tests.memory import MemoryBroker, _Delivery
from tests.system.rig import (
    IDENTITIES,
    KEYS,
    MODEL,
    Federation,
    expected,
    federation,
    learned,
    mean_of,
    start_weights,
)
from workers import weights
from workers.learner import Learner
from workers.masking import Member
from workers.secrecy import check
from workers.task import Place, do
from workers.work import Who, Work, task_seed

ESCAPE = "\x1b]0;owned\x07\x1b[2J\x1b[31mround 9 closed: 9/9\r\u202e\u2028\x9b1mx"
FLOATS = [segment for segment in MODEL.segments if segment.dtype != "int64"]


def only_the_honest(fed: Federation, rounds: int = 1) -> None:
    """The run is what the two honest workers have learned, to the last bit, and the liar is in no sum."""
    assert fed.counted() == [list(HONEST)] * rounds
    assert fed.weights() == expected(fed.store.plan, [HONEST] * rounds)


def delta_of(size: float) -> bytes:
    """A delta in which every float is this one; what a counter holds is 0."""
    delta = bytearray(MODEL.size_bytes)
    for segment in FLOATS:
        view(memoryview(delta)[segment.start : segment.stop], segment.dtype)[:] = size
    return bytes(delta)


def length(delta: bytes) -> float:
    return math.sqrt(squares(FORMATS["float32"].runs(MODEL, memoryview(delta))))


def status(fed: Federation) -> str:
    shown = CliRunner().invoke(app, ["status", str(fed.run)])
    assert shown.exit_code == 0, (shown.output, shown.exception)
    return shown.output


async def verdict_of(liar: Liar, lie: Update) -> tuple[str, str]:
    await liar.say(lie)
    answer = await liar.answer()
    while answer.verdict == "resend":
        answer = await liar.answer()
    return answer.verdict, answer.reason


# -- how far one can move the model -------------------------------------------------------------------------------


def called_by(fed: Federation) -> str:
    """What an honest worker in the liar's place would call its update in the round that is open."""
    assert fed.coordinator
    assert fed.coordinator.desk.open
    return f"{fed.coordinator.desk.open.called}/{LIAR}/0"


@pytest.mark.parametrize("name", list(FORMATS))
async def test_an_update_longer_than_the_plan_allows_is_refused_with_both_numbers(tmp_path: Path, name: str) -> None:
    """A liar does not scale its update down, in whatever format: the others' bits are as if it were not there."""
    fmt = format_of(name, keep=0.1)
    settings = {"format": name, "keep": 0.1} if name == "top-k" else {"format": name}
    async with a_liar_among_two(tmp_path, rounds=1, clip=1.0, **settings) as (fed, liar):
        lie = fmt.pack(MODEL, memoryview(delta_of(0.1)), residual=None, dice=np.random.default_rng(1))
        payload = Payload(PAYLOAD.id, PAYLOAD.part_bytes, fmt.layout(MODEL).specs)
        await liar.upload(split(payload, lie))
        said, reason = await verdict_of(liar, update(payload=payload))
        found = math.sqrt(squares(fmt.runs(MODEL, lie)))
        assert (said, reason) == ("invalid", f"its norm is {found:.6g}, and the plan allows 1 (clip).")
        await liar.leave()
        assert fed.counted() == [list(HONEST)]
        line = fed.lines("round")[0]
        assert line["refused"][LIAR] == reason
        assert line["struck"] == {LIAR: {"times": 1, "why": reason}}


async def test_more_examples_than_the_plan_allows_are_refused(tmp_path: Path) -> None:
    """A liar claims half a billion rows, so that nobody else's count."""
    async with a_liar_among_two(tmp_path, rounds=1, examples_max=100) as (fed, liar):
        await liar.upload(parts())
        said, reason = await verdict_of(liar, update(examples=EXAMPLES_MAX))
        assert (said, reason) == ("invalid", "it counts 536870911 examples, and examples_max is 100")
        await liar.leave()
        only_the_honest(fed)
        assert fed.lines("round")[0]["refused"][LIAR] == reason


@pytest.mark.parametrize("examples_max", [1, 7, 60])
async def test_a_liar_that_keeps_to_the_bounds_moves_the_model_by_no_more_than_the_plan_says(
    tmp_path: Path, examples_max: int
) -> None:
    """Its update is as long, and counts as much, as it may; the honest ones have hardly learned anything."""
    clip = 2.0
    async with a_liar_among_two(tmp_path, rounds=1, clip=clip, quorum=3, examples_max=examples_max) as (fed, liar):
        plan = fed.store.plan
        reach = clip * examples_max / (examples_max + plan.least - 1)  # as `Plan` says
        lie = delta_of(clip / math.sqrt(133_000) * (1 + SLACK / 2))
        assert clip < length(lie) < clip * (1 + SLACK)
        await liar.upload(parts(lie))
        await liar.say(update(examples=examples_max))
        await liar.leave()
        assert fed.counted() == [["a", "b", LIAR]]
        examples = {worker: told["examples"] for worker, told in fed.lines("round")[0]["counted"].items()}
        assert max(examples.values()) == examples[LIAR] == examples_max
        honest = [learned(task_seed(plan.seed, 1, name), start_weights()) for name in HONEST]
        assert min(length(delta) for _, delta in honest) > clip, "they had to scale theirs down"
        share = examples_max / sum(examples.values())
        others = 2 * clip * (1 - share)
        moved = length(bytes(fed.weights()))
        assert share * clip <= reach
        assert moved <= share * clip * (1 + SLACK) + others
        # what it adds beside updates of nothing, at the quorum, with one example each: the worst there is
        nothing = bytes(MODEL.size_bytes)
        worst = mean_of(start_weights(), [(examples_max, lie), (1, nothing), (1, nothing)])
        assert reach * 0.99 <= length(bytes(worst)) <= reach * (1 + SLACK)


async def test_honest_workers_scale_their_updates_down_and_are_counted(tmp_path: Path) -> None:
    """The control of the tests above: with a clip that all exceed, all are counted."""
    async with a_liar_among_two(tmp_path, rounds=2, clip=0.5, examples_max=9) as (fed, liar):
        await liar.leave()
        assert fed.counted() == [list(HONEST)] * 2
        assert length(bytes(fed.weights())) <= 2 * 0.5 * (1 + SLACK)
        assert all(told["examples"] <= 9 for line in fed.lines("round") for told in line["counted"].values())


async def test_denormals_are_added_exactly(tmp_path: Path) -> None:
    """A liar sends the smallest numbers there are, which are slow on some machines and vanish on others."""
    lie = delta_of(1e-45)
    async with a_liar_among_two(tmp_path, rounds=1) as (fed, liar):
        await liar.upload(parts(lie))
        await liar.say(update(examples=EXAMPLES_MAX))
        await liar.leave()
        honest = [learned(task_seed(fed.store.plan.seed, 1, name), start_weights()) for name in HONEST]
        assert fed.counted() == [["a", "b", LIAR]]
        assert fed.weights() == mean_of(start_weights(), [*honest, (EXAMPLES_MAX, lie)])


@pytest.mark.parametrize("down", ["full", "int8", "bfloat16"])
async def test_whoever_drives_a_float16_to_its_end_ends_no_round(tmp_path: Path, down: str) -> None:
    """A liar sends the largest float16 in every round: an infinite sum would be one that no round can close with."""
    lie = bytearray(MODEL.size_bytes)
    half = next(segment for segment in MODEL.segments if segment.dtype == "float16")
    view(memoryview(lie)[half.start : half.stop], "float16")[:] = 65504
    async with a_liar_among_two(tmp_path, rounds=2, cohort=3, quorum=3, down=down) as (fed, liar):
        for number in (1, 2):
            of = Attempt(RUN, number, 1)
            await fed.until(lambda of=of: fed.store.now().get("round") == of.round)  # type: ignore[misc]
            payload = Payload(called_by(fed), PAYLOAD.part_bytes, MODEL.specs)
            await liar.upload(split(payload, memoryview(lie)))
            await liar.say(update(of=of, version=number - 1, examples=EXAMPLES_MAX, payload=payload))
            for place in fed.places.values():
                place.lesson.gate.set()
            await fed.until(lambda number=number: len(fed.lines("round")) == number)  # type: ignore[misc]
        await liar.leave()
        assert fed.counted() == [["a", "b", LIAR]] * 2
        assert fed.lines("abandoned") == []


# -- the same again, and other people's things --------------------------------------------------------------------


async def test_an_update_said_again_in_the_next_round_is_late(tmp_path: Path) -> None:
    """A liar is counted in round 1, and replays parts and update, as they were, in round 2."""
    async with a_liar_among_two(tmp_path, rounds=2) as (fed, liar):
        await liar.upload(parts())
        await liar.say(update())
        for name in HONEST:
            fed.places[name].lesson.gate.set()
        await fed.until(lambda: len(fed.lines("round")) == 1)
        for _ in range(3):
            await liar.upload(parts())
            await liar.say(update())
        await liar.leave()
        assert fed.counted() == [["a", "b", LIAR], ["a", "b"]]
        weights = start_weights()
        for number, more in ((1, [(10, DELTA)]), (2, [])):
            honest = [learned(task_seed(fed.store.plan.seed, number, name), weights) for name in HONEST]
            weights = mean_of(weights, [*honest, *more])
        assert fed.weights() == weights


async def test_an_update_that_names_anothers_parts_gets_none_of_them(tmp_path: Path) -> None:
    """A liar announces what an honest worker has uploaded as its own: only its own queue is looked into."""
    async with a_liar_among_two(tmp_path, rounds=1) as (fed, liar):
        stolen = f"{ASKED}/a/00000000"
        said, reason = await verdict_of(liar, update(payload=dataclasses.replace(PAYLOAD, id=stolen)))
        assert (said, reason) == ("invalid", "3 of its parts did not come.")
        await liar.leave()
        only_the_honest(fed)
        assert fed.lines("round")[0]["struck"] == {}, "that nothing came is a loss, and no lie"


async def test_a_thousand_names_that_claim_a_task_leave_nothing_behind(tmp_path: Path) -> None:
    """Somebody claims the task under a thousand names that nobody has heard of."""
    async with a_liar_among_two(tmp_path, rounds=1) as (fed, liar):
        for number in range(1000):
            name = f"ghost-{number}"
            await liar.say(Claim(OF, name, "x" * 4096), topology.inbox_key(RUN, name))
        await liar.leave()
        only_the_honest(fed)
        assert fed.coordinator
        assert fed.coordinator.desk._holds.keys() <= {*HONEST, LIAR}


async def test_names_that_come_go_and_claim_a_task_leave_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody is here under one name after another, each for a moment, and says that it has the task."""
    monkeypatch.setattr("coordinator.desk.WORKERS_MAX", 20)
    async with a_liar_among_two(tmp_path, rounds=1) as (fed, liar):
        assert fed.coordinator
        desk = fed.coordinator.desk
        assert desk.open
        here, long = desk.open, "x" * 4096
        for number in range(60):
            name = f"ghost-{number}"
            await liar.hello(worker=name, incarnation=long, lease_s=0.01, doing=OF)
            await fed.until(lambda name=name: fed.incarnation(name) == long)  # type: ignore[misc]
            await liar.say(Claim(OF, name, long), topology.inbox_key(RUN, name))
        await fed.until(lambda: {*fed.here()} == {*HONEST, LIAR})
        assert {*here.sent_to, *here.round.claimed, *here.round._lost} <= {*HONEST, LIAR}
        assert len(desk._holds) <= 20
        await liar.leave()
        only_the_honest(fed)


async def test_a_thousand_strangers_cost_no_question_to_the_broker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody announces updates under a thousand names: their queues are not emptied one by one after the round."""
    purged: list[str] = []
    usual = coordinator.post.Post.drop_upload

    async def drop(post: coordinator.post.Post, worker: str) -> None:
        purged.append(worker)
        await usual(post, worker)

    monkeypatch.setattr(coordinator.post.Post, "drop_upload", drop)
    async with a_liar_among_two(tmp_path, rounds=1) as (fed, liar):
        for number in range(1000):
            name = f"ghost-{number}"
            await liar.say(update(worker=name), topology.inbox_key(RUN, name))
        await liar.leave()
        only_the_honest(fed)
        assert {*purged} <= {*HONEST, LIAR}
        assert len(fed.lines("round")[0]["others"]) < 50


async def test_names_without_number_do_not_crowd_out_who_is_on_the_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The roster is full of workers that do not exist, with leases of an hour, when those who are invited come."""
    monkeypatch.setattr(coordinator.roster, "WORKERS_MAX", 50)
    async with federation(tmp_path, workers=list(HONEST), cohort=2, quorum=2, rounds=1) as fed:
        async with a_voice(fed) as liar:
            for number in range(60):
                await liar.hello(worker=f"ghost-{number}", lease_s=3000.0)
            fed.begin()
            await fed.until(lambda: len(fed.here()) == 50)
            for name in HONEST:
                fed.join(name)
            await fed.end()
        only_the_honest(fed)


async def test_who_loses_its_task_without_end_is_sent_it_so_often_and_no_more(tmp_path: Path) -> None:
    """A liar says hello as one incarnation after another: each wants the whole version again."""
    async with a_liar_among_two(tmp_path, rounds=1) as (fed, liar):
        for number in range(REISSUES_MAX + 20):
            await liar.hello(incarnation=f"i{number}")
            await fed.until(lambda n=number: fed.incarnation(LIAR) == f"i{n}")  # type: ignore[misc]
            await asyncio.sleep(0)
        await fed.until(lambda: LIAR in fed.store.now().get("refused", {}))
        await liar.leave()
        only_the_honest(fed)
        assert "has lost its task" in fed.lines("round")[0]["refused"][LIAR]


# -- time and memory ----------------------------------------------------------------------------------------------


async def test_uploads_that_trickle_through_every_room_do_not_keep_others_out(tmp_path: Path) -> None:
    """As many liars as there is room for uploads send a part now and then: those whose parts are there go first."""
    liars = [f"slow-{number}" for number in range(coordinator.service.DRAINS)]
    async with federation(tmp_path, cohort=4, quorum=2, rounds=1, gather_s=5.0, round_s=600.0) as fed:
        fed.patch.setattr(coordinator.post, "STALL_S", 30.0)
        fed.patch.setattr(coordinator.post, "LOOK_S", 0.05)
        fed.patch.setattr(coordinator.service, "FINAL_S_MAX", 0.1)
        async with a_voice(fed) as voice:
            for name in liars:
                fed.names.add(name)
                await voice.link.declare(topology.of_worker(name))
                await voice.hello(worker=name)
            for name in HONEST:
                fed.join(name).lesson.gate.clear()
            await fed.until(lambda: all(place.worker._incarnation for place in fed.places.values()))
            fed.begin()
            await fed.until(lambda: fed.store.now().get("round") == 1)
            for name in liars:
                await voice.say(update(worker=name), topology.inbox_key(RUN, name))
            await fed.until(lambda: str(fed.store.now()["waiting"]).count("being received") == len(liars))
            trickling = asyncio.create_task(trickle(voice, liars))
            for place in fed.places.values():
                place.lesson.gate.set()
            await fed.until(lambda: fed.store.now().get("counted") == ["a", "b"])
            trickling.cancel()
            await asyncio.wait([trickling])
            for name in liars:  # they would be waited for until their time is up
                await voice.upload_of(name, [b"\xc1"])
            await fed.end()
        only_the_honest(fed)
        assert sorted(fed.lines("round")[0]["refused"]) == liars


async def trickle(voice: Liar, liars: list[str]) -> None:
    while True:
        for name in liars:
            await voice.upload_of(name, [parts()[0]])
        await asyncio.sleep(0.01)


async def test_thousands_of_tiny_parts_are_passed_over(tmp_path: Path) -> None:
    """A liar fills its queue with parts that hold nothing and belong to nothing, in front of its own."""
    tiny = changed(parts()[0], payload="x", data=b"")
    async with a_liar_among_two(tmp_path, rounds=1) as (fed, liar):
        await liar.upload([encode(tiny)] * 3000 + [encode(part) for part in parts()])
        await liar.say(update())
        await liar.leave()
        assert fed.counted() == [["a", "b", LIAR]]
        assert await liar.left() == {}


AMPLIFYING = {
    "as many lists as bytes": b"\xdc\x4e\x20" + (b"\xdc\x4e\x20" + b"\x90" * 20_000) * 200,
    "short texts": b"\xdd\x00\x00\x4e\x20" + (b"\xdc\x03\x00" + b"\xa2ab" * 768) * 500,
    "maps of maps": b"\xdc\x4e\x20" + b"\x81\xa1a\x80" * 20_000,
    "extensions": b"\xdc\x4e\x20" + b"\xc7\x00\x01" * 20_000,
    "a length of four billion": b"\xdd\xff\xff\xff\xff" + b"\xc0" * 1000,
    "a map of four billion": b"\xdf\xff\xff\xff\xff\xa1a",
    "a text of four billion": b"\xdb\xff\xff\xff\xffabc",
    "bytes of four billion": b"\xc6\xff\xff\xff\xffabc",
    "deep": b"\x91" * 4_000_000,
    "deep maps": b"\x81\xa1a" * 1_000_000,
}


@pytest.mark.parametrize("body", list(AMPLIFYING.values()), ids=list(AMPLIFYING))
def test_a_message_that_would_unfold_into_more_than_memory_does_not(body: bytes) -> None:
    """A few bytes promise millions of objects; what is made of them before they are refused stays small."""
    body = body[:MESSAGE_BYTES_MAX]
    tracemalloc.start()
    try:
        with pytest.raises(WireError):
            decode(body)
        assert tracemalloc.get_traced_memory()[1] < 128 * 1024 * 1024
    finally:
        tracemalloc.stop()


async def test_only_so_much_mail_is_here_at_a_time_however_large_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A liar fills the inbox with the largest messages there may be; they wait at the broker, not in our memory."""
    asked: dict[str, int] = {}
    usual = MemoryBroker.consume

    def consume(broker: MemoryBroker, queue: str, *, prefetch: int, alone: bool) -> Any:
        asked[queue] = prefetch
        return usual(broker, queue, prefetch=prefetch, alone=alone)

    monkeypatch.setattr(MemoryBroker, "consume", consume)
    async with a_liar_among_two(tmp_path, rounds=1) as (fed, liar):
        for _ in range(20):
            await liar.say(b"\0" * MESSAGE_BYTES_MAX)
        await liar.leave()
        only_the_honest(fed)
        assert asked[topology.inbox_queue(RUN)] == 2 * 3 + coordinator.post.INBOX_SPARE
        assert asked[topology.hello_queue(RUN)] == coordinator.post.HELLO_PREFETCH
        (other,) = [each for each in fed.lines("round")[0]["others"] if each["verdict"] == "invalid"]
        assert (other["worker"], other["times"]) == (LIAR, 20)


async def test_a_header_of_twenty_thousand_tensors_is_invalid(tmp_path: Path) -> None:
    """A liar announces an update of another model, with as many tensors as may be named."""
    specs = tuple(TensorSpec(f"{'t' * 60}{number:06}", "float32", (1,)) for number in range(20_000))
    async with a_liar_among_two(tmp_path, rounds=1) as (fed, liar):
        said, reason = await verdict_of(liar, update(payload=Payload(PAYLOAD.id, PAYLOAD.part_bytes, specs)))
        assert said == "invalid"
        assert "is missing" in reason
        await liar.leave()
        only_the_honest(fed)


# -- words --------------------------------------------------------------------------------------------------------


async def test_a_refusal_of_a_megabyte_is_put_aside_and_the_history_says_so(tmp_path: Path) -> None:
    """A liar refuses at length."""
    async with a_liar_among_two(tmp_path, rounds=1) as (fed, liar):
        await liar.say(packed(Refusal(OF, LIAR, "no"), reason="n" * 1_000_000))
        (why, kept), *_ = await fed.dead()
        assert "not msgpack within the limits" in why
        assert len(kept) == coordinator.post.DEAD_BYTES_MAX
        await liar.leave()
        only_the_honest(fed)
        assert {"worker": LIAR, "verdict": "invalid", "reason": why} in fed.lines("round")[0]["others"]
        assert (fed.run / "history.jsonl").stat().st_size < 5000


async def test_escape_sequences_of_a_reason_reach_neither_status_nor_history(tmp_path: Path) -> None:
    """A liar refuses in the language of terminals: clear the screen, and say that all is well."""
    async with a_liar_among_two(tmp_path, rounds=1) as (fed, liar):
        await liar.say(Refusal(OF, LIAR, f"[/bold][red]no {ESCAPE}\nround 9: all is well"))
        await fed.until(lambda: LIAR in fed.store.now().get("refused", {}))
        during = status(fed)
        await liar.leave()
        only_the_honest(fed)
        for shown in (during, status(fed)):
            assert "[/bold][red]no \\x1b]0;owned" in shown
            assert all(c.isprintable() or c == "\n" for c in shown)
            assert not any(line.startswith("round 9") for line in shown.splitlines())
        assert (fed.run / "history.jsonl").read_bytes().isascii()
        assert b"\x1b" not in (fed.run / "history.jsonl").read_bytes()


async def test_metrics_named_like_markup_do_not_break_status(tmp_path: Path) -> None:
    """A liar's metrics are called [/], [link=…] and worse, and are in the means that everybody looks at."""
    named = {"[/]": 1.0, "[bold": 2.0, "[link=http://evil]x": 3.0, ESCAPE: 4.0, "": 5.0}
    async with a_liar_among_two(tmp_path, rounds=2) as (fed, liar):
        await liar.say(Score(OF, LIAR, 0, named))
        await liar.upload(parts())
        await liar.say(update(metrics=named))
        await liar.leave()
        assert fed.counted()[0] == ["a", "b", LIAR]
        shown = status(fed)
        assert "[/] 1" in shown.replace("\n", "")
        assert "\x1b" not in shown


@contextmanager
def logging_to_stderr() -> Iterator[None]:
    """As a daemon logs."""
    before = logging.getLogger().handlers[:]
    try:
        daemon.start_log()
        yield
    finally:
        for each in logging.getLogger().handlers[:]:
            logging.getLogger().removeHandler(each)
        for each in before:
            logging.getLogger().addHandler(each)


def test_a_flood_of_reasons_does_not_fill_the_disk_with_log(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody says a thousand things at length that are logged; what else is logged is there, and later all is."""
    now = 100.0
    monkeypatch.setattr("broker.daemon.time", SimpleNamespace(monotonic=lambda: now))
    with logging_to_stderr():
        for number in range(1001):
            now += number // 1000 * daemon.LOG_S
            logging.getLogger("x").warning("%s refused: %s", number, "\x1b" * 4096)
        logging.getLogger("x").warning("round 9 closed")
    *flood, last, other = capsys.readouterr().err.splitlines()
    assert sum(map(len, flood)) < daemon.LOG_CHARS + 2 * daemon.LINE_MAX
    assert flood[0][20:].startswith("0 refused")
    assert flood[-1].endswith(" … and no more like this for 60 s")
    assert last[20:].startswith("1000 refused")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d round 9 closed", other)


def test_log_lines_hold_nothing_that_moves_a_cursor_or_looks_like_another_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Whatever a worker, a coordinator or a broker says, and be it a routing key, is one line of the log."""
    with logging_to_stderr():
        logging.getLogger("x").warning("%s refused: %s", "a.\x1b[2J", f"{ESCAPE}\n12:00:00 round 9 closed")
    said = capsys.readouterr().err
    first, second = said.splitlines()
    assert "a.\\x1b[2J refused: \\x1b]0;owned\\x07" in first
    assert second == "        12:00:00 round 9 closed"
    assert said.replace("\n", "").isprintable()


def test_what_can_be_seen_stays_as_it_is() -> None:
    assert legible("die Größe, 大きさ und 😀") == "die Größe, 大きさ und 😀"
    assert legible("\ud800\0\t") == "\\ud800\\x00\\t"


def test_a_learner_with_a_hundred_thousand_metrics_is_a_refusal() -> None:
    """The user's own learner returns more than travels."""
    metrics = dict.fromkeys(map(str, range(100_000)), 1.0)
    model = torch.nn.Linear(2, 1)
    learner = Learner("mine", lambda: model, lambda source: source, lambda *_: (3, metrics), lambda *_: {})
    place = Place(learner, model, None, weights.layout_of(model))
    work = Work(train=True, evaluate=False, seed=1, settings={}, round=1)
    with pytest.raises(LearnerFailed, match="returned 100000 metrics: at most 512 travel"):
        do(place, work, layout=place.layout, received=bytes(12))


# -- three strikes ------------------------------------------------------------------------------------------------


@pytest.fixture
def vouched(monkeypatch: pytest.MonkeyPatch) -> None:
    """The broker vouches for who has sent what."""
    monkeypatch.setattr(_Delivery, "user", property(lambda delivery: delivery.key.rsplit(".", 1)[-1]))


@pytest.mark.usefixtures("vouched")
async def test_who_sends_garbage_three_times_is_rested_though_its_update_is_good(tmp_path: Path) -> None:
    """A liar sends three messages that cannot be read beside an update that is counted: it is out of the next two."""
    async with a_liar_among_two(tmp_path, rounds=4) as (fed, liar):
        assert fed.coordinator
        fed.coordinator.post.link.vouched = True
        for body in (b"\xc1", b"", packed(update(), examples=2**63)):
            await liar.say(body)
        await liar.upload(parts())
        await liar.say(update())
        for name in HONEST:
            fed.places[name].lesson.gate.set()
        await fed.until(lambda: len(fed.lines("round")) == 3)
        shown = status(fed)
        await liar.leave()
        first, second, third, _ = fed.lines("round")
        assert first["struck"][LIAR]["times"] == 3
        assert "must be within" in first["struck"][LIAR]["why"]
        assert first["rested"] == {LIAR: {"rounds": 2, "why": first["struck"][LIAR]["why"]}}
        assert [line["cohort"] for line in (first, second, third)] == [["a", "b", LIAR], ["a", "b"], ["a", "b"]]
        assert f"round 1: {LIAR} began to rest for 2 rounds: update.examples must be within" in shown


async def test_what_comes_under_anothers_name_is_held_against_nobody(tmp_path: Path) -> None:
    """Where nobody vouches for a sender, a liar sends garbage under the routing key of an honest worker."""
    async with a_liar_among_two(tmp_path, rounds=3) as (fed, liar):
        for _ in range(10):
            await liar.say(b"\xc1", topology.inbox_key(RUN, "a"))
            await liar.say(b"\xc1", topology.hello_key("a"))
        await liar.say(b"\xc1", "hello.\x1b[2J")
        found: list[str] = []
        while len(found) < 21:
            found += [why for why, _ in await fed.dead()]
        await liar.leave()
        only_the_honest(fed, 3)
        line = fed.lines("round")[0]
        assert (line["struck"], line["rested"]) == ({}, {})
        assert {each["worker"] for each in line["others"]} == {"a", "somebody"}


async def test_three_updates_that_lie_in_a_run_are_three_strikes_whatever_came_between(tmp_path: Path) -> None:
    """A liar lies in rounds 1, 3 and 5, and is honest in between, so that it never fails three times on end."""
    async with a_liar_among_two(tmp_path, rounds=6, round_s=600.0) as (fed, liar):
        fed.patch.setattr(coordinator.service, "FINAL_S_MAX", 0.1)
        for name in HONEST:
            fed.places[name].lesson.gate.set()
        for number in range(1, 6):
            await fed.until(lambda number=number: fed.store.now().get("round") == number)  # type: ignore[misc]
            payload = dataclasses.replace(PAYLOAD, id=called_by(fed))
            told = update(of=Attempt(RUN, number, 1), version=number - 1, payload=payload)
            pieces = list(split(payload, memoryview(DELTA)))
            await liar.upload(pieces if number % 2 == 0 else [changed(pieces[0], checksum=1)])
            await liar.say(told)
            await fed.until(lambda number=number: len(fed.lines("round")) == number)  # type: ignore[misc]
        await fed.end()
        lines = fed.lines("round")
        assert [LIAR in line["counted"] for line in lines] == [False, True, False, True, False, False]
        assert [line["struck"].get(LIAR, {}).get("times", 0) for line in lines] == [1, 0, 1, 0, 1, 0]
        assert [list(line["rested"]) for line in lines] == [[], [], [], [], [LIAR], []]
        assert lines[5]["cohort"] == ["a", "b"]
        later = Store.open(fed.run).history()
        rests = coordinator.roster.Rests()
        rests.remember(later)
        assert rests.present[LIAR].rounds == 1, "the coordinator after this one knows"


def test_a_task_cannot_ask_for_what_no_bound_can_be() -> None:
    """A coordinator that lies asks for updates within a bound that is no number, or for no examples at all."""
    task = Task(OF, "train", 0, 9.0, 1, {}, PAYLOAD)
    for lie in (
        {"clip": float("nan")},
        {"clip": -1.0},
        {"clip": 1e300},
        {"examples_max": 0},
        {"examples_max": 2**40},
    ):
        with pytest.raises(WireError, match="task"):
            decode(packed(task, **lie))


def test_a_worker_does_no_secure_task_whose_ring_has_no_room_and_no_other_if_it_is_a_member() -> None:
    member = Who("a", "lesson", member=Member("a", IDENTITIES["a"], KEYS))
    task = Task(OF, "train", 0, 9.0, 1, {}, PAYLOAD, clip=4.0, examples_max=64, secure=Secure(32, 5))
    check(task, member)
    for clip, said in ((0.0, "clip is 0: set it above 0"), (1e9, "a ring of 32 bits is too small")):
        with pytest.raises(UsageError, match=said):
            check(dataclasses.replace(task, clip=clip), member)
    with pytest.raises(LearnerFailed, match="an invitation with a key for it, or --roster and --identity"):
        check(task, Who("a", "lesson"))
    with pytest.raises(LearnerFailed, match="the plan must say privacy = secure"):
        check(dataclasses.replace(task, secure=None), member)
