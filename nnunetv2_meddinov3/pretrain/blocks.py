"""A ViT block over several groups of crops at once, with stochastic depth that skips work.

Token-wise operations run on the tokens of all groups together; attention runs within each group,
whose images have equally many tokens, so nothing is padded (DINOv2, sec. 5).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from timm.models.eva import EvaBlock
from torch import Tensor
from torch.nn import functional as F


class Draws(NamedTuple):
    """What is drawn for one block and one group of crops.

    Attributes:
        embedding: (P, 2 * head width), rotary embedding of the patches.
        kept_by_attention: (b,) images that go through the attention branch, None for all.
        kept_by_mlp: The same for the feed-forward branch; drawn by itself.
    """

    embedding: Tensor
    kept_by_attention: Tensor | None = None
    kept_by_mlp: Tensor | None = None


class PackedBlock(EvaBlock):
    """timm's block whose forward takes several groups of crops; parameters are the same."""

    def forward(self, groups: Sequence[Tensor], draws: Sequence[Draws]) -> list[Tensor]:
        """Run the block.

        Args:
            groups: One (B, N, D) tensor for each group of crops of one size.
            draws: What was drawn for each of them.

        Returns:
            Tensors of the same shapes.
        """
        kept = [d.kept_by_attention for d in draws]
        parts = _select(groups, kept)
        branch = self._attend(_flat(parts), parts, [d.embedding for d in draws])
        groups = _add(groups, kept, branch, self.gamma_1)
        kept = [d.kept_by_mlp for d in draws]
        parts = _select(groups, kept)
        branch = self.mlp(self.norm2(_flat(parts))).split([p.shape[:2].numel() for p in parts])
        return _add(groups, kept, branch, self.gamma_2)

    def _attend(
        self, tokens: Tensor, parts: Sequence[Tensor], embeddings: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """Return the attention branch of every group's tokens, each (b * N, D)."""
        attn = self.attn
        bias = None if attn.q_bias is None else torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
        counts = [part.shape[:2].numel() for part in parts]
        out = []
        qkv = F.linear(self.norm1(tokens), attn.qkv.weight, bias).split(counts)
        for part, own, embedding in zip(parts, qkv, embeddings, strict=True):
            b, n = part.shape[:2]
            q, k, v = own.view(b, n, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
            q = _rotate(attn.q_norm(q), embedding, attn.num_prefix_tokens).type_as(v)
            k = _rotate(attn.k_norm(k), embedding, attn.num_prefix_tokens).type_as(v)
            y = F.scaled_dot_product_attention(q, k, v)
            out.append(y.transpose(1, 2).flatten(2).flatten(0, 1))
        return attn.proj(torch.cat(out)).split(counts)


def _rotate(x: Tensor, embedding: Tensor, prefix: int) -> Tensor:
    """Rotate the patch tokens of (b, heads, N, d): element i pairs with i + d/2."""
    sin, cos = embedding.chunk(2, -1)
    patches = x[:, :, prefix:]
    first, second = patches.chunk(2, -1)
    rotated = patches * cos + torch.cat((-second, first), -1) * sin
    return torch.cat((x[:, :, :prefix].to(rotated.dtype), rotated), 2)


def _select(groups: Sequence[Tensor], kept: Sequence[Tensor | None]) -> list[Tensor]:
    return [g if k is None else g.index_select(0, k) for g, k in zip(groups, kept, strict=True)]


def _flat(parts: Sequence[Tensor]) -> Tensor:
    """(b, N, D) of each group -> (tokens of all, D)."""
    return torch.cat([part.flatten(0, 1) for part in parts])


def _add(
    groups: Sequence[Tensor],
    kept: Sequence[Tensor | None],
    branch: Sequence[Tensor],
    gamma: Tensor | None,
) -> list[Tensor]:
    """Add a branch to the images that went through it, scaled so that its mean stays."""
    out = []
    for group, indices, own in zip(groups, kept, branch, strict=True):
        own = own if gamma is None else gamma * own
        if indices is None:
            out.append(group + own.view_as(group))
            continue
        own = own.view(len(indices), *group.shape[1:])
        scale = len(group) / len(indices)
        out.append(group.index_add(0, indices, own.to(group.dtype), alpha=scale))
    return out
