"""Differential privacy of a worker by the coordinator: noise on the sum, and a clip that follows the updates' norms.

Pure. Knows the arithmetic. Does not know what has been spent (`budget.py`), who takes part, nor the noise that the
workers add themselves (`broker/noise.py`).

DP-FedAvg (McMahan et al. 2018, arXiv 1710.06963): every update Δ has a norm of at most C, all weigh the same, and

    version + (Σ Δ + N(0, σ²)) / m,    σ = z · C · (1 + SLACK),    m = the cohort of the plan.

m is a number of the plan, not of those who came: that would tell how many there were. σ has the slack that the sum's
check of norms has. Integers and booleans stay what they were: the largest of them would be one worker's own.

**Adaptive clip** (Andrew et al. 2021, arXiv 1905.03871). Each worker says whether its norm was within the clip:
b̄ = (Σ (b - ½) + N(0, σ_b²)) / m + ½, σ_b = m / 20, and C ← C · exp(-η (b̄ - γ)), η = 0.2, γ = ½: if more than half
are within, it is too wide, and shrinks. Taken together, sum and bits cost no more than noise z on the sum alone, if
its own noise is z_Δ = (z⁻² - (2 σ_b)⁻²)^(-½), which asks for z < 2 σ_b: a bit that is centred moves its sum by ½.

ε is that of the versions. The history with its metrics, who was asked, and the file of sums that a long round writes
are the trusted coordinator's own: publish versions, not the run's folder.
"""

import math
from collections.abc import Iterator
from hashlib import sha256
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from broker.messages import CLIP_MAX
from broker.noise import NOISE_MIN, gaussian
from broker.norms import CLIP_MIN, SLACK

CLIP_START, CLIP_FLOOR = 0.1, 1e-9
LEARNING_RATE, QUANTILE = 0.2, 0.5
_BITS = 0  # the stream of noise for them; floats begin at 1


class Veil(NamedTuple):
    """The noise on one sum.

    Attributes:
        key: of this sum alone.
        deviation: of the noise on each float of the sum.
        cohort: by how many the sum is divided.
    """

    key: bytes
    deviation: float
    cohort: int

    def cover(self, sums: NDArray[np.float64], first: int) -> None:
        """Make the sums of some floats, of which `first` is the number of the first, their noisy mean, in place."""
        sums += self.deviation * gaussian(self.key, first + 1, len(sums))
        sums /= self.cohort


def bit_noise(cohort: int) -> float:
    """σ_b, the deviation of the noise on how many updates were within the clip."""
    return cohort / 20


def noise_on_sum(noise: float, cohort: int) -> float:
    """z_Δ, so that sum and bits together cost what noise z on the sum alone would."""
    assert noise < 2 * bit_noise(cohort)
    return float((noise**-2 - (2 * bit_noise(cohort)) ** -2) ** -0.5)


def veil(key: bytes, clip: float, *, noise: float, cohort: int) -> Veil:
    """The noise of deviation `noise` · clip on a sum."""
    return Veil(key, noise * clip * (1 + SLACK), cohort)


def next_clip(clip: float, within: int, *, counted: int, cohort: int, key: bytes) -> float:
    """The clip of the round after one in which so many of the counted updates were within it."""
    noise = bit_noise(cohort) * float(gaussian(key, _BITS, 1)[0])
    fraction = (within - counted / 2 + noise) / cohort + 0.5
    return min(max(clip * math.exp(-LEARNING_RATE * (fraction - QUANTILE)), CLIP_FLOOR), CLIP_MAX)


def contradictions(plan: Any) -> Iterator[tuple[bool, str]]:
    """What in a plan (`plan.py`) would not be private: whether it is so, and the sentence; the first is the one."""
    dp, secure = plan.dp, getattr(plan, "privacy", "none") == "secure"
    yield 0 < plan.clip < CLIP_MIN, f"clip ({plan.clip:g}) must be 0, for any norm, or at least {CLIP_MIN:g}"
    if dp == "none":
        given = plan.dp_noise or plan.dp_budget or plan.dp_population or plan.dp_adaptive
        yield bool(given), "dp_noise, dp_budget, dp_population and dp_adaptive are for differential privacy: set dp"
        return
    yield (
        plan.dp_noise < NOISE_MIN or not plan.dp_budget,
        f"dp = {dp} needs dp_noise, the noise in clips (1.0 is usual), and dp_budget, the largest epsilon",
    )
    yield plan.dp_adaptive and dp != "central", f"dp_adaptive is for dp = central, and dp is {dp}: leave it out"
    if dp == "record":
        return
    yield (
        dp == "distributed" and not secure,
        "dp = distributed is noise of the workers in a sum that nobody sees without it: set privacy to secure",
    )
    yield (
        dp == "distributed" and plan.dp_population is not None,
        "dp_population counts on nobody knowing who takes part, and under privacy = secure many do: leave it out",
    )
    yield (
        dp == "central" and secure,
        "under privacy = secure the coordinator adds nothing to the sum: set dp to record, or privacy to none",
    )
    yield (
        not plan.clip and not plan.dp_adaptive,
        f"dp = {dp} can hide an update of bounded norm only: give a clip, or dp_adaptive if you know none",
    )
    yield (
        plan.schedule == "cyclic" or plan.over_select > 1 or plan.rule != "mean",
        f"dp = {dp} is for parallel rounds, an over_select of 1 and the rule mean: set these",
    )
    yield plan.keep_updates, f"updates that are kept undo the noise of dp = {dp}: leave keep_updates out"
    yield (
        plan.population < plan.cohort,
        f"the cohort ({plan.cohort}) is larger than dp_population ({plan.population}): lower it",
    )
    yield (
        plan.dp_delta >= 1 / plan.population,
        (
            f"dp_delta ({plan.dp_delta:g}) must be well below 1 / {plan.population}, one worker of dp_population: "
            "whoever publishes one of them whole would keep to it"
        ),
    )
    yield (
        plan.rate < 1 and plan.quorum is not None,
        (
            "dice decide how many are asked where dp_population is above the cohort, and a quorum would tell who "
            "they are: leave quorum out, and two thirds of those asked are enough"
        ),
    )
    yield (
        plan.dp_adaptive and plan.dp_noise >= 2 * bit_noise(plan.cohort),
        (
            f"dp_noise ({plan.dp_noise:g}) must be below a tenth of the cohort ({plan.cohort}) for dp_adaptive, or "
            "the noise on norms takes all of it: raise the cohort, or set a clip instead"
        ),
    )


def key_of(seed: bytes, sums: bytes) -> bytes:
    """The key of the noise on a sum: of another one, made by the same attempt, it is another.

    Otherwise the difference of two versions would have no noise. The same sum has the same noise: once more is no
    second look at it.
    """
    return sha256(seed + sums).digest()
