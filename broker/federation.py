"""A federation as its operator keeps it: who takes part, and what RabbitMQ is to be told of that.

Knows names, rights, limits and RabbitMQ's words for them: `definitions` and `configuration`. Does not know
certificates, nor whether a broker runs: what is made here is the same for the same federation, to the last byte.

    federation.json    who takes part, with the passwords; and ca.key beside it: the operator's, and nobody else's
    NAME.fluffle       an invitation, to be handed over
    broker/            what RabbitMQ reads: ca.pem, server.pem, server.key, rabbitmq.conf, definitions.json, …
"""

import hashlib
import json
import re
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from yarl import URL

from broker import topology
from broker.errors import UsageError
from broker.fields import NAME, NAME_RULE
from broker.files import UNREADABLE, read_record, trouble
from broker.folder import TUNED
from broker.invitation import address_of, is_loopback
from broker.topology import OPERATOR
from broker.wording import Name, make

FILE, READ_BY_RABBIT = "federation.json", "broker"
COORDINATOR = "coordinator"
HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?")
SERVER = "the broker of "
"""Before the vhost it is the server's common name, which can be nobody's: names have no spaces."""
WORKER_CONNECTIONS, WORKER_CHANNELS = 12, 64
"""A worker has four connections; after a cut the old ones may linger for a minute beside the new ones, twice."""
QUEUES, CONNECTIONS, HELLOS_BYTES = 20_000, 20_000, 64 * 1024 * 1024
"""Of a federation: three queues and four connections for each of some thousand workers; and how much may wait for a
coordinator of their signs of life, for its queue is bounded by their number alone."""


@dataclass(frozen=True)
class Party:
    """Somebody's login. No password: by certificate. `until`: when the last certificate ends that vouches for it."""

    password: str
    until: str = ""


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Federation:
    """What `federation.json` says.

    Attributes:
        vhost: RabbitMQ's name for the federation.
        hosts: by which names others reach the broker; the first one is what invitations say.
        port: where it listens (amqps).
        management: where its management pages are; with USER:PASSWORD of an administrator where the broker is
            somebody else's. Else the operator's own user is one.
        external: parties log in by certificate alone.
        parties: name → login, the operator and the coordinator among them.
        revoked: name → when the last of its certificates ends.
    """

    vhost: str
    hosts: tuple[str, ...]
    port: int
    management: str
    external: bool
    parties: dict[Name, Party]
    revoked: dict[Name, str]
    format: Literal[1] = 1

    def __post_init__(self) -> None:
        if NAME.fullmatch(self.vhost) is None:
            raise UsageError(f"{self.vhost!r} is no name for a vhost: it is {NAME_RULE}.")
        if not 0 < self.port < 1 << 16:
            raise UsageError(f"--port takes a number from 1 to 65535, not {self.port}.")
        for host in self.hosts:
            if HOST.fullmatch(host) is None and (address_of(host) is None or "%" in host):
                raise UsageError(f"--host takes a host's name or address, not {host!r}.")
        if not {OPERATOR, COORDINATOR} <= self.parties.keys():
            raise ValueError(f"{OPERATOR} or {COORDINATOR} is missing")

    @classmethod
    def read(cls, folder: Path) -> "Federation":
        """The federation of a folder.

        Raises:
            UsageError: there is none, or its file is damaged.
        """
        path = folder / FILE
        with trouble(f"{path} cannot be read", "restore it", of=UNREADABLE):
            values = read_record(path)
        if not values:
            raise UsageError(f"{folder} holds no federation: `fluffle broker secure {folder}` makes one.")
        return make(cls, values, f"{path} is damaged, restore it")

    @property
    def text(self) -> str:
        """What its file holds."""
        return as_text(asdict(self))

    @property
    def url(self) -> str:
        """Where parties find the broker."""
        return str(URL.build(scheme="amqps", host=self.hosts[0], port=self.port, path=f"/{self.vhost}"))

    @property
    def owned(self) -> bool:
        """Whether the broker serves nothing else."""
        return URL(self.management).user is None

    @property
    def names(self) -> tuple[str, ...]:
        """What the server's certificate is for: it is always reached from its own machine, too."""
        return tuple(sorted({*(host.lower() for host in self.hosts), "localhost", "127.0.0.1"}))


def as_text(values: Mapping[str, Any]) -> str:
    """JSON that is the same for the same values."""
    return json.dumps(values, indent=1, sort_keys=True) + "\n"


def hashed(password: str) -> str:
    """A password as RabbitMQ keeps it. It is 128 bits of chance, so its salt need not be; nothing for none."""
    if not password:
        return ""
    salt = hashlib.sha256(b"salt" + password.encode()).digest()[:4]
    return b64encode(salt + hashlib.sha256(salt + password.encode()).digest()).decode()


def definitions(of: Federation) -> dict[str, Any]:
    """What the broker of a federation holds: users, rights, limits, exchanges, queues."""
    vhost, declared = of.vhost, [topology.FEDERATION]
    users: list[dict[str, Any]] = []
    permissions: list[dict[str, str]] = []
    topics: list[dict[str, str]] = []

    def may(configure: str, write: str, read: str, *, say: str = "^$", hear: str = "^$") -> None:
        """Rights in the vhost; and with which keys to publish to `fluffle.up`, and to bind queues to it."""
        whose = {"user": name, "vhost": vhost}
        permissions.append({**whose, "configure": configure, "write": write, "read": read})
        topics.append({**whose, "exchange": topology.UP, "write": say, "read": hear})

    for name, party in sorted(of.parties.items()):
        limits: dict[str, int] = {}
        tags: list[str] = []
        if name == OPERATOR:
            # it may take a worker's queues away, and say so; on the management pages it may do anything
            tags = ["administrator"] if of.owned else ["management"]
            may(r"^fluffle\.(down|control|upload)\.", r"^fluffle\.up$", "^$", say=r"^hello\.")
        elif name == COORDINATOR:
            may(*(r"^fluffle\.",) * 3, hear=".*")
        else:
            limits = {"max-connections": WORKER_CONNECTIONS, "max-channels": WORKER_CHANNELS}
            write, read = rf"^fluffle\.(up|upload\.{name})$", rf"^fluffle\.(down|control)\.{name}$"
            may("^$", write, read, say=r"^(hello|inbox\.[a-z0-9-]+)\.{username}$")
            declared.append(topology.of_worker(name, invited=True))
        users.append({
            "name": name, "password_hash": hashed(party.password), "tags": tags, "limits": limits,
            "hashing_algorithm": "rabbit_password_hashing_sha256",
        })  # fmt: skip
    limits, most = {"max-queues": QUEUES, "max-connections": CONNECTIONS}, {"max-length-bytes": HELLOS_BYTES}
    hellos = {"pattern": r"^fluffle\.hello\.", "apply-to": "queues", "priority": 0, "definition": most}
    bounds = ("vhost-limits", "limits", limits), ("operator_policy", "hellos", hellos)
    return {
        "vhosts": [{"name": vhost}],
        "users": users,
        "permissions": permissions,
        "topic_permissions": topics,
        "parameters": [{"component": of_, "name": each, "vhost": vhost, "value": what} for of_, each, what in bounds],
        **_declared(vhost, declared),
    }


def _declared(vhost: str, several: list[topology.Topology]) -> dict[str, Any]:
    stays = {"vhost": vhost, "durable": True, "auto_delete": False}
    lasting = {**stays, "internal": False, "arguments": {}}
    to_queue = {"vhost": vhost, "destination_type": "queue", "arguments": {}}
    exchanges, queues, bindings = (
        [each for part in several for each in getattr(part, kind)] for kind in ("exchanges", "queues", "bindings")
    )
    return {
        "exchanges": [
            {**lasting, "name": each.name, "type": each.kind, "auto_delete": each.passing} for each in exchanges
        ],
        "queues": [{"name": each.name, "arguments": dict(each.arguments), **stays} for each in queues],
        "bindings": [
            {"source": each.exchange, "destination": each.queue, "routing_key": each.key, **to_queue}
            for each in bindings
        ],
    }


CONF = """\
listeners.tcp = none
listeners.ssl.1 = {listen}
{tls}
ssl_options.verify = verify_peer
ssl_options.fail_if_no_peer_cert = true
ssl_cert_login_from = common_name
auth_mechanisms.1 = {mechanism}
load_definitions = {folder}/definitions.json
management.ssl.ip = {pages_ip}
management.ssl.port = {pages_port}
{pages_tls}
"""
TLS = """\
{where}.cacertfile = {folder}/ca.pem
{where}.certfile = {folder}/server.pem
{where}.keyfile = {folder}/server.key
{where}.versions.1 = tlsv1.3
{where}.versions.2 = tlsv1.2"""


def configuration(of: Federation, folder: Path) -> str:
    """What rabbitmq.conf says: amqps only, for those with a certificate; pages by https. `folder` is `broker/`.

    Whatever only this machine is to reach listens on its loopback.
    """
    pages = URL(of.management)
    here = all(map(is_loopback, of.hosts))
    return TUNED + CONF.format(
        listen=f"127.0.0.1:{of.port}" if here else of.port,
        mechanism="EXTERNAL" if of.external else "PLAIN",
        folder=folder,
        pages_ip="127.0.0.1" if is_loopback(pages.host or "") else "0.0.0.0",  # noqa: S104 - in a container of its own
        pages_port=pages.port,
        tls=TLS.format(where="ssl_options", folder=folder),
        pages_tls=TLS.format(where="management.ssl", folder=folder),
    )


def plugins(of: Federation) -> str:
    """What RabbitMQ is to load."""
    return f"[rabbitmq_management{',rabbitmq_auth_mechanism_ssl' if of.external else ''}].\n"
