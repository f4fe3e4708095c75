"""A worker's part in one attempt at a secure round: what it says in which order, and what it never says.

Knows the worker's secrets of this attempt, and all reasons to refuse. Does not know queues, disks, clocks nor dice:
random bytes come in by `draw`, and the one record that must outlive the process goes out to be written by the caller.

Every method takes the coordinator's message and gives the answer. The same message again gives the same answer, byte
for byte; another one where the first has been answered is refused with `Alarm`. Secrets live in memory only: a worker
that restarts in the midst of an attempt has dropped out of it.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from broker.masks import Words
from broker.pact import COHORT_MIN, Advert, Dealt, Draw, Finishers, Opened, Reveal, Settled, Shares, Vow


@dataclass(frozen=True, slots=True)
class Member:
    """Who this worker is, whom it knows, and the least it insists upon, whatever the coordinator says.

    Attributes:
        name: its own, on the roster.
        identity: its Ed25519 key, whose public half is on the roster.
        roster: name → Ed25519 public key (32 bytes), pinned.
        cohort_min: fewest members of a cohort; at least 3.
        threshold_min: the threshold must be above this part of a member's holders.
    """

    name: str
    identity: Ed25519PrivateKey
    roster: Mapping[str, bytes]
    cohort_min: int = COHORT_MIN
    threshold_min: float = 2 / 3


class Answer(NamedTuple):
    """Shares, which may leave only after `record` is safe on disk as the one answer in this run and round."""

    record: str
    opened: Opened


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

    advert: Advert

    def __init__(self, member: Member, context: bytes, draw: Draw, *, answered: str = "") -> None:
        raise NotImplementedError

    def shares(self, settled: Settled, metrics: Collection[str]) -> Shares:
        """B: check the whole cohort, and deal shares of both secrets. `metrics` are the names that this worker has.

        Raises:
            Refused: an unknown name, a wrong signature, equal keys, this worker's advert missing or changed, too few
                members, too low a threshold, a metric that this worker does not have.
            Alarm: another cohort than before.
        """
        raise NotImplementedError

    def mask(self, dealt: Dealt, words: Words) -> None:
        """C: hide the words of this worker's update, in place; once.

        Raises:
            Refused: fewer dealers than the threshold needs, or masked already: what was made then is to be sent.
            Alarm: other dealers than before.
        """
        raise NotImplementedError

    def vow(self, finishers: Finishers) -> Vow:
        """D1: sign who has finished.

        Raises:
            Refused: fewer than three or than the quorum or the threshold, strangers, this worker not among them.
            Alarm: other finishers than before.
        """
        raise NotImplementedError

    def answer(self, reveal: Reveal) -> Answer:
        """D2: for each holder the one share that the finishers call for.

        Raises:
            Refused: nothing vowed yet, a wrong signature, fewer vows than the quorum.
        """
        raise NotImplementedError
