"""Mistakes at the command line: one sentence that says what is wrong and what to do, and exit status 2."""

import os
import socket
from pathlib import Path

import pytest

from tests.acceptance.federation import Federation

NO_DATA = """
import torch
def model(): return torch.nn.Linear(1, 1)
def train(m, d, s): return 1
def evaluate(m, d): return {}
"""


@pytest.fixture
def f(tmp_path: Path, vhost_url: str) -> Federation:
    return Federation(tmp_path, vhost_url)


def refused(f: Federation, *command: str) -> str:
    said = f.fluffle(*command, status=2)
    last = said.strip().splitlines()[-1]
    assert last.startswith("fluffle: "), said
    assert "Traceback" not in said
    assert len(last) < 600
    return last


def test_an_unknown_learner_is_told_apart_from_a_broken_one(f: Federation) -> None:
    assert "digits" in refused(f, "init", "nonsense", str(f.run))
    assert "there is no learner file" in refused(f, "init", str(f.folder / "absent.py"), str(f.run))
    raising = f.folder / "raising.py"
    raising.write_text("raise RuntimeError('no graphics card today')")
    assert "no graphics card today" in refused(f, "init", str(raising), str(f.run))
    partial = f.folder / "partial.py"
    partial.write_text(NO_DATA)
    assert "has no function data" in refused(f, "init", str(partial), str(f.run))
    assert not f.run.exists()


def test_data_that_does_not_exist_ends_the_worker_with_the_reason(f: Federation) -> None:
    assert "nobody" in refused(f, "worker", "toy", "--name", "w", "--data", "nobody")
    assert "nobody" in refused(f, "try", "toy", "--data", "nobody")


def test_a_worker_needs_a_name_that_can_travel(f: Federation) -> None:
    assert "cannot be called 'Äpfel'" in refused(f, "worker", "toy", "--name", "Äpfel", "--data", "bob")


def test_a_folder_that_is_not_a_run_is_said_to_be_none(f: Federation) -> None:
    assert "is not a run" in refused(f, "coordinator", str(f.folder))
    assert "is not a run" in refused(f, "status", str(f.folder / "nowhere"))


def test_a_plan_that_contradicts_itself_is_refused_and_the_run_left_as_it_was(f: Federation) -> None:
    f.fluffle("init", "line", str(f.run))
    before = (f.run / "plan.toml").read_bytes()
    assert "quorum (3) is above the cohort (2)" in refused(
        f, "coordinator", str(f.run), "--cohort", "2", "--quorum", "3"
    )
    assert "rounds" in refused(f, "coordinator", str(f.run), "--rounds", "0")
    assert "schedule" in refused(f, "coordinator", str(f.run), "--schedule", "sideways")
    assert "--set takes NAME=VALUE" in refused(f, "coordinator", str(f.run), "--set", "lr")
    assert (f.run / "plan.toml").read_bytes() == before
    (f.run / "plan.toml").write_text("rounds = ")
    assert "is not TOML" in refused(f, "coordinator", str(f.run))


def test_a_run_is_not_made_where_something_is_already(f: Federation) -> None:
    f.fluffle("init", "line", str(f.run))
    assert "holds a run already" in refused(f, "init", "toy", str(f.run))
    assert "already" in f.fluffle("init", "line", str(f.run), "--if-missing")
    assert "not an empty folder" in refused(f, "init", "toy", str(f.folder))


def test_weights_of_another_run_or_learner_are_recognised(f: Federation) -> None:
    f.fluffle("init", "line", str(f.run))
    other = f.folder / "other"
    f.fluffle("init", "toy", str(other))
    foreign = (other / "versions/000000.safetensors").read_bytes()
    assert "other tensors" in f.fluffle(
        "evaluate", "line", str(other / "versions/000000.safetensors"), "--data", "x", status=1
    )
    (f.run / "versions/000000.safetensors").write_bytes(foreign)
    assert "is of the run" in refused(f, "coordinator", str(f.run))
    (f.run / "versions/000000.safetensors").write_bytes(foreign[:50])
    assert "is damaged" in refused(f, "coordinator", str(f.run))


def test_a_file_that_cannot_be_used_is_named_whoever_wants_it(f: Federation) -> None:
    f.fluffle("init", "line", str(f.run))
    (f.run / "history.jsonl").mkdir()
    assert "history.jsonl cannot be used: Is a directory." in refused(f, "status", str(f.run))
    assert "File name too long" in refused(f, "init", "line", str(f.folder / ("x" * 300)))
    under = f.run / "plan.toml" / "x"
    for command in (
        ("broker", "start", "--dir", str(under)),
        ("broker", "secure", str(under)),
        ("keygen", str(under)),
        ("roster", "sign", str(under), "--key", str(under)),
    ):
        assert f"{under} cannot be used: Not a directory." in refused(f, *command)


def test_what_others_have_written_is_shown_as_it_is_and_is_no_markup(f: Federation) -> None:
    learner = f.folder / "[" / "b]" / "mine.py"
    learner.parent.mkdir(parents=True)
    learner.write_text(NO_DATA.replace("return {}", "return {'[/a]\x1b[1m': 1}") + "def data(source): ...\n")
    f.fluffle("init", str(learner), str(f.run))
    version = str(f.run / "versions/000000.safetensors")
    assert "[/b]/mine.py" in f.fluffle("status", str(f.run)).replace("\n", "")
    assert r"[/a]\x1b[1m 1" in f.fluffle("try", str(learner), "--data", "x")
    assert r"[/a]\x1b[1m 1" in f.fluffle("evaluate", str(learner), version, "--data", "x")


def test_a_learner_that_goes_elsewhere_does_not_take_the_run_with_it(f: Federation) -> None:
    learner = f.folder / "elsewhere" / "mine.py"
    learner.parent.mkdir()
    text = f"import os\nos.chdir({str(learner.parent)!r})\n{NO_DATA}def data(source): ...\n"
    learner.write_text(text)
    f.fluffle("init", str(learner), os.path.relpath(f.run))
    assert (f.run / "plan.toml").exists()


def test_every_way_of_not_reaching_a_broker_has_its_sentence(f: Federation) -> None:
    f.fluffle("init", "line", str(f.run))
    url = f.env["FLUFFLE_BROKER"]
    user, _, rest = url.removeprefix("amqp://").partition(":")
    password, _, place = rest.partition("@")

    def tried(broker: str) -> str:
        said = refused(f, "coordinator", str(f.run), "--broker", broker)
        assert password not in said
        return said

    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        assert "fluffle broker start" in tried(f"amqp://a:b@127.0.0.1:{silent.getsockname()[1]}/")
    assert "password" in tried(f"amqp://{user}:wrong@{place}")
    assert "vhost" in tried(url + "-absent")
    assert "amqps://" in tried("not a url")
