"""The ViT as pretraining runs it: mask tokens, several crop sizes in one pass, augmented RoPE.

Token-wise layers see the tokens of all groups of crops together; attention runs within each group,
whose images have equally many tokens, so nothing is padded (DINOv2, sec. 5).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from timm.models.eva import EvaBlock
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from nnunetv2_meddinov3.models.backbone import ROPE_DTYPES, Backbone, Tokens, rotary_embedding
from nnunetv2_meddinov3.pretrain.heads import ProjectionHead


@dataclass(frozen=True)
class StochasticOptions:
    """What is drawn in every forward pass of the student (DINOv3, sec. 3; code).

    Attributes:
        drop_path: Share of images that skip a branch, the same at every depth.
        rope_shift: Add U(-s, s) to each axis; None for nothing.
        rope_jitter: Multiply each axis by exp(U(-ln j, ln j)); None for nothing.
        rope_rescale: Multiply both axes by one exp(U(-ln r, ln r)); None for nothing.
    """

    drop_path: float = 0.0
    rope_shift: float | None = None
    rope_jitter: float | None = None
    rope_rescale: float | None = None

    @property
    def augments_rope(self) -> bool:
        """Whether coordinates are augmented."""
        return any((self.rope_shift, self.rope_jitter, self.rope_rescale))


class Outputs(NamedTuple):
    """What losses are made of; crops are crop-major.

    Attributes:
        cls_global: After the final norm.
        patches_global: After the final norm.
        dino_global: Logits of the global crops' cls tokens.
        ibot: Logits of the masked patches.
        dino_local: Logits of the local crops' cls tokens, None without local crops.
    """

    cls_global: Float[Tensor, "globals dim"]
    patches_global: Float[Tensor, "globals patch dim"]
    dino_global: Float[Tensor, "globals prototype"]
    ibot: Float[Tensor, "masked ibot_prototype"]
    dino_local: Float[Tensor, "locals prototype"] | None = None


class Student(nn.Module):
    """Backbone and both heads in one module, whose forward is all that DDP and FSDP2 must see.

    The teacher is of the same class, in evaluation mode.

    Args:
        backbone: With a mask token; its blocks are replaced by packed ones.
        dino_head: On cls tokens.
        ibot_head: On masked patch tokens.
        stochastic: What is drawn in training mode.
    """

    def __init__(
        self,
        backbone: Backbone,
        dino_head: ProjectionHead,
        ibot_head: ProjectionHead,
        stochastic: StochasticOptions = StochasticOptions(),
    ) -> None:
        super().__init__()
        if backbone.mask_token is None:
            raise ValueError("a backbone for pretraining must have a mask token, got one without")
        self.backbone = pack_blocks(backbone)
        self.dino_head, self.ibot_head, self.stochastic = dino_head, ibot_head, stochastic

    def forward(
        self,
        global_crops: Float[Tensor, "globals channel height width"],
        mask_indices: Int[Tensor, " masked"],
        *,
        masks: Bool[Tensor, "globals patch"] | None = None,
        local_crops: Float[Tensor, "locals channel local_height local_width"] | None = None,
        generator: torch.Generator | None = None,
    ) -> Outputs:
        """Encode all crops and project what the losses need.

        Args:
            global_crops: One channel is repeated to the backbone's.
            mask_indices: The masked patches in the flattened (globals, patch), ascending.
            masks: What this network must not see; None for the teacher.
            local_crops: None for the teacher.
            generator: On the CPU, for what is drawn in training mode.
        """
        groups = [global_crops] if local_crops is None else [global_crops, local_crops]
        tokens = encode(
            self.backbone,
            groups,
            [masks, None][: len(groups)],
            self.stochastic if self.training else None,
            generator,
        )
        seen = tokens[0]
        cls = torch.cat([t.cls for t in tokens])
        logits = self.dino_head(cls).split([len(t.cls) for t in tokens])
        patches = seen.patches.flatten(0, 1).index_select(0, mask_indices)
        local_logits = None if local_crops is None else logits[1]
        return Outputs(seen.cls, seen.patches, logits[0], self.ibot_head(patches), local_logits)


class GramTeacher(nn.Module):
    """A backbone that gives patch tokens; a module of its own, so that FSDP2 can shard it."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = pack_blocks(backbone)

    def forward(
        self, crops: Float[Tensor, "batch channel height width"]
    ) -> Float[Tensor, "batch patch dim"]:
        """Return the patch tokens of crops, after the final norm."""
        return encode(self.backbone, [crops])[0].patches


def encode(
    backbone: Backbone,
    groups: Sequence[Float[Tensor, "_ _ _ _"]],
    masks: Sequence[Bool[Tensor, "_ _"] | None] | None = None,
    stochastic: StochasticOptions | None = None,
    generator: torch.Generator | None = None,
) -> list[Tokens]:
    """Return the last block's tokens after the final norm, for several groups of crops at once.

    Args:
        backbone: With packed blocks.
        groups: (B, C, H, W) for each size of crops.
        masks: (B, P) or None for each group: True replaces the patch by the mask token.
        stochastic: Drop path and RoPE augmentation; None for none.
        generator: On the CPU, where they are drawn from.

    Raises:
        ValueError: If anything is to be drawn, but there is no generator.
    """
    masks = [None] * len(groups) if masks is None else masks
    xs, grids = [], []
    for images, mask in zip(groups, masks, strict=True):
        x, grid = _embed(backbone, images, mask)
        xs.append(x)
        grids.append(grid)
    drawn = [
        _block_inputs(backbone, len(x), grid, stochastic, generator)
        for x, grid in zip(xs, grids, strict=True)
    ]
    for block, *inputs in zip(backbone.vit.blocks, *drawn, strict=True):
        if backbone.vit.grad_checkpointing and torch.is_grad_enabled():
            xs = checkpoint(block, xs, inputs, use_reentrant=False)
        else:
            xs = block(xs, inputs)
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


class BlockInputs(NamedTuple):
    """What one block gets beside the tokens, for one group of crops.

    Attributes:
        embedding: Rotary embedding of the patches, width 2 * head width.
        kept_by_attention: Images that go through the attention branch, None for all.
        kept_by_mlp: The same for the feed-forward branch; drawn separately.
    """

    embedding: Float[Tensor, "patch width"]
    kept_by_attention: Int[Tensor, " kept"] | None = None
    kept_by_mlp: Int[Tensor, " kept"] | None = None


def _block_inputs(
    backbone: Backbone,
    images: int,
    grid: tuple[int, int],
    stochastic: StochasticOptions | None,
    generator: torch.Generator | None,
) -> list[BlockInputs]:
    """Draw for all blocks and one group at once: another scale and another subset in every block.

    A draw for each block is as many small operations, which a GPU waits for.
    """
    blocks = len(backbone.vit.blocks)
    if stochastic is None or not (stochastic.augments_rope or stochastic.drop_path):
        return [BlockInputs(_embedding(backbone, grid))] * blocks
    if generator is None:
        raise ValueError("drop path and RoPE augmentation need a generator to be drawn from")
    embeddings: Sequence[Tensor]
    if stochastic.augments_rope:
        embeddings = augmented_embeddings(backbone, grid, stochastic, generator).unbind()
    else:
        embeddings = [_embedding(backbone, grid)] * blocks
    kept = max(int(images * (1 - stochastic.drop_path)), 1)
    if kept == images:
        return [BlockInputs(embedding) for embedding in embeddings]
    order = torch.rand(2, blocks, images, generator=generator).argsort(-1)
    device = _periods(backbone).device
    by_attention, by_mlp = order[..., :kept].contiguous().to(device, non_blocking=True)
    each = zip(embeddings, by_attention.unbind(), by_mlp.unbind(), strict=True)
    return [BlockInputs(*inputs) for inputs in each]


def _embedding(backbone: Backbone, grid: tuple[int, int]) -> Tensor:
    dtype = ROPE_DTYPES[backbone.architecture.rope_dtype]
    return rotary_embedding(_periods(backbone), grid, dtype)


def _periods(backbone: Backbone) -> Tensor:
    return backbone.vit.rope.get_buffer("periods")


def augmented_embeddings(
    backbone: Backbone,
    grid: tuple[int, int],
    stochastic: StochasticOptions,
    generator: torch.Generator,
) -> Float[Tensor, "block patch width"]:
    """Return each block's rotary embedding of coordinates shifted, jittered and rescaled."""
    blocks = len(backbone.vit.blocks)
    # in [-1, 1): two for the shift, two for the jitter, one for both axes' scale
    drawn = 2 * torch.rand(blocks, 5, generator=generator) - 1
    shift = drawn[:, :2] * (stochastic.rope_shift or 0)
    logarithm = drawn[:, 2:4] * math.log(stochastic.rope_jitter or 1)
    logarithm = logarithm + drawn[:, 4:] * math.log(stochastic.rope_rescale or 1)
    # (c + shift) * factor in every axis
    periods = _periods(backbone)
    dtype = ROPE_DTYPES[backbone.architecture.rope_dtype]
    shift, factor = torch.stack([shift, logarithm.exp()]).to(
        periods.device, dtype, non_blocking=True
    )
    return rotary_embedding(periods, grid, dtype, shift=shift, factor=factor)


class PackedBlock(nn.Module):
    """The layers of one of timm's blocks, with a forward that takes several groups of crops.

    It takes over the layers under their own names, so that checkpoints, which name parameters, hold
    the same whether blocks are packed or not; FSDP2 and torch.compile act on its forward.

    Args:
        block: Whose layers to take; as it was afterwards. Its drop path is not run:
            ``BlockInputs`` say which images are kept.
    """

    def __init__(self, block: EvaBlock) -> None:
        super().__init__()
        self.norm1, self.attn, self.gamma_1 = block.norm1, block.attn, block.gamma_1
        self.norm2, self.mlp, self.gamma_2 = block.norm2, block.mlp, block.gamma_2

    def forward(
        self, groups: Sequence[Float[Tensor, "_ _ _"]], inputs: Sequence[BlockInputs]
    ) -> list[Float[Tensor, "_ _ _"]]:
        """Run the block.

        Args:
            groups: (B, N, D) for each group of crops of one size.
            inputs: What comes with each of them.

        Returns:
            Tensors of the same shapes.
        """
        kept = [i.kept_by_attention for i in inputs]
        parts = _select(groups, kept)
        branch = self._attend(_flat(parts), parts, [i.embedding for i in inputs])
        groups = _add(groups, kept, branch, self.gamma_1)
        kept = [i.kept_by_mlp for i in inputs]
        parts = _select(groups, kept)
        branch = self.mlp(self.norm2(_flat(parts))).split([p.shape[:2].numel() for p in parts])
        return _add(groups, kept, branch, self.gamma_2)

    def _attend(
        self, tokens: Tensor, parts: Sequence[Tensor], embeddings: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """Return the attention branch of every group's tokens, each (b * N, D)."""
        attn = self.attn
        bias = None
        if attn.q_bias is not None:  # timm registers the keys' constant zero as a buffer
            bias = torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))  # type: ignore[arg-type]
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


def pack_blocks(backbone: Backbone) -> Backbone:
    """Put packed blocks in the place of a backbone's own, around the same parameters."""
    blocks = backbone.vit.blocks
    for i, block in enumerate(blocks):
        if isinstance(block, EvaBlock):
            blocks[i] = PackedBlock(block)
    return backbone


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
