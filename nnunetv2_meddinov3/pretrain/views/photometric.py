"""Photometric changes of crops, in shares of a contract's range; each is drawn for each crop.

They stand in for DINO's colour jitter, blur and solarisation: torchvision's jitter clamps float
images to [0, 1], and hue or solarisation mean nothing for CT or MR.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from nnunetv2_meddinov3.pretrain.config import Augment, Contract, Intensity
from nnunetv2_meddinov3.pretrain.views.bands import (
    filtered,
    full_precision,
    lose_resolution,
    losing_resolution,
)

_Crops = Float[Tensor, "crop 1 height width"]
_PerCrop = Float[Tensor, "crop 1 1 1"]
Ends = tuple[float, float] | None  # of a slice: the numbers that are 0 and 1; None for HU
_BLUR_RADIUS = 4  # pixels: 9 taps, as DINO's
_CACHE_BYTES = 2**21  # of crops that are changed together on a CPU


class _Drawn(NamedTuple):
    """Which crops have a change, and its settings for each of them."""

    crops: NDArray[np.int64]  # ascending
    settings: NDArray[np.float32]  # (changed crop, setting)


def apply_photometric(
    crops: _Crops,
    augment: Augment,
    blur_probability: float | Sequence[float],
    generator: np.random.Generator,
    noise: torch.Generator,
) -> None:
    """Change crops in place as the config says, and clip them.

    Args:
        crops: In shares of their contract's range: 0 and 1 are the ends of its clip.
        augment: Probabilities, and ranges in the same shares.
        blur_probability: Of these crops or of each, from ``augment.blur_probability``.
        generator: Of everything but noise.
        noise: On the CPU wherever the crops are, so that noise is the same on any device.
    """
    a = augment
    window, contrast, gamma, blur, noisy, low_resolution = (
        _draw(len(crops), generator, *each)
        for each in (
            (a.window_probability, a.window_level, a.window_width),
            (a.contrast_probability, a.contrast, a.brightness),
            (a.gamma_probability, a.gamma),
            (blur_probability, a.blur_sigma_pixels),
            (a.noise_probability, a.noise_sd),
            (a.low_resolution_probability, a.low_resolution),
        )
    )
    steps: list[tuple[_Drawn, Callable[..., Tensor]]] = [
        (_Drawn(window.crops, _window_settings(window.settings)), _window),
        (contrast, _contrast),
        (gamma, lambda x, gamma: x.pow_(gamma)),
        (_Drawn(blur.crops, _blur_weights(blur.settings)), _blur),
        (noisy, lambda x, sd: x.addcmul_(_normal(x, noise), sd)),
    ]
    crops.clamp_(0, 1)
    together = _together(crops)
    *numbers, low = _sent([*(each.crops for each, _ in steps), low_resolution.crops], crops.device)
    settings = _sent([each.settings.T for each, _ in steps], crops.device)
    for (_, change), chosen, own in zip(steps, numbers, settings, strict=True):
        values = own[..., None, None, None].split(together, dim=1)
        for few, their in zip(chosen.split(together), values, strict=True):
            if len(few):
                crops.index_copy_(0, few, change(crops[few], *their.unbind()))
    _lose_resolution(crops, low, low_resolution.settings[:, 0].tolist())
    crops.clamp_(0, 1)


def _together(crops: _Crops) -> int:
    """Return how many crops are changed together: on the CPU what stays in a cache."""
    if crops.device.type != "cpu":
        return len(crops)
    return max(1, _CACHE_BYTES // (crops.shape[-1] ** 2 * crops.element_size()))


def _lose_resolution(crops: _Crops, numbers: Int[Tensor, " chosen"], zooms: list[float]) -> None:
    """Shrink and enlarge the crops of these numbers by their zooms, in place."""
    if crops.device.type == "cpu":
        for crop, zoom in zip(numbers.tolist(), zooms, strict=True):
            lose_resolution(crops[crop, 0], zoom)
    elif zooms:
        bands = losing_resolution(zooms, crops.shape[-1])
        crops.index_copy_(0, numbers, filtered(crops[numbers, 0], bands, bands)[:, None])


def _draw(
    count: int,
    generator: np.random.Generator,
    probability: float | Sequence[float],
    *ranges: list[float],
) -> _Drawn:
    """Draw which of some crops are changed, and the settings of each from some ranges."""
    chosen = np.flatnonzero(generator.random(count) < np.asarray(probability))
    values = [generator.uniform(low, high, count)[chosen] for low, high in ranges]
    return _Drawn(chosen, np.stack(values, axis=1).astype(np.float32))


def _sent(arrays: Sequence[NDArray], device: torch.device) -> list[Tensor]:
    """Send arrays of one type to a device in one go."""
    joined = torch.from_numpy(np.concatenate([each.ravel() for each in arrays]))
    parts = joined.to(device, non_blocking=True).split([each.size for each in arrays])
    return [part.view(each.shape) for part, each in zip(parts, arrays, strict=True)]


def normalise(crops: Float[Tensor, "*shape"], contract: Contract) -> Float[Tensor, "*shape"]:
    """Clip to the contract's range, subtract its mean and divide by its standard deviation."""
    return crops.clamp(*contract.clip).sub_(contract.mean).div_(contract.std)


def normalised(
    values: Float[Tensor, "*shape"], ends: tuple[float, float]
) -> Float[Tensor, "*shape"]:
    """Return stored numbers as normalised values, in which the two ends are 0 and 1."""
    return (values - ends[0]) / (ends[1] - ends[0])


def contract_of(ends: Ends, intensity: Intensity) -> Contract:
    """Return the contract of a slice: that of HU where it has no ends."""
    if ends is None:
        return intensity.hu
    assert intensity.normalised is not None  # such a run takes all numbers for HU
    return intensity.normalised


class Scaling(NamedTuple):
    """From stored numbers to shares of the range of a contract, and on to its normalised values.

    A share is ``number * factor + offset``, a normalised value ``share * std + mean``, where std
    and mean are those that the shares' 1 and 0 have.
    """

    factor: float
    offset: float
    std: float
    mean: float

    @classmethod
    def of(cls, ends: Ends, contract: Contract) -> Scaling:
        """Return the scaling of a slice that has these ends and this contract."""
        low, high = contract.clip
        zero, one = ends or (0.0, 1.0)
        factor = 1 / ((one - zero) * (high - low))
        std = (high - low) / contract.std
        return cls(
            factor, -zero * factor - low / (high - low), std, (low - contract.mean) / contract.std
        )


def _window_settings(drawn: NDArray[np.float32]) -> NDArray[np.float32]:
    level, width = drawn.T
    return np.stack([1 / width, 0.5 - level / width], axis=1)


def _window(x: _Crops, factor: _PerCrop, offset: _PerCrop) -> _Crops:
    return x.mul_(factor).add_(offset).clamp_(0, 1)


def _contrast(x: _Crops, factor: _PerCrop, brightness: _PerCrop) -> _Crops:
    mean = x.mean((1, 2, 3), keepdim=True)
    return x.sub_(mean).mul_(factor).add_(mean + brightness).clamp_(0, 1)


def _normal(x: _Crops, noise: torch.Generator) -> _Crops:
    """Draw noise crop by crop, so that it is the same however many are changed at once."""
    drawn = [torch.randn(x.shape[1:], generator=noise, dtype=x.dtype) for _ in range(len(x))]
    return torch.stack(drawn).to(x.device, non_blocking=True)


def _blur_weights(sigma: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return Gaussians of 9 taps, (crop, tap), for sigmas in pixels, (crop, 1)."""
    taps = np.arange(-_BLUR_RADIUS, _BLUR_RADIUS + 1)
    weights = np.exp(-0.5 * (taps / np.maximum(sigma.astype(np.float64), 1e-3)) ** 2)
    return (weights / weights.sum(-1, keepdims=True)).astype(np.float32)


def _blur(x: _Crops, *taps: _PerCrop) -> _Crops:
    """Blur each crop with its own weights along both axes, mirrored at the edges."""
    crops, side = len(x), (_BLUR_RADIUS, _BLUR_RADIUS)
    weights = torch.cat(taps, dim=-1)  # (crop, 1, 1, 9)
    x = x.transpose(0, 1)
    with full_precision():
        x = F.conv2d(F.pad(x, (*side, 0, 0), mode="reflect"), weights, groups=crops)
        x = F.conv2d(F.pad(x, (0, 0, *side), mode="reflect"), weights.mT, groups=crops)
    return x.transpose(0, 1)
