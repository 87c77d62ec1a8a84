"""From the axes of a file to LPS axial slices: transposed and flipped, never resampled."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from nnunetv2_meddinov3.curate.volume import Grid, Image, Unreadable, Volume

LETTERS = ("RL", "AP", "IS")  # towards the negative and the positive end of x, y, z in LPS
PLANES = ("sagittal", "coronal", "axial")  # by the axis that the slices are stacked along
MAX_SKEW = 0.05  # cosine between rows and columns from which pixels are not rectangles


class Orientation(NamedTuple):
    """How the axes of a file lie in the patient.

    Attributes:
        order: For x, y and z of the patient the index axis nearest to it, x of the file being 0.
        signs: 1 or -1 for its sense.
    """

    order: tuple[int, ...]
    signs: tuple[float, ...]

    @classmethod
    def of(cls, grid: Grid) -> Orientation:
        """Return that of a grid.

        Raises:
            Unreadable: If no image can have the grid.
        """
        if fault := grid.fault():
            raise Unreadable(fault)
        cosines = np.abs(grid.direction)
        orders = itertools.permutations(range(3))
        order = max(orders, key=lambda order: sum(cosines[w, a] for w, a in enumerate(order)))
        signs = (
            1.0 if grid.direction[world, axis] >= 0 else -1.0 for world, axis in enumerate(order)
        )
        return cls(order, tuple(signs))

    def to_slices(self, array: np.ndarray) -> np.ndarray:
        """Return an array (z, y, x, ...) of the file as axial slices (S, H, W, ...), a view."""
        return array.transpose(*self._axes(), *range(3, array.ndim))[self._senses()]

    def to_file(self, slices: np.ndarray) -> np.ndarray:
        """Return axial slices (S, H, W, ...) as an array (z, y, x, ...) of the file, a view."""
        back = np.argsort(self._axes())
        return slices[self._senses()].transpose(*back, *range(3, slices.ndim))

    def place_in_slices(
        self, voxel: tuple[int, int, int], shape: tuple[int, ...]
    ) -> tuple[int, int, int]:
        """Return slice, row and column of a voxel (z, y, x) of a file's array of some shape."""
        own = zip(self._axes(), reversed(self.signs), strict=True)
        s, row, column = (
            voxel[axis] if sign > 0 else shape[axis] - 1 - voxel[axis] for axis, sign in own
        )
        return s, row, column

    def place_in_file(self, place: Sequence[int], shape: tuple[int, ...]) -> tuple[int, int, int]:
        """Return the voxel (z, y, x) of a slice, row and column; the inverse of the above."""
        voxel = [0, 0, 0]
        for own, axis, sign in zip(place, self._axes(), reversed(self.signs), strict=True):
            voxel[axis] = own if sign > 0 else shape[axis] - 1 - own
        z, y, x = voxel
        return z, y, x

    def _axes(self) -> list[int]:
        return [2 - axis for axis in reversed(self.order)]

    def _senses(self) -> tuple[slice, ...]:
        return tuple(slice(None, None, int(sign)) for sign in reversed(self.signs))


def reorient(image: Image) -> Volume:
    """Return an image as slices from caudal to cranial, rows to P, columns to L.

    The values are int16 where each is a whole number that int16 holds, else float32. Pictures,
    which have no geometry, keep their order.

    Raises:
        Unreadable: If the geometry is impossible, its pixels are not rectangles, or axial slices
            would be cut across missing ones.
    """
    notes: list[str] = []
    if image.grid is None:
        view, spacing, orientation = image.array, image.spacing, "unknown"
        positions = None if spacing is None else spacing[0] * np.arange(len(view))
    else:
        axes = Orientation.of(image.grid)
        order, signs = axes
        view = axes.to_slices(image.array)
        spacing, positions, notes = _place(image.grid, image.array.shape, order, signs)
        orientation = _letters(order, signs)
        if image.positions_mm is not None and order[2] == 2:  # axial as acquired
            positions = image.positions_mm if signs[2] > 0 else -image.positions_mm[::-1]
        elif image.has_gaps:
            raise Unreadable("it was acquired across the axial plane and slices of it are missing")
    return Volume(
        array=compact(view, view.shape),
        spacing=spacing,
        orientation=orientation,
        modality=image.modality,
        windowed=image.eight_bit,
        positions_mm=positions,
        intensity=None,
        notes=(*image.notes, *notes),
    )


def _place(
    grid: Grid, shape: tuple[int, ...], order: tuple[int, ...], signs: tuple[float, ...]
) -> tuple[tuple[float, float, float], np.ndarray, list[str]]:
    """Spacing (z, y, x), z of the axial slices' planes, and remarks about tilt and reformatting.

    The first spacing is the distance of the planes; positions are along the slices' normal, which
    for untilted slices is the z axis.
    """
    axes = grid.direction[:, list(order)] * signs  # columns: towards L, P and S
    steps = axes * np.array(grid.spacing)[list(order)]
    first = grid.origin.astype(float)
    for world, axis in enumerate(order):
        if signs[world] < 0:
            size = shape[2 - axis]
            first = first + (size - 1) * grid.spacing[axis] * grid.direction[:, axis]
    if abs(axes[:, 0] @ axes[:, 1]) > MAX_SKEW:
        raise Unreadable("the rows and columns of its axial slices are not perpendicular")
    normal = np.cross(axes[:, 0], axes[:, 1])
    normal /= np.linalg.norm(normal)
    distance = float(normal @ steps[:, 2])
    positions = float(normal @ first) + distance * np.arange(shape[2 - order[2]])
    spacing = (distance, grid.spacing[order[1]], grid.spacing[order[0]])
    return spacing, positions, _notes(order, normal, axes[:, 2])


def compact(slices: Iterable[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """Gather slices into int16 where that holds every value exactly, else into float32.

    Args:
        slices: Arrays (H, W) of any number type, as many as ``shape[0]``; read one at a time.
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
    """Return the values as int16, or None if one is not a whole number that int16 holds."""
    if values.dtype == np.int16 or not values.size:
        return values.astype(np.int16, copy=False)
    low, high = values.min(), values.max()
    if not (low >= -32768 and high <= 32767):  # also where there is a NaN
        return None
    whole = values.astype(np.int16)
    return whole if values.dtype.kind in "iub" or np.array_equal(whole, values) else None


def _letters(order: tuple[int, ...], signs: tuple[float, ...]) -> str:
    letters = [""] * 3
    for world, axis in enumerate(order):
        letters[axis] = LETTERS[world][signs[world] > 0]
    return "".join(letters)


def _notes(order: tuple[int, ...], normal: np.ndarray, through: np.ndarray) -> list[str]:
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
