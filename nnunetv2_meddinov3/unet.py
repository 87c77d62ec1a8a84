"""The U-Net of a 2D patch, by nnU-Net's own rule, so that its stock trainer can be the baseline.

A configuration that inherits from ``2d`` inherits its U-Net too, whose strides fit the patch of
``2d``. On another patch the U-Net may halve a side that is odd, and then crashes where it joins
the halves, or it stops while the picture is still large.
"""

import copy
import json
from collections.abc import Sequence
from typing import Any

from nnunetv2.experiment_planning.experiment_planners.network_topology import (
    get_pool_and_conv_props,
)

# nnU-Net's (ExperimentPlanner): sides are halved while the result has 4 pixels, and a stage has
# twice the features of the one before it, up to 512 in 2D.
MIN_EDGE_LENGTH = 4  # pixels
MAX_FEATURES = 512
RESIDUAL_BLOCKS = [1, 3, 4, 6]  # of the ResEnc planners, and 6 in every further stage


def unet_for(
    architecture: dict[str, Any], patch_size: Sequence[int], spacing: Sequence[float]
) -> dict[str, Any] | None:
    """Return a U-Net of nnU-Net's plans with the stages that fit another patch.

    Number of stages, strides and kernel sizes are those of nnU-Net's rule for the new patch and
    spacing; features and blocks per stage go on as they were planned. The patch stays as it is:
    where nnU-Net would enlarge it to be halved once more, a side that turns odd is halved no more.

    Args:
        architecture: The entry ``architecture`` of a 2D configuration.
        patch_size: Height and width in pixels.
        spacing: Of its pixels, in mm.

    Returns:
        The new entry, as in a JSON file; None where the entry is not one of a U-Net with stages.
    """
    if not _is_unet(architecture):
        return None
    new = copy.deepcopy(architecture)
    kwargs = new["arch_kwargs"]
    before = len(kwargs["strides"])
    shown = [_halved_as_often(int(side)) for side in patch_size]
    _, strides, kernel_sizes, *_ = get_pool_and_conv_props(spacing, shown, MIN_EDGE_LENGTH, 999999)
    stages = len(strides)
    for name, value in kwargs.items():  # one entry a stage, or one for each stage of the decoder
        if isinstance(value, list | tuple) and value and len(value) in (before, before - 1):
            is_resenc = name == "n_blocks_per_stage" and [*value] == RESIDUAL_BLOCKS[: len(value)]
            longest = RESIDUAL_BLOCKS if is_resenc else [*value]
            length = stages - (before - len(value))
            kwargs[name] = [*longest, *longest[-1:] * length][:length]
    kwargs |= {
        "n_stages": stages,
        "features_per_stage": _features(architecture["arch_kwargs"]["features_per_stage"], stages),
        "kernel_sizes": kernel_sizes,
        "strides": strides,
    }
    return json.loads(json.dumps(new))


def fits(architecture: dict[str, Any], patch_size: Sequence[int]) -> bool:
    """Return whether a network of the plans takes a patch: true of all but U-Nets with stages."""
    if not _is_unet(architecture):
        return True
    sides = [int(side) for side in patch_size]
    for stride in architecture["arch_kwargs"]["strides"]:
        steps = stride if isinstance(stride, list | tuple) else [stride] * len(sides)
        if any(side % step for side, step in zip(sides, steps, strict=True)):
            return False
        sides = [side // step for side, step in zip(sides, steps, strict=True)]
    return True


def _is_unet(architecture: dict[str, Any]) -> bool:
    """Return whether an entry describes a network in stages, as nnU-Net's planners plan them."""
    kwargs = architecture.get("arch_kwargs", {})
    lists = [kwargs.get(name) for name in ("features_per_stage", "strides")]
    if not all(isinstance(value, list | tuple) and len(value) > 1 for value in lists):
        return False
    return "n_stages" in kwargs and "kernel_sizes" in kwargs and len(lists[0]) == len(lists[1])


def _halved_as_often(side: int) -> int:
    """Return a side that nnU-Net's rule halves as often as this one, but never to an odd number.

    6 * 2^k is halved k times: 6 is less than twice the smallest edge, and 12, which is three times
    as long, is halved also where it is the only side left.
    """
    even = side & -side  # the largest power of two that divides it
    return min(side, even * 3 * MIN_EDGE_LENGTH // 2)


def _features(planned: Sequence[int], stages: int) -> list[int]:
    features = [int(number) for number in planned[:stages]]
    while len(features) < stages:
        *_, last = features
        grows = len(features) < 2 or last == 2 * features[-2]
        features.append(max(last, min(2 * last, MAX_FEATURES)) if grows else last)
    return features
