"""Faults in memory, at instants drawn from a seed: whatever breaks, the run ends with the bits of the undisturbed.

An instant is a step: the so-and-so-many-th message that anybody has published or received. A seed that fails is in
the assertion's message, and gives the same faults again.
"""

import asyncio
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from broker.messages import Task
from tests.system.rig import Federation, Place, expected, federation, read

NAMES = ("a", "b", "c")
ROUNDS = 5
STEPS = 300  # what an undisturbed run of five rounds takes
AWAY_S = 0.01
SEEDS = [*range(12), *(pytest.param(seed, marks=pytest.mark.chaos) for seed in range(12, 212))]

Fault = Callable[[Federation], None]


def at_steps(fed: Federation, faults: dict[int, Fault]) -> None:
    """Let faults happen at their steps."""
    steps = 0

    def step(_: Any) -> None:
        nonlocal steps
        steps += 1
        if steps in faults:
            faults[steps](fed)

    fed.hook = step


def restart_broker(fed: Federation) -> None:
    """It goes away, loses what is not persistent, and comes back."""
    if fed.broker.up:
        fed.broker.pause()
        fed.broker.forget()
        asyncio.get_running_loop().call_later(AWAY_S, fed.broker.resume)


async def run_through(fed: Federation) -> None:
    """Three workers, from the first round to the last."""
    fed.begin()
    for name in NAMES:
        fed.join(name)
    await fed.end()


def drawn(seed: int, fault: Fault, most: int) -> dict[int, Fault]:
    dice = random.Random(seed)
    return {dice.randrange(1, STEPS): fault for _ in range(dice.randint(1, most))}


@pytest.mark.parametrize("seed", SEEDS)
async def test_a_coordinator_killed_at_any_step_ends_with_the_same_bits(tmp_path: Path, seed: int) -> None:
    faults = drawn(seed, Federation.kill, 3)
    async with federation(tmp_path, rounds=ROUNDS) as fed:
        at_steps(fed, faults)
        await run_through(fed)
        assert fed.weights() == expected(fed.store.plan, [NAMES] * ROUNDS), f"seed {seed}: killed at {sorted(faults)}"
        assert [line["version"] for line in fed.lines("round")] == [1, 2, 3, 4, 5], f"seed {seed}: the history"


@pytest.mark.parametrize("seed", SEEDS)
async def test_a_broker_restarted_at_any_step_ends_with_the_same_bits(tmp_path: Path, seed: int) -> None:
    faults = drawn(seed, restart_broker, 3)
    async with federation(tmp_path, rounds=ROUNDS) as fed:
        at_steps(fed, faults)
        await run_through(fed)
        assert fed.weights() == expected(fed.store.plan, [NAMES] * ROUNDS), f"seed {seed}: down at {sorted(faults)}"
        assert fed.counted() == [list(NAMES)] * ROUNDS, f"seed {seed}"


@pytest.mark.parametrize("seed", SEEDS)
async def test_everything_at_once_at_any_step_ends_with_the_same_bits(tmp_path: Path, seed: int) -> None:
    """Kills, restarts of the broker, lost connections and workers killed and started again, up to eight of them."""
    dice = random.Random(f"all/{seed}")

    def drop_someone(fed: Federation) -> None:
        fed.places[dice.choice(NAMES)].wire.drop()

    async with federation(tmp_path, rounds=ROUNDS) as fed, asyncio.TaskGroup() as group:

        def replace_someone(fed: Federation) -> None:
            async def replace(place: Place) -> None:
                await place.die()
                if fed.places[place.name] is place:  # nobody else has replaced it meanwhile
                    fed.join(place.name)

            group.create_task(replace(fed.places[dice.choice(NAMES)]))

        choices = [Federation.kill, restart_broker, drop_someone, replace_someone]
        faults = {dice.randrange(1, STEPS): dice.choice(choices) for _ in range(dice.randint(2, 8))}
        said = f"seed {seed}: " + ", ".join(f"{step} {faults[step].__name__}" for step in sorted(faults))
        at_steps(fed, faults)
        try:
            await run_through(fed)
        except TimeoutError:
            pytest.fail(f"{said}: it does not end: {fed.store.now()}")
        assert fed.weights() == expected(fed.store.plan, [NAMES] * ROUNDS), said


async def test_a_broker_restarted_while_the_last_version_is_on_its_way_is_sent_it_again(tmp_path: Path) -> None:
    async with federation(tmp_path, rounds=1) as fed:
        restarted: list[Any] = []

        def look(what: Any) -> None:
            message = read(what)
            if isinstance(message, Task) and message.work == "evaluate" and not restarted:
                restarted.append(message)
                restart_broker(fed)

        fed.hook = look
        await run_through(fed)
        final = fed.lines("final")[0]
        assert final["workers"] == list(NAMES)
        assert final["seconds"] < 4.0  # it is not the clock that ended it
