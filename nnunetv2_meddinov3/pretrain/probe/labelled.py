"""Labelled slices of a raw nnU-Net dataset, split by patient."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
from torch import Tensor
from torch.nn import functional as F

from nnunetv2_meddinov3.errors import UserError

DEFAULT_SIZE = 224  # pixels
DEFAULT_SLICES = 8  # of a case
_HELD_OUT = 1 / 3  # of the patients, where no split is given
_IGNORE = "ignore"


@dataclass
class ProbeData:
    """Slices with masks, in memory.

    Attributes:
        images: (n, 1, S, S) in HU.
        masks: (n, structures, S, S) bool.
        structures: Their names; regions of a dataset may overlap.
        patients: Of each slice.
        is_held_out: (n,) bool; no patient is on both sides.
        name: Of the dataset.
    """

    images: Tensor
    masks: Tensor
    structures: list[str]
    patients: list[str]
    is_held_out: np.ndarray
    name: str

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

        Of each case some slices are taken at even distances, three quarters of them with a
        structure in them where there are such. Fold 0 of ``splits_final.json`` in the folder says
        who is held out, otherwise a third of the patients by a hash of their names.

        Args:
            folder: With dataset.json.
            size: Side of the squares to which slices are resized, in pixels.
            slices_per_case: At most.
            patients: Regular expression whose first group, or whole match, is the patient in the
                name of a case; the case itself by default.
            seed: Of the split by hash.

        Raises:
            UserError: If it is no labelled dataset, or has too few patients.
        """
        folder = Path(folder)
        facts = _read_json(folder / "dataset.json")
        structures = _structures(facts, folder)
        cases = _cases(folder, facts)
        names = {case: _patient(case, patients) for case in cases}
        held_out = _split(folder, names, seed)
        images, masks, whose, is_held_out = [], [], [], []
        for case, (image, label) in cases.items():
            taken = _read_case(image, label, list(structures.values()), slices_per_case)
            for hu, mask in taken:
                images.append(_square(torch.from_numpy(hu)[None, None], size, "bicubic")[0])
                masks.append(_square(torch.from_numpy(mask)[None].float(), size, "area")[0] >= 0.5)
                whose.append(names[case])
                is_held_out.append(case in held_out)
        if not images:
            raise UserError(f"{folder} must hold labelled slices, but none could be taken.")
        return cls(
            torch.stack(images),
            torch.stack(masks),
            list(structures),
            whose,
            np.array(is_held_out),
            folder.resolve().name,
        )


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(
            f"a labelled nnU-Net raw dataset has a {path.name}, but there is no {path}: give the "
            "folder DatasetXXX_Name in nnUNet_raw."
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} must be readable JSON, but it is not: {error}.") from error


def _structures(facts: dict[str, Any], folder: Path) -> dict[str, list[int]]:
    """Names and label values, without background and ignored pixels."""
    out = {}
    for name, value in facts.get("labels", {}).items():
        values = [int(v) for v in value] if isinstance(value, list) else [int(value)]
        if name.lower() not in ("background", _IGNORE):
            out[name] = values
    if not out:
        raise UserError(f"{folder / 'dataset.json'} must name labels, but it names none.")
    return out


def _cases(folder: Path, facts: dict[str, Any]) -> dict[str, tuple[Path, Path]]:
    """Case -> image of the first channel and label."""
    ending = facts.get("file_ending", ".nii.gz")
    cases = {}
    for label in sorted((folder / "labelsTr").glob(f"*{ending}")):
        case = label.name.removesuffix(ending)
        image = folder / "imagesTr" / f"{case}_0000{ending}"
        if image.is_file():
            cases[case] = (image, label)
    if not cases:
        raise UserError(
            f"a labelled nnU-Net raw dataset has imagesTr and labelsTr, but {folder} holds no case "
            f"with both (file_ending {ending})."
        )
    return cases


def _patient(case: str, pattern: str | None) -> str:
    if pattern is None:
        return case
    try:
        match = re.search(pattern, case)
    except re.error as error:
        raise UserError(
            f"--patients must be a regular expression, got {pattern!r}: {error}."
        ) from error
    if match is None:
        raise UserError(f"--patients must match every case, but {pattern!r} does not match {case}.")
    return match.group(1) if match.groups() else match.group(0)


def _split(folder: Path, patients: dict[str, str], seed: int) -> set[str]:
    """Return the cases that are held out.

    Raises:
        UserError: If a patient is on both sides, or one side is empty.
    """
    path = folder / "splits_final.json"
    if path.is_file():
        try:
            held_out = set(_read_json(path)[0]["val"]) & set(patients)
        except (LookupError, TypeError) as error:
            raise UserError(f"{path} must be nnU-Net's list of folds, but it is not.") from error
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


def _read_case(
    image: Path, label: Path, structures: list[list[int]], count: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return (H, W) float32 slices and (structures, H, W) bool masks."""
    try:
        read = [_axial(sitk.ReadImage(str(path))) for path in (image, label)]
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(f"{image} and its label must be readable, but: {reason}.") from error
    values, labels = (sitk.GetArrayFromImage(each) for each in read)
    values, labels = (a if a.ndim > 2 else a[None] for a in (values, labels))
    if values.ndim == 4:  # a picture in colours: all channels are the same grey
        values = values[..., 0]
    if values.shape != labels.shape:
        raise UserError(
            f"{image} and its label must have one shape, got {values.shape} and {labels.shape}."
        )
    masks = np.stack([np.isin(labels, s) for s in structures], axis=1)
    return [
        (values[z].astype(np.float32), masks[z]) for z in _spread(masks.any(axis=(1, 2, 3)), count)
    ]


def _axial(image: sitk.Image) -> sitk.Image:
    return sitk.DICOMOrient(image, "LPS") if image.GetDimension() == 3 else image


def _spread(is_foreground: np.ndarray, count: int) -> list[int]:
    """Numbers of slices at even distances, three quarters of them with a structure."""
    front, back = np.flatnonzero(is_foreground), np.flatnonzero(~is_foreground)
    wanted = min(len(front), max(count - count // 4, count - len(back)))
    parts = ((front, wanted), (back, min(len(back), count - wanted)))
    chosen = [p[np.linspace(0, len(p) - 1, n).round().astype(int)] for p, n in parts if n]
    return sorted(set(np.concatenate(chosen).tolist())) if chosen else []


def _square(images: Tensor, size: int, mode: str) -> Tensor:
    """Pad (n, c, H, W) to a square with its smallest values and resize it."""
    h, w = images.shape[-2:]
    side = max(h, w)
    pad = ((side - w) // 2, side - w - (side - w) // 2, (side - h) // 2, side - h - (side - h) // 2)
    padded = F.pad(images, pad, value=float(images.min()))
    if mode == "area":
        return F.interpolate(padded, (size, size), mode="area")
    return F.interpolate(padded, (size, size), mode=mode, antialias=True)
