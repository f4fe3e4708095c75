"""The coordinator's part in one attempt at a secure round: who is in which stage, and at the end the sum alone.

Knows what was said, checks it, adds masked words and takes the masks off. Does not know queues, clocks or disks: the
caller says when a stage is over. Its whole state follows from the messages in their order, so it can be made again
from those that were kept.

    stage      hears                closed by           gives
    adverts    `advert`             `settle`            Settled, the same for all
    shares     `shares`             `deal`              Dealt, one for each
    masked     `masked`             `finishers`         Finishers, the same for all
    vows       `vow`                `reveal`            Reveal, the same for all; after it, no other attempt
    opened     `opened`             `result`            the sum of the finishers' words

What is heard counts (True), has been heard before (False), or is refused (raises Refused with the reason). Where too
few are left, closing raises Aborted with the reason; nothing has been revealed then, for a masked vector says nothing
without the shares of a threshold of its holders.
"""

from collections.abc import Iterable, Mapping
from typing import Literal

from broker.masks import Words
from broker.pact import Advert, Dealt, Finishers, Opened, Reveal, Settled, Shares, Vow
from broker.ring import Form
from coordinator.aggregation import Sums

Stage = Literal["adverts", "shares", "masked", "vows", "opened", "done"]


class Unmasking:
    """One attempt.

    Args:
        context: `pact.context` of what was sent to the workers.
        roster: name → Ed25519 public key (32 bytes).
        cohort_min: fewest members; at least 3.
        threshold: the threshold is above this part of a member's holders.

    Attributes:
        stage: see above.
        liars: whose shares were found to be false.
    """

    stage: Stage
    liars: set[str]

    def __init__(
        self, context: bytes, roster: Mapping[str, bytes], *, cohort_min: int = 3, threshold: float = 2 / 3
    ) -> None:
        raise NotImplementedError

    @property
    def waiting(self) -> frozenset[str]:
        """Who may still say something in this stage and has not; empty while adverts come."""
        raise NotImplementedError

    @property
    def enough(self) -> bool:
        """Whether the shares that were opened suffice for `result`: the others need not be waited for."""
        raise NotImplementedError

    def advert(self, advert: Advert) -> bool:
        """A worker is ready."""
        raise NotImplementedError

    def settle(self, metrics: Iterable[str] = ()) -> Settled:
        """Close the cohort; `metrics` are those that all of it have."""
        raise NotImplementedError

    def shares(self, worker: str, shares: Shares) -> bool:
        """A member has dealt."""
        raise NotImplementedError

    def deal(self, form: Form) -> dict[str, Dealt]:
        """Close the dealing; worker → what its neighbours have dealt. Room is made for sums of `form`."""
        raise NotImplementedError

    def masked(self, worker: str, words: Words) -> bool:
        """Add a member's words, once."""
        raise NotImplementedError

    def finishers(self) -> Finishers:
        """Close the sum."""
        raise NotImplementedError

    def vow(self, worker: str, vow: Vow) -> bool:
        """A finisher has vowed."""
        raise NotImplementedError

    def reveal(self) -> Reveal:
        """Close the vows. From here on the round must not be tried again."""
        raise NotImplementedError

    def opened(self, worker: str, opened: Opened) -> bool:
        """A finisher has opened its shares."""
        raise NotImplementedError

    def result(self) -> Words:
        """Take all masks off: the sum of the finishers' words, in memory that is this object's."""
        raise NotImplementedError


def into_sums(form: Form, total: Words, updates: int, sums: Sums) -> None:
    """Put an unmasked sum of so many updates where the rule `mean` finishes it; `sums` are of the model's layout.

    Floats are `examples · delta` on a coarser grid; integers and booleans their means, in place of the largest.
    """
    raise NotImplementedError
