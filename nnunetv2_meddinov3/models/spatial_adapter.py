"""The adapter of Dino U-Net: a small convolutional pyramid that asks a frozen ViT.

It is ViT-Adapter (https://arxiv.org/abs/2205.08534) with extractors alone: the pyramid looks at the
ViT's maps and the ViT never sees the pyramid, so it can stay frozen.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import torch
from jaxtyping import Float
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn import functional as F

from nnunetv2_meddinov3.models.deformable_attention import DeformableAttention, pixel_centres
from nnunetv2_meddinov3.models.segmentation_network import resize

# Rows or columns of a map at strides 8, 16 and 32, counted in those at stride 32.
_SCALES = (4, 2, 1)


def _convolution(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class SpatialPrior(nn.Module):
    """Convolutions that give maps of one width at strides 4, 8, 16 and 32.

    Args:
        channels: Of the images.
        dim: Width D of the maps.
        width: Channels of the stem.
    """

    def __init__(self, channels: int, dim: int, width: int = 64) -> None:
        super().__init__()
        widths = [width, 2 * width, 4 * width, 4 * width]
        self.stem = nn.Sequential(
            _convolution(channels, width, 2),
            _convolution(width, width, 1),
            _convolution(width, width, 1),
            nn.MaxPool2d(3, stride=2, padding=1),
        )
        self.stages = nn.ModuleList(_convolution(a, b, 2) for a, b in pairwise(widths))
        self.projections = nn.ModuleList(nn.Conv2d(w, dim, 1) for w in widths)

    def forward(
        self, images: Float[Tensor, "batch channel height width"]
    ) -> list[Float[Tensor, "batch dim rows columns"]]:
        """Return the maps, the largest first."""
        maps = [self.stem(images)]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        return [project(x) for project, x in zip(self.projections, maps, strict=True)]


class ConvFFN(nn.Module):
    """A feed-forward layer with a depth-wise convolution over each of the three scales.

    Args:
        dim: Width D of the tokens.
        ratio: Hidden width, as a part of D.
    """

    def __init__(self, dim: int, ratio: float = 0.25) -> None:
        super().__init__()
        hidden = int(dim * ratio)
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)

    def forward(
        self, tokens: Float[Tensor, "batch token dim"], coarse: tuple[int, int]
    ) -> Float[Tensor, "batch token dim"]:
        """Mix tokens.

        Args:
            tokens: Those of the strides 8, 16 and 32, one after the other.
            coarse: Rows and columns at stride 32.
        """
        maps = [self.depthwise(x) for x in split_scales(self.fc1(tokens), coarse)]
        return self.fc2(F.gelu(join_scales(maps)))


class Extractor(nn.Module):
    """One look of the pyramid at a map of the ViT, and a feed-forward layer.

    Args:
        dim: Width D of both.
        drop_path: Rate of stochastic depth of the feed-forward layer.
    """

    def __init__(self, dim: int, drop_path: float) -> None:
        super().__init__()
        self.query_norm = nn.LayerNorm(dim, eps=1e-6)
        self.map_norm = nn.LayerNorm(dim, eps=1e-6)
        self.attention = DeformableAttention(dim)
        self.ffn_norm = nn.LayerNorm(dim, eps=1e-6)
        self.ffn = ConvFFN(dim)
        self.drop_path = DropPath(drop_path)

    def forward(
        self,
        tokens: Float[Tensor, "batch token dim"],
        references: Float[Tensor, "token 2"],
        maps: Float[Tensor, "batch dim rows columns"],
        coarse: tuple[int, int],
    ) -> Float[Tensor, "batch token dim"]:
        """Return the pyramid's tokens after the look."""
        seen = self.map_norm(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        tokens = tokens + self.attention(self.query_norm(tokens), references, seen)
        return tokens + self.drop_path(self.ffn(self.ffn_norm(tokens), coarse))


class Adapter(nn.Module):
    """The pyramid, four blocks that look at one map of the ViT each, and the sum of both.

    Args:
        channels: Of the images.
        dim: Width D.
        drop_path: Rate of stochastic depth.
    """

    def __init__(self, channels: int, dim: int, drop_path: float) -> None:
        super().__init__()
        self.prior = SpatialPrior(channels, dim)
        self.level_embedding = nn.Parameter(torch.zeros(3, dim))
        nn.init.normal_(self.level_embedding)
        # the last block has two extractors more
        blocks = [
            nn.ModuleList(Extractor(dim, drop_path) for _ in range(count)) for count in (1, 1, 1, 3)
        ]
        self.blocks = cast("Sequence[Sequence[Extractor]]", nn.ModuleList(blocks))
        self.up = nn.ConvTranspose2d(dim, dim, kernel_size=2, stride=2)
        self.norms = nn.ModuleList(nn.BatchNorm2d(dim) for _ in range(4))

    def forward(
        self,
        images: Float[Tensor, "batch channel height width"],
        maps: list[Float[Tensor, "batch dim rows columns"]],
    ) -> list[Float[Tensor, "batch dim ..."]]:
        """Return maps at strides 4, 8, 16 and 32.

        Args:
            images: Sides are multiples of 32.
            maps: Four of the ViT's, at stride 16.
        """
        finest, *pyramid = self.prior(images)
        coarse = pyramid[-1].shape[2], pyramid[-1].shape[3]
        embeddings = self.level_embedding[:, None, :, None, None]
        tokens = join_scales([x + e for x, e in zip(pyramid, embeddings, strict=True)])
        references = torch.cat(
            [pixel_centres(n * coarse[0], n * coarse[1], tokens.device) for n in _SCALES]
        )
        for block, seen in zip(self.blocks, maps, strict=True):
            for extractor in block:
                tokens = extractor(tokens, references, seen, coarse)
        pyramid = split_scales(tokens, coarse)
        pyramid = [self.up(pyramid[0]) + finest, *pyramid]
        return [
            norm(x + resize(seen, x.shape[2:]))
            for norm, x, seen in zip(self.norms, pyramid, maps, strict=True)
        ]


def join_scales(
    maps: Sequence[Float[Tensor, "batch dim ..."]],
) -> Float[Tensor, "batch token dim"]:
    """Return the pixels of maps as tokens, one map after the other."""
    return torch.cat([x.flatten(2) for x in maps], dim=2).transpose(1, 2)


def split_scales(
    tokens: Float[Tensor, "batch token dim"], coarse: tuple[int, int]
) -> list[Float[Tensor, "batch dim ..."]]:
    """Undo ``join_scales`` for maps at strides 8, 16 and 32.

    Args:
        tokens: As it returned them.
        coarse: Rows and columns at stride 32.
    """
    shapes = [(n * coarse[0], n * coarse[1]) for n in _SCALES]
    parts = tokens.transpose(1, 2).split([rows * columns for rows, columns in shapes], dim=2)
    return [part.unflatten(2, shape) for part, shape in zip(parts, shapes, strict=True)]
