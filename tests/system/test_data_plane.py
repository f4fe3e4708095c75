"""The way of models and updates: in any pieces, any number at once, and ahead of the disk, never at its expense."""

import asyncio
import threading
from pathlib import Path

import pytest

from broker.link import Delivery, Outgoing
from broker.messages import PART_BYTES_MAX, PART_BYTES_MIN, Answer, Task
from coordinator.store import Store
from tests.system.rig import BOUND_S, expected, federation, read

NAMES = ("a", "b", "c", "d")


@pytest.mark.parametrize("part_bytes", [PART_BYTES_MIN, PART_BYTES_MIN + 8, PART_BYTES_MAX])
@pytest.mark.parametrize("drains", [1, 2, 4])
async def test_the_bits_are_the_same_however_models_are_cut_and_however_many_are_drained_at_once(
    tmp_path: Path, drains: int, part_bytes: int
) -> None:
    async with federation(tmp_path, rounds=2, quorum=4, cohort=4, part_bytes=part_bytes) as run:
        run.drains = drains
        for name in NAMES:
            run.join(name)
        await run.end()
        assert run.weights() == expected(run.store.plan, [NAMES, NAMES])


class Gate:
    """Lets a version be sealed only when it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        self.reached = threading.Event()
        seal = Store.seal

        def gated(store: Store, version: int) -> None:
            self.reached.set()
            assert self.open.wait(BOUND_S)
            seal(store, version)

        monkeypatch.setattr(Store, "seal", gated)


async def test_the_next_round_begins_before_the_version_is_safe_and_nobody_is_told_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with federation(tmp_path, rounds=2, quorum=2, cohort=2) as run:
        gate, sent, told = Gate(monkeypatch), asyncio.Event(), list[Answer]()

        def look(what: Outgoing | Delivery) -> None:
            message = read(what) if isinstance(what, Outgoing) else None
            if isinstance(message, Task) and message.of.round == 2:
                sent.set()
            if isinstance(message, Answer):
                told.append(message)

        run.hook = look
        run.join("a"), run.join("b")
        run.begin()
        await asyncio.wait_for(sent.wait(), BOUND_S)
        assert await asyncio.to_thread(gate.reached.wait, BOUND_S)
        assert (run.store.latest(), told, run.lines("round")) == (0, [], [])
        gate.open.set()
        await run.end()
        assert [(each.of.round, each.verdict) for each in told] == [(n, "accepted") for n in (1, 2)]  # each to both
        assert run.weights() == expected(run.store.plan, [["a", "b"]] * 2)


async def test_a_version_that_was_sent_and_lost_before_it_was_safe_is_made_again_and_nothing_of_it_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with federation(tmp_path, rounds=3, quorum=2, cohort=2) as run:
        begun, dead, seal = asyncio.Event(), threading.Event(), Store.seal
        # the thread ends with its process, before the version is there
        monkeypatch.setattr(Store, "seal", lambda *_: dead.wait(BOUND_S))

        def look(what: Outgoing | Delivery) -> None:
            message = read(what) if isinstance(what, Outgoing) else None
            if isinstance(message, Task) and message.of.round == 2:
                begun.set()

        run.hook = look
        run.join("a"), run.join("b")
        run.begin()
        await asyncio.wait_for(begun.wait(), BOUND_S)
        run.kill()
        monkeypatch.setattr(Store, "seal", seal)
        dead.set()
        await run.end()
        assert [(line["round"], line["attempt"]) for line in run.lines("round")] == [(1, 1), (2, 2), (3, 1)]
        assert run.weights() == expected(run.store.plan, [["a", "b"]] * 3)
