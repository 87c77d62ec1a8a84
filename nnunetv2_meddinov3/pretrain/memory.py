"""The memory of a training process: counted from a config, and measured on a CPU."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from nnunetv2_meddinov3.models.architecture import Architecture
from nnunetv2_meddinov3.pretrain.config import GLOBAL_CROPS, Head, Resolution, StageConfig

# masked patches per image as a share of a global crop's: 2 x 0.5 x mean(0.1, 0.5)
SHOWN_BY_IBOT = 0.3
# what a CPU holds of activations for each byte that is counted, at least: products of the backward
# pass, and gaps that the allocator leaves (1.5 to 2 of ViT-S in the three stages)
_ON_CPU = 1.6
_SINKHORN = 5  # copies of the logits that are in memory at once: joined, scaled, exp, two products


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


def widest(config: StageConfig, a: Architecture) -> Resolution:
    """Return the resolution of a stage with most tokens."""
    return max(
        config.crops.resolutions, key=lambda each: (_tokens(config, a, each), each.gram_size or 0)
    )


def _tokens(config: StageConfig, a: Architecture, resolution: Resolution) -> int:
    """Return the tokens of an image's crops."""
    crops = (
        (GLOBAL_CROPS, resolution.global_size),
        (config.crops.local_crops, resolution.local_size),
    )
    return sum(count * ((size // a.patch_size) ** 2 + 1 + a.num_registers) for count, size in crops)


def memory_gb(
    config: StageConfig, a: Architecture, images: int, is_bf16: bool, of_step: int | None = None
) -> dict[str, float]:
    """Count the memory of a process without sharding, in GB.

    Args:
        config: Of the stage.
        a: Of the backbone.
        images: Forwarded at once.
        is_bf16: Whether activations are.
        of_step: Images of the process in a step, which may be several micro-batches; by default
            ``images``.

    Returns:
        ``networks`` (weights, gradients, AdamW, teachers), ``activations``, ``logits``, and
        ``targets`` (views, targets and the teacher's features of the whole step, and what making
        the targets takes beyond activations and logits, which come after it).
    """
    of_step = images if of_step is None else of_step
    heads = sum(head_parameters(a.embed_dim, h) for h in (config.heads.dino, config.heads.ibot))
    backbone = backbone_parameters(a)
    gram = config.losses.gram
    has_gram = gram.weight is not None and gram.teacher != "ema"
    networks = 4 * (5 * (backbone + heads) + has_gram * backbone)  # w, grad, m, v, teacher
    half, resolution = (2 if is_bf16 else 4), widest(config, a)
    products = 2 if a.ffn == "mlp" else 3
    # kept by a block for its backward pass: two residuals in fp32, the rest as computed
    block = 8 * a.embed_dim + half * (9 * a.embed_dim + products * a.ffn_hidden)
    kept = 4 * a.embed_dim * a.depth + block
    per_token = kept if config.engine.activation_checkpointing else a.depth * block
    activations = images * _tokens(config, a, resolution) * per_token
    of_ibot = _masked(a, resolution) * config.heads.ibot.prototypes
    rows = of_ibot + (2 * GLOBAL_CROPS + config.crops.local_crops) * config.heads.dino.prototypes
    logits = images * rows * 16  # fp32 logits, log-softmax, targets, gradient
    held, made = _of_step(config, a, resolution)
    targets = of_step * held + max(0.0, of_step * made - activations - logits)
    parts = {
        "networks": networks, "activations": activations, "logits": logits, "targets": targets
    }  # fmt: skip
    return {name: value / 1e9 for name, value in parts.items()}


def _masked(a: Architecture, resolution: Resolution) -> float:
    return SHOWN_BY_IBOT * (resolution.global_size // a.patch_size) ** 2


def _of_step(config: StageConfig, a: Architecture, resolution: Resolution) -> tuple[float, float]:
    """Return the bytes for an image that last for a step, and those that making targets takes."""
    patches = (resolution.global_size // a.patch_size) ** 2
    pixels = GLOBAL_CROPS * (resolution.global_size**2 + (resolution.gram_size or 0) ** 2)
    pixels += config.crops.local_crops * resolution.local_size**2
    dino = GLOBAL_CROPS * config.heads.dino.prototypes
    ibot = _masked(a, resolution) * config.heads.ibot.prototypes
    features = GLOBAL_CROPS * (patches + 1) * a.embed_dim
    return 4 * (pixels + dino + ibot + features), 4 * _SINKHORN * max(dino, ibot)


@dataclass(frozen=True)
class Measured:
    """Peaks of small steps on a CPU.

    Attributes:
        peaks: Images forwarded at once -> most main memory of this process, in GB.
    """

    peaks: dict[int, float]

    def memory_gb(
        self, config: StageConfig, a: Architecture, images: int, is_bf16: bool, of_step: int
    ) -> dict[str, float]:
        """Return what ``memory_gb`` does as far as it was measured, and the ``process`` beside it.

        What a step of more images takes follows from two that were measured: on a CPU products of
        the backward pass and gaps of the allocator come to what is counted.
        """
        counted = {n: _both(memory_gb(config, a, n, is_bf16)) for n in self.peaks}
        few, many = min(self.peaks), max(self.peaks)
        grown = _ON_CPU
        if many > few:
            slope = (self.peaks[many] - self.peaks[few]) / (counted[many] - counted[few])
            grown = max(slope, _ON_CPU)  # few images may fit into what building networks left
        at_once, whole = (memory_gb(config, a, images, is_bf16, n) for n in (images, of_step))
        process = self.peaks[many] - at_once["networks"] - grown * counted[many]
        parts = {name: grown * at_once[name] for name in ("activations", "logits", "targets")}
        parts["targets"] += whole["targets"] - at_once["targets"]
        return {"process": process, "networks": at_once["networks"], **parts}


def _both(parts: dict[str, float]) -> float:
    """Return what grows with the images that are forwarded at once."""
    return sum(value for name, value in parts.items() if name != "networks")
