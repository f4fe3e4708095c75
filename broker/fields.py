"""A map that a stranger sent, checked against the annotations of the dataclass that it is to become.

Knows annotations: plain types, `Literal`, unions, tuples, maps, other dataclasses, and the rules in `Annotated`. Does
not know what any field means, nor how a map is packed.
"""

import math
import re
import types
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from broker.errors import WireError

NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")  # spliced into routing keys and, later, broker rights
NAME_RULE = "1 to 63 of a-z, 0-9 and '-', beginning and ending with a letter or digit"
_BYTES = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class Within:
    """Bounds of an annotated field: of the value for a number, of the length for anything else."""

    low: float
    high: float


def in_short(value: Any) -> str:
    """`value` for a sentence; of anything but a number or a text only its type, for it may be nested too deep."""
    return repr(value)[:40] if isinstance(value, int | float | str) else type(value).__name__


def legible(text: str) -> str:
    """What somebody else has written, fit for a terminal or a log: nothing in it can move the cursor or hide.

    What is not to be seen is escaped; what follows a line break is indented, so that it is no line of its own.
    """
    seen = (c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
    return "".join(seen).replace("\n", "\n        ")


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def build(kind: Any, raw: dict[str, Any], where: str) -> Any:
    """The dataclass `kind` of a map that a stranger sent, every field checked against its annotation.

    Raises:
        WireError: a field is missing, unknown, of the wrong type or out of bounds; `where` is named.
    """
    hints = _hints(kind)
    unknown = [name for name in raw if name not in hints]
    missing = [f.name for f in fields(kind) if f.name not in raw]
    if unknown or missing:
        names = f"an unknown field {unknown[0][:40]!r}" if unknown else f"no field {missing[0]!r}"
        raise WireError(f"{where} has {names}.")
    return kind(**{name: _check(hints[name], value, f"{where}.{name}") for name, value in raw.items()})


def _check(hint: Any, value: Any, where: str) -> Any:
    """`value` as the annotation `hint` wants it, or WireError naming `where`."""
    origin = get_origin(hint)
    if origin is Annotated:
        plain, *rules = get_args(hint)
        checked = _check(plain, value, where)
        for rule in rules:
            _keep(rule, checked, where)
        return checked
    if origin is Literal:
        if isinstance(value, str) and value in get_args(hint):
            return value
        raise WireError(f"{where} must be one of {', '.join(get_args(hint))}.")
    if hint == _BYTES and isinstance(value, bytes | memoryview):
        return value
    if origin in (Union, types.UnionType):
        return _check_union(get_args(hint), value, where)
    if origin is tuple and isinstance(value, list):
        return tuple(_check(get_args(hint)[0], item, where) for item in value)
    if origin is dict and isinstance(value, dict):
        key_hint, value_hint = get_args(hint)
        return {_check(key_hint, k, where): _check(value_hint, v, where) for k, v in value.items()}
    if is_dataclass(hint) and isinstance(hint, type) and isinstance(value, dict):
        return build(hint, value, where)
    return _check_plain(hint, value, where)


def _check_union(options: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in options:
        return None
    last = WireError(f"{where} has the wrong type.")
    for option in options:
        try:
            return _check(option, value, where)
        except WireError as problem:
            last = problem
    raise last


def _check_plain(hint: Any, value: Any, where: str) -> Any:
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise WireError(f"{where} must be a finite number.")
        return number
    if hint in (bool, int, str, bytes) and type(value) is hint:
        return value
    raise WireError(f"{where} has the wrong type.")


def _keep(rule: Any, value: Any, where: str) -> None:
    if isinstance(rule, re.Pattern):
        if rule.fullmatch(value) is None:
            raise WireError(f"{where} must be {NAME_RULE}.")
    elif isinstance(rule, Within):
        measured = value if isinstance(value, int | float) else len(value)
        if not rule.low <= measured <= rule.high:
            raise WireError(f"{where} must be within {rule.low:g} and {rule.high:g}.")
