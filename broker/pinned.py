"""Who may take part in secure rounds: names and their Ed25519 public keys in a file, and one's own secret key.

Knows these two files. Does not know who has signed the roster, nor what keys are for.
"""

import json
import os
import secrets
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from broker.errors import UsageError


def read_roster(path: Path) -> dict[str, bytes]:
    """Name → public key (32 bytes).

    Raises:
        UsageError: it is not a roster.
    """
    try:
        return {str(name): bytes.fromhex(key) for name, key in json.loads(path.read_text())["workers"].items()}
    except OSError as problem:
        raise UsageError(f"{path} cannot be read: {problem.strerror}.") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UsageError(f"{path} is not a roster: it names workers and their public keys.") from None


def read_identity(path: Path) -> Ed25519PrivateKey:
    """A worker's own key.

    Raises:
        UsageError: it is none.
    """
    try:
        return Ed25519PrivateKey.from_private_bytes(bytes.fromhex(path.read_text().strip()))
    except OSError as problem:
        raise UsageError(f"{path} cannot be read: {problem.strerror}.") from None
    except ValueError:
        raise UsageError(f"{path} is not a secret key: 64 hexadecimal digits.") from None


def draw_keys(folder: Path, names: list[str]) -> dict[str, tuple[str, ...]]:
    """A key for each name, and the roster of all; by name, and for `coordinator`, the options that tell of them."""
    folder.mkdir(parents=True, exist_ok=True)
    roster, public = folder / "roster.json", {}
    options: dict[str, tuple[str, ...]] = {"coordinator": ("--roster", str(roster))}
    for name in names:
        seed = secrets.token_bytes(32)
        with os.fdopen(os.open(folder / f"{name}.key", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(seed.hex())
        options[name] = ("--roster", str(roster), "--identity", str(folder / f"{name}.key"))
        public[name] = Ed25519PrivateKey.from_private_bytes(seed).public_key().public_bytes_raw().hex()
    roster.write_text(json.dumps({"workers": public}))
    return options
