"""Values over the steps of a stage: linear, then cosine, then constant (DINOv3's code)."""

import math
from dataclasses import dataclass

import numpy as np

from nnunetv2_meddinov3.pretrain.config import Schedule, StageConfig, effective_lr_factor


@dataclass(frozen=True)
class Schedules:
    """The value of every schedule at each step of a stage, (steps,) float64 each."""

    lr: np.ndarray
    last_layer_lr: np.ndarray
    weight_decay: np.ndarray
    momentum: np.ndarray
    teacher_temp: np.ndarray
    local_weight: np.ndarray
    gram_weight: np.ndarray


def schedules_of(config: StageConfig) -> Schedules:
    """Return all schedules of a config, learning rates scaled to the batch."""
    optim, losses, total = config.optim, config.losses, config.optim.steps
    lr = values(optim.lr, total) * effective_lr_factor(config)
    gram = losses.gram.weight
    return Schedules(
        lr=lr,
        last_layer_lr=np.where(np.arange(total) < optim.freeze_last_layer_steps, 0.0, lr),
        weight_decay=values(optim.weight_decay, total),
        momentum=values(optim.momentum, total),
        teacher_temp=values(losses.teacher_temp, total),
        local_weight=values(losses.local_weight, total),
        gram_weight=np.zeros(total) if gram is None else values(gram, total),
    )


def value_at(schedule: Schedule, step: int, total: int) -> float:
    """Return the value at a step of a stage with ``total`` steps.

    Linear from start to peak over the warm-up, which excludes its end, cosine from peak to end
    including both, then the end. Beyond the last step the last value stays.

    Raises:
        ValueError: If the step is negative, or the parts are longer than the stage.
    """
    warmup = schedule.warmup_steps
    cosine = total - warmup if schedule.cosine_steps is None else schedule.cosine_steps
    if step < 0 or warmup < 0 or cosine < 0 or warmup + cosine > total:
        raise ValueError(
            f"step must be at least 0 and warm-up + cosine at most the {total} steps of the stage, "
            f"got step {step}, {warmup} and {cosine}"
        )
    step = min(step, total - 1)
    if step < warmup:
        return schedule.start + (schedule.peak - schedule.start) * step / warmup
    if step >= warmup + cosine:
        return schedule.end
    if cosine == 1:
        return schedule.peak
    turn = math.cos(math.pi * (step - warmup) / (cosine - 1))
    return schedule.end + 0.5 * (schedule.peak - schedule.end) * (1 + turn)


def values(schedule: Schedule, total: int) -> np.ndarray:
    """Return the values of all steps, (total,) float64."""
    return np.array([value_at(schedule, step, total) for step in range(total)])
