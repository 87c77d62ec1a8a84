"""Where the Gram teacher of a stage comes from (DINOv3, sec. 4.2)."""

from __future__ import annotations

import copy
from pathlib import Path

from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.models.backbone import Backbone
from nnunetv2_meddinov3.models.build import resolve_source
from nnunetv2_meddinov3.models.weights import read_checkpoint
from nnunetv2_meddinov3.pretrain.checkpoints import read_state
from nnunetv2_meddinov3.pretrain.config import StageConfig
from nnunetv2_meddinov3.pretrain.folders import EXPORT, export_path
from nnunetv2_meddinov3.pretrain.origins import fitted, state_of


def gram_teacher_of(
    config: StageConfig, previous: Path | None, teacher: Backbone
) -> Backbone | None:
    """Return the Gram teacher's backbone, None for a stage that has none of its own.

    Args:
        config: Of the stage.
        previous: Folder of the stage before.
        teacher: The backbone the stage starts from.

    Raises:
        UserError: If its source is missing or does not fit.
    """
    gram, architecture = config.losses.gram, teacher.architecture
    if gram.weight is None or gram.teacher == "ema":
        return None
    if gram.teacher == "init":
        return copy.deepcopy(teacher)
    if gram.teacher == "retained":
        if previous is None or (path := state_of(previous)) is None:
            raise UserError(
                "losses.gram.teacher=retained needs an earlier stage with a Gram teacher."
            )
        if not any(k.startswith("gram_teacher.") for k in read_state(path)["model"]):
            raise UserError(
                f"losses.gram.teacher=retained needs the Gram teacher of {previous}, which had "
                "none: set it to previous, init or a file."
            )
        checkpoint = read_checkpoint(
            path,
            branch="gram_teacher",
            norm_eps=architecture.norm_eps,
            rope_dtype=architecture.rope_dtype,
        )
    else:
        source = _gram_source(gram.teacher, previous)
        checkpoint = resolve_source(source)
    return fitted(checkpoint, config, f"the Gram teacher {gram.teacher}")


def _gram_source(name: str, previous: Path | None) -> str:
    if not name.startswith("previous"):
        return name
    if previous is None:
        raise UserError(
            f"losses.gram.teacher={name} needs an earlier stage, but this is the first."
        )
    step = name.partition("@")[2]
    path = export_path(previous, int(step)) if step else previous / EXPORT
    if not path.is_file():
        raise UserError(
            f"losses.gram.teacher={name} needs {path}, which is not there: add "
            f"{step or 'its end'} to "
            "engine.export_at of the stage before, or name another Gram teacher."
        )
    return str(path)
