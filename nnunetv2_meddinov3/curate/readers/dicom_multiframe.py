"""The frames of multi-frame DICOM, each with the header of a slice.

Enhanced CT and MR, and what legacy series are converted to, keep place, orientation, rescale and
phase of a frame in functional groups: its own, or those that all frames share (DICOM PS3.3,
C.7.6.16). Frames become slices here, so volumes are told apart and sorted by the rules of series.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pydicom
from pydicom.datadict import dictionary_VR

from nnunetv2_meddinov3.curate.readers.dicom_header import (
    GROUPS,
    TEXTS,
    SliceHeader,
    parse_header,
    text_of,
    without_pydicom_warnings,
)
from nnunetv2_meddinov3.curate.volume import Unreadable

# for a text of ``SliceHeader`` that frames may have of their own: the groups, its name in them
OF_GROUPS: dict[str, tuple[tuple[str, ...], str]] = {
    "AcquisitionNumber": (("FrameContentSequence",), "FrameAcquisitionNumber"),
    "AcquisitionTime": (("FrameContentSequence",), "FrameAcquisitionDateTime"),
    "ComplexImageComponent": (("MRImageFrameTypeSequence",), "ComplexImageComponent"),
    "ConvolutionKernel": (("CTReconstructionSequence",), "ConvolutionKernel"),
    "EchoTime": (("MREchoSequence",), "EffectiveEchoTime"),
    "ImageOrientationPatient": (("PlaneOrientationSequence",), "ImageOrientationPatient"),
    "ImagePositionPatient": (("PlanePositionSequence",), "ImagePositionPatient"),
    "ImageType": (("CTImageFrameTypeSequence", "MRImageFrameTypeSequence"), "FrameType"),
    "InstanceNumber": ((), "InstanceNumber"),
    "PixelSpacing": (("PixelMeasuresSequence",), "PixelSpacing"),
    "RescaleIntercept": (("PixelValueTransformationSequence",), "RescaleIntercept"),
    "RescaleSlope": (("PixelValueTransformationSequence",), "RescaleSlope"),
    "RescaleType": (("PixelValueTransformationSequence",), "RescaleType"),
    "SliceThickness": (("PixelMeasuresSequence",), "SliceThickness"),
    "StackID": (("FrameContentSequence",), "StackID"),
    "TemporalPositionIdentifier": (("FrameContentSequence",), "TemporalPositionIndex"),
}
UNASSIGNED = (  # what a converter knew no group for, of all frames and of one
    "UnassignedSharedConvertedAttributesSequence",
    "UnassignedPerFrameConvertedAttributesSequence",
)
# dimensions that order the slices of a volume, and so tell no volumes apart
ALONG = ("ImagePositionPatient", "InStackPositionNumber", "PlanePositionSequence")
ALONG_TAGS = {int(pydicom.tag.Tag(keyword)) for keyword in ALONG}
BINARY = ("FD", "FL", "SL", "SS", "UL", "US")  # numbers that are no text in a file


def read_headers(path: Path) -> list[SliceHeader]:
    """Read the headers of all images of a DICOM file: one, or those of its frames.

    A multi-frame file without functional groups has one, for which ``check_kind`` has a reason.

    Raises:
        Unreadable: If it holds no image, is not DICOM, or is damaged.
        OSError: If it cannot be opened.
    """
    header, dataset, deflated = parse_header(path)
    count = header.text("NumberOfFrames") or "1"
    frames = max(1, int(count)) if count.isdecimal() and len(count) < 9 else 0
    if not frames or not any(name in dataset for name in GROUPS):
        return [replace(header, frame=0)] if deflated and frames == 1 else [header]
    try:
        with without_pydicom_warnings():
            return list(_frames(replace(header, frames=frames), dataset))
    except Unreadable:
        raise
    except Exception as error:  # whatever malformed bytes lead a parser to
        raise Unreadable("the functional groups of its frames are damaged") from error


def _frames(header: SliceHeader, dataset: pydicom.Dataset) -> Iterator[SliceHeader]:
    shared, own = (_items(dataset, name) for name in GROUPS)
    if len(own) != header.frames and (own or header.frames > 1):
        raise Unreadable(
            f"it states {header.text('NumberOfFrames') or 1} frames, but {len(own)} are described"
        )
    converted_shared, converted = (_items(dataset, name) for name in UNASSIGNED)
    dimensions = [_is_along(item) for item in _items(dataset, "DimensionIndexSequence")]
    common = [*shared[:1], *converted_shared[:1]]
    uid = header.text("SOPInstanceUID")
    for frame in range(header.frames):
        groups = [*own[frame : frame + 1], *converted[frame : frame + 1], *common]
        texts = dict(zip(TEXTS, header.texts, strict=True))
        for keyword in OF_GROUPS:
            texts[keyword] = _text(groups, keyword) or texts[keyword]
        texts["SOPInstanceUID"] = f"{uid}#{frame}"  # the rules for series ask for one an image
        texts["DimensionIndexValues"] = _indices(groups, dimensions)
        yield replace(header, frame=frame, texts=tuple(map(sys.intern, texts.values())))


def _items(dataset: pydicom.Dataset, keyword: str) -> list[pydicom.Dataset]:
    """Return the items of a sequence, none where it is missing."""
    return list(dataset[keyword].value or ()) if keyword in dataset else []


def _is_along(dimension: pydicom.Dataset) -> bool:
    pointers = (dimension.get("DimensionIndexPointer"), dimension.get("FunctionalGroupPointer"))
    return any(pointer is not None and int(pointer) in ALONG_TAGS for pointer in pointers)


def _text(groups: list[pydicom.Dataset], keyword: str) -> str:
    """Return the text of an element of the first group that has it, else empty."""
    sequences, name = OF_GROUPS[keyword]
    for group in groups:
        for sequence in sequences:
            for item in _items(group, sequence)[:1]:
                if text := _value(item, name):
                    return text
        if keyword in group and (text := _value(group, keyword)):
            return text  # of a converted series
    return ""


def _value(dataset: pydicom.Dataset, keyword: str) -> str:
    if keyword not in dataset:
        return ""
    if dictionary_VR(keyword) not in BINARY:
        return text_of(dataset, keyword)
    value = dataset[keyword].value
    values = value if isinstance(value, list | pydicom.multival.MultiValue) else [value]
    return "\\".join("" if each is None else str(each) for each in values)


def _indices(groups: list[pydicom.Dataset], along: list[bool]) -> str:
    """Return the places of a frame in all dimensions but those along its volume."""
    for group in groups:
        for item in _items(group, "FrameContentSequence")[:1]:
            values = _value(item, "DimensionIndexValues").split("\\")
            if len(values) == len(along):
                pairs = zip(values, along, strict=True)
                return "\\".join(value for value, is_along in pairs if not is_along)
    return ""
