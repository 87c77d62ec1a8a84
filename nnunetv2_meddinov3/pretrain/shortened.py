"""A stage with another number of steps: all that counts steps follows (``--steps``)."""

from __future__ import annotations

from typing import Any

from nnunetv2_meddinov3.pretrain.config import StageConfig

_INTERVALS = ("log_every", "save_every", "health_every", "report_every", "probe_every")
_PREVIOUS_AT = "previous@"


def with_steps(config: StageConfig, steps: int, before: StageConfig | None) -> StageConfig:
    """Return a config of ``steps`` steps in which the same happens at the same share of them.

    Schedules, the freeze of the last layers, exports and copies into the Gram teacher scale, up or
    down; intervals between savings, reports and the like only shrink. The step of a Gram teacher
    ``previous@STEP`` follows the stage before.

    Args:
        config: Of a stage, with its own number of steps.
        steps: The new number.
        before: Config of the stage before with its own number of steps, which will have ``steps``
            too; None if it is not known.
    """
    values: dict[str, Any] = config.model_dump()
    optim, losses, engine = values["optim"], values["losses"], values["engine"]
    old = config.optim.steps
    scheduled = [optim[name] for name in ("lr", "weight_decay", "momentum")]
    scheduled += [losses["teacher_temp"], losses["local_weight"], losses["gram"]["weight"]]
    for schedule in filter(None, scheduled):  # a warm-up that is a share follows by itself
        for name in ("warmup_steps", "cosine_steps"):
            if schedule[name] is not None:
                schedule[name] = schedule[name] * steps // old
    optim["steps"] = steps
    optim["freeze_last_layer_steps"] = optim["freeze_last_layer_steps"] * steps // old
    _scale_gram(losses["gram"], steps, old, before)
    saves = engine["save_every"]
    for name in _INTERVALS:
        if engine[name] is not None:
            engine[name] = min(engine[name], _scaled(engine[name], steps, old))
    if engine["keep_every"] is not None:  # stays the same number of savings
        engine["keep_every"] = engine["save_every"] * max(1, engine["keep_every"] // saves)
    engine["export_at"] = sorted({_scaled(step, steps, old) for step in engine["export_at"]})
    return StageConfig.model_validate(values)


def _scale_gram(gram: dict[str, Any], steps: int, old: int, before: StageConfig | None) -> None:
    if gram["refresh_every"] is not None:
        gram["refresh_every"] = _scaled(gram["refresh_every"], steps, old)
    gram["refresh_from"] = gram["refresh_from"] * steps // old
    if before is not None and gram["teacher"].startswith(_PREVIOUS_AT):
        step = int(gram["teacher"].removeprefix(_PREVIOUS_AT))
        gram["teacher"] = f"{_PREVIOUS_AT}{_scaled(step, steps, before.optim.steps)}"


def _scaled(step: int, steps: int, old: int) -> int:
    """Return the step, from 1 up, at the same share of a stage of ``steps`` steps."""
    return max(1, step * steps // old)
