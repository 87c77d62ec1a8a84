"""``meddinov3 pretrain --dry-run``: parameters, operations and memory, counted; one step, timed."""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TextIO

import torch

from nnunetv2_meddinov3.models.architecture import Architecture
from nnunetv2_meddinov3.pretrain.config import (
    GLOBAL_CROPS,
    Head,
    Resolution,
    StageConfig,
    effective_lr_factor,
)
from nnunetv2_meddinov3.pretrain.distributed import Runtime, started
from nnunetv2_meddinov3.pretrain.loader import said_of_slices
from nnunetv2_meddinov3.pretrain.train import Stage
from nnunetv2_meddinov3.signals import Stop

_GROUP_ON_CPU = 2  # images: the fewest that losses can be computed of
# masked patches per image as a share of a global crop's: 2 x 0.5 x mean(0.1, 0.5)
_SHOWN_BY_IBOT = 0.3


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
    of_global = GLOBAL_CROPS * forward_flops(a, resolution.global_size)
    of_local = crops.local_crops * forward_flops(a, resolution.local_size)
    patches = (resolution.global_size // a.patch_size) ** 2
    masked = _SHOWN_BY_IBOT * patches
    dino, ibot = (
        2.0 * head_parameters(a.embed_dim, h) for h in (config.heads.dino, config.heads.ibot)
    )
    teacher_heads = GLOBAL_CROPS * dino + masked * ibot
    student_heads = (GLOBAL_CROPS + crops.local_crops) * dino + masked * ibot
    gram = 0.0
    if resolution.gram_size and config.losses.gram.weight and config.losses.gram.teacher != "ema":
        gram = GLOBAL_CROPS * forward_flops(a, resolution.gram_size)
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
            (GLOBAL_CROPS, widest.global_size),
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
    rows += (2 * GLOBAL_CROPS + config.crops.local_crops) * config.heads.dino.prototypes
    return {
        "networks": networks / 1e9,
        "activations": images * tokens * per_token / 1e9,
        "logits": images * rows * 16 / 1e9,  # fp32 logits, log-softmax, targets, gradient
    }


def resident_gb() -> float:
    """Return the main memory that this process holds, in GB; 0 where the system keeps quiet."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e9


def describe(config: StageConfig, a: Architecture, runtime: Runtime, process_gb: float = 0) -> str:
    """Return crops, grids, parameters, operations and memory of a stage as text.

    Args:
        config: Of the stage.
        a: Of the backbone.
        runtime: This process.
        process_gb: Memory beside what is counted: the process itself, on the CPU.
    """
    optim, engine, crops = config.optim, config.engine, config.crops
    per_rank = optim.batch_size // runtime.world_size
    at_once = engine.micro_batch or per_rank
    factor = effective_lr_factor(config)
    lines = [
        f"stage {config.stage}",
        f"  images per step        {optim.batch_size} = {runtime.world_size} processes x "
        f"{per_rank // at_once} micro-batches x {at_once}",
        f"  learning rate          {_peak(config) * factor:.3g} = {_peak(config):.3g} x "
        f"{factor:.3f} (sqrt(batch / 512))",
    ]
    for each in crops.resolutions:
        sizes = [f"{GLOBAL_CROPS} x {_grid(each.global_size, a)}"]
        sizes += [f"{crops.local_crops} x {_grid(each.local_size, a)}"]
        sizes += [f"Gram {_grid(each.gram_size, a)}"] if each.gram_size else []
        share = f" in {100 * each.probability:.0f} % of steps" if len(crops.resolutions) > 1 else ""
        flops = step_flops(config, a, each)
        lines.append(f"  crops                  {', '.join(sizes)}{share}")
        lines.append(
            f"  operations per image   {flops.total / 1e9:.1f} GFLOP: student "
            f"{flops.student / 1e9:.1f}, teacher {flops.teacher / 1e9:.1f}, heads "
            f"{flops.heads / 1e9:.1f}, Gram teacher {flops.gram / 1e9:.1f}"
        )
    heads = [head_parameters(a.embed_dim, h) for h in (config.heads.dino, config.heads.ibot)]
    lines.append(
        f"  parameters             backbone {backbone_parameters(a) / 1e6:.1f} M, heads "
        f"{heads[0] / 1e6:.1f} M and {heads[1] / 1e6:.1f} M"
    )
    memory = memory_gb(config, a, at_once, runtime.precision == "bf16")
    if process_gb:
        memory = {"process": process_gb, **memory}
    parts = ", ".join(f"{name} {value:.1f}" for name, value in memory.items())
    lines.append(
        f"  memory of a process    about {sum(memory.values()):.1f} GB ({parts}; counted without "
        "sharding)"
    )
    return "\n".join(lines)


def _peak(config: StageConfig) -> float:
    lr = config.optim.lr
    return max(lr.start, lr.peak, lr.end)


def _grid(size: int, a: Architecture) -> str:
    return f"{size} px ({size // a.patch_size} x {size // a.patch_size} patches)"


def dry_run(stages: tuple[StageConfig, ...], stream: TextIO) -> None:
    """Describe each stage and make one step of it; nothing is kept.

    The step has random weights, so that neither weights nor an earlier stage must be there. On the
    CPU it is of two images; elsewhere of one micro-batch.

    Args:
        stages: Configs, checked by ``stages.check``.
        stream: Where to write, by the main process.

    Raises:
        UserError: If a config does not fit the store.
    """
    with started(stages[0].engine) as runtime:
        base = resident_gb()  # Python, torch and the other libraries
        for config in stages:
            seconds, images, architecture = _time_a_step(config, runtime)
            process = 0.0
            if runtime.device.type == "cpu":  # what the step left there, less what is counted
                small = memory_gb(config, architecture, images, runtime.precision == "bf16")
                process = max(base, resident_gb() - sum(small.values()))
            whole = seconds * config.optim.batch_size / images
            time_of_all = in_words(whole * config.optim.steps)
            if runtime.is_main:
                stream.write("".join(f"{line}\n" for line in said_of_slices(config)))
                stream.write(
                    f"{describe(config, architecture, runtime, process)}\n"
                    f"  one step               {seconds:.2f} s for {images} images on "
                    f"{runtime.device.type}: {images / seconds:.1f} images/s, about {time_of_all} "
                    f"for {config.optim.steps} steps of {config.optim.batch_size}\n\n"
                )
                stream.flush()


def in_words(seconds: float) -> str:
    """Return a duration in the unit in which it is a small number, such as ``11 min``."""
    for unit, length, up_to in (("s", 1, 90), ("min", 60, 90), ("h", 3600, 48)):
        if (value := seconds / length) < up_to:
            return f"{value:.2g} {unit}" if value < 10 else f"{value:.0f} {unit}"
    return f"{seconds / 86400:.1f} days"


def _time_a_step(config: StageConfig, runtime: Runtime) -> tuple[float, int, Architecture]:
    """Return the seconds of one step after a first one, its images, and the architecture."""
    small = _shortened(config, runtime)
    with tempfile.TemporaryDirectory() as folder:
        stage = Stage(small, Path(folder) / "stage", runtime, previous=None, stream=None)
        batches = stage.loader.iterate(0)
        for _ in range(2):  # the first compiles and allocates
            views = next(batches)
            start = time.perf_counter()
            stage.one_step(views, Stop())
            if runtime.device.type == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - start
            stage.step += 1
        batches.close()
        stage.observer.close()
        return seconds, small.optim.batch_size, stage.start.architecture


def _shortened(config: StageConfig, runtime: Runtime) -> StageConfig:
    """Return the config of one step that needs neither weights nor an earlier stage."""
    small = config.model_copy(deep=True)
    small.init.source, small.init.optimizer = "none", False
    gram = small.losses.gram
    if gram.weight is not None:
        gram.weight.start = gram.weight.peak = gram.weight.end  # from the first step on
        if gram.teacher != "ema":
            gram.teacher = "init"
    if runtime.device.type == "cpu":
        small.losses.koleo_group, small.engine.micro_batch = _GROUP_ON_CPU, None
    at_once = small.engine.micro_batch or small.losses.koleo_group
    small.optim.batch_size = at_once * runtime.world_size
    small.engine.probe_every, small.engine.tensorboard, small.engine.wandb = None, False, None
    small.data.workers = 0
    return small
