"""Pictures (PNG, BMP, TIFF, JPEG): slices without geometry, often windowed to 8 bits.

Read with Pillow, which refuses truncated files where SimpleITK fills them up.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageSequence

from nnunetv2_meddinov3.curate.limits import check_size
from nnunetv2_meddinov3.curate.readers.imagefile import ImageFile, ending_of
from nnunetv2_meddinov3.curate.volume import Unreadable


def read_picture(path: Path) -> ImageFile:
    """Read a picture, or the pages of a TIFF as a stack.

    Raises:
        Unreadable: If it has colours, pages of several sizes, or a size that cannot be.
        OSError: From Pillow if it is damaged or truncated.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd tags, which say nothing about the pixels
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            array = _pages(path)
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise Unreadable("it has more pixels than any slice") from error
    notes = ["compressed with loss (JPEG)"] if ending_of(path.name) in (".jpg", ".jpeg") else []
    spacing = _spacing_beside(path) if len(array) > 1 else None
    return ImageFile(array, None, array.dtype == np.uint8, spacing, notes)


def _pages(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        count = getattr(picture, "n_frames", 1)
        check_size((*picture.size, count), 4, path.stat().st_size, compressed=True)
        pages = [_grey(page) for page in ImageSequence.Iterator(picture)]
    if len({(page.shape, page.dtype) for page in pages}) > 1:
        raise Unreadable("its pages differ in size or type")
    return np.stack(pages)


def _grey(picture: Image.Image) -> np.ndarray:
    """The grey values (H, W) of a picture whose colours, if it has any, are all equal."""
    if picture.mode in ("P", "PA", "1", "CMYK", "YCbCr", "LAB", "HSV"):
        picture = picture.convert("L" if picture.mode == "1" else "RGB")
    array = np.asarray(picture)
    if array.ndim == 2:
        return array
    grey = array[..., 0]
    colours = array[..., : 3 if array.shape[-1] > 2 else 1]  # without the opacity
    if not (colours == grey[..., None]).all():
        raise Unreadable("it is a colour picture")
    return grey


def _spacing_beside(path: Path) -> tuple[float, float, float] | None:
    """(z, y, x) in mm from the CASE.json that nnU-Net keeps beside a 3D CASE_0000.tif."""
    stem = re.sub(r"_\d{4}$", "", path.stem)
    try:
        noted = json.loads(path.with_name(f"{stem}.json").read_text(encoding="utf-8"))["spacing"]
        z, y, x = (float(value) for value in noted)
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return (z, y, x) if min(z, y, x) > 0 and math.isfinite(z + y + x) else None
