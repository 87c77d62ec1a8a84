"""What a stage costs: parameters, operations, memory. Counted from its config, not measured."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from nnunetv2_meddinov3.models.architecture import Architecture
from nnunetv2_meddinov3.pretrain.config import Head, Resolution, StageConfig

_SHOWN_BY_IBOT = (
    0.3  # masked patches per image as a share of a global crop's: 2 x 0.5 x mean(0.1, 0.5)
)


@dataclass(frozen=True)
class Flops:
    """Operations for one image in one step, two for each multiplication with its addition.

    Attributes:
        teacher: Forward of the global crops.
        student: Forward and backward (twice the forward) of all crops.
        heads: Of both.
        gram: Forward of the Gram teacher.
    """

    teacher: float
    student: float
    heads: float
    gram: float

    @property
    def total(self) -> float:
        """Of a whole step, for one image, without drop path and recomputation."""
        return self.teacher + self.student + self.heads + self.gram


def forward_flops(a: Architecture, size: int) -> float:
    """Return the operations of one forward pass of one square crop.

    Args:
        a: Of the backbone.
        size: Side in pixels.
    """
    patches = (size // a.patch_size) ** 2
    tokens = patches + 1 + a.num_registers
    stem = patches * a.embed_dim * a.input_channels * a.patch_size**2
    products = 2 if a.ffn == "mlp" else 3
    block = (
        4 * tokens * a.embed_dim**2
        + 2 * tokens**2 * a.embed_dim
        + products * tokens * a.embed_dim * a.ffn_hidden
    )
    return 2.0 * (stem + a.depth * block)


def head_parameters(width: int, head: Head) -> int:
    """Return the number of parameters of a projection head."""
    widths = [width, *[head.hidden_dim] * (head.layers - 1), head.bottleneck_dim]
    layers = sum((n + 1) * m for n, m in pairwise(widths))
    return layers + head.bottleneck_dim * head.prototypes


def backbone_parameters(a: Architecture) -> int:
    """Return the number of parameters of a backbone, mask token included."""
    d, f = a.embed_dim, a.ffn_hidden
    attention = 4 * d * d + d + (2 * d if a.qkv_bias else 0)
    feed_forward = 2 * d * f + f + d if a.ffn == "mlp" else 3 * d * f + 2 * f + d
    scales = 0 if a.layer_scale is None else 2 * d
    block = attention + feed_forward + 4 * d + scales
    stem = d * a.input_channels * a.patch_size**2 + d
    return stem + a.depth * block + 2 * d + (2 + a.num_registers) * d


def step_flops(config: StageConfig, a: Architecture, resolution: Resolution) -> Flops:
    """Return the operations of one step for one image (checked against torch's counter)."""
    crops = config.crops
    of_global = crops.global_crops * forward_flops(a, resolution.global_size)
    of_local = crops.local_crops * forward_flops(a, resolution.local_size)
    patches = (resolution.global_size // a.patch_size) ** 2
    masked = _SHOWN_BY_IBOT * patches
    dino, ibot = (
        2.0 * head_parameters(a.embed_dim, h) for h in (config.heads.dino, config.heads.ibot)
    )
    teacher_heads = crops.global_crops * dino + masked * ibot
    student_heads = (crops.global_crops + crops.local_crops) * dino + masked * ibot
    gram = 0.0
    if resolution.gram_size and config.losses.gram.weight and config.losses.gram.teacher != "ema":
        gram = crops.global_crops * forward_flops(a, resolution.gram_size)
    return Flops(of_global, 3 * (of_global + of_local), teacher_heads + 3 * student_heads, gram)


def memory_gb(config: StageConfig, a: Architecture, images: int, is_bf16: bool) -> dict[str, float]:
    """Estimate the memory of a process without sharding, in GB.

    Args:
        config: Of the stage.
        a: Of the backbone.
        images: Forwarded at once.
        is_bf16: Whether activations are.

    Returns:
        ``networks`` (weights, gradients, AdamW, teachers), ``activations``, ``logits``.
    """
    heads = sum(head_parameters(a.embed_dim, h) for h in (config.heads.dino, config.heads.ibot))
    backbone = backbone_parameters(a)
    gram = config.losses.gram
    has_gram = gram.weight is not None and gram.teacher != "ema"
    networks = 4 * (5 * (backbone + heads) + has_gram * backbone)  # w, grad, m, v, teacher
    half, widest = (2 if is_bf16 else 4), max(config.crops.resolutions, key=lambda r: r.global_size)
    tokens = sum(
        count * ((size // a.patch_size) ** 2 + 1 + a.num_registers)
        for count, size in (
            (config.crops.global_crops, widest.global_size),
            (config.crops.local_crops, widest.local_size),
        )
    )
    products = 2 if a.ffn == "mlp" else 3
    # kept by a block for its backward pass: two residuals in fp32, the rest as computed
    block = 8 * a.embed_dim + half * (9 * a.embed_dim + products * a.ffn_hidden)
    kept = 4 * a.embed_dim * a.depth + block
    per_token = kept if config.engine.activation_checkpointing else a.depth * block
    patches = (widest.global_size // a.patch_size) ** 2
    rows = _SHOWN_BY_IBOT * patches * config.heads.ibot.prototypes
    rows += (
        2 * config.crops.global_crops + config.crops.local_crops
    ) * config.heads.dino.prototypes
    return {
        "networks": networks / 1e9,
        "activations": images * tokens * per_token / 1e9,
        "logits": images * rows * 16 / 1e9,  # fp32 logits, log-softmax, targets, gradient
    }
