"""A worker that belongs to the federation no more: what the operator's goodbye does, which nobody else can say."""

from pathlib import Path

import pytest

from broker import topology
from broker.link import Outgoing
from broker.messages import Goodbye, encode
from tests.hostile.liar import OF, RUN, update
from tests.memory import MemoryLink
from tests.system.rig import Federation, expected
from tests.system.test_invited import NAMES, invited, join

REASON = "its invitation was revoked"


async def say(fed: Federation, user: str, *messages: Outgoing) -> None:
    link = MemoryLink(fed.broker, user)
    for message in messages:
        await link.publish(message)
    await link.close()


def goodbye(worker: str) -> Outgoing:
    return Outgoing(topology.UP, (topology.hello_key(worker),), encode(Goodbye(worker, REASON)))


async def test_who_is_revoked_in_a_round_is_not_waited_for_and_what_it_had_sent_is_a_strangers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with invited(tmp_path, monkeypatch, rounds=1, quorum=1, round_s=600.0) as fed:
        fed.begin()
        a, b = join(fed, "a"), join(fed, "b")
        a.lesson.gate.clear()
        b.lesson.gate.clear()
        await fed.until(lambda: a.lesson.began.is_set() and b.lesson.began.is_set())
        await say(fed, topology.OPERATOR, goodbye("b"))
        await fed.until(lambda: "b" in refused(fed))
        late = Outgoing(topology.UP, (topology.inbox_key(RUN, "b"),), encode(update(worker="b")))
        await say(fed, "b", late)  # the broker had it before it knew
        await fed.until(lambda: bool(fed.coordinator and fed.coordinator.desk.open and others(fed)))
        assert others(fed) == {"b": ("stranger", "b belongs to the federation no more")}
        a.lesson.gate.set()
        await fed.end()
        (line,) = fed.lines("round")
        assert line["refused"] == {"b": REASON}
        assert line["attempt"] == OF.attempt
        assert fed.weights() == expected(fed.store.plan, [["a"]])


def refused(fed: Federation) -> dict[str, str]:
    assert fed.coordinator
    assert fed.coordinator.desk.open
    return fed.coordinator.desk.open.round.refused


def others(fed: Federation) -> dict[str, tuple[str, str]]:
    assert fed.coordinator
    assert fed.coordinator.desk.open
    return {each["worker"]: (each["verdict"], each["reason"]) for each in fed.coordinator.desk.open.facts.others}


async def test_nobody_but_the_operator_says_goodbye_for_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with invited(tmp_path, monkeypatch, rounds=1) as fed:
        fed.begin()
        places = [join(fed, name) for name in NAMES]
        for place in places:
            place.lesson.gate.clear()
        await fed.until(lambda: all(place.lesson.began.is_set() for place in places))
        await say(fed, "a", goodbye("b"))
        ((reason, _),) = await fed.dead()
        assert reason == "a message of b is a stranger's: it comes from a, says the broker."
        for place in places:
            place.lesson.gate.set()
        await fed.end()
        assert fed.weights() == expected(fed.store.plan, [NAMES])
