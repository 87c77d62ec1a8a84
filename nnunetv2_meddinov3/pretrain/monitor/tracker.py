"""Tracks the teacher's features of a few slices through a stage: maps of them, and their drift."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.linalg import orthogonal_procrustes
from sklearn.decomposition import PCA
from torch import Tensor
from torch.nn import functional as F

from nnunetv2_meddinov3.files import replacing
from nnunetv2_meddinov3.pretrain.config import Intensity
from nnunetv2_meddinov3.pretrain.monitor.health import gram_distance
from nnunetv2_meddinov3.pretrain.student import Student
from nnunetv2_meddinov3.pretrain.views.photometric import (
    Ends,
    contract_of,
    normalise,
    normalised,
)

MAPS = "maps"
WINDOW_HU = (-160, 240)  # soft tissue, in which slices are shown
TRACKED_SLICES = 4
TRACKED_PIXELS = 256  # side at which slices are shown to the teacher


class Moment(NamedTuple):
    """What the teacher made of the tracked slices at one step.

    Attributes:
        step: Steps done.
        slices: To be looked at: HU, and other values as ``FixedSlices.shown`` has them.
        patches: The teacher's patch tokens.
    """

    step: int
    slices: Int[np.ndarray, "slice height width"]
    patches: Float[np.ndarray, "slice row column dim"]


class FixedSlices(NamedTuple):
    """The slices that are followed.

    Attributes:
        inputs: As the network sees them.
        shown: As a reader sees them: HU, and normalised values from 0 to 1 as ``WINDOW_HU``.
    """

    inputs: Float[Tensor, "slice 1 height width"]
    shown: Float[Tensor, "slice 1 height width"]


class FeatureTracker:
    """Shows the same slices to the teacher at every moment, so that what changes is the network.

    Args:
        slices: As they are shown to the teacher and to a reader.
        teacher: Whose features are tracked.
        folder: Of the stage.
        autocast: Context in which the teacher is run.
    """

    def __init__(
        self,
        slices: FixedSlices,
        teacher: Student,
        folder: Path,
        autocast: Callable[[], AbstractContextManager],
    ) -> None:
        self.slices, self.teacher, self.folder = slices, teacher, folder
        self._autocast = autocast
        self._first: Tensor | None = None

    @torch.no_grad()
    def tokens(self, device: torch.device) -> Float[Tensor, "slice row column dim"]:
        """Return the teacher's patch tokens; every rank must call this."""
        crops = self.slices.inputs.to(device)
        nothing = torch.zeros(0, dtype=torch.long, device=device)
        patch = self.teacher.backbone.patch_size
        with self._autocast():
            patches = self.teacher(crops, nothing).patches_global
        return patches.float().unflatten(1, tuple(s // patch for s in crops.shape[-2:]))

    def save(self, step: int, tokens: Float[Tensor, "slice row column dim"]) -> None:
        """Keep a moment for the report.

        Raises:
            UserError: If it cannot be written.
        """
        save_moment(self.folder, step, self.slices.shown, tokens)

    def drift(self, tokens: Float[Tensor, "slice row column dim"]) -> float | None:
        """Return how far patch similarities are from the stage's start; None without one."""
        if self._first is None:
            if not _path(self.folder, 0).is_file():
                return None
            self._first = torch.from_numpy(_load(_path(self.folder, 0)).patches)
        return gram_distance(tokens.flatten(1, 2).cpu(), self._first.flatten(1, 2))


def spread_rows(
    volumes: Int[np.ndarray, " slice"],
    body_fraction: Float[np.ndarray, " slice"],
    count: int = TRACKED_SLICES,
) -> list[int]:
    """Choose slices of different volumes that show much of the body.

    Args:
        volumes: Number of the volume of each slice.
        body_fraction: Share of pixels inside the body; NaN where unknown.
        count: How many.

    Returns:
        Positions of the chosen slices, ascending.
    """
    body = np.nan_to_num(body_fraction)
    chosen: list[int] = []
    names = np.unique(volumes)
    for name in names[np.linspace(0, len(names) - 1, min(count, len(names))).astype(int)]:
        own = np.flatnonzero(volumes == name)
        chosen.append(int(own[np.argmax(body[own])]))
    return sorted(chosen)


def fixed_slices(images: list[np.ndarray], ends: list[Ends], intensity: Intensity) -> FixedSlices:
    """Resize slices to squares of ``TRACKED_PIXELS``.

    Args:
        images: (height, width) each, as stored.
        ends: Of each the stored numbers that are 0 and 1 in normalised values, None for HU.
        intensity: How slices are clipped and normalised.
    """
    inputs, shown = [], []
    for image, own in zip(images, ends, strict=True):
        x = torch.from_numpy(np.ascontiguousarray(image)).float()[None, None]
        size = (TRACKED_PIXELS, TRACKED_PIXELS)
        contract = contract_of(own, intensity)
        x = x if own is None else normalised(x, own)
        x = F.interpolate(x, size, mode="bicubic", antialias=True)[0].clamp(*contract.clip)
        inputs.append(normalise(x, contract))
        low, high = WINDOW_HU
        shown.append(x if own is None else low + x * (high - low))
    return FixedSlices(torch.stack(inputs), torch.stack(shown))


def save_moment(
    folder: Path,
    step: int,
    slices: Float[Tensor, "slice 1 height width"],
    patches: Float[Tensor, "slice row column dim"],
) -> None:
    """Write a moment to ``maps/``.

    Args:
        folder: Of the stage.
        step: Steps done.
        slices: As ``FixedSlices.shown``.
        patches: Patch tokens of the teacher.

    Raises:
        UserError: If it cannot be written.
    """
    path = _path(folder, step)
    with replacing(path) as part:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            np.savez_compressed(
                file,
                slices=slices[:, 0].to(torch.int16).cpu().numpy(),
                patches=patches.to(torch.float16).cpu().numpy(),
            )


def load_moments(folder: Path, limit: int = 6) -> list[Moment]:
    """Read the moments to be drawn: the first, the last, and some at even distances between."""
    paths = sorted((folder / MAPS).glob("step_*.npz"))
    places = np.unique(np.linspace(0, len(paths) - 1, min(limit, len(paths))).round().astype(int))
    return [_load(paths[i]) for i in places]


def _path(folder: Path, step: int) -> Path:
    return folder / MAPS / f"step_{step:07d}.npz"


def _load(path: Path) -> Moment:
    with np.load(path) as file:
        step = int(path.stem.removeprefix("step_"))
        return Moment(step, file["slices"], file["patches"].astype(np.float32))


def pca_maps(
    moments: Sequence[Float[np.ndarray, "slice row column dim"]],
) -> list[Float[np.ndarray, "slice row column 3"]]:
    """Map patch tokens to colours: their first three principal components.

    Each moment has its own principal axes, since early ones say nothing about late features. Their
    order and signs mean nothing, so each moment is rotated onto the one after it (Procrustes),
    which makes the colours of neighbours comparable.

    Args:
        moments: Patch tokens of the same slices at several steps, or of a single set.

    Returns:
        Red, green and blue in [0, 1], for each moment.
    """
    scores: list[np.ndarray] = []
    for patches in reversed(moments):
        tokens = patches.reshape(-1, patches.shape[-1]).astype(np.float64)
        own = PCA(3, svd_solver="full").fit_transform(tokens)
        own = own / np.maximum(own.std(0), 1e-9)
        if scores:
            rotation, _ = orthogonal_procrustes(own, scores[-1])
            own = own @ rotation
        scores.append(own)
    out = []
    for own, patches in zip(reversed(scores), moments, strict=True):
        low, high = np.percentile(own, [2, 98], axis=0)
        colours = np.clip((own - low) / np.maximum(high - low, 1e-9), 0, 1)
        out.append(colours.reshape(*patches.shape[:3], 3))
    return out


def similarity_maps(
    patches: Float[np.ndarray, "slice row column dim"], places: list[tuple[int, int]]
) -> Float[np.ndarray, "slice row column"]:
    """Return the cosine of every patch with one patch of its slice, in [-1, 1].

    Args:
        patches: Patch tokens.
        places: Row and column of that one patch in each slice.
    """
    x = patches / np.maximum(np.linalg.norm(patches, axis=-1, keepdims=True), 1e-9)
    chosen = np.stack([x[i, r, c] for i, (r, c) in enumerate(places)])
    return np.einsum("nhwd,nd->nhw", x, chosen)
