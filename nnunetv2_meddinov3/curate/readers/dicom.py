"""DICOM series: their slices in the order of their positions, as one array.

SimpleITK (GDCM) reads headers and pixels; rescale is applied by it, slice by slice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnunetv2_meddinov3.curate.limits import check_memory
from nnunetv2_meddinov3.curate.orient import Grid, compact
from nnunetv2_meddinov3.curate.readers.dicom_header import SliceHeader, check_kind, read_header
from nnunetv2_meddinov3.curate.volume import Unreadable

SAME_PLACE_MM = 0.01  # slices nearer than this are copies of one
GAP = 1.5  # times the usual distance, from which a slice is missing


@dataclass
class Series:
    """A DICOM series as one array.

    Attributes:
        array: (z, y, x) along the slices' normal, rescale applied.
        grid: its geometry; the spacing along z is the usual one.
        positions_mm: (S,) of each slice along the normal, ascending.
        has_gaps: whether slices are missing in between.
        modality: ``"CT"`` or ``"MR"``.
        notes: remarks for the record.
    """

    array: np.ndarray
    grid: Grid
    positions_mm: np.ndarray
    has_gaps: bool
    modality: str
    notes: list[str]


def read_series(paths: list[Path]) -> Series:
    """Read the files of one series, in any order.

    Raises:
        Unreadable: If they are no volume of CT or MR, with the reason.
        RuntimeError: From SimpleITK if the pixels are damaged.
    """
    notes: list[str] = []
    headers = [read_header(path) for path in sorted(paths)]
    for header in headers:
        check_kind(header)
    headers = _one_layout(_without_localizers(headers, notes), notes)
    headers, positions = _in_order(headers, notes)
    steps = np.diff(positions)
    usual = float(np.median(steps)) if len(steps) else _single_thickness(headers[0], notes)
    missing = int(np.sum(np.round(steps[steps > GAP * usual] / usual) - 1))
    if missing:
        notes.append(f"{missing} slices missing between others, positions kept")
    _note_acquisition(headers, notes)

    columns, rows = headers[0].size[:2]
    shape = (len(headers), rows, columns)
    check_memory(np.prod(shape, dtype=float) * 8)  # float32, and the same again as axial slices
    array = compact(_pixels(headers), shape)
    grid = _grid(headers, positions, usual)
    modality = headers[0].tags["0008|0060"]
    return Series(array, grid, positions, missing > 0, modality, notes)


def _without_localizers(headers: list[SliceHeader], notes: list[str]) -> list[SliceHeader]:
    kept = [h for h in headers if "LOCALIZER" not in h.tags.get("0008|0008", "").upper()]
    if not kept:
        raise Unreadable("it is a localizer (scout), not a volume")
    if len(kept) < len(headers):
        notes.append(f"{len(headers) - len(kept)} localizers left out")
    placed = [
        h for h in kept
        if h.numbers("0020|0032", 3) is not None and h.numbers("0020|0037", 6) is not None
    ]  # fmt: skip
    if not placed:
        raise Unreadable("its images state no position or orientation")
    if len(placed) < len(kept):
        notes.append(f"{len(kept) - len(placed)} images without a position left out")
    return placed


def _one_layout(headers: list[SliceHeader], notes: list[str]) -> list[SliceHeader]:
    """The largest group of images of one size, orientation and spacing."""
    if any(header.numbers("0028|0030", 2) is None for header in headers):
        raise Unreadable("its images state no pixel spacing")
    counts = Counter(header.layout for header in headers)
    layout = max(sorted(counts), key=counts.__getitem__)
    kept = [header for header in headers if header.layout == layout]
    if len(kept) < len(headers):
        notes.append(
            f"{len(headers) - len(kept)} images of another size, orientation or pixel spacing "
            "left out"
        )
    return kept


def _in_order(headers: list[SliceHeader], notes: list[str]) -> tuple[list[SliceHeader], np.ndarray]:
    """Slices by their positions (mm, ascending) along the normal, one for each position."""
    normal = _normal(headers[0])
    placed = sorted(
        (float(normal @ header.numbers("0020|0032", 3)), _instance(header), header.path.name, i)
        for i, header in enumerate(headers)
    )
    chosen: list[tuple] = []
    for entry in placed:
        if chosen and entry[0] - chosen[-1][0] < SAME_PLACE_MM:
            chosen[-1] = min(chosen[-1], entry, key=lambda e: e[1:])
        else:
            chosen.append(entry)
    if len(chosen) < len(placed):
        notes.append(
            f"{len(placed) - len(chosen)} duplicate slices left out (same position; the first by "
            "instance number kept)"
        )
    return [headers[entry[3]] for entry in chosen], np.array([entry[0] for entry in chosen])


def _instance(header: SliceHeader) -> float:
    number = header.numbers("0020|0013", 1)
    return float("inf") if number is None else float(number[0])


def _normal(header: SliceHeader) -> np.ndarray:
    axes = header.numbers("0020|0037", 6)
    normal = np.cross(axes[:3], axes[3:])
    length = float(np.linalg.norm(normal))
    if not 0.9 < length < 1.1:
        raise Unreadable("its rows and columns are not perpendicular unit vectors")
    return normal / length


def _single_thickness(header: SliceHeader, notes: list[str]) -> float:
    thickness = header.numbers("0018|0050", 1)
    if thickness is not None and thickness[0] > 0:
        return float(thickness[0])
    notes.append("a single slice of unknown thickness, set to 1 mm")
    return 1.0


def _note_acquisition(headers: list[SliceHeader], notes: list[str]) -> None:
    thickness = headers[0].numbers("0018|0050", 1)
    if thickness is not None:
        notes.append(f"slice thickness {thickness[0]:g} mm")
    if any(header.tags.get("0028|2110") == "01" for header in headers):
        notes.append("compressed with loss before")


def _grid(headers: list[SliceHeader], positions: np.ndarray, usual: float) -> Grid:
    """Geometry of the sorted slices; their way from first to last shows a gantry tilt."""
    axes = headers[0].numbers("0020|0037", 6)
    row_mm, column_mm = headers[0].numbers("0028|0030", 2)  # between rows comes first
    first, last = (headers[i].numbers("0020|0032", 3) for i in (0, -1))
    through = _normal(headers[0])
    length = usual
    if len(headers) > 1:
        along = (last - first) / (positions[-1] - positions[0])  # mm of way per mm of normal
        length = usual * float(np.linalg.norm(along))
        through = along / np.linalg.norm(along)
    direction = np.stack([axes[:3], axes[3:], through], axis=1)
    return Grid(direction, (float(column_mm), float(row_mm), length), first)


def _pixels(headers: list[SliceHeader]) -> Iterator[np.ndarray]:
    for header in headers:
        image = sitk.ReadImage(str(header.path), imageIO="GDCMImageIO")
        yield sitk.GetArrayViewFromImage(image)[0]
