"""Every message travels unchanged, nothing else gets in, and PROTOCOL.md says the same as the code."""

import importlib
import math
import re
import types
from dataclasses import fields, is_dataclass, replace
from importlib.resources import files
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import msgpack
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from broker import messages, pact
from broker.errors import WireError
from broker.fields import NAME, Within
from broker.link import heard
from broker.messages import (
    COLLECTIONS_MAX,
    KINDS,
    MAP_MAX,
    MESSAGE_BYTES_MAX,
    PART_BYTES_MAX,
    PART_BYTES_MIN,
    TEXT_MAX,
    Answer,
    Attempt,
    Buffer,
    Call,
    Claim,
    Closed,
    Goodbye,
    Hello,
    Message,
    Part,
    Payload,
    Ready,
    Refusal,
    Resumed,
    Score,
    Seconds,
    Secure,
    Step,
    Task,
    Update,
    decode,
    encode,
)
from broker.pact import (
    Advert,
    Dealt,
    Finishers,
    Masked,
    Opened,
    Reveal,
    Settled,
    Shares,
    Vow,
)
from broker.tensors import ITEM_BYTES, TENSORS_MAX, Layout, TensorSpec

OF = Attempt("run-1", 7, 1)
TENSORS = (TensorSpec("w", "float32", (2, 3)), TensorSpec("b", "bool", ()))
PAYLOAD = Payload("run-1/7/1", PART_BYTES_MIN, TENSORS)
ONE_OF_EACH: tuple[Message, ...] = (
    Hello("ada", "5f2c", "digits", True, 15.0, OF),
    Goodbye("ada", "it was told to stop"),
    Task(OF, "train", 6, 600.0, 0, {"lr": 0.1, "epochs": 2, "warm": True, "name": "x"}, PAYLOAD),
    Claim(OF, "ada", "5f2c"),
    Score(OF, "ada", 6, {"loss": 0.5}),
    Update(OF, "ada", 6, 100, {"loss": 0.25}, PAYLOAD),
    Refusal(OF, "ada", "no room"),
    Answer(OF, "accepted", "counted"),
    Closed(OF, "it is closed"),
    Resumed("run-1", 3),
    Ready(OF, "ada", 1, Advert("ada", bytes(64), bytes(64)), ("loss",)),
    Step(OF, "ada", 1, Masked(bytes(64)), PAYLOAD),
    Call(OF, 1, Finishers(("ada", "bob", "eve"), ("tom",))),
    Part("run-1/7/1", 3, 123, b"data"),
)


MAY_BE_NIL = {("hello", "doing"), ("task", "secure"), ("step", "payload"), ("call", "says")}


def kind_of(message: Message) -> str:
    return type(message).__name__.lower()


def raw_of(message: Message) -> dict[str, Any]:
    found: dict[str, Any] = msgpack.unpackb(encode(message))
    return found


def refused(raw: Any) -> str:
    """Why `raw` (or, of a dict, what it packs to) is refused: one sentence."""
    with pytest.raises(WireError) as caught:
        decode(raw if isinstance(raw, bytes) else msgpack.packb(raw))
    said = str(caught.value)
    assert re.fullmatch(r"[^\n]{10,300}\.", said), said
    return said


# -- what travels ---------------------------------------------------------------------------------------------------

SHAPES = st.lists(st.integers(0, 9), max_size=3).map(tuple)
SPECS = st.builds(TensorSpec, st.text(min_size=1, max_size=5), st.sampled_from(sorted(ITEM_BYTES)), SHAPES)
LAYOUTS = st.lists(SPECS, unique_by=lambda spec: spec.name, max_size=3).map(lambda specs: Layout.of(specs).specs)


def bounded(plain: Any, rule: Any) -> st.SearchStrategy[Any]:
    if plain == tuple[TensorSpec, ...]:
        return LAYOUTS
    if not isinstance(rule, Within):
        return st.from_regex(NAME, fullmatch=True)
    if plain is int:
        return st.integers(int(rule.low), int(rule.high))
    if plain is float:
        return st.floats(rule.low, rule.high)
    if plain is bytes:
        return st.binary(min_size=int(rule.low), max_size=int(rule.high))
    if get_origin(plain) is tuple:
        return st.lists(values(get_args(plain)[0]), min_size=int(rule.low), max_size=int(rule.low) + 2).map(tuple)
    if plain is str:
        return st.text(min_size=int(rule.low), max_size=8) | st.just("é" * int(rule.high))
    return values(plain)


def values(hint: Any) -> st.SearchStrategy[Any]:
    """Anything that the annotation allows, its bounds included."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return st.sampled_from(arguments)
    if hint == Buffer:
        return st.binary(max_size=100)
    if origin in (Union, types.UnionType):
        return st.one_of([values(option) for option in arguments])
    if origin is Annotated:
        return bounded(*arguments)
    if origin is dict:
        return st.dictionaries(values(arguments[0]), values(arguments[1]), max_size=3)
    if is_dataclass(hint) and isinstance(hint, type):
        hints = get_type_hints(hint, include_extras=True)
        return st.builds(hint, **{field.name: values(hints[field.name]) for field in fields(hint)})
    plain_values: dict[Any, st.SearchStrategy[Any]] = {
        bool: st.booleans(),
        int: st.integers(-(2**63), 2**64 - 1),
        float: st.floats(allow_nan=False, allow_infinity=False),
        type(None): st.none(),
    }
    return plain_values[hint]


MESSAGES = st.sampled_from(sorted(KINDS)).flatmap(lambda kind: values(KINDS[kind]))


def test_what_many_are_told_is_decoded_once_for_all_who_are_hosted_together_and_nothing_in_it_can_change() -> None:
    told = [message for message in ONE_OF_EACH if isinstance(message, Answer | Closed | Resumed | Call)]
    assert len(told) == 4
    for message in told:
        again = replace(message, epoch=9)
        assert heard(encode(message)) is heard(bytes(bytearray(encode(message))))
        assert heard(encode(message)) == message != heard(encode(again)) == again
        hash(heard(encode(message)))  # there is no dict nor list in it


def test_there_is_one_of_each_kind() -> None:
    assert [kind_of(message) for message in ONE_OF_EACH] == list(KINDS)


@given(MESSAGES)
@settings(max_examples=80, deadline=None)
def test_every_message_comes_out_as_it_went_in(message: Message) -> None:
    assert decode(encode(message)) == message


def test_the_largest_part_and_the_longest_texts_travel() -> None:
    part = Part("é" * TEXT_MAX, 2**53, 2**64 - 1, bytes(PART_BYTES_MAX))
    assert decode(encode(part)) == part


def test_a_header_of_as_many_tensors_as_may_be_travels() -> None:
    specs = Layout.of(TensorSpec(f"blocks.{i}.attention.weight", "float32", (1,)) for i in range(TENSORS_MAX)).specs
    update = Update(OF, "ada", 6, 1, {}, Payload("id", PART_BYTES_MIN, specs))
    assert decode(encode(update)) == update


def test_the_sender_learns_that_its_message_is_too_large() -> None:
    specs = tuple(TensorSpec(f"{i:0512}", "float32", (1,)) for i in range(TENSORS_MAX))
    with pytest.raises(WireError, match=r"a task of \d+ bytes is over the limit of 4194304\."):
        encode(Task(OF, "train", 0, 1.0, 0, {}, Payload("id", PART_BYTES_MIN, specs)))


def test_a_reason_that_is_not_unicode_travels_as_well_as_it_can() -> None:
    assert decode(encode(Refusal(OF, "ada", "file \udcff"))) == Refusal(OF, "ada", "file ?")


def test_an_integer_may_stand_where_a_number_is_wanted() -> None:
    message = decode(msgpack.packb(raw_of(ONE_OF_EACH[0]) | {"lease_s": 15}))
    assert isinstance(message, Hello)
    assert isinstance(message.lease_s, float)


# -- what does not --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [0, 2, None, True, 1.0, "1", [1]])
def test_another_protocol_version_is_refused(version: object) -> None:
    said = refused(raw_of(ONE_OF_EACH[1]) | {"v": version})
    assert "this side speaks 1: install the same version of fluffle on both sides" in said


@pytest.mark.parametrize("kind", ["", "gift", "Part", None, 3, ["part"], {"part": 1}])
def test_an_unknown_kind_is_refused(kind: object) -> None:
    assert refused(raw_of(ONE_OF_EACH[1]) | {"kind": kind}).startswith("unknown kind of message")


@pytest.mark.parametrize("message", ONE_OF_EACH, ids=kind_of)
def test_a_field_too_many_or_too_few_is_refused_by_name(message: Message) -> None:
    raw = raw_of(message)
    assert refused(raw | {"gift": 1}) == f"{kind_of(message)} has an unknown field 'gift'."
    for name in raw.keys() - {"v", "kind"}:
        less = {key: value for key, value in raw.items() if key != name}
        assert refused(less) == f"{kind_of(message)} has no field '{name}'."


@pytest.mark.parametrize("message", ONE_OF_EACH, ids=kind_of)
def test_a_value_of_another_type_is_refused_by_its_field(message: Message) -> None:
    raw = raw_of(message)
    odds: tuple[Any, ...] = (msgpack.ExtType(5, b""), b"bytes", [], {"a": []}, -1.5, "A B", 3, True, None)
    for name in raw.keys() - {"v", "kind"}:
        for odd in odds:
            if type(odd) is type(raw[name]) or (odd == 3 and isinstance(raw[name], float)):
                continue
            if odd is None and (kind_of(message), name) in MAY_BE_NIL:
                continue
            if isinstance(odd, str) and isinstance(raw[name], str):
                continue
            assert refused(raw | {name: odd}).startswith(f"{kind_of(message)}.{name}"), odd


def test_a_boolean_is_not_an_integer_and_no_integer_is_a_boolean() -> None:
    assert refused(raw_of(ONE_OF_EACH[5]) | {"examples": True}) == "update.examples has the wrong type."
    assert refused(raw_of(ONE_OF_EACH[0]) | {"trains": 1}) == "hello.trains has the wrong type."
    assert refused(raw_of(ONE_OF_EACH[0]) | {"lease_s": True}) == "hello.lease_s has the wrong type."


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_not_finite_are_refused_wherever_they_stand(number: float) -> None:
    assert refused(raw_of(ONE_OF_EACH[0]) | {"lease_s": number}) == "hello.lease_s must be a finite number."
    assert refused(raw_of(ONE_OF_EACH[4]) | {"metrics": {"loss": number}}) == "score.metrics must be a finite number."
    assert "task.settings" in refused(raw_of(ONE_OF_EACH[2]) | {"settings": {"lr": number}})


@pytest.mark.parametrize(
    ("message", "changed", "said"),
    [
        (ONE_OF_EACH[0], {"worker": "Ada"}, "hello.worker must be 1 to 63 of a-z, 0-9 and '-'"),
        (ONE_OF_EACH[0], {"worker": "ada\n"}, "hello.worker must be 1 to 63"),
        (ONE_OF_EACH[0], {"worker": "a.b"}, "hello.worker must be 1 to 63"),
        (ONE_OF_EACH[0], {"worker": "a" * 64}, "hello.worker must be 1 to 63"),
        (ONE_OF_EACH[0], {"learner": "x" * (TEXT_MAX + 1)}, "hello.learner must be within 0 and 4096"),
        (ONE_OF_EACH[0], {"lease_s": -0.1}, "hello.lease_s must be within 0 and 3.16224e+07"),
        (ONE_OF_EACH[5], {"examples": 0}, "update.examples must be within 1 and 5.36871e+08"),
        (ONE_OF_EACH[5], {"examples": 2**29}, "update.examples must be within"),
        (ONE_OF_EACH[5], {"version": 2**53 + 1}, "update.version must be within"),
        (ONE_OF_EACH[5], {"metrics": {"x" * 201: 1.0}}, "update.metrics must be within 0 and 200"),
        (ONE_OF_EACH[2], {"settings": {"x" * 201: 1}}, "task.settings must be within 0 and 200"),
        (ONE_OF_EACH[2], {"work": "rest"}, "task.work must be one of train, evaluate"),
        (ONE_OF_EACH[-1], {"index": -1}, "part.index must be within"),
        (ONE_OF_EACH[-1], {"checksum": -1}, "part.checksum must be within"),
    ],
)
def test_a_value_out_of_bounds_is_refused(message: Message, changed: dict[str, Any], said: str) -> None:
    assert refused(raw_of(message) | changed).startswith(said)


def test_no_serial_is_so_large_that_its_signatures_would_be_of_another_sum() -> None:
    """What is signed in a secure sum binds attempt · 2^32 + serial in one number."""
    said = [each for each in ONE_OF_EACH if hasattr(each, "serial")]
    assert {kind_of(each) for each in said} == {"ready", "step", "call"}
    for message in said:
        assert refused(raw_of(message) | {"serial": 2**32}).startswith(f"{kind_of(message)}.serial must be within")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"part_bytes": PART_BYTES_MIN - 1}, "update.payload.part_bytes must be within"),
        ({"part_bytes": PART_BYTES_MAX + 1}, "update.payload.part_bytes must be within"),
        ({"tensors": [{"name": "w", "dtype": "object", "shape": []}]}, "'w' is 'object', which does not travel"),
        ({"tensors": [{"name": "", "dtype": "bool", "shape": []}]}, "name must have 1 to 512 characters"),
        ({"tensors": [{"name": "w", "dtype": "bool", "shape": [-1]}]}, "impossible shape"),
        ({"tensors": [{"name": "w", "dtype": "bool", "shape": [1] * 17}]}, "impossible shape"),
        ({"tensors": [{"name": "w", "dtype": "bool", "shape": [2**21, 2**21]}]}, "over the limit of 1099511627776"),
        ({"tensors": [{"name": "w", "dtype": "bool", "shape": [True]}]}, "update.payload.tensors.shape"),
        ({"tensors": [{"name": "w", "dtype": "bool"}]}, "update.payload.tensors has no field 'shape'"),
        ({"tensors": [{"name": "w", "dtype": "bool", "shape": []}] * 2}, "have the same name"),
        (
            {"tensors": [{"name": n, "dtype": d, "shape": []} for n, d in (("b", "bool"), ("w", "float32"))]},
            "not in canonical order",
        ),
    ],
)
def test_a_payload_that_lies_about_itself_is_refused(changed: dict[str, Any], said: str) -> None:
    raw = raw_of(ONE_OF_EACH[5])
    assert said in refused(raw | {"payload": raw["payload"] | changed})


# -- bytes that lie -------------------------------------------------------------------------------------------------

WITHIN_THE_LIMITS = "is not msgpack within the limits"


@pytest.mark.parametrize("message", ONE_OF_EACH, ids=kind_of)
def test_a_message_cut_off_anywhere_or_too_long_is_refused(message: Message) -> None:
    body = encode(message)
    for length in range(len(body)):
        refused(body[:length])
    assert WITHIN_THE_LIMITS in refused(body + b"\0")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1",
        b"\x81\xa1v\xd4\x05\x00",  # an extension
        b"\x81\xa1v\xd6\xff\x00\x00\x00\x00",  # a timestamp
        b"\x81\xa2\xff\xfe\x01",  # not UTF-8
        b"\x81\x01\x01",  # a key that is not text
        b"\x81\xa1v\xdf\xff\xff\xff\xff",  # a map of 4 billion entries
        b"\x81\xa1v\xdd\xff\xff\xff\xff",  # a list of as many
        b"\x81\xa1v\xdb\xff\xff\xff\xff",  # a text as long
        b"\x91" * 100_000,
        b"\x81\xa1v" * 5000,
        msgpack.packb({"v": "x" * (4 * TEXT_MAX + 1)}),
        msgpack.packb({"v": bytes(PART_BYTES_MAX + 1)}),
        msgpack.packb({"v": list(range(TENSORS_MAX + 1))}),
        msgpack.packb({str(n): n for n in range(MAP_MAX + 1)}),
    ],
    ids=lambda body: body[:8].hex(),
)
def test_bytes_that_are_not_msgpack_within_the_limits_are_refused(body: bytes) -> None:
    assert WITHIN_THE_LIMITS in refused(body)


@pytest.mark.parametrize("depth", [10, 500, 1000, 1015, 1022, 1100])
def test_a_value_nested_as_deep_as_msgpack_allows_is_refused_too(depth: int) -> None:
    nested = b"\x91" * depth + b"\xc0"
    refused(b"\x81\xa1v" + nested)
    refused(b"\x82\xa1v\x01\xa4kind" + nested)
    refused(b"\x84\xa1v\x01\xa4kind\xa7goodbye\xa6worker\xa1a\xa6reason" + nested)


def test_a_message_of_nothing_but_empty_maps_is_refused_before_it_fills_the_memory() -> None:
    rows = 200
    body = b"\x81\xa1v\xdc\x00\xc8" + (b"\xdc\x4e\x20" + b"\x80" * TENSORS_MAX) * rows
    assert len(body) < MESSAGE_BYTES_MAX
    assert f"more than {COLLECTIONS_MAX} maps and lists" in refused(body)


@pytest.mark.parametrize("raw", [None, 3, "text", [1, 2], b"bytes"])
def test_what_is_not_a_map_is_refused(raw: object) -> None:
    assert refused(msgpack.packb(raw)) == "a message must be a msgpack map."


def test_a_message_over_the_limit_is_refused_unread() -> None:
    assert refused(bytes(MESSAGE_BYTES_MAX + 1)) == "a message of 4194305 bytes is over the limit of 4194304."


def accept_or_refuse(body: bytes) -> None:
    try:
        message = decode(body)
    except WireError:
        return
    assert decode(encode(message)) == message


@given(st.binary(max_size=200))
@settings(max_examples=250, deadline=None)
def test_no_bytes_whatever_raise_anything_but_a_wire_error(body: bytes) -> None:
    accept_or_refuse(body)


@given(
    st.sampled_from(ONE_OF_EACH).map(encode),
    st.lists(st.tuples(st.integers(0, 500), st.binary(max_size=3), st.integers(0, 3)), min_size=1, max_size=4),
)
@settings(max_examples=250, deadline=None)
@example(encode(ONE_OF_EACH[3]), [(3, b"\xcb\x3f\xf0\0\0\0\0\0\0", 1)])
def test_no_damaged_message_raises_anything_but_a_wire_error(body: bytes, cuts: list[tuple[int, bytes, int]]) -> None:
    for at, instead, length in cuts:
        place = at % len(body) if body else 0
        body = body[:place] + instead + body[place + length :]
    accept_or_refuse(body)


# -- PROTOCOL.md ----------------------------------------------------------------------------------------------------

PAGE = (files(messages.__package__) / "PROTOCOL.md").read_text("utf-8")
WORDS = {bool: "boolean", int: "integer", float: "number", str: "text", bytes: "binary"}
# what the dataclasses leave to the checks in tensors.py and to msgpack's limits
MORE_BOUNDS = {
    ("tensor", "name"): ("text", "1 … 512 characters"),
    ("tensor", "dtype"): ("text", "see below"),
    ("tensor", "shape"): ("list of integer", "0 … 16 entries, each 0 … 2^40"),
    ("part", "data"): ("binary", f"0 … {PART_BYTES_MAX} bytes"),
}


def tables(text: str) -> dict[str, list[list[str]]]:
    """The rows (without the head) of the first table under each heading `### `kind`` or `## Words`."""
    found = {}
    for heading, body in re.findall(r"^##+ ([^\n]+)\n(.*?)(?=^##|\Z)", text, re.MULTILINE | re.DOTALL):
        lines = [line.strip("|").split("|") for line in body.splitlines() if line.startswith("|")]
        rows = [[cell.strip() for cell in line] for line in lines]
        found[re.sub(r"`(\w+)`.*", r"\1", heading)] = rows[2:]
    return found


def spelt(number: float) -> str:
    whole = int(number)
    for offset, words in ((0, ""), (1, " − 1")):
        if whole > 2**22 and (whole + offset) & (whole + offset - 1) == 0:
            return f"2^{(whole + offset).bit_length() - 1}{words}"
    return str(whole)


def described(hint: Any) -> tuple[str, str]:
    """An annotation as the page's columns `type` and `bounds` have it."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "text", ", ".join(f"`{word}`" for word in arguments)
    if origin in (Union, types.UnionType):
        kinds = [described(option) for option in arguments if option is not type(None)]
        words = [kind for kind, _ in kinds] + ["nil"] * (type(None) in arguments)
        bounds = ", ".join(bound for _, bound in kinds if bound)
        return " or ".join([", ".join(words[:-1]), words[-1]]), bounds
    if origin is tuple:
        kind, bounds = described(arguments[0])
        return f"list of {kind}", bounds and f"each {bounds}"
    if origin is dict:
        (key, key_bounds), (value, value_bounds) = map(described, arguments)
        more = f", texts {value_bounds}" if value_bounds else ""
        return f"map of {key} to {value}", f"keys {key_bounds}{more}"
    if origin is Annotated:
        plain, rule = arguments
        kind, inner = described(plain)
        if not isinstance(rule, Within):
            return "name", "1 … 63 of a-z, 0-9, -"
        unit = {"text": " characters", "integer": "", "number": "", "binary": " bytes"}.get(kind, " entries")
        return kind, f"{spelt(rule.low)} … {spelt(rule.high)}{unit}{', ' + inner if inner else ''}"
    if hint in WORDS:
        return WORDS[hint], ""
    return hint.__name__.lower().removesuffix("spec"), ""


def test_the_page_has_a_table_for_every_kind_of_message_and_no_other() -> None:
    sections = re.search(r"## Messages\n(.*?)\n## ", PAGE, re.DOTALL)
    assert sections
    assert re.findall(r"^### `(\w+)`", sections[1], re.MULTILINE) == list(KINDS)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *KINDS.items(),
        ("attempt", Attempt),
        ("payload", Payload),
        ("noise", messages.Noise),
        ("tensor", TensorSpec),
        *((each.__name__.lower(), each) for each in (Secure, Advert, Settled, Shares, Dealt)),
        *((each.__name__.lower(), each) for each in (Masked, Finishers, Vow, Reveal, Opened)),
    ],
)
def test_the_tables_of_the_page_agree_with_the_dataclasses(name: str, kind: type[Any]) -> None:
    hints = get_type_hints(kind, include_extras=True)
    wanted = [(f"`{f.name}`", *MORE_BOUNDS.get((name, f.name), described(hints[f.name]))) for f in fields(kind)]
    assert [tuple(row[:3]) for row in tables(PAGE)[name]] == wanted
    assert all(row[3] for row in tables(PAGE)[name]), "every field needs its meaning"


def test_the_limits_of_the_page_are_the_constants() -> None:
    for name, value, _ in tables(PAGE)["Limits"]:
        module, constant = name.strip("`").split(".")
        assert getattr(importlib.import_module(f"broker.{module}"), constant) == int(value), name


def test_the_dtypes_of_the_page_are_those_that_travel() -> None:
    told = re.search(r"These dtypes travel\s+\(bytes\s+an\s+item\):([^.]+)\.", PAGE)
    assert told
    assert {name: int(size) for name, size in re.findall(r"`(\w+)`\s+(\d)", told[1])} == ITEM_BYTES


def test_the_neighbours_of_the_page_are_those_of_the_graph() -> None:
    def is_as_the_page_wants(n: int, d: int) -> bool:
        def ways(k: int, m: int) -> int:
            return sum(math.comb(k, i) * math.comb(n - 1 - k, d - i) for i in range(m, min(k, d) + 1))

        t, all_ways = 2 * (d + 1) // 3 + 1, math.comb(n - 1, d)
        learned = max(n * 2**64 * ways(n // 5, t - 1), n * 2**25 * ways(n // 3, t - 1))
        return max(learned, n * 2**20 * ways(n // 10, d + 2 - t)) < all_ways

    told = re.search(r"Of (\d+) members\s+each has (\d+) neighbours((?:, of \d+ \d+)+)\.", PAGE)
    assert told
    for members, degree in [told.groups()[:2], *re.findall(r"of (\d+) (\d+)", told[3])]:
        assert pact.degree_of(int(members)) == int(degree)
    for members in (65, 66, 99, 100, 257, 1000):
        degree = pact.degree_of(members)
        assert [d for d in range(2, degree + 1, 2) if is_as_the_page_wants(members, d)] == [degree]


def test_the_page_names_the_version_that_the_code_speaks() -> None:
    assert f"Protocol version **{messages.PROTOCOL}**" in PAGE


def test_the_bytes_on_the_page_are_the_message_on_the_page() -> None:
    shown = re.search(r"```hex\n(.*?)```\n\n```text\n(.*?)\n```", PAGE, re.DOTALL)
    assert shown
    body = bytes.fromhex("".join(line.split("#")[0] for line in shown[1].splitlines()))
    assert repr(decode(body)).replace("'", '"') == shown[2]
    assert encode(decode(body)) == body


def test_numbers_without_bounds_are_only_finite() -> None:
    assert described(float) == ("number", "")
    assert described(Seconds) == ("number", "0 … 31622400")


def test_the_same_tensors_are_checked_and_kept_once_whoever_speaks_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand workers say the same of thousands of tensors, round after round."""
    checks, check = 0, Layout.check

    def checking(layout: Layout) -> None:
        nonlocal checks
        checks += 1
        check(layout)

    payload = Payload(
        "p", PART_BYTES_MIN, Layout.of([TensorSpec(f"once-{n}", "float32", (n,)) for n in range(9)]).specs
    )
    monkeypatch.setattr(Layout, "check", checking)
    said = [decode(encode(Update(Attempt("r", 1, 1), f"w{n}", 0, 1, {}, payload))) for n in range(50)]
    assert all(isinstance(each, Update) and each.payload == payload for each in said)
    assert len({id(each.payload.tensors) for each in said if isinstance(each, Update)}) == checks == 1


def test_tensors_that_are_nested_deeper_than_can_be_written_are_refused() -> None:
    deep: Any = []
    for _ in range(400):
        deep = [deep]
    raw = raw_of(ONE_OF_EACH[5])
    body = msgpack.packb(raw | {"payload": raw["payload"] | {"tensors": []}})
    inner = b"\x91" * 600 + b"\x90"
    for found in (inner, msgpack.packb(deep)):
        with pytest.raises(WireError):
            decode(body.replace(b"\xa7tensors\x90", b"\xa7tensors" + found))
