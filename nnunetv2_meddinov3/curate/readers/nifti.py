"""NIfTI files: geometry as SimpleITK sees it, voxels decoded here.

SimpleITK silently fills up what a truncated or damaged NIfTI file lacks, and refuses axes that are
not perpendicular. So the voxels come from the checked stream, and such axes from nibabel.
"""

from __future__ import annotations

import gzip
from io import BufferedReader
from pathlib import Path

import nibabel
import numpy as np

from nnunetv2_meddinov3.curate.orient import compact
from nnunetv2_meddinov3.curate.readers.images import (
    FLAT_NOTE,
    grid_of,
    open_header,
    single_volume,
)
from nnunetv2_meddinov3.curate.volume import Grid, Image, Unreadable, check_rescale, check_size

HEADER_BYTES = 540  # of NIfTI-2, the longer of the two headers
GZIP_MAGIC = b"\x1f\x8b"
TO_MM = {"meter": 1000.0, "mm": 1.0, "micron": 0.001, "unknown": 1.0}
SHARED_DTYPES = "iuf"  # kinds of numbers that are one value a voxel


def read_nifti(path: Path) -> Image:
    """Read a .nii or .nii.gz.

    Raises:
        Unreadable: If it is truncated, damaged, too large, or not one volume of one value a voxel.
        OSError, EOFError, zlib.error: From the decoder if the stream is damaged.
    """
    with path.open("rb") as file:
        compressed = file.read(2) == GZIP_MAGIC
    with gzip.open(path) if compressed else path.open("rb") as stream:
        start = stream.read(HEADER_BYTES)
        header = _parse_header(start)
        size = single_volume(header.get_data_shape())
        dtype, offset = _dtype(header), float(header["vox_offset"])
        if dtype.kind not in SHARED_DTYPES:
            raise Unreadable("it has colours or complex numbers, not one value per voxel")
        check_size(size, dtype.itemsize, path.stat().st_size, compressed)
        if not 0 <= offset <= 1 << 24:
            raise Unreadable(f"its header puts the voxels at byte {offset:g}")
        voxels = _read_voxels(stream, start, int(offset), int(np.prod(size)) * dtype.itemsize)
    array = voxels.view(dtype).reshape([1] * (3 - len(size)) + size[::-1])
    notes = [FLAT_NOTE] if len(size) == 2 else []
    if not (header["sform_code"] or header["qform_code"]):
        notes.append("its header states no orientation; taken as SimpleITK takes it")
    scaled = _rescale(array, header)
    eight_bit = scaled is array and dtype == np.uint8
    grid = _grid(path, header, notes)
    return Image(scaled, grid, eight_bit=eight_bit, notes=notes)


def _parse_header(start: bytes) -> nibabel.Nifti1Header:
    for kind in (nibabel.Nifti1Header, nibabel.Nifti2Header):
        if kind.may_contain_header(start):
            header = kind(start[: kind.template_dtype.itemsize], check=False)
            if bytes(header["magic"]).startswith(b"n+") and 2 <= header["dim"][0] <= 7:
                return header
    raise Unreadable("it is not a NIfTI file")


def _dtype(header: nibabel.Nifti1Header) -> np.dtype:
    try:
        return header.get_data_dtype()
    except (KeyError, nibabel.spatialimages.HeaderDataError) as error:
        code = int(header["datatype"])
        raise Unreadable(f"its header states an unknown type of voxels ({code})") from error


def _read_voxels(
    stream: gzip.GzipFile | BufferedReader, start: bytes, offset: int, n_bytes: int
) -> np.ndarray:
    """Return the bytes of the voxels; reading to the end lets gzip check its checksum."""
    rest = stream.read(max(0, offset - len(start)))
    head = (start + rest)[offset:]
    voxels = np.empty(n_bytes, dtype=np.uint8)
    filled = min(len(head), n_bytes)
    voxels[:filled] = np.frombuffer(head[:filled], dtype=np.uint8)
    view = voxels.data
    while filled < n_bytes:
        got = stream.readinto(view[filled:])
        if not got:
            raise Unreadable(f"it is truncated: it has {filled} of {n_bytes} bytes of voxels")
        filled += got
    stream.read(1)
    return voxels


def _rescale(array: np.ndarray, header: nibabel.Nifti1Header) -> np.ndarray:
    """Apply slope and intercept; a slope of 0 or NaN means no scaling, whatever the intercept.

    That is the standard's rule, and nibabel's. SimpleITK adds the intercept all the same.
    """
    pair = np.nan_to_num([header["scl_slope"], header["scl_inter"]], posinf=np.inf)
    slope, intercept = map(float, pair)
    if slope == 0 or (slope, intercept) == (1, 0):
        return array
    check_rescale(slope, intercept)
    return compact((values * slope + intercept for values in array), array.shape)


def _grid(path: Path, header: nibabel.Nifti1Header, notes: list[str]) -> Grid:
    """Geometry by SimpleITK, as nnU-Net sees it, else by nibabel."""
    try:
        grid = grid_of(open_header(path, "NiftiImageIO"))
    except RuntimeError:
        grid = None
    if grid is not None and grid.fault() is None:
        return grid
    affine = header.get_best_affine().astype(float)
    affine *= TO_MM[header.get_xyzt_units()[0]]
    affine[:2] *= -1  # RAS to LPS
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    notes.append("axes that SimpleITK refuses, taken from nibabel")
    with np.errstate(invalid="ignore", divide="ignore"):
        x, y, z = map(float, spacing)
        return Grid(affine[:3, :3] / spacing, (x, y, z), affine[:3, 3])
