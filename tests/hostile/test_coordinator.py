"""Messages that lie, told to a running coordinator: it goes on, counts nothing of them, and says why.

A liar has joined two honest workers and was asked with them. What it sends stands in each test; when it has been
answered, or put aside, it leaves, and the run must end with what the two have learned, bit by bit.
"""

import asyncio
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import coordinator.post
from broker import topology
from broker.messages import (
    MESSAGE_BYTES_MAX,
    Attempt,
    Closed,
    Goodbye,
    Message,
    Part,
    Payload,
    Refusal,
    Score,
    Update,
    encode,
)
from broker.tensors import Layout, TensorSpec, view
from tests.hostile.liar import (
    DELTA,
    EXAMPLES,
    HONEST,
    LIAR,
    OF,
    PAYLOAD,
    RUN,
    a_liar_among_two,
    a_voice,
    changed,
    delta_with,
    nested,
    packed,
    parts,
    update,
)
from tests.system.rig import MODEL, Federation, expected, federation, learned, mean_of, start_weights
from workers.work import Done, task_seed

OVER = b"\0" * (MESSAGE_BYTES_MAX + 1)
WIDE = Layout.of([*MODEL.specs[:-1], TensorSpec("zz", "float16", (7,))])
OTHER_SHAPE = tuple(TensorSpec(s.name, s.dtype, (2, 66_000)) if s.name == "w" else s for s in MODEL.specs)
OTHER_TYPE = Layout.of([TensorSpec(s.name, "int32", s.shape) if s.name == "w" else s for s in MODEL.specs]).specs


def only_the_honest(fed: Federation, rounds: int = 2) -> None:
    """The run is what the two honest workers have learned, and the liar is in no sum."""
    assert fed.counted() == [list(HONEST)] * rounds
    assert fed.weights() == expected(fed.store.plan, [HONEST] * rounds)


def verdicts(fed: Federation) -> list[tuple[str, str]]:
    """What the history says of updates that were not counted."""
    return [(line["worker"], line["verdict"]) for line in fed.lines("round")[0]["others"]]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "not msgpack"),
        (b"\xc1 no such byte", "not msgpack"),
        (encode(update())[:-9], "not msgpack"),
        (encode(update()) + b"\0", "not msgpack"),
        (nested(100_000), "not msgpack"),
        (b"\xdd\xff\xff\xff\xff", "not msgpack"),
        (OVER, "over the limit"),
        (b"\x93\1\2\3", "must be a msgpack map"),
        (packed(update(), v=2), "install the same version of fluffle"),
        (packed(update(), kind="order"), "unknown kind"),
        (packed(update(), kind=["update"]), "unknown kind"),
        (packed(update(), surprise=1), "unknown field"),
        (packed(update(), examples=0), "must be within"),
        (packed(update(), examples=-1), "must be within"),
        (packed(update(), examples=2**63), "must be within"),
        (packed(update(), examples=True), "wrong type"),
        (packed(update(), examples=1.5), "wrong type"),
        (packed(update(), version=-1), "must be within"),
        (packed(update(), metrics={"loss": float("nan")}), "must be a finite number"),
        (packed(update(), metrics={"loss": float("inf")}), "must be a finite number"),
        (packed(update(), metrics={f"m{i}": 1.0 for i in range(513)}), "not msgpack within the limits"),
        (packed(update(), metrics={"m" * 201: 1.0}), "must be within"),
        (packed(update(), of={"run": "../../etc/cron.d/x", "round": 1, "attempt": 1}), "must be 1 to 63 of"),
        (packed(update(), payload={"id": "p", "part_bytes": 1, "tensors": []}), "must be within"),
        (packed(update(), worker="a"), "speaks in the name of someone else"),
        (encode(Closed(OF, "go home")), "speaks in the name of someone else"),
        (encode(Goodbye(LIAR, "bye")), "does not belong into the inbox"),
        (packed(Refusal(OF, LIAR, "no"), reason="no" * 5000), "must be within"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_what_cannot_be_read_is_put_aside_with_the_reason(tmp_path: Path, body: bytes, reason: str) -> None:
    """A liar sends bytes that keep no rule into the inbox; an operator finds them, and why, in the dead queue."""
    async with a_liar_among_two(tmp_path, rounds=1) as (fed, liar):
        await liar.say(body)
        (why, kept), *_ = await fed.dead()
        assert reason in why
        assert kept == body[: coordinator.post.DEAD_BYTES_MAX]
        await liar.leave()
        only_the_honest(fed, 1)


@pytest.mark.parametrize("body", [b"\xc1", OVER, nested(50_000), packed(Goodbye("a", "no more"), v="1")])
async def test_signs_of_life_that_cannot_be_read_are_put_aside(tmp_path: Path, body: bytes) -> None:
    """A liar sends garbage where everyone says hello; those who do so properly are heard all the same."""
    async with a_liar_among_two(tmp_path, rounds=1) as (fed, liar):
        await liar.say(body, topology.hello_key(LIAR))
        assert len(await fed.dead()) == 1
        await liar.leave()
        only_the_honest(fed, 1)


async def test_nobody_says_goodbye_for_someone_else(tmp_path: Path) -> None:
    """A liar tells the coordinator that the others have left, under its own routing key."""
    async with a_liar_among_two(tmp_path) as (fed, liar):
        for name in HONEST:
            await liar.say(Goodbye(name, "I am gone"), topology.hello_key(LIAR))
        assert all("in the name of someone else" in why for why, _ in await fed.dead())
        await liar.leave()
        only_the_honest(fed)


@pytest.mark.parametrize(
    ("lie", "verdict", "reason"),
    [
        (update(of=Attempt("other", 1, 1)), "stranger", "it is for the run other"),
        (update(of=Attempt(RUN, 7, 1)), "late", "it is for round 7"),
        (update(of=Attempt(RUN, 0, 0)), "late", "it is for round 0"),
        (update(of=Attempt(RUN, 1, 2)), "late", "attempt 2"),
        (update(version=5), "invalid", "it is made from version 5"),
        (update(payload=Payload("p", PAYLOAD.part_bytes, OTHER_SHAPE)), "invalid", "should be w float32[132000]"),
        (update(payload=Payload("p", PAYLOAD.part_bytes, OTHER_TYPE)), "invalid", "should be w float32[132000]"),
        (update(payload=Payload("p", PAYLOAD.part_bytes, MODEL.specs[:-1])), "invalid", "is missing"),
        (update(payload=Payload("p", PAYLOAD.part_bytes, ())), "invalid", "is missing"),
        (update(payload=Payload("p", PAYLOAD.part_bytes, WIDE.specs)), "invalid", "is missing"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_an_update_of_something_else_is_not_counted(
    tmp_path: Path, lie: Update, verdict: str, reason: str
) -> None:
    """A liar uploads good parts and announces them for another run, round, try, version or model."""
    async with a_liar_among_two(tmp_path, rounds=1) as (fed, liar):
        await liar.upload(parts())
        await liar.say(lie)
        answer = await liar.answer()
        assert answer.verdict == verdict
        assert reason in answer.reason
        await liar.leave()
        only_the_honest(fed, 1)
        assert (LIAR, verdict) in verdicts(fed)
        assert await liar.left() == {}


@pytest.mark.parametrize(("rule", "bends"), [("mean", True), ("trimmed-mean", False), ("median", False)])
async def test_one_of_four_who_is_counted_and_lies_does_not_bend_a_rule_that_leaves_it_out(
    tmp_path: Path, rule: str, bends: bool
) -> None:
    async with federation(tmp_path, rule=rule, cohort=4, quorum=4) as fed:
        for name in ("a", "b", "c"):
            fed.join(name)
        lesson = fed.join("d").lesson
        honest = lesson.run

        async def lie(*words: Any, **others: Any) -> Done:
            done = await honest(*words, **others)
            if done.delta:
                view(done.delta.data[: 4 * 132_000], "float32")[:] = -1e6
            return done

        lesson.run = lie  # type: ignore[method-assign]
        await fed.end()
        assert fed.counted() == [list("abcd")] * 2
        moved = np.abs(view(memoryview(fed.weights())[: 4 * 132_000], "float32")).max()
        assert (moved > 1e5) == bends
        assert moved < 2 or bends, "none of what is learned is longer than 0.7"


async def test_a_stranger_is_not_counted(tmp_path: Path) -> None:
    """Someone whom nobody asked sends a perfect update."""
    async with a_liar_among_two(tmp_path, rounds=1) as (fed, liar):
        await liar.say(update(worker="nobody"), topology.inbox_key(RUN, "nobody"))
        await liar.leave()
        only_the_honest(fed, 1)
        assert verdicts(fed) == [("nobody", "stranger")]


@pytest.mark.parametrize(
    ("pieces", "reason"),
    [
        ([], "3 of its parts did not come"),
        (parts()[:-1], "1 of its parts did not come"),
        ([changed(part, payload="another") for part in parts()], "3 of its parts did not come"),
        ([changed(parts()[0], index=3)], "lies outside"),
        ([changed(parts()[0], index=2**53)], "lies outside"),
        ([changed(parts()[0], index=2)], "has 262144 bytes where"),
        ([changed(parts()[0], data=parts()[0].data[:-1])], "has 262143 bytes where 262144 belong"),
        ([changed(parts()[0], data=b"")], "has 0 bytes"),
        ([changed(parts()[0], checksum=1)], "does not match its checksum"),
        ([b"\xc1 junk", *parts()], "not msgpack"),
        ([OVER, *parts()], "over the limit"),
        ([update(), *parts()], "something that is not a part"),
        (parts(delta_with(float("nan"))), "NaN or infinity"),
        (parts(delta_with(float("inf"))), "NaN or infinity"),
        (parts(delta_with(float("-inf"))), "NaN or infinity"),
        (parts(delta_with(1e38)), "over the limit"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_an_upload_that_lies_is_invalid_and_said_to_be(
    tmp_path: Path, pieces: list[Part | Message | bytes], reason: str
) -> None:
    """A liar announces an update whose parts are missing, foreign, damaged, poisoned or no parts at all."""
    async with a_liar_among_two(tmp_path) as (fed, liar):
        await liar.upload(pieces)
        await liar.say(update())
        answer = await liar.answer()
        while answer.verdict == "resend":
            answer = await liar.answer()
        assert answer.verdict == "invalid"
        assert reason in answer.reason
        await liar.leave()
        only_the_honest(fed)
        assert reason in fed.lines("round")[0]["refused"][LIAR]
        assert await liar.left() == {}


@pytest.mark.parametrize(
    "pieces",
    [
        list(reversed(parts())),
        [*parts(), *parts(), parts()[1]],
        [changed(parts()[0], payload="another"), *parts(), changed(parts()[1], payload="another")],
        [parts()[0], changed(parts()[0], data=b"\1" * len(parts()[0].data)), *parts()[1:]],
    ],
    ids=["reversed", "repeated", "among foreign ones", "overlapped by another"],
)
async def test_parts_in_any_order_and_number_count_once(tmp_path: Path, pieces: list[Part]) -> None:
    """Parts come reversed, twice, among foreign ones, or a second time with other bytes: the first of each counts."""
    async with a_liar_among_two(tmp_path, rounds=1) as (fed, liar):
        await liar.upload(pieces)
        await liar.say(update())
        await liar.say(update())
        await liar.leave()
        weights = start_weights()
        honest = [learned(task_seed(fed.store.plan.seed, 1, name), weights) for name in HONEST]
        assert fed.weights() == mean_of(weights, [*honest, (EXAMPLES, DELTA)])
        assert verdicts(fed) == [(LIAR, "duplicate")]
        assert fed.lines("round")[0]["counted"][LIAR]["examples"] == EXAMPLES
        assert await liar.left() == {}


async def test_a_goodbye_while_parts_arrive_takes_nothing_back(tmp_path: Path) -> None:
    """A liar announces an update, leaves, and only then uploads: it is in the sum or it is not, but never half."""
    async with a_liar_among_two(tmp_path, rounds=1) as (fed, liar):
        fed.patch.setattr(coordinator.post, "STALL_S", 10.0)  # it has time to say so
        fed.patch.setattr(coordinator.post, "LOOK_S", 10.0)
        await liar.say(update())
        await liar.upload(parts()[:2])
        await fed.until(lambda: "liar" in fed.store.now()["why"] and "receiving" in fed.store.now()["why"])
        await liar.say(Goodbye(LIAR, "now"), topology.hello_key(LIAR))
        await liar.say(Refusal(OF, LIAR, "I do not want to"))
        await fed.until(lambda: LIAR not in fed.here())
        await liar.upload(parts()[2:])
        await liar.leave()
        line = fed.lines("round")[0]
        assert sorted(line["counted"]) == ["a", "b", LIAR]
        assert line["refused"] == {}


async def test_parts_that_come_when_no_round_is_open_are_thrown_away(tmp_path: Path) -> None:
    """A liar uploads and announces while the coordinator still waits for workers."""
    async with federation(tmp_path, cohort=2, quorum=2, rounds=1) as fed, a_voice(fed) as liar:
        fed.begin()
        await liar.upload(parts())
        await liar.say(update())
        await fed.until(lambda: bool(fed.coordinator and fed.coordinator.desk.facts.others))
        assert await liar.left() == {}
        for name in HONEST:
            fed.join(name)
        await fed.end()
        only_the_honest(fed, 1)


async def test_an_upload_that_never_ends_is_ended(tmp_path: Path) -> None:
    """A liar announces an update and sends foreign parts for ever: there is always one more to look at."""
    async with a_liar_among_two(tmp_path, rounds=1) as (fed, liar):
        foreign = encode(changed(parts()[2], payload="another"))

        async def pour() -> None:
            while True:
                await liar.upload([foreign])

        pouring = asyncio.create_task(pour())
        await liar.say(update())
        answer = await liar.answer()
        while answer.verdict == "resend":
            answer = await liar.answer()
        pouring.cancel()
        await asyncio.wait([pouring])
        assert answer.verdict == "invalid"
        await liar.leave()
        only_the_honest(fed, 1)


async def test_updates_of_which_nobody_has_the_parts_do_not_make_room_for_each_other_until_the_deadline(
    tmp_path: Path,
) -> None:
    """More of them than are drained at once: each is asked for again, and none keeps the others waiting for ever."""
    names = ("x", "y", "z")
    async with federation(tmp_path, rounds=1, cohort=3, quorum=3) as fed, a_voice(fed) as liar:
        for name in names:
            await liar.link.declare(topology.of_worker(name))
            await liar.hello(worker=name)
        fed.names.update(names)
        serving = fed.begin()
        await fed.until(lambda: bool(fed.coordinator and fed.coordinator.desk.open))
        for name in names:
            await liar.say(update(worker=name), topology.inbox_key(RUN, name))
        await fed.until(lambda: bool(fed.lines("abandoned")))
        assert "3 of its parts did not come" in fed.lines("abandoned")[0]["why"]
        serving.cancel()
        await asyncio.wait([serving])


async def test_an_upload_that_trickles_ends_with_the_time_of_a_round(tmp_path: Path) -> None:
    """A liar keeps the coordinator waiting for each part as long as it is allowed to, and no longer than a round."""
    async with a_liar_among_two(tmp_path, rounds=1, round_s=0.6) as (fed, liar):
        fed.patch.setattr(coordinator.post, "STALL_S", 30.0)
        for place in fed.places.values():
            place.lesson.gate.set()
        await liar.say(update())
        await liar.upload(parts()[:1])
        await fed.until(lambda: bool(fed.lines("round")))
        await liar.leave()
        only_the_honest(fed, 1)
        said = fed.lines("round")[0]["refused"][LIAR]
        assert said in [f"{n} of its parts did not come." for n in (1, 2, 3)]


async def test_a_flood_of_names_does_not_crowd_out_the_invited(tmp_path: Path) -> None:
    """A thousand workers that do not exist say hello; the plan names who takes part, and they are not on it."""
    async with federation(tmp_path, workers=list(HONEST), cohort=2, quorum=2) as fed:
        await flood(fed, lease_s=3000.0)
        for name in HONEST:
            fed.join(name)
        await fed.end()
        only_the_honest(fed)


async def test_a_flood_of_names_is_over_when_their_leases_are(tmp_path: Path) -> None:
    """A thousand workers that do not exist say hello once; where anyone may take part, they cost time and no more."""
    async with federation(tmp_path, cohort=2, quorum=2, round_s=0.2) as fed:
        fed.begin()
        await flood(fed, lease_s=3.0)
        await fed.until(lambda: len(fed.here()) == 1000)
        for name in HONEST:
            fed.join(name)
        await fed.end()
        only_the_honest(fed)


async def flood(fed: Federation, *, lease_s: float) -> None:
    async with a_voice(fed) as liar:
        for number in range(1000):
            await liar.hello(worker=f"ghost-{number}", lease_s=lease_s)


async def test_a_lease_beyond_all_measure_is_put_aside(tmp_path: Path) -> None:
    """A liar says hello for longer than the protocol allows."""
    async with a_liar_among_two(tmp_path, rounds=1) as (fed, liar):
        await liar.hello(lease_s=1e18)
        (why, _), *_ = await fed.dead()
        assert "hello.lease_s must be within" in why
        await liar.leave()
        only_the_honest(fed, 1)


async def test_a_worker_with_a_long_lease_that_says_nothing_costs_a_deadline(tmp_path: Path) -> None:
    """A liar says hello for a year and then nothing: each round waits for it until its deadline, and closes."""
    async with a_liar_among_two(tmp_path, round_s=1.0) as (fed, liar):
        await liar.hello(lease_s=365 * 24 * 3600.0)
        for place in fed.places.values():
            place.lesson.gate.set()
        await fed.end()
        only_the_honest(fed)
        assert all(line["seconds"] >= 0.9 for line in fed.lines("round"))


async def test_a_flood_of_refusals_refuses_once(tmp_path: Path) -> None:
    """A liar refuses a thousand times, for others too; the history holds its own refusal, once."""
    async with a_liar_among_two(tmp_path, rounds=1) as (fed, liar):
        for number in range(1000):
            await liar.say(Refusal(OF, LIAR, "no" * 500))
            await liar.say(Refusal(OF, f"ghost-{number}", "no"), topology.inbox_key(RUN, f"ghost-{number}"))
        await liar.leave()
        only_the_honest(fed, 1)
        assert list(fed.lines("round")[0]["refused"]) == [LIAR]
        assert len((fed.run / "history.jsonl").read_bytes()) < 5000


async def test_a_flood_of_updates_does_not_fill_the_history(tmp_path: Path) -> None:
    """A liar sends a thousand updates of rounds that never were."""
    async with a_liar_among_two(tmp_path, rounds=1) as (fed, liar):
        for number in range(1000):
            await liar.say(update(of=Attempt(RUN, 1000 + number, 1)))
        await liar.leave()
        only_the_honest(fed, 1)
        assert len(verdicts(fed)) < 50


async def test_a_flood_of_scores_is_noted_once(tmp_path: Path) -> None:
    """A worker that only evaluates scores version 0 a thousand times."""
    async with a_liar_among_two(tmp_path, rounds=1) as (fed, liar):
        await liar.hello(worker="judge", trains=False)
        for number in range(1000):
            await liar.say(Score(OF, "judge", 0, {"loss": float(number)}), topology.inbox_key(RUN, "judge"))
        await fed.until(lambda: bool(fed.lines("score")))
        await liar.say(Goodbye("judge", "done"), topology.hello_key("judge"))
        await liar.leave()
        only_the_honest(fed, 1)
        assert len(fed.lines("score")) == 1


async def test_metrics_beyond_all_numbers_are_kept_out_of_the_means(tmp_path: Path) -> None:
    """A liar reports as many metrics as it may, each as large as a number can be."""
    metrics = {f"metric-{number}": 1.7e308 for number in range(512)}
    async with a_liar_among_two(tmp_path, rounds=1) as (fed, liar):
        await liar.say(Score(OF, LIAR, 0, {**dict(itertools.islice(metrics.items(), 511)), "examples": 1e308}))
        await liar.upload(parts())
        await liar.say(update(metrics=metrics))
        await liar.leave()
        line = fed.lines("round")[0]
        assert sorted(line["counted"]) == ["a", "b", LIAR]
        assert list(line["metrics"]) == ["loss"]
        json.dumps(line, allow_nan=False)
