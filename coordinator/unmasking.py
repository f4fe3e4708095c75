"""The coordinator's part in one attempt at a secure round: who is in which stage, and at the end the sum alone.

Knows what was said, checks it, adds masked words and takes the masks off. Does not know queues, clocks or disks: the
caller says when a stage is over. Its whole state follows from the messages in their order, so it can be made again
from those that were kept.

    stage      hears                closed by           gives
    adverts    `advert`             `settle`            Settled, the same for all
    shares     `shares`             `deal`              Dealt, one for each
    masked     `masked` (`expects`) `finishers`         Finishers, the same for all
    vows       `vow`                `reveal`            Reveal, the same for all; after it, no other attempt
    opened     `opened`             `result`            the sum of the finishers' words

What is heard counts (True), has been heard before (False), or is refused (raises Refused with the reason). Where too
few are left, closing raises Aborted with the reason; nothing has been revealed then, for a masked vector says nothing
without the shares of a threshold of its holders.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import comb
from random import Random
from typing import Literal

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from broker import pact
from broker.errors import Aborted, insist
from broker.masks import Words, apply
from broker.pieces import CHUNK_ITEMS
from broker.ring import Counted, Form, counted, means_of_others
from broker.shamir import combine
from coordinator.aggregation import Spread, Sums, alone

Stage = Literal["adverts", "shares", "masked", "vows", "opened", "done"]
TRIES_MAX = 2000
"""So many choices of a dealer's shares are tried where some are false; fewer after eight dealers without a secret."""


@dataclass(eq=False)
class Unmasking:
    """One attempt.

    Attributes:
        context: `pact.context` of what was sent to the workers.
        roster: name → Ed25519 public key (32 bytes).
        cohort_min: fewest members; at least 3.
        threshold: the threshold is above this part of a member's holders.
        spread: adds words up, chunk by chunk.
        stage: see above.
        believed: holders whose opened shares have given a secret.
        spoilers: dealers whose secrets cannot be had, though enough of their holders have opened what they hold.
    """

    context: bytes
    roster: Mapping[str, bytes]
    cohort_min: int = pact.COHORT_MIN
    threshold: float = 2 / 3
    spread: Spread = alone

    def __post_init__(self) -> None:
        self.believed, self.spoilers = set[str](), set[str]()
        self._keys: set[bytes] = set()
        self._adverts: dict[str, pact.Advert] = {}
        self._shares: dict[str, pact.Shares] = {}
        self._masked: dict[str, pact.Masked] = {}
        self._vows: dict[str, pact.Vow] = {}
        self._opened: dict[str, pact.Opened] = {}
        self._enter("adverts", self.roster, self._adverts)

    def _enter(self, stage: Stage, expected: Iterable[str], heard: Mapping[str, object]) -> None:
        """Who may speak in the stage that begins, and where it will be kept what they say."""
        self.stage, self._expected, self._heard = stage, expected, heard

    @property
    def waiting(self) -> frozenset[str]:
        """Who may still speak in this stage, and has not."""
        return frozenset(self._expected).difference(self._heard)

    # -- A: who is ready ---------------------------------------------------------------------------------------------

    def advert(self, advert: pact.Advert) -> bool:
        """A worker is ready."""
        if not self._is_news("adverts", self._adverts, advert.worker, advert):
            return False
        insist(len(self._adverts) < pact.COHORT_MAX, f"a secure round has at most {pact.COHORT_MAX} members.")
        pact.check_advert(self.context, advert, self.roster)
        pact.check_keys(advert)
        keys = {advert.keys[:32], advert.keys[32:]}
        insist(len(keys - self._keys) == 2, f"{advert.worker} advertises a key that is there already.")
        self._keys |= keys
        self._adverts[advert.worker] = advert
        return True

    def settle(self, metrics: Iterable[str] = ()) -> pact.Settled:
        """Close the cohort; `metrics` are those that all of it have."""
        assert self.stage == "adverts"
        _enough(len(self._adverts), max(pact.COHORT_MIN, self.cohort_min), "workers were ready")
        adverts = [self._adverts[name] for name in sorted(self._adverts)]
        settled = pact.Settled.of(adverts, pact.threshold_of(len(adverts), part=self.threshold), metrics)
        self.pact = pact.Pact(self.context, settled)
        self._enter("shares", self._adverts, self._shares)
        return settled

    # -- B: shares ---------------------------------------------------------------------------------------------------

    def shares(self, worker: str, shares: pact.Shares) -> bool:
        """A member has dealt."""
        if not self._is_news("shares", self._shares, worker, shares):
            return False
        neighbours = len(self.pact.neighbours[worker])
        dealt = len(shares.sealed) == neighbours and all(shares.sealed)
        insist(dealt, f"{worker} has not dealt to its neighbours, of whom there are {neighbours}.")
        self._shares[worker] = shares
        return True

    def deal(self, form: Form) -> dict[str, pact.Dealt]:
        """Close the dealing; worker → what its neighbours have dealt. Room is made for sums of `form`."""
        assert self.stage == "shares"
        self._check_holders(self._shares, "have dealt")
        near, dealt = self.pact.neighbours, self._shares.items()
        sealed = {dealer: dict(zip(near[dealer], shares.sealed, strict=True)) for dealer, shares in dealt}
        self.total: Words = np.zeros(form.words, form.ring.dtype)
        self._points: dict[str, dict[int, bytes]] = {dealer: {} for dealer in self._shares}  # x → share
        self._enter("masked", self._shares, self._masked)
        slots = {to: [sealed.get(dealer, {}).get(to, b"") for dealer in near[to]] for to in self._shares}
        return {to: pact.Dealt(tuple(each)) for to, each in slots.items()}

    # -- C: masked words ---------------------------------------------------------------------------------------------

    def expects(self, worker: str) -> bool:
        """Whether a member's masked words would be added; False if they have been.

        Raises:
            Refused: it is too late, or the worker has not dealt.
        """
        if worker in self._masked:
            return False
        self._at("masked", worker)
        return True

    def masked(self, worker: str, words: Words, masked: pact.Masked) -> bool:
        """Add a member's words, once."""
        if not self.expects(worker):
            return False
        fits = (words.dtype, words.shape) == (self.total.dtype, self.total.shape)
        insist(fits, f"{worker} sends {words.size} words of {words.itemsize} bytes, which are not the sum's.")
        pact.check_signature(self.roster, worker, masked.dealers, self.pact.dealers(worker, self._shares))
        total = self.total

        def add(at: int, _: int) -> None:
            chunk = slice(at, at + CHUNK_ITEMS)
            np.add(total[chunk], words[chunk], out=total[chunk])

        self.spread(add, range(0, total.size, CHUNK_ITEMS))
        self._masked[worker] = masked
        return True

    def finishers(self) -> pact.Finishers:
        """Close the sum."""
        assert self.stage == "masked"
        self._check_holders(self._masked, "have sent their masked update")
        done = tuple(sorted(self._masked))
        lost = tuple(sorted(self._shares.keys() - self._masked.keys()))
        dealers = () if self.pact.complete else tuple(self._masked[name].dealers for name in done)
        self._finishers = pact.Finishers(done, lost, dealers)
        self._vowed = self.pact.finishers(self._finishers)  # what each of them is to sign
        self._enter("vows", self._masked, self._vows)
        return self._finishers

    # -- D: what may be known ----------------------------------------------------------------------------------------

    def vow(self, worker: str, vow: pact.Vow) -> bool:
        """A finisher has vowed."""
        if not self._is_news("vows", self._vows, worker, vow):
            return False
        pact.check_signature(self.roster, worker, vow.signature, self._vowed)
        self._vows[worker] = vow
        return True

    def reveal(self) -> pact.Reveal:
        """Close the vows. From here on the round must not be tried again."""
        assert self.stage == "vows"
        _enough(len(self._vows), self.pact.quorum, "members vow for the same finishers")
        self._enter("opened", self._masked, self._opened)
        shown = set(sorted(self._vows)[: self.pact.quorum])  # more would prove no more
        vows = (self._vows[name].signature if name in shown else b"" for name in self._finishers.workers)
        return pact.Reveal(tuple(vows))

    def opened(self, worker: str, opened: pact.Opened) -> bool:
        """A finisher has opened its shares."""
        if not self._is_news("opened", self._opened, worker, opened):
            return False
        holders = self.pact.holders[worker]
        insist(len(opened.shares) == len(holders), f"{worker} has not opened one share for each of its holders.")
        for dealer, share in zip(holders, opened.shares, strict=True):
            if share and dealer in self._points:
                self._points[dealer][self.pact.holders[dealer].index(worker) + 1] = share
        self._opened[worker] = opened
        return True

    @property
    def enough(self) -> bool:
        """Whether the shares that were opened suffice for `result`, if all are true; no more need be waited for."""
        return self.stage == "opened" and min(map(len, self._points.values())) >= self.pact.settled.threshold

    def result(self) -> Words:
        """Take all masks off: the sum of the finishers' words, in memory that is this object's.

        Raises:
            Aborted: some secrets cannot be had, of the `spoilers` or because too few have opened their shares.
        """
        assert self.stage == "opened"
        ours, bits = self.pact, 8 * self.total.itemsize
        self.spoilers.clear()
        secrets = {dealer: self._secret(dealer) for dealer in self._shares}
        if self.spoilers:
            raise Aborted(f"{', '.join(sorted(self.spoilers))} dealt false shares, or several of their holders lied.")
        off = [ours.self_mask(secrets[name], name, bits)._replace(plus=False) for name in self._finishers.workers]
        for name in self._finishers.lost:
            key = X25519PrivateKey.from_private_bytes(secrets[name])
            near = (other for other in ours.neighbours[name] if other in self._masked)
            # what the lost one would have added is what its neighbours' masks leave in the sum, with the other sign
            off += [ours.pair_mask(key, name, other, bits) for other in near]
        apply(self.total, off)
        self._enter("done", (), {})
        return self.total

    def _secret(self, dealer: str) -> bytes:
        """A dealer's secret, from shares of which some may be false; empty where there is none: it is a spoiler then.

        Raises:
            Aborted: too few of its holders have opened anything.
        """
        holders, threshold = self.pact.holders[dealer], self.pact.settled.threshold
        opened = sum(holder in self._opened for holder in holders)
        _enough(opened, threshold, f"shares of {dealer}'s secret were opened")
        points = self._points[dealer].copy()  # more shares may be heard meanwhile: this is done in a thread
        order = sorted(points, key=lambda x: holders[x - 1] not in self.believed)
        chosen, dice = order[:threshold], Random(0)
        for _ in range(min(8 * comb(len(order), threshold), 1 + TRIES_MAX // (1 + len(self.spoilers) // 8))):
            found = combine({x: points[x] for x in chosen})
            if found and self._is_secret(dealer, found):
                self.believed.update(holders[x - 1] for x in chosen)
                return found
            chosen = dice.sample(order, threshold)
        self.spoilers.add(dealer)
        return b""

    def _is_secret(self, dealer: str, found: bytes) -> bool:
        """Whether this is what the dealer has committed to, or belongs to the key that it has advertised."""
        if dealer in self._masked:
            return self.pact.commitment(dealer, found) == self._shares[dealer].commitment
        public = X25519PrivateKey.from_private_bytes(found).public_key().public_bytes_raw()
        return public == self.pact.keys[dealer][:32]

    def _is_news(self, stage: Stage, before: Mapping[str, object], worker: str, said: object) -> bool:
        """Whether a worker has not said just this before.

        Raises:
            Refused: it has said something else, or must not say anything by now.
        """
        insist(before.get(worker, said) == said, f"{worker} has said something else before.")
        if worker not in before:
            self._at(stage, worker)
        return worker not in before

    def _at(self, stage: Stage, worker: str) -> None:
        """Refuse what comes too late, too early, or from a stranger."""
        insist(self.stage == stage, f"{worker} is late or early: it speaks of {stage}, the stage is {self.stage}.")
        insist(worker in self._expected, f"{worker} is not one of those who may speak here.")

    def _check_holders(self, here: Mapping[str, object], did: str) -> None:
        """End the attempt unless a quorum and, of each dealer's holders, the threshold are left."""
        ours = self.pact
        _enough(len(here), max(pact.COHORT_MIN, ours.quorum), f"members {did}")
        for dealer in self._shares:
            left = sum(holder in here for holder in ours.holders[dealer])
            _enough(left, ours.settled.threshold, f"holders of {dealer}'s secrets {did}")


def _enough(found: int, needed: int, what: str) -> None:
    if found < needed:
        raise Aborted(f"{found} {what}, and {needed} are needed: the attempt ends, and no update was revealed.")


def into_sums(form: Form, total: Words, updates: int, sums: Sums) -> Counted:
    """Put an unmasked sum of so many updates where the rule `mean` finishes it; `sums` are of the model's layout.

    What is behind the model in it comes back.

    Floats are `examples · delta` in the ring's steps; integers and booleans their means, in place of the largest.
    Under noise it is divided by the plan's cohort, whoever came.

    Raises:
        WireError: the words are no sum of updates; some worker has sent something else.
    """
    sums.clear()
    seen = counted(form, total, updates)
    sums.examples, sums.updates = form.ring.cohort if form.ring.grain else seen.examples, updates
    sums.reach = updates * form.ring.limit * form.ring.examples_max
    sums.largest = means_of_others(form, total, updates)
    sums.steps = form.ring.scale
    np.copyto(sums.low, form.signed(total)[: form.floats])
    sums.bounds = dict.fromkeys(range(-(-form.floats // CHUNK_ITEMS)), 0.0)
    return seen
