"""ε is what others have published for the same mechanisms, and what cannot be accounted is not."""

import builtins
from typing import Any

import pytest

from broker import accountant
from broker.accountant import Released, epsilon
from broker.errors import UsageError

dpa: Any = pytest.importorskip("dp_accounting", reason="needs the extra `dp`")
MNIST = 256 / 60_000


@pytest.mark.parametrize(
    ("released", "delta", "wanted"),
    [
        (Released(1, 1, 1), 1e-5, 4.377178),  # Balle and Wang 2018, to the digit
        (Released(1.1, MNIST, 14_040), 1e-5, 2.3796),  # MNIST, 60 epochs
        (Released(1, 0.01, 1000), 1e-5, 1.82824),
        (Released(1, 0.1, 100), 1e-5, 7.0466),
        (Released(2.2477, 0.1, 100), 1e-5, 2.0),
        (Released(4, 1, 100), 1e-3, 10.2048),  # four hospitals, all in every round
        (Released(16, 1, 100), 1e-3, 1.7684),
        (Released(0.01, 0.5, 9), 1e-5, 89_997.65),  # by Rényi divergences, at once
        (Released(1, 1, 1, discrete=True), 1e-5, 4.728507),
        (Released(4, 1, 100, discrete=True), 1e-5, 14.13),
    ],
)
def test_epsilon_is_what_is_published(released: Released, delta: float, wanted: float) -> None:
    assert epsilon([released], delta) == pytest.approx(wanted, rel=2e-4)


def test_the_library_says_what_its_own_tests_and_opacus_say() -> None:
    rdp, pld = dpa.rdp, dpa.pld
    orders = [1.5, 2.5, 5, 50, 100]
    sampled = rdp.RdpAccountant(orders)
    sampled.compose(dpa.SelfComposedDpEvent(dpa.PoissonSampledDpEvent(0.01, dpa.GaussianDpEvent(2.5)), 50))
    curve = [6.70579741e-4, 1.08548710e-3, 2.18075656e-3, 2.38460375e-2, 167.416308]
    assert sampled._rdp == pytest.approx(curve, rel=1e-4)
    thrice = pld.PLDAccountant()
    thrice.compose(dpa.SelfComposedDpEvent(dpa.GaussianDpEvent(3**0.5), 3))
    assert thrice.get_delta(1) == pytest.approx(0.126936, abs=1e-3)
    often = pld.PLDAccountant()
    often.compose(dpa.SelfComposedDpEvent(dpa.PoissonSampledDpEvent(0.2, dpa.GaussianDpEvent(0.5)), 3))
    assert often.get_delta(1) == pytest.approx(0.15594, abs=1e-3)
    theirs = rdp.RdpAccountant()
    theirs.compose(dpa.SelfComposedDpEvent(dpa.PoissonSampledDpEvent(0.04, dpa.GaussianDpEvent(1.5)), 2250))
    assert theirs.get_epsilon(1e-5) == pytest.approx(7.3293, abs=1e-3)
    assert epsilon([Released(1.5, 0.04, 2250)], 1e-5) == pytest.approx(6.76879, rel=1e-3)


def rdp(event: Any, delta: float, **how: Any) -> float:
    """ε by Rényi divergences, as the library has it."""
    accountant = dpa.rdp.RdpAccountant(**how)
    accountant.compose(event)
    return float(accountant.get_epsilon(delta))


@pytest.mark.parametrize(
    ("noise", "rate", "times", "wanted"),
    [
        (1.0, 1.0, 1, 4.728507),
        (1.1, MNIST, 14_040, 2.5944),
        (1.0, 0.01, 1000, 2.10137),
        (1.0, 0.1, 100, 7.904),
        (2.4224, 0.1, 100, 2.0),
        (1.5, 0.04, 2250, 7.3293),
    ],
)
def test_renyi_divergences_say_a_little_more(noise: float, rate: float, times: int, wanted: float) -> None:
    event = dpa.SelfComposedDpEvent(dpa.PoissonSampledDpEvent(rate, dpa.GaussianDpEvent(noise)), times)
    assert rdp(event, 1e-5) == pytest.approx(wanted, rel=2e-5)
    assert epsilon([Released(noise, rate, times)], 1e-5) < wanted


def test_with_orders_in_steps_of_a_thousandth_a_gaussian_costs_what_it_was_chosen_for() -> None:
    event = dpa.GaussianDpEvent(4.530877117)
    assert rdp(event, 1e-6, orders=[n / 1000 for n in range(1001, 40_000)]) == pytest.approx(1.0, abs=1e-6)


def test_noise_along_a_tree_as_in_dp_ftrl_needs_no_chance_and_costs_less_than_without_it() -> None:
    """Kairouz et al. 2021 (arXiv 2103.00039), each worker taking part once; not offered here, the library has it."""
    how = {"neighboring_relation": dpa.NeighboringRelation.REPLACE_SPECIAL}
    for noise, steps, delta, wanted in ((1.13, 1600, 1e-6, 18.71), (8.83, 1600, 1e-6, 1.773), (4, 100, 1e-5, 2.9585)):
        event = dpa.SingleEpochTreeAggregationDpEvent(noise, steps)
        assert rdp(event, delta, **how) == pytest.approx(wanted, rel=2e-4)
    assert epsilon([Released(4, 1, 100, discrete=True)], 1e-5) == pytest.approx(14.13, abs=1e-2)


def test_opacus_own_accounts_are_what_its_tests_say() -> None:
    accountants = pytest.importorskip("opacus.accountants", reason="needs the extra `dp`")

    def theirs(kind: str, noise: float, times: int) -> float:
        found = accountants.create_accountant(kind)
        found.history = [(noise, 0.04, times)]
        return float(found.get_epsilon(delta=1e-5))

    assert theirs("rdp", 1.5, 2250) == pytest.approx(7.32911117, abs=1e-6)
    assert theirs("prv", 1.5, 2249) == pytest.approx(6.777395712, abs=1e-6)
    assert theirs("prv", 1.5, 2250) == pytest.approx(6.77913, abs=1e-5)
    assert epsilon([Released(1.5, 0.04, 2250)], 1e-5) == pytest.approx(theirs("prv", 1.5, 2250), rel=2e-3)
    for kind, noise in (("rdp", 1.416), ("prv", 1.3477)):  # as their search finds for an epsilon of 8
        assert theirs(kind, noise, 2250) == pytest.approx(8, abs=1e-2)


def test_a_sample_of_fixed_size_is_not_a_poisson_sample() -> None:
    """Why cohorts are drawn by dice for each worker: m of n would cost twice as much."""
    fixed = dpa.rdp.RdpAccountant(neighboring_relation=dpa.privacy_accountant.NeighboringRelation.REPLACE_ONE)
    event = dpa.SampledWithoutReplacementDpEvent(100, 10, dpa.GaussianDpEvent(1))
    fixed.compose(dpa.SelfComposedDpEvent(event, 100))
    assert fixed.get_epsilon(1e-5) == pytest.approx(14.05, rel=1e-3)
    assert epsilon([Released(1, 0.1, 100)], 1e-5) < 7.1


def test_nothing_costs_nothing_and_parts_cost_what_the_whole_does() -> None:
    assert epsilon([], 1e-5) == epsilon([Released(1, 0.5, 0)], 1e-5) == 0.0
    parts = [Released(2, 1, 4), Released(2, 1, 5)]
    assert epsilon(parts, 1e-5) == epsilon([Released(2, 1, 9)], 1e-5) > epsilon(parts[:1], 1e-5)


def test_without_the_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    found = builtins.__import__

    def absent(name: str, *rest: Any, **more: Any) -> Any:
        if name == "dp_accounting":
            raise ImportError(name)
        return found(name, *rest, **more)

    accountant._epsilon.cache_clear()
    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(UsageError, match=r"needs dp-accounting: pip install 'fluffle\[dp\]'"):
        epsilon([Released(1, 1, 1)], 1e-5)
