"""What reading hands to curation: an input, an opened volume, and why one cannot be opened."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


class Unreadable(ValueError):
    """An input cannot become a volume; the message is the reason in one sentence, no path."""


def plain_text(text: str) -> str:
    """Text that any file can hold: what was no valid Unicode in a name or header is escaped."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


@dataclass(frozen=True)
class VolumeSource:
    """An input that was found but not opened yet; cheap, picklable, ordered by its key.

    Attributes:
        key: stable name, posix, never absolute: ``<basename of the argument>/<relative path>``;
            a DICOM series is its folder's key, ``#`` and the SeriesInstanceUID.
        kind: ``"file"``, ``"dicom"`` or ``"png"``.
        paths: absolute files; those of a DICOM series are in no particular order.
        dataset: name of the nnU-Net dataset or of the folder given as source.
        patient: best known patient or case (nnU-Net case, hash of PatientID, else file stem).
        channel: channel of the nnU-Net image, None where there are no channels.
        channel_name: its name in dataset.json, which tells the modality.
    """

    key: str
    kind: str
    paths: tuple[str, ...]
    dataset: str
    patient: str
    channel: int | None = None
    channel_name: str | None = None


@dataclass
class Volume:
    """One opened volume.

    Attributes:
        array: (S, H, W) in LPS axial order: slices caudal to cranial, rows anterior to
            posterior, columns right to left; HU for CT (rescale applied); integers or float32
            as the file has them.
        spacing: (z, y, x) in mm, None where unknown (PNG).
        orientation: axes of the file before reorientation, such as ``"RAI"``.
        modality: ``"CT"``, ``"MR"`` or ``"unknown"``.
        windowed: True for 8-bit images, whose values are not HU.
        positions_mm: (S,) position of each slice along z in mm, None where unknown.
        intensity: for values that are not HU ``{"low": ..., "high": ...}``, percentiles 0.5 and
            99.5 of the foreground; None for CT in HU.
        notes: remarks for the record, such as ``"3 duplicate slices left out"``.
    """

    array: np.ndarray
    spacing: tuple[float, float, float] | None
    orientation: str
    modality: str
    windowed: bool
    positions_mm: np.ndarray | None
    intensity: dict | None
    notes: tuple[str, ...]
