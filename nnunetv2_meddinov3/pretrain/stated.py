"""What a config states of its ViT: applied, or held against what the weights say."""

from __future__ import annotations

from typing import Any

from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.models.architecture import (
    SIZE_FIELDS,
    Architecture,
    architecture_of,
    differences,
)
from nnunetv2_meddinov3.pretrain.config import LEFT_TO_THE_WEIGHTS, StageConfig

UNSEEN = ("norm_eps", "rope_dtype", "layer_scale")  # what tensors do not show
_OF_RANDOM_WEIGHTS = {"qkv_bias": True, "norm_eps": 1e-6, "rope_dtype": "fp32"}


def of_random_weights(config: StageConfig) -> Architecture:
    """Return the architecture of a stage that starts from nothing."""
    fields: dict[str, Any] = {**_OF_RANDOM_WEIGHTS, **_stated(config)}
    channels = config.model.input_channels
    return architecture_of(config.model.size, input_channels=channels, **fields)


def _stated(config: StageConfig) -> dict[str, Any]:
    """Return what a config does not leave to the weights."""
    values = {name: getattr(config.model, name) for name in LEFT_TO_THE_WEIGHTS}
    return {name: value for name, value in values.items() if value is not None}


def applied(config: StageConfig) -> dict[str, Any]:
    """Return what a config states that is used in place of what the weights say."""
    return {name: value for name, value in _stated(config).items() if name in UNSEEN}


def check_stated(
    found: Architecture, config: StageConfig, source: str, *, is_stage: bool = False
) -> None:
    """Refuse weights whose tensors are not what a config states.

    Args:
        found: Of the weights.
        config: Of the stage that starts from them.
        source: What to call them.
        is_stage: Whether they are an earlier stage's, whose stem is not changed.

    Raises:
        UserError: With what differs.
    """
    check_size(found, config, source)
    stated: dict[str, Any] = {"qkv_bias": config.model.qkv_bias}
    if is_stage:
        stated["input_channels"] = config.model.input_channels
    for name, wanted in stated.items():
        if wanted is not None and wanted != (has := getattr(found, name)):
            raise UserError(
                f"model.{name} must be that of the weights a stage starts from, but "
                f"{source} has {_yaml(has)} and the config of stage {config.stage} says "
                f"{_yaml(wanted)}: set it to {_yaml(has)}"
                f"{', or to null, which leaves it to them' if name == 'qkv_bias' else ''}."
            )


def _yaml(value: Any) -> str:
    return str(value).lower()


def check_size(found: Architecture, config: StageConfig, source: str) -> None:
    """Refuse weights of another size than ``model.size``.

    Raises:
        UserError: With what differs.
    """
    wanted = architecture_of(config.model.size)
    differ = differences(found, wanted, (*SIZE_FIELDS, "patch_size"))
    if differ:
        said = [f"{name} {theirs} instead of {ours}" for name, (theirs, ours) in differ.items()]
        raise UserError(
            f"the weights must be a {config.model.size} as model.size says, but {source} has "
            f"{', '.join(said)}: take the config of its size, or other weights."
        )
