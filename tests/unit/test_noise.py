"""Noise is what it says to be, comes from its key alone, and has room in the ring."""

import math
import secrets

import numpy as np
import pytest
from numpy.typing import NDArray

from broker.errors import UsageError
from broker.noise import BITS_MAX, CHUNK_ITEMS, Grain, add_discrete, fit, gaussian, multiplier

KEY = bytes(range(32))
COUNT = 300_000


def test_gaussian_noise_has_the_moments_of_a_normal_distribution() -> None:
    x = gaussian(KEY, 0, COUNT)
    moments = [float((x**power).mean()) for power in (1, 2, 3, 4)]
    assert moments == pytest.approx([0, 1, 0, 3], abs=5 * math.sqrt(96 / COUNT))  # x^4 has a variance of 96
    assert np.histogram(x, [-9, -1, 0, 1, 9])[0] / COUNT == pytest.approx([0.1587, 0.3413, 0.3413, 0.1587], abs=5e-3)


def test_streams_and_keys_give_noise_of_their_own_and_the_same_ones_the_same() -> None:
    first = gaussian(KEY, 1, 1001)
    assert np.array_equal(first, gaussian(KEY, 1, 1001))
    for other in (gaussian(KEY, 2, 1001), gaussian(secrets.token_bytes(32), 1, 1001)):
        assert abs(float(np.corrcoef(first, other)[0, 1])) < 0.2


def discrete_gaussian(key: bytes, bits: int, count: int) -> NDArray[np.int64]:
    noise = np.zeros(count, np.int64)
    add_discrete(key, bits, noise)
    return noise


def test_nothing_that_a_learner_can_sow_changes_noise() -> None:
    np.random.seed(0)  # noqa: NPY002 (that is the point)
    before = gaussian(KEY, 0, 10), discrete_gaussian(KEY, 5, 10)
    np.random.seed(1)  # noqa: NPY002
    assert np.array_equal(before, (gaussian(KEY, 0, 10), discrete_gaussian(KEY, 5, 10)))


@pytest.mark.parametrize("bits", [0, 1, 2])
def test_discrete_noise_takes_every_value_as_often_as_it_should(bits: int) -> None:
    x = discrete_gaussian(KEY, bits, COUNT)
    values = np.arange(-4 * 2**bits, 4 * 2**bits + 1)
    wanted = np.exp(-(values**2) / 2 / 4.0**bits)
    wanted *= COUNT / np.exp(-(np.arange(-2000, 2001) ** 2) / 2 / 4.0**bits).sum()
    found = np.array([(x == value).sum() for value in values])
    chi_square = float(((found - wanted) ** 2 / wanted).sum())
    assert chi_square < len(values) + 5 * math.sqrt(2 * len(values))


@pytest.mark.parametrize("bits", [4, 17, 24, BITS_MAX])
def test_discrete_noise_is_as_wide_as_a_power_of_two(bits: int) -> None:
    x = discrete_gaussian(KEY, bits, 2 * CHUNK_ITEMS + 7) / 2.0**bits
    assert float(x.std()) == pytest.approx(1, abs=5 / math.sqrt(2 * len(x)))
    assert float(x.mean()) == pytest.approx(0, abs=5 / math.sqrt(len(x)))
    assert float((x**4).mean()) == pytest.approx(3, abs=5 * math.sqrt(96 / len(x)))
    lowest = discrete_gaussian(KEY, bits, 50_000) & 7  # no digit is rounder than another
    assert np.bincount(lowest, minlength=8) / 50_000 == pytest.approx([1 / 8] * 8, abs=0.01)


@pytest.mark.parametrize(("alive", "of"), [(20, 20), (16, 20)])
def test_the_noise_of_the_fewest_workers_allowed_is_enough_and_more_is_more(alive: int, of: int) -> None:
    clip, noise = 0.5, 1.0
    grain = fit(clip, noise, least=16, most=of, ring_bits=32)
    total = sum(discrete_gaussian(secrets.token_bytes(32), grain.bits, 20_000) for _ in range(alive))
    deviation = float(np.std(total)) / grain.scale / clip
    assert deviation == pytest.approx(noise * math.sqrt(alive / 16), rel=0.03)
    assert int(np.abs(total).max()) + of * (grain.scale * clip + 1) < 2**31


@pytest.mark.parametrize(("workers", "noise", "clip"), [(3, 0.3, 1.0), (50, 1.0, 0.1), (1000, 4.0, 10.0)])
def test_clipped_updates_and_twelve_deviations_of_noise_fit_into_the_ring(
    workers: int, noise: float, clip: float
) -> None:
    least = -(-2 * workers // 3)
    grain = fit(clip, noise, least=least, most=workers, ring_bits=32)
    assert workers * (grain.scale * clip + 1) + 12 * math.sqrt(workers) * 2**grain.bits < 2**31
    assert 2**grain.bits * math.sqrt(least) == pytest.approx(noise * clip * grain.scale)  # all of z, none is lost


def test_a_ring_without_room_is_refused_before_any_round() -> None:
    with pytest.raises(UsageError, match=r"a ring of 32 bits has no room for 1000000 workers with noise 0.001"):
        fit(1.0, 0.001, least=10**6, most=10**6, ring_bits=32)


def test_rounding_and_the_sum_of_discrete_noise_cost_what_the_theorem_says() -> None:
    wide = Grain(2.0**20, 20)  # of noise 1 with one worker
    assert multiplier(wide, 1.0, least=1, floats=1) == pytest.approx(1, rel=1e-6)
    rounded = multiplier(wide, 1.0, least=1, floats=10**8)  # √d/2 = 5000 steps are added to 2^20
    assert rounded == pytest.approx(2**20 / (2**20 + 5000), rel=1e-9)
    coarse = Grain(1.0, 0)  # σ = 1, far below 16: τ = 10·e^(-π²) for two workers
    tau = 10 * math.exp(-(math.pi**2))
    ratio = 1.5 / math.sqrt(2)
    assert multiplier(coarse, 1.0, least=2, floats=1) == pytest.approx(1 / math.sqrt(ratio**2 + tau / 2))
