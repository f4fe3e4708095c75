"""Every decoder, fed with bytes that nobody has thought of: it may raise what it declares, and nothing else.

Each target takes any bytes; what it raises is a finding. As a program it searches one of them by coverage, with
atheris (libFuzzer): `python tests/hostile/fuzz.py message -max_total_time=60`. `test_fuzz.py` runs all of them
without it, on mutations drawn from a seed. Does not know what a decoder means, nor queues.
"""

import asyncio
import contextlib
import copy
import importlib.util
import itertools
import json
import logging
import random
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

ROOT = Path(__file__).resolve().parents[2]
SEARCHING = __name__ == "__main__"
if SEARCHING:
    sys.path.insert(0, str(ROOT))
    import atheris

    _instrumented: contextlib.AbstractContextManager[Any] = atheris.instrument_imports(
        include=["broker", "coordinator", "workers"]
    )
else:
    _instrumented = contextlib.nullcontext()

with _instrumented:
    import msgpack
    import numpy as np
    import pamqp.frame
    import tomli_w
    from pamqp import commands
    from xxhash import xxh3_64_digest, xxh3_64_hexdigest

    import coordinator.cli
    from broker import chain, files, frames
    from broker.amqp import Connection
    from broker.changes import apply_change
    from broker.errors import LinkError, UsageError, WireError
    from broker.formats import FORMATS, format_of
    from broker.invitation import Invitation
    from broker.link import Intake
    from broker.messages import (
        Answer,
        Attempt,
        Claim,
        Closed,
        Hello,
        Message,
        Part,
        Payload,
        Score,
        Task,
        Update,
        decode,
        encode,
        part_head,
    )
    from broker.norms import clip
    from broker.parts import Assembly, split
    from broker.pinned import Roster, identity_of, public_of
    from broker.tensors import Layout, TensorSpec
    from coordinator import history, journal, snapshot, standby, updates
    from coordinator import plan as plans
    from coordinator.aggregation import MEAN
    from coordinator.claim import Claim as RunClaim
    from coordinator.claim import read_epoch
    from coordinator.roster import Rests
    from coordinator.snapshot import Snapshot
    from coordinator.store import HISTORY, NOW, Store
    from coordinator.vault import framed, pieces
    from tests.summed import finished
    from workers import journal as kept_updates

    POLICY: Any = importlib.import_module("workers.policy") if importlib.util.find_spec("workers.policy") else None

OF = Attempt("run", 3, 1)
MODEL = Layout.of(
    [
        TensorSpec("w", "float32", (40, 3)), TensorSpec("b", "float16", (5,)), TensorSpec("c", "bfloat16", (3,)),
        TensorSpec("d", "float64", (2,)), TensorSpec("n", "int64", ()), TensorSpec("flag", "bool", (2,)),
    ]
)  # fmt: skip
PLAN = plans.make({"run": "run", "learner": "x", "settings": {"lr": 0.1}})
_PLACE = tempfile.TemporaryDirectory(prefix="fluffle-fuzz-")
FOLDER = Path(_PLACE.name)
SMALL = dict.fromkeys(("mean", "loss"), 0.5)


def _file(name: str, data: bytes) -> Path:
    path = FOLDER / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    path.chmod(0o600)
    return path


# -- what comes over the wire -------------------------------------------------------------------------------------


def message(data: bytes) -> None:
    """What the inbox is sent; whatever can be read can be said again."""
    with contextlib.suppress(WireError):
        found = decode(data)
        if not isinstance(found, Part):
            assert decode(encode(found)) == found


def part(data: bytes) -> None:
    """What an upload queue is sent, looked at before it is all there; it lands in its place or nowhere."""
    payload = Payload("p", 262144, (TensorSpec("w", "uint8", (600_000,)),))
    assembly = Assembly(payload, _ROOM)
    head = part_head(memoryview(data))
    aimed = assembly.aim(memoryview(data), len(data))
    if aimed:
        assert head
        assert len(aimed.place) + aimed.at == len(data)
        return
    with contextlib.suppress(WireError):
        found = decode(data)
        if isinstance(found, Part):
            assembly.add(found)


_ROOM = memoryview(bytearray(600_000))


def amqp(data: bytes) -> None:
    """What a broker sends, once it has let us in, or before; the connection may end of it, and nothing else."""
    _LOOP.run_until_complete(_amqp(data))


async def _amqp(data: bytes) -> None:
    connection = Connection("fuzz")
    if data[:1] > b"\x10":
        connection._numbers = range(1, 9)
        channel = connection.open(prefetch=1)
        consuming = asyncio.ensure_future(channel.consume("q", Intake(), alone=False, aim=_ASSEMBLY.aim))
        await asyncio.sleep(0)
    else:
        consuming = asyncio.ensure_future(connection._channels[0].ask(commands.Channel.Open()))  # type: ignore[arg-type]
    at = 1
    while at < len(data) and connection.alive:
        room = connection.get_buffer(-1)
        step = min(len(room), len(data) - at, 1 + data[0] * 3)
        room[:step] = data[at : at + step]
        connection.buffer_updated(step)
        at += step
    connection.abort("the end")
    for each in (consuming, connection.lost):
        each.cancel()
    with contextlib.suppress(asyncio.CancelledError, LinkError, WireError, Exception):
        await consuming


_LOOP = asyncio.new_event_loop()
_ASSEMBLY = Assembly(Payload("p", 262144, (TensorSpec("w", "uint8", (600_000,)),)), _ROOM)


def _formats() -> Iterator[tuple[str, Any]]:
    for name in FORMATS:
        yield name, format_of(name, keep=0.2)


def numbers(data: bytes) -> None:
    """An upload whose parts are all there: it is added or refused, and what comes of it is finite."""
    name, fmt = list(_formats())[data[0] % 4 if data else 0]
    payload = memoryview(bytearray(data[3:].ljust(fmt.layout(MODEL).size_bytes, b"\0")))
    payload = payload[: fmt.layout(MODEL).size_bytes]
    bound = 2.0 ** (data[1] % 40 - 20) if data[1:2] > b"\x40" else 0.0
    sums = MEAN.init(MODEL, fmt, clip=bound)
    with np.errstate(all="raise", under="ignore", over="ignore", invalid="ignore"), contextlib.suppress(WireError):
        if bound and data[1] % 2:
            for run in fmt.runs(MODEL, payload):
                if not np.isfinite(run.values).all():
                    return
            clip(fmt, MODEL, payload, bound)
        MEAN.add(sums, 1 + data[2] if len(data) > 2 else 1, payload)
        assert sums.updates == 1
        finished(MEAN, sums, memoryview(bytes(MODEL.size_bytes)))
        if name in ("bfloat16", "int8"):
            apply_change(
                memoryview(bytes(MODEL.size_bytes)), payload, MODEL, fmt, memoryview(bytearray(MODEL.size_bytes))
            )


def roster(data: bytes) -> None:
    """The operator's roster, as a coordinator shows it."""
    with contextlib.suppress(UsageError):
        found = Roster.parse(data)
        assert Roster.parse(found.text) == found
        found.check()


# -- what lies on the disk ----------------------------------------------------------------------------------------


def plan(data: bytes) -> None:
    """`plan.toml`."""
    with contextlib.suppress(UsageError):
        found = plans.read(_file("plan.toml", data))
        assert plans.read(_file("again.toml", plans.to_toml(found))) == found


def invitation(data: bytes) -> None:
    """`NAME.fluffle`."""
    with contextlib.suppress(UsageError):
        Invitation.read(_file("x.fluffle", data))


def policy(data: bytes) -> None:
    """`policy.toml`."""
    with contextlib.suppress(UsageError):
        POLICY.read(_file("policy.toml", data))


def past(data: bytes) -> None:
    """`history.jsonl`, as a coordinator, `status`, `verify` and `replay` read it; and what lies beside it."""
    store = Store(FOLDER / "past", PLAN)
    _file(f"past/{HISTORY}", data)
    chain.check(data)
    lines = [*store.history()]
    made = history.rounds(lines)
    for number in [*made, 0]:
        history.checksum_of(made, number)
    for point in history.curve(lines):
        coordinator.cli._metrics(point.scored)
        [coordinator.cli._metrics(each) for each in point.held_out.values()]
    history.last_abandoned(lines)
    list(coordinator.cli._said_before(lines))
    Rests().remember(lines)
    with (FOLDER / "past" / HISTORY).open("ab+") as file:
        chain.Chain().append(file, {"event": "round"})
    _file(f"past/{NOW}", data)
    store.now()
    _file(f"past/{standby.WAITS}", data)
    standby.waiting(FOLDER / "past")
    _file("past/epoch", data)
    read_epoch(FOLDER / "past")


def round_(data: bytes) -> None:
    """`round.json`, damaged, or with a checksum that fits."""
    for raw in (data, _checked(data)):
        _file(f"open/{journal.FILE}", raw)
        found = journal.Journal(FOLDER / "open", lambda *_: None)
        found.resume(3, "x")
        for line in found.lines():
            assert isinstance(line, dict)
        found.begin(3, "x", ("a",), 1.0)


def _checked(data: bytes) -> bytes:
    try:
        tries = json.loads(data)["tries"]
        digest = xxh3_64_hexdigest(json.dumps(tries, sort_keys=True).encode())
        return json.dumps({"check": digest, "tries": tries}).encode()
    except (ValueError, KeyError, TypeError, RecursionError):
        return data


def sums(data: bytes) -> None:
    """`round.sums`, damaged, or with a checksum that fits."""
    total = MEAN.init(MODEL, FORMATS["float32"])
    there = Snapshot(FOLDER / "sums", RunClaim(FOLDER / "sums"))
    for raw in (data, b"".join(framed(data))):
        _file(f"sums/{snapshot.FILE}", raw)
        there.read(["run", 3], total)


def kept(data: bytes) -> None:
    """A worker's finished update of an earlier process, damaged, or with a checksum that fits."""
    for raw in (data, xxh3_64_digest(data) + data):
        _file("kept/ada.run.3.1.update", raw)
        for found in kept_updates.all_kept(FOLDER / "kept"):
            assert found.until > 0
            assert found.task.format in FORMATS


def version(data: bytes) -> None:
    """A version, or an update that the coordinator keeps: a safetensors file."""
    with contextlib.suppress(UsageError):
        files.read_version(_file("x.safetensors", data))
    with contextlib.suppress(UsageError):
        _file("run/updates/000003/ada.update", data)
        updates.read(FOLDER / "run", 3, "ada")


# -- where the search begins --------------------------------------------------------------------------------------


def _messages() -> Iterator[Message]:
    payload = Payload("run/3/1/1", 262144, MODEL.specs)
    yield Hello("ada", "1", "x", True, 5.0, OF)
    yield Task(OF, "train", 2, 9.0, 1, {"lr": 0.1, "n": 3, "b": True, "s": "x"}, payload)
    yield Update(OF, "ada", 2, 7, SMALL, payload)
    yield Score(OF, "ada", 2, SMALL)
    yield Claim(OF, "ada", "1")
    yield Answer(OF, "resend", "3 parts are missing", 4)
    yield Closed(OF, "x")
    yield from split(Payload("p", 262144, (TensorSpec("w", "uint8", (50,)),)), memoryview(bytes(50)))


def _frames() -> Iterator[bytes]:
    def framed(method: Any, channel: int = 1) -> bytes:
        return pamqp.frame.marshal(method, channel)

    body = encode(Closed(OF, "x"))
    head = frames.header(1, len(body), frames.properties((), (), persistent=False), "id.1")
    message_ = head + b"".join(frames.body(1, (body,), len(body), 4096))
    deliver = framed(commands.Basic.Deliver("1.1", 7, False, "fluffle.up", "inbox.run.ada"))
    yield b"\xff" + framed(commands.Channel.OpenOk()) + framed(commands.Basic.QosOk()) + framed(
        commands.Basic.ConsumeOk("1.1")
    ) + deliver + message_  # fmt: skip
    yield b"\x20" + deliver + message_ + framed(commands.Basic.Cancel("1.1", True))
    yield b"\x80" + framed(commands.Channel.Close(404, "NOT_FOUND", 60, 40))
    yield b"\xff" + framed(commands.Basic.Return(312, "NO_ROUTE", "fluffle.up", "x")) + message_
    yield b"\xff" + framed(commands.Basic.Ack(1, True)) + framed(commands.Basic.Nack(2))
    yield b"\x01" + framed(commands.Connection.Start(0, 9, {"product": "RabbitMQ"}, "PLAIN", "en_US"), 0)
    yield b"\x10" + framed(commands.Connection.Tune(9, 4096, 30), 0) + framed(commands.Connection.Blocked("disk"), 0)
    yield b"\x10" + framed(commands.Connection.Close(320, "bye", 0, 0), 0) + b"\x08\0\0\0\0\0\0\xce"


def _lines() -> bytes:
    told = {
        "event": "round", "round": 3, "attempt": 1, "version": 3, "at": 1.5, "why": "x", "cohort": ["ada", "bob"],
        "counted": {"ada": {"examples": 3, "metrics": SMALL}}, "refused": {"bob": "no"}, "failed": {"bob": "no"},
        "others": [{"worker": "eve", "verdict": "late", "reason": "x", "times": 2}],
        "struck": {"eve": {"times": 3, "why": "x"}}, "rested": {"eve": {"rounds": 2, "why": "x"}}, "metrics": SMALL,
        "scored": SMALL, "seconds": 1.0, "bytes_down": 3, "bytes_up": 4, "weights": "00", "updates": {"ada": "00"},
    }  # fmt: skip
    lines = [
        told, {**told, "event": "abandoned"}, history.score_line(3, "eve", SMALL, at=1.0),
        history.final_line(3, {"ada": SMALL}, seconds=1.0, at=1.0),
    ]  # fmt: skip
    raw, before = b"", ""
    for line in lines:
        one, before = chain.written(line, before)
        raw += one
    return raw


def _saved() -> Iterator[bytes]:
    about = {"fluffle_run": "run", "worker": "ada", "round": "3", "attempt": "1", "examples": "3", "check": "00"}
    path = FOLDER / "seed"
    files.draft_version(path, MODEL, files.in_order([memoryview(bytes(MODEL.size_bytes))]), about)
    files.seal(path, durable=False)
    yield path.read_bytes()


def _sums() -> Iterator[bytes]:
    total = MEAN.init(MODEL, FORMATS["float32"])
    MEAN.add(total, 3, memoryview(bytes(MODEL.size_bytes)))
    tally = {"counted": {"ada": 3}, "refused": {}, "trained": {}, "scored": {}, "others": []}
    yield b"".join(itertools.chain(*map(framed, snapshot._pieces(["run", 3], tally, total))))


def _kept() -> Iterator[bytes]:
    update = encode(Update(OF, "ada", 2, 7, SMALL, Payload("run/3/1/1/ada/0", 262144, MODEL.specs)))
    task = encode(Task(OF, "train", 2, 9.0, 1, {"lr": 0.1}, Payload("run/3/1/1", 262144, MODEL.specs)))
    record = {"task": task, "update": update, "score": encode(Score(OF, "ada", 2, SMALL)), "until": 9e9, "model": b""}
    yield msgpack.packb({**record, "delta": ["0.models", 0, 3, b"12345678"]})


def _tries() -> Iterator[bytes]:
    one = {"round": 3, "attempt": 1, "plan": "x", "cohort": ["ada"], "until": 9e9, "line": None}
    yield json.dumps({"check": "", "tries": [one, {**one, "round": 2, "line": {"version": 2, "round": 2}}]}).encode()


def _invited() -> Iterator[bytes]:
    pem = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
    values = {"format": 1, "name": "ada", "role": "worker", "broker": "amqps://h:5671/v", "password": "x"}
    yield tomli_w.dumps(
        {**values, "ca": pem, "certificate": pem, "key": pem, "operator": "", "identity": ""}
    ).encode()


def _signed() -> Iterator[bytes]:
    made = Roster({"ada": public_of(identity_of("ab" * 32)), "bob": b"b" * 32}, 0)
    yield from (made.text, made.signed(identity_of("cd" * 32)).text)


def _toml(data: bytes) -> Any:
    return tomllib.loads(data.decode())


def _dumped(found: Any) -> bytes:
    return tomli_w.dumps(found).encode()


def _rows(data: bytes) -> Any:
    return [json.loads(row) for row in data.splitlines()]


def _head(data: bytes) -> Any:
    """A file that begins with the length of some JSON: that, and the rest."""
    size = int.from_bytes(data[:8], "little")
    return [json.loads(data[8 : 8 + size]), data[8 + size :].hex()]


def _headed(found: Any) -> bytes:
    text = _json(found[0])
    return len(text).to_bytes(8, "little") + text + bytes.fromhex(found[1])


def _unframed(data: bytes) -> Any:
    """What was framed: some JSON, and the rest."""
    head, *others = map(bytes, pieces(memoryview(data)))
    return [json.loads(head), *(each.hex() for each in others)]


def _framed(found: Any) -> bytes:
    return b"".join(itertools.chain(*map(framed, [_json(found[0]), *map(bytes.fromhex, found[1:])])))


def _json(data: Any) -> bytes:
    return json.dumps(data).encode()


class Kind(NamedTuple):
    """A decoder, bytes that it can read, and how they can be taken apart and put together again, where they can."""

    target: Callable[[bytes], None]
    seeds: Callable[[], Iterable[bytes]]
    unpack: Callable[[bytes], Any] | None = None
    pack: Callable[[Any], bytes] = _json


TARGETS: dict[str, Kind] = {
    "message": Kind(message, lambda: [encode(each) for each in _messages()], msgpack.unpackb, msgpack.packb),
    "part": Kind(part, lambda: [encode(each) for each in _messages()], msgpack.unpackb, msgpack.packb),
    "amqp": Kind(amqp, _frames),
    "numbers": Kind(numbers, lambda: [bytes([n, m, 9]) + bytes(range(256)) * 4 for n in range(4) for m in (0, 99)]),
    "plan": Kind(plan, lambda: [plans.to_toml(PLAN)], _toml, _dumped),
    "past": Kind(past, lambda: [_lines()], _rows, lambda rows: b"\n".join(map(_json, rows)) + b"\n"),
    "round": Kind(round_, _tries, json.loads),
    "sums": Kind(sums, _sums, _unframed, _framed),
    "kept": Kind(kept, _kept, msgpack.unpackb, msgpack.packb),
    "version": Kind(version, _saved, _head, _headed),
    "invitation": Kind(invitation, _invited, _toml, _dumped),
    "roster": Kind(roster, _signed, json.loads),
}
if POLICY is not None:
    TARGETS["policy"] = Kind(policy, lambda: [b'hours = ["22:00-06:30"]\ncohort_min = 3\n'], _toml, _dumped)

_SPLICES = (
    b"\xff" * 8, b"\0" * 8, b"\x7f" + b"\xff" * 7, b"\x80" + b"\0" * 7, b"\xdd\xff\xff\xff\xff",
    b"\xc6\xff\xff\xff\xff",
    b"\x91" * 300, b"[" * 2000, b'{"a":' * 500, b"null", b"true", b"-1", b"1e999", b"9" * 5000, b"[]", b"{}", b'""',
    b"\x1b[2J", b"\xed\xa0\x80", b"\xc0", b"\xc1", b"\xcf" + b"\xff" * 8, b"\xd3\x80" + b"\0" * 7, b"\n", b"\xc2\x85",
    b"\xcb\x7f\xf8" + b"\0" * 6,
)  # fmt: skip


_ODD: tuple[Any, ...] = (
    None, True, -1, 0, 1.5, 2**53 + 1, 2**63 - 1, -(2**63), 1e308, float("nan"), float("inf"), "", "x" * 5000,
    "\x1b[2J",
    "../../x", "0", [], {}, [[]], {"": {}}, [1, "a", None], {"version": "x"}, ["ada"], "float32", "int8", "NaN",
)  # fmt: skip


def mutations(kind: Kind, count: int, *, seed: int = 1) -> Iterator[bytes]:
    """The seeds, and so many variants of them, drawn from another seed."""
    dice, seeds = random.Random(seed), list(kind.seeds())
    yield from (b"", *seeds)
    for _ in range(count):
        data = dice.choice(seeds)
        yield (kind.unpack and dice.random() < 0.6 and _reshaped(kind, data, dice)) or _bent(data, dice)


def _bent(start: bytes, dice: random.Random) -> bytes:
    """Bits turned, bytes cut, doubled and moved, and what has broken decoders before spliced in."""
    data = bytearray(start)
    for _ in range(dice.choice((1, 1, 2, 5))):
        at, stop = sorted(dice.randrange(len(data) + 1) for _ in range(2))
        match dice.randrange(6):
            case 0 if at < len(data):
                data[at] ^= 1 << dice.randrange(8)
            case 1:
                del data[at : min(stop, at + 16)]
            case 2:
                del data[stop:]
            case 3:
                data[at:at] = data[at : min(stop, at + 64)]
            case 4:
                data[at:at] = dice.choice(_SPLICES)
            case _:
                piece = dice.choice(_SPLICES)
                data[at : at + len(piece)] = piece
    return bytes(data)


def _reshaped(kind: Kind, data: bytes, dice: random.Random) -> bytes | None:
    """What the bytes say, with something else in some places, or nothing; None where they say nothing."""
    assert kind.unpack
    with contextlib.suppress(Exception):
        found = kind.unpack(data)
        for _ in range(dice.choice((1, 1, 2, 4))):
            places = [*_places(found)]
            where, key = dice.choice(places)
            if dice.random() < 0.2:
                del where[key]
            else:
                whence, other = dice.choice(places)
                where[key] = dice.choice(_ODD) if dice.random() < 0.8 else copy.deepcopy(whence[other])
        return kind.pack(found)
    return None


def _places(found: Any) -> Iterator[tuple[Any, Any]]:
    """Every key of a map and index of a list in a tree."""
    for key in list(found) if isinstance(found, dict) else range(len(found)) if isinstance(found, list) else ():
        yield found, key
        yield from _places(found[key])


def search() -> None:
    """Search a target by coverage until libFuzzer's own options say that it is enough; a finding ends the process."""
    name, *options = sys.argv[1:]
    kind = TARGETS[name]
    logging.disable(logging.CRITICAL)

    def mutate(data: bytes, size_max: int, seed: int) -> bytes:
        dice = random.Random(seed)
        if kind.unpack and dice.random() < 0.5 and (reshaped := _reshaped(kind, data, dice)):
            return reshaped[:size_max]
        return cast("bytes", atheris.Mutate(data, size_max))

    corpus = FOLDER / "corpus"
    corpus.mkdir()
    for number, data in enumerate(kind.seeds()):
        (corpus / str(number)).write_bytes(data)
    atheris.Setup(
        [sys.argv[0], *options, "-timeout=20", "-rss_limit_mb=1500", str(corpus)], kind.target, custom_mutator=mutate
    )
    atheris.Fuzz()


if SEARCHING:
    search()
