"""nnU-Net's resampling of logits, a slice at a time where no slice needs another."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from nnunetv2.preprocessing.resampling.default_resampling import (
    determine_do_sep_z_and_axis,
    resample_data_or_seg_to_shape,
)
from nnunetv2.preprocessing.resampling.resample_torch import resample_torch_fornnunet
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager
from torch import Tensor
from torch.nn import functional as F

_AT_ONCE = 16  # classes
_SKIMAGE = {"is_seg": False, "order": 1}
_TORCH = {"is_seg": False, "mode": "linear"}

Resample = Callable[
    [Float[Tensor, "class _ _"], tuple[int, ...]], Float[Tensor, "class height width"]
]


def slice_resampling(
    configuration: ConfigurationManager, spacing: Sequence[float], slices: tuple[int, int]
) -> Resample | None:
    """Return what resamples the logits of one slice as nnU-Net would in the whole volume.

    Both of nnU-Net's functions are known as long as they are linear: skimage's, which nnU-Net's own
    plans name and which is computed in double precision and rounded to half, and torch's, which our
    planner names. On a GPU both are computed in single precision.

    Args:
        configuration: A 2D one, whose plans name function and options.
        spacing: Of the image in mm, (z, y, x) after nnU-Net's transposition.
        slices: Number of slices of the logits and of the image.

    Returns:
        A function of logits and the shape (height, width) wanted; None where slices have to be
        resampled together, or in a way that is not known here.
    """
    resampling = configuration.resampling_fn_probabilities
    if not isinstance(resampling, functools.partial) or resampling.args:
        return None
    options: dict[str, Any] = dict(resampling.keywords)
    for name in ("order_z", "aniso_axis_mode", "memefficient_seg_resampling", "num_threads"):
        options.pop(name, None)  # the number of slices stays, and labels are not resampled
    if resampling.func is resample_data_or_seg_to_shape:
        force = options.pop("force_separate_z", False)
        known, is_skimage = options == _SKIMAGE, True
    elif resampling.func is resample_torch_fornnunet:
        force = options.pop("force_separate_z", None)
        known, is_skimage = {"mode": "linear", **options} == _TORCH, False
    else:
        return None
    current = [spacing[0], *configuration.spacing]
    is_separate, axis = determine_do_sep_z_and_axis(force, current, spacing)
    if not known or axis not in (None, 0) or slices[0] != slices[1]:
        return None
    if is_skimage:
        return _as_skimage
    return functools.partial(_as_torch, is_separate=is_separate)


def _as_skimage(
    logits: Float[Tensor, "class _ _"], shape: tuple[int, ...]
) -> Float[Tensor, "class height width"]:
    if tuple(logits.shape[1:]) == shape:
        return logits
    dtype = torch.float64 if logits.device.type == "cpu" else torch.float32
    parts = [
        F.interpolate(part[None].to(dtype), shape, mode="bilinear")[0].half()
        for part in logits.split(_AT_ONCE)
    ]
    return torch.cat(parts)


def _as_torch(
    logits: Float[Tensor, "class _ _"], shape: tuple[int, ...], *, is_separate: bool
) -> Float[Tensor, "class height width"]:
    if tuple(logits.shape[1:]) == shape:
        return logits
    if is_separate:
        return F.interpolate(logits[None].float(), shape, mode="bilinear")[0]
    volume = logits[None, :, None].float()  # trilinear, as its rounding differs from bilinear
    return F.interpolate(volume, (1, *shape), mode="trilinear")[0, :, 0]
