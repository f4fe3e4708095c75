"""A map that a stranger sent, checked against the annotations of the dataclass that it is to become.

Knows annotations: plain types, `Literal`, unions, tuples, maps, other dataclasses, and the rules in `Annotated`. Does
not know what any field means, nor how a map is packed.
"""

import re
import sys
import types
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass
from functools import cache, partial
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from broker.errors import WireError

NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")  # spliced into routing keys and, later, broker rights
NAME_RULE = "1 to 63 of a-z, 0-9 and '-', beginning and ending with a letter or digit"
_BYTES = bytes | bytearray | memoryview
_NUMBERS = (int, float)
Check = Callable[[Any, str], Any]
"""Gives a value as it is wanted, or raises WireError naming where it stands."""


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
    return "\n        ".join(map(escaped, text.split("\n")))


def escaped(text: str) -> str:
    """The same in one line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def counted(number: int, what: str) -> str:
    """`1 round`, `2 rounds`, `1,000 rounds`: so many of something, for a sentence."""
    return f"{number:,} {what}{'s' * (number != 1)}"


def shown(of: Any) -> dict[str, Any]:
    """A dataclass as the map that `build` takes; its values are not copied, as they are by `asdict`."""
    return {each.name: getattr(of, each.name) for each in fields(of)}


@cache
def _checks(kind: Any) -> dict[str, Check]:
    return {name: check_for(hint) for name, hint in get_type_hints(kind, include_extras=True).items()}


def build(kind: Any, raw: dict[str, Any], where: str) -> Any:
    """The dataclass `kind` of a map that a stranger sent, every field checked against its annotation.

    Raises:
        WireError: a field is missing, unknown, of the wrong type or out of bounds; `where` is named.
    """
    checks = _checks(kind)
    if raw.keys() != checks.keys():
        odd = [name for name in raw if name not in checks] or [name for name in checks if name not in raw]
        names = f"an unknown field {odd[0][:40]!r}" if odd[0] in raw else f"no field {odd[0]!r}"
        raise WireError(f"{where} has {names}.")
    return kind(**{name: checks[name](value, f"{where}.{name}") for name, value in raw.items()})


@cache
def check_for(hint: Any) -> Check:
    """What an annotation asks for, found once: a message may hold thousands of values of the same."""
    origin, of = get_origin(hint), get_args(hint)
    listed, mapped = partial(_check_plain, (list,)), partial(_check_plain, (dict,))
    if origin is Annotated:
        check = check_for(of[0])
        for rule in of[1:]:
            check = partial(_check_within if isinstance(rule, Within) else _check_name, check, rule)
        return check
    if origin is Literal:
        return partial(_check_literal, of)
    if hint == _BYTES:
        return partial(_check_plain, (bytes, memoryview))
    if origin in (Union, types.UnionType):
        return partial(_check_union, type(None) in of, [*map(check_for, of)])
    if origin is tuple:
        item = check_for(of[0])
        return lambda value, where: tuple([item(each, where) for each in listed(value, where)])
    if origin is dict:
        key, item = map(check_for, of)
        return lambda value, where: {key(k, where): item(v, where) for k, v in mapped(value, where).items()}
    if is_dataclass(hint):
        return lambda value, where: build(hint, mapped(value, where), where)
    return _check_float if hint is float else partial(_check_plain, (hint,))


def _check_name(check: Check, rule: re.Pattern[str], value: Any, where: str) -> Any:
    if rule.fullmatch(check(value, where)) is None:
        raise WireError(f"{where} must be {NAME_RULE}.")
    return value


def _check_within(check: Check, rule: Within, value: Any, where: str) -> Any:
    checked = check(value, where)
    measured = checked if type(checked) in _NUMBERS else len(checked)
    if not rule.low <= measured <= rule.high:
        raise WireError(f"{where} must be within {rule.low:g} and {rule.high:g}.")
    return checked


def _check_literal(options: tuple[str, ...], value: Any, where: str) -> Any:
    if not isinstance(value, str) or value not in options:
        raise WireError(f"{where} must be one of {', '.join(options)}.")
    return value


def _check_union(optional: bool, checks: list[Check], value: Any, where: str) -> Any:
    if value is None and optional:
        return None
    for check in checks[:-1]:
        with suppress(WireError):
            return check(value, where)
    return checks[-1](value, where)


def _check_float(value: Any, where: str) -> Any:
    if not abs(_check_plain(_NUMBERS, value, where)) <= sys.float_info.max:
        raise WireError(f"{where} must be a finite number.")
    return float(value)


def _check_plain(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    if type(value) in kinds:
        return value
    raise WireError(f"{where} has the wrong type.")
