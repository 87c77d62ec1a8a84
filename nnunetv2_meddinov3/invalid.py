"""What pydantic says of a wrong value, as one sentence."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from nnunetv2_meddinov3.errors import UserError

if TYPE_CHECKING:
    from pydantic import ValidationError

# What must hold, by pydantic's type of an error.
_MUST_BE = {
    "missing": "given",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "string_pattern_mismatch": "text of the form {pattern}",
    "list_type": "a list such as [1,2]",
    "model_type": "a section with keys of its own",
    "model_attributes_type": "a section with keys of its own",
    "greater_than_equal": "at least {ge:g}",
    "greater_than": "above {gt:g}",
    "less_than_equal": "at most {le:g}",
    "less_than": "below {lt:g}",
    "too_short": "a list of at least {min_length}",
}
_SHOWN = 60  # characters of a wrong value


def first_sentence(error: ValidationError, unknown: Callable[[str], str], root: str = "") -> str:
    """Return the first error as one sentence: the key, what must hold and what came.

    A key that is not known comes first, as it may be why another one is missing. A ``UserError``
    that a validator raised is the sentence itself.

    Args:
        error: Of a model.
        unknown: Key -> the sentence on a key that is not known.
        root: What the whole model is called.
    """
    found = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")[0]
    key, context = ".".join(map(str, found["loc"])), found.get("ctx", {})
    if found["type"] == "extra_forbidden":
        return unknown(key)
    if isinstance(context.get("error"), UserError):
        return str(context["error"])
    if found["type"] == "value_error":
        wanted = str(context["error"])
    elif found["type"] == "literal_error":
        choices = re.findall(r"[\w.]+", context["expected"].replace(" or ", " "))
        wanted = f"one of {', '.join(choices)}"
    else:
        known = _MUST_BE.get(found["type"])
        wanted = known.format(**context) if known else found["msg"]
    came = "" if found["type"] == "missing" else f", got {_short(found['input'])}"
    return f"{key or root} must be {wanted}{came}."


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
