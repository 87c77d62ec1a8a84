"""Labelled slices of a raw nnU-Net dataset, split by patient."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import SimpleITK as sitk
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from nnunetv2_meddinov3.case_names import patient_in, patient_pattern
from nnunetv2_meddinov3.errors import UserError, first_line
from nnunetv2_meddinov3.models.contracts import HU, NORMALISED
from nnunetv2_meddinov3.raw_dataset import RawDataset, open_raw_dataset
from nnunetv2_meddinov3.store.mapping import Mapping, mapping_of

DEFAULT_SIZE = 224  # pixels
DEFAULT_SLICES = 8  # of a case
_HELD_OUT = 1 / 3  # of the patients, where no split is given


class _Slice(NamedTuple):
    values: Float[np.ndarray, "height width"]
    masks: Bool[np.ndarray, "structure height width"]
    ignored: Bool[np.ndarray, "height width"]


@dataclass
class ProbeData:
    """Slices with masks, in memory.

    Attributes:
        images: Squares, in the unit.
        masks: Where each structure is.
        ignored: Pixels under nnU-Net's ignore label: what they show is not known, so they count
            neither as a structure nor as background.
        structures: Names of labels and regions; regions may overlap.
        patients: Of each slice.
        is_held_out: No patient is on both sides.
        name: Of the dataset.
        unit: ``"HU"`` or ``"normalised"``: by the percentiles of a volume, which become 0 and 1.
    """

    images: Float[Tensor, "slice 1 size size"]
    masks: Bool[Tensor, "slice structure size size"]
    ignored: Bool[Tensor, "slice size size"]
    structures: list[str]
    patients: list[str]
    is_held_out: Bool[np.ndarray, " slice"]
    name: str
    unit: str = HU

    @classmethod
    def from_nnunet(
        cls,
        folder: Path | str,
        *,
        size: int = DEFAULT_SIZE,
        slices_per_case: int = DEFAULT_SLICES,
        patients: str | None = None,
        seed: int = 0,
    ) -> ProbeData:
        """Read slices of ``imagesTr`` and ``labelsTr``.

        Some slices of each case are taken at even distances, three quarters of them with a
        structure in them where possible. Fold 0 of ``splits_final.json`` in the folder says who is
        held out, otherwise a third of the patients by a hash of their names.

        Args:
            folder: With dataset.json.
            size: Side of the squares to which slices are resized, in pixels.
            slices_per_case: At most.
            patients: Regular expression whose first group, or whole match, is the patient in the
                name of a case; the case itself by default.
            seed: Of the split by hash.

        Raises:
            UserError: If it is not a labelled dataset, or has too few patients.
        """
        dataset = open_raw_dataset(folder)
        if not dataset.labels:
            raise UserError(
                f"{dataset.folder / 'dataset.json'} must name labels, but it names none."
            )
        cases = _cases(dataset)
        pattern = None if patients is None else patient_pattern(patients)
        names = {case: patient_in(case, pattern) for case in cases}
        held_out = _split(dataset.folder, names, seed)
        # as nnU-Net has it: values are HU where the channel is called CT
        is_ct = "ct" in re.split(r"[^a-z0-9]+", dataset.channel_names.get(0, "").lower())
        unit = HU if is_ct and not _is_windowed(next(iter(cases.values()))[0]) else NORMALISED
        slices, whose, is_held_out = [], [], []
        for case, (image, label) in cases.items():
            for each in _read_case(image, label, dataset, unit, is_ct, slices_per_case):
                slices.append(_resized(each, size))
                whose.append(names[case])
                is_held_out.append(case in held_out)
        if not slices:
            raise UserError(f"{folder} must hold labelled slices, but none could be taken.")
        images, masks, ignored = (torch.stack(part) for part in zip(*slices, strict=True))
        return cls(
            images,
            masks,
            ignored,
            list(dataset.labels),
            whose,
            np.array(is_held_out),
            dataset.name,
            unit,
        )


def _cases(dataset: RawDataset) -> dict[str, tuple[Path, Path]]:
    """Return case -> image of the first channel and label, for cases that have both."""
    cases = {
        case: (channels[0], dataset.label(case))
        for case, channels in dataset.images().items()
        if 0 in channels and channels[0].is_file() and dataset.label(case).is_file()
    }
    if not cases:
        raise UserError(
            f"a labelled nnU-Net raw dataset has imagesTr and labelsTr, but {dataset.folder} holds "
            f"no case with both (file_ending {dataset.ending or 'is not given'})."
        )
    if missing := dataset.unlabelled():
        several = len(missing) > 1
        print(
            f"{dataset.folder} has {len(missing)} training case{'s' if several else ''} without a "
            f"label file, left out here; {'the first that is missing' if several else 'missing'} "
            f"is {dataset.label(missing[0])}.",
            file=sys.stderr,
        )
    return cases


def _split(folder: Path, patients: dict[str, str], seed: int) -> set[str]:
    """Return the cases that are held out.

    Raises:
        UserError: If a patient is on both sides, or one side is empty.
    """
    path = folder / "splits_final.json"
    if path.is_file():
        held_out = _validation_cases(path) & set(patients)
    else:
        rank = sorted(
            set(patients.values()), key=lambda p: hashlib.sha256(f"{seed}{p}".encode()).hexdigest()
        )
        chosen = set(rank[: max(1, round(len(rank) * _HELD_OUT))])
        held_out = {case for case, patient in patients.items() if patient in chosen}
    sides = [{patients[c] for c in patients if (c in held_out) == out} for out in (True, False)]
    if both := sides[0] & sides[1]:
        raise UserError(
            f"a patient must be trained on or held out, but {sorted(both)[0]} is in both parts of "
            f"{path}: split by patient."
        )
    if not all(sides):
        raise UserError(
            f"a probe needs at least two patients, of which one is held out, but {folder} gives "
            f"{len(sides[0])} held out and {len(sides[1])} to train on."
        )
    return held_out


def _validation_cases(path: Path) -> set[str]:
    try:
        return set(json.loads(path.read_text(encoding="utf-8"))[0]["val"])
    except (OSError, ValueError) as error:
        raise UserError(f"{path} must be readable JSON, but: {first_line(error)}.") from error
    except (LookupError, TypeError) as error:
        raise UserError(f"{path} must be nnU-Net's list of folds, but it is not.") from error


def _is_windowed(image: Path) -> bool:
    """Whether an image has 8 bits, which a CT's values in HU do not fit into."""
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(image))
    try:
        reader.ReadImageInformation()
    except RuntimeError:
        return False  # said when it is read
    return reader.GetPixelID() in (sitk.sitkUInt8, sitk.sitkVectorUInt8)


def _read_case(
    image: Path, label: Path, dataset: RawDataset, unit: str, is_ct: bool, count: int
) -> list[_Slice]:
    """Read some axial slices of a case, in HU or normalised as curation does it.

    That is by the percentiles of the volume, and by the ends of its window for a CT of 8 bits.
    """
    values, labels = _read_pair(image, label)
    if unit == NORMALISED:
        mapping = Mapping(0.0, 255.0) if is_ct else mapping_of(values)
        values = mapping.normalised(values) if mapping.has_contrast else np.zeros(values.shape)
    masks = np.stack([np.isin(labels, each) for each in dataset.labels.values()], axis=1)
    ignored = np.zeros(labels.shape, bool) if dataset.ignore is None else labels == dataset.ignore
    known = ~ignored.all(axis=(1, 2))  # a slice without a known label says nothing
    shows = masks.any(axis=(1, 2, 3))
    chosen = _spread(np.flatnonzero(known & shows), np.flatnonzero(known & ~shows), count)
    return [_Slice(values[z].astype(np.float32), masks[z], ignored[z]) for z in chosen]


def _read_pair(image: Path, label: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read an image and its label map as (slice, height, width)."""
    try:
        values, labels = (_slices(sitk.ReadImage(str(path))) for path in (image, label))
    except RuntimeError as error:
        raise UserError(
            f"{image} and its label must be readable, but: {first_line(error)}."
        ) from error
    if values.shape != labels.shape:
        raise UserError(
            f"{image} and its label must have one shape, got {values.shape} and {labels.shape}."
        )
    return values, labels


def _slices(image: sitk.Image) -> np.ndarray:
    """Return a volume's axial slices, or a 2D image as one slice."""
    oriented = sitk.DICOMOrient(image, "LPS") if image.GetDimension() == 3 else image
    array = sitk.GetArrayFromImage(oriented)
    if image.GetNumberOfComponentsPerPixel() > 1:  # a picture in colours: all are the same grey
        array = array[..., 0]
    return array if array.ndim > 2 else array[None]


def _spread(shows: np.ndarray, others: np.ndarray, count: int) -> list[int]:
    """Choose slices at even distances, three quarters of them with a structure.

    Args:
        shows: Numbers of the slices with a structure.
        others: Numbers of those without.
        count: How many at most.
    """
    wanted = min(len(shows), max(count - count // 4, count - len(others)))
    parts = ((shows, wanted), (others, min(len(others), count - wanted)))
    chosen = [p[np.linspace(0, len(p) - 1, n).round().astype(int)] for p, n in parts if n]
    return sorted(set(np.concatenate(chosen).tolist())) if chosen else []


def _resized(each: _Slice, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return image (1, S, S), masks (structure, S, S) and ignored pixels (S, S) as squares.

    A pixel shows a structure if half of what is known of it does, and is ignored if nothing is.
    """
    image = _square(torch.from_numpy(each.values)[None], fill=float(each.values.min()))
    image = F.interpolate(image[None], (size, size), mode="bicubic", antialias=True)[0]
    layers = np.concatenate([each.masks, each.ignored[None]])
    shares = _square(torch.from_numpy(layers).float(), fill=0)
    shares = F.interpolate(shares[None], (size, size), mode="area")[0]
    known = 1 - shares[-1]
    return image, (shares[:-1] >= 0.5 * known) & (known > 0), known <= 0


def _square(images: Tensor, fill: float) -> Tensor:
    """Pad (channels, H, W) to a square, the image in the middle."""
    h, w = images.shape[-2:]
    side = max(h, w)
    left, top = (side - w) // 2, (side - h) // 2
    return F.pad(images, (left, side - w - left, top, side - h - top), value=fill)
