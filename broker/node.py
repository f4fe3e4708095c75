"""A private RabbitMQ node on this machine, started in seconds and ended together with what started it.

Knows where the machine's rabbitmq-server is, when a node is ready, and what must end with what. Does not know AMQP
beyond the first byte of its handshake, nor what the broker is used for, and never touches the machine's own broker.

A node is three processes. The *keeper* (`keep`, below) starts the other two: *epmd*, Erlang's registry of ports, and
the *broker*. Each has a session of its own, so that a Ctrl-C in the terminal reaches none of them. When the keeper's
parent is gone, however it died, the keeper ends both; with no parent to watch it lives until `stop_detached`.
"""

import contextlib
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Self

from broker.errors import UsageError
from broker.folder import BROKER, EPMD, KEEPER, LOG, Address, environment, furnish, known, settle, turn_over
from broker.processes import STOP_S, end, holder, spawn, take

START_S = 60.0
"""How long a node may take until it answers."""
FILES = 10_240
"""So many open files RabbitMQ may have, if the system allows it. It takes a hundred, and one for each connection;
shells often allow 1024, and fewer on macOS, where no process may have more than this."""
SERVERS = "/usr/lib/rabbitmq/bin/rabbitmq-server", "rabbitmq-server"
"""Where packages put the server itself; the one they put on the PATH changes user, and with it cookie and folder."""


class Node:
    """A node that lives no longer than this process.

    Args:
        folder: the node's own, made when missing; data, ports and password in it outlive the node.
        port: the AMQP port on loopback; None takes the one used before, or a free one.
        conf: more lines for rabbitmq.conf; the last line about a setting counts.

    Raises:
        UsageError: the folder holds other things.
    """

    def __init__(self, folder: Path, *, port: int | None = None, conf: str = "") -> None:
        self.folder = folder.absolute()
        self._conf = conf
        self._address = settle(self.folder, port)
        self._keeper: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """The node's AMQP URL, the same before and after every restart."""
        return self._address.url

    def start(self, timeout_s: float = START_S) -> None:
        """Start the node and return when it answers.

        Raises:
            UsageError: no RabbitMQ here, a node already runs in this folder, the port is in use, or RabbitMQ
                ended by itself or did not answer within `timeout_s`.
        """
        if holder(self.folder / KEEPER) is not None:
            raise UsageError(f"a RabbitMQ node already runs in {self.folder}: stop it, or choose another folder")
        self._keeper = launch(self.folder, self._address, conf=self._conf, parent=os.getpid())
        try:
            wait_until_ready(self.folder, self._address, timeout_s)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End the node and everything it started; fine when it does not run."""
        if self._keeper is not None:
            self._keeper.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._keeper.wait(2 * STOP_S)
            stop_detached(self.folder)
            self._keeper.kill()
            self._keeper.wait()
            self._keeper = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def start_detached(folder: Path, port: int | None = None) -> str:
    """Make sure that a node runs in `folder`, to stay when this process ends; its URL.

    Raises:
        UsageError: as `Node.start`; or a node runs there on another port than `port`.
    """
    folder = folder.absolute()
    address = settle(folder, port)
    if fresh := holder(folder / KEEPER) is None:
        keeper = launch(folder, address, conf="", parent=0)
        keeper.returncode = 0  # it outlives us, so there is nothing to wait for
    try:
        wait_until_ready(folder, address, START_S)
    except BaseException:
        if fresh:
            stop_detached(folder)
        raise
    return address.url


def stop_detached(folder: Path) -> bool:
    """End the node of `folder`, its keeper first, because that ends the others; whether there was anything to end."""
    return any([end(folder / name, 2 * STOP_S) for name in (KEEPER, BROKER, EPMD)])  # noqa: C419 - all, not the first


def status(folder: Path) -> str | None:
    """The URL of the node that runs in `folder` and answers, None when none does."""
    address = None if holder(folder / BROKER) is None else known(folder)
    return address.url if address and answers(address.port) else None


def find_server() -> Path:
    """The machine's rabbitmq-server.

    Raises:
        UsageError: there is none.
    """
    for program in SERVERS:
        if found := shutil.which(program):
            return Path(found)
    raise UsageError(
        "RabbitMQ is not installed: `apt-get install rabbitmq-server` as root, `brew install rabbitmq`, "
        "or `docker compose up` or any other broker with --broker URL"
    )


def find_epmd() -> Path:
    """Erlang's port registry, from the PATH or from beside `erl`.

    Raises:
        UsageError: there is none.
    """
    if found := shutil.which("epmd"):
        return Path(found)
    if (erl := shutil.which("erl")) and os.access(beside := Path(erl).resolve().with_name("epmd"), os.X_OK):
        return beside
    raise UsageError("Erlang's epmd is not on the PATH: install RabbitMQ with its Erlang, or add Erlang's bin folder")


def launch(folder: Path, address: Address, *, conf: str, parent: int) -> subprocess.Popen[bytes]:
    """Write a node's files and start its keeper, which watches process `parent` (0: nobody)."""
    find_server()
    find_epmd()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)  # what we start inherits it
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, FILES)), hard))
    with take(folder / KEEPER) as held:
        end(folder / BROKER, STOP_S)  # left by a keeper that was killed
        end(folder / EPMD, STOP_S)
        furnish(folder, address, conf)
        command = [sys.executable, "-P", "-m", "broker.node", str(folder), str(parent)]
        return spawn(held, command, env=dict(os.environ), log=folder / LOG)


def reply(port: int, greeting: bytes) -> bytes:
    """The first byte that a program on loopback answers to a greeting, none when nobody does."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=2) as probe:
        probe.sendall(greeting)
        return probe.recv(1)
    return b""


def answers(port: int) -> bool:
    """Whether a broker on loopback answers the greeting of AMQP 0-9-1: with a method frame, or TLS's alert."""
    return reply(port, b"AMQP\x00\x00\x09\x01") in {b"\x01", b"\x15"}


def wait_until_ready(folder: Path, address: Address, timeout_s: float) -> None:
    """Return when the node answers.

    Raises:
        UsageError: it ended before, or `timeout_s` went by.
    """
    log, until = (folder / LOG).resolve(), time.monotonic() + timeout_s
    while not answers(address.port):
        if holder(folder / KEEPER) is None:
            raise UsageError(f"RabbitMQ ended while it started, saying “{last_words(log)}”: the whole log is {log}")
        if time.monotonic() > until:
            raise UsageError(f"RabbitMQ did not answer within {timeout_s:.0f} s: {log} may say why")
        time.sleep(0.05)


def last_words(log: Path) -> str:
    """The line of a log that most likely says why its writer ended: the first error, or else the last line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "[error]" in line and not line.endswith(">")]
    return (errors or lines[-1:] or ["nothing"])[0]


def keep(folder: Path, parent: int) -> None:
    """Run a node until the broker ends, SIGTERM comes, or `parent` (0: nobody) is not our parent any more."""
    told = False

    def on_term(*_: object) -> None:
        nonlocal told
        told = True

    signal.signal(signal.SIGTERM, on_term)
    address, log = known(folder), folder / LOG
    env = environment(folder, address)
    started: list[tuple[Path, subprocess.Popen[bytes]]] = []

    def run(lock: Path, *command: str) -> None:
        with take(lock) as held:
            started.append((lock, spawn(held, list(command), env=env, log=log)))

    def all_well() -> bool:
        return not told and parent in {0, os.getppid()} and all(process.poll() is None for _, process in started)

    try:
        run(folder / EPMD, str(find_epmd()), "-port", str(address.epmd_port), "-address", "127.0.0.1")
        while all_well() and not reply(address.epmd_port, b"\x00\x01n"):  # asks for the names that epmd knows
            time.sleep(0.01)
        run(folder / BROKER, str(find_server()))
        while all_well():
            time.sleep(0.1)
            turn_over(log)
    finally:
        for lock, process in reversed(started):
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_S)
            end(lock, 0)  # what does not end by itself, or was left behind by its leader
            process.kill()  # only where the folder, with its locks, has been deleted under us
            process.wait()


if __name__ == "__main__":
    keep(Path(sys.argv[1]), int(sys.argv[2]))
