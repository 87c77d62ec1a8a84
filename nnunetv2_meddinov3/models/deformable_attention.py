"""Deformable attention in plain PyTorch (Deformable DETR, https://arxiv.org/abs/2010.04159).

The usual implementation is a compiled extension that many machines cannot build. Here
``grid_sample`` does the work: it runs, differentiates and compiles wherever PyTorch does.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


def sample_deformable(
    values: Float[Tensor, "batch head channels height width"],
    locations: Float[Tensor, "batch query head point 2"],
    weights: Float[Tensor, "batch query head point"],
) -> Float[Tensor, "batch query head*channels"]:
    """Sum bilinear samples of maps, each with its weight.

    Args:
        values: A map for each head.
        locations: Where each query samples, as (x, y) from 0 to 1 between the outer edges of the
            map; the centre of the first pixel is at (0.5 / width, 0.5 / height). Outside is zero.
        weights: Of each sample.
    """
    batch, queries, heads, _ = weights.shape
    grid = (2 * locations - 1).transpose(1, 2).flatten(0, 1)  # (B * heads, Q, points, 2)
    samples = F.grid_sample(
        values.flatten(0, 1), grid, mode="bilinear", padding_mode="zeros", align_corners=False
    )  # (B * heads, channels, Q, points)
    summed = (samples * weights.transpose(1, 2).flatten(0, 1)[:, None]).sum(-1)
    return summed.unflatten(0, (batch, heads)).permute(0, 3, 1, 2).reshape(batch, queries, -1)


class DeformableAttention(nn.Module):
    """Queries that each look at a few places of one map, which they choose themselves.

    Args:
        dim: Width D of queries and map.
        heads: Attention heads.
        points: Places that each head of a query looks at.
        value_ratio: Width of the values, as a part of D; a multiple of the heads.
    """

    def __init__(self, dim: int, heads: int = 16, points: int = 4, value_ratio: float = 0.5):
        super().__init__()
        width = int(dim * value_ratio)
        if width % heads:
            raise ValueError(
                f"the width of the values must be a multiple of the {heads} heads, got {width}"
            )
        self.heads, self.points = heads, points
        self.offsets = nn.Linear(dim, heads * points * 2)
        self.weights = nn.Linear(dim, heads * points)
        self.values = nn.Linear(dim, width)
        self.output = nn.Linear(width, dim)
        self._init_weights()

    @torch.no_grad()
    def _init_weights(self) -> None:
        """Let every head look in a direction of its own first, its points one after the other."""
        for layer in (self.values, self.output):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        for layer in (self.offsets, self.weights):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        angles = torch.arange(self.heads) * (2 * math.pi / self.heads)
        directions = torch.stack([angles.cos(), angles.sin()], dim=-1)
        directions = directions / directions.abs().amax(-1, keepdim=True)  # (heads, 2)
        steps = torch.arange(1.0, self.points + 1)[None, :, None]
        self.offsets.bias.copy_((directions[:, None] * steps).flatten())

    def forward(
        self,
        queries: Float[Tensor, "batch query dim"],
        references: Float[Tensor, "query 2"],
        maps: Float[Tensor, "batch dim height width"],
    ) -> Float[Tensor, "batch query dim"]:
        """Look at a map.

        Args:
            queries: What looks.
            references: Where each query is, (x, y) as in ``sample_deformable``.
            maps: What it looks at; offsets count in pixels of it.
        """
        height, width = maps.shape[2:]
        values = self.values(maps.flatten(2).transpose(1, 2)).transpose(1, 2)
        values = values.unflatten(1, (self.heads, -1)).unflatten(3, (height, width))
        shape = (self.heads, self.points)
        # places are fp32 even where autocast is on: bf16 cannot tell the pixels of a map apart
        offsets = self.offsets(queries).float().unflatten(2, (*shape, 2))
        locations = references[:, None, None] + offsets / offsets.new_tensor([width, height])
        weights = self.weights(queries).float().unflatten(2, shape).softmax(-1)
        return self.output(sample_deformable(values.float(), locations, weights))


def pixel_centres(height: int, width: int, device: torch.device) -> Float[Tensor, "pixel 2"]:
    """Return the centres of a map's pixels, row by row, (x, y) from 0 to 1, in fp32.

    Args:
        height: Rows.
        width: Columns.
        device: Where they are wanted.
    """
    rows, columns = ((torch.arange(n, device=device) + 0.5) / n for n in (height, width))
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack([x, y], dim=-1).flatten(0, 1)
