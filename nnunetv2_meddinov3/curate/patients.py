"""Who a source is of, where the names of files say it: ``--patients``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from nnunetv2_meddinov3.curate.volume import VolumeSource
from nnunetv2_meddinov3.errors import UserError


def compiled(pattern: str) -> re.Pattern[str]:
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


def named_by(pattern: re.Pattern[str], sources: Sequence[VolumeSource]) -> list[VolumeSource]:
    """Return sources whose patient is the pattern's first group, or whole match.

    It is searched in the name of an nnU-Net case, and in the path of another file below the folder
    given, without its ending. DICOM has patients of its own, which stay.

    Raises:
        UserError: If it does not match a name, matches no character of it, or meets none.
    """
    named = []
    for source in sources:
        if source.kind == "dicom":
            named.append(source)
            continue
        match = pattern.search(source.patient)
        patient = match and (match.group(1) if pattern.groups else match.group(0))
        if not patient:
            how = "does not match" if match is None else "finds no patient in"
            raise UserError(
                f"--patients must find a patient in every name, but {pattern.pattern!r} {how} "
                f"{source.patient!r} ({source.key}): change it, or curate such files apart."
            )
        named.append(replace(source, patient=patient))
    if named and all(source.kind == "dicom" for source in named):
        raise UserError(
            "--patients is for names of files and cases, but all sources are DICOM, whose headers "
            "name the patient: leave it out."
        )
    return named
