"""DICOM: headers read with pydicom, and series as one array in the order of their positions.

SimpleITK (GDCM) decodes the pixels and applies the rescale, slice by slice. No file reaches either
library before ``dicom_guard`` has seen that its elements fit into it.
"""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom
import SimpleITK as sitk

from nnunetv2_meddinov3.curate.orient import compact
from nnunetv2_meddinov3.curate.readers.dicom_guard import Misfit, check_lengths, has_mark
from nnunetv2_meddinov3.curate.readers.images import open_header, without_itk_warnings
from nnunetv2_meddinov3.curate.volume import (
    Grid,
    Image,
    Unreadable,
    check_memory,
    check_rescale,
    counted,
    plain_text,
)

MODALITIES = ("CT", "MR")
MAX_RATIO = 2000  # of a slice to its file; the codecs of DICOM hardly reach a tenth of it
SAME_PLACE_MM = 0.01  # slices nearer than this are copies of one
GAP = 1.5  # times the usual distance, from which a slice is missing
NO_IMAGE = {  # SOP classes, by their prefixes, that hold no pixels of their own
    "1.2.840.10008.1.3.10": "a DICOMDIR",
    "1.2.840.10008.5.1.4.1.1.481.3": "an RT structure set",
    "1.2.840.10008.5.1.4.1.1.481.5": "an RT plan",
    "1.2.840.10008.5.1.4.1.1.66": "a segmentation or registration",
    "1.2.840.10008.5.1.4.1.1.88": "a structured report",
    "1.2.840.10008.5.1.4.1.1.11": "a presentation state",
    "1.2.840.10008.5.1.4.1.1.104": "an encapsulated document",
}
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
TEXTS = (
    "ImageOrientationPatient",
    "ImagePositionPatient",
    "ImageType",
    "InstanceNumber",
    "LossyImageCompression",
    "Modality",
    "NumberOfFrames",
    "PatientID",
    "PixelSpacing",
    "RescaleIntercept",
    "RescaleSlope",
    "SOPClassUID",
    "SeriesInstanceUID",
    "SliceThickness",
    "StudyInstanceUID",
)
TAGS = {
    keyword: pydicom.tag.Tag(keyword)
    for keyword in (*TEXTS, "Columns", "MediaStorageSOPClassUID", "Rows", "SamplesPerPixel")
}


@dataclass(frozen=True)
class SliceHeader:
    """What is needed of the header of one DICOM image.

    Attributes:
        path: The file.
        texts: Keyword of an element (``TEXTS``) -> its text without padding, several values
            separated by a backslash; empty where it is missing.
        columns: Pixels along a row.
        rows: Pixels along a column.
        samples: Values per pixel, 1 for grey.
    """

    path: Path
    texts: dict[str, str]
    columns: int
    rows: int
    samples: int

    def numbers(self, keyword: str, count: int) -> np.ndarray | None:
        """Return the numbers of an element, None if it does not have that many."""
        try:
            values = np.array([float(text) for text in self.texts[keyword].split("\\")])
        except ValueError:
            return None
        return values if len(values) == count and np.isfinite(values).all() else None

    @property
    def series(self) -> str:
        """SeriesInstanceUID."""
        return self.texts["SeriesInstanceUID"]

    @property
    def patient(self) -> str:
        """A hash of PatientID (of the study where there is none), never the id itself."""
        identity = self.texts["PatientID"] or self.texts["StudyInstanceUID"] or self.series
        return hashlib.sha256(identity.encode("utf-8")).hexdigest()[:16]

    @property
    def layout(self) -> tuple[tuple[float, ...], ...]:
        """What the slices of one volume share: size, orientation and spacing of the pixels."""
        axes, pixels = self.numbers("ImageOrientationPatient", 6), self.numbers("PixelSpacing", 2)
        rounded = [tuple(np.round(v, 3) + 0.0) for v in (axes, pixels) if v is not None]
        return ((self.columns, self.rows), *rounded)


def read_header(path: Path) -> SliceHeader:
    """Read the header of a DICOM image.

    Raises:
        Unreadable: If it holds no image, is not DICOM, or is damaged.
        OSError: If it cannot be opened.
    """
    if not has_mark(path):
        raise Unreadable("it is not a DICOM file")
    try:
        has_pixels = check_lengths(path)
    except Misfit as error:
        raise Unreadable(f"it is a damaged DICOM file: {error}") from error
    with _without_pydicom_warnings():
        return _header(path, _parse(path), has_pixels)


@contextmanager
def _without_pydicom_warnings() -> Iterator[None]:
    """Keep pydicom from warning and logging meanwhile about odd values, which are judged here."""
    logger = logging.getLogger("pydicom")
    before, logger.disabled = logger.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.disabled = before


def _header(path: Path, dataset: pydicom.FileDataset, has_pixels: bool) -> SliceHeader:
    uid = _text(dataset.file_meta, "MediaStorageSOPClassUID")
    for prefix, name in NO_IMAGE.items():
        if f"{uid}.".startswith(f"{prefix}."):
            raise Unreadable(f"it is {name}, not an image")
    if not has_pixels:
        raise Unreadable("it is a DICOM file without pixels")
    texts = {keyword: _text(dataset, keyword) for keyword in TEXTS}
    columns, rows = _number(dataset, "Columns"), _number(dataset, "Rows")
    return SliceHeader(path, texts, columns, rows, _number(dataset, "SamplesPerPixel", 1))


def _parse(path: Path) -> pydicom.FileDataset:
    """Read the elements that are needed, without converting any."""
    try:
        return pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(TAGS.values()))
    except OSError:
        raise
    except Exception as error:  # whatever malformed bytes lead a parser to
        raise Unreadable("it is a damaged DICOM file, or one that pydicom cannot read") from error


def _text(dataset: pydicom.Dataset, keyword: str) -> str:
    """Return the text of an element as it is in the file, empty if it is missing.

    The bytes are not decoded by the character set of the file: the hash of a patient must not
    depend on how an exporter declares it.
    """
    element = dataset.get_item(TAGS[keyword])
    value = getattr(element, "value", None)
    text = value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value or ""
    return plain_text(str(text)).strip(" \0")


def _number(dataset: pydicom.Dataset, keyword: str, default: int | None = None) -> int:
    """Return the number of an element (US).

    Raises:
        Unreadable: If it has none and there is no default.
    """
    if default is not None and TAGS[keyword] not in dataset:
        return default
    try:
        return int(dataset[TAGS[keyword]].value)
    except Exception as error:  # as above
        raise Unreadable(
            f"it is a damaged DICOM file: {keyword} is missing or not a number"
        ) from error


def check_decodable(path: Path) -> None:
    """Refuse a file that GDCM, which decodes the pixels, cannot read: alone, not with its series.

    Raises:
        Unreadable: If GDCM refuses it.
    """
    try:
        with without_itk_warnings():
            open_header(path, "GDCMImageIO")
    except RuntimeError as error:
        raise Unreadable("it is a damaged DICOM file, or one that GDCM cannot read") from error


def check_kind(header: SliceHeader) -> None:
    """Refuse what is not a single grey CT or MR image, or whose values mean nothing.

    Raises:
        Unreadable: With the reason.
    """
    texts = header.texts
    if texts["Modality"] not in MODALITIES:
        raise Unreadable(f"its modality is {texts['Modality'] or 'not stated'}, not CT or MR")
    if texts["SOPClassUID"] == SECONDARY_CAPTURE:
        raise Unreadable("it is a secondary capture (a screenshot), not an acquired image")
    if header.samples != 1:
        raise Unreadable(f"it has colour ({header.samples} samples per pixel)")
    if texts["NumberOfFrames"] not in ("", "0", "1"):
        raise Unreadable("it is multi-frame, which is not read; export it as single frames")
    check_rescale(_float(texts["RescaleSlope"], 1.0), _float(texts["RescaleIntercept"], 0.0))
    columns, rows = header.columns, header.rows
    if 2 * columns * rows > MAX_RATIO * header.path.stat().st_size:
        raise Unreadable(f"it declares {columns}x{rows} pixels, more than the file can hold")


def _float(text: str, default: float) -> float:
    try:
        return float(text or default)
    except ValueError:
        return float("nan")


def read_series(paths: list[Path]) -> Image:
    """Read the files of one series, in any order.

    Returns:
        The slices (z, y, x) along their normal, rescale applied; the spacing along z is the usual
        distance of slices.

    Raises:
        Unreadable: If they are not a volume of CT or MR, with the reason.
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
        notes.append(f"{counted(missing, 'slice')} missing between others, positions kept")
    _note_acquisition(headers, notes)

    shape = (len(headers), headers[0].rows, headers[0].columns)
    check_memory(np.prod(shape, dtype=float) * 8)  # float32, and the same again as axial slices
    return Image(
        array=compact(_pixels(headers), shape),
        grid=_grid(headers, positions, usual),
        modality=headers[0].texts["Modality"],
        positions_mm=positions,
        has_gaps=missing > 0,
        notes=notes,
    )


def _without_localizers(headers: list[SliceHeader], notes: list[str]) -> list[SliceHeader]:
    kept = [h for h in headers if "LOCALIZER" not in h.texts["ImageType"].upper()]
    if not kept:
        raise Unreadable("it is a localizer (scout), not a volume")
    if len(kept) < len(headers):
        notes.append(f"{counted(len(headers) - len(kept), 'localizer')} left out")
    placed = [
        header
        for header in kept
        if header.numbers("ImagePositionPatient", 3) is not None
        and header.numbers("ImageOrientationPatient", 6) is not None
    ]
    if not placed:
        raise Unreadable("its images state no position or orientation")
    if len(placed) < len(kept):
        notes.append(f"{counted(len(kept) - len(placed), 'image')} without a position left out")
    return placed


def _one_layout(headers: list[SliceHeader], notes: list[str]) -> list[SliceHeader]:
    """Return the largest group of images of one size, orientation and spacing."""
    if any(header.numbers("PixelSpacing", 2) is None for header in headers):
        raise Unreadable("its images state no pixel spacing")
    counts = Counter(header.layout for header in headers)
    layout = max(sorted(counts), key=counts.__getitem__)
    kept = [header for header in headers if header.layout == layout]
    if len(kept) < len(headers):
        notes.append(
            f"{counted(len(headers) - len(kept), 'image')} of another size, orientation or pixel "
            "spacing left out"
        )
    return kept


def _in_order(headers: list[SliceHeader], notes: list[str]) -> tuple[list[SliceHeader], np.ndarray]:
    """Return slices by their positions (mm, ascending) along the normal, one at each position."""
    normal = _normal(headers[0])
    placed = sorted(
        (float(normal @ _position(header)), _instance(header), header.path.name, i)
        for i, header in enumerate(headers)
    )
    chosen: list[tuple[float, float, str, int]] = []
    for entry in placed:
        if chosen and entry[0] - chosen[-1][0] < SAME_PLACE_MM:
            chosen[-1] = min(chosen[-1], entry, key=lambda e: e[1:])
        else:
            chosen.append(entry)
    if len(chosen) < len(placed):
        notes.append(
            f"{counted(len(placed) - len(chosen), 'duplicate slice')} left out (same position; the "
            "first by instance number kept)"
        )
    return [headers[entry[3]] for entry in chosen], np.array([entry[0] for entry in chosen])


def _position(header: SliceHeader) -> np.ndarray:
    """Centre of the first pixel (x, y, z) in mm, of a header that states it."""
    position = header.numbers("ImagePositionPatient", 3)
    assert position is not None
    return position


def _axes(header: SliceHeader) -> np.ndarray:
    """Directions of a row and of a column, six cosines, of a header that states them."""
    axes = header.numbers("ImageOrientationPatient", 6)
    assert axes is not None
    return axes


def _instance(header: SliceHeader) -> float:
    number = header.numbers("InstanceNumber", 1)
    return float("inf") if number is None else float(number[0])


def _normal(header: SliceHeader) -> np.ndarray:
    axes = _axes(header)
    normal = np.cross(axes[:3], axes[3:])
    length = float(np.linalg.norm(normal))
    if not 0.9 < length < 1.1:
        raise Unreadable("its rows and columns are not perpendicular unit vectors")
    return normal / length


def _single_thickness(header: SliceHeader, notes: list[str]) -> float:
    thickness = header.numbers("SliceThickness", 1)
    if thickness is not None and thickness[0] > 0:
        return float(thickness[0])
    notes.append("a single slice of unknown thickness, set to 1 mm")
    return 1.0


def _note_acquisition(headers: list[SliceHeader], notes: list[str]) -> None:
    thickness = headers[0].numbers("SliceThickness", 1)
    if thickness is not None:
        notes.append(f"slice thickness {thickness[0]:g} mm")
    if any(header.texts["LossyImageCompression"] == "01" for header in headers):
        notes.append("compressed with loss before")


def _grid(headers: list[SliceHeader], positions: np.ndarray, usual: float) -> Grid:
    """Geometry of the sorted slices; the way from first to last shows a gantry tilt."""
    axes, spacing = _axes(headers[0]), headers[0].numbers("PixelSpacing", 2)
    assert spacing is not None
    row_mm, column_mm = map(float, spacing)  # between rows comes first
    first, last = _position(headers[0]), _position(headers[-1])
    through = _normal(headers[0])
    length = usual
    if len(headers) > 1:
        along = (last - first) / (positions[-1] - positions[0])  # mm of way per mm of normal
        length = usual * float(np.linalg.norm(along))
        through = along / np.linalg.norm(along)
    direction = np.stack([axes[:3], axes[3:], through], axis=1)
    return Grid(direction, (column_mm, row_mm, length), first)


def _pixels(headers: list[SliceHeader]) -> Iterator[np.ndarray]:
    for header in headers:
        image = sitk.ReadImage(str(header.path), imageIO="GDCMImageIO")
        yield sitk.GetArrayViewFromImage(image)[0]
