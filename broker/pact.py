"""What the members of a secure round agree upon: who they are, to whom each deals shares, which keys hide what.

Knows the context that every key and signature binds, the messages of the protocol, the graph, thresholds, signatures
and sealed shares. Does not know queues, updates, nor the order in which things may happen: that is
`workers/masking.py` on one side and `coordinator/unmasking.py` on the other.

The protocol is SecAgg+ (Bonawitz et al., CCS 2017, eprint 2017/281; Bell et al., CCS 2020, eprint 2020/704) with an
operator's roster and signed survivors. What differs from the papers:

- Everyone is shown all adverts, not only the neighbours' (128 bytes and a name each; one publish serves all): so
  everyone checks all of them, and computes the same graph.
- Beside the context, keys are salted with the *transcript*, which binds the whole cohort too. Whoever was shown
  another cohort, another model or another plan has other keys: its words are noise, its shares stay sealed.
- A message has one slot for each peer, so a worker cannot even write down both shares of one peer.
- A dealer commits to its self mask's secret, so that a false share is noticed.
- Where not everyone is everyone's neighbour, a worker signs against whom it has masked, and its neighbours look at
  that before they vow. Else a coordinator with colluders in a third of a neighbourhood could show one worker few
  dealers, call the honest ones among them lost, and have its update. In a complete graph the quorum prevents it.

Whom it takes. A coordinator that lies learns one worker's update only with more than a third of a complete graph's
members; beyond 64, with colluders among the holders of its secrets for all but one of the threshold. `degree_of`
gives as many neighbours as it takes, at the default threshold, for the odds that any member has so many to be below
2^-64 if a fifth of all collude, and 2^-25 if a third does (union bound over hypergeometric neighbourhoods); a
coordinator that tries many cohorts does a little better, for it chooses whose adverts it shows. The odds that a
tenth of all, dropping out, end an attempt are below 2^-20.
"""

import math
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from typing import Annotated

from blake3 import blake3
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from broker.errors import Refused, insist
from broker.fields import NAME, Within
from broker.masks import Mask

COHORT_MAX = 10_000
"""Most members of a secure round."""
COHORT_MIN = 3
"""Fewest: of two, each could take its own update from the sum and would have the other's."""
METRICS_MAX = 64
SCORED = "evaluate/"
"""How the names of metrics begin that evaluate said of the version before, not train."""
SIGNED_BYTES = 128
"""Of an advert: two keys of 32 bytes, and a signature."""
COMPLETE_MAX = 64
"""Up to so many members everyone is everyone's neighbour."""

Draw = Callable[[int], bytes]
"""So many secret random bytes: `secrets.token_bytes`, or what a test can repeat."""
Name = Annotated[str, NAME]  # in which there is no space: names with spaces between them are one field of a digest
Digest = Annotated[bytes, Within(32, 32)]
Signature = Annotated[bytes, Within(64, 64)]
Sealed = Annotated[bytes, Within(0, 82)]
Share = Annotated[bytes, Within(0, 33)]


@dataclass(frozen=True, slots=True)
class Advert:
    """A · worker → coordinator, and within `Settled` → all: I am ready, and these are my keys in this attempt.

    `keys` are two X25519 public keys of 32 bytes: one for masks, then one for sealing.
    """

    worker: Name
    keys: Annotated[bytes, Within(64, 64)]
    signature: Signature


@dataclass(frozen=True, slots=True)
class Settled:
    """A closed · coordinator → all, the same for all: the cohort, sorted by name, and what it takes to unmask.

    `signed` has the keys and the signature of each, one behind the other, in 128 bytes.
    `metrics` are those which the sum will hold, after the examples, in this order.
    """

    workers: Annotated[tuple[Name, ...], Within(COHORT_MIN, COHORT_MAX)]
    signed: Annotated[bytes, Within(COHORT_MIN * SIGNED_BYTES, COHORT_MAX * SIGNED_BYTES)]
    threshold: Annotated[int, Within(2, COHORT_MAX)]
    metrics: Annotated[tuple[Annotated[str, Within(0, 200)], ...], Within(0, METRICS_MAX)] = ()

    @classmethod
    def of(cls, adverts: Iterable[Advert], threshold: int, metrics: Iterable[str]) -> "Settled":
        """This cohort."""
        adverts = tuple(adverts)
        signed = b"".join(advert.keys + advert.signature for advert in adverts)
        return cls(tuple(advert.worker for advert in adverts), signed, threshold, tuple(metrics))

    @property
    def adverts(self) -> tuple[Advert, ...]:
        """Of each its own."""
        places = range(0, len(self.workers) * SIGNED_BYTES, SIGNED_BYTES)
        each = (self.signed[at : at + SIGNED_BYTES] for at in places)
        return tuple(Advert(name, said[:64], said[64:]) for name, said in zip(self.workers, each, strict=True))


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
class Masked:
    """C · worker → coordinator, with the masked words: against whom they are masked, signed (`Pact.dealers`)."""

    dealers: Signature


@dataclass(frozen=True, slots=True)
class Finishers:
    """C closed · coordinator → finishers: whose words are in the sum, and who has dealt and is lost, sorted by name.

    `dealers` are the finishers' statements (`Masked`) in their order; none where all are everyone's neighbours.
    """

    workers: Annotated[tuple[Name, ...], Within(COHORT_MIN, COHORT_MAX)]
    lost: Annotated[tuple[Name, ...], Within(0, COHORT_MAX)]
    dealers: Annotated[tuple[Signature, ...], Within(0, COHORT_MAX)] = ()


@dataclass(frozen=True, slots=True)
class Vow:
    """D1 · worker → all: these finishers and lost ones, signed (`Pact.finishers`); in this attempt never others."""

    signature: Signature


@dataclass(frozen=True, slots=True)
class Reveal:
    """D2 · coordinator → finishers: a quorum's vows, in the order of the finishers' names; of others, empty bytes."""

    vows: Annotated[tuple[Annotated[bytes, Within(0, 64)], ...], Within(COHORT_MIN, COHORT_MAX)]


@dataclass(frozen=True, slots=True)
class Opened:
    """D2 · worker → coordinator: one share for each holder (its neighbours and itself) in the order of names.

    Of a finisher it is a share of the self mask's secret, of anyone else of the mask key. Empty bytes: it has none.
    """

    shares: Annotated[tuple[Share, ...], Within(0, COHORT_MAX)]


def digest(*fields: bytes | str | int) -> bytes:
    """SHA-256 of fields, each behind its length: no two lists of fields have the same bytes."""
    raw = [field if isinstance(field, bytes) else str(field).encode() for field in fields]
    return sha256(b"".join(len(field).to_bytes(8, "big") + field for field in raw)).digest()


def roster_digest(roster: Mapping[str, bytes]) -> bytes:
    """Names and keys of a roster in 32 bytes, whatever its version and whoever has signed it."""
    return digest(*(part for name in sorted(roster) for part in (name, roster[name])))


def model_digest(weights: memoryview) -> bytes:
    """BLAKE3 of a version, in 32 bytes; every worker hashes the whole model, and SHA-256 takes four times as long."""
    return blake3(weights).digest()


def context(run: str, round_: int, attempt: int, *, model: bytes, plan: bytes, roster: Mapping[str, bytes]) -> bytes:
    """What all keys and signatures of an attempt bind, in 32 bytes.

    Args:
        run: the run's name.
        round_: which round.
        attempt: which try at it.
        model: `model_digest` of the version as this side has it.
        plan: whatever settings both sides must agree upon, written in one way only.
        roster: name → Ed25519 public key (32 bytes), as this side has pinned it.
    """
    return digest("fluffle-secure/1", run, round_, attempt, model, digest(plan), roster_digest(roster))


class Pact:
    """A closed cohort: what follows from a context and a `Settled`, the same for all who were shown the same.

    Attributes:
        context: see `context`.
        settled: see there.
        keys: U1, sorted: name → both public keys.
        quorum: how many must vow for the same finishers: ⌊2·|U1|/3⌋ + 1, so that two sets cannot both have it.
        complete: whether everyone is everyone's neighbour.
        holders: name → who has a share of its secrets: its neighbours and itself, sorted; the first has x = 1.
        neighbours: name → to whom it deals shares, and against whom it masks; sorted.
        transcript: the context and all that was settled, in 32 bytes.
    """

    def __init__(self, context_: bytes, settled: Settled) -> None:
        self.context, self.settled = context_, settled
        self.keys = {advert.worker: advert.keys for advert in settled.adverts}
        self.quorum = 2 * len(self.keys) // 3 + 1
        self.complete = degree_of(len(self.keys)) == len(self.keys) - 1
        said = " ".join(settled.workers), settled.signed, digest(*settled.metrics)
        self.transcript = digest(context_, settled.threshold, *said)
        # Harary's graph over an order that nobody chooses: on a ring, the nearest on both sides
        ring = sorted(self.keys, key=lambda name: digest(self.transcript, name))
        half = len(ring) if self.complete else degree_of(len(ring)) // 2
        near = ring * 3
        self.holders = {
            name: tuple(sorted(set(near[at - half : at + half + 1]))) for at, name in enumerate(ring, len(ring))
        }
        self.neighbours = {name: tuple(n for n in held if n != name) for name, held in self.holders.items()}

    def dealers(self, worker: str, dealers: Container[str]) -> bytes:
        """What a worker signs when it has masked against those of its neighbours that are among the dealers."""
        return digest(
            self.transcript, "dealers", worker, " ".join(filter(dealers.__contains__, self.neighbours[worker]))
        )

    def finishers(self, finishers: Finishers) -> bytes:
        """What a worker signs when it vows."""
        return digest(self.transcript, "finishers", " ".join(finishers.workers), " ".join(finishers.lost))

    def pair_mask(self, key: X25519PrivateKey, me: str, other: str, bits: int) -> Mask:
        """What `me`, whose mask key this is, adds against `other`; `other` adds the same with the other sign.

        Words of another size have another keystream.

        Raises:
            Refused: the other's key is not usable.
        """
        shared = _shared(key, self.keys[other][:32], other)
        return Mask(self._derive(shared, "pair", min(me, other), max(me, other), bits), plus=me < other)

    def self_mask(self, secret: bytes, me: str, bits: int) -> Mask:
        """What a worker adds so that its words stay hidden should it be called lost and come late."""
        return Mask(self._derive(secret, "self", me, bits), plus=True)

    def commitment(self, worker: str, secret: bytes) -> bytes:
        """A hash of the self mask's secret, which says nothing of 32 random bytes."""
        return digest(self.transcript, "commitment", worker, secret)

    def common(self, key: X25519PrivateKey, me: str, other: str) -> ChaCha20Poly1305:
        """What seals between `me`, whose sealing key this is, and `other`, in both directions.

        Raises:
            Refused: the other's key is not usable.
        """
        shared = _shared(key, self.keys[other][32:], other)
        return ChaCha20Poly1305(self._derive(shared, "seal", min(me, other), max(me, other)))

    def seal(self, common: ChaCha20Poly1305, me: str, to: str, shares: bytes) -> bytes:
        """Shares that only `to` can open. A direction has a nonce of its own, under which only once is sealed."""
        return common.encrypt(bytes([me < to]) * 12, shares, None)

    def unseal(self, common: ChaCha20Poly1305, sender: str, me: str, sealed: bytes) -> bytes:
        """What `sender` has sealed for `me`; empty if that is not so."""
        try:
            return common.decrypt(bytes([sender < me]) * 12, sealed, None)
        except InvalidTag:
            return b""

    def _derive(self, secret: bytes, *info: str | int) -> bytes:
        return HKDF(SHA256(), 32, salt=self.transcript, info=" ".join(map(str, info)).encode()).derive(secret)


@lru_cache(maxsize=2)  # a graph of 10,000 is some 20 MB
def pact_of(context_: bytes, settled: Settled) -> Pact:
    """What follows, worked out once for all who are hosted together and were shown the same."""
    return Pact(context_, settled)


@lru_cache(maxsize=256)
def degree_of(members: int) -> int:
    """How many neighbours each of so many members has: all others up to 64, then the fewest that are safe: see above.

    65 members have 32, 100 have 44, 1000 have 86, 10,000 have 104.
    """
    if members <= COMPLETE_MAX:
        return members - 1
    return next(degree for degree in range(2, members, 2) if _is_safe(members, degree))


def _is_safe(members: int, degree: int) -> bool:
    least, others = _part_of(degree + 1, 2 / 3), members - 1

    def rare(kind: int, found: int, bits: int) -> bool:
        """Whether of `kind` members hardly any one's neighbours count so many: the odds, exactly, below 2^-bits."""
        ways = sum(
            math.comb(kind, n) * math.comb(others - kind, degree - n) for n in range(found, min(kind, degree) + 1)
        )
        return members * ways << bits < math.comb(others, degree)

    learns, lost = least - 1, degree + 2 - least
    return rare(members // 5, learns, 64) and rare(members // 3, learns, 25) and rare(members // 10, lost, 20)


def threshold_of(members: int, *, part: float = 2 / 3) -> int:
    """How many of a member's holders it takes: ⌊part · holders⌋ + 1."""
    return _part_of(degree_of(members) + 1, part)


def _part_of(holders: int, part: float) -> int:
    return math.floor(part * holders + 1e-9) + 1


# -- who says so, and what only two know -----------------------------------------------------------------------------


def advertise(context_: bytes, worker: str, keys: bytes, identity: Ed25519PrivateKey) -> Advert:
    """A signed advert."""
    return Advert(worker, keys, identity.sign(digest(context_, "advert", worker, keys)))


def check_advert(context_: bytes, advert: Advert, roster: Mapping[str, bytes]) -> None:
    """Whether an advert is of a name on the roster, and for this context.

    Raises:
        Refused: it is not.
    """
    check_signature(roster, advert.worker, advert.signature, digest(context_, "advert", advert.worker, advert.keys))


@lru_cache(maxsize=2)
def check_cohort(context_: bytes, settled: Settled, roster: frozenset[tuple[str, bytes]]) -> None:
    """`check_advert` of a whole cohort, sorted and without equal keys; once for all who are hosted together.

    Raises:
        Refused: it is not so.
    """
    names, adverts, known = settled.workers, settled.adverts, dict(roster)
    keys = {key for advert in adverts for key in (advert.keys[:32], advert.keys[32:])}
    insist([*names] == sorted({*names}), "the cohort is not sorted, or names a worker twice.")
    insist(len(keys) == 2 * len(names), "two of the cohort's keys are equal.")
    for advert in adverts:
        check_advert(context_, advert, known)


def check_keys(advert: Advert) -> None:
    """Whether the keys give secrets: of a few special ones, all know what comes out.

    Raises:
        Refused: they do not.
    """
    for key in (advert.keys[:32], advert.keys[32:]):
        _shared(_PROBE, key, advert.worker)


def check_signature(roster: Mapping[str, bytes], worker: str, signature: bytes, signed: bytes) -> None:
    """Whether a member has signed this.

    Raises:
        Refused: it is not on the roster, or has not.
    """
    insist(worker in roster, f"{worker} is not on the roster.")
    try:
        _verify(roster[worker], signature, signed)
    except (InvalidSignature, ValueError):
        raise Refused(
            f"{worker}'s signature is wrong: its key is not the roster's, or model, plan, roster or attempt differ."
        ) from None


@lru_cache(maxsize=8192)  # a hundred hosted workers look at the same hundred signatures; 4 MB at the most
def _verify(key: bytes, signature: bytes, signed: bytes) -> None:
    Ed25519PublicKey.from_public_bytes(key).verify(signature, signed)


_PROBE = X25519PrivateKey.from_private_bytes(bytes(32))
"""Any key will do: what is not usable gives zero with every one."""


def _shared(key: X25519PrivateKey, theirs: bytes, whose: str) -> bytes:
    try:
        return key.exchange(X25519PublicKey.from_public_bytes(theirs))
    except ValueError:
        raise Refused(f"{whose} advertises a key that gives no secret.") from None
