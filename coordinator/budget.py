"""What of a run's privacy has been spent, in one file that only its owner may read: `privacy.json`.

Knows that file, and what the next release would cost. Does not know how a round goes, nor how noise is made.

**Spent before it is released.** What a round is about to release is put down, and safe on the disk, before its noise
is made, or, where the workers have made it, before a secure sum is revealed. A coordinator that dies in between has
spent it for nothing.

**The seed of the noise** lies in the file from then on, until the version is safe on the disk; then it is forgotten.
Should the version be lost, because a coordinator dies after the next round has begun with it and before it is safe,
the same attempt makes it again: the same sum gets the same noise, and costs nothing; of any other sum the noise is
another (`privacy.key_of`), and it costs as much as any. Whoever reads the file in these moments can take the noise
off the version; afterwards nobody can.
"""

import json
import logging
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial

from broker.accountant import SPENT, Released, epsilon, need, of_sum
from broker.errors import UsageError, WireError
from broker.files import read_record
from broker.formats import count_floats
from broker.messages import Attempt
from broker.noise import KEY_BYTES
from broker.tensors import Layout
from coordinator.aggregation import Sums, digest
from coordinator.opened import Open
from coordinator.plan import Plan
from coordinator.privacy import CLIP_START, Veil, key_of, next_clip, noise_on_sum, veil
from coordinator.store import Store

log = logging.getLogger(__name__)

FILE = "privacy.json"


@dataclass(frozen=True, slots=True)
class Spent:
    """How often something was released, and the last release: whose, of what sum, under which clip.

    `seed` is empty once that is safe; `clip_next` is the clip of the round after it.
    """

    releases: int = 0
    round: int = 0
    attempt: int = 0
    made: str = ""
    seed: str = ""
    clip: float = 0.0
    clip_next: float = 0.0


class Budget:
    """A run's.

    Args:
        store: the run's.
        version: the latest; when it is not 0, something has been spent.
        model: its layout; how many floats a sum has is of account where the workers add the noise.

    Raises:
        UsageError: what was spent cannot be known any more.
    """

    def __init__(self, store: Store, version: int, *, model: Layout) -> None:
        self._path, self._write = store.folder / FILE, partial(store.write, mode=0o600)
        self._plan = plan = store.plan
        self._kind = Released(plan.dp_noise, plan.rate, 1)
        if plan.noise:
            self._kind = of_sum(plan.ring.grain, plan.noise, count_floats(model))
        self._spent = self._read(version)

    def refusal(self) -> str:
        """Why there can be no further release; empty if there can."""
        after = self._after(self._spent.releases + 1)
        if after <= self._plan.dp_budget:
            return ""
        return (
            f"{SPENT}: epsilon is {self._after(self._spent.releases):.4g} after {self._spent.releases} releases, and "
            f"one more would make it {after:.4g}, over dp_budget {self._plan.dp_budget:g} (delta "
            f"{self._plan.dp_delta:g})"
        )

    def clip(self, number: int) -> float:
        """The clip of a round; 0 for any norm."""
        if not self._plan.dp_adaptive:
            return self._plan.clip
        spent = self._spent
        return (spent.clip if spent.round == number else spent.clip_next) or self._plan.clip or CLIP_START

    def cover(self, sums: Sums, here: Open) -> None:
        """Spend what it costs to release the round's sum, and put it under a veil.

        When this returns it survives a power failure.

        Raises:
            WireError: there is not enough left.
            UsageError: the file cannot be written.
        """
        of, within = here.round.of, len(here.facts.within)
        if self._plan.noise:
            self.spend(of)
        else:
            made = digest(sums) + within.to_bytes(8, "big")
            sums.veil = self.release(of, made, counted=sums.updates, within=within)
        here.facts.privacy = {
            "epsilon": self._after(self._spent.releases), "delta": self._plan.dp_delta,
            "releases": self._spent.releases, "clip": self._spent.clip,
        }  # fmt: skip

    def release(self, of: Attempt, made: bytes, *, counted: int, within: int) -> Veil:
        """As `cover`, of what `made` tells from any other sum, whose updates are `counted`."""
        plan, spent, clip = self._plan, self._spent, self.clip(of.round)
        begun = bool(spent.seed) and (spent.round, spent.attempt) == (of.round, of.attempt)
        seed = bytes.fromhex(spent.seed) if begun else secrets.token_bytes(KEY_BYTES)
        again = begun and spent.made == made.hex()
        # of two sums of the same draw dice hide whoever is in them less than is told of two draws
        drawn = "a sum of those whom dice have drawn was released, and is lost: others are drawn" * (plan.rate < 1)
        if not again and (why := (begun and drawn) or self.refusal()):
            raise WireError(f"{why}.")
        key, noise, following = key_of(seed, made), plan.dp_noise, clip
        if plan.dp_adaptive:
            noise = noise_on_sum(noise, plan.cohort)
            following = next_clip(clip, within, counted=counted, cohort=plan.cohort, key=key)
        if not again:
            releases = spent.releases + 1
            self._save(Spent(releases, of.round, of.attempt, made.hex(), seed.hex(), clip, following))
        return veil(key, clip, noise=noise, cohort=plan.cohort)

    def spend(self, of: Attempt) -> None:
        """Spend what it costs to reveal a round's sum in which the workers' noise is: once, for it is revealed once.

        Raises:
            WireError: there is not enough left.
            UsageError: the file cannot be written.
        """
        if self._spent.round != of.round:
            if why := self.refusal():
                raise WireError(f"{why}.")
            self._save(Spent(self._spent.releases + 1, of.round, of.attempt, clip=self._plan.clip))

    def settle(self, number: int) -> None:
        """The version that a round released is safe: forget the seed of its noise."""
        if self._spent.seed and self._spent.round == number:
            self._save(replace(self._spent, seed="", made=""))

    def _after(self, releases: int) -> float:
        return epsilon([self._kind._replace(times=releases)], self._plan.dp_delta)

    def _save(self, spent: Spent) -> None:
        self._write(self._path, json.dumps(asdict(spent)).encode())
        self._spent = spent

    def _read(self, version: int) -> Spent:
        try:
            found = Spent(**read_record(self._path))
            if found.releases >= version <= found.round:
                return found
            said = "it is older than the latest version, or gone"
        except (OSError, ValueError, TypeError) as problem:
            said = str(problem)
        raise UsageError(
            f"{self._path} does not tell what has been spent of this run's privacy ({said}): restore it; without it "
            "the run cannot go on."
        )


def last(budget: Budget | None, refused: Mapping[str, str], here: set[str], *, least: int) -> str:
    """Why there can be no further round, which the log says, too; empty if there can.

    Args:
        budget: the run's, where the plan asks for noise on sums.
        refused: everyone who was asked in a round that failed → why it gave nothing; empty if it did not say.
        here: the trainers who are here. Who was asked, and is away, may come back.
        least: so many are needed.
    """
    why = budget.refusal() if budget else ""
    spent = {worker: why for worker, why in refused.items() if why.startswith(SPENT)}
    if spent and len(here.union(refused) - spent.keys()) < least:
        why = "; ".join(f"{worker}: {why}" for worker, why in sorted(spent.items()))[:1000]
    if why:
        log.warning("there is no further round: %s", why)
    return why


FEW_WORKERS = 50
NOISES = (4.0, 16.0)


def counsel(plan: Plan) -> str:
    """What is to be said of a plan that hides one of few workers; empty where there is nothing.

    Raises:
        UsageError: the plan wants privacy and the library is not installed.
    """
    if plan.dp == "none":
        return ""
    need()
    if plan.dp == "record" or plan.population >= FEW_WORKERS:
        return ""
    noises = sorted({plan.dp_noise, *NOISES})
    kinds = (Released(noise, plan.rate, plan.rounds, discrete=plan.dp == "distributed") for noise in noises)
    costs = (f"{epsilon([kind], plan.dp_delta):.3g}" for kind in kinds)
    told = ", ".join(f"{cost} with noise {noise:g}" for noise, cost in zip(noises, costs, strict=True))
    return (
        f"dp = {plan.dp} hides one of {plan.population} workers, and so few hide each other badly: {plan.rounds} "
        f"rounds are an epsilon of {told}. For few workers with many rows each, dp = record "
        "hides a row, and makes sense."
    )
