"""The teacher as a file that the trainers load by path, with what one must know to use it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nnunetv2_meddinov3.models.backbone import Backbone
from nnunetv2_meddinov3.models.build import backbone_from, save_backbone
from nnunetv2_meddinov3.models.weights import Checkpoint
from nnunetv2_meddinov3.pretrain.config import StageConfig
from nnunetv2_meddinov3.pretrain.distributed import Runtime
from nnunetv2_meddinov3.pretrain.intensity import intensity_of
from nnunetv2_meddinov3.pretrain.networks import Start
from nnunetv2_meddinov3.pretrain.provenance import versions
from nnunetv2_meddinov3.pretrain.student import Student

_BACKBONE = "backbone."


def whole_backbone(network: Student, runtime: Runtime) -> Backbone | None:
    """Return a copy of a network's backbone on the CPU of the main process, None on the others.

    Every rank must call this. Sharded tensors are gathered one at a time, so no device holds more
    than its share and one tensor.
    """
    tensors = {}
    for name, tensor in network.state_dict().items():
        if not name.startswith(_BACKBONE):
            continue
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        if runtime.is_main:
            canonical = name.removeprefix(_BACKBONE).removeprefix("vit.")
            tensors[canonical] = whole.detach().to("cpu", copy=True)
    if not runtime.is_main:
        return None
    architecture = network.backbone.architecture
    return backbone_from(Checkpoint(architecture, tensors, "this run", "training state"))


def export_backbone(
    backbone: Backbone,
    start: Start,
    config: StageConfig,
    path: Path,
    *,
    step: int,
    store: dict[str, Any],
) -> None:
    """Write a backbone with what the trainers must know of it (architecture.md, decision 4).

    Args:
        backbone: The teacher's.
        start: What the stage started from, which says the licence.
        config: Of the stage: intensity contract, stage.
        path: The file, replaced if it exists.
        step: Steps that are done.
        store: What ``provenance.store_provenance`` returned.

    Raises:
        UserError: If it cannot be written.
    """
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
