"""A log as a chain: every line vouches for all that stand before it, so none can be changed without a trace.

Knows how a line is written, and what has become of lines that were written so: a run's history, a worker's ledger.
Does not know what a line says.

A line's `chain` is the hex SHA-256 of the chain before it (nothing before the first) and of the line itself without
`chain`. A line is written in one way only, as JSON with sorted keys and without spaces, so that no other byte of it
can be changed either.

A power failure may tear the last line. The next one to be written stands on a line of its own, goes on from the last
that is whole, and carries `after_torn`: the SHA-256 of what it found between the two. That tells what was torn from
what was spoilt afterwards, for which no line vouches.

What a chain cannot tell: that its end was cut off (a run's versions will miss their lines), or that everything from
some line on was written anew. Against that, keep the last chain elsewhere: `fluffle verify` and `fluffle ledger
--verify` print it, and take it back.
"""

import json
import os
from collections.abc import Mapping
from hashlib import sha256
from typing import IO, Any, NamedTuple

CHAIN, AFTER_TORN = "chain", "after_torn"
TAIL_BYTES = 64 * 1024


class Finding(NamedTuple):
    """Something that a reader should know; `bad`: it is not as it was written."""

    said: str
    bad: bool = True


class Chain:
    """The end of one file, remembered from line to line. Nobody else writes to it meanwhile."""

    def __init__(self) -> None:
        self._end = -1  # where the file ended when we left it
        self._last = ""

    def append(self, file: IO[bytes], line: Mapping[str, Any]) -> None:
        """Write a line behind all others; `file` is open to be read and appended to.

        Raises:
            ValueError: the line holds a number that JSON does not have; nothing is written then.
        """
        end, torn, lead = file.seek(0, os.SEEK_END), b"", b""
        if end != self._end:
            self._last, torn, lead = _tail(file, end)
        raw, last = written(line, self._last, torn=torn)
        self._end = -1  # should this fail, look again
        file.write(lead + raw)
        file.flush()
        self._end, self._last = end + len(lead) + len(raw), last


def written(line: Mapping[str, Any], before: str, *, torn: bytes = b"") -> tuple[bytes, str]:
    """A line as it is written behind the chain `before`, with its newline, and its own chain.

    Args:
        line: what is to be said.
        before: the chain of the line before; empty for the first.
        torn: what lies between the two, newlines included.
    """
    whole = bare(line)
    if torn:
        whole[AFTER_TORN] = sha256(torn).hexdigest()
    chain = _chain(whole, before)
    return _canonical(whole | {CHAIN: chain}) + b"\n", chain


def bare(line: Mapping[str, Any]) -> dict[str, Any]:
    """What a line says, without what makes it a link of the chain."""
    return {key: value for key, value in line.items() if key not in (CHAIN, AFTER_TORN)}


def check(data: bytes, name: str = "history", *, remembered: str = "") -> tuple[list[Finding], str]:
    """What is to be said of a whole file's bytes, and its last chain.

    Args:
        data: all of it.
        name: what it is called in what is said.
        remembered: a chain that was printed before; it must still be there.
    """
    findings: list[Finding] = []
    before, last, torn, met = "", 0, bytearray(), not remembered
    whole, raws = not data or data.endswith(b"\n"), data.split(b"\n")
    for number, raw in enumerate(raws[:-1] if whole else raws, 1):
        line = _read(raw)
        if line is None:
            torn += raw + b"\n"
            continue
        findings += _between(last, number, torn, line)
        if raw != _canonical(line):
            findings.append(Finding(f"line {number} of the history was changed: it is not written as lines are."))
        if line[CHAIN] != _chain({key: line[key] for key in line if key != CHAIN}, before):
            findings.append(_misplaced(number, last))
        before, last, torn, met = line[CHAIN], number, bytearray(), met or line[CHAIN] == remembered
    if torn:
        findings.append(_left(last, torn, whole=whole))
    if not met:
        findings.append(Finding(f"no line of the history has the chain {remembered}: it was written anew since."))
    return [found._replace(said=found.said.replace("history", name)) for found in findings], before


def _misplaced(number: int, last: int) -> Finding:
    """Of a line that does not follow the one before it."""
    place, other = (f"line {last}", "that one was, or ") if last else ("the beginning", "")
    return Finding(
        f"line {number} of the history does not follow from {place}: it was changed, or {other}a line between them "
        "was removed, or lines were inserted there or swapped."
    )


def _between(last: int, number: int, torn: bytearray, line: Mapping[str, Any]) -> list[Finding]:
    """What stands between two lines without being one, and whether the second vouches for it."""
    vouched = line.get(AFTER_TORN)
    if not torn:
        lost = "a torn line before it, which was removed."
        return [Finding(f"line {number} of the history vouches for {lost}")] if vouched is not None else []
    if vouched == sha256(torn).hexdigest():
        where = _lines(last + 1, number - 1)
        return [Finding(f"{where} torn, as by a power failure; line {number} vouches for that.", bad=False)]
    return [
        Finding(
            f"{_lines(last + 1, number - 1)} changed or inserted: no line of this history reads so, "
            f"and line {number} knows nothing of it."
        )
    ]


def _left(last: int, torn: bytearray, *, whole: bool) -> Finding:
    """What stands behind the last line; a line that was torn has no end."""
    where = _lines(last + 1, last + torn.count(b"\n"))
    if whole:
        return Finding(f"{where} changed or added at the end: no line of this history reads so.")
    return Finding(f"{where} torn, as by a power failure; the next line will vouch for that.", bad=False)


def _lines(first: int, last: int) -> str:
    return f"line {first} was" if first == last else f"lines {first} to {last} were"


def _tail(file: IO[bytes], end: int) -> tuple[str, bytes, bytes]:
    """The last chain of a file, what lies behind that line, and what must come before another line."""
    size = TAIL_BYTES
    while True:
        start = max(0, end - size)
        file.seek(start)
        data = file.read(end - start)
        lead = b"" if not data or data.endswith(b"\n") else b"\n"
        stop = len(data)
        while stop >= 0:
            cut = data.rfind(b"\n", 0, stop)
            if cut < 0 < start:
                break  # this line begins further up
            if line := _read(data[cut + 1 : stop]):
                torn = data[stop + 1 :]
                return line[CHAIN], torn + lead if torn else b"", lead
            stop = cut
        if not start:
            return "", data + lead, lead
        size *= 8


def _read(raw: bytes) -> dict[str, Any] | None:
    """A line of the chain; None for whatever is none."""
    try:
        line = json.loads(raw)
        _canonical(line)  # what can be read and not written again is none of ours
    except (ValueError, RecursionError):
        return None
    chained = isinstance(line, dict) and isinstance(line.get(CHAIN), str) and line[CHAIN].isascii()
    return line if chained and line[CHAIN].isalnum() else None


def _chain(line: Mapping[str, Any], before: str) -> str:
    return sha256(before.encode() + _canonical(line)).hexdigest()


def _canonical(line: Mapping[str, Any]) -> bytes:
    return json.dumps(line, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
