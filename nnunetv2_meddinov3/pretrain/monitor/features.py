"""What the teacher makes of the same few slices over time: maps of features and similarities."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from nnunetv2_meddinov3.files import replacing

MAPS = "maps"
SLICES = 4  # shown
PIXELS = 256  # side at which they are shown to the teacher


def fixed_slices(images: list[np.ndarray], clip_hu: tuple[float, float]) -> Tensor:
    """Resize some slices to one square.

    Args:
        images: (h, w) in HU.
        clip_hu: Range that is kept.

    Returns:
        (n, 1, PIXELS, PIXELS) in HU.
    """
    out = []
    for image in images:
        x = torch.from_numpy(np.ascontiguousarray(image)).float()[None, None]
        out.append(F.interpolate(x, (PIXELS, PIXELS), mode="bicubic", antialias=True)[0])
    return torch.stack(out).clamp(*clip_hu)


def spread_rows(volumes: np.ndarray, body_fraction: np.ndarray, count: int = SLICES) -> list[int]:
    """Choose slices of different volumes with much body in them.

    Args:
        volumes: (n,) number of the volume of each slice.
        body_fraction: (n,) share of pixels inside the body; NaN where unknown.
        count: How many.

    Returns:
        Places among the n, ascending.
    """
    body = np.nan_to_num(body_fraction)
    chosen: list[int] = []
    names = np.unique(volumes)
    for name in names[np.linspace(0, len(names) - 1, min(count, len(names))).astype(int)]:
        own = np.flatnonzero(volumes == name)
        chosen.append(int(own[np.argmax(body[own])]))
    return sorted(chosen)


def save_maps(folder: Path, step: int, slices_hu: Tensor, patches: Tensor) -> Path:
    """Write what the report draws of one moment, whole or not at all.

    Args:
        folder: Of the stage.
        step: Steps done.
        slices_hu: (n, 1, H, W) as they were shown, in HU.
        patches: (n, h, w, D) patch tokens of the teacher.
    """
    path = folder / MAPS / f"step_{step:07d}.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part, part.open("wb") as file:
        np.savez_compressed(
            file,
            slices=slices_hu[:, 0].to(torch.int16).cpu().numpy(),
            patches=patches.to(torch.float16).cpu().numpy(),
        )
    return path


def load_maps(folder: Path, most: int = 6) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """Read the moments that are drawn: the first, the last, and evenly some between.

    Returns:
        (step, slices (n, H, W) in HU, patches (n, h, w, D)) for each.
    """
    paths = sorted((folder / MAPS).glob("step_*.npz"))
    places = np.unique(np.linspace(0, len(paths) - 1, min(most, len(paths))).round().astype(int))
    out = []
    for path in (paths[i] for i in places):
        with np.load(path) as file:
            step = int(path.stem.removeprefix("step_"))
            out.append((step, file["slices"], file["patches"].astype(np.float32)))
    return out


def pca_maps(moments: list[np.ndarray]) -> list[np.ndarray]:
    """Map patch tokens of several moments to colours that can be compared.

    Each moment has its own principal axes, since early ones say nothing about late features. Their
    order and signs mean nothing, so each is turned onto the moment after it (Procrustes).

    Args:
        moments: (n, h, w, D) each.

    Returns:
        (n, h, w, 3) in [0, 1] each.
    """
    scores: list[np.ndarray] = []
    for patches in reversed(moments):
        x = patches.reshape(-1, patches.shape[-1]).astype(np.float64)
        x = x - x.mean(0)
        u, s, _ = np.linalg.svd(x, full_matrices=False)
        own = u[:, :3] * s[:3]
        own = own / np.maximum(own.std(0), 1e-9)
        if scores:
            left, _, right = np.linalg.svd(own.T @ scores[-1])
            own = own @ (left @ right)
        scores.append(own)
    out = []
    for own, patches in zip(reversed(scores), moments, strict=True):
        low, high = np.percentile(own, [2, 98], axis=0)
        colours = np.clip((own - low) / np.maximum(high - low, 1e-9), 0, 1)
        out.append(colours.reshape(*patches.shape[:3], 3))
    return out


def similarity_maps(patches: np.ndarray, places: list[tuple[int, int]]) -> np.ndarray:
    """Return the cosine of every patch with one patch of its slice.

    Args:
        patches: (n, h, w, D).
        places: Row and column of that patch in each slice.

    Returns:
        (n, h, w) in [-1, 1].
    """
    x = patches / np.maximum(np.linalg.norm(patches, axis=-1, keepdims=True), 1e-9)
    chosen = np.stack([x[i, r, c] for i, (r, c) in enumerate(places)])
    return np.einsum("nhwd,nd->nhw", x, chosen)
