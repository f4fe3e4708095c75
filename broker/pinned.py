"""Who may take part in secure rounds: the operator's signed roster of public keys, and a party's own secret key.

Knows these two files, Ed25519 signatures over the first and fingerprints for the telephone. Does not know what the
keys are used for (`pact.py`), nor who the operator is: whoever reads a roster says whose signature it trusts.
"""

import base64
import hashlib
import json
import secrets
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from broker.errors import UsageError
from broker.fields import NAME, NAME_RULE
from broker.files import write_whole
from broker.wording import Name, secret

KEY_BYTES = 32
SAID = b"fluffle roster 1\0"
"""What a signature begins with, so that it is of a roster and nothing else."""
_Key = Annotated[bytes, Field(min_length=KEY_BYTES, max_length=KEY_BYTES)]


@dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True, ser_json_bytes="hex", val_json_bytes="hex"))
class Roster:
    """Names and their Ed25519 public keys (32 bytes each), as the operator has signed them, if they have.

    Attributes:
        version: counts the operator's signatures.
        operator: public key of whoever has signed; empty while nobody has.
    """

    workers: Mapping[Name, _Key]
    version: Annotated[int, Field(ge=0)]
    operator: bytes = b""
    signature: bytes = b""
    format: Literal[1] = 1

    def with_(self, name: str, key: bytes) -> "Roster":
        """With one worker more, to be signed anew.

        Raises:
            UsageError: the name is none, or is taken; the key is none, or another's.
        """
        if not NAME.fullmatch(name):
            raise UsageError(f"{name[:80]!r} is no worker's name: {NAME_RULE}.")
        if name in self.workers:
            raise UsageError(f"{name} is on the roster already: remove it first if its key has changed.")
        for other, known in self.workers.items():
            if known == key:
                raise UsageError(f"{other} has this key already: each worker needs one of its own.")
        _public(key)
        return Roster({**self.workers, name: key}, self.version)

    def without(self, name: str) -> "Roster":
        """Without one worker, to be signed anew.

        Raises:
            UsageError: it is not on the roster.
        """
        if name not in self.workers:
            raise UsageError(f"{name} is not on the roster.")
        return Roster({each: key for each, key in self.workers.items() if each != name}, self.version)

    def signed(self, operator: Ed25519PrivateKey) -> "Roster":
        """The next version, signed."""
        made = Roster(self.workers, self.version + 1, public_of(operator))
        return replace(made, signature=operator.sign(made._said()))

    def check(self, operator: bytes = b"", *, source: str = "the roster") -> "Roster":
        """This roster, if it is signed by whom it should be; by anybody if `operator` is empty.

        `source` is what it is called in what is said.

        Raises:
            UsageError: it is not.
        """
        if not self.signature:
            raise UsageError(f"{source} is not signed: `fluffle roster sign` it with the operator's key.")
        if operator and operator != self.operator:
            raise UsageError(
                f"{source} is signed by another operator: {fingerprint(self.operator)} instead of "
                f"{fingerprint(operator)}; ask yours."
            )
        try:
            _public(self.operator).verify(self.signature, self._said())
        except InvalidSignature:
            raise UsageError(f"{source} is not what the operator has signed: get it from them again.") from None
        return self

    def vouch(self, name: str, identity: Ed25519PrivateKey) -> None:
        """See that a worker is on it, with its own key.

        Raises:
            UsageError: it is not.
        """
        if self.workers.get(name) != public_of(identity):
            raise UsageError(f"the roster has another key for {name}, or none: ask the operator for one with yours.")

    def _said(self) -> bytes:
        names = {name: self.workers[name].hex() for name in sorted(self.workers)}
        said = {"format": 1, "operator": self.operator.hex(), "version": self.version, "workers": names}
        return SAID + json.dumps(said, sort_keys=True, separators=(",", ":")).encode()

    @property
    def text(self) -> bytes:
        """What its file holds, and what a coordinator shows its workers."""
        return TypeAdapter(Roster).dump_json(self, indent=1) + b"\n"

    def write(self, path: Path) -> None:
        """Put it into a file, whole or not at all."""
        write_whole(path, self.text)

    @classmethod
    def read(cls, path: Path) -> "Roster":
        """What a file says; whether that is signed, `check` says.

        Raises:
            UsageError: it is no roster.
            OSError: it cannot be read.
        """
        return cls.parse(path.read_bytes(), str(path))

    @classmethod
    def parse(cls, text: bytes, source: str = "what the coordinator shows") -> "Roster":
        """What was written or shown; `source` is what that is called.

        Raises:
            UsageError: it is no roster.
        """
        try:
            made: Roster = TypeAdapter(cls).validate_json(text)
        except ValidationError:
            raise UsageError(f"{source} is not a roster: restore it, or ask the operator for it.") from None
        if len(set(made.workers.values())) < len(made.workers):
            raise UsageError(f"{source} is not a roster: two workers share a key.")
        return made


@lru_cache(maxsize=8)  # many workers of one process are shown the same one
def shown_roster(text: bytes, operator: bytes) -> Roster:
    """The roster that a coordinator shows, if the operator (a public key) has signed it.

    Raises:
        UsageError: it is none, or not signed by them.
    """
    return Roster.parse(text).check(operator)


def read_roster(path: Path, operator: str = "") -> Roster:
    """A roster that the operator (a public key in hex; empty: anybody) has signed.

    Raises:
        UsageError: it is none, or not signed by them.
    """
    return Roster.read(path).check(bytes.fromhex(operator))


def read_identity(path: Path) -> Ed25519PrivateKey:
    """A party's own key.

    Raises:
        UsageError: it is none, or others may read it.
    """
    try:
        return identity_of(secret(path).read_text().strip())
    except ValueError:
        raise UsageError(f"{path} is not a secret key: `fluffle keygen` makes one.") from None


def draw_identity(path: Path) -> bytes:
    """Draw a secret key into a new file that nobody else may read; the public key.

    Raises:
        UsageError: the file is there already.
        OSError: it cannot be written.
    """
    seed = secrets.token_hex(KEY_BYTES)
    try:
        path.touch(mode=0o600, exist_ok=False)
    except FileExistsError:
        raise UsageError(f"{path} is there already: a key that is in use is not to be written over.") from None
    try:
        write_whole(path, f"{seed}\n".encode(), mode=0o600)
    except BaseException:
        path.unlink()
        raise
    return public_of(identity_of(seed))


def draw_keys(folder: Path, names: list[str]) -> Path:
    """A key for each name, in NAME.key, and the roster of all, signed by operator.key; the roster's path."""
    folder.mkdir(parents=True, exist_ok=True)
    roster, path = Roster({}, 0), folder / "roster.json"
    for name in names:
        roster = roster.with_(name, draw_identity(folder / f"{name}.key"))
    draw_identity(folder / "operator.key")
    roster.signed(read_identity(folder / "operator.key")).write(path)
    return path


def identity_of(seed: str) -> Ed25519PrivateKey:
    """The secret key of 32 bytes in hex; ValueError if it is none."""
    return Ed25519PrivateKey.from_private_bytes(bytes.fromhex(seed))


def public_of(key: Ed25519PrivateKey) -> bytes:
    """The public half of a secret key, 32 bytes."""
    return key.public_key().public_bytes_raw()


def fingerprint(key: bytes) -> str:
    """A public key for the telephone: 125 bits of its SHA-256, as five groups of five of A to Z and 2 to 7."""
    text = base64.b32encode(hashlib.sha256(key).digest()).decode()[:25]
    return " ".join(text[at : at + 5] for at in range(0, 25, 5))


def _public(key: bytes) -> Ed25519PublicKey:
    try:
        return Ed25519PublicKey.from_public_bytes(key)
    except ValueError:
        raise UsageError(f"{key.hex()[:80]!r} is not a public key: `fluffle keygen` prints one.") from None
