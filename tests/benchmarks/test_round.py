"""That `make bench` still measures. How fast a round is, is nobody's verdict here."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from broker.errors import RunEnded
from tests.benchmarks import round as bench

pytestmark = pytest.mark.timeout(120)


def test_a_row_is_measured_and_one_that_fails_does_not_lose_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measure, said = bench.measure, tmp_path / "figures.json"

    def measure_or_fail(row: bench.Row, folder: Path, flower: str | None) -> dict[str, Any]:
        if row.workers == 1:
            raise RunEnded("nobody came")
        return measure(row, folder, flower)

    monkeypatch.setattr(bench, "measure", measure_or_fail)
    assert bench.main(["--rows", "1xtoy,2xtoy", "--rounds", "2", "--json", str(said)]) == 1
    figures = json.loads(said.read_text())
    assert figures["failed"] == {"1 × toy": "nobody came"}
    (row,) = figures["rows"]
    assert (row["workers"], row["parameters"]) == (2, 3)
    assert row["seconds"]["min"] > 0
    assert row["coordinator_out_bytes"] > 3 * 4
    assert row["pump_bytes_per_s"] > 0
    assert "2 × toy" in capsys.readouterr().out


def test_a_row_that_is_none_is_said_to_be_none() -> None:
    words = [sys.executable, str(Path(__file__).with_name("round.py")), "--rows", "4by1M"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 2
    assert "'4by1M' is not a row" in done.stderr
