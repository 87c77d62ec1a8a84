"""Image files: which endings are known, and reading volumes with SimpleITK."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnunetv2_meddinov3.curate.limits import check_size
from nnunetv2_meddinov3.curate.orient import Grid
from nnunetv2_meddinov3.curate.volume import Unreadable

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
DETACHED = (".mhd", ".nhdr")  # headers whose voxels stand in another file
UNCOMPRESSED = (".gipl",)
FLAT_NOTE = "a 2D file, the distance of slices is set to 1 mm"


@dataclass
class ImageFile:
    """An image file's voxels and geometry.

    Attributes:
        array: (z, y, x) with rescale applied.
        grid: geometry, None for pictures.
        eight_bit: whether it stores 8 bits a voxel, which cannot be HU.
        spacing: (z, y, x) in mm of a stack of pictures with a note of it beside, else None.
        notes: remarks for the record.
    """

    array: np.ndarray
    grid: Grid | None
    eight_bit: bool
    spacing: tuple[float, float, float] | None = None
    notes: list[str] = field(default_factory=list)


def ending_of(name: str) -> str | None:
    """The known ending of a file name in lower case, None if it has none."""
    lower = name.lower()
    return next((ending for ending in ENDINGS if lower.endswith(ending)), None)


def read_image(path: Path) -> ImageFile:
    """Read a volume of a known ending but NIfTI, for which see ``nifti``.

    Raises:
        Unreadable: If its size cannot be, or it has colours or several volumes.
        RuntimeError: From SimpleITK if it is damaged.
    """
    ending = ending_of(path.name)
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
    eight_bit = array.dtype == np.uint8
    notes = [FLAT_NOTE] if len(size) == 2 else []
    return ImageFile(array, grid_of(image), eight_bit, notes=notes)


def open_header(path: Path, image_io: str) -> sitk.ImageFileReader:
    """Read a header by one format's reader only, so that a renamed file is refused."""
    sitk.ProcessObject.SetGlobalWarningDisplay(False)  # what matters is in the notes
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.SetImageIO(image_io)
    reader.ReadImageInformation()
    return reader


def single_volume(size: tuple[int, ...]) -> list[int]:
    """The two or three sizes (x, y, z) of an image, without further axes of size 1.

    Raises:
        Unreadable: If the image holds several volumes.
    """
    size = [int(n) for n in size]
    while len(size) > 3 and size[-1] == 1:
        size.pop()
    if len(size) > 3:
        raise Unreadable(f"it is {len(size)}D ({'x'.join(map(str, size))} voxels), not one volume")
    return size


def grid_of(header: sitk.Image | sitk.ImageFileReader) -> Grid:
    """The geometry of the first three axes, the third one made up for a 2D image."""
    n = header.GetDimension()
    used = min(n, 3)
    direction, spacing, origin = np.eye(3), np.ones(3), np.zeros(3)
    direction[:used, :used] = np.reshape(header.GetDirection(), (n, n))[:used, :used]
    spacing[:used] = header.GetSpacing()[:used]
    origin[:used] = header.GetOrigin()[:used]
    return Grid(direction, tuple(map(float, spacing)), origin)
