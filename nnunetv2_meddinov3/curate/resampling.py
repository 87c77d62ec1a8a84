"""Slices in another geometry: to a pixel spacing, then to a size (MedDINOv3, sec. 3.2)."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

import numpy as np


def resample_slices(
    slices: np.ndarray,
    spacing: tuple[float, float, float] | None,
    pixel_spacing_mm: float | None,
    size: int | None,
) -> tuple[np.ndarray, tuple[float, float, float] | None]:
    """Resample every slice linearly to a pixel spacing, then to ``size`` x ``size`` pixels.

    This is the geometry of MedDINOv3, sec. 3.2.

    Both steps keep the field of view, the outer edges of the outermost pixels. Where a step
    shrinks, the linear kernel is widened by the same factor, so that no pixel is passed over.
    Nothing is resampled along z. Values are rounded to whole numbers once, at the end.

    Args:
        slices: (S, H, W) int16.
        spacing: (z, y, x) of the slices in mm; needed for ``pixel_spacing_mm``.
        pixel_spacing_mm: Spacing of the first step; None leaves it out.
        size: Pixels per side after the second step; None leaves it out.

    Returns:
        The slices (S, H', W') int16 and their spacing (z, y, x) in mm, None where unknown.
    """
    extent = slices.shape[1:]
    steps = [tuple(extent)]
    if pixel_spacing_mm is not None and spacing is not None:
        steps.append(
            tuple(
                max(1, round(pixels * mm / pixel_spacing_mm))
                for pixels, mm in zip(extent, spacing[1:], strict=True)
            )
        )
    if size is not None:
        steps.append((size, size))
    rows, columns = (_chain(tuple(step[axis] for step in steps)) for axis in (0, 1))
    result = np.empty((len(slices), len(rows), len(columns)), dtype=np.int16)
    for image, out in zip(slices, result, strict=True):
        np.rint(rows @ image.astype(np.float32) @ columns.T, out=out, casting="unsafe")
    if spacing is None:
        return result, None
    y, x = (
        mm * before / after
        for mm, before, after in zip(spacing[1:], extent, result.shape[1:], strict=True)
    )
    return result, (spacing[0], y, x)


@lru_cache(maxsize=64)
def _chain(lengths: tuple[int, ...]) -> np.ndarray:
    """Return the matrix (last, first) that resamples an axis through these numbers of pixels."""
    matrix = np.eye(lengths[0])
    for before, after in pairwise(lengths):
        if before != after:
            matrix = _linear(before, after) @ matrix
    return matrix.astype(np.float32)


def _linear(before: int, after: int) -> np.ndarray:
    """Return the matrix (after, before) of one linear step; its rows sum to 1."""
    scale = before / after
    centres = (np.arange(after) + 0.5) * scale - 0.5
    distance = np.abs(centres[:, None] - np.arange(before)) / max(scale, 1.0)
    weights = np.clip(1 - distance, 0, None)
    return weights / weights.sum(axis=1, keepdims=True)
