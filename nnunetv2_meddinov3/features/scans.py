"""Scans to be looked at: everything that ``meddinov3 curate`` reads, with the way back to its file.

Slices are axial, from caudal to cranial, rows to P, columns to L, as pretraining sees them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int16
from scipy import ndimage

from nnunetv2_meddinov3.curate.discover import find_sources, named
from nnunetv2_meddinov3.curate.modalities import check_modality, identify
from nnunetv2_meddinov3.curate.orient import Orientation, reorient
from nnunetv2_meddinov3.curate.readers import read
from nnunetv2_meddinov3.curate.slices import stack_slices
from nnunetv2_meddinov3.curate.volume import Grid, Unreadable, VolumeSource
from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.models.contracts import HU, NORMALISED

SOFT_TISSUE_HU = (-160.0, 240.0)  # the window in which CT is shown
_SMALL = 0.1  # of the largest part of the body in a slice: what is smaller is a table or a cable


@dataclass(frozen=True)
class Scan:
    """A volume as axial slices.

    Attributes:
        name: Of its files, unique among the scans of a command.
        slices: HU, or numbers of which ``ends`` are 0 and 1.
        spacing: (z, y, x) in mm, None where unknown (pictures).
        positions_mm: Of each slice along its normal, None where unknown.
        modality: As ``curate`` names it.
        ends: Stored numbers that are 0 and 1 in normalised values; None for HU.
        window: Numbers that are shown black and white.
        body_above: Numbers above it are body.
        unusable: Slices that hold no numbers, or show nothing.
        grid: Geometry of the file, None for pictures.
        notes: What was remarked when it was read.
    """

    name: str
    slices: Int16[np.ndarray, "slice height width"]
    spacing: tuple[float, float, float] | None
    positions_mm: np.ndarray | None
    modality: str
    ends: tuple[float, float] | None
    window: tuple[float, float]
    body_above: float
    unusable: frozenset[int]
    grid: Grid | None
    notes: tuple[str, ...]

    @property
    def unit(self) -> str:
        """Of the values, by which weights state their contract."""
        return HU if self.ends is None else NORMALISED

    def to_file(self, values: np.ndarray) -> np.ndarray:
        """Return values of the slices' pixels, (S, H, W, ...), in the file's order (z, y, x, ...).

        Pictures, which have no geometry, keep their order.
        """
        return values if self.grid is None else Orientation.of(self.grid).to_file(values)

    def place_of(self, point: Sequence[float], in_mm: bool) -> tuple[int, int, int]:
        """Return the slice, row and column of a voxel of the file or of a position.

        Args:
            point: Voxel (x, y, z), counted from 0, or position in mm, RAS.
            in_mm: Which of them it is.

        Raises:
            UserError: If it lies outside the scan, or the scan has no positions.
        """
        if in_mm and self.grid is None:
            raise UserError(f"--mm needs a scan with a geometry, but {self.name} has none.")
        shape = self.to_file(self.slices).shape
        voxel = np.array(point, float)
        if in_mm and self.grid is not None:
            voxel = np.linalg.solve(self.grid.affine_ras(), [*point, 1.0])[:3]
        x, y, z = (int(each) for each in np.rint(voxel))
        if not all(0 <= n < length for n, length in zip((z, y, x), shape, strict=True)):
            last = ", ".join(str(length - 1) for length in reversed(shape))
            given = ",".join(f"{each:g}" for each in point)
            raise UserError(
                f"--point must lie inside {self.name}, whose voxels go from 0, 0, 0 to {last}, but "
                f"{given}{' mm' if in_mm else ''} is voxel {x}, {y}, {z}."
            )
        if self.grid is None:
            return z, y, x
        return Orientation.of(self.grid).place_in_slices((z, y, x), shape)

    def position_of(self, place: Sequence[int]) -> np.ndarray:
        """Return the position in mm, RAS, of a slice, row and column, also outside the scan.

        By the file's grid: slices of a DICOM series may be at other distances (``positions_mm``).
        """
        assert self.grid is not None
        shape = self.to_file(self.slices).shape
        z, y, x = Orientation.of(self.grid).place_in_file(place, shape)
        return (self.grid.affine_ras() @ [x, y, z, 1])[:3]

    def body(self, index: int) -> Bool[np.ndarray, "height width"]:
        """Return which pixels of a slice show the body, its air and lungs included."""
        filled = ndimage.binary_fill_holes(self.slices[index] > self.body_above)
        parts, count = ndimage.label(filled)
        sizes = np.bincount(parts.ravel(), minlength=count + 1)
        sizes[0] = 0
        return (sizes >= max(1, _SMALL * sizes.max()))[parts]

    def said(self, index: int) -> str:
        """Return what a slice is called in pictures: its number, and its position where known."""
        place = "" if self.positions_mm is None else f", {self.positions_mm[index]:.0f} mm"
        return f"slice {index}{place}"


def find_scans(
    paths: Sequence[Path], modality: str | None = None
) -> list[tuple[str, VolumeSource]]:
    """List the scans below some files and folders, each with a name of its own for files.

    Raises:
        UserError: If a path does not exist, or there is none that can be read.
    """
    check_modality(modality)
    sources, refused = find_sources(paths)
    if not sources:
        why = "".join(f"; {key}: {reason}" for key, reason in refused[:3])
        listed = ", ".join(map(str, paths))
        raise UserError(
            f"VOLUME must be a scan (NIfTI, NRRD, MHA, DICOM, pictures) or a folder of them, but "
            f"{listed} holds none{why}."
        )
    return named(sources)


def open_scans(
    found: Sequence[tuple[str, VolumeSource]], modality: str | None = None
) -> Iterator[Scan]:
    """Open scans one after another; what cannot be read is said and left out.

    Raises:
        UserError: If the only one cannot be read, or none can.
    """
    opened = 0
    for name, source in found:
        try:
            scan = _open(name, source, modality)
        except Unreadable as error:
            sentence = f"{source.key} cannot be looked at: {error}."
            if len(found) == 1:
                raise UserError(sentence) from error
            print(sentence, file=sys.stderr)
            continue
        opened += 1
        yield scan
    if not opened:
        raise UserError(f"at least one scan must be readable, but none of {len(found)} is.")


def _open(name: str, source: VolumeSource, modality: str | None) -> Scan:
    image = read(source)
    volume = identify(reorient(image), source, modality)
    stack = stack_slices(volume)
    ends = None
    if stack.intensity is not None:
        ends = (float(stack.intensity["stored_low"]), float(stack.intensity["stored_high"]))
    unusable = frozenset(stack.broken) | frozenset(stack.empty)
    if len(unusable) == len(stack.array):
        reasons = sorted({*stack.broken.values(), *stack.empty.values()})
        raise Unreadable(f"no slice of it shows anything ({'; '.join(reasons[:3])})")
    return Scan(
        name=name,
        slices=stack.array,
        spacing=volume.spacing,
        positions_mm=volume.positions_mm,
        modality=volume.modality or "unknown",
        ends=ends,
        window=SOFT_TISSUE_HU if ends is None else ends,
        body_above=stack.scale.body_above,
        unusable=unusable,
        grid=image.grid,
        notes=volume.notes,
    )


def choose_slices(scan: Scan, wanted: int | None, at: Sequence[int] = ()) -> list[int]:
    """Return which slices of a scan are looked at, ascending.

    Args:
        scan: The scan.
        wanted: How many, at even distances among those that show something; None for all of them.
        at: Numbers of slices, counted from the lowest; they take the place of ``wanted``.

    Raises:
        UserError: If the scan has no such slice, or it shows nothing.
    """
    if at:
        for index in at:
            if not 0 <= index < len(scan.slices):
                raise UserError(
                    f"--at must name slices from 0 to {len(scan.slices) - 1} of {scan.name}, "
                    f"counted from the lowest, got {index}."
                )
            if index in scan.unusable:
                raise UserError(
                    f"--at must name slices that show something, but slice {index} of {scan.name} "
                    "shows nothing: name another."
                )
        return sorted(set(at))
    usable = [z for z in range(len(scan.slices)) if z not in scan.unusable]
    if wanted is None or wanted >= len(usable):
        return usable
    places = np.linspace(0, len(usable) - 1, wanted + 2)[1:-1]  # the outermost show little
    return sorted({usable[round(place)] for place in places.tolist()})
