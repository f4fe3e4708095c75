"""A worker's part in one attempt at a secure round: what it says in which order, and what it never says.

Knows the worker's secrets of this attempt, and all reasons to refuse. Does not know queues, disks, clocks nor dice:
random bytes come in by `draw`, and the one record that must outlive the process goes out to be written by the caller.

Every method takes the coordinator's message and gives the answer. The same message again gives the same answer, byte
for byte; another one where the first has been answered is refused with `Alarm`. Secrets live in memory only: a worker
that restarts in the midst of an attempt has dropped out of it.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from broker import pact
from broker.errors import Alarm, Refused, insist
from broker.masks import Words, apply
from broker.shamir import SECRET_BYTES, SHARE_BYTES, split

_Given = TypeVar("_Given")


@dataclass(frozen=True, slots=True)
class Member:
    """Who this worker is, whom it knows, and the least it insists upon, whatever the coordinator says.

    Attributes:
        name: its own, on the roster.
        identity: its Ed25519 key, whose public half is on the roster.
        roster: name → Ed25519 public key (32 bytes), pinned; empty where the operator's own key is what is pinned.
        cohort_min: fewest members of a cohort; at least 3.
        threshold_min: the threshold must be above this part of a member's holders.
        operator: the Ed25519 public key (32 bytes) of whoever must have signed a roster that is not pinned itself.
    """

    name: str
    identity: Ed25519PrivateKey
    roster: Mapping[str, bytes]
    cohort_min: int = pact.COHORT_MIN
    threshold_min: float = 2 / 3
    operator: bytes = b""


class Answer(NamedTuple):
    """Shares, which may leave only after `record` is safe on disk as the one answer in this run and round."""

    record: str
    opened: pact.Opened


class Masking:
    """One attempt.

    Args:
        member: who and whom.
        context: `pact.context` of what *this* worker has received and pinned.
        draw: secret random bytes.
        answered: the record of an earlier answer in this run and round; empty if there is none.

    Attributes:
        advert: what to say first.

    Raises:
        Alarm: this round has been unmasked before: no further attempt may be.
    """

    def __init__(self, member: Member, context: bytes, draw: pact.Draw, *, answered: str = "") -> None:
        if answered:
            raise Alarm("this worker has helped to unmask this round: it takes part in no other attempt at it.")
        self._member, self._context, self._draw = member, context, draw
        self._mask_key, self._seal_key = (X25519PrivateKey.from_private_bytes(draw(32)) for _ in range(2))
        self._secret = draw(SECRET_BYTES)
        public = b"".join(key.public_key().public_bytes_raw() for key in (self._mask_key, self._seal_key))
        self.advert = pact.advertise(context, member.name, public, member.identity)
        self._settled: tuple[pact.Settled, pact.Shares] | None = None
        self._dealt: tuple[pact.Dealt, pact.Masked] | None = None
        self._vowed: tuple[pact.Finishers, pact.Vow] | None = None
        # dealer → this worker's share of its self mask's secret, and of its mask key
        self._held: dict[str, tuple[bytes, bytes]] = {}

    def shares(self, settled: pact.Settled, metrics: Collection[str]) -> pact.Shares:
        """B: check the whole cohort, and deal shares of both secrets. `metrics` are the names that this worker has.

        Raises:
            Refused: an unknown name, a wrong signature, equal keys, this worker's advert missing or changed, too few
                members, too low a threshold, a metric that this worker does not have.
            Alarm: another cohort than before.
        """
        if self._settled:
            return _again(self._settled, settled, "cohort")
        self._check(settled, metrics)
        ours, me = pact.pact_of(self._context, settled), self._member.name
        there = ours.keys.get(me) == self.advert.keys
        insist(there, "this worker's advert is missing from the cohort, or is another.")
        holders = ours.holders[me]
        secrets = self._secret, self._mask_key.private_bytes_raw()
        dealt = (split(secret, len(holders), settled.threshold, self._draw) for secret in secrets)
        mine = dict(zip(holders, zip(*dealt, strict=True), strict=True))
        self._held[me] = mine[me]
        self._common = {name: ours.common(self._seal_key, me, name) for name in ours.neighbours[me]}
        sealed = (ours.seal(common, me, to, b"".join(mine[to])) for to, common in self._common.items())
        self._pact = ours
        self._settled = settled, pact.Shares(tuple(sealed), ours.commitment(me, self._secret))
        return self._settled[1]

    def _check(self, settled: pact.Settled, metrics: Collection[str]) -> None:
        """Refuse a cohort that this worker must not be part of."""
        member, names = self._member, settled.workers
        least, most = max(pact.COHORT_MIN, member.cohort_min), pact.COHORT_MAX
        wanted = pact.threshold_of(len(names), part=member.threshold_min)
        insist(len(names) >= least, f"the cohort has {len(names)} members, and this worker wants {least} or more.")
        insist(len(names) <= most, f"the cohort has {len(names)} members, over the limit of {most}.")
        insist(len(settled.signed) == pact.SIGNED_BYTES * len(names), "the cohort has not one advert for each name.")
        insist(wanted <= settled.threshold, f"the threshold is {settled.threshold}; this worker wants {wanted}.")
        insist(settled.threshold <= pact.degree_of(len(names)) + 1, "the threshold is above the number of holders.")
        for name in settled.metrics:
            insist(name in metrics, f"this worker has no metric {name[:40]!r}: the sum would hold that of few.")
        pact.check_cohort(self._context, settled, frozenset(member.roster.items()))

    def mask(self, dealt: pact.Dealt, words: Words) -> pact.Masked:
        """C: hide the words of this worker's update, in place; once.

        What is sealed wrongly is noticed here, and has no share when this worker is asked for it.

        Raises:
            Refused: no cohort yet, fewer dealers than the threshold needs, or masked already: what was made then is
                to be sent.
            Alarm: other dealers than before.
        """
        if self._dealt:
            _again(self._dealt, dealt, "set of dealers")
            raise Refused("this worker's update is masked: send what was made then.")
        insist(self._settled is not None, "shares are dealt out before there is a cohort.")
        ours, me, bits = self._pact, self._member.name, 8 * words.itemsize
        neighbours = ours.neighbours[me]
        insist(len(dealt.sealed) == len(neighbours), "there is not one slot for each neighbour.")
        sealed = {name: each for name, each in zip(neighbours, dealt.sealed, strict=True) if each}
        least = max(pact.COHORT_MIN, ours.settled.threshold)
        insist(len(sealed) + 1 >= least, f"{len(sealed) + 1} holders have dealt where {least} are needed.")
        for name, each in sealed.items():
            shares = ours.unseal(self._common[name], name, me, each)
            if len(shares) == 2 * SHARE_BYTES:
                self._held[name] = shares[:SHARE_BYTES], shares[SHARE_BYTES:]
        masks = [ours.pair_mask(self._mask_key, me, name, bits) for name in sealed]
        apply(words, [ours.self_mask(self._secret, me, bits), *masks])
        self._dealers = {me, *sealed}
        self._dealt = dealt, pact.Masked(self._member.identity.sign(ours.dealers(me, sealed)))
        return self._dealt[1]

    def vow(self, finishers: pact.Finishers) -> pact.Vow:
        """D1: sign who has finished.

        Raises:
            Refused: fewer than three or than the quorum or the threshold, strangers, this worker not among them, or
                who has dealt is not who has dealt to this worker, or to one of its neighbours as that one says.
            Alarm: other finishers than before.
        """
        if self._vowed:
            return _again(self._vowed, finishers, "set of finishers")
        insist(self._dealt is not None, "the sum is closed before this worker has masked its update.")
        self._check_finishers(finishers)
        self._vowed = finishers, pact.Vow(self._member.identity.sign(self._pact.finishers(finishers)))
        return self._vowed[1]

    def _check_finishers(self, finishers: pact.Finishers) -> None:
        ours, me = self._pact, self._member.name
        for names in (finishers.workers, finishers.lost):
            known = sorted({*names} & ours.keys.keys())
            insist(list(names) == known, "the finishers are not in order, or not all are members.")
        done, lost = set(finishers.workers), set(finishers.lost)
        dealers, near, least = done | lost, done.intersection(ours.holders[me]), max(pact.COHORT_MIN, ours.quorum)
        insist(me in done, "this worker is not among the finishers.")
        insist(not done & lost, "a finisher is called lost as well.")
        insist(len(done) >= least, f"there are {len(done)} finishers, and it takes {least}.")
        insist(len(near) >= ours.settled.threshold, "fewer holders have finished than the threshold.")
        insist(dealers.intersection(ours.holders[me]) == self._dealers, "others have dealt than to this worker.")
        if not ours.complete:
            insist(len(finishers.dealers) == len(done), "finishers do not say against whom they have masked.")
            for name, statement in zip(finishers.workers, finishers.dealers, strict=True):
                if name in near:
                    pact.check_signature(self._member.roster, name, statement, ours.dealers(name, dealers))

    def answer(self, reveal: pact.Reveal) -> Answer:
        """D2: for each holder the one share that the finishers call for.

        Raises:
            Refused: nothing vowed yet, a wrong signature, fewer vows than the quorum.
        """
        if not self._vowed:
            raise Refused("shares are asked for before this worker has vowed who has finished.")
        finishers, ours = self._vowed[0], self._pact
        statement = ours.finishers(finishers)
        insist(len(reveal.vows) == len(finishers.workers), "there is not one vow for each finisher.")
        vows = [(name, vow) for name, vow in zip(finishers.workers, reveal.vows, strict=True) if vow]
        insist(len(vows) >= ours.quorum, f"{len(vows)} have vowed where {ours.quorum} are needed.")
        for name, vow in vows:
            pact.check_signature(self._member.roster, name, vow, statement)
        opened = (
            self._held[name][name not in finishers.workers] if name in self._held else b""
            for name in ours.holders[self._member.name]
        )
        return Answer(statement.hex(), pact.Opened(tuple(opened)))


def _again(before: tuple[object, _Given], asked: object, what: str) -> _Given:
    """The same answer to the same question.

    Raises:
        Alarm: it is another question.
    """
    if before[0] != asked:
        raise Alarm(f"this worker has already answered for another {what} in this attempt.")
    return before[1]
