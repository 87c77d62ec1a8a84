"""Image files: volumes that SimpleITK reads (NRRD, MetaImage, GIPL), and pictures.

Pictures (PNG, BMP, TIFF, JPEG) are slices without geometry, often windowed to 8 bits. Pillow reads
them, which refuses truncated files where SimpleITK fills them up.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import SimpleITK as sitk
from PIL import ImageSequence

from nnunetv2_meddinov3.curate.volume import Grid, Image, Unreadable, check_size

VOLUME_IO = {
    ".nii.gz": "NiftiImageIO",
    ".nii": "NiftiImageIO",
    ".nrrd": "NrrdImageIO",
    ".nhdr": "NrrdImageIO",
    ".mha": "MetaImageIO",
    ".mhd": "MetaImageIO",
    ".gipl": "GiplImageIO",
}
PICTURES = (".png", ".bmp", ".tif", ".tiff", ".jpg", ".jpeg")
ENDINGS = (*VOLUME_IO, *PICTURES)
DETACHED = (".mhd", ".nhdr")  # headers whose voxels are in another file
UNCOMPRESSED = (".gipl",)
FLAT_NOTE = "a 2D file, the distance of slices is set to 1 mm"


def ending_of(name: str) -> str | None:
    """Return the known ending of a file name in lower case, None if it has none."""
    lower = name.lower()
    return next((ending for ending in ENDINGS if lower.endswith(ending)), None)


def read_image(path: Path) -> Image:
    """Read a volume of a known ending except NIfTI, for which see ``nifti``.

    Raises:
        Unreadable: If its size is impossible, or it has colours or several volumes.
        RuntimeError: From SimpleITK if it is damaged.
    """
    ending = ending_of(path.name) or ""
    reader = open_header(path, VOLUME_IO[ending])
    size = single_volume(reader.GetSize())
    parts = reader.GetNumberOfComponents()
    pixel = sitk.Image([1, 1], reader.GetPixelID(), parts)
    file_bytes = math.inf if ending in DETACHED else path.stat().st_size
    n_bytes = pixel.GetSizeOfPixelComponent() * parts
    check_size(size, n_bytes, file_bytes, ending not in UNCOMPRESSED)
    if parts > 1:
        raise Unreadable(f"it has {parts} values per voxel, not one")
    if "complex" in pixel.GetPixelIDTypeAsString():
        raise Unreadable("its values are complex numbers")
    image = reader.Execute()
    array = sitk.GetArrayFromImage(image).reshape([1] * (3 - len(size)) + size[::-1])
    notes = [FLAT_NOTE] if len(size) == 2 else []
    return Image(array, grid_of(image), eight_bit=array.dtype == np.uint8, notes=notes)


def open_header(path: Path, image_io: str) -> sitk.ImageFileReader:
    """Read a header by one format's reader only, so that a renamed file is refused."""
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.SetImageIO(image_io)
    reader.ReadImageInformation()
    return reader


@contextmanager
def without_itk_warnings() -> Iterator[None]:
    """Keep ITK from writing to stderr meanwhile: what matters is in the notes."""
    before = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        yield
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(before)


def single_volume(shape: Sequence[int]) -> list[int]:
    """Return the two or three sizes (x, y, z) of an image, without further axes of size 1.

    Raises:
        Unreadable: If the image holds several volumes.
    """
    size = [int(n) for n in shape]
    while len(size) > 3 and size[-1] == 1:
        size.pop()
    if len(size) > 3:
        raise Unreadable(f"it is {len(size)}D ({'x'.join(map(str, size))} voxels), not one volume")
    return size


def grid_of(header: sitk.Image | sitk.ImageFileReader) -> Grid:
    """Return the geometry of the first three axes, the third one made up for a 2D image."""
    n = header.GetDimension()
    used = min(n, 3)
    direction, spacing, origin = np.eye(3), np.ones(3), np.zeros(3)
    direction[:used, :used] = np.reshape(header.GetDirection(), (n, n))[:used, :used]
    spacing[:used] = header.GetSpacing()[:used]
    origin[:used] = header.GetOrigin()[:used]
    return Grid(direction, (float(spacing[0]), float(spacing[1]), float(spacing[2])), origin)


def read_picture(path: Path) -> Image:
    """Read a picture, or the pages of a TIFF as a stack.

    Raises:
        Unreadable: If it has colours, pages of several sizes, or an impossible size.
        OSError: From Pillow if it is damaged or truncated.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd tags, which say nothing about the pixels
        warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
        try:
            array = _pages(path)
        except (
            PIL.Image.DecompressionBombWarning,
            PIL.Image.DecompressionBombError,
        ) as error:
            raise Unreadable("it has more pixels than any slice") from error
    notes = ["compressed with loss (JPEG)"] if ending_of(path.name) in (".jpg", ".jpeg") else []
    spacing = _spacing_beside(path) if len(array) > 1 else None
    return Image(array, None, eight_bit=array.dtype == np.uint8, spacing=spacing, notes=notes)


def _pages(path: Path) -> np.ndarray:
    with PIL.Image.open(path) as picture:
        count = getattr(picture, "n_frames", 1)
        check_size((*picture.size, count), 4, path.stat().st_size, compressed=True)
        pages = [_grey(page) for page in ImageSequence.Iterator(picture)]
    if len({(page.shape, page.dtype) for page in pages}) > 1:
        raise Unreadable("its pages differ in size or type")
    return np.stack(pages)


def _grey(picture: PIL.Image.Image) -> np.ndarray:
    """Return the grey values (H, W) of a picture whose colours, if it has any, are all equal."""
    if picture.mode in ("P", "PA", "1", "CMYK", "YCbCr", "LAB", "HSV"):
        picture = picture.convert("L" if picture.mode == "1" else "RGB")
    array: np.ndarray[Any, np.dtype[Any]] = np.asarray(picture)
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
