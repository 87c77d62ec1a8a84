"""Headers of DICOM files, and which of them are images that can be taken."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nnunetv2_meddinov3.curate.limits import check_rescale
from nnunetv2_meddinov3.curate.readers.dicom_elements import Misfit, has_mark, pixels_and_class
from nnunetv2_meddinov3.curate.readers.imagefile import open_header
from nnunetv2_meddinov3.curate.volume import Unreadable, plain_text

MODALITIES = ("CT", "MR")
MAX_RATIO = 2000  # of a slice to its file; the codecs of DICOM hardly reach a tenth of it
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


@dataclass(frozen=True)
class SliceHeader:
    """What is needed of the header of one DICOM file.

    Attributes:
        tags: DICOM tag (``"0020|000e"``) to its text, without padding.
        size: (columns, rows, frames).
    """

    path: Path
    tags: dict[str, str]
    size: tuple[int, ...]

    def numbers(self, tag: str, count: int) -> np.ndarray | None:
        """The numbers of a tag, None if it has not that many."""
        try:
            values = np.array([float(text) for text in self.tags.get(tag, "").split("\\")])
        except ValueError:
            return None
        return values if len(values) == count and np.isfinite(values).all() else None

    @property
    def series(self) -> str:
        """SeriesInstanceUID."""
        return self.tags.get("0020|000e", "")

    @property
    def patient(self) -> str:
        """A hash of PatientID (of the study where there is none), never the id itself."""
        identity = self.tags.get("0010|0020") or self.tags.get("0020|000d") or self.series
        return hashlib.sha256(identity.encode("utf-8")).hexdigest()[:16]

    @property
    def layout(self) -> tuple:
        """What the slices of one volume share: size, orientation and spacing of the pixels."""
        axes, pixels = self.numbers("0020|0037", 6), self.numbers("0028|0030", 2)
        rounded = [tuple(np.round(v, 3) + 0.0) for v in (axes, pixels) if v is not None]
        return (self.size, *rounded)


def read_header(path: Path) -> SliceHeader:
    """Read the header of a DICOM image.

    Raises:
        Unreadable: If it holds no image, or is none or a damaged one.
        OSError: If it cannot be opened.
    """
    if not has_mark(path):
        raise Unreadable("it is no DICOM file")
    try:
        has_pixels, uid = pixels_and_class(path)
    except Misfit as error:
        raise Unreadable(f"it is a damaged DICOM file: {error}") from error
    for prefix, name in NO_IMAGE.items():
        if f"{uid}.".startswith(f"{prefix}."):
            raise Unreadable(f"it is {name}, not an image")
    if not has_pixels:
        raise Unreadable("it is a DICOM file without pixels")
    try:
        reader = open_header(path, "GDCMImageIO")
        keys = reader.GetMetaDataKeys()
        tags = {tag: plain_text(reader.GetMetaData(tag)).strip(" \0") for tag in keys}
    except RuntimeError as error:
        raise Unreadable("it is a damaged DICOM file, or one that GDCM cannot read") from error
    return SliceHeader(path, tags, tuple(int(n) for n in reader.GetSize()))


def check_kind(header: SliceHeader) -> None:
    """Refuse what is no single grey CT or MR image, or whose values mean nothing.

    Raises:
        Unreadable: With the reason.
    """
    tags = header.tags
    modality = tags.get("0008|0060", "")
    if modality not in MODALITIES:
        raise Unreadable(f"its modality is {modality or 'not stated'}, not CT or MR")
    if tags.get("0008|0016") == SECONDARY_CAPTURE:
        raise Unreadable("it is a secondary capture (a screenshot), not an acquired image")
    if tags.get("0028|0002", "1") != "1":
        raise Unreadable(f"it has colour ({tags['0028|0002']} samples per pixel)")
    frames = int(np.prod(header.size[2:])) if len(header.size) > 2 else 1
    if frames > 1 or tags.get("0028|0008", "1") not in ("", "0", "1"):
        raise Unreadable("it is multi-frame, which is not read; export it as single frames")
    slope, intercept = _rescale(tags, "0028|1053", 1.0), _rescale(tags, "0028|1052", 0.0)
    check_rescale(slope, intercept)
    columns, rows = header.size[:2]
    if 2 * columns * rows > MAX_RATIO * header.path.stat().st_size:
        raise Unreadable(f"it declares {columns}x{rows} pixels, more than the file can hold")


def _rescale(tags: dict[str, str], tag: str, default: float) -> float:
    try:
        return float(tags.get(tag) or default)
    except ValueError:
        return float("nan")
