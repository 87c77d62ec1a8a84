"""From a source that was found to a volume: LPS axial slices in HU, or the reason why not."""

from __future__ import annotations

import re
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np

from nnunetv2_meddinov3.curate.modalities import (
    looks_like_hu,
    looks_like_labels,
    modality_of_name,
    padding_value,
    robust_range,
)
from nnunetv2_meddinov3.curate.orient import compact, to_axial
from nnunetv2_meddinov3.curate.readers.dicom import read_series
from nnunetv2_meddinov3.curate.readers.imagefile import PICTURES, ending_of, read_image
from nnunetv2_meddinov3.curate.readers.images import read_picture
from nnunetv2_meddinov3.curate.readers.nifti import read_nifti
from nnunetv2_meddinov3.curate.volume import (
    Unreadable,
    Volume,
    VolumeSource,
    plain_text,
)

# What SimpleITK, nibabel, Pillow, numpy and the decoders raise on damaged files.
DAMAGE = (
    RuntimeError,
    OSError,
    EOFError,
    ValueError,
    KeyError,
    ArithmeticError,
    MemoryError,
    SyntaxError,
    struct.error,
    zlib.error,
    nibabel.spatialimages.HeaderDataError,
    nibabel.filebasedimages.ImageFileError,
)


def read_volume(source: VolumeSource) -> Volume:
    """Open a source: a file, a picture or the files of a DICOM series.

    The values are HU for CT (rescale applied) and the file's own elsewhere; they are int16 where
    each is a whole number that int16 holds, else float32. Padding and NaN stay as they are.

    Raises:
        Unreadable: With the reason, if it is damaged, no volume of grey values or a label map.
    """
    try:
        opened = _open_series(source) if source.kind == "dicom" else _open_file(source)
    except Unreadable:
        raise
    except DAMAGE as error:
        raise Unreadable(f"it cannot be read ({_short(error)})") from error
    return _describe(opened, source)


@dataclass
class _Opened:
    array: np.ndarray
    spacing: tuple[float, float, float] | None
    orientation: str
    positions_mm: np.ndarray | None
    eight_bit: bool
    modality: str | None
    notes: list[str]


def _open_series(source: VolumeSource) -> _Opened:
    series = read_series([Path(path) for path in source.paths])
    axial = to_axial(series.array, series.grid)
    positions, notes = axial.positions_mm, series.notes + axial.notes
    if axial.stacked_along == 2:  # as acquired, so also where slices are missing
        positions = -series.positions_mm[::-1] if axial.reverse else series.positions_mm
    elif series.has_gaps:
        raise Unreadable("it was acquired across the axial plane and slices of it are missing")
    return _Opened(compact(axial.array, axial.array.shape), axial.spacing, axial.orientation,
                   positions, False, series.modality, notes)  # fmt: skip


def _open_file(source: VolumeSource) -> _Opened:
    path = Path(source.paths[0])
    ending = ending_of(path.name) or ""
    read = read_nifti if ending.startswith(".nii") else read_image
    image = (read_picture if ending in PICTURES else read)(path)
    modality = modality_of_name(source.channel_name)
    if image.grid is None:
        positions = image.spacing and image.spacing[0] * np.arange(len(image.array))
        array = compact(image.array, image.array.shape)
        return _Opened(array, image.spacing, "unknown", positions, image.eight_bit, modality,
                       image.notes)  # fmt: skip
    axial = to_axial(image.array, image.grid)
    array = compact(axial.array, axial.array.shape)
    return _Opened(array, axial.spacing, axial.orientation, axial.positions_mm, image.eight_bit,
                   modality, image.notes + axial.notes)  # fmt: skip


def _describe(opened: _Opened, source: VolumeSource) -> Volume:
    """Add what the values tell: modality, windowing, padding, range of intensities."""
    array, notes, modality = opened.array, list(opened.notes), opened.modality
    if source.kind == "file" and looks_like_labels(array):
        raise Unreadable("it looks like a label map (few whole numbers, in patches), not an image")
    if modality is None:
        is_hu = not opened.eight_bit and looks_like_hu(array)
        modality = "CT" if is_hu else "unknown"
        notes.append(f"modality guessed from the values: {modality}")
    elif modality == "CT" and not opened.eight_bit and not looks_like_hu(array):
        notes.append("said to be CT, but its values show no air or are out of the range of HU")
    intensity = None
    if opened.eight_bit:
        intensity = {"low": 0.0, "high": 255.0}  # the ends of the window
        notes.append("8-bit values, taken as windowed")
    elif modality != "CT":
        intensity = robust_range(array)
    elif (padding := padding_value(array)) is not None:
        share = np.count_nonzero(array == padding) / array.size
        notes.append(f"padding value {padding} outside the field of view ({share:.0%}), kept")
    return Volume(
        array=array,
        spacing=opened.spacing,
        orientation=opened.orientation,
        modality=modality,
        windowed=opened.eight_bit,
        positions_mm=opened.positions_mm,
        intensity=intensity,
        notes=tuple(notes),
    )


def _short(error: BaseException) -> str:
    """The last line of an error without addresses, paths and repeated prefixes."""
    if isinstance(error, MemoryError):
        return "not enough memory"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    text = re.sub(r"ITK ERROR: |\w+\(0x[0-9a-f]+\): |(?<!\w)(/[^\s:,'\"]+)+[:,]?", "", lines[-1])
    return plain_text(f"{type(error).__name__}: {text.strip()}"[:200].rstrip(": "))
