"""The private RabbitMQ node: ready when it says so, and gone with what started it."""

import os
import re
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import aio_pika
import pytest
from typer.testing import CliRunner

import fluffle_demo
from broker import cli
from broker import folder as folder_module
from broker import node as node_module
from broker.errors import UsageError
from broker.folder import BROKER, EPMD, KEEPER, settle
from broker.node import status, stop_detached
from broker.processes import holder, take
from tests.node import Node

pytestmark = pytest.mark.timeout(240)  # a node starts in 3 s here, and in 20 s where others use the machine

Find = Callable[[str], list[str]]
PARENT = """
import sys, time
from pathlib import Path
from broker.node import Node
with Node(Path(sys.argv[1])) as node:
    print(node.url, flush=True)
    time.sleep(600)
"""
BOUND_S = 30.0
"""A stop takes one or two seconds; a busy machine may take longer."""


def gone(find: Find, folder: Path) -> None:
    """Return when nothing of a node is left; an ending process loses its words first, an instant later its lock."""
    until = time.monotonic() + BOUND_S
    while left := find(str(folder)) + [name for name in (KEEPER, EPMD, BROKER) if holder(folder / name)]:
        assert time.monotonic() < until, f"still there: {left}"
        time.sleep(0.05)


@pytest.fixture
def parent(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A program with an attached node in `tmp_path / "node"`, in a process group of its own, as in a terminal."""
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path / "node")],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        process_group=0,
    ) as program:
        assert program.stdout
        assert program.stdout.readline().startswith("amqp://")
        yield program
        program.kill()


def fluffle_broker(*words: str, state: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from broker.cli import app; app()", *words]
    env = os.environ | {"XDG_STATE_HOME": str(state)}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=90, check=False)


async def test_a_started_node_takes_and_gives_messages(vhost_url: str) -> None:
    async with await aio_pika.connect(vhost_url) as connection, connection.channel() as channel:
        queue = await channel.declare_queue("letters", durable=True)
        await channel.default_exchange.publish(aio_pika.Message(b"hello"), "letters")
        letter = await queue.get()
        assert letter is not None
        assert letter.body == b"hello"
        await letter.ack()


def test_nobody_else_reads_the_password_and_nobody_outside_reaches_the_node(node: Node) -> None:
    assert stat.S_IMODE(node.folder.stat().st_mode) == 0o700
    for name in ("node.json", "rabbitmq.conf"):
        assert stat.S_IMODE((node.folder / name).stat().st_mode) == 0o600
    listeners = node.ctl(
        "eval", "[inet:ntoa(Ip) || {listener, _, _, _, Ip, _, _} <- rabbit_networking:node_listeners(node())]."
    )
    assert set(re.findall(r'"(.*?)"', listeners)) == {"127.0.0.1"}
    assert "guest" not in [line.split("\t")[0] for line in node.ctl("list_users").splitlines()]


async def test_a_killed_broker_comes_back_with_its_url_and_its_durable_messages(
    tmp_path: Path, processes_with: Find
) -> None:
    with Node(tmp_path / "node", conf="heartbeat = 4\n") as node:
        url = node.url
        async with await aio_pika.connect(url) as connection, connection.channel() as channel:
            await channel.declare_queue("letters", durable=True)
            letter = aio_pika.Message(b"kept", delivery_mode=aio_pika.DeliveryMode.PERSISTENT)
            await channel.default_exchange.publish(letter, "letters")
        node.settle()
        node.kill()
        assert status(node.folder) is None
        assert processes_with(str(node.folder)) == []
        node.restart()
        assert node.url == url
        async with await aio_pika.connect(url) as connection, connection.channel() as channel:
            queue = await channel.get_queue("letters")
            kept = await queue.get()
            assert kept is not None
            assert kept.body == b"kept"
            await kept.ack()
        assert node.ctl("environment").count("{heartbeat,4}") == 1, "the test's own line of rabbitmq.conf counts"
    assert processes_with(str(node.folder)) == [], "stop leaves neither keeper, epmd nor broker"


def test_two_nodes_live_side_by_side_and_one_folder_has_one_node(
    node: Node, tmp_path: Path, processes_with: Find
) -> None:
    with Node(tmp_path / "a folder with spaces") as other:
        assert other.url != node.url
        assert status(other.folder) == other.url
        assert status(node.folder) == node.url
        with pytest.raises(UsageError, match="already runs"):
            Node(other.folder).start()
        with pytest.raises(UsageError, match="already runs"):
            Node(other.folder, port=other._address.port + 1)
        # A keeper that is killed leaves its broker behind; stopping finds it by its lock.
        keeper = holder(other.folder / KEEPER)
        assert keeper is not None
        os.kill(keeper, signal.SIGKILL)
    gone(processes_with, other.folder)
    assert status(node.folder) == node.url


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_the_node_ends_with_its_parent_however_that_ends(
    sent: signal.Signals, parent: subprocess.Popen[str], tmp_path: Path, processes_with: Find
) -> None:
    os.killpg(parent.pid, sent)  # to the whole group, as a terminal does on Ctrl-C
    parent.wait(BOUND_S)
    gone(processes_with, tmp_path / "node")


def test_a_port_in_use_is_a_sentence(tmp_path: Path, processes_with: Find) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=rf"port {port} of 127.0.0.1 cannot be used \(Address already in use\)"):
            Node(tmp_path / "node", port=port).start()
    assert processes_with(str(tmp_path / "node")) == []


def test_a_broker_that_ends_early_is_a_sentence_with_its_last_words(tmp_path: Path, processes_with: Find) -> None:
    node = fluffle_demo._broker(str(tmp_path / "node"), tmp_path)  # its log is to outlive it
    node._conf = "no_such_setting = 1\n"
    with pytest.raises(
        UsageError, match=rf"ended .*, saying “.*no_such_setting.*: the whole log is {tmp_path}/rabbitmq"
    ):
        node.start()
    assert "no_such_setting" in (tmp_path / "rabbitmq.log").read_text()
    assert processes_with(str(tmp_path / "node")) == []


def test_a_machine_without_rabbitmq_is_told_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_module, "SERVERS", ())
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match="RabbitMQ is not installed: `apt-get install rabbitmq-server` as root"):
        Node(tmp_path / "node").start()


def test_a_folder_with_other_things_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UsageError, match="holds other things"):
        Node(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_log_that_strangers_fill_begins_anew_while_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever reaches the port of a node has 300 bytes written for each connection, a thousand times a second."""
    monkeypatch.setattr(folder_module, "LOG_BYTES_MAX", 1000)
    log = tmp_path / folder_module.LOG
    with log.open("ab", buffering=0) as writes:
        writes.write(b"a" * 1000)
        folder_module.turn_over(log)
        assert log.stat().st_size == 1000
        writes.write(b"b")
        folder_module.turn_over(log)
        writes.write(b"c")
    assert log.read_bytes() == b"c"
    assert (tmp_path / "node.log.1").read_bytes() == b"a" * 1000 + b"b"
    folder_module.turn_over(tmp_path / "gone")


def test_an_id_that_another_program_got_is_never_killed(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as stranger:
        for name in (KEEPER, EPMD, BROKER):  # as a node that was switched off with its machine leaves them
            (tmp_path / name).write_text(str(stranger.pid))
        assert status(tmp_path) is None
        assert not stop_detached(tmp_path)
        assert stranger.poll() is None
        stranger.communicate(b"\n")


def test_the_command_line_starts_a_node_that_stays_until_it_is_stopped(tmp_path: Path, processes_with: Find) -> None:
    before = fluffle_broker("status", state=tmp_path)
    assert (before.returncode, before.stdout) == (1, "")
    assert f"`fluffle broker start --dir {tmp_path / 'fluffle' / 'broker'}` starts one" in before.stderr
    try:
        first, again = (fluffle_broker("start", state=tmp_path) for _ in range(2))
        assert (first.returncode, first.stderr) == (0, "")
        assert first.stdout.startswith("amqp://fluffle:")
        assert first.stdout.count("\n") == 1
        assert again.stdout == first.stdout, "starting what runs says where it runs"
        assert fluffle_broker("status", state=tmp_path).stdout == first.stdout
    finally:
        stopped = fluffle_broker("stop", state=tmp_path)
    assert (stopped.returncode, stopped.stdout) == (0, "")
    assert processes_with(str(tmp_path / "fluffle")) == []
    assert "no RabbitMQ node runs" in fluffle_broker("stop", state=tmp_path).stderr


def test_a_node_may_have_more_open_files_than_the_shell_that_starts_it(tmp_path: Path) -> None:
    """With 64 of them RabbitMQ would start, and answer nobody."""
    code = f"""
import resource
from pathlib import Path
from broker import node
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
node.spawn = lambda *_, **__: print(resource.getrlimit(resource.RLIMIT_NOFILE)[0] == min(hard, node.FILES))
folder = Path({str(tmp_path / "node")!r})
node.launch(folder, node.settle(folder, None), conf="", parent=0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("True\n", "")


def test_the_command_line_leaves_usage_errors_to_its_caller(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    result = CliRunner().invoke(cli.app, ["start", "--dir", str(tmp_path)])
    assert isinstance(result.exception, UsageError)


def test_to_start_a_node_that_runs_and_does_not_answer_does_not_end_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be stopped, or have its hands full with the rounds of a federation."""
    folder, ended = tmp_path / "node", list[Path]()
    settle(folder, None)
    monkeypatch.setattr(node_module, "START_S", 0.1)
    monkeypatch.setattr(node_module, "stop_detached", ended.append)
    with take(folder / KEEPER) as held:
        os.write(held, str(os.getpid()).encode())
        with pytest.raises(UsageError, match="did not answer within"):
            node_module.start_detached(folder)
    assert not ended
