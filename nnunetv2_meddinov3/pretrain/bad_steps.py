"""The batch of a step whose numbers are not finite, kept so that one can look at it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.files import replacing
from nnunetv2_meddinov3.pretrain.folders import BAD_STEPS
from nnunetv2_meddinov3.pretrain.views.batch import ViewBatch

_FIELDS = ("global_crops", "local_crops", "masks", "gram_crops")


def keep_batch(
    folder: Path, step: int, rank: int, batches: Sequence[ViewBatch], losses: dict[str, float]
) -> str:
    """Save the views that a rank had in a step.

    Args:
        folder: Of the stage.
        step: From 0.
        rank: Of this process.
        batches: Its micro-batches.
        losses: Their means.

    Returns:
        Where they are, in words; also if they could not be kept.
    """
    path = folder / BAD_STEPS / f"step_{step:07d}_rank{rank}.pt"
    views = [{f: getattr(b, f) for f in _FIELDS if getattr(b, f) is not None} for b in batches]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part:
            torch.save({"step": step, "losses": losses, "micro_batches": views}, part)
    except (OSError, RuntimeError, UserError) as error:
        return f"the last batch could not be kept ({error})"
    return f"the last batch is in {path.parent}"
