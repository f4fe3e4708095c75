"""A secure round: the sum's own bits whoever drops out, nothing else for anyone, workers that will not be fooled."""

import dataclasses
import math
import random
from collections.abc import Callable, Collection
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR, Mode
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from broker import masks, pact
from broker.errors import Aborted, Alarm, Refused, WireError
from broker.fields import build
from broker.masks import Mask, Words, apply
from broker.pact import Advert, Dealt, Finishers, Opened, Pact, Reveal, Settled, Shares, advertise
from broker.ring import Form, ring_of
from tests.unit.parley import MODEL, Parley


def chi_square(words: Words) -> float:
    """How many standard deviations the bytes' chi-square lies above what uniform bytes would give."""
    counts = np.bincount(words.view(np.uint8), minlength=256)
    expected = counts.sum() / 256
    return float((((counts - expected) ** 2 / expected).sum() - 255) / np.sqrt(2 * 255))


def neighbours_of_four(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the graph be a ring in which each has four neighbours: what a cohort above 64 has with more."""
    monkeypatch.setattr("broker.pact.degree_of", lambda members: min(4, members - 1))
    monkeypatch.setattr("broker.pact.pact_of", Pact)  # what follows is another, and must not be remembered


# -- the sum ---------------------------------------------------------------------------------------------------------


def some(dice: random.Random, names: list[str], most: int) -> set[str]:
    return set(dice.sample(names, dice.randint(0, min(most, len(names)))))


def attempt(parley: Parley, gone: list[set[str]]) -> Words:
    """One attempt, in which `gone[i]` drop out before stage i; the sum."""
    settled = parley.settle(without=gone[0])
    finishers = parley.add(parley.deal(settled, without=gone[1]), without=gone[2])
    reveal = parley.vow(finishers, without=gone[3])
    parley.open(reveal, without=gone[3] | gone[4])
    return parley.core.result()


def check_sum(count: int, seed: int, *, bits: int) -> None:
    """One attempt with drop-outs drawn from the seed has the plain sum's bits, or ends with a reason."""
    parley, dice = Parley(count, seed=seed, bits=bits), random.Random(seed)
    here, gone = set(parley.names), []
    for _ in range(5):
        gone.append(some(dice, sorted(here), dice.choice([0, 1, count // 8, count // 3])))
        here -= gone[-1]
    try:
        total = attempt(parley, gone)
    except Aborted:
        ours = parley.core.pact if parley.core.stage != "adverts" else None
        assert ours is None or not enough_left(ours, [set(parley.names).difference(*gone[:n]) for n in range(6)])
        return
    assert total.tobytes() == parley.sum_of(set(parley.names).difference(*gone[:3])).tobytes()


def enough_left(ours: Pact, here: list[set[str]]) -> bool:
    """Whether a quorum has vowed, and of each dealer's holders the threshold are left to the end."""
    dealers, vowed, left = here[2], here[4], here[5]
    near = (len(left.intersection(ours.holders[dealer])) for dealer in dealers)
    return len(vowed) >= max(3, ours.quorum) and all(each >= ours.settled.threshold for each in near)


@settings(max_examples=25, deadline=None)
@given(st.integers(3, 12), st.integers(0, 2**32), st.sampled_from([32, 64]))
def test_the_sum_is_the_plain_sums_bits_or_there_is_none(count: int, seed: int, bits: int) -> None:
    check_sum(count, seed, bits=bits)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(6, 14), st.integers(0, 2**32))
def test_so_it_is_where_not_everyone_is_everyones_neighbour(
    monkeypatch: pytest.MonkeyPatch, count: int, seed: int
) -> None:
    with monkeypatch.context() as patch:
        neighbours_of_four(patch)
        check_sum(count, seed, bits=32)


@pytest.mark.chaos
@pytest.mark.timeout(900)
@settings(max_examples=80, deadline=None)
@given(st.integers(3, 100), st.integers(0, 2**32), st.sampled_from([32, 64]))
def test_so_it_is_with_up_to_a_hundred_workers(count: int, seed: int, bits: int) -> None:
    check_sum(count, seed, bits=bits)


@pytest.mark.parametrize("stage", range(5))
def test_a_worker_may_drop_out_in_any_stage(stage: int) -> None:
    parley = Parley(5, seed=stage)
    total = attempt(parley, [{"w-001"} if stage == at else set() for at in range(5)])
    counted = parley.names if stage > 2 else [name for name in parley.names if name != "w-001"]
    assert total.tobytes() == parley.sum_of(counted).tobytes()


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        (0, "2 workers were ready, and 3 are needed"),
        (1, "3 members have dealt, and 4 are needed"),
        (2, "3 members have sent their masked update, and 4 are needed"),
        (3, "3 members vow for the same finishers, and 4 are needed"),
        (4, "3 shares of w-000's secret were opened, and 4 are needed"),
    ],
)
def test_below_the_threshold_an_attempt_ends_with_the_reason(stage: int, said: str) -> None:
    parley = Parley(5)
    left = ["w-000", "w-001", "w-002"][: 2 if stage == 0 else 3]
    gone = [set(parley.names) - set(left) if stage == at else set() for at in range(5)]
    with pytest.raises(Aborted, match=f"{said}: the attempt ends, and no update was revealed"):
        attempt(parley, gone)
    assert not parley.core.enough


def test_the_coordinator_knows_for_whom_it_waits() -> None:
    parley = Parley(4)
    assert parley.core.waiting == set(parley.names)
    settled = parley.settle(without={"w-003"})
    assert parley.core.waiting == {"w-000", "w-001", "w-002"}
    parley.core.shares("w-001", parley.workers["w-001"].shares(settled, ["loss"]))
    assert parley.core.waiting == {"w-000", "w-002"}


# -- what comes twice, and late --------------------------------------------------------------------------------------


def test_the_same_request_again_gives_the_same_bytes_and_counts_once() -> None:
    parley = Parley(4)
    settled = parley.settle()
    worker, core = parley.workers["w-000"], parley.core
    assert core.advert(worker.advert) is False
    assert worker.shares(settled, ["loss"]) is worker.shares(dataclasses.replace(settled), ["loss"])
    dealt = parley.deal(settled)
    assert core.shares("w-000", worker.shares(settled, ["loss"])) is False
    finishers = parley.add(dealt)
    vow = worker.vow(finishers)
    assert vow == worker.vow(Finishers(finishers.workers, finishers.lost))
    reveal = parley.vow(finishers)
    assert core.vow("w-000", vow) is False
    assert worker.answer(reveal) == worker.answer(reveal)
    parley.open(reveal)
    assert core.opened("w-000", parley.opened("w-000", reveal)) is False
    assert core.result().tobytes() == parley.sum_of(parley.names).tobytes()


def test_masked_words_that_come_twice_are_added_once_and_late_ones_never() -> None:
    parley = Parley(5)
    dealt = parley.deal(parley.settle())
    masked = {name: parley.workers[name].mask(dealt[name], parley.words[name]) for name in parley.names}
    for name in parley.names[:4]:
        assert parley.core.expects(name)
        assert parley.core.masked(name, parley.words[name], masked[name]) is True
        assert parley.core.expects(name) is False
        assert parley.core.masked(name, parley.words[name], masked[name]) is False
    finishers = parley.core.finishers()
    before = parley.core.total.copy()
    with pytest.raises(Refused, match=r"w-004 is late or early: .* the stage is vows"):
        parley.core.masked("w-004", parley.words["w-004"], masked["w-004"])
    assert (parley.core.total == before).all()
    parley.open(parley.vow(finishers))
    assert parley.core.result().tobytes() == parley.sum_of(parley.names[:4]).tobytes()


def test_late_words_stay_hidden_though_the_mask_key_of_their_worker_is_known() -> None:
    parley = Parley(5)
    parley.form = Form(ring_of(32, clip=1.0, examples_max=100, cohort=5), MODEL, ("loss",) + ("more",) * 3000)
    parley.words = {name: np.zeros(parley.form.words, np.uint32) for name in parley.names}
    parley.plain = {name: np.zeros(parley.form.words, np.uint32) for name in parley.names}
    settled = parley.settle()
    dealt = parley.deal(settled)
    late = parley.workers["w-004"]
    late.mask(dealt["w-004"], parley.words["w-004"])
    finishers = parley.add(dealt, without={"w-004"})
    parley.open(parley.vow(finishers))
    parley.core.result()
    # what the coordinator knows of it: every mask it shares with others; what is left is its own
    left = parley.words["w-004"].copy()
    for other in parley.names[:4]:
        mask = parley.core.pact.pair_mask(late._mask_key, "w-004", other, 32)
        apply(left, [mask._replace(plus=not mask.plus)])
    assert abs(chi_square(left)) < 5


def test_a_member_that_says_something_else_than_before_is_refused() -> None:
    parley = Parley(4)
    settled = parley.settle()
    shares = parley.workers["w-000"].shares(settled, ["loss"])
    parley.core.shares("w-000", shares)
    with pytest.raises(Refused, match="w-000 has said something else before"):
        parley.core.shares("w-000", dataclasses.replace(shares, commitment=bytes(32)))


# -- what a worker never does ----------------------------------------------------------------------------------------


def resigned(settled: Settled, name: str, **changes: Any) -> Settled:
    """The cohort with one advert changed."""
    adverts = (dataclasses.replace(a, **changes) if a.worker == name else a for a in settled.adverts)
    return Settled.of(adverts, settled.threshold, settled.metrics)


def stranger(parley: Parley, settled: Settled) -> Settled:
    keys = b"".join(X25519PrivateKey.generate().public_key().public_bytes_raw() for _ in range(2))
    other = advertise(parley.context, "w-zzz", keys, parley.identities["w-001"])
    return Settled.of((*settled.adverts, other), settled.threshold, settled.metrics)


def copied(parley: Parley, settled: Settled) -> Settled:
    first, second = parley.workers["w-000"].advert, parley.identities["w-001"]
    return resigned(settled, "w-001", **_fields(advertise(parley.context, "w-001", first.keys, second)))


def _fields(advert: Advert) -> dict[str, bytes]:
    return {"keys": advert.keys, "signature": advert.signature}


def of_another_model(parley: Parley, settled: Settled) -> Settled:
    other = parley.worker("w-001", context=parley.bound(model=b"another model's digest".ljust(32)))
    return resigned(settled, "w-001", **_fields(other.advert))


def of_another_attempt(parley: Parley, settled: Settled) -> Settled:
    other = parley.worker("w-001", context=parley.bound(attempt=2))
    return resigned(settled, "w-001", **_fields(other.advert))


def without(*names: str) -> Callable[[Parley, Settled], Settled]:
    def change(_: Parley, settled: Settled) -> Settled:
        left = (a for a in settled.adverts if a.worker not in names)
        return Settled.of(left, settled.threshold, settled.metrics)

    return change


COHORTS: dict[str, tuple[Callable[[Parley, Settled], Settled], str]] = {
    "an unknown name": (stranger, "w-zzz is not on the roster"),
    "a wrong signature": (
        lambda _, settled: resigned(settled, "w-001", signature=bytes(64)),
        "w-001's signature is wrong",
    ),
    "another's keys": (copied, "two of the cohort's keys are equal"),
    "another model": (of_another_model, "w-001's signature is wrong: .* model"),
    "another attempt": (of_another_attempt, "w-001's signature is wrong"),
    "without this worker": (without("w-000"), "advert is missing"),
    "this worker's advert changed": (
        lambda parley, settled: resigned(settled, "w-000", **_fields(parley.worker("w-000").advert)),
        "advert is missing from the cohort, or is another",
    ),
    "fewer than it wants": (without("w-003", "w-004"), "4 members, and this worker wants 5 or more"),
    "out of order": (
        lambda _, settled: Settled.of(settled.adverts[::-1], settled.threshold, settled.metrics),
        "not sorted, or names a worker twice",
    ),
    "a worker twice": (
        lambda _, settled: Settled.of((*settled.adverts, settled.adverts[-1]), settled.threshold, settled.metrics),
        "not sorted, or names a worker twice",
    ),
    "an advert too few": (
        lambda _, settled: dataclasses.replace(settled, signed=settled.signed[:-128]),
        "not one advert for each name",
    ),
    "a byte too many": (
        lambda _, settled: dataclasses.replace(settled, signed=settled.signed + b"0"),
        "not one advert for each name",
    ),
    "a low threshold": (
        lambda _, settled: dataclasses.replace(settled, threshold=3),
        "the threshold is 3; this worker wants 5",
    ),
    "a threshold nobody can reach": (
        lambda _, settled: dataclasses.replace(settled, threshold=7),
        "above the number of holders",
    ),
    "a metric that it has not": (
        lambda _, settled: dataclasses.replace(settled, metrics=("mine alone",)),
        "has no metric 'mine alone'",
    ),
}


@pytest.mark.parametrize("name", COHORTS)
def test_a_worker_deals_no_shares_to_a_cohort_with(name: str) -> None:
    parley = Parley(6, cohort_min=5)
    change, said = COHORTS[name]
    settled = parley.settle()
    with pytest.raises(Refused, match=said):
        parley.workers["w-000"].shares(change(parley, settled), ["loss"])
    parley.workers["w-000"].shares(settled, ["loss"])  # what is right is answered all the same


def test_a_cohort_that_is_right_for_one_is_looked_at_anew_by_whoever_has_another_roster() -> None:
    parley = Parley(4)
    settled = parley.settle()
    parley.workers["w-000"].shares(settled, ["loss"])
    del parley.roster["w-003"]
    with pytest.raises(Refused, match="w-003 is not on the roster"):
        parley.workers["w-001"].shares(settled, ["loss"])


def test_neither_side_takes_part_in_a_cohort_over_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    parley = Parley(5)
    settled = parley.settle()
    monkeypatch.setattr("broker.pact.COHORT_MAX", 4)
    with pytest.raises(Refused, match="5 members, over the limit of 4"):
        parley.workers["w-000"].shares(settled, ["loss"])
    with pytest.raises(Refused, match="at most 4 members"):
        Parley(5).settle()


def test_a_worker_deals_to_one_cohort_only() -> None:
    parley = Parley(5)
    settled = parley.settle()
    parley.workers["w-000"].shares(settled, ["loss"])
    with pytest.raises(Alarm, match="already answered for another cohort"):
        parley.workers["w-000"].shares(without("w-004")(parley, settled), ["loss"])


def test_a_worker_masks_once_and_only_against_enough_dealers() -> None:
    parley = Parley(5)
    dealt = parley.deal(parley.settle())["w-000"]
    worker, words = parley.workers["w-000"], parley.words["w-000"]
    for few, said in ((Dealt(dealt.sealed[:3]), "one slot"), (Dealt((*dealt.sealed[:2], b"", b"")), "3 holders")):
        with pytest.raises(Refused, match=said):
            worker.mask(few, words)
    assert (words == parley.plain["w-000"]).all()
    worker.mask(dealt, words)
    masked = words.copy()
    with pytest.raises(Refused, match="is masked: send what was made then"):
        worker.mask(dealt, words)
    with pytest.raises(Alarm, match="another set of dealers"):
        worker.mask(Dealt((*dealt.sealed[:3], b"")), words)
    assert (words == masked).all()


FINISHERS: dict[str, tuple[Finishers, str]] = {
    "too few": (Finishers(("w-000", "w-001", "w-002"), ("w-003", "w-004")), "3 finishers, and it takes 4"),
    "two": (Finishers(("w-000", "w-001"), ("w-002", "w-003", "w-004")), "2 finishers, and it takes 4"),
    "strangers": (Finishers(("w-000", "w-001", "w-002", "w-003", "w-zzz"), ("w-004",)), "not all are members"),
    "out of order": (Finishers(("w-001", "w-000", "w-002", "w-003"), ("w-004",)), "not in order"),
    "one twice": (Finishers(("w-000", "w-000", "w-001", "w-002"), ("w-003", "w-004")), "not in order"),
    "not this worker": (Finishers(("w-001", "w-002", "w-003", "w-004"), ("w-000",)), "not among the finishers"),
    "one that is lost": (Finishers(("w-000", "w-001", "w-002", "w-003"), ("w-003", "w-004")), "lost as well"),
    "one that never dealt": (Finishers(("w-000", "w-001", "w-002", "w-003"), ()), "others have dealt"),
}


@pytest.mark.parametrize("name", FINISHERS)
def test_a_worker_does_not_vow_for(name: str) -> None:
    parley = Parley(5)
    right = parley.until_vows()
    wrong, said = FINISHERS[name]
    with pytest.raises(Refused, match=said):
        parley.workers["w-000"].vow(wrong)
    parley.workers["w-000"].vow(right)


def test_of_three_workers_none_may_be_lost() -> None:
    parley = Parley(3)
    parley.until_vows()
    with pytest.raises(Refused, match="2 finishers, and it takes 3"):
        parley.workers["w-000"].vow(Finishers(("w-000", "w-001"), ("w-002",)))


def test_unmasking_twice_with_other_survivors_is_impossible() -> None:
    parley = Parley(5)
    finishers = parley.until_vows()
    reveal = parley.vow(finishers)
    parley.open(reveal)
    others = Finishers(("w-000", "w-001", "w-002", "w-003"), ("w-004",))
    for name in parley.names:
        with pytest.raises(Alarm, match="already answered for another set of finishers"):
            parley.workers[name].vow(others)
        again = parley.workers[name].answer(reveal)
        assert again.opened == parley.core._opened[name]
    record = parley.workers["w-000"].answer(reveal).record
    assert record
    with pytest.raises(Alarm, match="has helped to unmask this round"):
        parley.worker("w-000", context=parley.bound(attempt=2), answered=record)


REVEALS: dict[str, tuple[Callable[[Reveal], Reveal], str]] = {
    "too few vows": (lambda r: Reveal((*r.vows[:3], b"", b"")), "3 have vowed where 4 are needed"),
    "a forged vow": (lambda r: Reveal((*r.vows[:4], bytes(64))), "w-004's signature is wrong"),
    "one vow many times": (lambda r: Reveal((r.vows[0],) * 5), "w-001's signature is wrong"),
    "no slots": (lambda r: Reveal(r.vows[:4]), "not one vow for each"),
}


@pytest.mark.parametrize("name", REVEALS)
def test_a_worker_opens_nothing_for(name: str) -> None:
    parley = Parley(5)
    reveal = parley.vow(parley.until_vows())
    change, said = REVEALS[name]
    with pytest.raises(Refused, match=said):
        parley.workers["w-000"].answer(change(reveal))
    assert parley.workers["w-000"].answer(reveal)


def test_a_worker_never_opens_both_shares_of_one_peer() -> None:
    parley = Parley(5)
    finishers = parley.add(parley.deal(parley.settle()), without={"w-004"})
    reveal = parley.vow(finishers)
    held = parley.workers["w-000"]._held
    for name, share in zip(parley.names, parley.opened("w-000", reveal).shares, strict=True):
        of_self_mask, of_key = held[name]
        assert of_self_mask != of_key
        assert share == (of_key if name == "w-004" else of_self_mask)


def test_two_sums_of_the_same_updates_give_away_whoever_is_in_one_of_them_alone() -> None:
    """What no mask can hide, as SECURITY.md says: another run, or round, of the same version without one worker."""
    sums = []
    for count in (5, 4):
        parley = Parley(count)
        parley.open(parley.vow(parley.until_vows()))
        sums.append(parley.core.result())
    assert (sums[0] - sums[1]).tobytes() == Parley(5).plain["w-004"].tobytes()


def test_steps_that_are_left_out_are_not_answered() -> None:
    parley = Parley(4)
    worker = parley.workers["w-000"]
    with pytest.raises(Refused, match="before there is a cohort"):
        worker.mask(Dealt((b"", b"", b"")), parley.words["w-000"])
    with pytest.raises(Refused, match="before this worker has masked"):
        worker.vow(Finishers(tuple(parley.names), ()))
    with pytest.raises(Refused, match="before this worker has vowed"):
        worker.answer(Reveal((bytes(64),) * 4))


# -- a coordinator that lies -----------------------------------------------------------------------------------------


def test_a_coordinator_that_splits_the_view_of_survivors_gets_neither_sum() -> None:
    parley = Parley(6)
    parley.until_vows()
    views = [Finishers(tuple(n for n in parley.names if n != gone), (gone,)) for gone in ("w-004", "w-005")]
    vows = []
    for view, group in zip(views, (parley.names[:3], parley.names[3:]), strict=True):
        vows.append({name: parley.workers[name].vow(view).signature for name in group if name in view.workers})
    for view, found in zip(views, vows, strict=True):
        reveal = Reveal(tuple(found.get(name, b"") for name in view.workers))
        for name in view.workers:
            with pytest.raises(Refused):
                parley.workers[name].answer(reveal)


def test_a_coordinator_that_shows_another_cohort_to_some_gets_noise_and_no_shares() -> None:
    parley = Parley(6)
    settled = parley.settle()
    fewer = without("w-005")(parley, settled)
    shown = {name: settled if name < "w-003" else fewer for name in parley.names[:5]}
    pacts = {name: Pact(parley.context, each) for name, each in shown.items()}
    shares = {name: parley.workers[name].shares(each, ["loss"]) for name, each in shown.items()}
    sealed = {
        name: dict(zip(pacts[name].neighbours[name], each.sealed, strict=True)) for name, each in shares.items()
    }
    for name, cohort in shown.items():
        slots = [sealed.get(dealer, {}).get(name, b"") for dealer in pacts[name].neighbours[name]]
        parley.workers[name].mask(Dealt(tuple(slots)), parley.words[name])
        alike = {other for other in shown if shown[other] is cohort}
        assert set(parley.workers[name]._held) == alike
    with pytest.raises(Refused, match="others have dealt"):
        parley.workers["w-000"].vow(Finishers(("w-000", "w-001", "w-002", "w-003", "w-005"), ("w-004",)))


def test_workers_that_were_shown_another_model_add_noise() -> None:
    """Their adverts are refused; and even if nobody looked, no masks would cancel and no share could be opened."""
    parley = Parley(4)
    other = parley.worker("w-003", context=parley.bound(model=b"\1" * 32))
    with pytest.raises(Refused, match="w-003's signature is wrong"):
        parley.core.advert(other.advert)
    adverts = (*(parley.workers[name].advert for name in parley.names[:3]), other.advert)
    settled = Settled.of(adverts, 3, ())
    theirs, its = Pact(parley.context, settled), Pact(parley.bound(model=b"\1" * 32), settled)
    size = 50_000
    mine, yours = np.zeros(size, np.uint32), np.zeros(size, np.uint32)
    key = parley.workers["w-000"]._mask_key
    apply(mine, [theirs.pair_mask(key, "w-000", "w-003", 32)])
    apply(yours, [its.pair_mask(other._mask_key, "w-003", "w-000", 32)])
    assert (mine + yours).any()
    assert abs(chi_square(mine + yours)) < 5
    common = its.common(other._seal_key, "w-003", "w-000")
    sealed = its.seal(common, "w-003", "w-000", b"shares")
    assert its.unseal(common, "w-003", "w-000", sealed) == b"shares"
    assert its.unseal(common, "w-000", "w-003", sealed) == b"", "what was sealed in one direction opens in the other"
    common = theirs.common(parley.workers["w-000"]._seal_key, "w-000", "w-003")
    assert theirs.unseal(common, "w-003", "w-000", sealed) == b""
    same = np.zeros(size, np.uint32)
    apply(same, [theirs.pair_mask(other._mask_key, "w-003", "w-000", 32)])
    assert not (mine + same).any()  # as it is where both have the same model


def test_beyond_a_complete_graph_a_worker_looks_against_whom_its_neighbours_have_masked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Shown few dealers, the victim's words hide behind them alone; the others must not help to unmask it then."""
    neighbours_of_four(monkeypatch)
    parley = Parley(12)
    settled = parley.settle()
    dealt = parley.deal(settled)
    victim = "w-003"
    near = parley.core.pact.neighbours[victim]
    dealt[victim] = Dealt((*dealt[victim].sealed[:3], b""))
    masked = {name: parley.workers[name].mask(dealt[name], parley.words[name]) for name in parley.names}
    with pytest.raises(Refused, match="w-003's signature is wrong"):
        parley.core.masked(victim, parley.words[victim], masked[victim])
    finishers = Finishers(tuple(parley.names), (), tuple(masked[name].dealers for name in parley.names))
    for name in parley.names:
        if name in near:
            with pytest.raises(Refused, match="w-003's signature is wrong"):
                parley.workers[name].vow(finishers)
        elif name != victim:
            parley.workers[name].vow(finishers)
    with pytest.raises(Refused, match="others have dealt than to this worker"):
        parley.workers[victim].vow(finishers)
    silent = dataclasses.replace(finishers, dealers=())
    with pytest.raises(Refused, match="do not say against whom"):
        parley.workers[near[0]].vow(silent)


def test_beyond_a_complete_graph_a_worker_does_not_vow_with_too_few_of_its_holders(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    neighbours_of_four(monkeypatch)
    parley = Parley(12)
    dealt = parley.deal(parley.settle())
    masked = {name: parley.workers[name].mask(dealt[name], parley.words[name]) for name in parley.names}
    lost = parley.core.pact.neighbours["w-003"][:2]
    done = tuple(name for name in parley.names if name not in lost)
    assert len(done) > parley.core.pact.quorum
    with pytest.raises(Refused, match="fewer holders have finished than the threshold"):
        parley.workers["w-003"].vow(Finishers(done, lost, tuple(masked[name].dealers for name in done)))


# -- workers that lie ------------------------------------------------------------------------------------------------


def test_one_false_share_is_found_and_the_sum_is_right_all_the_same() -> None:
    parley = Parley(6)
    reveal = parley.vow(parley.add(parley.deal(parley.settle()), without={"w-005"}))
    for name in parley.names[:5]:
        opened = parley.opened(name, reveal)
        if name == "w-001":
            opened = Opened(tuple(bytes([share[0]]) + share[:0:-1] for share in opened.shares))
        parley.core.opened(name, opened)
    with pytest.raises(Aborted, match="dealt false shares"):  # five shares where five are needed, and one is false
        parley.core.result()
    parley = Parley(6)
    reveal = parley.vow(parley.until_vows())
    for name in parley.names:
        opened = parley.opened(name, reveal)
        parley.core.opened(name, Opened((b"\1" * 33,) * 6) if name == "w-001" else opened)
    assert parley.core.result().tobytes() == parley.sum_of(parley.names).tobytes()
    assert "w-001" not in parley.core.believed


def deceived(parley: Parley, dealer: str, shares: Shares, holders: Collection[str]) -> Shares:
    """What a dealer has dealt, but for some, whose shares are of nothing."""
    ours, sealed, common = parley.core.pact, [*shares.sealed], parley.workers[dealer]._common
    for at, name in enumerate(ours.neighbours[dealer]):
        if name in holders:
            sealed[at] = ours.seal(common[name], dealer, name, bytes([0]) + b"\5" * 65)
    return Shares(tuple(sealed), shares.commitment)


@pytest.mark.parametrize(
    ("count", "liars", "dealers"),
    [
        (7, {"w-000", "w-001"}, {}),  # of seven any five are enough
        (10, {"w-000", "w-001", "w-002"}, {}),
        (10, {"w-000"}, {"w-001": ["w-002", "w-003"]}),
        # whoever was dealt a false share by one is believed all the same where another has dealt
        (4, (), {"w-000": ["w-001"], "w-002": ["w-003"]}),
        (10, (), {"w-000": ["w-001"], "w-002": ["w-003"], "w-004": ["w-005"], "w-006": ["w-007"]}),
        (70, {"w-000", "w-001", "w-002"}, {}),
    ],
)
def test_as_long_as_enough_shares_of_each_secret_are_true_the_sum_is_right(
    count: int, liars: Collection[str], dealers: dict[str, list[str]]
) -> None:
    parley = Parley(count)
    settled = parley.settle()
    for name in parley.names:
        shares = parley.workers[name].shares(settled, ["loss"])
        parley.core.shares(name, deceived(parley, name, shares, dealers.get(name, ())))
    reveal = parley.vow(parley.add(parley.core.deal(parley.form)))
    for name in parley.names:
        opened = parley.opened(name, reveal)
        parley.core.opened(name, Opened((b"\1" * 33,) * len(opened.shares)) if name in liars else opened)
    assert parley.core.result().tobytes() == parley.sum_of(parley.names).tobytes()
    assert not parley.core.spoilers


def test_a_vow_for_others_and_shares_for_others_do_not_count() -> None:
    parley = Parley(4)
    finishers = parley.until_vows()
    signature = parley.workers["w-001"].vow(finishers)
    with pytest.raises(Refused, match="w-000's signature is wrong"):
        parley.core.vow("w-000", signature)
    reveal = parley.vow(finishers)
    opened = parley.opened("w-000", reveal)
    with pytest.raises(Refused, match="w-000 has not opened one share for each of its holders"):
        parley.core.opened("w-000", Opened(opened.shares[:3]))
    assert parley.core.waiting == set(parley.names)


def test_a_dealer_whose_shares_nobody_can_open_is_named() -> None:
    parley = Parley(5)
    settled = parley.settle()
    for name in parley.names:
        shares = parley.workers[name].shares(settled, ["loss"])
        parley.core.shares(name, Shares((b"junk" * 20,) * 4, bytes(32)) if name == "w-002" else shares)
    dealt = parley.core.deal(parley.form)
    parley.open(parley.vow(parley.add(dealt)))
    with pytest.raises(Aborted, match="w-002 dealt false shares"):
        parley.core.result()
    assert parley.core.spoilers == {"w-002"}


def test_whoever_has_committed_to_another_secret_or_is_lost_with_a_key_that_is_not_its_own_is_named() -> None:
    parley = Parley(7)
    for name in parley.names:
        worker = parley.workers[name]
        if name == "w-002":  # X25519 takes no notice of the last bit of a key
            odd = bytearray(worker.advert.keys)
            odd[31] |= 0x80
            worker.advert = advertise(parley.context, name, bytes(odd), parley.identities[name])
        parley.core.advert(worker.advert)
    settled = parley.core.settle(["loss"])
    for name in parley.names:
        shares = parley.workers[name].shares(settled, ["loss"])
        parley.core.shares(name, Shares(shares.sealed, bytes(32)) if name == "w-004" else shares)
    parley.open(parley.vow(parley.add(parley.core.deal(parley.form), without={"w-002"})))
    with pytest.raises(Aborted, match="w-002, w-004 dealt false shares"):
        parley.core.result()


def unusable(parley: Parley) -> Advert:
    """Keys with which everyone's secret is zero."""
    good = X25519PrivateKey.generate().public_key().public_bytes_raw()
    return advertise(parley.context, "w-000", bytes(32) + good, parley.identities["w-000"])


ADVERTS: dict[str, tuple[Callable[[Parley], Advert], str]] = {
    "keys that give no secret": (unusable, "w-000 advertises a key that gives no secret"),
    "one key twice": (
        lambda p: advertise(p.context, "w-000", p.workers["w-000"].advert.keys[:32] * 2, p.identities["w-000"]),
        "a key that is there already",
    ),
    "another's key": (
        lambda p: advertise(p.context, "w-000", p.workers["w-001"].advert.keys, p.identities["w-000"]),
        "a key that is there already",
    ),
    "another's name": (
        lambda p: advertise(p.context, "w-001", p.workers["w-000"].advert.keys, p.identities["w-000"]),
        "has said something else before",
    ),
    "a name that is not on the roster": (
        lambda p: dataclasses.replace(p.workers["w-000"].advert, worker="w-zzz"),
        "w-zzz is not one of those",
    ),
    "keys of too few bytes": (
        lambda p: dataclasses.replace(p.workers["w-000"].advert, keys=b""),
        "w-000's signature is wrong",
    ),
}


@pytest.mark.parametrize("name", ADVERTS)
def test_the_coordinator_takes_no_advert_with(name: str) -> None:
    parley = Parley(4)
    parley.core.advert(parley.workers["w-001"].advert)
    make, said = ADVERTS[name]
    with pytest.raises(Refused, match=said):
        parley.core.advert(make(parley))
    assert parley.core.advert(parley.workers["w-000"].advert)


def test_the_coordinator_takes_no_words_that_are_not_the_sums_nor_shares_for_too_few() -> None:
    parley = Parley(4)
    settled = parley.settle()
    shares = parley.workers["w-000"].shares(settled, ["loss"])
    for few in (shares.sealed[:2], (*shares.sealed[:2], b"")):
        with pytest.raises(Refused, match="has not dealt to its neighbours"):
            parley.core.shares("w-000", dataclasses.replace(shares, sealed=few))
    dealt = parley.deal(settled)
    masked = parley.workers["w-000"].mask(dealt["w-000"], parley.words["w-000"])
    wrong: list[Words] = [parley.words["w-000"][1:], parley.words["w-000"].astype(np.uint64)]
    for words in wrong:
        with pytest.raises(Refused, match="which are not the sum's"):
            parley.core.masked("w-000", words, masked)
    with pytest.raises(Refused, match="w-000's signature is wrong"):
        parley.core.masked("w-000", parley.words["w-000"], dataclasses.replace(masked, dealers=bytes(64)))
    with pytest.raises(Refused, match="not one of those who may speak here"):
        parley.core.masked("w-zzz", parley.words["w-000"], masked)
    assert not parley.core.total.any()


# -- what everyone computes alike ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [32, 64])
def test_masked_words_look_like_dice(bits: int) -> None:
    parley = Parley(3, bits=bits)
    dealt = parley.deal(parley.settle())
    words: Words = np.zeros(100_000, parley.form.ring.dtype)
    parley.workers["w-000"].mask(dealt["w-000"], words)
    assert abs(chi_square(words)) < 5
    assert len(np.unique(words.view(np.uint32))) > 0.99 * len(words.view(np.uint32))


@pytest.mark.parametrize("mode", masks.MODES, ids=["CTR", "GCM"])
@pytest.mark.parametrize("dtype", ["<u4", "<u8"])
def test_a_mask_is_one_keystream_from_the_first_word_to_the_last(
    dtype: str, mode: Mode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In whichever way it is drawn."""
    monkeypatch.setattr(masks, "fastest", lambda: mode)
    words: Words = np.arange(200_003).astype(dtype)
    before, key = words.copy(), bytes(range(32))
    stream = Cipher(AES(key), CTR((2).to_bytes(16, "big"))).encryptor().update(bytes(words.nbytes))
    apply(words, [Mask(key, plus=True)])
    assert (words - before).tobytes() == stream
    apply(words, [Mask(key, plus=False)])
    assert (words == before).all()


def test_words_of_32_and_of_64_bits_are_hidden_by_other_keystreams() -> None:
    parley = Parley(3)
    pact_ = Pact(parley.context, parley.settle())
    key = parley.workers["w-000"]._mask_key
    narrow, wide = (pact_.pair_mask(key, "w-000", "w-001", bits) for bits in (32, 64))
    assert narrow.key != wide.key
    assert pact_.self_mask(b"s" * 32, "w-000", 32) != pact_.self_mask(b"s" * 32, "w-000", 64)


def test_what_is_signed_in_one_attempt_is_worth_nothing_in_another() -> None:
    parley = Parley(3)
    settled = parley.settle()
    first, second = Pact(parley.context, settled), Pact(parley.bound(attempt=2), settled)
    assert first.dealers("w-000", ["w-001"]) != second.dealers("w-000", ["w-001"])
    assert first.finishers(Finishers(("w-000",), ())) != second.finishers(Finishers(("w-000",), ()))
    assert first.commitment("w-000", b"s") != second.commitment("w-000", b"s")


def test_thresholds_and_quorums_are_above_two_thirds() -> None:
    assert {n: pact.threshold_of(n) for n in (3, 4, 10, 32, 64)} == {3: 3, 4: 3, 10: 7, 32: 22, 64: 43}
    for count in range(3, 65):
        assert 3 * pact.threshold_of(count) > 2 * count >= 3 * (pact.threshold_of(count) - 1)
    for count in (65, 100, 1000, 10_000):
        assert 3 * pact.threshold_of(count) > 2 * (pact.degree_of(count) + 1)
    assert [pact.degree_of(count) for count in (3, 64, 65, 100, 1000, 10_000)] == [2, 63, 32, 44, 86, 104]


@pytest.mark.parametrize(("part", "bits"), [(5, 64), (3, 25)])
@pytest.mark.parametrize("count", [65, 100, 256, 1000])
def test_hardly_ever_do_colluders_hold_all_but_one_of_the_shares_that_open_a_secret(
    count: int, part: int, bits: int
) -> None:
    degree, bad = pact.degree_of(count), count // part
    odds = Fraction(1)  # that one member has fewer of them among its neighbours, drawn without putting back
    for found in range(pact.threshold_of(count) - 1, min(bad, degree) + 1):
        odds -= Fraction(
            math.comb(degree, found) * math.comb(count - 1 - degree, bad - found), math.comb(count - 1, bad)
        )
    assert (1 - odds) * count < Fraction(1, 2**bits)


@pytest.mark.parametrize("count", [3, 64, 65, 130])
def test_the_graph_is_regular_and_the_same_from_both_sides(count: int) -> None:
    adverts = tuple(Advert(f"w-{n:03d}", n.to_bytes(64, "big"), bytes(64)) for n in range(count))
    ours = Pact(b"c" * 32, Settled.of(adverts, 3, ()))
    for name in ours.keys:
        near = ours.neighbours[name]
        assert len(near) == pact.degree_of(count)
        assert name not in near
        assert ours.holders[name] == tuple(sorted({name, *near}))
        assert all(name in ours.neighbours[other] for other in near)
    if count > 64:
        other = Pact(b"d" * 32, Settled.of(adverts, 3, ()))
        assert any(ours.neighbours[name] != other.neighbours[name] for name in ours.keys), "nobody may choose it"


def test_the_context_binds_everything() -> None:
    parley = Parley(3)

    def bound(run: str = "run", round_: int = 1, attempt: int = 1, **changes: Any) -> bytes:
        given_: dict[str, Any] = {"model": bytes(32), "plan": b"p", "roster": parley.roster}
        return pact.context(run, round_, attempt, **{**given_, **changes})

    contexts = {
        bound(),
        bound("ru"),
        bound(round_=2),
        bound(attempt=2),
        bound(model=b"\1" * 32),
        bound(plan=b"q"),
        bound(roster=Parley(3, seed=1).roster),
        bound(roster=Parley(4).roster),
    }
    assert len(contexts) == 8


def plain(said: Any) -> dict[str, Any]:
    """A message as msgpack would give it back."""
    return {
        field.name: [plain(each) if dataclasses.is_dataclass(each) else each for each in value]
        if isinstance(value := getattr(said, field.name), tuple)
        else value
        for field in dataclasses.fields(said)
    }


def test_every_message_is_checked_field_by_field() -> None:
    parley = Parley(4)
    settled = parley.settle()
    shares = parley.workers["w-000"].shares(settled, ["loss"])
    dealt = parley.deal(settled)
    finishers = parley.add(dealt)
    vow = parley.workers["w-000"].vow(finishers)
    reveal = parley.vow(finishers)
    opened = parley.opened("w-000", reveal)
    for said in (*settled.adverts, settled, shares, dealt["w-000"], finishers, vow, reveal, opened):
        assert build(type(said), plain(said), "it") == said
    wrong: dict[str, Any] = {"keys": bytes(63), "signature": "s" * 64, "worker": "W!"}
    for field, value in wrong.items():
        with pytest.raises(WireError, match=f"advert.{field}"):
            build(Advert, plain(settled.adverts[0]) | {field: value}, "advert")
    with pytest.raises(WireError, match="shares"):
        build(Opened, {"shares": [bytes(34)] * 4}, "it")


def test_shares_that_are_opened_while_the_masks_are_taken_off_harm_nothing() -> None:
    parley = Parley(5)
    reveal = parley.vow(parley.until_vows())
    late = parley.names[-1]
    parley.open(reveal, without=[late])

    class Believed(set[str]):
        def __contains__(self, name: object) -> bool:
            parley.core.opened(late, parley.opened(late, reveal))  # in the midst of it
            return super().__contains__(name)

    assert parley.core.enough
    parley.core.believed = Believed()
    assert np.array_equal(parley.core.result(), parley.sum_of(parley.names))
