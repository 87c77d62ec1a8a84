"""Values over the steps of a stage, as arrays: linear, then cosine, then constant (DINOv3)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nnunetv2_meddinov3.pretrain.config import Schedule, StageConfig, effective_lr_factor

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Schedules:
    """Every schedule of a stage: arrays (steps,), indexed by the step.

    Attributes:
        lr: Learning rate, scaled to the batch.
        last_layer_lr: That of the heads' last layers, 0 while they are frozen.
        weight_decay: Of AdamW.
        momentum: Of the teacher's moving average.
        teacher_temp: Temperature of the targets.
        local_weight: Factor of the local DINO term.
        gram_weight: Factor of the Gram loss, 0 without it.
    """

    lr: Values
    last_layer_lr: Values
    weight_decay: Values
    momentum: Values
    teacher_temp: Values
    local_weight: Values
    gram_weight: Values


def schedules_of(config: StageConfig) -> Schedules:
    """Return the values of every schedule of a stage at each of its steps."""
    optim, losses, steps = config.optim, config.losses, config.optim.steps
    lr = values(optim.lr, steps) * effective_lr_factor(config)
    gram = losses.gram.weight
    return Schedules(
        lr=lr,
        last_layer_lr=np.where(np.arange(steps) < optim.freeze_last_layer_steps, 0.0, lr),
        weight_decay=values(optim.weight_decay, steps),
        momentum=values(optim.momentum, steps),
        teacher_temp=values(losses.teacher_temp, steps),
        local_weight=values(losses.local_weight, steps),
        gram_weight=np.zeros(steps) if gram is None else values(gram, steps),
    )


def values(schedule: Schedule, steps: int) -> Values:
    """Return a schedule's values over a stage of ``steps`` steps, (steps,).

    Linear from start to peak over the warm-up, which excludes its end, cosine from peak to end
    including both, then the end.

    Raises:
        ValueError: If the parts are longer than the stage.
    """
    warmup, cosine = schedule.warmup_steps, schedule.cosine_steps
    cosine = steps - warmup if cosine is None else cosine
    if warmup + cosine > steps or cosine < 0:
        raise ValueError(
            f"warm-up + cosine must be at most the {steps} steps of the stage, got {warmup} and "
            f"{cosine}"
        )
    start, peak, end = schedule.start, schedule.peak, schedule.end
    out = np.full(steps, end, dtype=np.float64)
    out[:warmup] = start + (peak - start) * np.arange(warmup) / max(warmup, 1)
    # numpy's cosine differs in its last bit between processors
    turns = [math.cos(math.pi * i / max(cosine - 1, 1)) for i in range(cosine)]
    out[warmup : warmup + cosine] = end + 0.5 * (peak - end) * (1 + np.array(turns))
    return out
