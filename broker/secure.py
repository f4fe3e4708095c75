"""What the operator of a federation does: secure it, invite workers, revoke them; on disk, roster and broker.

Knows in which order, so that the same command again mends what was interrupted, and else changes nothing. Does not
know command lines. What is on the disk comes first: a broker that does not run reads it when it starts.
"""

import contextlib
import secrets
from base64 import b64encode
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from yarl import URL

from broker import federation, management, topology
from broker.certificates import Issued, belong_together, end_of, hosts_of, issue
from broker.errors import LinkError, UsageError
from broker.federation import COORDINATOR, FILE, READ_BY_RABBIT, SERVER, Federation, Party
from broker.fields import NAME, NAME_RULE
from broker.files import write_whole
from broker.folder import DEFAULT_USER, free_ports, settle
from broker.invitation import NOTICE, Invitation
from broker.management import Management
from broker.messages import Goodbye, encode
from broker.pinned import KEY_BYTES, Roster, identity_of, public_of, read_identity
from broker.processes import locked
from broker.topology import OPERATOR

ROSTER, OPERATOR_KEY = "roster.json", "operator.key"
ALONE_S = 60.0
"""How long a command waits for another one in the same folder."""
ANEW = "`fluffle broker secure` in a new folder"
STRANGERS = {"guest", DEFAULT_USER}
"""Users of a broker that was not secured before: their passwords are known to others than the operator."""


def secure(folder: Path, changes: Mapping[str, Any], *, renew: bool = False) -> str:
    """Make a federation, or change it; what is left to do, empty if nothing is.

    Args:
        folder: the operator's, made when missing; a private node that lives there becomes the federation's broker.
        changes: fields of `Federation` that are to have other values than before, or than usual.
        renew: make new certificates for the broker and the coordinator.

    Raises:
        UsageError: the folder holds other things, or a value is none.
    """
    folder = folder.absolute()
    port = settle(folder, None).port
    with alone(folder):
        if (folder / FILE).exists():
            before = Federation.read(folder)
        else:
            logins = {OPERATOR: Party(_secret()), COORDINATOR: Party(_secret())}
            pages, vhost = f"https://localhost:{next(free_ports())}", changes.get("vhost", "fluffle")
            before = Federation(vhost, ("localhost",), port, pages, False, logins, {})
        now = replace(before, **{"port": port, **changes})
        if now.vhost != before.vhost:
            raise UsageError(f"{folder} holds the federation {before.vhost}: take another folder for another vhost.")
        management.checked(now.management)
        if now.external != before.external and len(now.parties) > 2:
            raise UsageError("how parties log in cannot be changed while workers are invited: revoke them first.")
        settle(folder, now.port)
        by = _authority(folder, now)
        _certify_server(folder, now, by, renew=renew)
        now = _admit(folder, now, COORDINATOR, by, renew=renew or now.external != before.external)
        _write(folder, now)
        return _apply(folder, now)


def invite(
    folder: Path, name: str, *, renew: bool = False, again: bool = False, operator: Path | None = None
) -> None:
    """Add a worker, and write `NAME.fluffle`; the broker is told by `apply`, once for all who are added.

    Where there is an operator's key the worker is put on the roster, too, which is signed anew; with a key that is
    drawn here, unless it is on it already, with a key of its own.

    Args:
        folder: the operator's.
        name: the worker's. Nothing changes if it is invited already, unless
        renew: make a new certificate for it, with the same password.
        again: although it has been revoked.
        operator: the file of the operator's key; default: `operator.key` in the folder, if it is there.

    Raises:
        UsageError: there is no federation, or the name cannot be had, or the roster is another operator's.
    """
    folder = folder.absolute()
    with alone(folder):
        now = Federation.read(folder)
        if NAME.fullmatch(name) is None or name in (OPERATOR, COORDINATOR):
            raise UsageError(f"{name!r} is no worker's name: it is {NAME_RULE}, and not {OPERATOR} or {COORDINATOR}.")
        until = now.revoked.get(name, "")
        if until and not again:
            raise UsageError(f"{name} has been revoked: --again invites it all the same.")
        if now.external and until > datetime.now(UTC).isoformat():
            raise UsageError(
                f"{name} has been revoked, and would be let in with its old certificate until {until[:10]}: "
                "choose another name."
            )
        signing = _signing(folder, operator)
        now = _admit(folder, now, name, _authority(folder, now), renew=renew)
        if signing:
            _enrol(folder, name, *signing)
        now = replace(now, revoked={who: end for who, end in now.revoked.items() if who != name})
        _write(folder, now)


def revoke(folder: Path, name: str) -> bool:
    """End a worker's part at once: login, connections, queues; whether it had any.

    Coordinators are told by a goodbye that only the operator can say for another.

    Raises:
        UsageError: there is no federation, or nobody of that name has been in it.
        LinkError: the broker does not answer, so that the worker, if it answers later, would still be let in.
    """
    folder = folder.absolute()
    with alone(folder):
        now = Federation.read(folder)
        if name in (OPERATOR, COORDINATOR) or name not in {*now.parties, *now.revoked}:
            raise UsageError(f"nobody called {name!r} has been invited: check the name.")
        pages = _pages(folder, now)
        pages.ask("GET", "vhosts", now.vhost)  # whether it answers, before anything is changed
        if name in now.parties:
            until = max(now.parties[name].until, now.revoked.get(name, ""))
            parties = {who: party for who, party in now.parties.items() if who != name}
            now = replace(now, parties=parties, revoked={**now.revoked, name: until})
        _write(folder, now)  # again, where it was killed before all was written
        (folder / f"{name}.fluffle").unlink(missing_ok=True)
        return _expel(folder, now, pages, name)


def strike(folder: Path, name: str, *, operator: Path | None = None) -> str:
    """Take a worker that was revoked off the roster, and sign that anew; what is left to do, empty if nothing is.

    Raises:
        UsageError: the operator's key or the roster is none, or they do not belong together.
    """
    with alone(folder):
        file = folder / ROSTER
        if not file.exists() or name not in Roster.read(file).workers:
            return ""
        if (signing := _signing(folder, operator)) is None:
            return f"{name} is on {file} still: the same command with --operator KEY strikes it off."
        roster, key = signing
        roster.without(name).signed(key).write(file)
        return f"{name} is off {file}: start the coordinator of a secret run again with that."


def endings(folder: Path, now: datetime | None = None) -> list[str]:
    """A sentence for each certificate of a federation that ends within a month."""
    parties, files = Federation.read(folder).parties, folder / READ_BY_RABBIT
    renew = f"`fluffle broker secure {folder} --renew`"
    try:
        found = [
            ("the broker's certificate", end_of((files / "server.pem").read_text()), renew),
            ("the authority", end_of((files / "ca.pem").read_text()), ANEW),
        ]
    except ValueError:
        raise UsageError(f"a certificate in {files} is damaged: {renew} mends it, or says what to do.") from None
    for name, party in parties.items():
        if party.until:
            again = renew if name == COORDINATOR else f"`fluffle invite {name} --renew --dir {folder}`"
            found.append((f"the certificate of {name}", datetime.fromisoformat(party.until), again))
    soon = (now or datetime.now(UTC)) + NOTICE
    return [f"{what} ends on {at:%Y-%m-%d}: {todo} makes another" for what, at, todo in found if at < soon]


def apply(folder: Path) -> str:
    """Tell the broker of a federation what it is to hold; why that is left to do, empty if it has been done.

    Raises:
        UsageError: it refuses, or it is somebody else's and does not answer.
    """
    with alone(folder):  # whom another command revokes meanwhile must not be let in again
        return _apply(folder, Federation.read(folder))


def _apply(folder: Path, now: Federation) -> str:
    pages, wanted = _pages(folder, now), federation.definitions(now)
    try:
        known = {user["name"]: user["password_hash"] for user in pages.ask("GET", "users")}
    except LinkError as problem:
        if not now.owned:
            raise UsageError(f"{problem} Check --management, then try again.") from None
        return f"{problem} It will read {folder / READ_BY_RABBIT} when it starts."
    ours = {name: federation.hashed(party.password) for name, party in now.parties.items()}
    others = [name for name in ours.keys() & known.keys() if known[name] != ours[name]]
    if others and not now.owned:
        raise UsageError(f"RabbitMQ has users already who are called {', '.join(sorted(others))}: remove them first.")
    pages.ask("POST", "definitions", body=wanted)
    for name in sorted(known.keys() & (now.revoked.keys() | (STRANGERS if now.owned else set()))):
        _expel(folder, now, pages, name)
    return ""


def _expel(folder: Path, now: Federation, pages: Management, name: str) -> bool:
    """A user is gone, its connections are closed, coordinators know, and its queues are gone, in this order.

    The last two are the operator's own to do: an administrator need not have any rights in the vhost.
    """
    there = pages.ask("DELETE", "users", name) is not None
    pages.ask("DELETE", "connections", "username", name)
    ours = _pages(folder, now, by_operator=True)
    bye = encode(Goodbye(name, "its invitation was revoked"))
    if name in now.revoked:
        ours.ask(
            "POST", "exchanges", now.vhost, topology.UP, "publish",
            body={
                "properties": {"user_id": OPERATOR}, "routing_key": topology.hello_key(name),
                "payload": b64encode(bye).decode(), "payload_encoding": "base64",
            },
        )  # fmt: skip
    for queue in topology.of_worker(name).queues:
        ours.ask("DELETE", "queues", now.vhost, queue.name)
    return there


def _pages(folder: Path, now: Federation, *, by_operator: bool = False) -> Management:
    url = URL(now.management)
    login = (OPERATOR, now.parties[OPERATOR].password)
    if url.user and not by_operator:
        login = url.user, url.password or ""
    return Management(url, login, (folder / READ_BY_RABBIT / "ca.pem").read_text(), public=not now.owned)


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """One command at a time; each is done in seconds, because every question to the broker has its bound.

    Raises:
        UsageError: there is no such folder, or another command holds it for too long: it may have been stopped.
    """
    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder}: `fluffle broker secure {folder}` makes a federation there.")
    with (folder / "federation.lock").open("a") as lock:
        if not locked(lock.fileno(), within_s=ALONE_S):
            raise UsageError(f"another command is at work in {folder}: wait until it is done, or end it.")
        yield


def _secret() -> str:
    return secrets.token_urlsafe(24)


def _authority(folder: Path, now: Federation) -> Issued:
    """The authority of the federation: made with it, and never again, or nobody who was invited would be let in."""
    certificate, key = folder / READ_BY_RABBIT / "ca.pem", folder / "ca.key"
    if not (key.exists() or (folder / FILE).exists()):
        made = issue(None, f"the federation {now.vhost}, {secrets.token_hex(4)}")
        _put(certificate, made.certificate)
        _put(key, made.key)
    by = _pair(certificate, key)
    if by is None:
        raise UsageError(f"{certificate} and {key} are gone, damaged or no pair: restore them or begin with {ANEW}.")
    if (until := end_of(by.certificate)) <= (now_ := datetime.now(UTC)):
        raise UsageError(
            f"the authority of {folder} has ended on {until:%Y-%m-%d}, and this machine's clock says "
            f"{now_:%Y-%m-%d}: {ANEW} makes another."
        )
    return by


def _pair(certificate: Path, key: Path) -> Issued | None:
    """What is in these files, if that belongs together."""
    try:
        found = Issued(certificate.read_text(), key.read_text())
    except (FileNotFoundError, UnicodeDecodeError):
        return None
    return found if belong_together(found) else None


def _certify_server(folder: Path, now: Federation, by: Issued, *, renew: bool) -> None:
    certificate, key = (folder / READ_BY_RABBIT / name for name in ("server.pem", "server.key"))
    found = _pair(certificate, key)
    if renew or found is None or hosts_of(found.certificate) != set(now.names):
        made = issue(by, SERVER + now.vhost, hosts=now.names)
        _put(key, made.key)
        _put(certificate, made.certificate)


def _admit(folder: Path, now: Federation, name: str, by: Issued, *, renew: bool) -> Federation:
    """The federation with this party in it, whose file is written where it is new."""
    file, known = folder / f"{name}.fluffle", now.parties.get(name)
    former = Invitation.read(file) if file.exists() else None
    if known is not None and known.until and not renew:
        if former is not None and (former.broker, former.ca) != (now.url, by.certificate):  # the broker has moved
            replace(former, broker=now.url, ca=by.certificate).write(file)
        return now
    made = issue(by, name)
    login = "" if now.external else known.password if known and known.password else _secret()
    Invitation(
        name=name,
        role="coordinator" if name == COORDINATOR else "worker",
        broker=now.url,
        password=login,
        ca=by.certificate,
        certificate=made.certificate,
        key=made.key,
        operator=former.operator if former else "",
        identity=former.identity if former else "",
    ).write(file)
    return replace(now, parties={**now.parties, name: Party(login, end_of(made.certificate).isoformat())})


def _signing(folder: Path, operator: Path | None) -> tuple[Roster, Ed25519PrivateKey] | None:
    """The roster, which may be empty yet, and the key that signs it; None where there is none.

    Raises:
        UsageError: one of them is none, or the roster is signed by another operator, or not what was signed.
    """
    if operator is None and not (folder / OPERATOR_KEY).exists():
        return None
    key, file = read_identity(operator or folder / OPERATOR_KEY), folder / ROSTER
    roster = Roster.read(file) if file.exists() else Roster({}, 0)
    return roster.check(public_of(key)) if roster.signature else roster, key


def _enrol(folder: Path, name: str, roster: Roster, operator: Ed25519PrivateKey) -> None:
    """Put a worker on the roster, and into its invitation what it takes; into the coordinator's, who has signed.

    A secret is written down before its public half is on the roster, or it might be lost.
    """
    for file in (folder / f"{name}.fluffle", folder / f"{COORDINATOR}.fluffle"):
        if not file.exists():  # it was handed over
            continue
        found, known = Invitation.read(file), roster.workers.get(name)
        seed = found.identity
        if found.name == name:
            seed = seed or ("" if known else secrets.token_hex(KEY_BYTES))
            mine = public_of(identity_of(seed)) if seed else b""
            roster = roster if known else roster.with_(name, mine)
            seed = seed if roster.workers[name] == mine else ""  # a key of its own is on the roster
        fresh = replace(found, operator=public_of(operator).hex(), identity=seed)
        if fresh != found:
            fresh.write(file)
    if name not in roster.workers:
        raise UsageError(f"{name}.fluffle is there no longer, and {name} not on the roster: --renew makes another.")
    if not roster.signature:
        roster.signed(operator).write(folder / ROSTER)


def _write(folder: Path, now: Federation) -> None:
    """All files that follow from the federation. RabbitMQ reads its own as our group, where it is another user."""
    files = folder / READ_BY_RABBIT
    _put(folder / FILE, now.text)
    _put(files / "definitions.json", federation.as_text(federation.definitions(now)))
    _put(files / "rabbitmq.conf", federation.configuration(now, files))
    _put(files / "enabled_plugins", federation.plugins(now))


def _put(path: Path, text: str) -> None:
    path.parent.mkdir(mode=0o750, exist_ok=True)
    write_whole(path, text.encode(), mode=0o640 if path.parent.name == READ_BY_RABBIT else 0o600)
