"""What is remembered of rounds in the making: every try once, what was written last, and nothing that is damaged."""

import json
from pathlib import Path
from typing import Any

import pytest

from coordinator.journal import FILE, Journal, Try, _digest

ABC = ("a", "b", "c")


def write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def reopened(folder: Path) -> Journal:
    return Journal(folder, write)


def line(number: int) -> dict[str, Any]:
    return {"round": number, "version": number, "counted": {"a": 1}}


def test_a_try_is_found_again_as_it_was_begun(tmp_path: Path) -> None:
    assert reopened(tmp_path).begin(4, "plan", ABC, 1234.5) == 1
    assert reopened(tmp_path).resume(4, "plan") == Try(4, 1, "plan", ABC, 1234.5)
    assert reopened(tmp_path).resume(3, "plan") is None
    assert reopened(tmp_path).resume(5, "plan") is None


def test_a_try_that_asked_for_something_else_is_not_taken_up_and_its_number_not_used_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reopened(tmp_path).begin(1, "lr=0.1", ABC, 0.0)
    again = reopened(tmp_path)
    assert again.resume(1, "lr=0.5") is None
    assert caplog.text.count("under other settings, or for another run") == 1
    assert again.begin(1, "lr=0.5", ABC, 0.0) == 2


def test_an_abandoned_try_is_over_also_after_a_crash(tmp_path: Path) -> None:
    journal = reopened(tmp_path)
    journal.begin(1, "plan", ABC, 0.0)
    journal.abandon(1)
    again = reopened(tmp_path)
    assert again.resume(1, "plan") is None
    assert again.begin(1, "plan", ABC, 0.0) == 2


def test_a_version_s_line_is_written_with_the_next_try_or_before(tmp_path: Path) -> None:
    journal = reopened(tmp_path)
    journal.begin(1, "plan", ABC, 0.0)
    journal.made(line(1))
    assert reopened(tmp_path).lines() == []
    journal.flush()
    assert reopened(tmp_path).lines() == [line(1)]
    journal.begin(2, "plan", ABC, 0.0)
    journal.made(line(2))
    journal.begin(3, "plan", ABC, 0.0)
    assert reopened(tmp_path).lines() == [line(2)]  # that of version 1 was noted long ago


def test_a_lost_version_is_made_again_by_its_own_try_and_what_was_asked_of_it_by_another(tmp_path: Path) -> None:
    journal = reopened(tmp_path)
    journal.begin(1, "plan", ABC, 0.0)
    journal.made(line(1))
    assert journal.begin(2, "plan", ("a", "b"), 0.0) == 1  # version 1 is not on the disk yet, and will never be
    again = reopened(tmp_path)
    found = again.resume(1, "plan")
    assert found is not None
    assert (found.attempt, found.cohort) == (1, ABC)
    again.made(line(1))
    assert again.begin(2, "plan", ABC, 0.0) == 2
    assert reopened(tmp_path).resume(2, "plan") == Try(2, 2, "plan", ABC, 0.0)


def lost_version_1(folder: Path) -> Journal:
    """The journal after a crash by which a version was lost that had been sent already."""
    journal = reopened(folder)
    journal.begin(1, "plan", ABC, 0.0)
    journal.made(line(1))
    journal.begin(2, "plan", ("a", "b"), 0.0)
    return reopened(folder)


def test_what_was_asked_of_a_lost_version_is_remembered_while_its_round_is_tried_again(tmp_path: Path) -> None:
    lost_version_1(tmp_path).abandon(1)
    for attempt in (2, 3):
        assert reopened(tmp_path).begin(1, "plan", ABC, 0.0) == attempt
        assert reopened(tmp_path).resume(2, "plan") is None
    again = reopened(tmp_path)
    again.made(line(1))
    assert again.begin(2, "plan", ABC, 0.0) == 2


def test_what_was_asked_of_a_lost_version_is_not_taken_up_when_its_round_was_made_again(tmp_path: Path) -> None:
    again = lost_version_1(tmp_path)
    again.made(line(1))
    again.flush()  # the version is safe, and the coordinator dies while it waits for workers
    assert reopened(tmp_path).resume(2, "plan") is None
    assert reopened(tmp_path).begin(2, "plan", ABC, 0.0) == 2


def test_nothing_is_written_twice(tmp_path: Path) -> None:
    written: list[bytes] = []
    journal = Journal(tmp_path, lambda _, data: written.append(data))
    journal.begin(1, "plan", ABC, 0.0)
    journal.flush()
    assert len(written) == 1
    journal.made(line(1))
    journal.begin(2, "plan", ABC, 0.0)
    journal.flush()
    assert len(written) == 2


def of_cohort(name: str) -> bytes:
    """A folder that somebody else has made, who can reckon checksums, too."""
    tries = [{"round": 1, "attempt": 1, "plan": "plan", "cohort": [name], "until": 0.0}]
    return json.dumps({"check": _digest(tries), "tries": tries}).encode()


@pytest.mark.parametrize(
    "damage",
    [
        lambda _: b"",
        lambda data: data[: len(data) // 2],
        lambda data: data.replace(b'"a"', b'"z"'),
        lambda _: b'{"round": 1, "attempt": 5}',
        lambda _: b'{"check": "", "tries": [{}]}',
        lambda _: json.dumps({"check": "5", "tries": 7}).encode(),
        lambda _: b"[]",
        lambda _: b"\xff",
        lambda _: of_cohort("w" * 256),
        lambda _: of_cohort("a/../b"),
    ],
)
def test_a_damaged_journal_is_said_to_be_and_no_attempt_of_it_is_used_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Any
) -> None:
    journal = reopened(tmp_path)
    for _ in range(3):
        journal.begin(1, "plan", ABC, 0.0)
    (tmp_path / FILE).write_bytes(damage((tmp_path / FILE).read_bytes()))
    again = reopened(tmp_path)
    assert "is damaged" in caplog.text
    assert again.resume(1, "plan") is None
    assert again.begin(1, "plan", ABC, 0.0) > 1_000_000
    assert reopened(tmp_path).resume(1, "plan") is not None
