"""DICOM series as one array in the order of their positions.

An image, which is a file or a frame of a multi-frame file, costs itself where it is no slice of the
volume: it is left out, and the notes name it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from nnunetv2_meddinov3.curate.orient import compact
from nnunetv2_meddinov3.curate.readers.dicom_guard import NATIVE
from nnunetv2_meddinov3.curate.readers.dicom_header import SliceHeader
from nnunetv2_meddinov3.curate.readers.dicom_multiframe import read_headers
from nnunetv2_meddinov3.curate.readers.dicom_pixels import PixelReader
from nnunetv2_meddinov3.curate.readers.dicom_series import (
    GAP,
    SAME_PLACE_MM,
    axes_of,
    by_layout,
    check_one_pass,
    instance_of,
    normal_of,
    position_of,
)
from nnunetv2_meddinov3.curate.volume import (
    Grid,
    Image,
    Unreadable,
    check_memory,
    check_rescale,
    counted,
    plain_text,
)

MODALITIES = ("CT", "MR", "PT")
MAX_RATIO = 2000  # of a slice to its file; the codecs of DICOM hardly reach a tenth of it
MAX_NAMED = 5  # images in a note
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
OTHER_UNITS = ("ED", "EDW", "HU_MOD", "MGML", "OD", "PCT", "Z_EFF")  # RescaleType but HU and US
SCOUT_WORDS = ("LOCALIZER", "SCOUT", "TOPOGRAM", "SURVIEW", "SCANOGRAM")  # in ImageType


def check_kind(header: SliceHeader) -> None:
    """Refuse what is not a single grey CT, MR or PET image, or whose values mean nothing.

    Raises:
        Unreadable: With the reason.
    """
    modality = header.text("Modality")
    if modality not in MODALITIES:
        raise Unreadable(f"its modality is {modality or 'not stated'}, not {', '.join(MODALITIES)}")
    sop_class = header.text("SOPClassUID")
    if f"{sop_class}.".startswith(f"{SECONDARY_CAPTURE}."):
        raise Unreadable("it is a secondary capture (a screenshot), not an acquired image")
    if header.samples != 1:
        raise Unreadable(f"it has colour ({header.samples} samples per pixel)")
    if header.text("PhotometricInterpretation") == "PALETTE COLOR":
        raise Unreadable("it has a palette of colours")
    if header.frame is None and header.text("NumberOfFrames") not in ("", "0", "1"):
        raise Unreadable(
            "it is multi-frame, but has no functional groups, which say where each frame lies; "
            "export it as single frames, or as enhanced CT or MR"
        )
    if header.has_table:
        raise Unreadable("its values need the table of a ModalityLUTSequence, which is not applied")
    check_rescale(
        _float(header.text("RescaleSlope"), 1.0), _float(header.text("RescaleIntercept"), 0.0)
    )
    columns, rows = header.columns, header.rows
    if 2 * columns * rows * header.frames > MAX_RATIO * header.path.stat().st_size:
        frames = f"{header.frames} frames of " if header.frames > 1 else ""
        raise Unreadable(
            f"it declares {frames}{columns}x{rows} pixels, more than the file can hold"
        )
    _check_length(header)


def _check_length(header: SliceHeader) -> None:
    """Refuse uncompressed pixels that are cut off, which GDCM fills up with what is in memory.

    Of a multi-frame file, frames before the cut are whole.
    """
    if header.pixels.length is None or header.syntax not in NATIVE:
        return
    bits = header.bits * header.rows * header.columns * header.samples
    if 8 * header.pixels.length < bits * ((header.frame or 0) + 1):
        needed = -(-bits * header.frames // 8)
        raise Unreadable(f"its pixels are cut off ({header.pixels.length} of {needed} bytes)")


def check_slice(header: SliceHeader) -> None:
    """Refuse an image that cannot be a slice of a volume.

    Raises:
        Unreadable: With the reason.
    """
    check_kind(header)
    if any(word in header.text("ImageType").upper() for word in SCOUT_WORDS):
        raise Unreadable("it is a localizer (scout), not a volume")
    if (
        header.numbers("ImagePositionPatient", 3) is None
        or header.numbers("ImageOrientationPatient", 6) is None
    ):
        raise Unreadable("its images state no position or orientation")
    if header.numbers("PixelSpacing", 2) is None:
        raise Unreadable("its images state no pixel spacing")
    normal_of(header)


def is_slice(header: SliceHeader) -> bool:
    """Return whether an image can be a slice of a volume."""
    try:
        check_slice(header)
    except (Unreadable, OSError):
        return False
    return True


def _float(text: str, default: float) -> float:
    try:
        return float(text or default)
    except ValueError:
        return float("nan")


class _LeftOut:
    """Images of a series that do not enter, by the reason."""

    def __init__(self) -> None:
        self.names: dict[str, list[str]] = defaultdict(list)

    def add(self, name: str, reason: str) -> None:
        self.names[reason].append(name)

    def notes(self) -> list[str]:
        """Return a sentence for each reason, with the names of the first images."""
        return [
            f"{counted(len(names), 'image')} left out, {reason}: {', '.join(names[:MAX_NAMED])}"
            + (f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else "")
            for reason, names in self.names.items()
        ]

    def why(self) -> str:
        """Return the reason of most images."""
        return max(self.names, key=lambda reason: len(self.names[reason]))


def read_series(paths: Sequence[Path], frames: Sequence[Sequence[int]] = ()) -> Image:
    """Read the files of one volume, in any order.

    Args:
        paths: The files.
        frames: For each of them the frames that are of the volume, counted from 0, none for all.
            Empty where all frames of all files are.

    Returns:
        The slices (z, y, x) along their normal, rescale applied; the spacing along z is the usual
        distance of slices.

    Raises:
        Unreadable: If they are not a volume of CT or MR, with the reason.
    """
    left_out, notes = _LeftOut(), list[str]()
    headers = _slices(sorted(zip(paths, frames or [()] * len(paths), strict=True)), left_out)
    check_one_pass(headers)
    places = _in_order(headers)
    shape = (len(places), headers[0].rows, headers[0].columns)
    check_memory(np.prod(shape, dtype=float) * 8)  # float32, and the same again as axial slices
    decoded: list[SliceHeader] = []
    array = compact(_pixels(places, decoded, left_out, notes), shape)[: len(decoded)]
    if not decoded:
        raise Unreadable(left_out.why())

    normal = normal_of(decoded[0])
    positions = np.array([float(normal @ position_of(header)) for header in decoded])
    steps = np.diff(positions)
    usual = float(np.median(steps)) if len(steps) else _single_thickness(decoded[0], notes)
    missing = int(np.sum(np.round(steps[steps > GAP * usual] / usual) - 1))
    if missing:
        notes.append(f"{counted(missing, 'slice')} missing between others, positions kept")
    _note_acquisition(decoded, notes)
    modality = _modality(decoded[0], notes)
    return Image(
        array=array,
        grid=_grid(decoded, positions, usual),
        modality=modality,
        positions_mm=positions,
        has_gaps=missing > 0,
        notes=[*left_out.notes(), *notes],
    )


def _slices(files: Sequence[tuple[Path, Sequence[int]]], left_out: _LeftOut) -> list[SliceHeader]:
    """Return the headers of the largest group of images that can be slices of one volume."""
    headers = []
    for path, frames in files:
        try:
            images = read_headers(path)
        except Unreadable as error:
            left_out.add(plain_text(path.name), str(error))
            continue
        chosen = set(frames)
        for header in images:
            if chosen and header.frame not in chosen:
                continue
            try:
                check_slice(header)
            except Unreadable as error:
                left_out.add(header.name, str(error))
            else:
                headers.append(header)
    if not headers:
        raise Unreadable(left_out.why())
    first, *odd = by_layout(headers)
    for header in (header for group in odd for header in group):
        left_out.add(header.name, "of another size, orientation or pixel spacing")
    with_rescale = [header for header in first if header.has_rescale]
    without = [header for header in first if not header.has_rescale]
    if not with_rescale or not without or first[0].text("Modality") == "MR":
        return first
    kept, others = sorted((without, with_rescale), key=len, reverse=True)
    for header in others:
        reason = "without the rescale of" if others is without else "with a rescale, unlike"
        left_out.add(header.name, f"{reason} the others")
    return kept


def _in_order(headers: list[SliceHeader]) -> list[list[SliceHeader]]:
    """Return slices by their positions along the normal: at each the first, then its duplicates."""
    normal = normal_of(headers[0])
    placed = sorted(
        (float(normal @ position_of(header)), instance_of(header), header.path.name, i)
        for i, header in enumerate(headers)
    )
    places: list[list[tuple[float, float, str, int]]] = []
    for entry in placed:
        if places and entry[0] - min(places[-1], key=lambda e: e[1:])[0] < SAME_PLACE_MM:
            places[-1].append(entry)
        else:
            places.append([entry])
    return [[headers[e[3]] for e in sorted(place, key=lambda e: e[1:])] for place in places]


def _single_thickness(header: SliceHeader, notes: list[str]) -> float:
    thickness = header.numbers("SliceThickness", 1)
    if thickness is not None and thickness[0] > 0:
        return float(thickness[0])
    notes.append("a single slice of unknown thickness, set to 1 mm")
    return 1.0


def _modality(header: SliceHeader, notes: list[str]) -> str | None:
    """Return what a header says its values are, None where a CT does not say how to reach HU."""
    modality = header.text("Modality")
    if modality != "CT":
        return modality
    unit = header.text("RescaleType").upper()
    if unit in OTHER_UNITS:
        notes.append(f"a CT, but its values are in {unit}, not HU")
        return "unknown"
    if not header.has_rescale:
        notes.append("a CT whose header states no rescale to HU")
        return None
    return modality


def _note_acquisition(headers: list[SliceHeader], notes: list[str]) -> None:
    thickness = headers[0].numbers("SliceThickness", 1)
    if thickness is not None:
        notes.append(f"slice thickness {thickness[0]:g} mm")
    if any(header.text("LossyImageCompression") == "01" for header in headers):
        notes.append("compressed with loss before")


def _grid(headers: list[SliceHeader], positions: np.ndarray, usual: float) -> Grid:
    """Geometry of the sorted slices; the way from first to last shows a gantry tilt."""
    axes, spacing = axes_of(headers[0]), headers[0].numbers("PixelSpacing", 2)
    assert spacing is not None
    row_mm, column_mm = map(float, spacing)  # between rows comes first
    first, last = position_of(headers[0]), position_of(headers[-1])
    through = normal_of(headers[0])
    length = usual
    if len(headers) > 1:
        along = (last - first) / (positions[-1] - positions[0])  # mm of way per mm of normal
        length = usual * float(np.linalg.norm(along))
        through = along / np.linalg.norm(along)
    direction = np.stack([axes[:3], axes[3:], through], axis=1)
    return Grid(direction, (column_mm, row_mm, length), first)


def _pixels(
    places: list[list[SliceHeader]],
    decoded: list[SliceHeader],
    left_out: _LeftOut,
    notes: list[str],
) -> Iterator[np.ndarray]:
    """Yield at each place the first slice that can be decoded, its header goes to ``decoded``."""
    duplicates = 0
    with PixelReader() as reader:
        for headers in places:
            for number, header in enumerate(headers, start=1):
                try:
                    pixels = reader.read(header)
                except (Unreadable, OSError) as error:
                    reason = "its pixels cannot be read" if isinstance(error, OSError) else error
                    left_out.add(header.name, str(reason))
                    continue
                duplicates += len(headers) - number
                decoded.append(header)
                yield pixels
                break
    if duplicates:
        notes.append(
            f"{counted(duplicates, 'duplicate slice')} left out (same position; the first by "
            "instance number kept)"
        )
