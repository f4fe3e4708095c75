"""Noise that workers add to a masked sum: it is all there, it is exact in the ring, and nobody reveals too little."""

import math
import secrets
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray

import workers.secrecy
from broker import pact
from broker.errors import Alarm, LearnerFailed, Refused, UsageError
from broker.files import read_record
from broker.formats import FORMATS
from broker.messages import Attempt, Call, Noise, Payload, Ready, Secure, Step, Task
from broker.noise import add_discrete
from broker.parts import PART_BYTES
from broker.ring import Form, Ring, encode, ring_of
from broker.tensors import Layout, TensorSpec
from coordinator import plan as plans
from coordinator.aggregation import MEAN
from coordinator.unmasking import Unmasking, into_sums
from tests.summed import finished
from tests.system.rig import IDENTITIES, KEYS
from workers.masking import Member
from workers.policy import Asked, Policy
from workers.secrecy import Secrecy, Talk, check
from workers.spending import Spending
from workers.spool import Slot
from workers.work import Done, Who

FLOATS = 60_000
MODEL = Layout.of([TensorSpec("w", "float64", (FLOATS,)), TensorSpec("seen", "int64", ())])
OLD = memoryview((9).to_bytes(8, "little") + bytes(8 * FLOATS))  # version 0 has seen 9
CLIP, NOISE, LEAST, COHORT = 2.0, 0.5, 4, 6
SUM = Noise("sum", NOISE, CLIP, 1e-5, 8.0, LEAST)
TASK = Task(
    Attempt("run", 3, 1), "train", 2, 60.0, 0, {}, Payload("it", PART_BYTES, MODEL.specs), clip=CLIP, examples_max=1,
    noise=SUM, secure=Secure(32, COHORT),
)  # fmt: skip


def ring(**changes: Any) -> Ring:
    usual = {"clip": CLIP, "examples_max": 1, "cohort": COHORT, "noise": NOISE, "least": LEAST}
    return ring_of(changes.pop("bits", 32), **{**usual, **changes})


def update(seed: int) -> memoryview:
    """An update as long as the clip allows."""
    delta = np.random.default_rng(seed).standard_normal(FLOATS)
    delta *= CLIP / np.linalg.norm(delta)
    return memoryview((100 + seed).to_bytes(8, "little") + delta.tobytes())


def deltas(seed: int) -> NDArray[np.float64]:
    return np.frombuffer(update(seed)[8:])


class Room:
    """A slot, as far as masked words need one."""

    def __init__(self, size: int) -> None:
        self.data = memoryview(bytearray(size))


class Company:
    """Workers with finished updates, and the coordinator's part of a sum.

    Attributes:
        paid: how many have paid.
        noted: what owners were told.
    """

    def __init__(self, folder: Path, names: str, task: Task = TASK) -> None:
        roster = {name: KEYS[name] for name in names}
        assert task.secure
        task = replace(task, secure=replace(task.secure, roster=pact.roster_digest(roster)))
        model, self.paid, self.task, self.noted = bytes(32), 0, task, list[str]()
        self.talks = dict[str, Talk]()
        for seed, name in enumerate(names):
            secrecy = Secrecy(
                Member(name, IDENTITIES[name], roster), folder,
                room=lambda size: cast(Slot, Room(size)), note=self.note, pay=self.pay,
            )  # fmt: skip
            done = Done(50, {}, {}, cast(Slot, Room(0)), 0.0, MODEL, model)
            cast(Any, done.delta).data = update(seed)
            self.talks[name] = Talk(secrecy, task, done)
        of = task.of
        bound = pact.context(of.run, of.round, of.attempt << 32 | 1, model=model, plan=task.terms, roster=roster)
        self.core = Unmasking(bound, roster)
        for talk in self.talks.values():
            talk.begin()
            assert isinstance(talk.said, Ready)
            assert talk.said.metrics == ()
            self.core.advert(talk.said.advert)

    def note(self, event: str, **_: object) -> None:
        self.noted.append(event)

    def pay(self, task: Task, form: Form) -> None:
        """Somebody is about to mask its words: nobody's have left before it has paid."""
        assert (task.noise, form.floats) == (self.task.noise, FLOATS)
        assert sum(talk.words is not None for talk in self.talks.values()) == self.paid
        self.paid += 1

    def say(self, name: str, what: Any) -> Any:
        """What a worker answers."""
        self.talks[name].heed(Call(TASK.of, 1, what))
        said = self.talks[name].said
        assert isinstance(said, Step)
        return said.says

    def add_up(self, form: Form, lost: str = "") -> pact.Finishers:
        settled = self.core.settle()
        for name in self.talks:
            self.core.shares(name, self.say(name, settled))
        for name, dealt in self.core.deal(form).items():
            masked = self.say(name, dealt)
            if name not in lost:
                words = self.talks[name].words
                assert words
                self.core.masked(name, np.frombuffer(words.data, form.ring.dtype), masked)
        return self.core.finishers()

    def reveal(self, finishers: pact.Finishers, form: Form) -> bytearray:
        """The version that comes of it."""
        for name in finishers.workers:
            self.core.vow(name, self.say(name, finishers))
        reveal = self.core.reveal()
        for name in finishers.workers:
            self.core.opened(name, self.say(name, reveal))
        sums = MEAN.init(MODEL, FORMATS["float32"])
        into_sums(form, self.core.result(), len(finishers.workers), sums)
        return finished(MEAN, sums, OLD)


# -- the sum --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [32, 64])
def test_the_ring_is_exact_with_noise_in_it_however_often_words_pass_its_end(bits: int) -> None:
    form = Form(ring(bits=bits), MODEL)
    grain = form.ring.grain
    assert grain
    total, wanted = np.zeros(form.words, form.ring.dtype), np.zeros(FLOATS, object)
    mask = np.random.default_rng(1).integers(0, 2**bits, form.words, dtype=form.ring.dtype.type)
    for seed in range(COHORT):
        words, noise = encode(form, update(seed), examples=1, metrics={}), np.zeros(FLOATS, np.int64)
        add_discrete(secrets.token_bytes(32), grain.bits, noise)
        form.signed(words)[:FLOATS] += noise.astype(form.signed(words).dtype)
        total += words + mask
        wanted += np.rint(deltas(seed) * grain.scale).astype(np.int64) + noise
    for _ in range(COHORT):
        total -= mask
    assert form.signed(total)[:FLOATS].tolist() == wanted.tolist()
    sums = MEAN.init(MODEL, FORMATS["float32"])
    into_sums(form, total, COHORT, sums)
    version = finished(MEAN, sums, OLD)
    found = np.frombuffer(version[8:])
    assert np.array_equal(found, wanted.astype(float) / (COHORT * grain.scale))
    assert version[:8] == OLD[:8]


@pytest.mark.parametrize("lost", ["", "b"])
def test_the_version_is_the_sum_with_the_noise_of_those_who_are_in_it_over_the_plans_cohort(
    tmp_path: Path, lost: str
) -> None:
    company, form = Company(tmp_path, "abcdef"), Form(ring(), MODEL)
    version = company.reveal(company.add_up(form, lost), form)
    assert company.paid == 6  # those who were lost, too: their words had left
    alive = [seed for seed, name in enumerate("abcdef") if name not in lost]
    found = np.frombuffer(version[8:])
    noise = found - sum(deltas(seed) for seed in alive) / COHORT
    wanted = NOISE * CLIP * math.sqrt(len(alive) / LEAST) / COHORT
    assert float(noise.std()) == pytest.approx(wanted, rel=5 / math.sqrt(2 * FLOATS))
    assert float(noise.mean()) == pytest.approx(0, abs=5 * wanted / math.sqrt(FLOATS))
    steps = found * COHORT * form.ring.scale
    assert np.abs(steps - np.rint(steps)).max() < 1e-5  # whole numbers: no float has told what was below a step
    assert np.bincount(np.rint(steps).astype(np.int64) & 3) / FLOATS == pytest.approx([0.25] * 4, abs=0.02)
    assert version[:8] == OLD[:8]  # nobody's own number


def test_a_worker_helps_to_reveal_no_sum_of_fewer_than_its_noise_was_made_for(tmp_path: Path) -> None:
    task = replace(TASK, noise=replace(SUM, least=5), secure=Secure(32, 5))
    company, form = Company(tmp_path, "abcde", task), Form(ring(least=5, cohort=5), MODEL)
    finishers = company.add_up(form, lost="e")  # four of five are enough for masks
    for name in "abcd":
        with pytest.raises(Refused, match="there are 4 finishers, and the noise is that of 5 or more"):
            company.say(name, finishers)
        assert company.talks[name].said is None
    assert company.noted == ["refused"] * 4


def say(talk: Talk, serial: int, what: Any) -> Any:
    """What a worker answers in one of several sums."""
    talk.heed(Call(talk._task.of, serial, what))
    return cast(Step, talk.said).says


def until_shares_are_asked_for(
    talks: dict[str, Talk], task: Task, roster: dict[str, bytes], serial: int, *, silent: str = ""
) -> tuple[Unmasking, pact.Reveal]:
    """A secure sum of these workers, of whom some do not vow."""
    of, form = task.of, Form(ring(), MODEL)
    bound = pact.context(of.run, of.round, of.attempt << 32 | serial, model=bytes(32), plan=task.terms, roster=roster)
    core = Unmasking(bound, roster)
    for talk in talks.values():
        talk.heed(Call(of, serial))
        core.advert(cast(Ready, talk.said).advert)
    settled = core.settle()
    for name, talk in talks.items():
        core.shares(name, say(talk, serial, settled))
    for name, dealt in core.deal(form).items():
        masked, words = say(talks[name], serial, dealt), talks[name].words
        core.masked(name, np.frombuffer(cast(Slot, words).data, form.ring.dtype), masked)
    finishers = core.finishers()
    for name in talks.keys() - {silent}:
        core.vow(name, say(talks[name], serial, finishers))
    return core, core.reveal()


def owner(most: float = math.inf) -> Any:
    return SimpleNamespace(policy=Policy(epsilon_max=most), note=lambda *_, **__: None)


def test_a_worker_pays_for_each_sum_that_it_is_in_for_others_can_reveal_that_without_it(tmp_path: Path) -> None:
    """A coordinator that lies has two sums of one round, with `a` in both, and asks it for no share in either."""
    names = "abcdefg"
    company = Company(tmp_path, names, replace(TASK, noise=replace(SUM, budget=1e3)))
    roster, spending = {name: KEYS[name] for name in names}, Spending(tmp_path, "a", owner())
    for name, talk in company.talks.items():
        talk._secrecy.pay = spending.share if name == "a" else lambda *_: None
    for serial, members in ((2, "abcd"), (3, "aefg")):
        talks = {name: company.talks[name] for name in members}
        core, reveal = until_shares_are_asked_for(talks, company.task, roster, serial, silent="a")
        for name in members[1:]:
            core.opened(name, say(talks[name], serial, reveal))
        assert core.result().any()
    ((released,),) = spending._read().values()
    assert released.times == 2


def test_vows_of_another_quorum_are_no_further_line_in_the_owners_ledger(tmp_path: Path) -> None:
    """Of so many vows there are more quorums than any disk has room for, and shares are opened once."""
    company, form = Company(tmp_path, "abcdef"), Form(ring(), MODEL)
    finishers = company.add_up(form)
    vows = [company.say(name, finishers).signature for name in finishers.workers]
    assert company.core.pact.quorum == 5
    for left_out in range(6):
        reveal = pact.Reveal(tuple(b"" if at == left_out else vow for at, vow in enumerate(vows)))
        assert company.talks["a"].heed(Call(TASK.of, 1, reveal)) == (left_out == 0)
    assert company.noted == ["secure"]
    with pytest.raises(Alarm, match="another set of finishers"):
        company.say("a", replace(finishers, workers=finishers.workers[:5], lost=("f",)))


def test_of_two_attempts_at_a_round_that_are_open_at_once_a_worker_helps_to_unmask_one(tmp_path: Path) -> None:
    """A coordinator that lies has two sums of the same updates, of five and of four: their difference is the fifth's.

    The second attempt is begun before the first is unmasked, when nothing has been put down yet.
    """
    names = "abcde"
    company = Company(tmp_path, names)
    roster = {name: KEYS[name] for name in names}
    again = replace(company.task, of=replace(TASK.of, attempt=2))
    for talk in company.talks.values():
        talk._secrecy.pay = lambda *_: None
    others = {name: Talk(company.talks[name]._secrecy, again, company.talks[name]._done) for name in names[:4]}
    first, reveal = until_shares_are_asked_for(company.talks, company.task, roster, 2)
    second, reveal_again = until_shares_are_asked_for(others, again, roster, 2)
    for name in names:
        first.opened(name, say(company.talks[name], 2, reveal))
    for talk in others.values():
        with pytest.raises(Alarm, match="has helped to unmask this round"):
            say(talk, 2, reveal_again)
    assert first.result().any()
    assert second.waiting == set(others)


def test_what_is_put_down_of_two_runs_at_once_is_all_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secrecy = Company(tmp_path, "abc").talks["a"]._secrecy

    def slow(path: Path) -> dict[str, Any]:
        found = read_record(path)
        time.sleep(0.1)
        return found

    monkeypatch.setattr(workers.secrecy, "read_record", slow)
    runs = [Attempt(run, 3, 1) for run in ("one", "two")]
    with ThreadPoolExecutor() as threads:
        list(threads.map(secrecy.record, runs, ("said of one", "said of two")))
    assert [secrecy.answered(of) for of in runs] == ["said of one", "said of two"]


def test_a_worker_that_was_started_anew_pays_no_more_than_its_owner_allows(tmp_path: Path) -> None:
    task = replace(TASK, noise=replace(SUM, budget=1e3))
    with pytest.raises(LearnerFailed, match="and the owner of the data allows 2"):
        Spending(tmp_path, "a", owner(2.0)).share(task, Form(ring(), MODEL))


# -- what is refused before -----------------------------------------------------------------------------------------


def test_both_sides_derive_keys_from_the_noise_that_was_asked_for() -> None:
    more = [
        replace(SUM, multiplier=0.6),
        replace(SUM, least=3),
        replace(SUM, budget=9.0),
        replace(SUM, of="row"),
        None,
    ]
    terms = [replace(TASK, noise=each).terms for each in more]
    assert len({TASK.terms, *terms}) == 6


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"noise": replace(SUM, multiplier=0.0)}, "hides nobody"),
        ({"noise": replace(SUM, of="row", multiplier=0.0)}, "hides nobody"),
        ({"noise": replace(SUM, of="row", clip=2.0**-149)}, "hides nobody"),
        ({"noise": replace(SUM, least=2)}, "hides nobody"),
        ({"secure": None}, "must say privacy = secure"),
        ({"examples_max": 20}, "with noise a worker counts as one example, not 20"),
        ({"noise": replace(SUM, multiplier=1e-6), "secure": Secure(32, 10_000)}, "has no room for 10000 workers"),
    ],
)
def test_a_worker_refuses_a_task_whose_noise_would_not_be_enough(changes: dict[str, Any], said: str) -> None:
    who = Who("a", "lesson", member=Member("a", IDENTITIES["a"], KEYS))
    check(TASK, who)
    with pytest.raises((LearnerFailed, UsageError), match=said):
        check(replace(TASK, **changes), who)


def test_noise_in_a_sum_that_is_no_secret_is_refused_by_whoever_knows_no_roster() -> None:
    with pytest.raises(LearnerFailed, match="hides nobody"):
        check(replace(TASK, secure=None), Who("a", "lesson"))


def test_an_owner_who_bounds_epsilon_serves_no_round_without_noise_or_with_a_delta_that_says_nothing() -> None:
    asked, policy = Asked("run", "lesson", "", True, 3, 100, secure=True), Policy(epsilon_max=2.0)
    for delta in (None, 0.5, 1.1e-3):
        why = policy.permits(replace(asked, delta=delta), minute=0, done_today=0)
        assert "bounds epsilon, for a delta of 0.001 at the most" in why
    assert not policy.permits(replace(asked, delta=1e-5), minute=0, done_today=0)
    assert policy.permits(replace(asked, trains=False), minute=0, done_today=0), "a score tells of rows, too"
    assert not Policy().permits(replace(asked, delta=0.5), minute=0, done_today=0)


SHARED: dict[str, Any] = {
    "run": "r", "learner": "x", "cohort": 10, "privacy": "secure", "dp": "distributed", "dp_noise": 1.0,
    "dp_budget": 8.0, "clip": 0.5,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"privacy": "none"}, "set privacy to secure"),
        ({"dp_noise": 0.0}, "needs dp_noise"),
        ({"clip": 0.0}, "a secure sum needs a bound of what is added"),
        ({"dp_population": 20}, "dp_population counts on nobody knowing who takes part"),
        ({"dp_adaptive": True}, "dp_adaptive is for dp = central"),
        ({"dp_delta": 0.2}, r"dp_delta \(0.2\) must be well below 1 / 10"),
        (
            {"cohort": 20_000, "dp_noise": 1e-4},
            "a ring of 32 bits has no room for 20000 workers .* set ring_bits to 64",
        ),
    ],
)
def test_a_plan_whose_workers_noise_would_not_be_enough_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        plans.make({**SHARED, **changes})


def test_a_plan_says_how_much_noise_it_asks_of_how_many() -> None:
    plan = plans.make(SHARED)
    assert plan.noise == Noise("sum", 1.0, 0.5, 1e-5, 8.0, 7)
    assert (plan.counts_most, plan.ring.cohort) == (1, 10)
    assert plan.ring.grain
    assert 2**plan.ring.grain.bits * math.sqrt(7) == pytest.approx(1.0 * 0.5 * plan.ring.scale)
