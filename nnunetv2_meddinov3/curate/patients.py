"""Who a source is of, where the names of files say it: ``--patients``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from nnunetv2_meddinov3.case_names import patient_in
from nnunetv2_meddinov3.curate.volume import VolumeSource
from nnunetv2_meddinov3.errors import UserError


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
        advice = f" ({source.key}): change it, or curate such files apart"
        patient = patient_in(source.patient, pattern, advice)
        named.append(replace(source, patient=patient))
    if named and all(source.kind == "dicom" for source in named):
        raise UserError(
            "--patients is for names of files and cases, but all sources are DICOM, whose headers "
            "name the patient: leave it out."
        )
    return named
