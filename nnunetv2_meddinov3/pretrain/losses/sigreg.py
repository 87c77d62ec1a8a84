"""The other spreading loss: features of a batch are held to a standard normal distribution."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch import distributed as dist

KNOTS = 17  # of the integral over [-LIMIT, LIMIT]
LIMIT = 5.0


class SIGRegLoss(nn.Module):
    """Sketched isotropic Gaussian regularisation (Balestriero and LeCun 2025, LeJEPA).

    Features are projected onto random directions; the Epps-Pulley statistic (1983) says how far
    each projection is from a standard normal, by the characteristic functions of both. The images
    of all ranks count together: several ranks have the loss and the gradients of one that has all
    their images.

    Args:
        slices: Directions.
    """

    t: Tensor
    normal: Tensor
    weights: Tensor

    def __init__(self, slices: int = 1024) -> None:
        super().__init__()
        if slices < 1:
            raise ValueError(f"slices must be at least 1, got {slices}")
        self.slices = slices
        # the integrand is even: half of the knots, each but the one at 0 counted twice
        t = torch.linspace(0, LIMIT, KNOTS // 2 + 1, dtype=torch.float64)
        width = float(t[1] - t[0])
        weights = torch.full_like(t, 2 * width)
        weights[0] = weights[-1] = width
        normal = (-t.square() / 2).exp()
        self.register_buffer("t", t.float(), persistent=False)
        self.register_buffer("normal", normal.float(), persistent=False)
        self.register_buffer("weights", (weights * normal).float(), persistent=False)

    def forward(self, cls: Float[Tensor, "batch dim"], seed: int) -> Float[Tensor, ""]:
        """Return the statistic, the mean over directions.

        Args:
            cls: Tokens before any head; computed in fp32 (float64 stays). As many on every rank.
            seed: Of the directions, the same on every rank; another at every step.

        Raises:
            ValueError: If there is no image.
        """
        if not len(cls):
            raise ValueError("SIGReg needs at least one image, got none")
        x = cls.to(torch.promote_types(cls.dtype, torch.float32))
        directions = self.directions(cls.shape[1], seed).to(x, non_blocking=True)
        angles = (x @ directions)[:, :, None] * self.t  # (B, slices, knots)
        moments = torch.stack([angles.cos().sum(0), angles.sin().sum(0)])
        images = len(cls)
        if dist.is_initialized():
            images *= dist.get_world_size()
            moments = _SumOverRanks.apply(moments)
        cosine, sine = moments / images
        distance = (cosine - self.normal).square() + sine.square()
        return images * (distance * self.weights).sum(-1).mean()

    def directions(self, dim: int, seed: int) -> Float[Tensor, "dim slice"]:
        """Return random directions of length 1, drawn on the CPU."""
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(dim, self.slices, generator=generator)
        return drawn / drawn.norm(dim=0, keepdim=True).clamp(min=math.ulp(1.0))


class _SumOverRanks(torch.autograd.Function):
    """Sum a tensor over all ranks, whose losses all have a gradient with respect to it."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total
