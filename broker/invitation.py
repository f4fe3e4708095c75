"""How a party comes in: the file that invites it, and what of it a connection needs.

Knows the file's format, which URLs may be used without one, TLS, and until when certificates hold. Does not know how
an invitation is made or taken back, nor AMQP.
"""

import ipaddress
import logging
import ssl
import tempfile
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import tomli_w
from cryptography import x509
from pydantic import ConfigDict, StringConstraints, TypeAdapter
from yarl import URL

from broker import wording
from broker.errors import UsageError
from broker.fields import NAME, NAME_RULE, counted
from broker.files import write_whole

log = logging.getLogger(__name__)

PORTS = {"amqp": 5672, "amqps": 5671}
NOTICE = timedelta(days=30)
"""So long before its certificates end, an invitation is to be renewed."""
CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"
"""Of TLS 1.2; version 1.3 has only ciphers that are as good. All have forward secrecy."""

Role = Literal["worker", "coordinator"]
_Pem = Annotated[str, StringConstraints(pattern=r"^\s*-----BEGIN ")]
_Hex = Annotated[str, StringConstraints(pattern="^([0-9a-f]{64})?$")]


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Invitation:
    """Who comes in, where, and with which certificate.

    Attributes:
        name: the party's, and its broker user's.
        role: what it comes in as.
        broker: `amqps://HOST:PORT/VHOST`, with no secret in it.
        password: its broker user's; empty: it logs in by its certificate (EXTERNAL).
        ca: the certificate, as PEM, of whoever vouches for the broker.
        certificate: the party's own, as PEM; the common name is its `name`.
        key: its private key, as PEM.
        operator: the public key of the operator's roster (Ed25519, hex); may be empty.
        identity: the secret seed of this party's own key (Ed25519, hex); may be empty.
    """

    format: Literal[1] = 1
    name: str
    role: Role
    broker: str
    password: str = field(default="", repr=False)
    ca: _Pem
    certificate: _Pem
    key: _Pem = field(repr=False)
    operator: _Hex = ""
    identity: _Hex = field(default="", repr=False)

    def __post_init__(self) -> None:
        if NAME.fullmatch(self.name) is None:
            raise ValueError(f"{self.name!r} is no name: a name is {NAME_RULE}")
        url = url_of(self.broker, "amqps")
        if url is None or url.user or url.query_string:
            raise ValueError("broker must look like amqps://HOST:PORT/VHOST")

    @classmethod
    def read(cls, path: Path) -> "Invitation":
        """The invitation in a file.

        Raises:
            UsageError: it cannot be read, others can read it too, or it is no invitation.
        """
        ask = "ask whoever runs the federation for another one"
        values = wording.read(wording.secret(path), remedy=ask)
        if values.get("format") != 1:
            raise UsageError(
                f"{path} is no invitation of format 1, the only one known here: {ask}, or update fluffle."
            )
        try:
            return cls(**values)
        except pydantic.ValidationError as problem:
            error = problem.errors(include_url=False, include_input=False)[0]
            place = f"{error['loc'][0]}: " if error["loc"] else ""
            said = error["msg"].removeprefix("Value error, ")
            raise UsageError(f"the invitation {path} is damaged ({place}{said}): {ask}.") from None

    def write(self, path: Path) -> None:
        """Write it so that only its owner reads it, and so that whoever reads it sees the old one or the new.

        Raises:
            OSError: the folder cannot be written.
        """
        values: dict[str, Any] = TypeAdapter(Invitation).dump_python(self)
        write_whole(path, tomli_w.dumps(values, multiline_strings=True).encode(), mode=0o600)

    @property
    def until(self) -> datetime:
        """When the first of its certificates ends.

        Raises:
            ValueError: one of them is none.
        """
        return min(
            x509.load_pem_x509_certificate(pem.encode()).not_valid_after_utc for pem in (self.ca, self.certificate)
        )

    def context(self) -> ssl.SSLContext:
        """TLS 1.2 or newer with the broker, whose certificate and host name are checked, and who checks ours.

        Raises:
            SSLError: the certificates or the key are none, or do not belong together.
        """
        context = strict(ssl.create_default_context(cadata=self.ca))
        with tempfile.NamedTemporaryFile("w", suffix=".pem") as file:  # mode 0600; OpenSSL reads from a file only
            file.write(f"{self.certificate.strip()}\n{self.key.strip()}\n")
            file.flush()
            context.load_cert_chain(file.name, password="")
        return context


@dataclass(frozen=True, slots=True)
class Access:
    """What it takes to connect.

    Attributes:
        url: where, with its port, and who; with `auth=EXTERNAL` where the certificate is all there is.
        user: the broker's name for us.
        tls: None where the way is not secured.
        vouched: whether the broker vouches for who says what: then all we publish carries our name, and a worker
            declares nothing.
        file: the invitation that it comes from, and `seen` which state of it.
        until: when that ends.
    """

    url: URL = field(repr=False)  # there may be a password in it
    user: str
    tls: ssl.SSLContext | None = None
    vouched: bool = False
    file: Path | None = None
    seen: tuple[int, ...] = ()
    until: datetime | None = None

    @classmethod
    def at(cls, url: str, *, insecure: bool = False) -> "Access":
        """The way to a broker's URL.

        Args:
            url: `amqps://USER:PASSWORD@HOST:PORT/VHOST`, or with `amqp` on this machine; `cafile`, `capath`,
                `certfile` and `keyfile` may follow behind a `?`.
            insecure: other machines are reached without TLS, too, or without checking who they are.

        Raises:
            UsageError: it is no such URL, or not secured; the sentence does not repeat it: it may hold a password.
        """
        parsed = url_of(url, *PORTS)
        if parsed is None:
            raise UsageError("the broker's URL must look like amqps://USER:PASSWORD@HOST:PORT/VHOST: check --broker.")
        parsed = parsed if parsed.port else parsed.with_port(PORTS[parsed.scheme])
        unchecked = parsed.query.get("no_verify_ssl", "0") != "0"
        if not insecure and not is_loopback(parsed.host or "") and (parsed.scheme == "amqp" or unchecked):
            raise UsageError(
                f"{parsed.host} is another machine, and all that goes there by amqp, the password too, can be read "
                "and changed on the way: use an amqps:// URL or an invitation, or say --insecure."
            )
        return cls(parsed, parsed.user or "guest", tls=_tls(parsed) if parsed.scheme == "amqps" else None)

    @classmethod
    def invited(cls, file: Path, role: Role | None = None) -> "Access":
        """The way of whoever is invited.

        Raises:
            UsageError: the invitation is none (see `Invitation.read`), is for another role, or has ended.
        """
        seen, found = _state(file), Invitation.read(file)
        if role not in (None, found.role):
            raise UsageError(f"{file} invites {found.name} as a {found.role}, not as a {role}: use the right one.")
        url = URL(found.broker).with_user(found.name)
        url = url.with_password(found.password) if found.password else url.with_query(auth="EXTERNAL")
        try:
            until, context = found.until, found.context()
        except (ValueError, TypeError, x509.InvalidVersion, OSError) as problem:  # SSLError is one; or a full disk
            said = getattr(problem, "reason", None) or getattr(problem, "strerror", None) or "no PEM"
            raise UsageError(
                f"certificate and key in {file} cannot be used ({said}): ask whoever runs the federation for another."
            ) from None
        if until <= (now := datetime.now(UTC)):
            raise UsageError(
                f"{file} has ended on {until:%Y-%m-%d}, and this machine's clock says {now:%Y-%m-%d}: ask whoever "
                "runs the federation for a new one."
            )
        port = url.port or PORTS["amqps"]
        return cls(url.with_port(port), found.name, context, vouched=True, file=file, seen=seen, until=until)

    def renewed(self) -> "Access":
        """The access that the file gives by now. One that is of no use is said, once, and this one stays."""
        if self.file is None or (seen := _state(self.file)) == self.seen:
            return self
        try:
            fresh = Access.invited(self.file)
            trouble = "" if fresh.user == self.user else f"{self.file} invites {fresh.user} by now, not {self.user}."
        except UsageError as problem:
            trouble = str(problem)
        if trouble:
            log.warning("going on with the invitation as it was: %s", trouble)
            return replace(self, seen=seen)
        log.info("%s is another one by now, until %s: using that", self.file, f"{fresh.until:%Y-%m-%d}")
        return fresh

    @property
    def said(self) -> str:
        """Who is invited, until when."""
        return f"{self.user}, by {self.file}, until {self.until:%Y-%m-%d}"

    def expiry(self, now: datetime | None = None) -> str:
        """A sentence where the invitation ends soon; else nothing."""
        left = (self.until or datetime.max.replace(tzinfo=UTC)) - (now or datetime.now(UTC))
        if left > NOTICE:
            return ""
        return (
            f"{self.file} ends on {self.until:%Y-%m-%d}, in {counted(max(left.days, 0), 'day')}: ask whoever runs "
            "the federation for a new one and put it in its place; nothing need be restarted."
        )


def strict(context: ssl.SSLContext) -> ssl.SSLContext:
    """The context, for TLS 1.2 and 1.3 with good ciphers only."""
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(CIPHERS)
    return context


def url_of(text: str, *schemes: str) -> URL | None:
    """The URL that a text is, of one of these schemes and with a host; else None."""
    try:
        url = URL(text)
    except ValueError:
        return None
    return url if url.scheme in schemes and url.host else None


def is_loopback(host: str) -> bool:
    """Whether what is sent to this host stays on this machine."""
    address = address_of(host)
    return host == "localhost" or (address is not None and address.is_loopback)


def address_of(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The address that a host is given by; None if it is a name."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _tls(url: URL) -> ssl.SSLContext:
    given = url.query
    try:
        context = strict(ssl.create_default_context(cafile=given.get("cafile"), capath=given.get("capath")))
        if given.get("certfile"):
            context.load_cert_chain(given["certfile"], given.get("keyfile"))
    except OSError as problem:  # SSLError is one
        raise UsageError(f"the certificates that --broker names cannot be used: {problem.strerror}.") from None
    if given.get("no_verify_ssl", "0") != "0":
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def _state(file: Path) -> tuple[int, ...]:
    """Changes whenever the file does."""
    try:
        found = file.stat()
    except OSError:
        return ()
    return found.st_ino, found.st_mtime_ns, found.st_size
