"""The operations of a training step, counted from its config."""

from __future__ import annotations

from dataclasses import dataclass

from nnunetv2_meddinov3.models.architecture import Architecture
from nnunetv2_meddinov3.pretrain.config import GLOBAL_CROPS, Resolution, StageConfig
from nnunetv2_meddinov3.pretrain.memory import SHOWN_BY_IBOT, head_parameters


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


def step_flops(config: StageConfig, a: Architecture, resolution: Resolution) -> Flops:
    """Return the operations of one step for one image (checked against torch's counter)."""
    crops = config.crops
    of_global = GLOBAL_CROPS * forward_flops(a, resolution.global_size)
    of_local = crops.local_crops * forward_flops(a, resolution.local_size)
    patches = (resolution.global_size // a.patch_size) ** 2
    masked = SHOWN_BY_IBOT * patches
    dino, ibot = (
        2.0 * head_parameters(a.embed_dim, h) for h in (config.heads.dino, config.heads.ibot)
    )
    teacher_heads = GLOBAL_CROPS * dino + masked * ibot
    student_heads = (GLOBAL_CROPS + crops.local_crops) * dino + masked * ibot
    gram = 0.0
    if resolution.gram_size and config.losses.gram.weight and config.losses.gram.teacher != "ema":
        gram = GLOBAL_CROPS * forward_flops(a, resolution.gram_size)
    return Flops(of_global, 3 * (of_global + of_local), teacher_heads + 3 * student_heads, gram)


def mean_flops(config: StageConfig, a: Architecture) -> float:
    """Return the operations of one step for one image, on average over the resolutions."""
    each = [
        (resolution.probability, step_flops(config, a, resolution).total)
        for resolution in config.crops.resolutions
    ]
    return sum(p * flops for p, flops in each) / sum(p for p, _ in each)
