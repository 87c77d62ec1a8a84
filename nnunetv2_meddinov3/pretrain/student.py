"""The ViT as pretraining runs it: mask tokens, several crop sizes in one pass, augmented RoPE."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nnunetv2_meddinov3.models.backbone import ROPE_DTYPES, Backbone, Tokens, rotary_embedding
from nnunetv2_meddinov3.pretrain.blocks import Draws, PackedBlock
from nnunetv2_meddinov3.pretrain.heads import ProjectionHead


@dataclass(frozen=True)
class Noise:
    """What is drawn anew in every forward pass of the student (DINOv3, sec. 3; code).

    Attributes:
        drop_path: Share of images that skip a branch, uniform over the depth.
        rope_shift: Add U(-s, s) to each axis; None for nothing.
        rope_jitter: Multiply each axis by exp(U(-ln j, ln j)); None for nothing.
        rope_rescale: Multiply both axes by one exp(U(-ln r, ln r)); None for nothing.
    """

    drop_path: float = 0.0
    rope_shift: float | None = None
    rope_jitter: float | None = None
    rope_rescale: float | None = None

    @property
    def of_rope(self) -> bool:
        """Whether coordinates are augmented."""
        return any((self.rope_shift, self.rope_jitter, self.rope_rescale))


def pack_blocks(backbone: Backbone) -> Backbone:
    """Make a backbone's blocks take several groups of crops; its weights and their names stay.

    The class of the blocks is exchanged in place: FSDP2 and torch.compile act on a block's own
    forward, and a wrapper around it would change the names of its parameters.
    """
    for block in backbone.vit.blocks:
        block.__class__ = PackedBlock
    return backbone


class Outputs(NamedTuple):
    """What losses are made of; crops are crop-major.

    Attributes:
        cls_global: (G * B, D), after the final norm.
        patches_global: (G * B, P, D), after the final norm.
        dino_global: (G * B, K).
        ibot: (M, K') at the masked patches.
        dino_local: (L * B, K), None without local crops.
        cls_local: (L * B, D), None without local crops.
    """

    cls_global: Tensor
    patches_global: Tensor
    dino_global: Tensor
    ibot: Tensor
    dino_local: Tensor | None = None
    cls_local: Tensor | None = None


class Student(nn.Module):
    """Backbone and both heads in one module, whose forward is all that DDP and FSDP2 must see.

    The teacher is of the same class, in evaluation mode.

    Args:
        backbone: With a mask token; its blocks are made to take several groups.
        dino_head: On cls tokens.
        ibot_head: On masked patch tokens.
        noise: What is drawn in training mode.
    """

    def __init__(
        self,
        backbone: Backbone,
        dino_head: ProjectionHead,
        ibot_head: ProjectionHead,
        noise: Noise = Noise(),
    ) -> None:
        super().__init__()
        if backbone.mask_token is None:
            raise ValueError("a backbone for pretraining must have a mask token, got one without")
        self.backbone = pack_blocks(backbone)
        self.dino_head, self.ibot_head, self.noise = dino_head, ibot_head, noise

    def forward(
        self,
        global_crops: Tensor,
        masked: Tensor,
        *,
        masks: Tensor | None = None,
        local_crops: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Outputs:
        """Encode all crops and project what the losses need.

        Args:
            global_crops: (G * B, C, H, W); one channel is repeated to the backbone's.
            masked: (M,) numbers of the masked patches in the flattened (G * B, P), ascending.
            masks: (G * B, P) bool of what this network must not see; None for the teacher.
            local_crops: (L * B, C, h, w), or None.
            generator: On the CPU, for what is drawn in training mode.
        """
        groups = [global_crops] if local_crops is None else [global_crops, local_crops]
        tokens = self.encode(groups, [masks, None][: len(groups)], generator)
        seen = tokens[0]
        cls = torch.cat([t.cls for t in tokens])
        logits = self.dino_head(cls).split([len(t.cls) for t in tokens])
        patches = seen.patches.flatten(0, 1).index_select(0, masked)
        return Outputs(
            seen.cls,
            seen.patches,
            logits[0],
            self.ibot_head(patches),
            *((logits[1], tokens[1].cls) if local_crops is not None else ()),
        )

    def encode(
        self,
        groups: Sequence[Tensor],
        masks: Sequence[Tensor | None],
        generator: torch.Generator | None = None,
    ) -> list[Tokens]:
        """Return the normed tokens of several groups of crops, one pass for all."""
        return encode(
            self.backbone, groups, masks, self.noise if self.training else None, generator
        )


class GramTeacher(nn.Module):
    """A backbone that gives patch tokens; a module of its own, so that FSDP2 can shard it."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = pack_blocks(backbone)

    def forward(self, crops: Tensor) -> Tensor:
        """Return the normed patch tokens (B, P, D) of crops (B, C, H, W)."""
        return encode(self.backbone, [crops])[0].patches


def encode(
    backbone: Backbone,
    groups: Sequence[Tensor],
    masks: Sequence[Tensor | None] | None = None,
    noise: Noise | None = None,
    generator: torch.Generator | None = None,
) -> list[Tokens]:
    """Return the last block's tokens after the final norm, for several groups of crops at once.

    Args:
        backbone: With packed blocks.
        groups: (B, C, H, W) for each size.
        masks: (B, P) bool or None for each group: True replaces the patch by the mask token.
        noise: Drop path and RoPE augmentation; None for none.
        generator: On the CPU, where they are drawn from.

    Raises:
        ValueError: If noise is wanted without a generator.
    """
    masks = [None] * len(groups) if masks is None else masks
    if noise is not None and (noise.of_rope or noise.drop_path) and generator is None:
        raise ValueError("drop path and RoPE augmentation need a generator to be drawn from")
    xs, grids = [], []
    for images, mask in zip(groups, masks, strict=True):
        x, grid = _embed(backbone, images, mask)
        xs.append(x)
        grids.append(grid)
    plain = [None if noise and noise.of_rope else _embedding(backbone, grid) for grid in grids]
    for block in backbone.vit.blocks:
        draws = [
            _draw(backbone, len(x), grid, ready, noise, generator)
            for x, grid, ready in zip(xs, grids, plain, strict=True)
        ]
        if backbone.vit.grad_checkpointing and torch.is_grad_enabled():
            xs = checkpoint(block, xs, draws, use_reentrant=False)
        else:
            xs = block(xs, draws)
    prefix = 1 + backbone.architecture.num_registers
    normed = [backbone.vit.norm(x) for x in xs]
    return [Tokens(y[:, 0], y[:, 1:prefix], y[:, prefix:]) for y in normed]


def _embed(
    backbone: Backbone, images: Tensor, mask: Tensor | None
) -> tuple[Tensor, tuple[int, int]]:
    """Patch embedding with masked patches replaced, then prefix tokens: (B, N, D) and the grid."""
    channels = backbone.architecture.input_channels
    if images.shape[1] == 1 and channels > 1:
        images = images.expand(-1, channels, -1, -1)
    backbone._check_images(images)
    patches = backbone.vit.patch_embed(images)  # (B, h, w, D)
    grid = (patches.shape[1], patches.shape[2])
    patches = patches.flatten(1, 2)
    if backbone.mask_token is None:
        return backbone._with_prefix(patches), grid
    token = backbone.mask_token.to(patches.dtype)
    if mask is not None:
        return backbone._with_prefix(torch.where(mask[..., None], token, patches)), grid
    x = backbone._with_prefix(patches)
    # without a mask the mask token still takes part, so that DDP and FSDP2 see its gradient
    return torch.cat((x[:, :1] + 0 * token, x[:, 1:]), 1), grid


def _embedding(backbone: Backbone, grid: tuple[int, int]) -> Tensor:
    dtype = ROPE_DTYPES[backbone.architecture.rope_dtype]
    return rotary_embedding(backbone.vit.rope.periods, grid, dtype)


def _draw(
    backbone: Backbone,
    images: int,
    grid: tuple[int, int],
    plain: Tensor | None,
    noise: Noise | None,
    generator: torch.Generator | None,
) -> Draws:
    """Draw for one block and one group: another scale and another subset in every block."""
    embedding = plain
    device = backbone.vit.rope.periods.device
    if noise is None:
        return Draws(embedding)
    if embedding is None:
        embedding = augmented_embedding(backbone, grid, noise, generator)
    kept = max(int(images * (1 - noise.drop_path)), 1)
    if kept == images:
        return Draws(embedding)
    subsets = [
        torch.randperm(images, generator=generator)[:kept].to(device, non_blocking=True)
        for _ in range(2)
    ]
    return Draws(embedding, *subsets)


def augmented_embedding(
    backbone: Backbone, grid: tuple[int, int], noise: Noise, generator: torch.Generator
) -> Tensor:
    """Rotary embedding of coordinates that are shifted, jittered and rescaled, in this order."""

    def uniform(limit: float, count: int) -> Tensor:
        return (2 * torch.rand(count, generator=generator) - 1) * limit

    shift, factor = torch.zeros(2), torch.ones(2)
    if noise.rope_shift:
        shift = uniform(noise.rope_shift, 2)
    if noise.rope_jitter:
        factor = uniform(math.log(noise.rope_jitter), 2).exp()
    if noise.rope_rescale:
        factor = factor * uniform(math.log(noise.rope_rescale), 1).exp()
    # (c + shift) * factor in every axis
    device = backbone.vit.rope.periods.device
    dtype = ROPE_DTYPES[backbone.architecture.rope_dtype]
    return rotary_embedding(
        backbone.vit.rope.periods,
        grid,
        dtype,
        shift=shift.to(device, dtype, non_blocking=True),
        factor=factor.to(device, dtype, non_blocking=True),
    )
