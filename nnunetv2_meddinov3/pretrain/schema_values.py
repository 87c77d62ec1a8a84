"""Kinds of values that keys of a config may have, with the rules that they must keep."""

from __future__ import annotations

import math
import re
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field

from nnunetv2_meddinov3.models.architecture import SIZES


def ordered(low: float = -math.inf, high: float = math.inf) -> AfterValidator:
    """Return a rule for a range: two numbers in order between two bounds."""

    def check(values: list[float]) -> list[float]:
        if len(values) != 2 or not low <= values[0] <= values[1] <= high:
            raise ValueError(f"two numbers in order, from {low:g} to {high:g}")
        return values

    return AfterValidator(check)


def three(values: list[float]) -> list[float]:
    """Refuse a list of other than three numbers, one for each kind of crop."""
    if len(values) != 3:
        raise ValueError("three numbers: first global, second global, local crops")
    return values


def size_name(value: str) -> str:
    """Refuse a name that is no size of the ViT."""
    if value not in SIZES:
        raise ValueError(f"one of {', '.join(SIZES)}")
    return value


def gram_source(value: str) -> str:
    """Refuse what begins with ``previous`` and is no teacher of the stage before."""
    if value.startswith("previous") and not re.fullmatch(r"previous(@\d+)?", value):
        raise ValueError("previous or previous@STEP, with a whole number")
    return value


def _text(value: object) -> object:
    """Take a folder or a name that YAML reads as a number for what it is."""
    return str(value) if type(value) in (int, float) else value


Text = Annotated[str, BeforeValidator(_text)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
Range = Annotated[list[float], ordered()]
PositiveRange = Annotated[list[float], ordered(0)]
AreaRange = Annotated[list[float], ordered(1e-3, 1)]


def two_different(values: list[float]) -> list[float]:
    """Refuse a range of no width."""
    if values[0] == values[1]:
        raise ValueError("two different numbers")
    return values
