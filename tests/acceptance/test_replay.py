"""A run through a real RabbitMQ that is verified and made again with the commands that people type."""

from pathlib import Path

import pytest

from tests.acceptance.federation import Federation

pytestmark = [pytest.mark.timeout(180), pytest.mark.chaos]


def test_a_run_that_keeps_its_updates_is_verified_and_made_again_and_a_changed_bit_is_found(
    tmp_path: Path, vhost_url: str
) -> None:
    f = Federation(tmp_path, vhost_url)
    run = str(f.run)
    try:
        f.fluffle("init", str(f.learner), run)
        for name in ("w1", "w2"):
            f.worker(name)
        f.coordinator("--rounds", "3", "--cohort", "2", "--quorum", "2", "--keep-updates", "--format", "int8")
        f.until(f.rounds)
        f.kill("coordinator")
        f.coordinator()
        assert f.wait("coordinator") == 0, f.log("coordinator")
    finally:
        f.end()
    said = f.fluffle("verify", run)
    assert said.startswith("all is well: version 3 is the latest; the chain ends in ")
    assert "all is well" in f.fluffle("verify", run, "--chain", said.split()[-1])
    for began in ("0", "1", "2"):
        again = f.fluffle("replay", run, "--to", "3", "--from", began)
        assert again.startswith(
            f"version 3 made again from version {began} and {6 - 2 * int(began)} updates is the same"
        )
    assert "6 updates kept, 0.0" in f.fluffle("status", run)

    file = f.run / "versions" / "000002.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    f.fluffle("verify", run, status=1)
    f.fluffle("replay", run, "--to", "2", status=1)
    assert "is not the version 2 of this run's history" in f.fluffle("replay", run, "--to", "3", status=2)
    assert "name an earlier one" in f.fluffle("replay", run, "--to", "3", "--from", "3", status=2)
