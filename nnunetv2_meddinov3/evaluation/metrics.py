"""How a predicted mask agrees with its reference: Dice, two NSDs, HD95, volumes.

The surface distances are MONAI's. Two programs call different things the normalised surface Dice
(NSD), so both are given, under names of their own:

- ``nsd_voxel``: the share of boundary *voxels* within the tolerance, MONAI's default and what the
  MedDINOv3 paper reports (arXiv 2509.02379, sec. 4).
- ``nsd_surface``: the share of boundary *area* within it, as DeepMind's surface-distance measures
  (Nikolov et al. 2021, arXiv 1809.04430), MONAI's ``use_subvoxels=True``.
"""

from __future__ import annotations

import enum
import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np

from nnunetv2_meddinov3.errors import UserError

METRICS = ("dice", "nsd_voxel", "nsd_surface", "hd95", "volume_error")
LOWER_IS_BETTER = ("hd95", "volume_error")
_PERCENTILE = 95.0


class EmptyMasks(enum.Enum):
    """What a structure scores that the reference, the prediction or both of them lack.

    A structure that the prediction misses altogether scores 0, and as HD95 the diagonal of the
    image. The policies differ where the reference has nothing:

    - ``STRICT``: not scored (NaN) if both are empty, as in nnU-Net; invented structures score 0.
    - ``KITS``: 1 if both are empty, as the KiTS challenges count; invented structures score 0.
    - ``PAPER``: not scored whenever the reference is empty, as MedDINOv3's evaluation does: it
      does not see invented structures.
    """

    STRICT = "strict"
    KITS = "kits"
    PAPER = "paper"


@dataclass(frozen=True)
class Agreement:
    """What one structure of one case scores.

    Attributes:
        dice: 0..1, NaN where the policy does not score.
        nsd_voxel: 0..1, over boundary voxels.
        nsd_surface: 0..1, over boundary area.
        hd95: 95th percentile of the surface distances, the larger of both directions, in units of
            the spacing (mm).
        volume_error: (predicted - reference) / reference; NaN where the reference is empty.
        volume_prediction: In cubed (2D: squared) units of the spacing.
        volume_reference: Likewise.
        empty: ``""``, ``"both"``, ``"reference"`` or ``"prediction"``.
    """

    dice: float
    nsd_voxel: float
    nsd_surface: float
    hd95: float
    volume_error: float
    volume_prediction: float
    volume_reference: float
    empty: str = ""


def monai_distances() -> Any:
    """Return MONAI's function of surface distances.

    Raises:
        UserError: If MONAI is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what else MONAI imports
            from monai.metrics.utils import get_edge_surface_distance
    except ImportError as error:
        raise UserError(
            "surface distances need the package monai, which is not installed: "
            "pip install 'nnunetv2-meddinov3[benchmark]'."
        ) from error
    return get_edge_surface_distance


def agreement(
    prediction: np.ndarray,
    reference: np.ndarray,
    spacing: tuple[float, ...],
    tolerance: float = 1.0,
    policy: EmptyMasks = EmptyMasks.STRICT,
    extent: tuple[int, ...] | None = None,
) -> Agreement:
    """Compare two masks.

    Args:
        prediction: Boolean, ([Z,] Y, X).
        reference: Boolean, of the same shape.
        spacing: Of the voxels in mm along the axes of the arrays.
        tolerance: Of both NSDs, in mm.
        policy: What empty masks score.
        extent: Shape of the whole image, if the masks are a part of it that holds all of both.

    Raises:
        UserError: If MONAI is not installed.
        ValueError: If shapes, spacing or tolerance do not fit.
    """
    _check(prediction, reference, spacing, tolerance)
    spacing = tuple(float(side) for side in spacing)  # MONAI refuses a mixture with int
    voxel = math.prod(spacing)
    predicted, expected = (int(np.count_nonzero(mask)) for mask in (prediction, reference))
    if not predicted or not expected:
        sides = zip(extent or prediction.shape, spacing, strict=True)
        diagonal = math.hypot(*(count * side for count, side in sides))
        return _of_empty(predicted * voxel, expected * voxel, diagonal, policy)
    overlap = int(np.count_nonzero(prediction & reference))
    voxelwise = _surfaces(prediction, reference, spacing, subvoxel=False)
    areawise = _surfaces(prediction, reference, spacing, subvoxel=True)
    return Agreement(
        dice=2 * overlap / (predicted + expected),
        nsd_voxel=_within(voxelwise, tolerance),
        nsd_surface=_within(areawise, tolerance),
        hd95=max(float(np.percentile(distances, _PERCENTILE)) for distances, _ in voxelwise),
        volume_error=(predicted - expected) / expected,
        volume_prediction=predicted * voxel,
        volume_reference=expected * voxel,
    )


def _check(
    prediction: np.ndarray, reference: np.ndarray, spacing: tuple[float, ...], tolerance: float
) -> None:
    if prediction.shape != reference.shape or prediction.ndim != len(spacing):
        raise ValueError(
            "prediction, reference and spacing must fit each other, got shapes "
            f"{prediction.shape} and {reference.shape} and {len(spacing)} spacings"
        )
    if prediction.dtype != bool or reference.dtype != bool:
        raise ValueError(f"masks must be boolean, got {prediction.dtype} and {reference.dtype}")
    if not all(math.isfinite(side) and side > 0 for side in spacing):
        raise ValueError(f"spacings must be positive, got {spacing}")
    if not (math.isfinite(tolerance) and tolerance >= 0):
        raise ValueError(f"the tolerance must be 0 or more, got {tolerance}")


def _of_empty(predicted: float, expected: float, diagonal: float, policy: EmptyMasks) -> Agreement:
    """Return the score where at least one mask is empty; see ``EmptyMasks``."""
    if expected:
        score, distance, empty = 0.0, diagonal, "prediction"
    elif policy is EmptyMasks.PAPER:
        score, distance, empty = math.nan, math.nan, "reference" if predicted else "both"
    elif predicted:
        score, distance, empty = 0.0, diagonal, "reference"
    elif policy is EmptyMasks.KITS:
        score, distance, empty = 1.0, 0.0, "both"
    else:
        score, distance, empty = math.nan, math.nan, "both"
    error = -1.0 if expected else math.nan
    return Agreement(score, score, score, distance, error, predicted, expected, empty)


_Surface = tuple[np.ndarray, np.ndarray]
"""Distance of each boundary element to the other surface, and its weight."""


def _surfaces(
    prediction: np.ndarray, reference: np.ndarray, spacing: tuple[float, ...], *, subvoxel: bool
) -> tuple[_Surface, _Surface]:
    """Return the surfaces of the prediction and of the reference, both masks being non-empty."""
    import torch

    masks = [torch.from_numpy(np.ascontiguousarray(mask)) for mask in (prediction, reference)]
    measure = monai_distances()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # MONAI's, of arguments it gives itself
        edges, distances, areas = measure(
            *masks, spacing=list(spacing), use_subvoxels=subvoxel, symmetric=True
        )
    first, second = (
        (d.numpy(), a[e].numpy() if subvoxel else np.ones(len(d), dtype=np.float32))
        for e, d, a in zip(edges, distances, areas if subvoxel else edges, strict=True)
    )
    return first, second


def _within(surfaces: tuple[_Surface, _Surface], tolerance: float) -> float:
    """Return the share of both surfaces, by weight, that lies within the tolerance."""
    inside = sum(float(w[d <= tolerance].sum(dtype=np.float64)) for d, w in surfaces)
    return inside / sum(float(weights.sum(dtype=np.float64)) for _, weights in surfaces)
