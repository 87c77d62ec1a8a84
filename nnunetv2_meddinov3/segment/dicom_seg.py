"""Labels as a DICOM Segmentation object that refers to the series it was made from."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nnunetv2_meddinov3 import __version__
from nnunetv2_meddinov3.curate.volume import Image, VolumeSource
from nnunetv2_meddinov3.errors import UserError, first_line
from nnunetv2_meddinov3.files import replacing

_NEAR_MM = 0.01  # positions of one slice, as read by two programs


def check_highdicom() -> Any:
    """Return highdicom.

    Raises:
        UserError: If it is not installed.
    """
    try:
        import highdicom
    except ImportError as error:
        raise UserError(
            "--dicom-seg needs highdicom, which is not installed: run "
            "pip install 'nnunetv2_meddinov3[dicom]'."
        ) from error
    return highdicom


def write_dicom_seg(
    path: Path,
    source: VolumeSource,
    image: Image,
    labels: np.ndarray,
    names: Mapping[str, tuple[int, ...]],
    model: str,
) -> None:
    """Write labels as a binary DICOM SEG, a segment for each label of the model.

    Slices of the series that were left out when it was read (duplicates, localizers) have no
    labels.

    Args:
        path: The file.
        source: The series.
        image: As it was read from the series.
        labels: (z, y, x), on the image's voxels.
        names: Name of each label or region -> its values; regions may overlap.
        model: What it was made by.

    Raises:
        UserError: If it cannot be written.
    """
    hd = check_highdicom()
    from pydicom import dcmread
    from pydicom.sr.codedict import codes
    from pydicom.uid import ExplicitVRLittleEndian

    datasets = [dcmread(file, stop_before_pixels=True) for file in source.paths]
    segments = _segments(labels, names)
    if source.frames:
        datasets = datasets[:1]  # frames of one file
        positions = [
            group.PlanePositionSequence[0].ImagePositionPatient
            for group in datasets[0].PerFrameFunctionalGroupsSequence
        ]
    else:
        positions = [dataset.ImagePositionPatient for dataset in datasets]
    assert image.grid is not None
    places = _places(np.array(positions, float), image)
    if not source.frames:
        chosen = [i for i, place in enumerate(places) if place is not None]
        datasets, places = [datasets[i] for i in chosen], [places[i] for i in chosen]
    frames = np.zeros((len(places), *segments.shape[1:]), segments.dtype)
    for frame, place in zip(frames, places, strict=True):
        if place is not None:
            frame[:] = segments[place]
    algorithm = hd.AlgorithmIdentificationSequence(
        name=model, version=__version__, family=codes.cid7162.ArtificialIntelligence
    )
    descriptions = [
        hd.seg.SegmentDescription(
            segment_number=number,
            segment_label=name[:64],
            segmented_property_category=codes.SCT.AnatomicalStructure,
            segmented_property_type=codes.SCT.AnatomicalStructure,
            algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=algorithm,
        )
        for number, name in enumerate(names, start=1)
    ]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of names of patients with one part, and the like
            written = hd.seg.Segmentation(
                source_images=datasets,
                pixel_array=frames,
                segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
                segment_descriptions=descriptions,
                series_instance_uid=hd.UID(),
                series_number=900,
                sop_instance_uid=hd.UID(),
                instance_number=1,
                manufacturer="nnunetv2_meddinov3",
                manufacturer_model_name=model[:64],
                software_versions=__version__,
                device_serial_number="0",
                series_description=f"Segmentation by {model}"[:64],
                omit_empty_frames=bool(frames.any()),
                transfer_syntax_uid=ExplicitVRLittleEndian,
            )
    except Exception as error:  # highdicom's of series that lack what the object must repeat
        raise UserError(
            f"no DICOM SEG was made of {source.key}, whose files must have what the object repeats "
            f"of them, but: {first_line(error)}."
        ) from error
    with replacing(path) as part:
        written.save_as(part)


def _segments(labels: np.ndarray, names: Mapping[str, tuple[int, ...]]) -> np.ndarray:
    """Return the number of the segment of each voxel, or of regions a mask each behind it."""
    values = [value for found in names.values() for value in found]
    if len({*values}) == len(values):
        numbers = np.zeros(max(int(labels.max()), *values) + 1, np.uint16)
        for number, found in enumerate(names.values(), start=1):
            numbers[list(found)] = number
        return numbers[labels].astype(np.uint8 if len(names) < 256 else np.uint16)
    return np.stack([np.isin(labels, found) for found in names.values()], -1).astype(np.uint8)


def _places(positions: np.ndarray, image: Image) -> list[int | None]:
    """Return the index in the image of each slice of a series, None where it was left out."""
    assert image.grid is not None
    normal = np.cross(image.grid.direction[:, 0], image.grid.direction[:, 1])
    along = positions @ normal
    if image.positions_mm is not None:
        known = np.asarray(image.positions_mm, float)
    else:
        step = image.grid.direction[:, 2] @ normal * image.grid.spacing[2]
        known = image.grid.origin @ normal + step * np.arange(len(image.array))
    places: list[int | None] = []
    for position in along:
        nearest = int(np.argmin(np.abs(known - position)))
        is_new = nearest not in places  # of duplicates, one
        near = abs(known[nearest] - position) < _NEAR_MM
        places.append(nearest if near and is_new else None)
    if {place for place in places if place is not None} != set(range(len(known))):
        raise UserError(
            "a DICOM SEG must refer to every slice that was segmented, but some slices of the "
            "series are not where they were read: leave --dicom-seg out."
        )
    return places
