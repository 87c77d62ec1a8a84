"""``stages.json`` of a run: what each of its stages will do, also those that have not begun."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from nnunetv2_meddinov3.errors import UserError, first_line
from nnunetv2_meddinov3.files import write_text
from nnunetv2_meddinov3.models.architecture import Architecture
from nnunetv2_meddinov3.pretrain.config import StageConfig
from nnunetv2_meddinov3.pretrain.operations import mean_flops
from nnunetv2_meddinov3.pretrain.run_folder import STAGES


@dataclass(frozen=True)
class PlannedStage:
    """What a stage will do.

    Attributes:
        stage: Its number.
        steps: That it has in all.
        batch_size: Images of a step, of all processes.
        gflop_per_image: Operations of a step for one image; see ``operations.step_flops``.
    """

    stage: int
    steps: int
    batch_size: int
    gflop_per_image: float


def note_stages(out: Path, stages: tuple[StageConfig, ...], a: Architecture) -> None:
    """Write what the stages of a command will do; those of earlier commands stay.

    Args:
        out: Folder of the run.
        stages: Configs in their order.
        a: Of the backbone, which stages hand on.

    Raises:
        UserError: If it cannot be written, or what is there cannot be read.
    """
    known = {each.stage: each for each in planned_stages(out)}
    for config in stages:
        known[config.stage] = PlannedStage(
            config.stage,
            config.optim.steps,
            config.optim.batch_size,
            round(mean_flops(config, a) / 1e9, 3),
        )
    rows = [asdict(known[number]) for number in sorted(known)]
    write_text(out / STAGES, json.dumps(rows, indent=1) + "\n")


def planned_stages(out: Path) -> list[PlannedStage]:
    """Return what ``note_stages`` wrote, in order; nothing for runs of earlier versions.

    Raises:
        UserError: If the file holds something else.
    """
    path = out / STAGES
    if not path.is_file():
        return []
    try:
        return [PlannedStage(**row) for row in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{path} must hold the stages of a run, but: {first_line(error)}; delete it, the run "
            "writes it anew."
        ) from error
