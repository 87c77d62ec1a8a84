"""Probes while a stage runs: of its starting weights, and of the teacher now and then."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nnunetv2_meddinov3.models.architecture import Architecture
from nnunetv2_meddinov3.models.backbone import Backbone
from nnunetv2_meddinov3.models.build import backbone_from
from nnunetv2_meddinov3.models.weights import Checkpoint
from nnunetv2_meddinov3.pretrain.config import StageConfig
from nnunetv2_meddinov3.pretrain.distributed import Runtime
from nnunetv2_meddinov3.pretrain.intensity import intensity_of
from nnunetv2_meddinov3.pretrain.monitor.logger import StepRows
from nnunetv2_meddinov3.pretrain.probe.labelled import ProbeData
from nnunetv2_meddinov3.pretrain.probe.probing import run_probe, verdict
from nnunetv2_meddinov3.pretrain.run_folder import PROBE


class ProbeCallback:
    """Appends to ``probe.jsonl`` and says if features become worse.

    The labelled slices are read once, at the start, so that a mistake in them is found early.

    Args:
        config: ``engine.probe_dataset`` and the intensity contract.
        folder: Of the stage.
        runtime: This process; the main one probes while the others wait.
        teacher_backbone: Returns the tensors of the teacher's backbone, named as in its state dict,
            on rank 0; every rank calls it.
        architecture: Of the backbone.
        step: Steps done before; later rows are dropped.

    Raises:
        UserError: If the dataset cannot be used.
    """

    def __init__(
        self,
        config: StageConfig,
        folder: Path,
        runtime: Runtime,
        teacher_backbone: Callable[[], dict[str, Tensor]],
        architecture: Architecture,
        step: int,
    ) -> None:
        self.runtime, self.architecture = runtime, architecture
        self._teacher_backbone, self._intensity = teacher_backbone, intensity_of(config)
        if runtime.is_main:
            assert config.engine.probe_dataset is not None  # a rule of the config
            self._data = ProbeData.from_nnunet(config.engine.probe_dataset)
            # a stage that starts over probes its starting weights, row 0, again
            self._rows = StepRows(folder / PROBE, step or -1)

    def __call__(self, step: int, weights: str) -> str | None:
        """Probe the teacher as it is now; every rank must call this.

        Args:
            step: Steps done.
            weights: ``start`` before the first step, else ``teacher``.

        Returns:
            A sentence if it is worse than the start, on the main process.
        """
        tensors = self._teacher_backbone()
        sentence = (
            self._probe(self._built(tensors), step, weights) if self.runtime.is_main else None
        )
        self.runtime.barrier()
        return sentence

    def _built(self, tensors: dict[str, Tensor]) -> Backbone:
        canonical = {name.removeprefix("vit."): tensor for name, tensor in tensors.items()}
        return backbone_from(Checkpoint(self.architecture, canonical, "the teacher", "a stage"))

    def _probe(self, backbone: Backbone, step: int, weights: str) -> str | None:
        state = torch.get_rng_state()
        result = run_probe(
            backbone, self._data, intensity=self._intensity, device=self.runtime.device
        )
        torch.set_rng_state(state)
        row: dict[str, Any] = {"step": step, "weights": weights, **result.to_dict()}
        start = next((r for r in self._rows.rows if r["weights"] == "start"), None)
        row["verdict"] = None if start is None else verdict(start, row)
        self._rows.append(row)
        return row["verdict"]
