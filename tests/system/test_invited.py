"""A federation whose workers are invited: the broker says who speaks, and nobody declares what is another's."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import coordinator.post
import workers.post
from broker import topology
from broker.errors import BrokerRefused, GaveUp
from broker.link import Outgoing
from broker.messages import Claim, Hello, encode
from tests.hostile.liar import OF, RUN, update
from tests.memory import MemoryLink
from tests.system.rig import Federation, Place, expected, federation

NAMES = ("a", "b")


@asynccontextmanager
async def invited(folder: Path, monkeypatch: pytest.MonkeyPatch, **plan: Any) -> AsyncIterator[Federation]:
    """The operator has declared everything; whoever of the workers tries to is told off."""
    monkeypatch.setattr(workers.post, "LACKING_RETRY_S", 0.02)
    monkeypatch.setattr(coordinator.post, "RESTORE_S", 0.0)
    usual = {"cohort": 2, "quorum": 2, **plan}
    async with federation(folder, **usual) as fed:
        fed.invited = True
        operator = MemoryLink(fed.broker)
        queues = [topology.of_worker(name, invited=True) for name in NAMES]
        for part in (topology.FEDERATION, topology.of_run(RUN), *queues):
            await operator.declare(part)
        yield fed
        await operator.close()


def join(fed: Federation, name: str) -> Place:
    place = fed.join(name)

    async def refuse(*_: object) -> None:
        raise BrokerRefused(f"{name} may not do that.")

    place.wire.declare = place.wire.delete = refuse  # type: ignore[assignment]
    return place


async def test_a_run_is_made_by_workers_that_may_not_declare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with invited(tmp_path, monkeypatch) as fed:
        fed.begin()
        for name in NAMES:
            join(fed, name)
        await fed.end()
        assert fed.weights() == expected(fed.store.plan, [NAMES] * 2)


@pytest.mark.parametrize(
    ("user", "reason"),
    [
        ("", "a message of b is a stranger's: it comes from nobody the broker vouches for."),
        ("mallory", "a message of b is a stranger's: it comes from mallory, says the broker."),
    ],
)
async def test_what_the_broker_does_not_vouch_for_is_a_strangers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, user: str, reason: str
) -> None:
    """Somebody who may publish, says it is b: its hello is not heard, its update not counted, and b's own is."""
    async with invited(tmp_path, monkeypatch, rounds=1) as fed:
        fed.begin()
        join(fed, "a")
        other = MemoryLink(fed.broker, user)
        bodies = [encode(Hello("b", "1", "lesson", True, 3000.0)), encode(update(worker="b"))]
        for key, body in zip((topology.hello_key("b"), topology.inbox_key(RUN, "b")), bodies, strict=True):
            await other.publish(Outgoing(topology.UP, (key,), body))
        await other.close()
        dead = await fed.dead()
        if len(dead) < len(bodies):
            dead += await fed.dead()
        assert sorted(dead) == sorted((reason, body) for body in bodies)
        assert "b" not in fed.here()
        join(fed, "b")
        await fed.end()
        assert fed.weights() == expected(fed.store.plan, [NAMES])


async def test_a_coordinator_that_is_not_invited_asks_for_no_ones_word(tmp_path: Path) -> None:
    async with federation(tmp_path, rounds=1, cohort=1, quorum=1) as fed:
        operator = MemoryLink(fed.broker)
        for part in (topology.FEDERATION, topology.of_worker("a", invited=True)):
            await operator.declare(part)
        fed.begin()
        fed.invited = True  # from now on
        place = fed.join("a")
        await fed.end()
        assert place.wire.vouched
        assert fed.counted() == [["a"]]
        await operator.close()


@pytest.mark.parametrize("which", [topology.down_queue, topology.control_queue, topology.upload_queue])
async def test_an_invited_workers_queue_that_was_deleted_is_made_anew_by_the_coordinator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, which: Any
) -> None:
    caplog.set_level(logging.INFO)
    async with invited(tmp_path, monkeypatch, rounds=3) as fed:
        monkeypatch.setattr("workers.outbox.AGAIN_S", 0.02)
        fed.begin()
        places = [join(fed, name) for name in NAMES]
        places[1].lesson.gate.clear()
        await places[1].lesson.began.wait()
        fed.broker.delete(which("b"))
        places[1].lesson.gate.set()
        await fed.end()
        assert fed.weights() == expected(fed.store.plan, [NAMES] * 3)
        assert "the queues of b were gone: made anew" in caplog.text
        assert fed.broker.queue(which("b")).declared in topology.of_worker("b", invited=True).queues  # type: ignore[union-attr]


async def test_a_worker_without_queues_says_so_once_waits_and_gives_up_in_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody is there who could make them anew."""
    async with invited(tmp_path, monkeypatch) as fed:
        for queue in topology.of_worker("b", invited=True).queues:
            fed.broker.delete(queue.name)
        monkeypatch.setattr(workers.post, "LACKING_S", 0.3)
        place = join(fed, "b")
        await asyncio.wait([place.task])
        with pytest.raises(
            GaveUp, match=r"b has waited for 0\.3 s; is its invitation still good\? there is no queue"
        ):
            place.task.result()
        said = [
            each.message for each in caplog.records if "waiting for a coordinator, or whoever runs" in each.message
        ]
        assert len(said) == 2
        del fed.places["b"]
        await place.wire.close()
        place.worker.spool.remove()


async def test_a_worker_whose_rights_are_taken_for_a_while_waits_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with invited(tmp_path, monkeypatch, rounds=1) as fed:
        fed.begin()
        join(fed, "a")
        place = join(fed, "b")
        publish, consume = place.wire.publish, place.wire.consume
        refused = [0, 0]

        async def not_yet(message: Outgoing, **how: Any) -> None:
            refused[0] += 1
            if refused[0] < 4:
                raise BrokerRefused("RabbitMQ does not allow publishing.")
            await publish(message, **how)

        def neither(queue: str, **how: Any) -> Any:
            refused[1] += 1
            if refused[1] < 6:
                raise BrokerRefused("RabbitMQ does not allow consuming.")
            return consume(queue, **how)

        monkeypatch.setattr(place.wire, "publish", not_yet)
        monkeypatch.setattr(place.wire, "consume", neither)
        await fed.end()
        assert fed.counted() == [list(NAMES)]


async def test_whoever_says_again_and_again_that_its_queues_are_gone_makes_no_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with invited(tmp_path, monkeypatch, rounds=1) as fed:
        monkeypatch.setattr(coordinator.post, "RESTORE_S", 60.0)
        fed.begin()
        link = MemoryLink(fed.broker, "b")
        gone = Hello("b", "", "", trains=False, lease_s=0.0)
        for message in [*[gone] * 50, Hello("b", "1", "lesson", True, 3000.0)]:
            await link.publish(Outgoing(topology.UP, (topology.hello_key("b"),), encode(message)))
        await fed.until(lambda: "b" in fed.here())
        assert caplog.text.count("the queues of b were gone: made anew") == 1
        await link.publish(Outgoing(topology.UP, (topology.inbox_key(RUN, "b"),), encode(Claim(OF, "b", "1"))))
        await link.close()
