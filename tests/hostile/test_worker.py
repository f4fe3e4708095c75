"""Messages that lie, told to a running worker: it goes on, and the next honest task is done as if nothing had been.

Here the coordinator is the liar: written by hand, with the queues of a run. After each lie it sends an honest task,
and must be given the update that an honest coordinator would be given.
"""

import asyncio
import dataclasses
import errno
import gc
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pytest

from broker import topology
from broker.chain import check
from broker.link import Lane, Outgoing
from broker.messages import (
    MESSAGE_BYTES_MAX,
    PART_BYTES_MIN,
    Answer,
    Attempt,
    Call,
    Claim,
    Closed,
    Message,
    Noise,
    Part,
    Payload,
    Ready,
    Refusal,
    Secure,
    Task,
    Update,
    decode,
    encode,
)
from broker.pact import check_advert, context, model_digest, roster_digest
from broker.parts import Assembly, split
from broker.pinned import Roster, public_of
from broker.tensors import Layout, TensorSpec
from tests.hostile.liar import RUN, changed, nested, packed
from tests.memory import MemoryLink
from tests.system.rig import (
    BOUND_S,
    IDENTITIES,
    KEYS,
    MODEL,
    OPERATOR,
    Federation,
    Place,
    federation,
    learned,
    start_weights,
)
from workers.ledger import SUFFIX
from workers.masking import Member
from workers.outbox import CALLS_MAX, SENT_MAX, SENT_MAX_OF_ALL
from workers.post import PREFETCH
from workers.service import LANDING_MAX, WAITING_MAX
from workers.spool import HELD_MAX
from workers.work import task_seed

WORKER = "a"
LIE, HONEST = Attempt(RUN, 1, 1), Attempt(RUN, 2, 1)
OF_WORKER = topology.of_worker
Kind = TypeVar("Kind", Update, Refusal, Ready)


def task(of: Attempt, **changes: object) -> Task:
    """An honest task, with changes."""
    payload = Payload(f"{of.round}/{of.attempt}", PART_BYTES_MIN, MODEL.specs)
    return dataclasses.replace(Task(of, "train", of.round - 1, 30.0, 7, {}, payload), **changes)  # type: ignore[arg-type]  # a lie need not have the right type


def parts(of: Task) -> list[Part]:
    """Version 0, as the parts of a task."""
    return list(split(dataclasses.replace(of.payload, tensors=MODEL.specs), memoryview(start_weights())))


@dataclass(slots=True)
class FalseCoordinator:
    """Sends what it is told to, and hears what the worker says."""

    link: MemoryLink
    place: Place

    async def send(self, *messages: bytes | Message) -> None:
        """Into the queue of tasks."""
        await self._publish(topology.DOWN, messages)

    async def tell(self, *messages: bytes | Message) -> None:
        """Into the queue of answers."""
        await self._publish(topology.CONTROL, messages)

    async def _publish(self, exchange: str, messages: tuple[bytes | Message, ...]) -> None:
        for message in messages:
            body = message if isinstance(message, bytes) else encode(message)
            await self.link.publish(Outgoing(exchange, (WORKER,), body))

    async def hear(self, kind: type[Kind]) -> Kind:
        """The next thing of a kind that the worker says; claims and scores before it are passed over."""
        async with asyncio.timeout(BOUND_S), self.link.consume(topology.inbox_queue(RUN)) as deliveries:
            async for delivery in deliveries:
                await delivery.ack()
                message = decode(delivery.body)
                if isinstance(message, kind):
                    return message
                assert not isinstance(message, Update | Refusal), message
        raise AssertionError("the worker says nothing")

    async def get_honest_work(self) -> None:
        """Send an honest task; the worker does it."""
        self.place.lesson.gate.set()
        asked = task(HONEST)
        await self.send(asked, *parts(asked))
        await self.take_update(HONEST)

    async def take_update(self, of: Attempt) -> None:
        """The worker's update of a task is what it should be."""
        update = await self.hear(Update)
        seed = task_seed(7, of.round, WORKER)
        examples, delta = learned(seed, start_weights())
        assert (update.of, update.version, update.examples) == (of, of.round - 1, examples)
        arriving = Assembly(update.payload)
        async with asyncio.timeout(BOUND_S), self.link.consume(topology.upload_queue(WORKER)) as deliveries:
            while not arriving.complete:
                delivery = await anext(deliveries)
                await delivery.ack()
                part = decode(delivery.body)
                assert isinstance(part, Part)
                arriving.add(part)
        assert arriving.data == delta
        await self.tell(Answer(of, "accepted", "thank you"))

    def files(self) -> list[Path]:
        """What the worker keeps on its disk."""
        return [file for file in self.place.worker.spool.folder.iterdir() if file.is_file() and file.suffix != SUFFIX]


@asynccontextmanager
async def a_worker(folder: Path, **of_who: object) -> AsyncIterator[tuple[Federation, FalseCoordinator]]:
    """An honest worker and a coordinator that is not."""
    async with federation(folder) as fed:
        link = MemoryLink(fed.broker)
        for each in (topology.FEDERATION, topology.of_run(RUN), topology.of_worker(WORKER)):
            await link.declare(each)
        place = fed.join(WORKER, **of_who)
        await fed.until(lambda: bool(place.worker._incarnation))
        yield fed, FalseCoordinator(link, place)
        await fed.close()
        files = place.worker.spool.folder.iterdir()
        (ledger,) = (file for file in files if file.suffix != ".roster")  # and no other file was left
        assert check(ledger.read_bytes(), "ledger")[0] == []
        gc.collect()  # a failed publish and its traceback may hold each other, and what was being sent
        assert place.worker.spool.in_use == 0, "models were kept"
        await link.close()


@pytest.mark.parametrize(
    "lie",
    [
        b"",
        b"\xc1",
        b"\0" * (MESSAGE_BYTES_MAX + 1),
        nested(50_000),
        packed(task(LIE), v=99),
        packed(task(LIE), kind="command"),
        packed(task(LIE), work="delete"),
        packed(task(LIE), of={"run": "../../../etc/passwd", "round": 1, "attempt": 1}),
        packed(task(LIE), of={"run": "/etc/x", "round": 1, "attempt": 1}),
        packed(task(LIE), of={"run": "x", "round": -1, "attempt": 1}),
        packed(task(LIE), settings={str(i): i for i in range(600)}),
        packed(task(LIE), settings={"lr": "1" * 5000}),
        packed(task(LIE), settings={"lr": [1, 2]}),
        packed(task(LIE), settings={"lr": float("nan")}),
        packed(task(LIE), deadline_s=float("inf")),
        packed(task(LIE), payload={"id": "p", "part_bytes": 2**50, "tensors": []}),
        encode(Closed(LIE, "this is not its queue")),
        encode(Answer(LIE, "accepted", "this is not its queue")),
        encode(parts(task(LIE))[0]),
    ],
    ids=[
        "nothing", "junk", "too large", "nested", "another protocol", "unknown kind", "unknown work", "a path as run",
        "an absolute path as run", "a negative round", "six hundred settings", "a long setting", "a list as setting",
        "nan as setting", "endless", "huge parts", "a closing", "an answer", "a part of nothing",
    ],
)  # fmt: skip
async def test_what_is_no_task_is_passed_over(tmp_path: Path, lie: bytes) -> None:
    """Where tasks come from, something else comes: nothing of it is done, nothing is written, the next task is."""
    async with a_worker(tmp_path) as (_, false):
        await false.send(lie, *parts(task(LIE)))
        await false.get_honest_work()
        assert false.place.lesson.done == [(True, 2)]


@pytest.mark.parametrize(
    ("tensors", "difference"),
    [
        ([("w", (132_001,)), ("b", (1_000,))], "w float32[132000] should be w float32[132001]"),
        ([("w", (2**37,)), ("b", (1_000,))], "should be w float32[137438953472]"),
        ([("w", (132_000,))], "b float16[1000] is not part of the model"),
        ([], "is not part of the model"),
    ],
    ids=["one number more", "half a terabyte", "one less", "none"],
)
async def test_a_task_of_another_model_is_refused_before_a_byte_of_disk_is_taken(
    tmp_path: Path, tensors: list[tuple[str, tuple[int, ...]]], difference: str
) -> None:
    """A coordinator sends the header of another model, perhaps of one that would fill the disk."""
    types = {spec.name: spec.dtype for spec in MODEL.specs}
    others = Layout.of([MODEL.specs[0], *(TensorSpec(name, types[name], shape) for name, shape in tensors)])
    lie = task(LIE, payload=Payload("p", PART_BYTES_MIN, others.specs))
    async with a_worker(tmp_path) as (_, false):
        await false.send(lie)
        refusal = await false.hear(Refusal)
        assert refusal.of == LIE
        assert "this worker's learner has other tensors than the version" in refusal.reason
        assert difference in refusal.reason
        assert false.files() == []
        await false.get_honest_work()


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        (changed(parts(task(LIE))[0], checksum=7), "does not match its checksum"),
        (changed(parts(task(LIE))[0], index=3), "lies outside"),
        (changed(parts(task(LIE))[0], index=2**53), "lies outside"),
        (changed(parts(task(LIE))[0], data=b"short"), "has 5 bytes where 262144 belong"),
        (b"\xc1", "not msgpack"),
    ],
    ids=["checksum", "outside", "far outside", "short", "junk"],
)
async def test_a_task_whose_parts_lie_is_refused(tmp_path: Path, part: Part | bytes, reason: str) -> None:
    """In the midst of a version comes a part that cannot be part of it."""
    lie = task(LIE)
    async with a_worker(tmp_path) as (_, false):
        await false.send(lie, parts(lie)[1], part, *parts(lie))
        refusal = await false.hear(Refusal)
        assert (refusal.of, reason in refusal.reason) == (LIE, True)
        await false.get_honest_work()
        assert false.place.lesson.done == [(True, 2)]


async def test_a_task_that_stays_incomplete_gives_way_to_the_next(tmp_path: Path) -> None:
    """A header comes and its parts never do."""
    async with a_worker(tmp_path) as (_, false):
        await false.send(task(LIE), *parts(task(LIE))[:-1])
        await false.get_honest_work()
        assert false.place.lesson.done == [(True, 2)]


async def test_the_same_task_again_is_done_once(tmp_path: Path) -> None:
    """A task comes three times while it is being done."""
    asked = task(LIE)
    async with a_worker(tmp_path) as (fed, false):
        false.place.lesson.gate.clear()
        for _ in range(3):
            await false.send(asked, *parts(asked))
        await false.place.lesson.began.wait()
        await drained(fed)
        false.place.lesson.gate.set()
        await false.take_update(LIE)
        await false.get_honest_work()
        assert false.place.lesson.done == [(True, 1), (True, 2)]


async def test_the_same_task_again_while_it_waits_for_another_is_done_once(tmp_path: Path) -> None:
    """A task comes three times while a version is scored: its weights must still be there when its turn comes."""
    first, asked = task(Attempt(RUN, 0, 0), work="evaluate", version=0), task(LIE)
    async with a_worker(tmp_path) as (fed, false):
        false.place.lesson.gate.clear()
        await false.send(first, *parts(first))
        await false.place.lesson.began.wait()
        for _ in range(3):
            await false.send(asked, *parts(asked))
        await drained(fed)
        false.place.lesson.gate.set()
        await false.take_update(LIE)
        await false.get_honest_work()
        assert false.place.lesson.done == [(False, 0), (True, 1), (True, 2)]


async def test_a_version_half_lost_with_the_broker_is_asked_for_again(tmp_path: Path) -> None:
    """The broker restarts with a task's header, which it keeps, and without a part, while the worker is busy."""
    first, asked = task(Attempt(RUN, 0, 0), work="evaluate", version=0), task(LIE)
    async with a_worker(tmp_path) as (fed, false):
        false.place.lesson.gate.clear()
        await false.send(first, *parts(first))
        await false.place.lesson.began.wait()
        before = false.place.worker._incarnation
        await false.send(asked)
        fed.broker.pause()  # before the worker has had its turn
        fed.broker.forget()
        fed.broker.resume()
        await false.send(*parts(asked)[1:])
        await fed.until(lambda: false.place.worker._incarnation not in ("", before))
        await false.send(asked, *parts(asked))
        false.place.lesson.gate.set()
        await false.take_update(LIE)
        await false.get_honest_work()
        assert false.place.lesson.done == [(False, 0), (True, 1), (True, 2)]


async def drained(fed: Federation) -> None:
    """Wait until the worker has taken everything out of its queue of tasks."""
    link = MemoryLink(fed.broker)
    while await link.depth(topology.down_queue(WORKER)):  # noqa: ASYNC110 - the broker announces no such thing
        await asyncio.sleep(0.001)
    await link.close()


@pytest.mark.parametrize(
    "lie",
    [
        b"\xc1",
        nested(50_000),
        packed(Closed(LIE, "x"), v=0),
        encode(Closed(HONEST, "that is another round")),
        encode(Closed(Attempt("other", 1, 1), "that is another run")),
        encode(Closed(Attempt(RUN, 1, 2), "that is another try")),
        encode(Answer(HONEST, "accepted", "that is another round")),
        encode(Answer(Attempt("other", 1, 1), "invalid", "that is another run")),
        encode(Answer(LIE, "resend", "there is nothing yet to send again")),
        encode(task(LIE)),
        encode(Claim(LIE, WORKER, "x")),
        packed(Answer(LIE, "accepted", "x"), verdict="jailed"),
    ],
    ids=[
        "junk", "nested", "another protocol", "closes another round", "closes another run", "closes another try",
        "answers another round", "answers another run", "wants nothing again", "a task", "a claim", "unknown verdict",
    ],
)  # fmt: skip
async def test_answers_about_something_else_do_not_end_a_training(tmp_path: Path, lie: bytes) -> None:
    """While a worker trains, it is told things that are not about that."""
    asked = task(LIE)
    async with a_worker(tmp_path) as (_, false):
        false.place.lesson.gate.clear()
        await false.send(asked, *parts(asked))
        await false.place.lesson.began.wait()
        await false.tell(lie)
        false.place.lesson.gate.set()
        await false.take_update(LIE)
        await false.get_honest_work()


async def test_a_closing_ends_the_training_of_its_round(tmp_path: Path) -> None:
    """The control of the test above: told about its own round, the worker stops, and sends nothing."""
    asked = task(LIE)
    async with a_worker(tmp_path) as (fed, false):
        false.place.lesson.gate.clear()
        await false.send(asked, *parts(asked))
        await false.place.lesson.began.wait()
        await false.tell(Closed(LIE, "enough"))
        await fed.until(lambda: not false.place.worker._jobs)
        await false.get_honest_work()
        assert false.place.lesson.done == [(True, 2)]


async def test_a_task_without_time_is_refused(tmp_path: Path) -> None:
    """A task that should have been done before it came."""
    asked = task(LIE, deadline_s=0.0)
    async with a_worker(tmp_path) as (_, false):
        false.place.lesson.gate.clear()
        await false.send(asked, *parts(asked))
        assert "not done within the 0 s" in (await false.hear(Refusal)).reason
        await false.get_honest_work()


async def test_an_update_waits_for_its_verdict_though_the_next_task_is_here_and_that_is_begun_meanwhile(
    tmp_path: Path,
) -> None:
    """The next task is sent while the version is saved, so that the verdict comes after it."""
    first, second = task(LIE), task(HONEST)
    async with a_worker(tmp_path) as (fed, false):
        await false.send(first, *parts(first))
        assert (await false.hear(Update)).of == LIE
        await false.send(second, *parts(second))
        assert (await false.hear(Update)).of == HONEST
        await false.tell(Answer(LIE, "resend", "lost"))
        assert (await false.hear(Update)).of == LIE
        await false.tell(Answer(LIE, "accepted", "thank you"), Answer(HONEST, "accepted", "thank you"))
        await fed.until(lambda: false.place.worker._in_hand == [])
        assert false.place.lesson.done == [(True, 1), (True, 2)]


async def test_an_update_whose_verdict_does_not_come_is_given_up_when_the_next_task_has_been_here_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer to an update is lost."""
    monkeypatch.setattr("workers.outbox.VERDICT_S", 0.05)
    first, second = task(LIE), task(HONEST)
    async with a_worker(tmp_path) as (fed, false):
        await false.send(first, *parts(first))
        assert (await false.hear(Update)).of == LIE
        await false.send(second, *parts(second))
        assert (await false.hear(Update)).of == HONEST
        await fed.until(lambda: [each.of for each in false.place.worker._in_hand] == [HONEST])
        await false.tell(Answer(HONEST, "accepted", "thank you"))


async def test_updates_without_verdicts_do_not_pile_up(tmp_path: Path) -> None:
    """A coordinator sends task after task, and never says what became of an update."""
    async with a_worker(tmp_path) as (fed, false):
        for number in range(1, 6):
            asked = task(Attempt(RUN, number, 1))
            await false.send(asked, *parts(asked))
            assert (await false.hear(Update)).of == asked.of
        await fed.until(lambda: len(false.place.worker._in_hand) <= SENT_MAX)
        assert false.place.worker.spool.in_use <= SENT_MAX + HELD_MAX + 1
        await false.tell(*(Answer(Attempt(RUN, number, 1), "accepted", "thank you") for number in range(1, 6)))


async def test_calls_for_secure_sums_do_not_pile_up(tmp_path: Path) -> None:
    async with a_worker(tmp_path) as (fed, false):
        false.place.lesson.gate.set()
        asked = task(LIE)
        await false.send(asked, *parts(asked))
        await false.hear(Update)
        calls = false.place.worker._outbox._sent[0].calls
        for serial in range(1000):
            await false.tell(Call(LIE, serial))
        await fed.until(lambda: bool(calls) and calls[-1].serial == 999)
        assert len(calls) == 16
        await false.tell(Closed(LIE, "no more"))


async def test_an_upload_for_which_the_queue_has_no_room_is_a_refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The broker's owner allows this worker less than an update."""
    monkeypatch.setattr(topology, "of_worker", narrow)
    asked = task(LIE)
    async with a_worker(tmp_path) as (_, false):
        publish = false.place.wire.link.publish

        async def impatient(message: Outgoing, *, within_s: float) -> None:
            await publish(message, within_s=0.05 if message.lane is Lane.UP else within_s)

        monkeypatch.setattr(false.place.wire.link, "publish", impatient)
        await false.send(asked, *parts(asked))
        reason = (await false.hear(Refusal)).reason
        assert reason.startswith("what came of it could not be sent: the broker did not take it within 0.05 s")
        assert false.place.lesson.done == [(True, 1)]
        monkeypatch.undo()
        await false.link.delete(topology.upload_queue(WORKER))
        await false.link.declare(topology.of_worker(WORKER))
        await false.get_honest_work()


def narrow(name: str) -> topology.Topology:
    """A worker's queues, with little room for uploads."""
    usual = OF_WORKER(name)
    upload = topology.Queue(
        topology.upload_queue(name), {"x-overflow": "reject-publish", "x-max-length-bytes": PART_BYTES_MIN}
    )
    return dataclasses.replace(usual, queues=(*usual.queues[:2], upload))


async def test_a_version_for_which_the_disk_has_no_room_is_a_refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker's disk is full, and then it is not."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    asked = task(LIE)
    async with a_worker(tmp_path) as (_, false):
        with monkeypatch.context() as no_room:
            no_room.setattr(os, "posix_fallocate", full)
            await false.send(asked, *parts(asked))
            reason = (await false.hear(Refusal)).reason
        assert "this worker's disk has no room for" in reason
        assert "bytes of models (No space left on device): make room in" in reason
        await false.get_honest_work()
        assert false.place.lesson.done == [(True, 2)]


async def test_an_update_that_is_wanted_again_and_again_is_sent_again_and_again(tmp_path: Path) -> None:
    """A coordinator says over and over that parts are missing; the same bytes come until it is content."""
    asked = task(LIE)
    async with a_worker(tmp_path) as (_, false):
        await false.send(asked, *parts(asked))
        for _ in range(5):
            first = await false.hear(Update)
            await false.tell(Answer(LIE, "resend", "lost"))
            assert first.of == LIE
        await false.take_update(LIE)
        await false.get_honest_work()
        assert false.place.lesson.done == [(True, 1), (True, 2)]


async def test_calls_to_sums_that_nobody_makes_do_not_pile_up(tmp_path: Path) -> None:
    """A coordinator calls to one secure sum after another, with an update that is in none."""
    asked = task(LIE)
    async with a_worker(tmp_path) as (fed, false):
        await false.send(asked, *parts(asked))
        await false.hear(Update)
        calls = false.place.worker._outbox._sent[0].calls
        for number in range(10 * CALLS_MAX):
            await false.tell(Call(LIE, number))
        await fed.until(lambda: bool(calls) and calls[-1].serial == 10 * CALLS_MAX - 1)
        assert len(calls) == CALLS_MAX
        await false.tell(Closed(LIE, "it has lied enough"))
        await fed.until(lambda: not false.place.worker._outbox._sent)
        await false.link.purge(topology.upload_queue(WORKER))
        await false.link.purge(topology.inbox_queue(RUN))
        await false.get_honest_work()


ROSTER = Roster(KEYS, 1).signed(OPERATOR)  # version 2
WITH_A_STRANGER = {**KEYS, "x": bytes(range(32))}


def named(keys: Mapping[str, bytes], shown: bytes = b"") -> Secure:
    """A roster's digest, and what is shown for it."""
    return Secure(32, 3, roster_digest(keys), shown)


@pytest.mark.parametrize(
    ("lie", "said"),
    [
        (named(KEYS, Roster(KEYS, 5).signed(IDENTITIES["j"]).text), "the roster is signed by another operator: "),
        (
            named(WITH_A_STRANGER, dataclasses.replace(ROSTER, version=3, workers=WITH_A_STRANGER).text),
            "the roster is not what the operator has signed",
        ),
        (named(KEYS, b"{}"), "what the coordinator shows is not a roster"),
        (named(WITH_A_STRANGER, Roster(KEYS, 2).signed(OPERATOR).text), "the coordinator shows another roster than"),
        (
            named(WITH_A_STRANGER, Roster(WITH_A_STRANGER, 0).signed(OPERATOR).text),
            "the coordinator shows version 1 of the roster, and this worker has seen another, version 2: it must",
        ),
        (
            named(WITH_A_STRANGER, Roster(WITH_A_STRANGER, 1).signed(OPERATOR).text),
            "the coordinator shows version 2 of the roster, and this worker has seen another, version 2: it must",
        ),
        (
            named({"b": KEYS["b"]}, Roster({"b": KEYS["b"]}, 8).signed(OPERATOR).text),
            "the roster has another key for a, or none",
        ),
        (named(WITH_A_STRANGER), ""),
        (named({}), ""),
    ],
    ids=["operator", "changed", "none", "other names", "old", "same version", "without it", "digest", "empty digest"],
)
async def test_a_roster_that_lies_costs_its_task_and_is_trained_for_by_nobody(
    tmp_path: Path, lie: Secure, said: str
) -> None:
    """A digest that nobody knows is asked about: the worker is there anew, as if it had lost what it was sent."""
    member = Member(WORKER, IDENTITIES[WORKER], {}, operator=public_of(OPERATOR))
    async with a_worker(tmp_path, member=member) as (fed, false):

        def secret(number: int, secure: Secure) -> Task:
            return task(Attempt(RUN, number, 1), clip=60.0, examples_max=64, secure=secure)

        async def get_honest_keys(number: int, shown: bytes) -> None:
            asked = secret(number, named(KEYS, shown))
            await false.send(asked, *parts(asked))
            ready, model = await false.hear(Ready), model_digest(memoryview(start_weights()))
            bound = context(RUN, number, 1 << 32 | 1, model=model, plan=asked.terms, roster=KEYS)
            check_advert(bound, ready.advert, KEYS)
            await false.tell(Closed(asked.of, "thank you"))

        await get_honest_keys(1, ROSTER.text)
        before, lies = false.place.worker._incarnation, secret(2, lie)
        await false.send(lies, *parts(lies))
        if said:
            assert (await false.hear(Refusal)).reason.startswith(said)
        else:
            await fed.until(lambda: false.place.worker._incarnation not in ("", before))
        await get_honest_keys(3, b"")
        assert false.place.lesson.done == [(True, 1), (True, 3)]


TINY = {"clip": 1e-320, "examples_max": 1}


@pytest.mark.parametrize(
    ("lie", "said"),
    [
        ({"format": "top-k", "keep": 1.0}, "added up in secret as float32 only, and the task says top-k"),
        ({"format": "int8"}, "added up in secret as float32 only, and the task says int8"),
        ({"secure": Secure(48, 3, roster_digest(KEYS))}, "the words of a secure sum have 32 or 64 bits, not 48"),
        ({"clip": 0.0}, "and clip is 0: set it above 0"),
        (TINY | {"noise": Noise("sum", 1.0, 1e-320, 1e-5, 8.0, 3)}, "and clip is 9.99989e-321: set it above 0"),
        ({"examples_max": 1, "noise": Noise("sum", 5e-324, 60.0, 1e-5, 8.0, 3)}, "has no room for 3 workers"),
        (TINY | {"clip": 1e-9, "noise": Noise("sum", 5e-324, 60.0, 1e-5, 8.0, 3)}, "has no room for 3 workers"),
        ({"noise": Noise("row", 1e-300, 60.0, 1e-5, 8.0)}, "hides nobody"),
    ],
)
async def test_a_secret_task_whose_sum_would_hide_nothing_or_cannot_be_is_refused(
    tmp_path: Path, lie: dict[str, object], said: str
) -> None:
    """In `top-k` words stand for other things with each `keep`: where others have zeros, one could be read."""
    async with a_worker(tmp_path, member=Member(WORKER, IDENTITIES[WORKER], KEYS)) as (_, false):
        usual = {"clip": 60.0, "examples_max": 64, "secure": Secure(32, 3, roster_digest(KEYS))}
        lies, honest = task(LIE, **{**usual, **lie}), task(HONEST, **usual)
        await false.send(lies, *parts(lies))
        assert said in (await false.hear(Refusal)).reason
        await false.send(honest, *parts(honest))
        assert (await false.hear(Ready)).of == HONEST
        await false.tell(Closed(HONEST, "thank you"))
        assert false.place.lesson.done == [(True, 2)]


async def test_tasks_of_many_runs_do_not_pile_up_and_each_that_is_turned_away_is_told(tmp_path: Path) -> None:
    """A flood of runs, while one is trained: eight wait, and the next one hears why it may not."""
    async with a_worker(tmp_path) as (fed, false):
        fed.patch.setattr("workers.outbox.STILL_S", 0.1)  # nobody drains what it uploads for them
        false.place.lesson.gate.clear()
        for number in range(WAITING_MAX):
            asked = task(Attempt(f"run-{number}", 1, 1))
            await false.send(asked, *parts(asked))
        await fed.until(lambda: len(false.place.worker._jobs) == WAITING_MAX)
        asked = task(LIE)
        await false.send(asked, *parts(asked))
        assert "tasks of 8 other runs wait here already" in (await false.hear(Refusal)).reason
        again = task(Attempt("run-0", 2, 1))  # of a run that has something here there is no more for it
        await false.send(again, *parts(again))
        await fed.until(lambda: again.of in (each.of for each in false.place.worker._in_hand))
        assert len(false.place.worker._in_hand) == WAITING_MAX
        false.place.lesson.gate.set()
        await fed.until(lambda: not false.place.worker._jobs)
        await false.get_honest_work()
        assert len(false.place.worker._in_hand) <= SENT_MAX_OF_ALL
        ended = [Closed(Attempt(f"run-{n}", 2 if n == 0 else 1, 1), "that was it") for n in range(WAITING_MAX)]
        await false.tell(*ended)


async def test_headers_whose_parts_never_come_do_not_stop_the_worker(tmp_path: Path) -> None:
    """Header after header, each of another run or closed at once: none may hold the place of what comes next."""
    async with a_worker(tmp_path) as (fed, false):
        for number in range(2 * PREFETCH):
            asked = task(Attempt(f"run-{number}", 1, 1))
            await false.send(asked)
            if number % 2:
                await fed.until(lambda of=asked.of: of.run in false.place.worker._landing)  # type: ignore[misc]
                await false.tell(Closed(asked.of, "never mind"))
        await false.get_honest_work()
        assert false.place.lesson.done == [(True, 2)]
        assert len(false.place.worker._landing) <= LANDING_MAX


async def test_versions_of_two_runs_whose_parts_come_mixed_are_both_received(tmp_path: Path) -> None:
    """Two coordinators send at the same time."""
    async with a_worker(tmp_path) as (fed, false):
        mine, theirs = task(LIE), task(Attempt("other", 3, 1))
        mixed = [part for pair in zip(parts(mine), parts(theirs), strict=True) for part in pair]
        await false.send(mine, theirs, *mixed)
        await false.take_update(LIE)
        await fed.until(lambda: (True, 3) in false.place.lesson.done)
        await false.tell(Closed(theirs.of, "enough"))
