"""Which patient a case is of, where its name says it: ``--patients REGEX``."""

from __future__ import annotations

import re

from nnunetv2_meddinov3.errors import UserError


def patient_pattern(pattern: str) -> re.Pattern[str]:
    """Return the regular expression of ``--patients``.

    Raises:
        UserError: If it is none.
    """
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise UserError(
            f"--patients must be a regular expression, got {pattern!r}: {error}."
        ) from error


def patient_in(name: str, pattern: re.Pattern[str] | None, advice: str = "") -> str:
    """Return the pattern's first group, or whole match; the name itself without a pattern.

    Args:
        name: Of a case or file.
        pattern: Of ``--patients``.
        advice: What to do, for the end of the sentence.

    Raises:
        UserError: If the pattern does not match the name, or matches no character of it.
    """
    if pattern is None:
        return name
    match = pattern.search(name)
    patient = match and (match.group(1) if pattern.groups else match.group(0))
    if not patient:
        how = "does not match" if match is None else "finds no patient in"
        raise UserError(
            f"--patients must find a patient in every name, but {pattern.pattern!r} {how} "
            f"{name!r}{advice}."
        )
    return str(patient)
