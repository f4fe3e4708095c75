"""Decoders, fed with what nobody has thought of: a few seconds here, ten minutes by coverage in `make chaos`.

What either has found stays as a case with a name.
"""

import logging
import resource
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.hostile import fuzz

SEARCH_S = 600
VARIANTS = {"past": 100, "plan": 100, "sums": 200, "round": 150, "version": 150, "kept": 200, "invitation": 100}
FOUND = {
    "a plan nested too deep": ("plan", b"settings.x = " + b"[" * 5000),
    "a plan with a number of 5000 digits": ("plan", b"rounds = " + b"9" * 5000),
    "an invitation nested too deep": ("invitation", b"name = " + b"[" * 5000),
    "an invitation with a number of 5000 digits": ("invitation", b"format = " + b"9" * 5000),
    "a journal nested too deep": ("round", b'{"check": "", "tries": ' + b"[" * 100_000),
    "a journal whose attempt is text": (
        "round",
        b'{"tries": [{"round": 3, "attempt": "1", "plan": "x", "cohort": ["a"], "until": 1.0, "line": null}]}',
    ),
    "a journal whose line is none": (
        "round",
        b'{"tries": [{"round": 3, "attempt": 1, "plan": "x", "cohort": ["a"], "until": 1.0, "line": [1]}]}',
    ),
    "sums whose head is nested too deep": ("sums", b"[" * 100_000),
    "sums of a type that only a parser knows": ("sums", b"TYPE"),
    "a history with half a pair of surrogates as its chain": (
        "past",
        b'{"chain": "\\ud800", "event": "round"}\n' * 2,
    ),
    "a round without a version": ("past", b'{"event": "round", "scored": {}}\n'),
    "a score without metrics": ("past", b'{"event": "score", "version": 1}\n'),
    "metrics that are no numbers": ("past", b'{"event": "final", "version": 1, "scored": {"loss": "x"}}\n'),
    "a refusal without a round": ("past", b'{"event": "round", "refused": {"a": "x"}}\n'),
    "a verdict without a reason": ("past", b'{"event": "round", "others": [{"worker": "a", "verdict": "late"}]}\n'),
    "a strike without a number": ("past", b'{"counted": {}, "failed": {}, "struck": {"a": {"why": "x"}}}\n'),
    "what happens now, nested too deep": ("past", b"[" * 100_000),
    "a kept update of an unknown format": ("kept", b"FORMAT"),
    "a kept update that waits until text": ("kept", b"UNTIL"),
    "a kept update at a place before the file": ("kept", b"BEFORE"),
    "a kept update at a place beyond all files": ("kept", b"BEYOND"),
    "a routing key that is no text": ("amqp", b"ROUTING"),
}


def case(data: bytes) -> bytes:
    """The bytes of a case; of those that are packed, from its word."""
    import msgpack

    record = msgpack.unpackb(next(iter(fuzz.TARGETS["kept"].seeds())))
    match data:
        case b"FORMAT":
            record["task"] = record["task"].replace(b"float32", b"float3z")
        case b"UNTIL":
            record["until"] = "tomorrow"
        case b"BEFORE":
            record["delta"][1:3] = [-1, 4]
        case b"BEYOND":
            record["delta"][1:3] = [2**63, 2**62]
        case b"TYPE":
            kind = fuzz.TARGETS["sums"]
            assert kind.unpack
            head = kind.unpack(next(iter(kind.seeds())))
            head[0]["others"] = [[0, ",09", 8]]
            return kind.pack(head)
        case b"ROUTING":
            first = next(iter(fuzz.TARGETS["amqp"].seeds()))
            return first.replace(b"inbox.run.ada", b"inbox.run.\xff\xfe\xfd")
        case _:
            return data
    packed: bytes = msgpack.packb(record)
    return packed


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize(("target", "data"), list(FOUND.values()), ids=list(FOUND))
def test_what_was_found_is_found_no_more(target: str, data: bytes) -> None:
    fuzz.TARGETS[target].target(case(data))


@pytest.mark.parametrize("target", list(fuzz.TARGETS))
def test_a_decoder_raises_what_it_declares_and_nothing_else(target: str) -> None:
    kind = fuzz.TARGETS[target]
    for data in fuzz.mutations(kind, VARIANTS.get(target, 600), seed=20):
        try:
            kind.target(data)
        except Exception as problem:
            raise AssertionError(f"{target} fails on {data[:2000]!r}") from problem


def test_a_key_that_is_no_text_is_a_key_all_the_same() -> None:
    """It would end the connection, and come again on the next one, and end that."""
    from broker import frames

    payload = b"\0\x3c\0\x3c" + b"\x031.1" + bytes(7) + b"\x09\0" + b"\x0afluffle.up" + b"\x04a.\xff\xfe"
    assert frames.deliver(payload) == frames.Deliver("1.1", 9, "a.\\xff\\xfe")


@pytest.mark.chaos
@pytest.mark.timeout(SEARCH_S)
@pytest.mark.skipif(find_spec("atheris") is None, reason="atheris searches by coverage, and is not installed")
@pytest.mark.parametrize("target", list(fuzz.TARGETS))
def test_a_search_by_coverage_finds_nothing(target: str, tmp_path: Path) -> None:
    """All targets together take ten minutes; no more than 1 GB may be taken."""
    seconds = SEARCH_S // len(fuzz.TARGETS)
    done = subprocess.run(
        [sys.executable, fuzz.__file__, target, f"-max_total_time={seconds}", f"-artifact_prefix={tmp_path}/"],
        capture_output=True, check=False, timeout=seconds + 60,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (2**30, 2**30)),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:].decode(errors="replace")
