"""The worker's ledger: a change of any byte is found, and nothing a coordinator says is obeyed by a terminal."""

import errno
import json
import os
import stat
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.chain import check
from broker.errors import GaveUp, LearnerFailed, UsageError
from workers import ledger
from workers.ledger import ENTRIES_MAX, FLOOD_MAX, FLOOD_S, SCORED_MAX, TEXT_MAX, Ledger, find, plain


def written(path: Path) -> bytes:
    account = Ledger(path)
    account.write("taken", run="digits-1", round=1, attempt=1, asked_by="coordinator", cohort=4)
    account.write("update", run="digits-1", round=1, attempt=1, bytes=1000, metrics=["loss"], examples=40)
    account.write("verdict", run="digits-1", round=1, attempt=1, verdict="accepted", reason="counted in version 1")
    return path.read_bytes()


def bad(data: bytes) -> list[str]:
    return [finding.said for finding in check(data, "ledger")[0] if finding.bad]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return written(tmp_path_factory.mktemp("ledger") / "ada.ledger")


def test_what_was_written_is_read_again_and_only_its_owner_reads_it(tmp_path: Path) -> None:
    data = written(tmp_path / "ada.ledger")
    lines = Ledger(tmp_path / "ada.ledger").read()
    assert [line["event"] for line in lines] == ["taken", "update", "verdict"]
    assert lines[1]["metrics"] == ["loss"]
    assert bad(data) == []
    assert stat.S_IMODE((tmp_path / "ada.ledger").stat().st_mode) == 0o600
    assert Ledger(tmp_path / "nobody.ledger").read() == []


def test_a_change_of_any_byte_is_found(good: bytes) -> None:
    for at in range(len(good)):
        for other in (good[at] ^ 1, ord("\n"), ord(" ")):
            changed = good[:at] + bytes([other]) + good[at + 1 :]
            # that the last line has lost its end is no more than a power failure can do, and the next one vouches
            assert changed == good or bad(changed) or at == len(good) - 1, (at, changed)


@given(st.integers(0, 10**4), st.integers(0, 20), st.binary(max_size=20))
@settings(max_examples=150, deadline=None)
def test_what_is_cut_out_or_put_in_is_found_but_at_the_end(good: bytes, at: int, cut: int, put: bytes) -> None:
    at %= len(good)
    changed = good[:at] + put + good[at + cut :]
    if changed != good and changed[-1:] == b"\n" and not good.startswith(changed):
        assert bad(changed)


def test_an_end_that_was_cut_off_is_found_by_whoever_remembers_how_it_ended(good: bytes) -> None:
    last = check(good)[1]
    shorter = b"".join(good.splitlines(keepends=True)[:2])
    assert bad(shorter) == []
    assert check(shorter, "ledger", remembered=last)[0] == [
        (f"no line of the ledger has the chain {last}: it was written anew since.", True)
    ]
    assert check(good, "ledger", remembered=last)[0] == []


def test_a_line_that_a_power_failure_has_torn_is_vouched_for_by_the_next(tmp_path: Path) -> None:
    path = tmp_path / "ada.ledger"
    data = written(path)
    path.write_bytes(data[:-30])
    Ledger(path).write("refused", run="digits-1", reason="no room")
    findings, _ = check(path.read_bytes(), "ledger")
    assert findings == [("line 3 was torn, as by a power failure; line 4 vouches for that.", False)]
    assert [line["event"] for line in Ledger(path).read()] == ["taken", "update", "refused"]


@given(st.text(max_size=2 * TEXT_MAX))
def test_no_text_can_steer_a_terminal_or_fill_the_disk(text: str) -> None:
    shown = plain(text)
    assert len(shown) <= TEXT_MAX
    assert shown.isprintable() or not shown
    assert shown == text[:TEXT_MAX] or any(not c.isprintable() for c in text[:TEXT_MAX])


def test_what_no_line_can_hold_is_told_in_words_or_left_out(tmp_path: Path) -> None:
    account = Ledger(tmp_path / "ada.ledger")
    names = {f"{n}": float(n) for n in range(ENTRIES_MAX + 1)}
    account.write("update", loss=float("nan"), odd="\ud800\x1b[2J\u202e", many=[*names], map=names)
    (line,) = account.read()
    assert (line["loss"], line["odd"]) == ("nan", "\\ud800\\x1b[2J\\u202e")
    assert len(line["many"]) == len(line["map"]) == ENTRIES_MAX


def test_whoever_was_in_a_sum_is_named_though_they_were_many(tmp_path: Path) -> None:
    """Strangers that an operator has put on the roster, for instance, whose names come last."""
    cohort = [*(f"hospital-{n:03d}" for n in range(150)), "zzz-stranger"]
    account = Ledger(tmp_path / "ada.ledger")
    account.write("secure", cohort=cohort)
    assert account.read()[0]["cohort"] == cohort
    assert "zzz-stranger" in " ".join(ledger.told(account.read()[0]))


def test_a_disk_that_does_not_keep_it_is_told_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    account = Ledger(tmp_path / "ada.ledger")
    account.write("taken")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(LearnerFailed, match=r"cannot be written \(No space left on device\).*nothing leaves"):
        account.keep()
    (tmp_path / "ada.ledger").unlink()
    (tmp_path / "ada.ledger").mkdir()
    with pytest.raises(LearnerFailed, match="cannot be written"):
        account.write("taken")
    with pytest.raises(LearnerFailed, match="cannot be read"):
        account.read()


def test_a_folder_that_is_gone_is_nothing_to_go_on_with(tmp_path: Path) -> None:
    account = Ledger(tmp_path / "ada" / "ada.ledger")
    with pytest.raises(GaveUp, match=r"ledger is gone, with its folder: a worker that is started anew makes both"):
        account.write("taken")


def test_it_is_kept_with_the_folder_that_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []

    def seen(number: int) -> None:
        synced.append(Path(f"/proc/self/fd/{number}").readlink().name if Path("/proc/self/fd").exists() else "")

    monkeypatch.setattr(os, "fsync", seen)
    account = Ledger(tmp_path / "ada.ledger")
    account.write("taken")
    assert synced == []
    account.keep()
    account.keep()
    assert len(synced) == 3  # the folder once
    assert synced in (["ada.ledger", tmp_path.name, "ada.ledger"], [""] * 3)


def test_a_ledger_is_found_by_the_workers_name_also_one_of_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    home = tmp_path / "fluffle" / "workers" / "ada"
    home.mkdir(parents=True)
    for name in ("ada", "ada-3"):
        (home / f"{name}.ledger").touch()
        assert find(None, name) == find(home, name) == home / f"{name}.ledger"
    for folder, name in ((None, "ada-4"), (tmp_path, "ada")):
        with pytest.raises(UsageError, match=r"there is no ledger .*: name the worker with --name"):
            find(folder, name)


@pytest.mark.parametrize(
    "line", [{"event": "x"}, {"event": "\x1b", "at": "y", "run": [], "attempt": {}}, {"event": "x", "at": 1e300}]
)
def test_lines_that_somebody_else_has_written_are_shown_too(line: dict[str, Any]) -> None:
    (read,) = ledger.lines(json.dumps(line).encode())
    assert all(cell.isprintable() for cell in ledger.told(read))
    assert ledger.told(read)[0] == "?"
    assert [*ledger.lines(b'{"event": 1}\n[]\n{"a": 1}\n[[[\n' + b"[" * 100_000)] == []


def test_what_several_threads_write_at_once_is_one_chain(tmp_path: Path) -> None:
    """The event loop notes tasks and verdicts while a thread reckons in secret, and notes what it has revealed."""
    account = Ledger(tmp_path / "a.ledger")
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda number: account.write("secure", round=number), range(400)))
    assert check((tmp_path / "a.ledger").read_bytes(), "ledger")[0] == []
    assert sorted(line["round"] for line in account.read()) == list(range(400))


def test_scores_without_end_do_not_fill_the_disk_and_what_is_trained_is_all_written(tmp_path: Path) -> None:
    """Versions are sent to be scored as often as a coordinator likes: nothing else bounds that."""
    account = Ledger(tmp_path / "a.ledger")
    for number in range(SCORED_MAX + 200):
        account.write("taken", work="evaluate", round=number)
        account.write("score", round=number)
        account.write("taken", work="train", round=number)
    lines = account.read()
    told = Counter(line["event"] + line.get("work", "") for line in lines)
    assert told == {"takenevaluate": SCORED_MAX, "score": SCORED_MAX, "takentrain": SCORED_MAX + 200}
    further = [line["round"] for line in lines if "further" in line]
    assert further == [SCORED_MAX - 1] * 2, "before any of those leave"


def test_refusals_without_end_do_not_fill_the_disk_and_how_many_there_were_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever may ask can be refused as often as it likes; what left, and other events, are written all the same."""
    clock = SimpleNamespace(now=5.0)
    monkeypatch.setattr("workers.ledger.time", SimpleNamespace(time=lambda: clock.now))
    account = Ledger(tmp_path / "a.ledger")
    for number in range(250):
        account.write("refused", reason=f"no {number}")
    account.write("alarm", why="another cohort")
    account.write("update", run="r")
    clock.now += FLOOD_S
    account.write("refused", reason="no again")
    account.write("refused", reason="no more")
    lines = account.read()
    assert check(account.path.read_bytes(), "ledger")[0] == []
    events = [line["event"] for line in lines]
    assert events == ["refused"] * FLOOD_MAX + ["alarm", "update", "refused", "refused"]
    assert [line["further"] for line in lines if "further" in line] == ["are counted only, for 3600 s"]
    assert "further" in lines[FLOOD_MAX - 1]
    assert [line.get("unwritten") for line in lines[-2:]] == [150, None]
