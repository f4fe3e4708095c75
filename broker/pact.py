"""What the members of a secure round agree upon: who they are, to whom each deals shares, which keys hide what.

Knows the context that every key and signature binds, the messages of the protocol, the graph, thresholds, signatures
and sealed shares. Does not know queues, updates, nor the order in which things may happen: that is
`workers/masking.py` on one side and `coordinator/unmasking.py` on the other.

The protocol is SecAgg+ (Bonawitz et al., CCS 2017, eprint 2017/281; Bell et al., CCS 2020, eprint 2020/704) with an
operator's roster and signed survivors. What differs from the papers:

- Everyone is shown all adverts, not only the neighbours' (164 bytes each; one publish serves all): so everyone checks
  all of them, and computes the same graph.
- Beside the context, keys are salted with the *transcript*, which binds the whole cohort too. Whoever was shown
  another cohort, another model or another plan has other keys: its words are noise, its shares stay sealed.
- A message has one slot for each peer, so a worker cannot even write down both shares of one peer.
- A dealer commits to its self mask's secret, so that a false share is noticed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from broker.fields import NAME, Within
from broker.masks import Mask

COHORT_MAX = 10_000
"""Most members of a secure round."""
COHORT_MIN = 3
"""Fewest: of two, each could take its own update from the sum and would have the other's."""
METRICS_MAX = 64
COMPLETE_MAX = 64
"""Up to so many members everyone is everyone's neighbour."""

Draw = Callable[[int], bytes]
"""So many secret random bytes: `secrets.token_bytes`, or what a test can repeat."""
Name = Annotated[str, NAME]
Digest = Annotated[bytes, Within(32, 32)]
Signature = Annotated[bytes, Within(64, 64)]
Sealed = Annotated[bytes, Within(0, 82)]
Share = Annotated[bytes, Within(0, 33)]


@dataclass(frozen=True, slots=True)
class Advert:
    """A · worker → coordinator, and with `Settled` → all: I am ready, and these are my keys in this attempt.

    `keys` are two X25519 public keys of 32 bytes: one for masks, then one for sealing.
    """

    worker: Name
    keys: Annotated[bytes, Within(64, 64)]
    signature: Signature


@dataclass(frozen=True, slots=True)
class Settled:
    """A closed · coordinator → all, the same for all: the cohort, sorted by name, and what it takes to unmask.

    `metrics` are those which the sum will hold, after the examples, in this order.
    """

    adverts: Annotated[tuple[Advert, ...], Within(COHORT_MIN, COHORT_MAX)]
    threshold: Annotated[int, Within(2, COHORT_MAX)]
    metrics: Annotated[tuple[Annotated[str, Within(0, 200)], ...], Within(0, METRICS_MAX)] = ()


@dataclass(frozen=True, slots=True)
class Shares:
    """B · worker → coordinator: both of my secrets in shares, sealed for each of my neighbours in the order of names.

    `commitment` is a hash of the self mask's secret.
    """

    sealed: Annotated[tuple[Sealed, ...], Within(0, COHORT_MAX)]
    commitment: Digest


@dataclass(frozen=True, slots=True)
class Dealt:
    """B closed · coordinator → one worker: what its neighbours have sealed for it, in the order of names.

    Empty bytes stand for a neighbour that has dealt nothing; against the others the worker masks its update.
    """

    sealed: Annotated[tuple[Sealed, ...], Within(0, COHORT_MAX)]


@dataclass(frozen=True, slots=True)
class Finishers:
    """C closed · coordinator → finishers: whose masked words are in the sum, sorted by name."""

    workers: Annotated[tuple[Name, ...], Within(COHORT_MIN, COHORT_MAX)]


@dataclass(frozen=True, slots=True)
class Vow:
    """D1 · worker → coordinator: these finishers, and in this attempt never others."""

    signature: Signature


@dataclass(frozen=True, slots=True)
class Reveal:
    """D2 · coordinator → finishers: vows of the finishers in the order of names; empty bytes where one is missing."""

    vows: Annotated[tuple[Annotated[bytes, Within(0, 64)], ...], Within(COHORT_MIN, COHORT_MAX)]


@dataclass(frozen=True, slots=True)
class Opened:
    """D2 · worker → coordinator: one share for each holder (its neighbours and itself) in the order of names.

    Of a finisher it is a share of the self mask's secret, of anyone else of the mask key. Empty bytes: it has none.
    """

    shares: Annotated[tuple[Share, ...], Within(0, COHORT_MAX)]


def context(run: str, round_: int, attempt: int, *, model: bytes, plan: bytes, roster: Mapping[str, bytes]) -> bytes:
    """What all keys and signatures of an attempt bind, in 32 bytes.

    Args:
        run: the run's name.
        round_: which round.
        attempt: which try at it.
        model: SHA-256 of the version's bytes as this side has them.
        plan: whatever settings both sides must agree upon, written in one way only.
        roster: name → Ed25519 public key (32 bytes), as this side has pinned it.
    """
    raise NotImplementedError


@dataclass(frozen=True)
class Pact:
    """A closed cohort: what follows from a context and a `Settled`, the same for all who were shown the same."""

    context: bytes
    settled: Settled

    @cached_property
    def transcript(self) -> bytes:
        """The context and all that was settled, in 32 bytes."""
        raise NotImplementedError

    @cached_property
    def members(self) -> tuple[str, ...]:
        """U1, sorted."""
        raise NotImplementedError

    @property
    def quorum(self) -> int:
        """How many members must vow for the same finishers: ⌊2·|U1|/3⌋ + 1, so that two sets cannot both have it."""
        raise NotImplementedError

    def neighbours(self, worker: str) -> tuple[str, ...]:
        """To whom a member deals shares, and against whom it masks; sorted."""
        raise NotImplementedError

    def holders(self, worker: str) -> tuple[str, ...]:
        """Who has a share of a member's secrets: its neighbours and itself, sorted; the first has x = 1."""
        raise NotImplementedError


def degree_of(members: int) -> int:
    """How many neighbours each of so many members has."""
    raise NotImplementedError


def threshold_of(members: int, *, part: float = 2 / 3) -> int:
    """How many of a member's holders it takes: ⌊part · holders⌋ + 1."""
    raise NotImplementedError


def advertise(context_: bytes, worker: str, keys: bytes, identity: Ed25519PrivateKey) -> Advert:
    """A signed advert."""
    raise NotImplementedError


def check_advert(context_: bytes, advert: Advert, roster: Mapping[str, bytes]) -> None:
    """Whether an advert is of a name on the roster, for this context, and its keys are usable.

    Raises:
        Refused: it is not.
    """
    raise NotImplementedError


def pair_mask(pact: Pact, key: X25519PrivateKey, me: str, other: str, bits: int) -> Mask:
    """What `me` adds against `other`; `other` adds the same with the other sign.

    Raises:
        Refused: the other's key is not usable.
    """
    raise NotImplementedError
