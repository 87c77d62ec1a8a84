"""Every schedule of a stage at one step."""

from __future__ import annotations

from typing import NamedTuple

from nnunetv2_meddinov3.pretrain.config import StageConfig, effective_lr_factor
from nnunetv2_meddinov3.pretrain.schedules import value_at


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
    optim, losses, total = config.optim, config.losses, config.optim.steps
    lr = value_at(optim.lr, step, total) * effective_lr_factor(config)
    return Rates(
        lr=lr,
        last_layer_lr=0.0 if step < optim.freeze_last_layer_steps else lr,
        weight_decay=value_at(optim.weight_decay, step, total),
        momentum=value_at(optim.momentum, step, total),
        teacher_temp=value_at(losses.teacher_temp, step, total),
        local_weight=value_at(losses.local_weight, step, total),
        gram_weight=value_at(losses.gram.weight, step, total) if losses.gram.weight else 0.0,
    )
