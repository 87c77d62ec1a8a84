"""Follows the teacher's features of a few slices through a stage."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor

from nnunetv2_meddinov3.pretrain.config import Intensity
from nnunetv2_meddinov3.pretrain.monitor.features import MAPS, load_maps, save_maps
from nnunetv2_meddinov3.pretrain.monitor.health import gram_distance
from nnunetv2_meddinov3.pretrain.student import Student
from nnunetv2_meddinov3.pretrain.views.photometric import normalise


class Following:
    """The same slices at every moment, so that what changes is the network.

    Args:
        slices_hu: (n, 1, H, W) in HU.
        teacher: Whose features are followed.
        intensity: How slices are normalised.
        folder: Of the stage.
        autocast: Context in which the teacher is run.
    """

    def __init__(
        self,
        slices_hu: Tensor,
        teacher: Student,
        intensity: Intensity,
        folder: Path,
        autocast: Callable[[], AbstractContextManager],
    ) -> None:
        self.slices_hu, self.teacher, self.folder = slices_hu, teacher, folder
        self._intensity, self._autocast = intensity, autocast
        self._first: Tensor | None = None

    @torch.no_grad()
    def tokens(self, device: torch.device) -> Tensor:
        """Return the patch tokens (n, h, w, D); every rank must call this."""
        crops = normalise(self.slices_hu.to(device), self._intensity)
        nothing = torch.zeros(0, dtype=torch.long, device=device)
        patch = self.teacher.backbone.patch_size
        with self._autocast():
            patches = self.teacher(crops, nothing).patches_global
        return patches.float().unflatten(1, tuple(s // patch for s in crops.shape[-2:]))

    def save(self, step: int, tokens: Tensor) -> None:
        """Keep a moment for the report.

        Raises:
            UserError: If it cannot be written.
        """
        save_maps(self.folder, step, self.slices_hu, tokens)

    def drift(self, tokens: Tensor) -> float | None:
        """Return how far patch similarities are from the stage's start; None without one."""
        if self._first is None:
            if not (self.folder / MAPS / "step_0000000.npz").is_file():
                return None
            self._first = torch.from_numpy(load_maps(self.folder, most=1)[0][2])
        return gram_distance(tokens.flatten(1, 2).cpu(), self._first.flatten(1, 2))
