"""Every message that crosses the wire: frozen dataclasses, and the two functions that pack and check them.

Knows the protocol's fields, limits and version; `PROTOCOL.md` beside this file is the same in words, and a test
holds the two together. Does not know queues, clocks, rounds' rules or what a tensor's bytes mean.

The decoder trusts nothing: msgpack under limits, then every field against the dataclass's own annotations.
"""

import struct
from dataclasses import astuple, dataclass, field, replace
from itertools import count
from typing import Annotated, Any, Literal, cast, get_args

import msgpack

from broker import pact
from broker.errors import WireError
from broker.fields import NAME, Within, build, in_short, shown
from broker.tensors import TENSORS_MAX, Layout, TensorSpec, described

PROTOCOL = 1
MESSAGE_BYTES_MAX = 4 * 1024 * 1024  # anything but a part: a header of 20,000 tensors with long names still fits
PART_BYTES_MIN, PART_BYTES_MAX = 256 * 1024, 3584 * 1024  # RabbitMQ treats messages from 4,000,000 bytes up apart
TEXT_MAX, KEY_MAX, MAP_MAX = 4096, 200, 512
PART_HEAD_MAX = 4 * TEXT_MAX + 1024
COLLECTIONS_MAX = 2 * TENSORS_MAX + 64  # a tensor is a map with a list in it; empty maps cost 100 times their bytes
BIN_32 = 0xC6  # msgpack's mark of bytes whose length has 32 bits
PART_BEGINS = b"\x86\xa1v\x01\xa4kind\xa4part"
"""How a part begins that `encode_part` has packed: its data comes last, and need not be copied to be read."""
_BIN = struct.Struct(">BI")
_LIMITS = {
    "max_str_len": TEXT_MAX * 4, "max_bin_len": PART_BYTES_MAX, "max_array_len": TENSORS_MAX, "max_map_len": MAP_MAX,
    "max_ext_len": 0,
}  # fmt: skip
COUNT_MAX, CLIP_MAX = 2**53, 1e9

Name = Annotated[str, NAME]
Text = Annotated[str, Within(0, TEXT_MAX)]
Digest = Annotated[str, Within(0, 64)]
Count = Annotated[int, Within(0, COUNT_MAX)]
Serial = Annotated[int, Within(0, 2**32 - 1)]  # more would be another attempt's, to those who sign attempt and serial
Seconds = Annotated[float, Within(0, 366 * 24 * 3600)]
EXAMPLES_MAX = 2**29 - 1  # so that examples × a float32 is exact in float64 (see the sum in ARCHITECTURE.md)
Examples = Annotated[int, Within(1, EXAMPLES_MAX)]
Key = Annotated[str, Within(0, KEY_MAX)]
Scalar = bool | int | float | str
Buffer = bytes | bytearray | memoryview
Value = bool | int | float | Text
Settings = Annotated[dict[Key, Value], Within(0, MAP_MAX)]
Metrics = Annotated[dict[Key, float], Within(0, MAP_MAX)]  # finite: `fields` sees to it


@dataclass(frozen=True, slots=True)
class Payload:
    """What a run of parts is: who to ask for by `id`, how it was cut, and the tensors in it."""

    id: Text
    part_bytes: Annotated[int, Within(PART_BYTES_MIN, PART_BYTES_MAX)]
    tensors: Annotated[tuple[TensorSpec, ...], Within(0, TENSORS_MAX)]

    @property
    def layout(self) -> Layout:
        """The tensors' places; checked when the message was decoded."""
        return Layout(self.tensors)


@dataclass(frozen=True, slots=True)
class Attempt:
    """Which try at which round of which run; round n makes version n."""

    run: Name
    round: Count
    attempt: Count

    def __str__(self) -> str:
        return f"round {self.round}" + (f", attempt {self.attempt}" if self.attempt > 1 else "")


@dataclass(frozen=True, slots=True)
class Secure:
    """Within a task: its update is only added up in secret, in words of `bits`, of `cohort` on `roster` at most."""

    bits: Annotated[int, Within(32, 64)]
    cohort: Annotated[int, Within(pact.COHORT_MIN, pact.COHORT_MAX)]
    roster: pact.Digest = bytes(32)  # see `pact.roster_digest`
    shown: Annotated[bytes, Within(0, 2**21)] = b""  # its file, for those who may not have seen it; else empty


@dataclass(frozen=True, slots=True)
class Noise:
    """Noise that a worker is to add: standard deviation `multiplier` · `clip`; what it hides is at most `clip` long.

    `of`: to every step's gradient, of which a row's share is that long, or to the masked sum, whose noise is that of
    `least` workers: nobody helps to reveal one of fewer. The worker refuses what would bring its ε above `budget`.
    """

    of: Literal["row", "sum"]
    multiplier: Annotated[float, Within(0, 1e6)]
    clip: Annotated[float, Within(0, CLIP_MAX)]
    delta: Annotated[float, Within(0, 1)]
    budget: Annotated[float, Within(0, 1e6)]
    least: Annotated[int, Within(0, pact.COHORT_MAX)] = 0


@dataclass(frozen=True, slots=True)
class Hello:
    """Worker → every coordinator: I am here until the lease ends.

    A new `incarnation` says that whatever was sent to the former one is lost: send it again.
    """

    worker: Name
    incarnation: Text
    learner: Text
    trains: bool
    lease_s: Seconds
    doing: Attempt | None = None


@dataclass(frozen=True, slots=True)
class Goodbye:
    """Worker → every coordinator: I leave now, do not wait for me."""

    worker: Name
    reason: Text


@dataclass(frozen=True, slots=True)
class Task:
    """Coordinator → cohort: the header of a train or evaluate task; its parts follow in the same queue.

    A worker that only evaluates answers a train task with a `Score`. `seed` and the worker's name make the learner's
    dice, so that the same task trained twice gives the same update. `format` and, for top-k, `keep` say how that is
    to be written; its norm is at most `clip`, unless that is 0, and its `examples` are `examples_max` where they were
    more. The payload holds the version's weights if `down` is `full`, else its change, in that format, from the
    version before, which everyone has claimed to whom this is sent. `cohort` is how many are asked at the same time.
    Unless empty, `contract` and `learner_file` say what the learner must be (`broker/contract.py`).
    """

    of: Attempt
    work: Literal["train", "evaluate"]
    version: Count
    deadline_s: Seconds
    seed: Count
    settings: Settings
    payload: Payload
    format: Literal["float32", "bfloat16", "int8", "top-k"] = "float32"
    keep: Annotated[float, Within(0, 1)] = 1.0
    down: Literal["full", "bfloat16", "int8"] = "full"
    epoch: Count = 0
    clip: Annotated[float, Within(0, CLIP_MAX)] = 0.0
    examples_max: Examples = EXAMPLES_MAX
    cohort: Count = 0
    contract: Digest = ""
    learner_file: Digest = ""
    noise: Noise | None = None
    secure: Secure | None = None

    @property
    def terms(self) -> bytes:
        """What both sides of a secure round must agree upon beside run, round and model, written in one way only."""
        terms = [self.version, self.seed, sorted(self.settings.items()), self.format, self.clip, self.examples_max]
        secure = (self.secure.bits, self.secure.cohort) if self.secure else ()
        return bytes(msgpack.packb([*terms, *secure, *(astuple(self.noise) if self.noise else ())]))


@dataclass(frozen=True, slots=True)
class Claim:
    """Worker → coordinator: the task is complete here and work begins; its copy in the queue may go."""

    of: Attempt
    worker: Name
    incarnation: Text


@dataclass(frozen=True, slots=True)
class Score:
    """Worker → coordinator: what the learner's `evaluate` said of a version on this worker's data."""

    of: Attempt
    worker: Name
    version: Count
    metrics: Metrics


@dataclass(frozen=True, slots=True)
class Update:
    """Worker → coordinator: all parts of my delta are in my upload queue.

    `examples` is how many rows it learned from; `metrics` is the learner's own report. Floats are deltas (trained −
    received); integers and booleans are the trained values (DESIGN §6). `within`: it was no longer than the task's
    clip before it was scaled down.
    """

    of: Attempt
    worker: Name
    version: Count
    examples: Examples
    metrics: Metrics
    payload: Payload
    within: bool = True


@dataclass(frozen=True, slots=True)
class Refusal:
    """Worker → coordinator: this task cannot be done here, because.

    `declined`: the data's owner does not allow it, which is no failure of the worker's.
    """

    of: Attempt
    worker: Name
    reason: Text
    declined: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    """Coordinator → worker: what became of your update, or that its parts must be sent again."""

    of: Attempt
    verdict: Literal["accepted", "late", "stranger", "duplicate", "invalid", "resend"]
    reason: Text
    epoch: Count = 0


@dataclass(frozen=True, slots=True)
class Closed:
    """Coordinator → cohort: this attempt is over; stop work on it and drop what it made."""

    of: Attempt
    reason: Text
    epoch: Count = 0


@dataclass(frozen=True, slots=True)
class Resumed:
    """Coordinator → cohort: I have taken up this run; say again what you have for it and I have not answered.

    Every coordinator of a run has a higher `epoch` than the one before, and says it in all that it sends: whoever has
    heard of a higher one ignores what comes from a lower.
    """

    run: Name
    epoch: Count


@dataclass(frozen=True, slots=True)
class Ready:
    """Worker → coordinator: my update is finished and safe here; these are my keys for the secure sum `serial`.

    `metrics` are the names of what I could tell with it, inside the sum.
    """

    of: Attempt
    worker: Name
    serial: Serial
    advert: pact.Advert
    metrics: Annotated[tuple[Key, ...], Within(0, pact.METRICS_MAX)]


@dataclass(frozen=True, slots=True)
class Step:
    """Worker → coordinator: my part in a stage of the secure sum; `payload` says in which parts masked words come."""

    of: Attempt
    worker: Name
    serial: Serial
    says: pact.Shares | pact.Masked | pact.Vow | pact.Opened
    payload: Payload | None = None


@dataclass(frozen=True, slots=True)
class Call:
    """Coordinator → worker: a stage of the secure sum is over, go on from this; nil: a sum begins, say `Ready`."""

    of: Attempt
    serial: Serial
    says: pact.Settled | pact.Dealt | pact.Finishers | pact.Reveal | None = None
    epoch: Count = 0


@dataclass(frozen=True, slots=True)
class Part:
    """A numbered piece of a payload: all `part_bytes` long but the last; `checksum` is the XXH3 (64 bits) of `data`.

    `data` looks at the sender's or the receiver's memory, where it lies.
    """

    payload: Text
    index: Count
    checksum: Annotated[int, Within(0, 2**64 - 1)]
    data: Buffer = field(repr=False)


Small = Hello | Goodbye | Task | Claim | Score | Update | Refusal | Answer | Closed | Resumed | Ready | Step | Call
Message = Small | Part
KINDS: dict[str, type[Any]] = {kind.__name__.lower(): kind for kind in get_args(Message)}


def encode(message: Message) -> bytes:
    """The message as msgpack: a map of the protocol version `v`, its `kind`, and its fields.

    Raises:
        WireError: it is larger than a receiver would take.
    """
    if isinstance(message, Part):
        return b"".join(encode_part(message))
    kind = type(message).__name__.lower()
    # a learner's traceback may name a file whose name is not Unicode
    whole = {"v": PROTOCOL, "kind": kind} | shown(message)
    packed: bytes = msgpack.packb(whole, default=shown, unicode_errors="replace")
    if len(packed) > MESSAGE_BYTES_MAX:
        raise WireError(f"a {kind} of {len(packed)} bytes is over the limit of {MESSAGE_BYTES_MAX}.")
    return packed


def encode_part(part: Part) -> tuple[bytes, Buffer]:
    """The message in two pieces, to be sent one after the other: all before the data, and the data, not copied."""
    packer = msgpack.Packer(autoreset=False)
    packer.pack_map_header(6)
    fields_before = ("v", PROTOCOL), ("kind", "part"), ("payload", part.payload), ("index", part.index)
    for name, value in (*fields_before, ("checksum", part.checksum)):
        packer.pack(name)
        packer.pack(value)
    packer.pack("data")
    return packer.bytes() + _BIN.pack(BIN_32, len(part.data)), part.data


def decode(body: Buffer) -> Message:
    """The message in `body`, every field checked; a part's data is not copied.

    Raises:
        WireError: too large, not msgpack, another protocol version, an unknown kind, a field that is missing,
            unknown, of the wrong type or out of bounds.
    """
    head = part_head(memoryview(body))
    if head and sum(head[3:]) == len(body):
        return Part(*head[:3], memoryview(body)[head[3] :])
    raw = _unpack(body)
    if not isinstance(raw, dict):
        raise WireError("a message must be a msgpack map.")
    version = raw.pop("v", None)
    if type(version) is not int or version != PROTOCOL:
        raise WireError(
            f"the message speaks protocol {in_short(version)}, this side speaks {PROTOCOL}: "
            "install the same version of fluffle on both sides."
        )
    kind = raw.pop("kind", None)
    if not isinstance(kind, str) or kind not in KINDS:
        raise WireError(f"unknown kind of message {in_short(kind)}.")
    payload, tensors = raw.get("payload"), tuple[TensorSpec, ...]()
    if isinstance(payload, dict) and "tensors" in payload:
        tensors, payload["tensors"] = described(payload["tensors"], f"{kind}.payload.tensors"), []
    message: Any = build(KINDS[kind], raw, kind)
    return cast(Message, replace(message, payload=replace(message.payload, tensors=tensors)) if tensors else message)


def part_head(begins: memoryview) -> tuple[str, int, int, int, int] | None:
    """Payload, index and checksum of a part, checked, where in the message its data begins, and how much that is.

    None where what `begins` so is packed in another way than `encode_part`'s, breaks a rule, or is not all there.
    """
    if begins[: len(PART_BEGINS)] != PART_BEGINS:
        return None
    reader = msgpack.Unpacker(raw=False, max_buffer_size=PART_HEAD_MAX, **_LIMITS)
    try:
        reader.feed(begins[len(PART_BEGINS) : PART_HEAD_MAX])
        next_ = reader.unpack
        names, values = zip(*((next_(), next_()) for _ in range(3)), strict=True)
        last, at = next_(), len(PART_BEGINS) + reader.tell()
        marker, size = _BIN.unpack_from(begins, at)
    except (ValueError, TypeError, msgpack.UnpackException, struct.error):
        return None
    payload, index, checksum = values
    if (names, last, marker) != (("payload", "index", "checksum"), "data", BIN_32):
        return None
    if [type(value) for value in values] != [str, int, int] or len(payload) > TEXT_MAX or size > PART_BYTES_MAX:
        return None
    whole = 0 <= index <= COUNT_MAX and 0 <= checksum < 2**64
    return (payload, index, checksum, at + _BIN.size, size) if whole else None


def _unpack(body: Buffer) -> Any:
    if len(body) > MESSAGE_BYTES_MAX:
        raise WireError(f"a message of {len(body)} bytes is over the limit of {MESSAGE_BYTES_MAX}.")
    numbers = count(1)

    def one_more(collection: Any) -> Any:
        if next(numbers) > COLLECTIONS_MAX:
            raise WireError(f"a message of {len(body)} bytes has more than {COLLECTIONS_MAX} maps and lists.")
        return collection

    try:
        return msgpack.unpackb(
            body, raw=False, strict_map_key=True, use_list=True, object_hook=one_more, list_hook=one_more, **_LIMITS
        )
    except (ValueError, msgpack.UnpackException, RecursionError, OverflowError) as problem:
        why = type(problem).__name__  # one class covers most, but which one depends on where the bytes go wrong
        raise WireError(f"a message of {len(body)} bytes is not msgpack within the limits ({why}).") from None
