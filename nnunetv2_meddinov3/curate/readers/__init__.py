"""One reader for each kind of input, and ``read``, which picks the right one."""

from __future__ import annotations

import re
import struct
import zlib
from pathlib import Path

import nibabel

from nnunetv2_meddinov3.curate.readers.dicom import read_series
from nnunetv2_meddinov3.curate.readers.images import (
    PICTURES,
    ending_of,
    read_image,
    read_picture,
    without_itk_warnings,
)
from nnunetv2_meddinov3.curate.readers.nifti import read_nifti
from nnunetv2_meddinov3.curate.volume import Image, Unreadable, VolumeSource, plain_text

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


def read(source: VolumeSource) -> Image:
    """Read the voxels and the geometry of a source: a file, a picture or a DICOM series.

    The values are HU for CT (rescale applied) and the file's own elsewhere. Padding and NaN stay
    as they are.

    Raises:
        Unreadable: With the reason, if it is damaged or not one volume of grey values.
    """
    try:
        with without_itk_warnings():
            return _read(source)
    except Unreadable:
        raise
    except DAMAGE as error:
        raise Unreadable(f"it cannot be read ({_short(error)})") from error


def _read(source: VolumeSource) -> Image:
    if source.kind == "dicom":
        return read_series([Path(path) for path in source.paths], source.frames)
    path = Path(source.paths[0])
    ending = ending_of(path.name) or ""
    if ending in PICTURES:
        return read_picture(path)
    return read_nifti(path) if ending.startswith(".nii") else read_image(path)


def _short(error: BaseException) -> str:
    """Return the last line of an error without addresses, paths and repeated prefixes."""
    if isinstance(error, MemoryError):
        return "not enough memory"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    text = re.sub(r"ITK ERROR: |\w+\(0x[0-9a-f]+\): |(?<!\w)(/[^\s:,'\"]+)+[:,]?", "", lines[-1])
    return plain_text(f"{type(error).__name__}: {text.strip()}"[:200].rstrip(": "))
