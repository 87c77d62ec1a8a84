"""The header of one DICOM image, read with pydicom.

No file reaches pydicom before ``dicom_guard`` has seen that its elements fit into it.
"""

from __future__ import annotations

import hashlib
import io
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pydicom

from nnunetv2_meddinov3.curate.readers.dicom_guard import (
    IMPLICIT,
    NOWHERE,
    Misfit,
    Pixels,
    check_lengths,
    has_mark,
    open_plain,
)
from nnunetv2_meddinov3.curate.volume import Unreadable, plain_text

NO_IMAGE = {  # SOP classes, by their prefixes, that hold no pixels of their own
    "1.2.840.10008.1.3.10": "a DICOMDIR",
    "1.2.840.10008.5.1.4.1.1.481.3": "an RT structure set",
    "1.2.840.10008.5.1.4.1.1.481.5": "an RT plan",
    "1.2.840.10008.5.1.4.1.1.66": "a segmentation or registration",
    "1.2.840.10008.5.1.4.1.1.30": "a parametric map",
    "1.2.840.10008.5.1.4.1.1.88": "a structured report",
    "1.2.840.10008.5.1.4.1.1.11": "a presentation state",
    "1.2.840.10008.5.1.4.1.1.104": "an encapsulated document",
}
OF_FILES = (
    "AcquisitionNumber",
    "AcquisitionTime",
    "ContentTime",
    "ConvolutionKernel",
    "EchoTime",
    "FrameOfReferenceUID",
    "ImageOrientationPatient",
    "ImagePositionPatient",
    "ImageType",
    "InstanceNumber",
    "LossyImageCompression",
    "Modality",
    "NumberOfFrames",
    "PatientID",
    "PhotometricInterpretation",
    "PixelSpacing",
    "RescaleIntercept",
    "RescaleSlope",
    "RescaleType",
    "SOPClassUID",
    "SOPInstanceUID",
    "SeriesInstanceUID",
    "SliceThickness",
    "StudyInstanceUID",
    "TemporalPositionIdentifier",
)
OF_FRAMES = (  # that only the frames of multi-frame files have
    "ComplexImageComponent",
    "DimensionIndexValues",
    "StackID",
)
TEXTS = (*OF_FILES, *OF_FRAMES)
GROUPS = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
PLACES = {keyword: place for place, keyword in enumerate(TEXTS)}
TAGS = {
    keyword: pydicom.tag.Tag(keyword)
    for keyword in (
        *OF_FILES,
        *GROUPS,
        "BitsAllocated",
        "Columns",
        "DimensionIndexSequence",
        "MediaStorageSOPClassUID",
        "ModalityLUTSequence",
        "Rows",
        "SamplesPerPixel",
        "UnassignedPerFrameConvertedAttributesSequence",
        "UnassignedSharedConvertedAttributesSequence",
    )
}


@dataclass(frozen=True, slots=True)
class SliceHeader:
    """What is needed of the header of one DICOM image, a file or a frame of a multi-frame file.

    It is small, since a run may hold millions.

    Attributes:
        path: The file.
        texts: Text of each element of ``TEXTS`` without padding, several values separated by a
            backslash; empty where it is missing. ``text`` picks one.
        columns: Pixels along a row.
        rows: Pixels along a column.
        samples: Values per pixel, 1 for grey.
        has_table: Whether a ModalityLUTSequence stands for the rescale.
        photometric_at: Byte of the file where the value of PhotometricInterpretation begins, None
            where it is missing.
        frame: Which frame of the file it is, counted from 0; also of a deflated file, which is
            decoded as frames are. None where the file is one image that GDCM reads as it is.
        frames: Frames of the file.
        bits: Bits a value takes in the file.
        syntax: UID of the transfer syntax, that of the inflated copy for a deflated file.
        pixels: Where the pixels of the file are.
    """

    path: Path
    texts: tuple[str, ...]
    columns: int
    rows: int
    samples: int
    has_table: bool = False
    photometric_at: int | None = None
    frame: int | None = None
    frames: int = 1
    bits: int = 0
    syntax: str = IMPLICIT
    pixels: Pixels = NOWHERE

    @property
    def member(self) -> tuple[Path, int]:
        """What tells an image from all others: the file and the frame."""
        return self.path, self.frame or 0

    @property
    def name(self) -> str:
        """Name of the file, and the number of the frame, counted from 1, where it has several."""
        frame = "" if self.frames == 1 or self.frame is None else f" frame {self.frame + 1}"
        return f"{plain_text(self.path.name)}{frame}"

    def text(self, keyword: str) -> str:
        """Return the text of an element of ``TEXTS``, empty where it is missing."""
        return self.texts[PLACES[keyword]]

    def numbers(self, keyword: str, count: int) -> np.ndarray | None:
        """Return the numbers of an element, None if it does not have that many."""
        try:
            values = np.array([float(text) for text in self.text(keyword).split("\\")])
        except ValueError:
            return None
        return values if len(values) == count and np.isfinite(values).all() else None

    @property
    def has_rescale(self) -> bool:
        """Whether RescaleSlope and RescaleIntercept are stated, as every CT must."""
        return bool(self.text("RescaleSlope") and self.text("RescaleIntercept"))

    @property
    def series(self) -> str:
        """SeriesInstanceUID."""
        return self.text("SeriesInstanceUID")

    @property
    def patient(self) -> str:
        """A hash of PatientID (of the study where there is none), never the id itself."""
        identity = self.text("PatientID") or self.text("StudyInstanceUID") or self.series
        return hashlib.sha256(identity.encode("utf-8")).hexdigest()[:16]


def parse_header(path: Path) -> tuple[SliceHeader, pydicom.FileDataset, bool]:
    """Read the header of a DICOM file.

    Returns:
        The header, the elements that it is made of, and whether the file is deflated.

    Raises:
        Unreadable: If it holds no image, is not DICOM, or is damaged.
        OSError: If it cannot be opened.
    """
    if not has_mark(path):
        raise Unreadable("it is not a DICOM file")
    try:
        with open_plain(path) as file:
            pixels = check_lengths(file)
            file.seek(0)
            with without_pydicom_warnings():
                dataset = _parse(file)
                header = _header(path, dataset, pixels)
            return header, dataset, isinstance(file, io.BytesIO)
    except Misfit as error:
        raise Unreadable(f"it is a damaged DICOM file: {error}") from error


@contextmanager
def without_pydicom_warnings() -> Iterator[None]:
    """Keep pydicom from warning and logging meanwhile about odd values, which are judged here."""
    logger = logging.getLogger("pydicom")
    before, logger.disabled = logger.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.disabled = before


def _header(path: Path, dataset: pydicom.FileDataset, pixels: Pixels | None) -> SliceHeader:
    uid = text_of(dataset.file_meta, "MediaStorageSOPClassUID")
    for prefix, name in NO_IMAGE.items():
        if f"{uid}.".startswith(f"{prefix}."):
            raise Unreadable(f"it is {name}, not an image")
    if pixels is None:
        raise Unreadable("it is a DICOM file without pixels")
    # most texts are the same in all files of a series
    texts = tuple(sys.intern(text_of(dataset, keyword)) for keyword in OF_FILES)
    columns, rows = _number(dataset, "Columns"), _number(dataset, "Rows")
    photometric = dataset.get_item(TAGS["PhotometricInterpretation"])
    return SliceHeader(
        path,
        (*texts, *("" for _ in OF_FRAMES)),
        columns,
        rows,
        _number(dataset, "SamplesPerPixel", 1),
        TAGS["ModalityLUTSequence"] in dataset,
        getattr(photometric, "value_tell", None),
        bits=_number(dataset, "BitsAllocated", 0),
        syntax=sys.intern(text_of(dataset.file_meta, "TransferSyntaxUID") or IMPLICIT),
        pixels=pixels,
    )


def _parse(file: BinaryIO) -> pydicom.FileDataset:
    """Read the elements that are needed, without converting any."""
    try:
        return pydicom.dcmread(file, stop_before_pixels=True, specific_tags=list(TAGS.values()))
    except OSError:
        raise
    except Exception as error:  # whatever malformed bytes lead a parser to
        raise Unreadable("it is a damaged DICOM file, or one that pydicom cannot read") from error


def text_of(dataset: pydicom.Dataset, keyword: str) -> str:
    """Return the text of an element as it is in the file, empty if it is missing.

    The bytes are not decoded by the character set of the file: the hash of a patient must not
    depend on how an exporter declares it.
    """
    element = dataset.get_item(TAGS.get(keyword, keyword))
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
