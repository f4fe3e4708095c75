"""What somebody else has made, looked at: a run's folder, an invitation, an address. One sentence, and no escapes."""

import base64
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import tomli_w
from rich.text import Text
from typer.testing import CliRunner

import workers.cli
from broker import chain, rabbit
from broker.certificates import issue
from broker.errors import BrokerRefused, LinkError, UsageError
from broker.fields import legible
from broker.folder import settle
from broker.invitation import Access
from broker.management import Management, checked
from coordinator import plan as plans
from coordinator.replay import Outcome
from coordinator.store import HISTORY, NOW, Store
from fluffle import app
from tests.system.rig import MODEL, start_weights

CLEAR = "\x1b[2J"


def a_run(folder: Path, **of_plan: object) -> Path:
    """A run that has not begun."""
    plan = plans.make({"run": "run", "learner": "lesson", **of_plan})
    Store.create(folder / "run", plan, MODEL, memoryview(start_weights()))
    return folder / "run"


def shown(*command: str | Path, status: int = 0) -> str:
    """What a command prints; it ends with this status, and shows nothing that a terminal obeys."""
    done = CliRunner().invoke(app, [*map(str, command)], env={"COLUMNS": "300"}, catch_exceptions=False)
    assert done.exit_code == status
    assert done.output.replace("\n", "").isprintable()
    return done.output


@pytest.mark.parametrize("command", ["keygen {}/key", "broker secure {}/fed", "broker secure {}/begun"])
def test_a_full_disk_is_said_in_a_sentence_and_leaves_nothing_half(command: str, tmp_path: Path) -> None:
    """Here a file may have no bytes at all; of that the kernel speaks as of a disk without room, naming no file."""
    settle(tmp_path / "begun", None)
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    words = [sys.executable, "-P", "-m", "fluffle", *command.format(tmp_path).split()]
    done = subprocess.run(
        ["sh", "-c", 'ulimit -f 0; exec "$@"', "sh", *words],  # noqa: S607 (any shell)
        capture_output=True, text=True, check=False, timeout=50,
    )  # fmt: skip
    assert done.returncode == UsageError.status, done.stderr
    assert done.stderr.startswith(f"fluffle: {tmp_path}")
    assert done.stderr.endswith("cannot be used: File too large.\n")
    assert {path for path in tmp_path.rglob("*") if path.is_file() and path.name != "federation.lock"} == before


@pytest.mark.parametrize("learner", ["home/[/]/x.py", "home/[old]/x.py", f"x{CLEAR}"])
def test_a_learner_with_any_name_is_shown_as_it_is(tmp_path: Path, learner: str) -> None:
    run = a_run(tmp_path, learner=learner, contract=CLEAR)
    assert f"learner {legible(learner)}\n" in shown("status", run)


@pytest.mark.parametrize(
    "now",
    [
        {"deadline_s": 5}, {"deadline_s": "x", "at": 1}, {"deadline_s": 10**400, "at": 1.0}, {"waiting": 3},
        {"waiting": {}}, {"resting": []}, {"resting": {"a": 3}},
    ],
    ids=str,
)  # fmt: skip
def test_a_present_that_no_coordinator_has_written_is_said_to_be_none(tmp_path: Path, now: dict[str, object]) -> None:
    run = a_run(tmp_path)
    (run / NOW).write_text(json.dumps(now))
    assert "does not say what a coordinator writes there" in shown("status", run)
    assert json.loads(shown("status", run, "--json"))["now"] == {}


def test_a_history_that_leads_into_another_file_adds_nothing_there(tmp_path: Path) -> None:
    """Somebody else's folder, unpacked; a shell, for instance, does what stands in its file of commands."""
    run, commands = a_run(tmp_path), tmp_path / "bashrc"
    commands.write_text("ls\n")
    (run / HISTORY).symlink_to(commands)
    with pytest.raises(UsageError, match=r"cannot be written \(Too many levels of symbolic links\)"):
        Store.open(run).note({"event": "score", "metrics": {"$(reboot)": 1.0}})
    assert commands.read_text() == "ls\n"


def test_a_chain_that_a_terminal_would_obey_is_none(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    (run / HISTORY).write_bytes(json.dumps({chain.CHAIN: CLEAR, "event": "x"}).encode() + b"\n")
    assert "the chain ends in nothing" in shown("verify", run, status=1)


def test_tensors_of_which_a_replay_tells_are_legible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coordinator.replay.replay", lambda *_: Outcome(1, [f"{CLEAR}: 3 of 4 numbers"]))
    assert "  \\x1b[2J: 3 of 4 numbers" in shown("replay", a_run(tmp_path), "--to", "1", status=1)


def test_a_history_of_nothing_but_torn_lines_is_looked_at_in_a_moment() -> None:
    """Each of them was copied with all that stand before it: what is here would take longer than this test may."""
    (found,), last = chain.check(b"x" * 2000 + b"\n" + (b"x" * 999 + b"\n") * 80_000)
    assert found.said.startswith("lines 1 to 80001 were changed or added")
    assert last == ""


def test_metrics_in_brackets_are_shown_as_the_learner_calls_them() -> None:
    named = {"iou[car]": 0.5, "[/]": 1.0}
    assert Text.from_markup(workers.cli._metrics(named)).plain == "iou[car] 0.5, [/] 1"


@contextmanager
def pages(text: bytes) -> Iterator[str]:
    """A server that says this to everything; its address."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        serving = threading.Thread(target=server.serve_forever)
        serving.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            serving.join()


@pytest.mark.parametrize("text", [b"<html>", b"[" * 100_000], ids=["html", "nested"])
def test_what_is_not_rabbitmqs_management_is_said_to_be_none(text: bytes) -> None:
    with pages(text) as url, pytest.raises(BrokerRefused, match=r"is not RabbitMQ: check --management\.$"):
        Management(checked(url), ("a", "b"), "").ask("GET", "overview")


async def test_a_host_that_no_name_can_be_is_one_that_does_not_answer() -> None:
    with pytest.raises(UsageError, match=r"no RabbitMQ answers at a\.\.b:5672"):
        await rabbit.connect(Access.at("amqp://a..b/", insecure=True), name="x")
    with pytest.raises(LinkError, match=r"do not answer at a\.\.b:443"):
        Management(checked("https://a..b"), ("a", "b"), "", public=True).ask("GET", "overview")


def of_version_7(certificate: str) -> str:
    """The certificate, of a version of X.509 that does not exist."""
    raw = base64.b64decode("".join(certificate.splitlines()[1:-1]))
    packed = base64.encodebytes(raw.replace(b"\xa0\x03\x02\x01\x02", b"\xa0\x03\x02\x01\x06", 1)).decode()
    return f"-----BEGIN CERTIFICATE-----\n{packed}-----END CERTIFICATE-----\n"


@pytest.mark.parametrize("lie", [of_version_7, lambda certificate: certificate + "é"], ids=["version", "letter"])
def test_an_invitation_with_a_certificate_that_is_none_is_of_no_use(
    tmp_path: Path, lie: Callable[[str], str]
) -> None:
    above, file = issue(None, "federation"), tmp_path / "ada.fluffle"
    ada = issue(above, "ada")
    says = {"format": 1, "name": "ada", "role": "worker", "broker": "amqps://h/v", "key": ada.key}
    says |= {"ca": lie(above.certificate), "certificate": ada.certificate}
    file.write_text(tomli_w.dumps(says))
    file.chmod(0o600)
    with pytest.raises(UsageError, match=r"ada\.fluffle cannot be used \(no PEM\): ask whoever runs the federation"):
        Access.invited(file)


def test_status_prints_json_for_every_reader_whatever_numbers_a_folder_holds(tmp_path: Path) -> None:
    """Somebody, or a former fluffle, has written numbers that only some readers of JSON know."""
    run, bad = (
        a_run(tmp_path),
        '{"event": "score", "version": 0, "worker": "a", "at": NaN, "metrics": {"loss": 1e999}}\n',
    )
    (run / HISTORY).write_text(bad + '{"event": "x", "why": "\\ud800"}\n')
    (run / NOW).write_text('{"why": "open", "left": -Infinity}')

    def strict(constant: str) -> None:
        pytest.fail(f"{constant} is no JSON")

    found = json.loads(shown("status", run, "--json"), parse_constant=strict)
    assert found["history"][0] == {
        "event": "score",
        "version": 0,
        "worker": "a",
        "at": None,
        "metrics": {"loss": None},
    }
    assert found["now"]["left"] is None
