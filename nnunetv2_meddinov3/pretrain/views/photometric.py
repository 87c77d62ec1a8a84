"""Photometric changes of crops, in units of a contract; each is drawn for each crop.

They stand in for DINO's colour jitter, blur and solarisation: torchvision's jitter clamps float
images to [0, 1], and hue or solarisation mean nothing for CT or MR.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from nnunetv2_meddinov3.pretrain.config import Augment, Contract, Intensity
from nnunetv2_meddinov3.pretrain.views.geometry import full_precision

_Crops = Float[Tensor, "crop 1 height width"]
_PerCrop = Float[Tensor, "crop 1 1 1"]
Ends = tuple[float, float] | None  # of a slice: the numbers that are 0 and 1; None for HU
_BLUR_RADIUS = 4  # pixels: 9 taps, as DINO's


def apply_photometric(
    crops: _Crops,
    augment: Augment,
    contract: Contract,
    blur_probability: float,
    generator: np.random.Generator,
    noise: torch.Generator,
) -> _Crops:
    """Change crops as the config says, and clip them.

    Args:
        crops: In the unit of the contract.
        augment: Probabilities, and ranges as shares of the contract's.
        contract: Whose clip bounds the values before and after.
        blur_probability: Of these crops, one of ``augment.blur_probability``.
        generator: Of everything but noise.
        noise: On the CPU wherever the crops are, so that noise is the same on any device.

    Returns:
        In the unit of the contract.
    """
    low, high = contract.clip
    crops = crops.clamp(low, high)

    def some(
        probability: float,
        function: Callable[..., Tensor],
        *ranges: list[float],
        device: torch.device | str = crops.device,
    ) -> None:
        """Apply a function to copies of the crops that are drawn, each with values of its own."""
        drawn = generator.random(len(crops)) < probability
        values = [generator.uniform(r[0], r[1], len(crops)) for r in ranges]
        if not drawn.any():
            return
        chosen = torch.from_numpy(np.flatnonzero(drawn)).to(crops.device, non_blocking=True)
        settings = [
            torch.from_numpy(v[drawn].astype(np.float32)[:, None, None, None]).to(
                device, non_blocking=True
            )
            for v in values
        ]
        crops.index_copy_(0, chosen, function(crops[chosen], *settings))

    def in_units(shares: list[float], start: float = 0) -> list[float]:
        return [start + share * (high - low) for share in shares]

    a = augment
    some(
        a.window_probability,
        lambda x, level, width: (
            x.sub_(level).div_(width).add_(0.5).clamp_(0, 1).mul_(high - low).add_(low)
        ),
        in_units(a.window_level, low),
        in_units(a.window_width),
    )
    some(a.contrast_probability, _contrast, a.contrast, in_units(a.brightness))
    crops.clamp_(low, high)
    some(
        a.gamma_probability,
        lambda x, gamma: x.sub_(low).div_(high - low).pow_(gamma).mul_(high - low).add_(low),
        a.gamma,
    )
    some(blur_probability, _blur, a.blur_sigma_pixels)
    sd = in_units(a.noise_sd)
    some(a.noise_probability, lambda x, sd: x.addcmul_(_normal(x, noise), sd), sd)
    some(a.low_resolution_probability, _low_resolution, a.low_resolution, device="cpu")
    return crops.clamp_(low, high)


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


def by_contract(
    crops: Float[Tensor, "crop 1 height width"],
    contracts: list[Contract],
    function: Callable[[Tensor, Contract], Tensor],
) -> Float[Tensor, "crop 1 height width"]:
    """Apply a function to the crops of each contract together, in the order of their firsts."""
    different = [each for n, each in enumerate(contracts) if contracts.index(each) == n]
    if len(different) == 1:
        return function(crops, different[0])
    out = torch.empty_like(crops)
    for contract in different:
        numbers = [n for n, each in enumerate(contracts) if each == contract]
        chosen = torch.tensor(numbers).to(crops.device, non_blocking=True)
        out = out.index_copy(0, chosen, function(crops[chosen], contract))
    return out


def _contrast(x: _Crops, factor: _PerCrop, brightness: _PerCrop) -> _Crops:
    mean = x.mean((1, 2, 3), keepdim=True)
    return x.sub_(mean).mul_(factor).add_(mean).add_(brightness)


def _normal(x: _Crops, noise: torch.Generator) -> _Crops:
    return torch.randn(x.shape, generator=noise, dtype=x.dtype).to(x.device, non_blocking=True)


def _blur(x: _Crops, sigma: _PerCrop) -> _Crops:
    """Blur with a Gaussian, each crop with its own sigma in pixels, mirrored at the edges."""
    taps = torch.arange(-_BLUR_RADIUS, _BLUR_RADIUS + 1, device=x.device, dtype=x.dtype)
    weights = torch.exp(-0.5 * (taps / sigma.clamp(min=1e-3)) ** 2)  # (n, 1, 1, 9)
    weights = weights / weights.sum(-1, keepdim=True)
    for axis in (-1, -2):
        pad = (_BLUR_RADIUS,) * 2 + (0, 0) if axis == -1 else (0, 0) + (_BLUR_RADIUS,) * 2
        padded, size = F.pad(x, pad, mode="reflect"), x.shape[axis]
        x = padded.narrow(axis, 0, size) * weights[..., :1]
        for k in range(1, len(taps)):
            x.addcmul_(padded.narrow(axis, k, size), weights[..., k : k + 1])
    return x


def _low_resolution(x: _Crops, zoom: _PerCrop) -> _Crops:
    """Shrink and enlarge again, each crop by its own factor; the factors are on the CPU."""
    size = x.shape[-1]
    sides = [max(2, round(size * factor)) for factor in zoom.flatten().tolist()]
    matrices = torch.stack([_low_resolution_matrix(size, side, x.device) for side in sides])
    with full_precision():
        return torch.matmul(matrices @ x[:, 0], matrices.mT)[:, None]


@functools.lru_cache(maxsize=128)
def _low_resolution_matrix(
    size: int, small: int, device: torch.device
) -> Float[Tensor, "{size} {size}"]:
    """Return what shrinking (bilinear, antialiased) and enlarging (bicubic) do to an axis.

    Both are linear, so that their effect on the unit vectors says all.
    """
    unit, few = (torch.eye(n)[None, None] for n in (size, small))
    shrink = F.interpolate(unit, (small, size), mode="bilinear", antialias=True)[0, 0]
    enlarge = F.interpolate(few, (size, small), mode="bicubic")[0, 0]
    return (enlarge @ shrink).to(device)
