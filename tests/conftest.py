"""What tests of every kind share: one private RabbitMQ node, a vhost for each test, and proof that nothing stays.

The node also listens by TLS, for whoever has a certificate of the tests' authority.

A vhost costs half a second through rabbitmqctl, most of it to start rabbitmqctl; so one call makes twenty, and the
tests take them one by one. They are not removed: the node and its folder go when the tests are over.
"""

import contextlib
import os
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import settings
from yarl import URL

from broker.errors import UsageError
from broker.folder import free_ports
from tests.certificates import Authority, secured
from tests.node import Node, server_version

settings.register_profile("untimed", deadline=None)  # a machine that others use is no fault of what is tested
settings.load_profile("untimed")
VHOSTS = 20
MAKE_VHOSTS = """
catch rabbit_auth_backend_internal:add_user(<<"contract">>, <<"a moment's">>, <<"test">>),
rabbit_auth_backend_internal:clear_password(<<"contract">>, <<"test">>),
[begin
  Name = list_to_binary("t" ++ integer_to_list(I)),
  _ = rabbit_vhost:add(Name, <<"test">>),
  [rabbit_auth_backend_internal:set_permissions(User, Name, <<".*">>, <<".*">>, <<".*">>, <<"test">>)
    || User <- [<<"fluffle">>, <<"contract">>]]
end || I <- lists:seq({first}, {last})], ok.
"""


def pytest_report_header() -> str:
    try:
        rabbitmq = server_version()
    except UsageError:
        rabbitmq = "missing"
    return f"torch {version('torch')}, aio-pika {version('aio-pika')}, RabbitMQ {rabbitmq}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How many faults of each kind have been survived, or not, and what took how long, where tests say so."""
    counts = Counter[str]()
    for report in chain.from_iterable(terminalreporter.getreports(how) for how in ("passed", "failed")):
        counts.update(dict(report.user_properties).get("faults", {}) if report.when == "call" else {})
    if counts:
        terminalreporter.section("faults")
        for kind, count in [*counts.most_common(), ("in all", counts.total())]:
            terminalreporter.write_line(f"{count:5d}  {kind}")
    passed = [dict(report.user_properties) for report in terminalreporter.getreports("passed")]
    if measured := [properties["measured"] for properties in passed if "measured" in properties]:
        terminalreporter.section("measured")
        for line in sorted(measured):
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def authority() -> Authority:
    return Authority()


@pytest.fixture(scope="session")
def tls_port() -> int:
    return next(free_ports())


@pytest.fixture(scope="session")
def node(tmp_path_factory: pytest.TempPathFactory, authority: Authority, tls_port: int) -> Iterator[Node]:
    """Its user `contract` may do everything in the tests' vhosts, and has nothing but a certificate."""
    folder = tmp_path_factory.mktemp("node")
    with Node(folder / "rabbitmq", conf=secured(folder, authority, tls_port)) as started:
        yield started


@pytest.fixture(scope="session")
def broker_url(node: Node) -> str:
    return node.url


@pytest.fixture(scope="session")
def _vhosts(node: Node) -> Iterator[str]:
    def names() -> Iterator[str]:
        first = 1
        while True:
            last = first + VHOSTS - 1
            node.ctl("eval", MAKE_VHOSTS.replace("{first}", str(first)).replace("{last}", str(last)))
            yield from (f"t{i}" for i in range(first, last + 1))
            first = last + 1

    return names()


@pytest.fixture
def vhost_url(broker_url: str, _vhosts: Iterator[str]) -> str:
    """The URL of a vhost that no other test has seen."""
    return broker_url + next(_vhosts)


@pytest.fixture
def invitation(authority: Authority, vhost_url: str, tls_port: int, tmp_path: Path) -> Path:
    """Of `contract`, into a vhost that no other test has seen."""
    file = tmp_path / "contract.fluffle"
    authority.invite("contract", f"amqps://127.0.0.1:{tls_port}{URL(vhost_url).path}").write(file)
    return file


@pytest.fixture(autouse=True)
def _nothing_stays(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An acceptance test leaves no process behind: no child, and none that inherited its environment."""
    if "acceptance" not in request.path.parts:
        yield
        return
    mark = f"FLUFFLE_TEST_{os.getpid()}_{time.monotonic_ns()}"
    monkeypatch.setenv(mark, "1")
    before = {process.id for process in processes()}
    yield
    until = time.monotonic() + 5
    while left := [each for each in processes() if each.id not in before and each.is_ours(mark)]:
        if time.monotonic() > until:
            pytest.fail("left behind: " + "; ".join(f"{each.id} {each.words[:120] or 'a zombie'}" for each in left))
        time.sleep(0.05)


@pytest.fixture(scope="session")
def processes_with() -> Callable[[str], list[str]]:
    """Finds the processes that name a text in their words or their environment; their words."""

    def find(text: str) -> list[str]:
        return [each.words for each in processes() if text in each.environment or text in each.words]

    return find


class Process(NamedTuple):
    id: int
    parent: int
    words: str
    environment: str

    def is_ours(self, mark: str) -> bool:
        if "resource_tracker" in self.words or "forkserver" in self.words:
            return False  # multiprocessing's own: they stay until the interpreter ends, by design
        return self.parent == os.getpid() or mark in self.environment


def processes() -> Iterator[Process]:
    """All that runs on this machine and lets us look."""
    if not Path("/proc/self/stat").exists():  # macOS
        listing = subprocess.run(
            ["/bin/ps", "-AwwE", "-o", "pid=,ppid=,command="], capture_output=True, text=True, check=True
        )
        for pid, parent, words in (line.split(None, 2) for line in listing.stdout.splitlines()):
            if not words.startswith("/bin/ps -AwwE"):
                yield Process(int(pid), int(parent), words, words)
        return
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended while we looked, or is another user's
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
            words, environment = (
                (folder / name).read_bytes().replace(b"\0", b" ").decode(errors="replace")
                for name in ("cmdline", "environ")
            )
            yield Process(int(folder.name), int(parent), words, environment)
