"""Every schedule of a stage at one step."""

from __future__ import annotations

from typing import NamedTuple

from nnunetv2_meddinov3.pretrain.config import StageConfig
from nnunetv2_meddinov3.pretrain.schedules import schedules_of


class Rates(NamedTuple):
    """What the schedules say for one step."""

    lr: float
    last_layer_lr: float
    weight_decay: float
    momentum: float
    teacher_temp: float
    local_weight: float
    gram_weight: float


def rates_at(config: StageConfig, step: int) -> Rates:
    """Return the value of every schedule at a step, learning rates scaled to the batch."""
    schedules = schedules_of(config)
    return Rates(**{name: float(getattr(schedules, name)[step]) for name in Rates._fields})
