"""The history as a chain: whatever is done to one line is found, and said of that line."""

import io
import json
from hashlib import sha256
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker import chain
from broker.chain import Chain, bare, check

LINES: list[dict[str, Any]] = [
    {"event": "round", "version": number, "why": "3/3 \u2028", "metrics": {"loss": 0.1 * number}}
    for number in range(1, 7)
]


def history_of(*lines: dict[str, Any]) -> bytes:
    file, written = io.BytesIO(), Chain()
    for line in lines:
        written.append(file, line)
    return file.getvalue()


def said(raw: list[bytes]) -> list[str]:
    """What is found in these lines that should not be."""
    return [finding.said for finding in check(b"".join(line + b"\n" for line in raw))[0] if finding.bad]


GOOD = history_of(*LINES).splitlines()


def test_what_was_written_is_found_as_it_was_and_says_the_same() -> None:
    findings, last = check(history_of(*LINES))
    assert findings == []
    assert last == json.loads(GOOD[-1])["chain"]
    assert [bare(json.loads(line)) for line in GOOD] == LINES
    assert check(b"") == ([], "")


def test_a_line_is_the_hash_of_the_chain_before_it_and_of_what_it_says() -> None:
    first = b'{"a":0.5,"b":[1,{"c":"\\u00e4","d":null}]}'
    raw, last = chain.written({"b": [1, {"d": None, "c": "ä"}], "a": 0.5}, "")
    assert last == sha256(first).hexdigest()
    assert raw == first[:-1] + b',"chain":"' + last.encode() + b'"}\n'
    assert chain.written({"a": 1}, last)[1] == sha256(last.encode() + b'{"a":1}').hexdigest()


def test_a_line_that_was_changed_is_named() -> None:
    changed = [*GOOD[:2], GOOD[2].replace(b"3/3", b"2/3"), *GOOD[3:]]
    (found,) = said(changed)
    assert found.startswith("line 3 of the history does not follow from line 2: it was changed, or that one was, or")


def test_a_line_that_was_changed_and_given_a_chain_of_its_own_breaks_the_next() -> None:
    forged = chain.written({**LINES[2], "why": "2/3"}, json.loads(GOOD[1])["chain"])[0].strip()
    (found,) = said([*GOOD[:2], forged, *GOOD[3:]])
    assert found.startswith("line 4 of the history does not follow from line 3: it was changed, or that one was, or")


def test_a_line_that_means_the_same_and_is_written_otherwise_was_changed() -> None:
    for changed in (
        GOOD[2].replace(b'","', b'", "', 1),
        GOOD[2] + b" ",
        json.dumps(dict(reversed(json.loads(GOOD[2]).items())), separators=(",", ":")).encode(),
        GOOD[2].replace(b"{", b'{"event":"final",', 1),
    ):
        assert json.loads(changed) == json.loads(GOOD[2])
        assert said([*GOOD[:2], changed, *GOOD[3:]]) == [
            "line 3 of the history was changed: it is not written as lines are."
        ]


@pytest.mark.parametrize("gone", range(5))
def test_a_line_that_was_removed_leaves_a_gap(gone: int) -> None:
    (found,) = said(GOOD[:gone] + GOOD[gone + 1 :])
    assert found.startswith(f"line {gone + 1} of the history does not follow from ")
    assert "removed" in found


def test_the_end_that_was_cut_off_is_not_missed_by_the_chain_itself() -> None:
    findings, last = check(b"\n".join(GOOD[:-1]) + b"\n")
    assert findings == []
    assert last != check(history_of(*LINES))[1], "whoever remembers the last chain misses it"


def test_lines_that_were_swapped_are_named() -> None:
    found = said([*GOOD[:2], GOOD[3], GOOD[2], *GOOD[4:]])
    assert [each.split(":")[0] for each in found] == [
        f"line {n} of the history does not follow from line {n - 1}" for n in (3, 4, 5)
    ]
    assert all(each.endswith("or lines were inserted there or swapped.") for each in found)


def test_a_line_that_was_inserted_is_named_however_well_it_is_forged() -> None:
    forged = chain.written(LINES[0], json.loads(GOOD[2])["chain"])[0].strip()
    (found,) = said([*GOOD[:3], forged, *GOOD[3:]])
    assert found.startswith("line 5 of the history does not follow from line 4: ")
    found, _ = said([*GOOD[:3], GOOD[1], *GOOD[3:]])
    assert found.startswith("line 4 of the history does not follow from line 3: ")
    for foreign in (b"", b"{", b"3", b'{"event":"round"}', b"\xff", b'{"chain":1}', b"[" * 100_000):
        assert said([*GOOD[:3], foreign, *GOOD[3:]]) == [
            "line 4 was changed or inserted: no line of this history reads so, and line 5 knows nothing of it."
        ]
        assert said([*GOOD, foreign]) == ["line 7 was changed or added at the end: no line of this history reads so."]


@given(st.integers(0, len(GOOD) - 1), st.binary(max_size=200) | st.just(None), st.data())
@settings(max_examples=200, deadline=None)
def test_no_change_of_a_single_line_goes_unnoticed(where: int, new: bytes | None, data: st.DataObject) -> None:
    line = GOOD[where]
    if new is None:  # a change of a few bytes of it
        at = data.draw(st.integers(0, len(line) - 1))
        new = line[:at] + data.draw(st.binary(max_size=3)) + line[data.draw(st.integers(at, at + 3)) :]
    if new in (line, line + b"\n"):
        return
    changed = [*GOOD[:where], new, *GOOD[where + 1 :]]
    assert any(f"line{s} {where + n}" in found for found in said(changed) for s in ("", "s") for n in (1, 2)), changed


def test_a_torn_line_is_not_taken_for_a_spoilt_one_and_cannot_be_changed_later() -> None:
    torn = b"".join(line + b"\n" for line in GOOD[:2]) + GOOD[2][:40]
    findings, last = check(torn)
    assert findings == [("line 3 was torn, as by a power failure; the next line will vouch for that.", False)]
    file = io.BytesIO(torn)
    written = Chain()
    for line in LINES[2:4]:
        written.append(file, line)
    raw = file.getvalue().splitlines()
    assert last == json.loads(raw[1])["chain"]
    assert check(file.getvalue())[0] == [("line 3 was torn, as by a power failure; line 4 vouches for that.", False)]
    assert [bare(json.loads(line)) for line in raw[3:]] == LINES[2:4]
    assert said([*raw[:2], raw[2][:-1], *raw[3:]]) == [
        "line 3 was changed or inserted: no line of this history reads so, and line 4 knows nothing of it."
    ]
    assert said([*raw[:2], *raw[3:]]) == [
        "line 3 of the history vouches for a torn line before it, which was removed."
    ]


def test_a_line_that_only_lost_its_end_of_line_is_whole() -> None:
    file = io.BytesIO(b"\n".join(GOOD[:3]))
    Chain().append(file, LINES[3])
    assert file.getvalue() == b"\n".join(GOOD[:4]) + b"\n"


def test_lines_older_than_the_chain_are_vouched_for_by_the_first_that_has_one() -> None:
    old = b"".join(json.dumps(line).encode() + b"\n" for line in LINES[:3])
    file = io.BytesIO(old)
    Chain().append(file, LINES[3])
    assert [finding.bad for finding in check(file.getvalue())[0]] == [False]
    assert said(file.getvalue().replace(b"3/3", b"2/3", 1).splitlines()) != []


def test_a_line_that_could_not_be_written_whole_is_a_torn_one() -> None:
    class Full(io.BytesIO):
        def write(self, data: Any, /) -> int:
            super().write(data[:20])
            raise OSError("full")

    file, written = Full(), Chain()
    with pytest.raises(OSError, match="full"):
        written.append(file, LINES[0])
    again = io.BytesIO(file.getvalue())
    written.append(again, LINES[0])
    findings, _ = check(again.getvalue())
    assert findings == [("line 1 was torn, as by a power failure; line 2 vouches for that.", False)]


def test_a_number_that_json_does_not_have_leaves_the_history_as_it_was() -> None:
    file, written = io.BytesIO(), Chain()
    written.append(file, LINES[0])
    with pytest.raises(ValueError, match="not JSON compliant"):
        written.append(file, {"loss": float("inf")})
    written.append(file, LINES[1])
    assert file.getvalue() == b"\n".join(GOOD[:2]) + b"\n"


def test_the_line_before_is_found_in_a_long_history_and_a_hostile_one_does_not_take_for_ever() -> None:
    strange = [json.dumps({"chain": f"{n:064x}"}, separators=(",", ":")).encode() for n in range(3000)]
    assert len(said(strange)) == 3000


def test_of_a_long_history_a_line_or_two_are_held_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    held, most, read = 0, 0, chain._read

    class Line(dict[str, Any]):
        def __init__(self, line: dict[str, Any]) -> None:
            nonlocal held, most
            super().__init__(line)
            held += 1
            most = max(most, held)

        def __del__(self) -> None:
            nonlocal held
            held -= 1

    data, last = b"", ""
    for number in range(100):
        raw, last = chain.written({"n": number}, last)
        data += raw
    monkeypatch.setattr(chain, "_read", lambda raw: Line(found) if (found := read(raw)) else None)
    assert chain.check(data, remembered=last) == ([], last)
    assert most <= 2
