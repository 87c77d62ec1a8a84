"""What the values of a volume tell: modality, label maps, padding, and the range of intensities."""

from __future__ import annotations

import re

import numpy as np

MR_NAMES = re.compile(r"mri?|t[12](w|c|ce|gd|n|star)*|flair|pdw?|adc|dwi|swi|dce|cbf|cbv|bold")
HU_AIR = -200  # below fat; a CT with none of this shows no air at all
HU_RANGE = (-4000, 4000)  # where nearly all voxels of a CT lie, padding included
MAX_LABELS = 256
LABEL_PATCHES = 0.6  # share of a label map's voxels, at least, whose neighbour is the same
SAMPLED = 16  # slices looked at for label maps
MAX_SAMPLE = 4_000_000  # voxels that percentiles are taken of


def modality_of_name(name: str | None) -> str | None:
    """``"CT"`` or ``"MR"`` as nnU-Net's channel name says, None if it says neither."""
    words = re.split(r"[^a-z0-9]+", (name or "").lower())
    if "ct" in words:
        return "CT"
    return "MR" if any(map(MR_NAMES.fullmatch, words)) else None


def looks_like_hu(array: np.ndarray) -> bool:
    """Whether a volume's values are such as only CT has: air, and nearly all in a CT's range."""
    if not (array <= HU_AIR).any():
        return False
    low, high = HU_RANGE
    return np.count_nonzero((array >= low) & (array <= high)) >= 0.99 * array.size


def looks_like_labels(array: np.ndarray) -> bool:
    """Whether a volume (S, H, W) is a segmentation: few whole numbers from 0 on, in patches."""
    if array.dtype != np.int16 or array.min() < 0:
        return False
    step = max(1, len(array) // SAMPLED)
    sample = array[::step]
    inside = sample[:, :, :-1] > 0
    count = np.count_nonzero(inside)
    if not count or len(np.unique(sample)) > MAX_LABELS:
        return False
    same = np.count_nonzero(inside & (sample[:, :, :-1] == sample[:, :, 1:]))
    return same > LABEL_PATCHES * count


def padding_value(array: np.ndarray) -> int | None:
    """The constant below air that fills the corners of most slices, outside the field of view.

    Args:
        array: (S, H, W) in HU.

    Returns:
        The value, such as -2000, -3024 or -1024, or None.
    """
    lowest = np.fmin.reduce(array, axis=None)  # NaN only if all are
    if not -32768 <= lowest < -1000:
        return None
    corners = array[:, [0, 0, -1, -1], [0, -1, 0, -1]]
    filled = np.count_nonzero((corners == lowest).all(axis=1))
    return int(lowest) if 2 * filled > len(array) else None


def robust_range(array: np.ndarray) -> dict[str, float]:
    """Percentiles 0.5 and 99.5 of the foreground, the voxels above the volume's minimum."""
    values = array.reshape(-1)
    values = values[:: max(1, len(values) // MAX_SAMPLE)]
    values = values[np.isfinite(values)]
    foreground = values[values > values.min()] if values.size else values
    if not foreground.size:
        return {"low": 0.0, "high": 0.0}
    low, high = np.percentile(foreground.astype(np.float64), [0.5, 99.5])
    return {"low": float(low), "high": float(high)}
