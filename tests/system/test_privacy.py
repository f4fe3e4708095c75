"""Whole runs under differential privacy: the noise is there, the budget ends them, and no restart makes it anew."""

import asyncio
import json
import math
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from broker.link import Delivery, Outgoing
from broker.messages import Call, Ready, Score, Task, Update
from broker.norms import SLACK
from broker.pact import Reveal
from broker.tensors import view
from coordinator.budget import FILE
from coordinator.journal import Journal
from coordinator.roster import Roster
from coordinator.store import Store
from coordinator.vault import Vault
from tests.system.rig import SECURE, Federation, federation, learned, read, start_weights
from workers.ledger import Ledger
from workers.work import task_seed

pytest.importorskip("dp_accounting", reason="needs the extra `dp`")

NAMES = ("a", "b", "c")
CENTRAL = {"dp": "central", "dp_noise": 1.0, "dp_budget": 1e4, "clip": 1.0}


def deviation(fed: Federation) -> float:
    """Of the floats of the last version from zero, where updates are of no account beside the noise."""
    weights = fed.weights()
    return float(np.std(view(memoryview(weights)[8 : 8 + 4 * 132_000], "float32").astype(np.float64)))


async def test_every_version_has_its_noise_over_the_plans_cohort_and_says_what_it_cost(tmp_path: Path) -> None:
    async with federation(tmp_path, rounds=3, **CENTRAL) as fed:
        for name in NAMES:
            fed.join(name)
        await fed.end()
        assert deviation(fed) == pytest.approx(math.sqrt(3) * (1 + SLACK) / 3, rel=0.02)
        told = [line["privacy"] for line in fed.lines("round")]
        assert [each["releases"] for each in told] == [1, 2, 3]
        assert told[0]["epsilon"] == pytest.approx(4.377, abs=1e-3)
        assert told[0]["epsilon"] < told[1]["epsilon"] < told[2]["epsilon"]
        spent = json.loads((fed.run / FILE).read_bytes())
        assert (spent["releases"], spent["seed"]) == (3, "")
        assert view(memoryview(fed.weights())[:8], "int64")[0] == 0  # nobody's own number


async def test_the_run_ends_before_the_round_that_would_pass_the_budget_and_stays_ended(tmp_path: Path) -> None:
    async with federation(tmp_path, rounds=5, **{**CENTRAL, "dp_budget": 7.0}) as fed:
        for name in NAMES:
            fed.join(name)
        await fed.end()
        assert fed.store.latest() == 2
        said = fed.store.now()["why"]
        assert said.startswith("version 2 is the last: the privacy budget is spent: epsilon is 6.5")
        assert [line["event"] for line in fed.lines()] == ["round", "round", "final"]
        before = fed.weights()
        fed.begin()  # anew: what was spent is spent
        await fed.end()
        assert (fed.store.latest(), fed.weights()) == (2, before)
        assert json.loads((fed.run / FILE).read_bytes())["releases"] == 2


async def test_nobody_but_the_event_loop_looks_at_the_roster_while_workers_come_and_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a next round would cost takes long, and is reckoned in a thread: the roster may change meanwhile."""
    lookers, usual = set[str](), Roster.trainers

    def trainers(roster: Roster, invited: Sequence[str] = ()) -> list[str]:
        lookers.add(threading.current_thread().name)
        return usual(roster, invited)

    monkeypatch.setattr(Roster, "trainers", trainers)
    async with federation(tmp_path, rounds=2, **CENTRAL) as fed:
        for name in NAMES:
            fed.join(name)
        await fed.end()
        assert lookers == {"MainThread"}


async def test_a_killed_coordinator_releases_nothing_twice(tmp_path: Path) -> None:
    async with federation(tmp_path, rounds=4, **CENTRAL) as fed:
        killed = set()

        def look(what: Outgoing | Delivery) -> None:
            message = read(what)
            if isinstance(message, Update) and not isinstance(what, Outgoing) and message.of.round not in killed:
                killed.add(message.of.round)
                fed.kill()

        fed.hook = look
        for name in NAMES:
            fed.join(name)
        await fed.end()
        assert killed == {1, 2, 3, 4}
        releases = [line["privacy"]["releases"] for line in fed.lines("round")]
        assert releases == [1, 2, 3, 4]
        assert deviation(fed) == pytest.approx(math.sqrt(4) * (1 + SLACK) / 3, rel=0.02)


async def test_dice_decide_who_is_asked_and_that_makes_it_cheaper(tmp_path: Path) -> None:
    drawn = CENTRAL | {"dp_noise": 4.0, "dp_population": 9}
    async with federation(tmp_path, rounds=12, quorum=None, **drawn) as fed:
        for number in range(9):
            fed.join(f"w{number}")
        await fed.end()
        cohorts = [line["cohort"] for line in fed.lines("round")]
        assert len(cohorts) == 12
        assert fed.counted() == [sorted(cohort) for cohort in cohorts]
        assert len({len(cohort) for cohort in cohorts}) > 1  # all alike in 12 rounds: once in a million runs
        assert deviation(fed) == pytest.approx(math.sqrt(12) * 4 * (1 + SLACK) / 3, rel=0.02)
        assert fed.lines("round")[0]["privacy"]["epsilon"] < 0.5  # with everybody asked it would be 0.94


async def test_a_round_that_asks_nobody_makes_a_version_of_noise(tmp_path: Path) -> None:
    nobody = CENTRAL | {
        "dp_noise": 4.0,
        "cohort": 1,
        "dp_population": 50_000,
    }  # once in 17,000 runs somebody is asked
    async with federation(tmp_path, rounds=1, quorum=None, gather_s=0.0, **nobody) as fed:
        for name in NAMES:
            fed.join(name)
        fed.begin()
        await fed.end()
        assert fed.counted() == [[]]
        assert deviation(fed) == pytest.approx(4 * (1 + SLACK), rel=0.02)


async def test_the_clip_that_workers_are_given_follows_what_they_say_of_their_norms(tmp_path: Path) -> None:
    clips: dict[int, float] = {}

    def look(what: Outgoing | Delivery) -> None:
        message = read(what)
        if isinstance(message, Task) and message.work == "train":
            clips[message.of.round] = message.clip

    adaptive = {"dp_adaptive": True, "clip": 0.5, "dp_noise": 0.02, "dp_budget": 1e6}
    async with federation(tmp_path, rounds=6, **{**CENTRAL, **adaptive}) as fed:
        fed.hook = look
        for name in NAMES:
            fed.join(name)
        await fed.end()
        assert clips == {line["round"]: line["privacy"]["clip"] for line in fed.lines("round")}
        assert clips[1] == 0.5
        assert [clips[n] < clips[n + 1] for n in range(1, 6)] == [True] * 5  # all norms are about 45


async def test_rows_with_noise_tell_only_epsilon_and_end_the_run_when_it_is_spent(tmp_path: Path) -> None:
    scores: list[Score] = []

    def look(what: Outgoing | Delivery) -> None:
        message = read(what)
        if isinstance(message, Score):
            scores.append(message)

    rows = {"dp": "record", "dp_noise": 2.0, "dp_budget": 1.2}
    async with federation(tmp_path, rounds=9, **rows) as fed:
        fed.hook = look
        for name in NAMES:
            fed.join(name)
        await fed.end()
        rounds = fed.lines("round")
        assert len(rounds) == 2
        spent = [line["counted"]["a"]["metrics"]["epsilon"] for line in rounds]
        assert spent == sorted(set(spent))
        assert spent[-1] <= 1.2
        assert all(set(told["metrics"]) == {"epsilon"} for line in rounds for told in line["counted"].values())
        assert not any(score.metrics for score in scores)
        said = fed.store.now()["why"]
        assert f"version {len(rounds)} is the last: a: the privacy budget is spent: epsilon would be" in said
        assert sum(trained for trained, _ in fed.places["a"].lesson.done) == 2  # the third was not even begun
        for name in NAMES:
            await fed.places[name].leave()
            fed.join(name)  # a restart of the worker: what was spent is spent
        fed.begin()
        await fed.end()
        assert len(fed.lines("round")) == 2


async def test_a_failure_costs_what_was_trained_with_noise_before_it(tmp_path: Path) -> None:
    """A coordinator that lies has learning rates under which training fails if a noisy gradient is large enough."""
    async with federation(tmp_path, rounds=2, quorum=2, dp="record", dp_noise=2.0, dp_budget=50.0) as fed:
        for name in NAMES:
            fed.join(name).lesson.fails = "training diverged" if name == "a" else ""
        await fed.end()
        assert [line["refused"]["a"] for line in fed.lines("round")] == ["training diverged"] * 2
        spent = json.loads((fed.folder / "spool-a" / "a.privacy").read_bytes())
        assert spent == {"test": [[2.0, 0.1, 20, False]]}
        ledger = Ledger(fed.folder / "spool-a" / "a.ledger").read()
        told = [line["event"] for line in ledger if line["event"] != "taken"]
        assert told == ["spent", "refused"] * 2 + ["refused"]  # the last one of a score, which takes no steps


@pytest.mark.parametrize("end", ["its deadline", "the round's end", "its worker's death"])
async def test_steps_with_noise_are_paid_however_their_training_ends(tmp_path: Path, end: str) -> None:
    """That it was at work still tells of the steps before, and whoever asks chooses when that is to be seen."""
    late = end == "its deadline"
    rows = {"dp": "record", "dp_noise": 2.0, "dp_budget": 50.0, "round_s": 3.0 if late else 60.0, "cohort": 2}
    async with federation(tmp_path, rounds=1, quorum=2, over_select=1.0 if late else 1.5, **rows) as fed:
        for name in NAMES[: 2 if late else 3]:
            fed.join(name)
        hanging = fed.places["a"]
        hanging.lesson.gate.clear()
        fed.begin()
        await hanging.lesson.began.wait()
        spent, put_down = (fed.folder / "spool-a" / f"a.{kind}" for kind in ("privacy", "steps"))
        if end == "its worker's death":
            await hanging.die()
        elif late:
            await fed.until(spent.exists)
            hanging.lesson.gate.set()
        await fed.end()
        if not late:
            assert not spent.exists(), "nobody has asked for anything since"
            if end == "the round's end":
                await hanging.leave()
            fed.join("a")
        tries = len([*fed.lines("abandoned"), *fed.lines("round")])  # more where it was slow to find the first paid
        assert tries >= 2 if late else tries == 1
        assert json.loads(spent.read_bytes()) == {"test": [[2.0, 0.1, 10 * tries, False]]}
        lines = [line for line in Ledger(spent.with_suffix(".ledger")).read() if line["event"] == "spent"]
        assert [line.get("steps", "paid") for line in lines] == ["paid"] * tries if late else [10]
        assert not put_down.exists()


# -- noise of the workers in a secure sum ----------------------------------------------------------------------------

SHARED = SECURE | {"dp": "distributed", "dp_noise": 0.02, "dp_budget": 1e6}


def floats(weights: bytearray) -> NDArray[np.float64]:
    return view(memoryview(weights)[8 : 8 + 4 * 132_000], "float32").astype(np.float64)


async def test_the_version_of_a_secure_sum_with_noise_is_the_plain_mean_and_that_noise(tmp_path: Path) -> None:
    told: list[str] = []

    def look(what: Outgoing | Delivery) -> None:
        if isinstance(message := read(what), Ready | Score | Update):
            told.extend(message.metrics)

    async with federation(tmp_path, rounds=1, cohort=5, quorum=4, **SHARED) as fed:
        fed.hook = look
        for name in "abcde":
            fed.join(name)
        await fed.end()
        start = start_weights()
        updates = [learned(task_seed(fed.store.plan.seed, 1, name), start)[1] for name in "abcde"]
        mean = sum(floats(bytearray(each)) for each in updates) / 5  # all count the same, not by their examples
        noise = floats(fed.weights()) - mean
        wanted = 0.02 * 60 * math.sqrt(5 / 4) / 5  # four are enough, and five are there
        assert float(noise.std()) == pytest.approx(wanted, rel=0.01)
        assert float(noise.mean()) == pytest.approx(0, abs=5 * wanted / math.sqrt(132_000))
        assert view(memoryview(fed.weights())[:8], "int64")[0] == 0  # nobody's own number
        line = fed.lines("round")[0]
        assert line["privacy"]["releases"] == 1
        assert (line["metrics"], line["secure"]["metrics"], line["secure"]["examples"]) == ({}, {}, 5)
        assert told == []


async def test_workers_and_coordinator_count_the_same_and_the_run_ends_before_either_passes_its_budget(
    tmp_path: Path,
) -> None:
    paid: list[tuple[int, int]] = []

    def look(what: Outgoing | Delivery) -> None:
        message = read(what)
        if isinstance(message, Call) and isinstance(message.says, Reveal) and isinstance(what, Outgoing):
            paid.append((message.of.round, json.loads((fed.run / FILE).read_bytes())["releases"]))

    async with federation(tmp_path, rounds=5, **{**SHARED, "dp_noise": 2.0, "dp_budget": 4.0}) as fed:
        fed.hook = look
        for name in NAMES:
            fed.join(name)
        await fed.end()
        assert paid == [(1, 1), (2, 2)]  # before anything could be revealed
        spent = [line["privacy"]["epsilon"] for line in fed.lines("round")]
        assert spent == sorted(set(spent))
        assert len(spent) == 2
        assert spent[-1] <= 4.0
        assert fed.store.now()["why"].startswith("version 2 is the last: the privacy budget is spent: epsilon is 3.")
        ledger = Ledger(fed.folder / "spool-a" / "a.ledger").read()
        assert [line["epsilon"] for line in ledger if line["event"] == "spent"] == spent
        assert [line["metrics"] for line in ledger if line["event"] == "update"] == [[], []]
        fed.begin()  # anew: what was spent is spent
        await fed.end()
        assert fed.store.latest() == 2


async def test_a_worker_whose_owner_allows_no_more_is_in_no_further_sum_and_the_run_ends(tmp_path: Path) -> None:
    (tmp_path / "policy.toml").write_text("epsilon_max = 2.5")
    async with federation(tmp_path, rounds=5, **{**SHARED, "dp_noise": 2.0, "dp_budget": 100.0}) as fed:
        fed.join("a", policy=tmp_path / "policy.toml")
        for name in "bc":
            fed.join(name)
        await fed.end()
        assert fed.counted() == [list(NAMES)]
        assert "a: the privacy budget is spent: epsilon would be" in fed.store.now()["why"]
        assert sum(trained for trained, _ in fed.places["a"].lesson.done) == 1  # the second was not even begun


@pytest.mark.parametrize("beside", ["Vault.keep", "Journal.release", "Vault.add", "Store.draft"])
async def test_a_coordinator_that_dies_reveals_no_sum_with_noise_twice_and_pays_once(
    tmp_path: Path, beside: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = {"Vault": Vault, "Journal": Journal, "Store": Store}[beside.partition(".")[0]]
    original, loop, calls = getattr(owner, beside.partition(".")[2]), asyncio.get_running_loop(), 0
    async with federation(tmp_path, rounds=2, **SHARED) as fed:

        def dying(*arguments: Any, **words: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 1:
                loop.call_soon_threadsafe(fed.kill)
                raise asyncio.CancelledError
            return original(*arguments, **words)

        monkeypatch.setattr(owner, beside.partition(".")[2], dying)
        for name in NAMES:
            fed.join(name)
        await fed.end()
        assert calls > 1
        assert [line["privacy"]["releases"] for line in fed.lines("round")] == [1, 2]
        ledger = Ledger(fed.folder / "spool-a" / "a.ledger").read()
        sums = 3 if beside in ("Vault.keep", "Journal.release") else 2  # a worker cannot know which was not revealed
        assert sum(line["event"] == "spent" for line in ledger) == sums
        wanted = 0.02 * 60 * math.sqrt(2) / 3
        start, means = start_weights(), []
        for number, weights in enumerate((start, bytearray(fed.store.load(1)[1])), 1):
            deltas = [learned(task_seed(fed.store.plan.seed, number, name), weights)[1] for name in NAMES]
            means.append(sum(floats(bytearray(each)) for each in deltas) / 3)
        assert float((floats(fed.weights()) - sum(means)).std()) == pytest.approx(wanted, rel=0.02)


async def test_without_privacy_the_history_says_nothing_of_it(tmp_path: Path) -> None:
    async with federation(tmp_path, rounds=1) as fed:
        for name in NAMES:
            fed.join(name)
        await asyncio.wait_for(fed.end(), 20)
        assert "privacy" not in fed.lines("round")[0]
        assert not (fed.run / FILE).exists()
