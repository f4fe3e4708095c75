"""`fluffle keygen` and `fluffle roster`: the operator's list of who may take part in secure rounds.

Knows the commands. Does not know what is signed, nor how: `pinned.py` does.
"""

from pathlib import Path
from typing import Annotated

import typer

from broker.errors import UsageError
from broker.fields import counted
from broker.pinned import Roster, draw_identity, fingerprint, public_of, read_identity
from broker.secure import alone

app = typer.Typer(no_args_is_help=True, help="Who may take part in secure rounds, signed by the operator.")

File = Annotated[Path, typer.Argument(metavar="ROSTER", help="The roster's file, such as roster.json.")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="A worker.")]


def keygen(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where the secret key goes; it must not be there.")],
) -> None:
    """Draw a key of one's own: the secret into FILE, the public key and its fingerprint to the screen."""
    key = draw_identity(file)
    typer.echo(f"public key   {key.hex()}\nfingerprint  {fingerprint(key)}\nsecret key   {file}, never to leave you")


@app.command()
def add(
    file: File, name: Name, key: Annotated[str, typer.Argument(metavar="KEY", help="What its keygen printed.")]
) -> None:
    """Put a worker on the roster, or begin one; sign it afterwards. Compare the fingerprint by telephone."""
    with alone(file.parent.resolve(strict=True)):  # of `fluffle invite`, too: both read, change and write
        roster = (Roster.read(file) if file.exists() else Roster({}, 0)).with_(name, _key(key))
        roster.write(file)
    typer.echo(f"{name}  {fingerprint(roster.workers[name])}")


@app.command()
def remove(file: File, name: Name) -> None:
    """Strike a worker off; sign the roster afterwards."""
    with alone(file.resolve(strict=True).parent):
        Roster.read(file).without(name).write(file)


@app.command()
def sign(
    file: File, key: Annotated[Path, typer.Option("--key", help="The operator's secret key, from keygen.")]
) -> None:
    """Sign the roster as its next version; a roster that another operator has signed is not taken over."""
    with alone(file.resolve(strict=True).parent):
        roster, operator = Roster.read(file), read_identity(key)
        if roster.signature:
            roster.check(public_of(operator))
        signed = roster.signed(operator)
        signed.write(file)
    workers = counted(len(signed.workers), "worker")
    typer.echo(f"version {signed.version}, {workers}, operator {signed.operator.hex()}")


@app.command()
def verify(
    file: File,
    operator: Annotated[str, typer.Option(help="The operator's public key, which the signature must be of.")] = "",
) -> None:
    """Whether the roster is what its operator has signed, and who is on it; exit status 2 if not.

    The fingerprints are to be compared by telephone.
    """
    roster = Roster.read(file).check(_key(operator) if operator else b"")
    typer.echo(f"version {roster.version}, signed by {fingerprint(roster.operator)}")
    for name in sorted(roster.workers):
        typer.echo(f"{name}  {fingerprint(roster.workers[name])}")


def _key(text: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError:
        raise UsageError(f"{text[:80]!r} is not a public key: it is hexadecimal digits, as keygen prints.") from None
