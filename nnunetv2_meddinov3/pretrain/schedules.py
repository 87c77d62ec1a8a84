"""Values over the steps of a stage: linear, then cosine, then constant (DINOv3's code)."""

import math

import numpy as np

from nnunetv2_meddinov3.pretrain.config import Schedule


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
