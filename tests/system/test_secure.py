"""Secure rounds: only the sum is seen, it is the plain sum's bits, and whoever drops out or dies costs no more."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from broker.link import Delivery, Outgoing
from broker.messages import Call, Ready, Step
from broker.pact import Advert, Dealt, Finishers, Masked, Opened, Reveal, Settled, Shares, Vow
from broker.topology import CONTROL
from tests.system.rig import SECURE, federation, read, secure_expected

NAMES = ("a", "b", "c", "d", "e")


async def test_a_secure_run_makes_the_versions_of_the_plain_sums_to_the_last_bit(tmp_path: Path) -> None:
    async with federation(tmp_path, **SECURE, cohort=5, quorum=5) as fed:
        for name in NAMES:
            fed.join(name)
        await fed.end()
        assert fed.weights() == secure_expected(fed.store.plan, [NAMES, NAMES])
        line = fed.lines("round")[-1]
        assert line["secure"]["of"] == list(NAMES)
        assert line["counted"] == {name: {"examples": 0, "metrics": {}} for name in NAMES}
        assert line["metrics"] == {"loss": 0.5}


# -- who drops out --------------------------------------------------------------------------------------------------

SEVEN = ("a", "b", "c", "d", "e", "f", "g")
STAGES: dict[str, tuple[type[Any], tuple[str, ...]]] = {
    # when it is asked for this, it dies; who is in the sum then
    "shares": (Settled, SEVEN[:-1]),
    "masked words": (Dealt, SEVEN[:-1]),
    "its vow": (Finishers, SEVEN),
    "its opened shares": (Reveal, SEVEN),
}


def asks(what: Outgoing | Delivery, kind: type[Any], number: int = 1) -> bool:
    """Whether the coordinator says this in a round."""
    message = read(what) if isinstance(what, Outgoing) and what.exchange == CONTROL else None
    return isinstance(message, Call) and isinstance(message.says, kind) and message.of.round == number


def says(what: Outgoing | Delivery, kind: type[Any], number: int = 1) -> str:
    """The worker from whom this has come to the coordinator in a round, or nobody."""
    message = None if isinstance(what, Outgoing) or what.key.startswith("upload") else read(what)
    of = getattr(message, "of", None)
    if isinstance(message, Ready | Step) and of and of.round == number:
        found = message.advert if isinstance(message, Ready) else message.says
        return message.worker if isinstance(found, kind) else ""
    return ""


@pytest.mark.parametrize("stage", STAGES)
async def test_a_worker_that_dies_before_it_gives(tmp_path: Path, stage: str) -> None:
    """Its lease ends; the others go on without it, and their sum is the plain sum of those who are in it."""
    asked, counted = STAGES[stage]
    async with federation(tmp_path, **SECURE, rounds=2, cohort=7, quorum=5) as fed:
        places = {name: fed.join(name) for name in SEVEN}
        dying: list[asyncio.Task[None]] = []

        def look(what: Outgoing | Delivery) -> None:
            if asks(what, asked) and not dying:
                dying.append(asyncio.create_task(places["g"].die()))

        fed.hook = look
        await fed.end()
        await dying[0]
        assert fed.counted() == [list(counted), list(SEVEN[:-1])]
        assert fed.weights() == secure_expected(fed.store.plan, [counted, SEVEN[:-1]])
        line = fed.lines("round")[0]
        if counted != SEVEN:
            assert list(line["secure"]["gone"]) == ["g"]
            assert "dropped out of the secure sum in the stage" in line["refused"]["g"]
