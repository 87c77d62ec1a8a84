"""The teacher as a file that the trainers load by path, with what one must know to use it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from nnunetv2_meddinov3.models.architecture import Architecture
from nnunetv2_meddinov3.models.backbone import Backbone
from nnunetv2_meddinov3.models.build import save_backbone
from nnunetv2_meddinov3.pretrain.config import StageConfig
from nnunetv2_meddinov3.pretrain.intensity import intensity_of
from nnunetv2_meddinov3.pretrain.provenance import versions
from nnunetv2_meddinov3.pretrain.starting import Start

_BRANCH = "teacher.backbone."


def teacher_of(model: dict[str, torch.Tensor], architecture: Architecture) -> Backbone:
    """Return the teacher's backbone of what ``checkpoints.whole_model`` returned."""
    with torch.device("meta"):
        backbone = Backbone(architecture, mask_token=True)
    own = {k.removeprefix(_BRANCH): v for k, v in model.items() if k.startswith(_BRANCH)}
    backbone.load_state_dict(own, assign=True)
    for block in backbone.vit.blocks:
        if block.attn.q_bias is not None:  # timm's constant zero, which no state holds
            block.attn.k_bias = torch.zeros(architecture.embed_dim)
    return backbone


def export_teacher(
    model: dict[str, torch.Tensor],
    start: Start,
    config: StageConfig,
    path: Path,
    *,
    step: int,
    store: dict[str, Any],
) -> None:
    """Write the teacher's backbone of a whole model state (architecture.md, decision 4).

    Args:
        model: What ``checkpoints.whole_model`` returned.
        start: What the stage started from: architecture and licence.
        config: Of the stage: intensity contract, stage.
        path: The file, replaced if it exists.
        step: Steps that are done.
        store: What ``resuming.store_facts`` returned.

    Raises:
        UserError: If it cannot be written.
    """
    backbone = teacher_of(model, start.architecture)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_backbone(
        backbone,
        path,
        licence=start.licence,
        base=start.base,
        intensity=intensity_of(config),
        spacing_mm=store["spacing_mm"],
        stage=config.stage,
        step=step,
        store_sha256=store["records_sha256"],
        versions=versions(),
    )
