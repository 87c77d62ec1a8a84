"""From the axes of a file to LPS axial slices: transposed and flipped, never resampled."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from nnunetv2_meddinov3.curate.volume import Unreadable

LETTERS = ("RL", "AP", "IS")  # towards the negative and the positive end of x, y, z in LPS
PLANES = ("sagittal", "coronal", "axial")  # by the axis that the slices are stacked along
MAX_SKEW = 0.05  # cosine between rows and columns from which pixels are no rectangles


@dataclass(frozen=True)
class Grid:
    """Where the voxels of an array (z, y, x) lie, in LPS coordinates and mm.

    Attributes:
        direction: (3, 3), the columns are the unit vectors of the index axes x, y, z. They need
            not be perpendicular (gantry tilt).
        spacing: (x, y, z) in mm, along those vectors.
        origin: centre of the first voxel in mm.
    """

    direction: np.ndarray
    spacing: tuple[float, float, float]
    origin: np.ndarray

    def fault(self) -> str | None:
        """Why no image can lie so, or None."""
        values = np.concatenate([self.direction.ravel(), self.spacing, self.origin])
        if not np.isfinite(values).all():
            return "its header has positions or axes that are not finite numbers"
        if min(self.spacing) <= 0:
            return f"its header has a voxel size of {min(self.spacing):g} mm"
        if abs(np.linalg.det(self.direction)) < 0.1:
            return "the axes in its header span no volume"
        return None


@dataclass
class Axial:
    """An array seen as axial slices, with what the record keeps of its geometry.

    Attributes:
        array: (S, H, W), a view of the array that came in.
        spacing: (z, y, x) in mm; z is the distance of the slices' planes.
        orientation: letters of the index axes x, y, z before, such as ``"LPS"``.
        positions_mm: (S,) along the slices' normal, which for untilted slices is the z axis.
        stacked_along: index axis (0, 1 or 2) that runs through the axial slices.
        reverse: whether that axis was flipped.
        notes: remarks about tilt and reformatting.
    """

    array: np.ndarray
    spacing: tuple[float, float, float]
    orientation: str
    positions_mm: np.ndarray
    stacked_along: int
    reverse: bool
    notes: list[str]


def to_axial(array: np.ndarray, grid: Grid) -> Axial:
    """View an array (z, y, x) as slices from caudal to cranial, rows to P, columns to L.

    Raises:
        Unreadable: If the grid is impossible or its pixels are no rectangles.
    """
    if fault := grid.fault():
        raise Unreadable(fault)
    order = _nearest_axes(grid.direction)
    signs = [1.0 if grid.direction[world, axis] >= 0 else -1.0 for world, axis in enumerate(order)]
    view = array.transpose([2 - axis for axis in reversed(order)])
    view = view[tuple(slice(None, None, int(sign)) for sign in reversed(signs))]

    axes = grid.direction[:, order] * signs  # columns: towards L, P and S
    steps = axes * np.array(grid.spacing)[list(order)]
    first = grid.origin.astype(float)
    for world, axis in enumerate(order):
        if signs[world] < 0:
            size = array.shape[2 - axis]
            first = first + (size - 1) * grid.spacing[axis] * grid.direction[:, axis]
    if abs(axes[:, 0] @ axes[:, 1]) > MAX_SKEW:
        raise Unreadable("the rows and columns of its axial slices are not perpendicular")
    normal = np.cross(axes[:, 0], axes[:, 1])
    normal /= np.linalg.norm(normal)
    distance = float(normal @ steps[:, 2])
    return Axial(
        array=view,
        spacing=(distance, grid.spacing[order[1]], grid.spacing[order[0]]),
        orientation=_letters(order, signs),
        positions_mm=float(normal @ first) + distance * np.arange(len(view)),
        stacked_along=order[2],
        reverse=signs[2] < 0,
        notes=_notes(order, normal, axes[:, 2]),
    )


def compact(slices: Iterable[np.ndarray], shape: tuple[int, int, int]) -> np.ndarray:
    """Gather slices into int16 where that holds every value exactly, else into float32.

    Args:
        slices: arrays (H, W) of any number type, as many as ``shape[0]``; read one at a time.
        shape: (S, H, W) of the result.
    """
    result = np.empty(shape, dtype=np.int16)
    for index, values in enumerate(slices):
        if result.dtype == np.int16:
            exact = exact_int16(values)
            if exact is None:
                result = result.astype(np.float32)
            else:
                result[index] = exact
                continue
        with np.errstate(over="ignore"):  # beyond float32 is infinite, which slice rules drop
            result[index] = values
    return result


def exact_int16(values: np.ndarray) -> np.ndarray | None:
    """The same values as int16, or None if one is no whole number that int16 holds."""
    if values.dtype == np.int16 or not values.size:
        return values.astype(np.int16, copy=False)
    low, high = values.min(), values.max()
    if not (low >= -32768 and high <= 32767):  # also where there is a NaN
        return None
    whole = values.astype(np.int16)
    return whole if values.dtype.kind in "iub" or np.array_equal(whole, values) else None


def _nearest_axes(direction: np.ndarray) -> list[int]:
    """For each axis x, y, z of the patient the index axis that is nearest to it."""
    cosines = np.abs(direction)
    orders = itertools.permutations(range(3))
    return list(max(orders, key=lambda order: sum(cosines[w, a] for w, a in enumerate(order))))


def _letters(order: list[int], signs: list[float]) -> str:
    letters = [""] * 3
    for world, axis in enumerate(order):
        letters[axis] = LETTERS[world][signs[world] > 0]
    return "".join(letters)


def _notes(order: list[int], normal: np.ndarray, through: np.ndarray) -> list[str]:
    notes = []
    if order[2] != 2:
        plane = PLANES[order.index(2)]
        notes.append(f"acquired in {plane} slices, axial ones are cut across them")
    oblique, shear = _degrees(normal[2]), _degrees(normal @ through)
    if oblique >= 1:
        notes.append(f"slices are {oblique:.0f} degrees oblique to the axial plane")
    if shear >= 1:
        notes.append(f"gantry tilt {shear:.0f} degrees, slices kept as acquired")
    return notes


def _degrees(cosine: float) -> float:
    return float(np.degrees(np.arccos(np.clip(cosine, -1, 1))))
