"""The data's owner against whoever asks: what the policy forbids is not done, and what was done is in the ledger."""

import dataclasses
import errno
import os
import re
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from broker.chain import check
from broker.contract import Contract, fingerprint
from broker.errors import Declined, LearnerFailed
from broker.link import Delivery, Outgoing
from broker.messages import Attempt, Payload, Refusal, Score, Task, Update
from broker.parts import PART_BYTES
from broker.tensors import Layout
from coordinator.roster import REST_ROUNDS
from tests.system.rig import MODEL, Federation, expected, federation, read
from workers import owner
from workers.learner import load
from workers.ledger import Ledger
from workers.spool import Spool
from workers.training import Trainer
from workers.work import Who, Work

CONTRACT = fingerprint(MODEL)
LEARNER = """
import torch
def model(): return torch.nn.Linear(2, 1)
def data(source): return None
def evaluate(model, data): return {}
def train(model, data, settings): return 1
"""


def lines(fed: Federation, name: str, event: str = "") -> list[dict[str, Any]]:
    """What is in a worker's ledger, which must be as it was written."""
    path = fed.places[name].worker.spool.folder / f"{name}.ledger"
    assert check(path.read_bytes(), "ledger")[0] == []
    return [line for line in Ledger(path).read() if event in ("", line["event"])]


def policy(folder: Path, text: str) -> Path:
    path = folder / "policy.toml"
    path.write_text(text)
    return path


def at(hour: int, minute: int = 0, day: int = 1) -> Callable[[], datetime]:
    return lambda: datetime(2026, 5, day, hour, minute).astimezone()


async def test_whatever_a_worker_does_is_in_its_ledger_though_it_has_no_policy(tmp_path: Path) -> None:
    async with federation(tmp_path, rounds=2, cohort=2, quorum=2, contract=CONTRACT) as fed:
        for name in ("a", "b"):
            fed.join(name)
        fed.join("judge", trains=False)
        fed.begin()
        await fed.end()
        await fed.close()
        told = [(line["event"], line["round"], line.get("work")) for line in lines(fed, "a")]
        assert told[0] == ("taken", 1, "train")
        # the next task may come before the verdict has
        assert sorted(told, key=str) == sorted([
            ("taken", 1, "train"), ("update", 1, None), ("verdict", 1, None),
            ("taken", 2, "train"), ("update", 2, None), ("verdict", 2, None),
            ("taken", 2, "evaluate"), ("score", 2, None),
        ], key=str)  # fmt: skip
        update, verdict = lines(fed, "a", "update")[0], lines(fed, "a", "verdict")[0]
        assert update["bytes"] == MODEL.size_bytes
        assert (update["run"], update["attempt"], update["version"], update["format"]) == ("test", 1, 0, "float32")
        assert (update["metrics"], update["scores"]) == (["loss"], ["examples", "sum"])
        assert update["examples"] == fed.lines("round")[0]["counted"]["a"]["examples"]
        assert (verdict["verdict"], verdict["reason"]) == ("accepted", "counted in version 1")
        assert lines(fed, "a", "taken")[0]["cohort"] == 2
        assert {line["event"] for line in lines(fed, "judge")} == {"taken", "score"}


async def test_a_task_outside_the_hours_is_declined_and_the_round_closes_with_its_quorum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, "_now", at(12))
    rules = policy(tmp_path, 'hours = ["22:00-06:30"]')
    async with federation(tmp_path, rounds=6, cohort=3, quorum=2) as fed:
        fed.join("a", policy=rules)
        for name in ("b", "c"):
            fed.join(name)
        fed.begin()
        await fed.end()
        assert fed.counted() == [["b", "c"]] * 6
        assert fed.weights() == expected(fed.store.plan, fed.counted())
        said = "the policy of the data's owner serves at 22:00-06:30 only, by its clock it is 12:00."
        asked = [line for line in fed.lines("round") if "a" in line["cohort"]]
        assert [line["version"] for line in asked] == [1, 2 + REST_ROUNDS]  # and it never rests for longer
        assert all(line["refused"] == line["declined"] == {"a": said} and not line["failed"] for line in asked)
        assert [line["reason"] for line in lines(fed, "a", "refused")] == [said] * 3  # the last is asked to score
        assert lines(fed, "a", "taken") == []
        assert fed.places["a"].lesson.done == []


async def test_rules_are_read_again_at_each_task_and_with_none_that_can_be_read_nothing_is_done(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rules = policy(tmp_path, "")
    then = {2: 'runs = ["other"]', 3: "nonsense", 4: 'runs = ["t*"]\n'}
    async with federation(tmp_path, rounds=4, cohort=1, quorum=1) as fed:

        def change(what: Outgoing | Delivery) -> None:
            """When a version is made, and when a task was refused, the owner writes the next rules."""
            if isinstance(what, Outgoing) and isinstance(read(what), Update | Refusal) and then:
                rules.write_text(then.pop(min(then)))

        fed.hook = change
        fed.join("a", policy=rules)
        fed.begin()
        await fed.end()
        refused = [line["reason"] for line in lines(fed, "a", "refused")]
        assert refused == [
            "the policy of the data's owner does not serve this run.",
            "the policy of the data's owner cannot be read.",
        ]
        assert fed.counted() == [["a"]] * 4
        assert "nothing is done until the policy can be read again" in caplog.text
        assert "is not TOML" in caplog.text  # to the owner, not to the coordinator
        assert not any("TOML" in str(line) for line in fed.lines())


async def test_figures_that_may_not_leave_do_not_nor_are_they_kept(tmp_path: Path) -> None:
    rules = policy(tmp_path, 'metrics = ["s?m"]\nlog = "tasks"')
    sent: list[Update | Score] = []
    async with federation(tmp_path, rounds=2, cohort=2, quorum=2) as fed:

        def look(what: Outgoing | Delivery) -> None:
            if (
                isinstance(what, Outgoing)
                and isinstance(message := read(what), Update | Score)
                and message.worker == "a"
            ):
                sent.append(message)

        fed.hook = look
        fed.join("a", policy=rules)
        fed.join("b")
        fed.begin()
        await fed.end()
        assert {name for message in sent for name in message.metrics} == {"sum"}
        assert any(isinstance(message, Update) and message.metrics == {} for message in sent)
        (line, _) = fed.lines("round")
        assert {worker: [*told["metrics"]] for worker, told in line["counted"].items()} == {"a": [], "b": ["loss"]}
        assert [line["metrics"] for line in lines(fed, "a", "update")] == [[], []]


async def test_the_log_does_not_tell_scores_of_before_training_as_what_came_of_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    rules = policy(tmp_path, 'metrics = ["sum"]\nlog = "metrics"')  # which evaluate reports, and train does not
    async with federation(tmp_path, rounds=1, cohort=1, quorum=1) as fed:
        fed.join("a", policy=rules)
        await fed.end()
    said = re.findall(r"(trained|scored) in [0-9.]+ s(.*)", "\n".join(caplog.messages))
    assert [(what, figures.rpartition(" ")[0]) for what, figures in said] == [("trained", ""), ("scored", ", sum")]


async def test_what_few_examples_have_made_does_not_leave(tmp_path: Path) -> None:
    rules = policy(tmp_path, "examples_min = 51")  # nobody of these has more than 50
    async with federation(tmp_path, rounds=1, cohort=2, quorum=1) as fed:
        fed.join("a", policy=rules)
        fed.join("b")
        fed.begin()
        await fed.end()
        assert fed.counted() == [["b"]]
        assert fed.lines("round")[0]["declined"]["a"].endswith("asks for 51 examples a task at the least.")
        assert [line["event"] for line in lines(fed, "a")][:2] == ["taken", "refused"]
        assert lines(fed, "a", "update") == lines(fed, "a", "score") == []


async def test_what_many_examples_have_made_leaves_though_the_plan_counts_it_for_one(tmp_path: Path) -> None:
    rules = policy(tmp_path, "examples_min = 2")
    async with federation(tmp_path, rounds=1, cohort=2, quorum=1, examples_max=1) as fed:
        fed.join("a", policy=rules)
        fed.join("b")
        fed.begin()
        await fed.end()
        counted = fed.lines("round")[0]["counted"]
        assert {worker: told["examples"] for worker, told in counted.items()} == {"a": 1, "b": 1}
        assert [line["examples"] for line in lines(fed, "a", "update")] == [1]


def test_what_waits_for_its_turn_is_begun_only_if_the_rules_allow_it_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight runs that ask at the same time are all let in before any is begun: so many rounds more than a day has."""
    monkeypatch.setattr(owner, "_now", at(23, 0))
    rules = policy(tmp_path, 'rounds_a_day = 1\nhours = ["22:00-06:00"]\ncoordinators = ["coordinator"]')
    mine = owner.Owner(Who("a", "lesson", policy=rules), tmp_path)
    tasks = [
        Task(Attempt(f"run-{n}", 1, 1), "train", 0, 60.0, 1, {}, Payload("p", PART_BYTES, MODEL.specs))
        for n in range(8)
    ]
    for task in tasks:
        mine.admit(task, "coordinator", trains=True)
    mine.take(tasks[0], trains=True)
    for task in tasks[1:]:
        with pytest.raises(Declined, match="serves 1 round a day"):
            mine.take(task, trains=True)
    monkeypatch.setattr(owner, "_now", at(7, 0, day=2))
    with pytest.raises(Declined, match=r"serves at 22:00-06:00 only, by its clock it is 07:00"):
        mine.take(tasks[1], trains=True)
    assert [line["run"] for line in mine.ledger.read()] == ["run-0"]
    assert mine.ledger.read()[0]["asked_by"] == "coordinator"


async def test_rounds_a_day_are_counted_in_the_ledger_and_so_survive_a_restart_until_midnight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    day = [datetime.fromtimestamp(time.time()).astimezone()]
    monkeypatch.setattr(owner, "_now", lambda: day[0])
    rules = policy(tmp_path, "rounds_a_day = 2")
    async with federation(tmp_path, rounds=5, cohort=1, quorum=1) as fed:
        place = fed.join("a", policy=rules)

        async def restart(what: Outgoing | Delivery) -> None:
            if isinstance(what, Outgoing) and isinstance(read(what), Refusal):
                day[0] = day[0].replace(year=day[0].year + 1)

        fed.hook = restart
        fed.begin()
        await fed.until(lambda: len(fed.lines("round")) == 1)
        await place.die()
        fed.join("a", policy=rules)
        await fed.until(lambda: len(fed.lines("abandoned")) == 1)
        assert len({line["round"] for line in lines(fed, "a", "taken")}) == 2
        assert lines(fed, "a", "refused")[0]["reason"] == "the policy of the data's owner serves 2 rounds a day."
        await fed.end()
        assert fed.counted() == [["a"]] * 5


async def test_a_cohort_is_as_large_as_those_whose_updates_are_added_up_together(tmp_path: Path) -> None:
    rules = policy(tmp_path, "cohort_min = 3")
    for schedule, counted in (("parallel", [["a", "b", "c"]]), ("cyclic", [["b", "c"]])):
        async with federation(tmp_path / schedule, rounds=1, quorum=2, schedule=schedule) as fed:
            fed.join("a", policy=rules)
            for name in ("b", "c"):
                fed.join(name)
            fed.begin()
            await fed.end()
            assert fed.counted() == counted


@pytest.mark.parametrize(
    ("rules", "said"),
    [('privacy = "secure"', "serves secure rounds only"), ("epsilon_max = 1.0", "bounds epsilon, for a delta of")],
)
async def test_scores_of_weights_that_others_choose_do_not_leave_where_only_sums_or_noise_may(
    tmp_path: Path, rules: str, said: str
) -> None:
    """A loss on rows is told for any weights that are sent: who asks often enough can read rows off it."""
    async with federation(tmp_path, rounds=2, cohort=1, quorum=1) as fed:
        fed.join("a")
        judge = fed.join("judge", trains=False, policy=policy(tmp_path, rules))
        fed.begin()
        await fed.end()
        assert all(said in line["reason"] for line in lines(fed, "judge"))
        assert {line["event"] for line in lines(fed, "judge")} == {"refused"}
        assert judge.lesson.done == []


async def test_a_worker_with_another_contract_refuses_and_names_the_tensor(tmp_path: Path) -> None:
    other = Layout.of([dataclasses.replace(spec, shape=(7,)) if spec.name == "b" else spec for spec in MODEL.specs])
    async with federation(tmp_path, rounds=1, cohort=3, quorum=1, contract=CONTRACT, learner_file="f" * 64) as fed:
        for name, contract, layout in (
            ("a", Contract(CONTRACT, "f" * 64), MODEL),
            ("b", Contract(fingerprint(other), "f" * 64), other),
            ("c", Contract(CONTRACT, "0" * 64), MODEL),
        ):
            place = fed.join(name)
            place.lesson.layout, place.lesson.contract = layout, contract
        fed.begin()
        await fed.end()
        (line,) = fed.lines("round")
        assert [*line["counted"]] == ["a"]
        assert not line["declined"], "it is a failure: the operator must see to it"
        assert line["refused"]["b"].endswith("…: b float16[7] should be b float16[1000].")
        assert line["refused"]["c"] == (
            f"this worker's learner is another than the run's: its file has the SHA-256 {'0' * 64}, not {'f' * 64}."
        )
        for name in ("b", "c"):
            assert fed.places[name].lesson.done == []
            assert lines(fed, name, "taken") == []


async def test_nothing_leaves_that_the_ledger_cannot_keep(tmp_path: Path) -> None:
    async with federation(tmp_path, rounds=1, cohort=2, quorum=1) as fed:

        def full(number: int) -> None:
            if os.fstat(number).st_ino in {path.stat().st_ino for path in tmp_path.glob("*/a.ledger")}:
                raise OSError(errno.ENOSPC, "No space left on device")

        fed.patch.setattr(os, "fsync", full)
        sent: list[str] = []

        def look(what: Outgoing | Delivery) -> None:
            if isinstance(what, Outgoing) and isinstance(message := read(what), Update | Score):
                sent.append(message.worker)

        fed.hook = look
        fed.join("a")
        fed.join("b")
        fed.begin()
        await fed.end()
        assert fed.counted() == [["b"]]
        assert set(sent) == {"b"}
        assert "ledger cannot be written (No space left on device)" in fed.lines("round")[0]["refused"]["a"]


async def test_the_training_process_says_its_contract_and_looks_again_at_a_file_that_is_pinned(
    tmp_path: Path,
) -> None:
    path = tmp_path / "mine.py"
    path.write_text(LEARNER)
    trainer = Trainer(str(path), Spool(tmp_path / "models"), renew_after=1)
    try:
        layout = await trainer.start("here")
        pinned = load(str(path)).file
        assert trainer.contract == Contract(fingerprint(layout), pinned)
        _, start = await trainer.draw(seed=0)
        work = Work(True, False, 1, {}, 1, learner_file=pinned)
        await trainer.run(work, layout, source="here", weights=start)
        path.write_text(LEARNER + "\n")  # the next task is done by a process that loads it anew
        with pytest.raises(LearnerFailed, match=f"its file has the SHA-256 [0-9a-f]{{64}}, not {pinned}"):
            await trainer.run(work, layout, source="here", weights=start)
        assert trainer.contract.file != pinned
        await trainer.run(dataclasses.replace(work, learner_file=""), layout, source="here", weights=start)
    finally:
        await trainer.stop()
        trainer.spool.remove()
