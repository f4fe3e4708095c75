"""What noise is worth: ε of everything that was released, for a δ.

Knows mechanisms, and `dp-accounting`, which is loaded when it is first asked for. Does not know who spends, what is
allowed, nor how noise is made.

A **release** is a sum to which each of some units (workers, or a worker's records) contributes at most C in L2 norm,
plus Gaussian noise of standard deviation `noise` · C. Two data sets are neighbours if one has one unit's contribution
and the other has not. With `rate` below 1 each unit takes part by a throw of its own, secret dice (Poisson sampling).
"m of n" is another thing, and costs twice as much or more: 14.05 in place of 7.05 for 100 releases of 10 of 100 with
noise 1. So whoever samples here throws dice for each (`coordinator/roster.py`, Opacus).

Privacy loss distributions are used where they are known (Gaussian, sampled or not); the sum of discrete noise is
accounted by its Rényi divergences, which are no more than a Gaussian's of `noise.multiplier`. So is what has an ε
above EPSILON_FINE: it hides nobody, and a distribution of such losses takes minutes and gigabytes.
"""

from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, NamedTuple

from broker.errors import UsageError
from broker.messages import Noise
from broker.noise import Grain, multiplier

SPENT = "the privacy budget is spent"
"""How the reason begins for which nothing more is released, of a worker's or a run's."""


EPSILON_FINE = 30.0
ORDERS = (*range(2, 65), 128, 256, 512, 1024)
"""Whole ones: others take a second where there is sampling, and the library complains of what it leaves out."""


class Released(NamedTuple):
    """`times` releases of one kind; `discrete` noise is a sum of discrete Gaussians and never sampled."""

    noise: float
    rate: float
    times: int
    discrete: bool = False


def of_sum(grain: Grain | None, noise: Noise, floats: int) -> Released:
    """The release of a masked sum of so many floats to which workers have added noise of this grain.

    Who is in it is no secret, so it counts as if everybody was.
    """
    assert grain
    return Released(multiplier(grain, noise.clip, least=noise.least, floats=floats), 1.0, 1, discrete=True)


def need() -> Any:
    """The library.

    Raises:
        UsageError: it is not installed.
    """
    try:
        import dp_accounting  # noqa: PLC0415 (an extra, and it takes a second to load)
    except ImportError:
        raise UsageError("differential privacy needs dp-accounting: pip install 'fluffle[dp]'") from None
    return dp_accounting


def epsilon(released: Iterable[Released], delta: float) -> float:
    """ε, so that all of this together is (ε, δ)-private; 0 for nothing. Takes up to a second.

    Raises:
        UsageError: the library is not installed.
    """
    return _epsilon(tuple(sorted(together(released))), delta)


def together(released: Iterable[Released]) -> list[Released]:
    """The same releases, all of one kind as one."""
    times = Counter[Released]()
    for each in released:
        times[each._replace(times=0)] += each.times
    return [kind._replace(times=count) for kind, count in times.items() if count]


@lru_cache(maxsize=256)
def _epsilon(kinds: tuple[Released, ...], delta: float) -> float:
    dpa = need()
    if not kinds:
        return 0.0

    def by(accountant: Any) -> float:
        for noise, rate, times, _ in kinds:
            event = dpa.GaussianDpEvent(noise)
            if rate < 1:
                event = dpa.PoissonSampledDpEvent(rate, event)
            accountant.compose(dpa.SelfComposedDpEvent(event, times))
        return float(accountant.get_epsilon(delta))

    if any(kind.discrete for kind in kinds):
        return by(dpa.rdp.RdpAccountant())
    most = by(dpa.rdp.RdpAccountant(ORDERS))
    return most if most > EPSILON_FINE else by(dpa.pld.PLDAccountant())
