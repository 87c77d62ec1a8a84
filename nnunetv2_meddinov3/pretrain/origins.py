"""What weights may become the networks of a stage, and where an earlier stage keeps its state."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.models.architecture import Architecture, architecture_of
from nnunetv2_meddinov3.models.backbone import Backbone
from nnunetv2_meddinov3.models.build import backbone_from
from nnunetv2_meddinov3.models.weights import Checkpoint
from nnunetv2_meddinov3.pretrain.checkpoints import CheckpointFolder
from nnunetv2_meddinov3.pretrain.config import StageConfig
from nnunetv2_meddinov3.pretrain.folders import CHECKPOINTS


def fitted(checkpoint: Checkpoint, config: StageConfig, source: str) -> Backbone:
    """Build a checkpoint's backbone with the config's input channels and a mask token.

    Args:
        checkpoint: Read before; its stem is changed where the channels differ.
        config: Of the stage.
        source: What to call the weights.

    Raises:
        UserError: If it is of another size than the config's.
    """
    check_size(checkpoint.architecture, config, source)
    channels = config.model.input_channels
    stem = checkpoint.tensors["patch_embed.proj.weight"]
    if stem.shape[1] != channels:
        # one grey channel through the sum of the kernels gives what repeating it gives
        stem = stem.sum(1, keepdim=True).expand(-1, channels, -1, -1) / channels
        checkpoint.tensors["patch_embed.proj.weight"] = stem.contiguous()
        checkpoint.architecture = replace(checkpoint.architecture, input_channels=channels)
    backbone = backbone_from(checkpoint)
    if backbone.mask_token is None:
        backbone.mask_token = nn.Parameter(torch.zeros(1, backbone.embed_dim))
    return backbone


def check_size(found: Architecture, config: StageConfig, source: str) -> None:
    """Refuse weights of another size than ``model.size``.

    Raises:
        UserError: With what differs.
    """
    wanted = architecture_of(config.model.size)
    fields = ("embed_dim", "depth", "num_heads", "ffn", "ffn_hidden", "patch_size")
    differ = [
        f"{name} {getattr(found, name)} instead of {getattr(wanted, name)}"
        for name in fields
        if getattr(found, name) != getattr(wanted, name)
    ]
    if differ:
        raise UserError(
            f"the weights must be a {config.model.size} as model.size says, but {source} has "
            f"{', '.join(differ)}: take the config of its size, or other weights."
        )


def state_of(source: Path) -> Path | None:
    """Return the training state that a path means: a stage, a checkpoint's folder, its file.

    Raises:
        UserError: If it is a stage that saved nothing yet.
    """
    if source.is_dir():
        if (source / CHECKPOINTS).is_dir():
            latest = CheckpointFolder(source / CHECKPOINTS).latest()
            if latest is None:
                raise UserError(f"{source} must hold a checkpoint, but its stage saved none yet.")
            return latest
        return source / "state.pt" if (source / "state.pt").is_file() else None
    return source if source.name == "state.pt" and source.is_file() else None
