"""Maps of features over the anatomy: as a picture, and as a NIfTI in the place of the scan."""

from __future__ import annotations

import gzip
from pathlib import Path

import nibabel
import numpy as np
import torch
from jaxtyping import Float, UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch.nn import functional as F

from nnunetv2_meddinov3.features.scans import Scan
from nnunetv2_meddinov3.files import replacing, write_bytes

_MOST = 24  # slices in a picture
_COLUMNS = 6
_OPACITY = 0.65  # of colours over the anatomy
_RGB = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])


def draw_montage(
    scan: Scan, maps: dict[int, Float[np.ndarray, "row column 3"]], path: Path
) -> None:
    """Draw slices above their maps of colours.

    Args:
        scan: The scan.
        maps: Number of a slice -> red, green and blue of its patches; black shows the slice alone.
        path: PNG to write.

    Raises:
        UserError: If it cannot be written.
    """
    indices = sorted(maps)
    places = np.linspace(0, len(indices) - 1, min(_MOST, len(indices))).round().astype(int)
    shown = [indices[place] for place in sorted(set(places.tolist()))]
    columns = min(_COLUMNS, len(shown))
    lines = -(-len(shown) // columns)
    aspect = pixel_aspect(scan)
    height = 2 * lines * (2.2 * aspect * scan.slices.shape[1] / scan.slices.shape[2] + 0.15)
    figure = Figure(figsize=(2.2 * columns, min(60.0, height + 0.4)), layout="constrained")
    axes: np.ndarray = figure.subplots(2 * lines, columns, squeeze=False)
    axis: Axes
    for axis in axes.ravel():
        axis.set_axis_off()
    for number, index in enumerate(shown):
        line, column = divmod(number, columns)
        grey = grey_of(scan, index)
        top, below = axes[2 * line, column], axes[2 * line + 1, column]
        top.imshow(grey, cmap="gray", vmin=0, vmax=1, aspect=aspect)
        top.set_title(scan.said(index), fontsize=8)
        below.imshow(over_anatomy(grey, maps[index], scan.body(index)), aspect=aspect)
    figure.suptitle(f"{scan.name}: principal components of patches", fontsize=9)
    with replacing(path) as part:
        figure.savefig(part, format="png", dpi=130)


def over_anatomy(
    grey: Float[np.ndarray, "height width"],
    colours: Float[np.ndarray, "row column 3"],
    body: np.ndarray,
) -> Float[np.ndarray, "height width 3"]:
    """Return a slice with the colours of its patches over the body, interpolated between them."""
    known = np.asarray(colours.any(axis=-1), np.float32)
    stacked = np.concatenate([colours.astype(np.float32), known[..., None]], axis=-1)
    maps = torch.from_numpy(stacked).movedim(-1, 0)[None]
    fine = F.interpolate(maps, grey.shape, mode="bilinear", align_corners=False)[0].movedim(0, -1)
    weight = fine[..., 3:].numpy()
    colour = fine[..., :3].numpy() / np.maximum(weight, 1e-6)
    share = np.where((weight > 0.5) & body[..., None], _OPACITY, 0.0)
    return np.clip((1 - share) * grey[..., None] + share * colour, 0, 1).astype(np.float32)


def write_colours(
    scan: Scan, voxels: UInt8[np.ndarray, "slice height width 3"], path: Path
) -> None:
    """Write colours of the slices' pixels as a NIfTI of RGB in the order and place of the scan.

    Raises:
        UserError: If it cannot be written.
    """
    in_file = _x_y_z(scan, voxels)
    _write_nifti(scan, np.ascontiguousarray(in_file).view(_RGB)[..., 0], path)


def write_scalar(scan: Scan, voxels: Float[np.ndarray, "slice height width"], path: Path) -> None:
    """Write numbers of the slices' pixels as a NIfTI of fp32 in the order and place of the scan.

    Raises:
        UserError: If it cannot be written.
    """
    _write_nifti(scan, _x_y_z(scan, voxels.astype(np.float32)), path)


def _x_y_z(scan: Scan, voxels: np.ndarray) -> np.ndarray:
    """Return pixels of slices in the file's order, x first as NIfTI has them."""
    return scan.to_file(voxels).swapaxes(0, 2)


def _write_nifti(scan: Scan, data: np.ndarray, path: Path) -> None:
    assert scan.grid is not None
    affine = scan.grid.affine_ras()
    image = nibabel.Nifti1Image(data, affine)
    image.header.set_xyzt_units("mm")
    image.set_qform(affine, code=1)
    image.set_sform(affine, code=1)
    write_bytes(path, gzip.compress(image.to_bytes(), compresslevel=4, mtime=0))


def grey_of(scan: Scan, index: int) -> Float[np.ndarray, "height width"]:
    """Return a slice in its window, from 0 to 1."""
    low, high = scan.window
    shown = (scan.slices[index].astype(np.float32) - low) / (high - low)
    return shown.clip(0, 1)


def pixel_aspect(scan: Scan) -> float:
    """Return how much taller than wide a pixel is."""
    return 1.0 if scan.spacing is None else scan.spacing[1] / scan.spacing[2]
