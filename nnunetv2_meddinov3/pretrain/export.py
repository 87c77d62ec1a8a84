"""The teacher as a file that the trainers load by path, with what one must know to use it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from nnunetv2_meddinov3.models.build import backbone_from, save_backbone
from nnunetv2_meddinov3.models.weights import Checkpoint
from nnunetv2_meddinov3.pretrain.config import StageConfig
from nnunetv2_meddinov3.pretrain.distributed import Runtime
from nnunetv2_meddinov3.pretrain.intensity import intensity_of
from nnunetv2_meddinov3.pretrain.networks import Start
from nnunetv2_meddinov3.pretrain.provenance import versions
from nnunetv2_meddinov3.pretrain.student import Student

_BACKBONE = "backbone."


def whole_backbone(network: Student, runtime: Runtime) -> dict[str, Tensor]:
    """Return a copy of a network's backbone by parameter name, on the CPU of the main process.

    Every rank must call this; the others get nothing. Sharded tensors are gathered one at a time,
    so no device holds more than its share and one tensor.
    """
    whole = {}
    for name, tensor in network.state_dict().items():
        if name.startswith(_BACKBONE):
            full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            if runtime.is_main:
                whole[name.removeprefix(_BACKBONE)] = full.detach().to("cpu", copy=True)
    return whole


def export_backbone(
    tensors: dict[str, Tensor],
    start: Start,
    config: StageConfig,
    path: Path,
    *,
    step: int,
    store: dict[str, Any],
) -> None:
    """Write a backbone with what the trainers must know of it (architecture.md, decision 4).

    Args:
        tensors: What ``whole_backbone`` returned of the teacher.
        start: What the stage started from: architecture and licence.
        config: Of the stage: intensity contract, stage.
        path: The file, replaced if it exists.
        step: Steps that are done.
        store: What ``provenance.store_provenance`` returned.

    Raises:
        UserError: If it cannot be written.
    """
    canonical = {name.removeprefix("vit."): tensor for name, tensor in tensors.items()}
    backbone = backbone_from(Checkpoint(start.architecture, canonical, "this run", "a teacher"))
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
