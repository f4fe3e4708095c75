"""The folder of a private RabbitMQ node: its address, its settings, and all that its programs see of this machine.

Knows the files, their modes, the ports and the environment. Does not know how a node is started or ended.
"""

import json
import os
import random
import re
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from broker.errors import UsageError
from broker.files import UNREADABLE, trouble, write_whole
from broker.processes import holder

PORTS = range(15_000, 32_000)
"""Below the ports that systems give to outgoing connections: those could take ours while the node restarts."""
KEEPER, EPMD, BROKER = "keeper.lock", "epmd.lock", "broker.lock"
"""The locks of a node's processes, with their ids."""
DEFAULT_USER = "fluffle"
OURS = {"broker", ".node.json.new"}
"""What may be in a folder before it has an address: what is mounted there, and what a start left that was killed."""
LOG = "node.log"
"""What all three processes say, since the last start or since it was too much; what was before is in `node.log.1`."""
LOG_BYTES_MAX = 64 * 1024 * 1024
CONF = """\
listeners.tcp.1 = 127.0.0.1:{port}
default_user = {user}
default_pass = {password}
"""
SECURED = "broker/rabbitmq.conf"
"""What is read instead of CONF and TUNED where the folder holds a federation: see `federation.py`."""
TUNED = """\
max_message_size = 16777216
heartbeat = 30
consumer_timeout = 3600000
disk_free_limit.absolute = 100MB
frame_max = 1114112
tcp_listen_options.sndbuf = 524288
tcp_listen_options.recbuf = 524288
tcp_listen_options.buffer = 1048576
"""


@dataclass(frozen=True, slots=True)
class Address:
    """What stays the same for a node's folder, over every restart: `node.json`."""

    name: str
    port: int
    dist_port: int
    epmd_port: int
    password: str
    user: str = DEFAULT_USER

    @property
    def url(self) -> str:
        """Where the node answers, with its password."""
        return f"amqp://{self.user}:{self.password}@127.0.0.1:{self.port}/"


def known(folder: Path) -> Address:
    """The address kept in a node's folder.

    Raises:
        UsageError: it cannot be read.
    """
    path = folder / "node.json"
    with trouble(f"{path} cannot be read", "choose another folder, or delete this one", of=UNREADABLE):
        return Address(**json.loads(path.read_text()))


def settle(folder: Path, port: int | None) -> Address:
    """The address of a folder's node: the one it had, or a new one, written down for the next time.

    Raises:
        UsageError: the folder holds other things, or cannot be RabbitMQ's; or its node runs now, on another port than
            `port`.
    """
    free = free_ports()
    if (folder / "node.json").exists():
        address = known(folder)
        if port in {None, address.port}:
            return address
        if holder(folder / KEEPER) is not None:
            raise UsageError(f"a RabbitMQ node already runs in {folder}, on port {address.port}: stop it first")
        address = replace(address, port=port)
    elif folder.exists() and (not folder.is_dir() or {each.name for each in folder.iterdir()} - OURS):
        raise UsageError(f"{folder} holds other things: choose an empty folder for the RabbitMQ node")
    elif re.search(r"[\"'#\n]", str(folder)):
        raise UsageError(f"RabbitMQ cannot live in {folder}: choose a path without quotes, # and line breaks")
    else:
        address = Address(
            name=f"fluffle-{secrets.token_hex(4)}@localhost",
            port=next(free) if port is None else port,
            dist_port=next(free),
            epmd_port=next(free),
            password=secrets.token_hex(16),
        )
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    write_private(folder / "node.json", json.dumps(asdict(address)))
    return address


def free_ports() -> Iterator[int]:
    """Ports on loopback that nobody listens on, each once, in an order that a seeded test does not repeat."""
    for port in random.SystemRandom().sample(PORTS, len(PORTS)):
        if why_not(port) is None:
            yield port


def why_not(port: int) -> str | None:
    """Why nobody could listen on a port of loopback now, None when one could."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
            probe.listen()
        except (OSError, OverflowError) as error:
            return getattr(error, "strerror", None) or str(error)
    return None


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner reads, whole or not at all."""
    write_whole(path, text.encode(), mode=0o600)


def furnish(folder: Path, address: Address, conf: str) -> None:
    """Write the files that RabbitMQ reads when it starts; `conf` is more lines for rabbitmq.conf.

    Raises:
        UsageError: one of the node's ports is in use.
    """
    for port in (address.port, address.dist_port, address.epmd_port):
        if reason := why_not(port):
            raise UsageError(f"port {port} of 127.0.0.1 cannot be used ({reason}): choose another port")
    own = CONF.format(port=address.port, user=address.user, password=address.password) + TUNED
    plugins = "[rabbitmq_auth_mechanism_ssl].\n"  # logins by certificate
    if (secured := folder / SECURED).exists():
        own, plugins = secured.read_text(), secured.with_name("enabled_plugins").read_text()
        if not re.search(rf"^listeners\.ssl\.1 = (127\.0\.0\.1:)?{address.port}$", own, re.MULTILINE):
            raise UsageError(
                f"what invitations say of {folder} is another port than {address.port}: "
                f"`fluffle broker secure {folder} --port {address.port}` changes it"
            )
    write_private(folder / "rabbitmq.conf", own + conf)
    write_private(folder / "enabled_plugins", plugins)
    if not (folder / ".erlang.cookie").exists():
        write_private(folder / ".erlang.cookie", secrets.token_hex(16))
        (folder / ".erlang.cookie").chmod(0o400)  # Erlang insists
    if (folder / LOG).exists():
        (folder / LOG).replace(folder / f"{LOG}.1")


def turn_over(log: Path) -> None:
    """Begin a log anew that has become too long: whoever reaches the port has a line written as often as they like.

    What is said in that instant is lost; nobody who writes needs to know, for all of them append.
    """
    with suppress(OSError):  # the folder may be gone, or its disk full
        if log.stat().st_size > LOG_BYTES_MAX:
            shutil.copyfile(log, log.with_name(f"{LOG}.1"))
            os.truncate(log, 0)


def environment(folder: Path, address: Address) -> dict[str, str]:
    """All that a node's programs see of this machine: nothing of its own broker, cookie or epmd."""
    at = str(folder)
    return {
        "PATH": os.environ.get("PATH", os.defpath),
        "LANG": "C.UTF-8",
        "HOME": at,
        "ERL_EPMD_PORT": str(address.epmd_port),
        "ERL_EPMD_ADDRESS": "127.0.0.1",
        "RABBITMQ_CONF_ENV_FILE": os.devnull,
        "RABBITMQ_NODENAME": address.name,
        "RABBITMQ_DIST_PORT": str(address.dist_port),
        "RABBITMQ_MNESIA_BASE": f"{at}/data",
        "RABBITMQ_LOG_BASE": at,
        "RABBITMQ_LOGS": "-",
        "RABBITMQ_PID_FILE": f"{at}/broker.pid",
        "RABBITMQ_CONFIG_FILE": f"{at}/rabbitmq",
        "RABBITMQ_ADVANCED_CONFIG_FILE": f"{at}/advanced.config",
        "RABBITMQ_GENERATED_CONFIG_DIR": f"{at}/generated",
        "RABBITMQ_ENABLED_PLUGINS_FILE": f"{at}/enabled_plugins",
        # Named from the first instant, the Erlang machine spares RabbitMQ a second one that only starts epmd: a third
        # of the time to start. Schedulers that sleep when idle leave the processors to those who train.
        "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": f"-sname {address.name} -start_epmd false"
        " -kernel inet_dist_use_interface {127,0,0,1}"
        f" -kernel inet_dist_listen_min {address.dist_port} -kernel inet_dist_listen_max {address.dist_port}"
        " -ssl ssl_pem_cache_clean 10000"  # certificates that are renewed are used from then on
        " +sbwt none +sbwtdcpu none +sbwtdio none"
        # Bodies of 1 MiB from memory that Erlang keeps, not from the system and back each time: a seventh of its CPU.
        " +MBsbct 4096 +MBsmbcs 8192 +MBlmbcs 32768",
    }
