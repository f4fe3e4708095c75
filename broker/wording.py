"""Files that people write or keep (a plan, a policy, a secret), checked, and what is wrong with them in our words.

Knows TOML and pydantic's kinds of errors. Does not know what any setting means.
"""

import stat
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import Field, ValidationError
from pydantic_core import ErrorDetails

from broker.errors import UsageError
from broker.fields import NAME, NAME_RULE

Name = Annotated[str, Field(pattern=f"^{NAME.pattern}$")]
_Made = TypeVar("_Made")
_WORDS = {
    "dict_type": "must be a table of names and values",
    "float_type": "must be a number",
    "greater_than": "must be above {gt:.16g}",
    "greater_than_equal": "must be at least {ge:.16g}",
    "int_type": "must be a whole number",
    "less_than": "must be below {lt:.16g}",
    "less_than_equal": "must be at most {le:.16g}",
    "literal_error": "must be {expected}",
    "missing": "is missing",
    "multiple_of": "must be a multiple of {multiple_of}",
    "string_pattern_mismatch": f"must be {NAME_RULE}",
    "string_too_long": "must have at most {max_length} characters",
    "string_too_short": "must not be empty",
    "string_type": "must be text",
    "too_short": "must not be empty",
    "too_long": "may have at most {max_length} entries",
    "tuple_type": "must be a list of names",
    "unexpected_keyword_argument": "is not a setting",
}


def said(error: ErrorDetails) -> str:
    """One error, without a full stop; a contradiction that `__post_init__` has found speaks for itself."""
    if not error["loc"]:
        return error["msg"].removeprefix("Value error, ")
    words = _WORDS.get(error["type"])
    return f"{error['loc'][0]} {words.format(**error.get('ctx', {})) if words else error['msg']}"


def make(
    kind: Callable[..., _Made], values: Mapping[str, Any], source: str, *, say: Callable[[ErrorDetails], str] = said
) -> _Made:
    """A checked record of one of pydantic's dataclasses; lists, of which TOML knows no other kind, become tuples.

    Raises:
        UsageError: a setting that is unknown, of the wrong type, out of bounds, or contradicts another.
    """
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    try:
        return kind(**given)
    except ValidationError as problem:
        raise UsageError(f"{source}: {say(problem.errors(include_url=False)[0])}.") from None


def secret(path: Path) -> Path:
    """The same path, of a file that holds a secret.

    Raises:
        UsageError: there is no such file, or others may read it.
    """
    try:
        mode = path.stat().st_mode
    except OSError as problem:
        raise UsageError(f"{path} cannot be read: {problem.strerror}.") from None
    if stat.S_IMODE(mode) & 0o077:
        raise UsageError(f"others may read {path}, and it holds a secret: chmod 600 {path}")
    return path


def read(path: Path, *, remedy: str = "mend it or restore it") -> dict[str, Any]:
    """What a file of TOML says.

    Raises:
        UsageError: there is no such file, or it is not TOML.
    """
    try:
        return tomllib.loads(path.read_text())
    except OSError as problem:
        raise UsageError(f"{path} cannot be read: {problem.strerror}.") from None
    except (ValueError, RecursionError) as problem:  # also of text, and of numbers with thousands of digits
        raise UsageError(f"{path} is not TOML ({problem}): {remedy}.") from None
