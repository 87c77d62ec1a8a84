"""The volumes of one SeriesInstanceUID, by layout and by passes that repeat or interleave.

An image is a file, or a frame of a multi-frame file.

A series is one volume as a rule. It is several where anonymisation gave two patients one UID, where
phases of a contrast study or several reconstructions share one, or where images of another
orientation lie among the slices.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np

from nnunetv2_meddinov3 import files
from nnunetv2_meddinov3.curate.readers.dicom_header import SliceHeader
from nnunetv2_meddinov3.curate.volume import Unreadable

SAME_PLACE_MM = 0.01  # slices nearer than this are at one position
GAP = 1.5  # times the usual distance, from which a slice is missing
FEWEST = 3  # slices of a volume of its own; fewer are strays in the volume of the others
COSINE_TOLERANCE = 5e-3  # 0.3 degrees; real series differ by the digits an exporter writes
SPACING_TOLERANCE = 1e-3  # of the spacing: half a pixel at the edge of 512
VALUE_TOLERANCE = 0.02  # of a slice thickness or echo time
STEP_RATIO = 0.75  # of two steps that follow one another, below which they differ
STEP_NOISE_MM = 0.11  # what positions rounded to 0.1 mm add to a step
SIDEWAYS_MM = 2.0  # of an origin beside the line of the others
MAX_REPEATED = 0.2  # of the positions; more are a second pass, not duplicates
# elements that tell volumes apart, those first that differ for no other reason
SEPARATORS = (
    "folder",
    "StudyInstanceUID",
    "FrameOfReferenceUID",
    "AcquisitionNumber",
    "TemporalPositionIdentifier",
    "SliceThickness",
    "ConvolutionKernel",
    "EchoTime",
    "ImageType",
    "ComplexImageComponent",
    "DimensionIndexValues",
    "file",
    "AcquisitionTime",
    "ContentTime",
)
MIXED = (
    "its slices repeat or interleave as those of several volumes do, and neither folder, study, "
    "acquisition, time nor thickness tells them apart"
)


def volumes_of(
    headers: Sequence[SliceHeader], usable: Callable[[SliceHeader], bool]
) -> list[list[SliceHeader]]:
    """Divide the files of one series and patient into volumes.

    Args:
        headers: Of all files.
        usable: Whether an image can be a slice of a volume.

    Returns:
        The files of each volume, the volume with most slices first. Files that are no slices, and
        images whose layout fewer than ``FEWEST`` share, stay with a volume of their folder: its
        reader names them.
    """
    slices: list[SliceHeader] = []
    strays: list[SliceHeader] = []
    for header in headers:
        (slices if usable(header) else strays).append(header)
    volumes: list[list[SliceHeader]] = []
    for layout in by_layout(slices):
        if volumes and len(layout) < FEWEST:
            strays += layout
        else:
            volumes += _passes(layout)
    volumes.sort(key=lambda volume: (-len(volume), min(h.text("SOPInstanceUID") for h in volume)))
    if not volumes:
        return [list(headers)]
    folders = [{header.path.parent for header in volume} for volume in volumes]
    for header in strays:
        at = [header.path.parent in folder for folder in folders]
        volumes[at.index(True) if any(at) else 0].append(header)
    return volumes


def by_layout(headers: Sequence[SliceHeader]) -> list[list[SliceHeader]]:
    """Group images whose size, orientation and pixel spacing are the same within a tolerance.

    All of them must state orientation and spacing. The largest group comes first.
    """
    exact: dict[tuple[float, ...], list[SliceHeader]] = defaultdict(list)
    for header in headers:
        exact[_layout(header)].append(header)
    layouts, groups = np.array(list(exact)), list(exact.values())
    sizes = np.array([len(group) for group in groups])
    result = []
    while len(layouts):
        alike = np.stack([_alike(layout, layouts) for layout in layouts])
        chosen = alike[int(np.argmax(alike @ sizes))]  # around the layout that most agree with
        result.append(
            [h for group, take in zip(groups, chosen, strict=True) if take for h in group]
        )
        layouts, sizes = layouts[~chosen], sizes[~chosen]
        groups = [group for group, take in zip(groups, chosen, strict=True) if not take]
    return result


def _layout(header: SliceHeader) -> tuple[float, ...]:
    axes, pixels = header.numbers("ImageOrientationPatient", 6), header.numbers("PixelSpacing", 2)
    assert axes is not None
    assert pixels is not None
    return (header.columns, header.rows, *axes.tolist(), *pixels.tolist())


def _alike(layout: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return which of some layouts (N, 10) are one layout within the tolerances."""
    away = np.abs(others - layout)
    return np.asarray(
        (away[:, :2] == 0).all(axis=1)
        & (away[:, 2:8] <= COSINE_TOLERANCE).all(axis=1)
        & (away[:, 8:] <= SPACING_TOLERANCE * np.abs(layout[8:])).all(axis=1)
    )


def check_one_pass(headers: Sequence[SliceHeader]) -> None:
    """Refuse slices that are of several volumes beyond doubt; a few duplicates are no volume.

    Raises:
        Unreadable: If many positions repeat, or the steps between them are those of passes that
            interleave.
    """
    places, repeated = _places(headers)
    if repeated > MAX_REPEATED * len(places) or _interleave(np.diff(places)):
        raise Unreadable(MIXED)


def position_of(header: SliceHeader) -> np.ndarray:
    """Centre of the first pixel (x, y, z) in mm, of a header that states it."""
    position = header.numbers("ImagePositionPatient", 3)
    assert position is not None
    return position


def axes_of(header: SliceHeader) -> np.ndarray:
    """Directions of a row and of a column, six cosines, of a header that states them."""
    axes = header.numbers("ImageOrientationPatient", 6)
    assert axes is not None
    return axes


def normal_of(header: SliceHeader) -> np.ndarray:
    """Unit vector (x, y, z) along which slices are stacked, of a header that states its axes.

    Raises:
        Unreadable: If the axes are not perpendicular unit vectors.
    """
    axes = axes_of(header)
    normal = np.cross(axes[:3], axes[3:])
    length = float(np.linalg.norm(normal))
    if not 0.9 < length < 1.1:
        raise Unreadable("its rows and columns are not perpendicular unit vectors")
    return normal / length


def instance_of(header: SliceHeader) -> float:
    """InstanceNumber, infinite where it is missing."""
    number = header.numbers("InstanceNumber", 1)
    return float("inf") if number is None else float(number[0])


def _passes(headers: list[SliceHeader]) -> list[list[SliceHeader]]:
    """Return the volumes among slices of one layout; all of them as one where in doubt."""
    if len(headers) < 2 * FEWEST:
        return [headers]
    stacks = _grouped(headers, "StackID")
    if len(stacks) > 1 and min(map(len, stacks)) >= FEWEST:
        return [volume for stack in stacks for volume in _passes(stack)]
    for keyword in ("folder", "StudyInstanceUID"):
        groups = _grouped(headers, keyword)
        if _clean(groups) and _lie_apart(groups):
            return groups
    if not _suspicious(headers):
        return [headers]
    useful = []
    for keyword in SEPARATORS:
        groups = _grouped(headers, keyword)
        if _clean(groups):
            return groups
        if 2 <= len(groups) <= len(headers) / FEWEST:
            useful.append(keyword)
    for groups in (_grouped(headers, *useful), _runs(headers)):
        if _clean(groups):
            return groups
    return [headers]


def _grouped(headers: Iterable[SliceHeader], *keywords: str) -> list[list[SliceHeader]]:
    headers = list(headers)
    columns = [_values(headers, keyword) for keyword in keywords]
    groups: dict[Hashable, list[SliceHeader]] = defaultdict(list)
    for header, *values in zip(headers, *columns, strict=True):
        groups[tuple(values)].append(header)
    return list(groups.values())


def _values(headers: list[SliceHeader], keyword: str) -> list[Hashable]:
    """Return what divides images: a folder or file, a text, or the least of alike numbers."""
    if keyword == "folder":
        return [header.path.parent for header in headers]
    if keyword == "file":
        return [header.path for header in headers]
    if keyword not in ("SliceThickness", "EchoTime"):
        return [header.text(keyword) for header in headers]
    numbers = [header.numbers(keyword, 1) for header in headers]
    values = [None if number is None else float(number[0]) for number in numbers]
    alike: dict[float | None, float | None] = {None: None}
    last: float | None = None
    for value in sorted({value for value in values if value is not None}):
        if last is None or value - last > VALUE_TOLERANCE * abs(value):
            last = value
        alike[value] = last
    return [alike[value] for value in values]


def _clean(groups: list[list[SliceHeader]]) -> bool:
    """Return whether they are two or more volumes, each regular in itself."""
    return len(groups) > 1 and not any(
        len(group) < FEWEST or _suspicious(group) for group in groups
    )


def _suspicious(headers: Sequence[SliceHeader]) -> bool:
    """Return whether slices of one layout may be those of several volumes."""
    places, repeated = _places(headers)
    return bool(
        repeated
        or _uneven(np.diff(places))
        or _acquired_in_turn(headers)
        or _sideways(headers) > SIDEWAYS_MM
    )


def _placed(headers: Iterable[SliceHeader]) -> list[tuple[float, SliceHeader]]:
    normal: np.ndarray | None = None
    placed = []
    for header in headers:
        normal = normal_of(header) if normal is None else normal
        placed.append((float(normal @ position_of(header)), header))
    return sorted(placed, key=lambda item: (item[0], str(item[1].path), item[1].member[1]))


def _places(headers: Iterable[SliceHeader]) -> tuple[np.ndarray, int]:
    """Return the positions in mm, each once, and how many of them different images share."""
    places: list[float] = []
    images: list[list[SliceHeader]] = []
    where = defaultdict(set)  # an image's UID -> its places, by number
    for place, header in _placed(headers):
        if not places or place - places[-1] >= SAME_PLACE_MM:
            places.append(place)
            images.append([])
        images[-1].append(header)
        where[header.text("SOPInstanceUID")].add(len(places))
    repeated = sum(
        not all(_copies(one, other, len(where[one.text("SOPInstanceUID")]) == 1) for other in rest)
        for one, *rest in images
    )
    return np.array(places), repeated


def _copies(one: SliceHeader, other: SliceHeader, identifies: bool) -> bool:
    """Return whether two files at one place are one image; ``identifies``: its UID is not a dummy.

    One image may be stored with several encodings in a folder. Of two folders only equal bytes are
    copies, since anonymisation may give the images of two patients the same UIDs.
    """
    uid = one.text("SOPInstanceUID")
    if not uid or uid != other.text("SOPInstanceUID"):
        return False
    if identifies and one.path.parent == other.path.parent:
        return True
    if (one.texts, one.member[1]) != (other.texts, other.member[1]):
        return False  # without reading the files
    return _content(one.path) == _content(other.path)


def _content(path: Path) -> str:
    """Return the hash of a file; series are looked at many times, but read once."""
    status = path.stat()
    return _sha256(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=1 << 15)
def _sha256(path: Path, size: int, changed_ns: int) -> str:
    return files.file_sha256(path)


def _differ(steps: np.ndarray, others: np.ndarray) -> np.ndarray:
    low, high = np.minimum(steps, others), np.maximum(steps, others)
    return np.asarray((low < STEP_RATIO * high) & (high - low > STEP_NOISE_MM))


def _uneven(steps: np.ndarray) -> bool:
    """Return whether the steps change often, as those of interleaved passes or lost slices do."""
    changes = np.count_nonzero(_differ(steps[1:], steps[:-1])) if len(steps) > 1 else 0
    return bool(changes > max(2, 0.25 * len(steps)))


def _interleave(steps: np.ndarray) -> bool:
    """Return whether uneven steps are no multiples of one step, or take turns like two passes."""
    if not _uneven(steps):
        return False
    unit = float(np.quantile(steps, 0.05))
    rest = np.abs(steps - np.round(steps / unit) * unit)
    if (rest > max(0.1 * unit, STEP_NOISE_MM)).sum() > 1:
        return True
    return bool(len(steps) >= 6 and not _differ(steps[2:], steps[:-2]).any())


def _acquired_in_turn(headers: Sequence[SliceHeader]) -> bool:
    """Return whether the neighbours of a CT's slices are of other acquisitions, pass by pass."""
    numbers = [
        h.text("AcquisitionNumber") for _, h in _placed(headers) if h.text("Modality") == "CT"
    ]
    if len(set(numbers)) < 2 or FEWEST * len(set(numbers)) > len(numbers):
        return False
    changes = sum(a != b for a, b in pairwise(numbers))
    return changes >= 0.5 * len(numbers)


def _sideways(headers: Sequence[SliceHeader]) -> float:
    """Return how far the farthest origin is from the line through the others, in mm."""
    placed = _placed(headers)
    places = np.array([place for place, _ in placed])
    if len(placed) < FEWEST or np.ptp(places) < SAME_PLACE_MM:
        return 0.0
    origins = np.stack([position_of(header) for _, header in placed])
    line = np.stack([places - places.mean(), np.ones_like(places)], axis=1)
    fit = line @ np.linalg.lstsq(line, origins, rcond=None)[0]
    return float(np.linalg.norm(origins - fit, axis=1).max())


def _lie_apart(groups: list[list[SliceHeader]]) -> bool:
    """Return whether each group lies beyond a gap from the next, as two patients' do."""
    places = sorted((_places(group)[0] for group in groups), key=lambda values: float(values[0]))
    for lower, upper in pairwise(places):
        usual = max(float(np.median(np.diff(lower))), float(np.median(np.diff(upper))))
        if upper[0] - lower[-1] <= GAP * usual:
            return False
    return True


def _runs(headers: Sequence[SliceHeader]) -> list[list[SliceHeader]]:
    """Divide slices, in the order they were acquired in, wherever the positions start again."""
    place_of = {header.member: place for place, header in _placed(headers)}
    ordered = sorted(headers, key=lambda h: (instance_of(h), h.text("AcquisitionTime"), h.member))
    runs = [[ordered[0]]]
    for header in ordered[1:]:
        run = runs[-1]
        step = place_of[header.member] - place_of[run[-1].member]
        before = place_of[run[-1].member] - place_of[run[0].member]
        if step * before < 0 or abs(step) < SAME_PLACE_MM:
            runs.append([header])
        else:
            run.append(header)
    return runs
