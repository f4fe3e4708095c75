"""The data's owner at the command line: a policy that refuses, on a real broker, and the ledger that tells of it."""

import json
import re
import signal
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fluffle import app
from tests.acceptance.federation import Federation


@pytest.mark.timeout(120)
def test_an_owner_refuses_what_the_policy_forbids_and_reads_it_in_the_ledger(federation: Federation) -> None:
    f = federation
    f.fluffle("init", str(f.learner), str(f.run), "--pin-learner")
    rules = f.folder / "policy.toml"
    rules.write_text('runs = ["somebody-elses-*"]\nmetrics = []\n')
    f.coordinator("--rounds", "1", "--cohort", "2", "--quorum", "1", "--gather-s", "60")
    f.worker("free")
    f.start("strict", "worker", str(f.learner), "--name", "strict", "--data", "x", "--policy", str(rules))
    assert f.wait("coordinator") == 0
    (line,) = f.rounds()
    said = "the policy of the data's owner does not serve this run."
    assert line["declined"] == {"strict": said}
    assert [*line["counted"]] == ["free"]
    for name in ("free", "strict"):
        assert f.kill(name, signal.SIGTERM) == 0

    told = json.loads(f.fluffle("ledger", "--name", "strict", "--json"))
    assert {(each["event"], each["reason"]) for each in told["lines"]} == {("refused", said)}
    assert told["findings"] == []

    def asked(*command: str, status: int = 0) -> str:
        """As `Federation.fluffle`, in this process: it is quicker."""
        done = CliRunner().invoke(app, command, env={**f.env, "COLUMNS": "200"})
        assert done.exit_code == status, done.output
        return done.stdout or str(done.exception)

    shown = asked("ledger", "--name", "free")
    for word in ("taken", "update", "verdict", "score", "accepted", "counted in version 1"):
        assert word in shown, shown
    verified = asked("ledger", "--name", "free", "--verify")
    found = re.fullmatch(r"all is well: 5 lines in (.+); the chain ends in ([0-9a-f]{64})\n", verified)
    assert found, verified
    path = Path(found[1])
    path.write_bytes(path.read_bytes().replace(b'"examples":50', b'"examples":49'))
    broken = asked("ledger", "--name", "free", "--chain", found[2], status=1)
    assert "line 2 of the ledger does not follow from line 1" in broken
    assert "there is no ledger" in asked("ledger", "--name", "nobody", status=1)
    contract = json.loads(asked("status", str(f.run), "--json"))["contract"]
    assert f"contract {contract}, learner file " in asked("status", str(f.run))

    rules.write_text("hour = []")
    command = ("worker", str(f.learner), "--name", "x", "--data", "x", "--policy", str(rules))
    assert f"{rules}: hour is not a setting." in asked(*command, status=1)
