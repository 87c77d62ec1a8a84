"""A volume on its way into a store: the input found, the image read, the axial slices seen.

Also what is refused before anything is allocated: sizes, memory and rescales that no file can mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

MAX_VOXELS = 4e9
MAX_RATIO = 1040  # deflate, the codec of the volume formats, cannot shrink more than 1032-fold
MAX_RESCALE = 1e5  # of a slope or intercept that leads to HU or to the units of MR


class Unreadable(ValueError):
    """An input that cannot become a volume; the message is the reason, one sentence, no path."""


def plain_text(text: str) -> str:
    """Return text that any file can hold: invalid Unicode of a name or header is escaped."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, as in "1 slice" and "2 slices"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


@dataclass(frozen=True)
class VolumeSource:
    """An input that was found but not opened yet; cheap, picklable, ordered by its key.

    Attributes:
        key: Stable name, posix, never absolute: ``<basename of the argument>/<relative path>``;
            a DICOM series is its folder's key, ``#`` and the SeriesInstanceUID; a second volume of
            one UID in one folder has ``+`` and eight digits behind it.
        kind: ``"file"``, ``"dicom"`` or ``"png"``.
        paths: Absolute files; those of a DICOM series are in no particular order.
        dataset: Name of the nnU-Net dataset or of the folder given as source.
        patient: Best known patient or case (nnU-Net case, hash of PatientID, else file stem).
        channel_name: Name of the nnU-Net channel in dataset.json, which tells the modality; None
            where there are no channels.
        frames: For each file of a DICOM series the frames that are of this volume, counted from 0,
            none for a file of one image. Empty where no file is multi-frame.
    """

    key: str
    kind: str
    paths: tuple[str, ...]
    dataset: str
    patient: str
    channel_name: str | None = None
    frames: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class Grid:
    """Positions of the voxels of an array (z, y, x), in LPS coordinates and mm.

    Attributes:
        direction: (3, 3), the columns are the unit vectors of the index axes x, y, z. They need
            not be perpendicular (gantry tilt).
        spacing: (x, y, z) in mm, along those vectors.
        origin: Centre of the first voxel in mm.
    """

    direction: np.ndarray
    spacing: tuple[float, float, float]
    origin: np.ndarray

    def fault(self) -> str | None:
        """Return why no image can have this grid, or None."""
        values = np.concatenate([self.direction.ravel(), self.spacing, self.origin])
        if not np.isfinite(values).all():
            return "its header has positions or axes that are not finite numbers"
        if min(self.spacing) <= 0:
            return f"its header has a voxel size of {min(self.spacing):g} mm"
        if abs(np.linalg.det(self.direction)) < 0.1:
            return "the axes in its header span no volume"
        return None

    def affine_ras(self) -> np.ndarray:
        """Return the matrix (4, 4) from voxels (x, y, z) to mm in RAS, as NIfTI has it."""
        affine = np.eye(4)
        affine[:3, :3] = self.direction * self.spacing
        affine[:3, 3] = self.origin
        affine[:2] *= -1
        return affine


@dataclass
class Image:
    """The voxels and geometry of an input as its files have them.

    Attributes:
        array: (z, y, x) with rescale applied.
        grid: Its geometry, None for pictures.
        eight_bit: Whether the file stores 8 bits a voxel, which cannot be HU.
        modality: ``"CT"`` or ``"MR"`` where the file says so, ``"unknown"`` for a CT in other units
            than HU, else None.
        spacing: (z, y, x) in mm of a stack of pictures whose spacing is noted beside it, else None.
        positions_mm: (z,) of each slice along the slices' normal, ascending, where the distances
            may differ; None where the grid says it all.
        has_gaps: Whether slices are missing in between.
        notes: Remarks for the record.
    """

    array: np.ndarray
    grid: Grid | None
    eight_bit: bool = False
    modality: str | None = None
    spacing: tuple[float, float, float] | None = None
    positions_mm: np.ndarray | None = None
    has_gaps: bool = False
    notes: list[str] = field(default_factory=list)


@dataclass
class Volume:
    """One volume as axial slices.

    Attributes:
        array: (S, H, W) in LPS axial order: slices caudal to cranial, rows anterior to
            posterior, columns right to left; HU for CT (rescale applied); integers or float32
            as the file has them.
        spacing: (z, y, x) in mm, None where unknown (PNG).
        orientation: Axes of the file before reorientation, such as ``"RAI"``.
        modality: One of ``modalities.MODALITIES`` or ``"unknown"``; None until the values were
            looked at.
        windowed: True for 8-bit images, whose values are not HU, unless they are MR or the like.
        positions_mm: (S,) position of each slice along z in mm, None where unknown.
        intensity: For values that are not HU the facts of their ``store.mapping.Mapping``, or the
            ends ``{"low": 0, "high": 255}`` of 8-bit pictures; None for CT in HU.
        notes: Remarks for the record, such as ``"3 duplicate slices left out"``.
    """

    array: np.ndarray
    spacing: tuple[float, float, float] | None
    orientation: str
    modality: str | None
    windowed: bool
    positions_mm: np.ndarray | None
    intensity: dict[str, float] | None
    notes: tuple[str, ...]


def check_size(size: Sequence[int], n_bytes: int, file_bytes: float, compressed: bool) -> None:
    """Refuse a declared size that the file cannot hold or the memory cannot take.

    Args:
        size: Voxels along each axis.
        n_bytes: Bytes a voxel in the file.
        file_bytes: Size of the file, or infinite where the voxels are in another one.
        compressed: Whether the voxels may be compressed.

    Raises:
        Unreadable: With the size that was declared.
    """
    shape = "x".join(map(str, size))
    if not size or min(size) < 1:
        raise Unreadable(f"its header declares {shape or 'no'} voxels")
    voxels = math.prod(size)
    if voxels > MAX_VOXELS:
        raise Unreadable(f"its header declares {shape} voxels, more than {MAX_VOXELS:.0e}")
    if voxels * n_bytes > file_bytes * (MAX_RATIO if compressed else 1):
        raise Unreadable(f"its header declares {shape} voxels, more than the file can hold")
    check_memory(voxels * (n_bytes + 4))  # as in the file, and as int16 or float32


def check_memory(n_bytes: float) -> None:
    """Refuse what would not fit into memory.

    Raises:
        Unreadable: If more is needed than is free.
    """
    free = free_memory()
    if free is not None and n_bytes > free:
        raise Unreadable(
            f"it needs about {n_bytes / 1e9:.1f} GB of memory, but only {free / 1e9:.1f} are free"
        )


def check_rescale(slope: float, intercept: float) -> None:
    """Refuse a rescale that cannot be meant.

    Raises:
        Unreadable: If the slope is 0, or one of both is not finite or out of all proportion.
    """
    sane = math.isfinite(slope) and math.isfinite(intercept) and slope != 0
    if not sane or max(abs(slope), abs(intercept)) > MAX_RESCALE:
        raise Unreadable(f"its rescale is absurd (slope {slope:g}, intercept {intercept:g})")


def free_memory() -> int | None:
    """Return the bytes that can be allocated without swapping, None where the system is silent."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    values = dict(line.split(":", 1) for line in lines)
    return int(values["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in values else None
