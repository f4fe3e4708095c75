"""That `make bench` still measures. How fast a round is, is nobody's verdict here."""

import io
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from broker.errors import RunEnded
from tests.benchmarks import dropouts, federation, peers, pump, rows, shown
from tests.benchmarks import round as bench
from tests.node import Node

pytestmark = pytest.mark.timeout(120)
SECONDS = {"median": 0.2, "min": 0.1, "max": 0.4, "counted": 5}


def measured(workers: int, parameters: int, **more: Any) -> dict[str, Any]:
    parts = dict.fromkeys(("coordinator", "workers", "children", "broker"), 3e6)
    sizes = {"label": f"{workers} × {parameters}", "workers": workers, "parameters": parameters, "hosts": workers}
    path_bytes = 8 * workers * parameters
    rates = {"path_bytes_per_s": path_bytes / 0.2, "pump_bytes_per_s": 5e8, "memcpy_bytes_per_s": 9e9}
    shares = {"of_pump": 0.5, "of_memcpy": 0.01}
    bytes_ = {"path_bytes": path_bytes, "up_bytes": path_bytes / 2, "coordinator_out_bytes": 4 * parameters}
    figures = {**sizes, **rates, **shares, **bytes_}
    return {**figures, "lost": 0, "seconds": SECONDS, "cpu_s": parts, "peak_bytes": parts, **more}


@pytest.mark.chaos
def test_a_row_is_measured_and_one_that_fails_does_not_lose_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measure, said = bench.measure, tmp_path / "figures.json"

    def measure_or_fail(row: rows.Row, folder: Path, pythons: bench.Pythons, **how: bool) -> dict[str, Any]:
        if row.workers == 1:
            raise RunEnded("nobody came")
        return measure(row, folder, pythons, **how)

    monkeypatch.setattr(bench, "measure", measure_or_fail)
    assert bench.main(["--rows", "1xtoy,2xtoy", "--rounds", "2", "--json", str(said)]) == 1
    figures = json.loads(said.read_text())
    assert figures["failed"] == {"1 × toy": "nobody came"}
    (row,) = figures["rows"]
    assert (row["workers"], row["parameters"], row["seconds"]["counted"]) == (2, 3, 2)
    assert row["seconds"]["min"] > 0
    assert row["coordinator_out_bytes"] > 3 * 4
    assert row["pump_bytes_per_s"] > 0
    assert said.with_suffix(".png").exists()
    assert "2 × toy" in capsys.readouterr().out


@pytest.mark.chaos
@pytest.mark.timeout(300)
def test_a_row_is_measured_by_mutual_tls_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = tmp_path / "figures.json"
    monkeypatch.setattr(bench, "TURNS", 1)  # one federation in the clear and one by TLS
    assert bench.main(["--rows", "2xtoy", "--rounds", "2", "--json", str(said), "--tls"]) == 0
    (row,) = json.loads(said.read_text())["rows"]
    assert row["tls"]["seconds"]["counted"] == 2
    assert row["tls"]["ratio"] == row["tls"]["seconds"]["median"] / row["seconds"]["median"]
    assert min(row["tls"]["peak_bytes"].values()) > 0


@pytest.mark.chaos
def test_a_row_of_which_workers_drop_out_is_measured_without_them(tmp_path: Path) -> None:
    said = tmp_path / "figures.json"
    assert bench.main(["--rows", "6xtoy@2+secure-1", "--rounds", "2", "--json", str(said)]) == 0
    (row,) = json.loads(said.read_text())["rows"]
    assert (row["label"], row["lost"]) == ("6 × toy secure, 1 lost", 1)
    assert row["seconds"]["counted"] >= 2


def test_a_sum_that_has_not_lost_those_whom_it_was_to_lose_ends_the_row() -> None:
    row = rows.row_of("9xtoy@3+secure-2", 1)

    def line(gone: dict[str, str], left: set[str]) -> dict[str, Any]:
        return {"round": 5, "secure": {"gone": gone, "of": sorted(left)}}

    gone = dropouts.dropping(row.names, row.lost, 5)
    left = {*row.names} - {*gone}
    true = dict.fromkeys(gone, dropouts.WHY)
    federation.check_sums([line(true, left)], row)
    for lie in (
        line({}, {*row.names}),
        line(true, left - {*sorted(left)[:1]}),
        line(true | {gone[0]: "it dropped out of the secure sum in the stage of shares"}, left),
    ):
        with pytest.raises(RunEnded, match=r"round 5 .* where it was to lose 2 of 9 after they had dealt"):
            federation.check_sums([line(true, left), lie], row)


def test_those_who_drop_out_are_as_many_and_others_each_time() -> None:
    for row in rows.rows_of("100x0.2M@4+secure-10, 7xtoy+secure-2, 4xtoy+secure-1, 100xtoy+secure-33"):
        rounds = [dropouts.dropping(row.names, row.lost, round_) for round_ in range(1, 30)]
        assert all(len({*gone}) == row.lost for gone in rounds)
        assert not any({*before} & {*after} for before, after in itertools.pairwise(rounds))
    assert dropouts.dropping(["a", "b", "c"], 0, 1) == []


def test_a_row_says_workers_parameters_hosts_and_as_many_rounds_as_its_size_allows() -> None:
    toy, large, many = rows.rows_of("2xtoy, 2x250M, 10x0.1M@4")
    assert (toy.parameters, toy.hosts, toy.rounds) == (3, 2, rows.ROUNDS_MAX)
    assert (large.label, large.parameters, large.rounds) == ("2 × 250M", 250_000_000, rows.ROUNDS_MIN)
    assert (many.parameters, many.shares) == (100_000, [3, 3, 2, 2])
    assert [row.rounds for row in rows.rows_of("default", 7)] == [7] * len(rows.DEFAULT)
    assert rows.row_of("1000x0.1M", None).hosts == rows.HOSTS
    plain, secure, lossy = rows.rows_of("10x0.2M@4, 10x0.2M@4+secure, 10x0.2M@4+secure-3")
    assert (plain.label, plain.secure, plain.lost) == ("10 × 0.2M", False, 0)
    assert (secure.label, secure.secure, secure.lost) == ("10 × 0.2M secure", True, 0)
    assert (lossy.label, lossy.secure, lossy.lost) == ("10 × 0.2M secure, 3 lost", True, 3)
    assert lossy.names == ["w1-1", "w1-2", "w1-3", "w2-1", "w2-2", "w2-3", "w3-1", "w3-2", "w4-1", "w4-2"]


@pytest.mark.parametrize("word", ["4by1M", "0x1M", "4x0", "4x1M@5", "4x1M@0", "9x1M-1", "9x1M+secure-3"])
def test_a_row_that_is_none_is_said_to_be_none(word: str) -> None:
    with pytest.raises(ValueError, match=f"'{re.escape(word)}'"):
        rows.rows_of(f"4x1M,{word}")


def test_what_cannot_be_measured_is_refused_before_anything_is() -> None:
    words = [sys.executable, str(Path(__file__).with_name("round.py")), "--rows", "4by1M"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 2
    assert "'4by1M' is not a row" in done.stderr


def test_the_table_has_a_column_a_row_and_sets_peers_beside_it() -> None:
    met = {"seconds": SECONDS, "ratio": 0.5, "aim": 0.35, "server_peak_bytes": 7e7}
    peered = measured(4, 10**7, peers={"Quick": met, "Broken": {"failed": "no wheel"}})
    console = Console(width=120, file=(said := io.StringIO()))
    console.print(shown.table([measured(2, 3, lost=1), peered]))
    lines = [[cell.strip() for cell in line.strip("│").split("│")] for line in said.getvalue().splitlines()]
    assert ["seconds a round, median", "0.200", "0.200"] in lines
    assert ["workers lost a round", "1", "0"] in lines
    assert ["ours / theirs", "", "0.500 (aim 0.35)"] in lines
    assert ["Broken, s", "", "failed"] in lines


def test_the_picture_is_a_png_even_of_nothing(tmp_path: Path) -> None:
    met = {"Quick": {"seconds": SECONDS}, "Broken": {"failed": "no wheel"}}
    for number, of in enumerate(([], [measured(4, 10**6, peers=met), measured(16, 10**6), measured(2, 3)])):
        shown.plot(of, file := tmp_path / f"{number}.png")
        assert file.read_bytes().startswith(b"\x89PNG")


def test_the_bare_pump_moves_bytes(node: Node) -> None:
    assert pump.pump(node.url, messages=3, times=1) > 0


def test_a_peer_that_cannot_be_installed_says_why_and_leaves_our_figures(tmp_path: Path) -> None:
    nowhere = peers.PEERS[0]._replace(packages=("fluffle-has-no-such-peer==1",))
    with pytest.raises(RunEnded, match="fluffle-has-no-such-peer==1 cannot be installed: ") as problem:
        peers.install(nowhere, tmp_path, ["--no-index"])
    row = rows.row_of("4x1M", 2)
    turns = bench.meet(nowhere, str(problem.value), row, tmp_path, [])
    assert bench.against(nowhere, turns, row, 0.1) == {"failed": str(problem.value)}
