"""What pydantic finds wrong with a file that people write (a plan, a policy), in our words.

Knows pydantic's kinds of errors. Does not know what any setting means.
"""

from pydantic_core import ErrorDetails

from broker.fields import NAME_RULE

_WORDS = {
    "dict_type": "must be a table of names and values",
    "float_type": "must be a number",
    "greater_than": "must be above {gt:.0f}",
    "greater_than_equal": "must be at least {ge:.0f}",
    "int_type": "must be a whole number",
    "less_than": "must be below {lt:.0f}",
    "less_than_equal": "must be at most {le:.0f}",
    "literal_error": "must be {expected}",
    "missing": "is missing",
    "multiple_of": "must be a multiple of {multiple_of}",
    "string_pattern_mismatch": f"must be {NAME_RULE}",
    "string_too_long": "must have at most {max_length} characters",
    "string_too_short": "must not be empty",
    "string_type": "must be text",
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
