"""Secure rounds over RabbitMQ: with processes that are killed in every stage, and with a witness of every message."""

import asyncio
import json
import math
import signal
import sys
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from broker import rabbit, topology
from broker.formats import FORMATS
from broker.messages import Message, Part, Step, decode
from broker.parts import Assembly
from broker.pinned import draw_keys
from broker.ring import Form, counted, encode
from broker.tensors import Layout, TensorSpec
from broker.topology import Binding, Queue, Topology
from coordinator import plan as plans
from coordinator.rules import RULES
from coordinator.unmasking import into_sums
from tests.acceptance.federation import FLUFFLE, Federation
from tests.summed import finished
from workers import ledger

pytestmark = pytest.mark.timeout(180)

SECURE = ("--privacy", "secure", "--clip", "4", "--examples-max", "64", "--gather-s", "120")
# what a worker learns is known to the test: one step on one picture, from which a gradient gives all away
PICTURES = """
from pathlib import Path
import torch
from torch import nn

def model():
    made = nn.Linear(64, 10)
    nn.init.zeros_(made.weight)
    nn.init.zeros_(made.bias)
    return made

def data(source):
    number = int(source)
    return torch.rand(64, generator=torch.Generator().manual_seed(number)), torch.tensor(number % 10)

def train(model, data, settings):
    loss = nn.functional.cross_entropy(model(data[0]), data[1])
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.5 * parameter.grad
    return 1 + int(data[1]), {"loss": loss.item()}

def evaluate(model, data):
    return {"loss": nn.functional.cross_entropy(model(data[0]), data[1]).item()}
"""
MODEL = Layout.of([TensorSpec("weight", "float32", (10, 64)), TensorSpec("bias", "float32", (10,))])


def picture(number: int) -> np.ndarray:
    import torch

    return torch.rand(64, generator=torch.Generator().manual_seed(number)).numpy()


def update(number: int) -> tuple[int, bytes]:
    """Examples and delta of a worker, as its learner makes them of version 0."""
    from torch import nn

    space: dict[str, object] = {}
    exec(PICTURES, space)  # noqa: S102 (it is the learner above)
    model, data = space["model"](), space["data"](str(number))  # type: ignore[operator]
    examples, _ = space["train"](model, data, {})  # type: ignore[operator]
    assert isinstance(model, nn.Module)
    state = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
    return examples, b"".join(state[spec.name].tobytes() for spec in MODEL.specs)


def quality(words: np.ndarray, truth: np.ndarray) -> float:
    """Decibels of the best picture that a gradient's rows give: x = ∂W_i / ∂b_i."""
    at = {spec.name: MODEL.offsets[spec.name] // 4 for spec in MODEL.specs}
    rows = words[at["weight"] : at["weight"] + 640].reshape(10, 64).astype(np.float64)
    bias = words[at["bias"] : at["bias"] + 10].astype(np.float64)
    best = 0.0
    for row, below in zip(rows, bias, strict=True):
        found = np.clip(row / below, 0, 1) if below else np.zeros(64)
        best = max(best, 10 * np.log10(1 / max(float(np.mean((found - truth) ** 2)), 1e-20)))
    return best


async def witness(url: str, workers: list[str]) -> None:
    """Let a queue be there that has a copy of every message."""
    down = (Binding(exchange, "spy", name) for exchange in (topology.DOWN, topology.CONTROL) for name in workers)
    up = (Binding(topology.upload_queue(name), "spy", topology.upload_key(name)) for name in workers)
    spy = Topology(
        queues=(Queue("spy", {"x-queue-type": "classic"}),), bindings=(Binding(topology.UP, "spy", "#"), *down, *up)
    )
    link = await rabbit.connect(url, name="witness")
    for part in (topology.FEDERATION, *map(topology.of_worker, workers)):
        await link.declare(part)
    await link.declare(spy)
    await link.close()


async def witnessed(url: str) -> list[bytes]:
    """All that the queue has."""
    link, seen = await rabbit.connect(url, name="witness"), list[bytes]()
    left = await link.depth("spy")
    async with link.consume("spy") as deliveries:
        for _ in range(left or 0):
            delivery = await asyncio.wait_for(anext(deliveries), 30)
            seen.append(bytes(delivery.body))
            await delivery.ack()
    await link.close()
    return seen


def masked_words(told: list[Message]) -> dict[str, np.ndarray]:
    """Worker → the words that it has uploaded."""
    words = {}
    for step in told:
        if isinstance(step, Step) and step.payload:
            assembly = Assembly(step.payload)
            for part in told:
                if isinstance(part, Part):
                    assembly.add(part)
            words[step.worker] = np.frombuffer(bytes(assembly.data), np.uint32)
    return words


def test_of_all_that_passes_the_broker_nothing_gives_a_picture_away_and_the_sum_is_the_plain_one(
    federation: Federation, vhost_url: str
) -> None:
    f, names = federation, ["w-1", "w-2", "w-3", "w-4"]
    f.learner.write_text(PICTURES)
    roster, keys = ("--roster", str(draw_keys(f.folder / "keys", names))), str(f.folder / "keys" / "{name}.key")
    f.fluffle("init", str(f.learner), str(f.run))
    asyncio.run(witness(vhost_url, names))
    f.coordinator("--rounds", "1", "--cohort", "4", "--quorum", "4", *SECURE, *roster)
    member = ("--many", "4", "--data", "{index}", *roster, "--identity", keys)
    f.start("w", "worker", str(f.learner), "--name", "w", *member)
    assert f.wait("coordinator") == 0
    seen = asyncio.run(witnessed(vhost_url))
    hidden = masked_words([decode(body) for body in seen])
    assert sorted(hidden) == names

    form = Form(plans.read(f.run / "plan.toml").ring, MODEL, ("evaluate/loss", "loss"))
    total = np.zeros(form.words, np.uint32)
    for name, words in hidden.items():
        number = int(name[-1])
        examples, delta = update(number)
        plain = encode(form, memoryview(delta), examples=examples, metrics={"loss": 2.3, "evaluate/loss": 2.3})
        assert quality(plain.view(np.int32), picture(number)) > 40
        assert quality(words.view(np.int32), picture(number)) < 9
        assert not any(delta[:256] in body or plain.tobytes()[:64] in body for body in seen)
        total += plain
    counts = np.bincount(np.concatenate([*hidden.values()]).view(np.uint8), minlength=256)
    expected = counts.sum() / 256
    assert ((counts - expected) ** 2 / expected).sum() < 255 + 6 * np.sqrt(2 * 255)  # six deviations
    sums = RULES["mean"].init(MODEL, FORMATS["float32"])
    into_sums(form, total, 4, sums)
    assert f.version(1) == bytes(finished(RULES["mean"], sums, memoryview(bytes(MODEL.size_bytes))))
    assert f.rounds()[0]["secure"]["examples"] == counted(form, total, 4).examples == 2 + 3 + 4 + 5


# each worker moves the same way by the same, so that what was learned stands out of the noise
STEP, FLOATS = 0.009, 10_000
STEPS = f"""
import torch

def model():
    made = torch.nn.Module()
    made.w = torch.nn.Parameter(torch.zeros({FLOATS}))
    return made

def data(source):
    return int(source)

def train(model, data, settings):
    with torch.no_grad():
        model.w += {STEP}
    return data, {{"loss": 1.0}}

def evaluate(model, data):
    return {{"loss": 1.0}}
"""
ODDS = 1e-9 / 16  # of each of the events below, two of each bound; the noise's seeds are nobody's to choose


def check_noise(noise: np.ndarray, deviation: float) -> None:
    """Whether it can be normal and of this deviation (Laurent and Massart 2000, lemma 1, for the sum of squares)."""
    x, d = -math.log(ODDS), len(noise)
    assert abs(noise.sum()) < deviation * math.sqrt(2 * d * x)
    assert -2 * math.sqrt(d * x) < ((noise / deviation) ** 2).sum() - d < 2 * math.sqrt(d * x) + 2 * x


def test_the_workers_noise_is_in_every_version_and_the_run_ends_before_the_round_that_its_budget_cannot_pay(
    federation: Federation,
) -> None:
    f, names, noise, budget = federation, ["w-1", "w-2", "w-3", "w-4"], 0.5, 25.0
    wanted = [epsilon_of(noise, times) for times in (1, 2, 3, 4)]
    f.learner.write_text(STEPS)
    roster, keys = ("--roster", str(draw_keys(f.folder / "keys", names))), str(f.folder / "keys" / "{name}.key")
    dp = ("--dp", "distributed", "--dp-noise", str(noise), "--dp-budget", str(budget), "--clip", "1")
    f.fluffle("init", str(f.learner), str(f.run))
    sums = ("--rounds", "9", "--cohort", "4", "--quorum", "3", "--gather-s", "120", "--privacy", "secure")
    f.coordinator(*sums, *dp, *roster)
    member = ("--many", "4", "--data", "{index}", *roster, "--identity", keys)
    f.start("w", "worker", str(f.learner), "--name", "w", *member)
    assert f.wait("coordinator") == 0

    lines = f.rounds()
    assert [line["metrics"] for line in lines] == [{}] * 3
    told = [(line["secure"][what] for what in ("of", "metrics", "examples")) for line in lines]
    assert [*map(tuple, told)] == [(names, {}, 4)] * 3  # each counts as one, whatever it says
    spent = [line["privacy"]["epsilon"] for line in lines]
    assert spent == pytest.approx(wanted[:3], rel=1e-4)  # discrete noise, and a delta that was rounded, cost a little
    assert spent[2] < budget < wanted[3]
    why = (
        f"the privacy budget is spent: epsilon is {spent[2]:.4g} after 3 releases, and one more would make it "
        f"{wanted[3]:.4g}, over dp_budget 25 (delta 1e-05)"
    )
    assert json.loads((f.run / "now.json").read_text())["why"].startswith(f"version 3 is the last: {why}")
    assert f"there is no further round: {why}" in f.log("coordinator")

    versions = [np.frombuffer(f.version(number), np.float32).astype(np.float64) for number in range(4)]
    deviation = noise * math.sqrt(4 / 3) / 4  # three workers' is enough, four's is in it
    for before, after in pairwise(versions):
        check_noise(after - before - STEP, deviation)
    check_noise(versions[3] - 3 * STEP, deviation * math.sqrt(3))

    def written(name: str, event: str) -> list[dict[str, Any]]:
        (path,) = (f.folder / "state").rglob(f"{name}.ledger")
        return [line for line in ledger.lines(path.read_bytes()) if line["event"] == event]

    f.until(lambda: all(len(written(name, "secure")) == 3 for name in names))  # the last to answer is not waited for
    revealed = ["the sum of these updates", "the sum of their examples"]
    for name in names:
        assert [line["epsilon"] for line in written(name, "spent")] == spent
        rounds = [(line["round"], line["of"], line["revealed"]) for line in written(name, "secure")]
        assert rounds == [(number, names, revealed) for number in (1, 2, 3)]


def epsilon_of(noise: float, times: int) -> float:
    """What so many releases with Gaussian noise cost, by the library alone."""
    dpa = pytest.importorskip("dp_accounting", reason="needs the extra `dp`")
    accountant = dpa.rdp.RdpAccountant()
    accountant.compose(dpa.GaussianDpEvent(noise), times)
    return float(accountant.get_epsilon(1e-5))


COORDINATOR = (
    "coordinator.secrecy:Secrecy.begin", "coordinator.unmasking:Unmasking.advert",
    "coordinator.unmasking:Unmasking.settle", "coordinator.unmasking:Unmasking.deal",
    "coordinator.unmasking:Unmasking.masked", "coordinator.unmasking:Unmasking.finishers",
    "coordinator.unmasking:Unmasking.reveal", "coordinator.vault:Vault.keep", "coordinator.journal:Journal.release",
    "coordinator.unmasking:Unmasking.opened", "coordinator.unmasking:Unmasking.result",
    "coordinator.store:Store.seal",
)  # fmt: skip
# where a worker is killed, and whether its update is in the sum all the same
WORKER = {
    "workers.secrecy:Talk.begin": True,  # before it is ready: it says so when it is back
    "workers.masking:Masking.shares": False,
    "workers.masking:Masking.mask": False,  # after its shares have left
    "workers.masking:Masking.vow": True,  # after its masked words have
    "workers.masking:Masking.answer": True,
    "workers.secrecy:Talk._note": True,  # its answer is put down, and has not left
}
# a worker's update is of its own dice; what it has trained is on the disk, and w1 waits while w4 is being started
DICE = """
import time
from pathlib import Path
import torch
from torch import nn

def model():
    made = nn.Module()
    made.w = nn.Parameter(torch.zeros(1000))
    return made

def data(source):
    (Path(source) / "here").touch()
    return Path(source)

def train(model, data, settings):
    end = time.monotonic() + 60
    while data.name == "w1" and not (data.with_name("w4") / "here").exists() and time.monotonic() < end:
        time.sleep(0.01)
    number = int(data.name[1:])
    dice = torch.Generator().manual_seed(10 * settings["round"] + number)
    with torch.no_grad():
        model.w += torch.randn(1000, generator=dice) / 64
    (data / str(settings["round"])).write_bytes(model.w.detach().numpy().tobytes())
    with (data / "rounds").open("a") as file:
        file.write(f"{settings['round']}\\n")
    return number

def evaluate(model, data):
    return {}
"""
ONE = Layout.of([TensorSpec("w", "float32", (1000,))])
FOUR = ("w1", "w2", "w3", "w4")


def outlive(f: Federation, killed: str, points: Iterable[str], *, rounds: int) -> int:
    """A run in which one process is killed at each point, and started anew; how often it died."""
    roster, keys = draw_keys(f.folder / "keys", [*FOUR]), str(f.folder / "keys" / "{name}.key")
    f.learner.write_text(DICE)
    f.fluffle("init", str(f.learner), str(f.run))
    struck, died = f.folder / "struck", 0
    for folder in (struck, *(f.folder / name for name in FOUR)):
        folder.mkdir()
    faulty = (sys.executable, str(Path(__file__).with_name("faulty.py")), str(struck), ",".join(points))

    def start(name: str) -> None:
        member = ("--roster", str(roster), "--identity", keys)
        words: tuple[str, ...] = ("worker", str(f.learner), "--name", name, "--data", str(f.folder / name), *member)
        if name == "coordinator":
            most = ("--rounds", str(rounds), "--cohort", "4", "--quorum", "3", *SECURE, "--roster", str(roster))
            words = ("coordinator", str(f.run), *most)
        f.launch(name, *(faulty if name == killed else FLUFFLE), *words)

    for name in ("coordinator", *FOUR):
        start(name)
    while (ended := f.processes["coordinator"].poll()) in (None, -signal.SIGKILL):
        f.until(lambda: any(f.processes[name].poll() is not None for name in ("coordinator", killed)))
        if f.processes[killed].poll() == -signal.SIGKILL:
            died += 1
            if killed == "w4":
                (f.folder / "w4" / "here").unlink()
            start(killed)
    assert ended == 0, f.log("coordinator")
    assert {each.name for each in struck.iterdir()} == {*points}
    return died


def check_bits(f: Federation) -> None:
    """Each version is the one before and the sum of what those have trained who are said to be in it."""
    ring = plans.read(f.run / "plan.toml").ring
    for line in f.rounds():
        before, total = (
            np.frombuffer(f.version(line["version"] - 1), np.float32),
            np.zeros(Form(ring, ONE).words, "u4"),
        )
        for name in line["secure"]["of"]:
            trained = np.frombuffer((f.folder / name / str(line["round"])).read_bytes(), np.float32)
            words = encode(Form(ring, ONE), memoryview((trained - before).data), examples=int(name[1:]), metrics={})
            np.add(total, words, out=total)
        sums = RULES["mean"].init(ONE, FORMATS["float32"])
        into_sums(Form(ring, ONE), total, len(line["secure"]["of"]), sums)
        expected = finished(RULES["mean"], sums, memoryview(before.tobytes()))
        assert f.version(line["version"]) == bytes(expected), line


@pytest.mark.chaos
@pytest.mark.timeout(600)
def test_whenever_the_coordinator_is_killed_every_sum_is_that_of_all_to_the_last_bit(federation: Federation) -> None:
    f, rounds = federation, len(COORDINATOR)
    assert outlive(f, "coordinator", COORDINATOR, rounds=rounds) == len(COORDINATOR)
    assert [line["secure"]["of"] for line in f.rounds()] == [[*FOUR]] * rounds
    check_bits(f)
    for name in FOUR:  # each round once, but for what was asked for anew because a version was lost
        trained = (f.folder / name / "rounds").read_text().split()
        assert rounds <= len(trained) <= rounds + 2, trained


@pytest.mark.chaos
@pytest.mark.timeout(600)
def test_in_whatever_stage_a_worker_is_killed_the_sum_is_that_of_whoever_is_in_it_to_the_last_bit(
    federation: Federation,
) -> None:
    f = federation
    assert outlive(f, "w4", WORKER, rounds=3 * len(WORKER)) == len(WORKER)
    lines = [line["secure"] for line in f.rounds() if "w4" in line["cohort"]]
    assert [line["of"] for line in lines if "w4" not in line["gone"]] == [[*FOUR]] * (len(lines) - 2)
    left_out = [line for line in lines if "w4" in line["gone"]]
    assert [line["of"] for line in left_out] == [[*FOUR[:3]]] * [*WORKER.values()].count(False)
    check_bits(f)
