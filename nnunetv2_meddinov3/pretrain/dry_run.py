"""``meddinov3 pretrain --dry-run``: sizes, memory and time of each stage, and one step of it."""

from __future__ import annotations

import copy
import tempfile
import time
from pathlib import Path
from typing import TextIO

import torch

from nnunetv2_meddinov3.models.architecture import Architecture
from nnunetv2_meddinov3.pretrain import costs
from nnunetv2_meddinov3.pretrain.config import StageConfig, check_world, effective_lr_factor
from nnunetv2_meddinov3.pretrain.distributed import Runtime, started, world_size
from nnunetv2_meddinov3.pretrain.train import Stage
from nnunetv2_meddinov3.signals import Stop

_GROUP_ON_CPU = 2  # images: the fewest that losses can be computed of


def describe(config: StageConfig, a: Architecture, runtime: Runtime) -> str:
    """Return crops, grids, parameters, operations and memory of a stage as text."""
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
        sizes = [f"{crops.global_crops} x {_grid(each.global_size, a)}"]
        sizes += [f"{crops.local_crops} x {_grid(each.local_size, a)}"]
        sizes += [f"Gram {_grid(each.gram_size, a)}"] if each.gram_size else []
        share = f" in {100 * each.probability:.0f} % of steps" if len(crops.resolutions) > 1 else ""
        flops = costs.step_flops(config, a, each)
        lines.append(f"  crops                  {', '.join(sizes)}{share}")
        lines.append(
            f"  operations per image   {flops.total / 1e9:.1f} GFLOP: student "
            f"{flops.student / 1e9:.1f}, "
            f"teacher {flops.teacher / 1e9:.1f}, heads {flops.heads / 1e9:.1f}, Gram teacher "
            f"{flops.gram / 1e9:.1f}"
        )
    heads = [costs.head_parameters(a.embed_dim, h) for h in (config.heads.dino, config.heads.ibot)]
    lines.append(
        f"  parameters             backbone {costs.backbone_parameters(a) / 1e6:.1f} M, heads "
        f"{heads[0] / 1e6:.1f} M and {heads[1] / 1e6:.1f} M"
    )
    memory = costs.memory_gb(config, a, at_once, runtime.precision == "bf16")
    parts = ", ".join(f"{name} {value:.1f}" for name, value in memory.items())
    lines.append(
        f"  memory of a process    about {sum(memory.values()):.1f} GB ({parts}; counted, "
        f"unsharded)"
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
        stages: Configs, with a store.
        stream: Where to write, by the main process.

    Raises:
        UserError: If a config does not fit the processes or the store.
    """
    for config in stages:
        check_world(config, world_size())
    with started(stages[0].engine) as runtime:
        for config in stages:
            seconds, images, architecture = _time_a_step(config, runtime)
            whole = seconds * config.optim.batch_size / images
            hours = whole * config.optim.steps / 3600
            if runtime.is_main:
                stream.write(
                    f"{describe(config, architecture, runtime)}\n"
                    f"  one step               {seconds:.2f} s for {images} images on "
                    f"{runtime.device.type}: {images / seconds:.1f} images/s, about {hours:.3g} h "
                    f"for "
                    f"{config.optim.steps} steps of {config.optim.batch_size}\n\n"
                )
                stream.flush()


def _time_a_step(config: StageConfig, runtime: Runtime) -> tuple[float, int, Architecture]:
    """Return the seconds of one step after a first one, its images, and the architecture."""
    small = copy.deepcopy(config)
    small.init.source, small.init.optimizer = "none", False
    if small.losses.gram.weight is not None:
        small.losses.gram.weight.start = small.losses.gram.weight.end  # from the first step on
        small.losses.gram.weight.peak = small.losses.gram.weight.end
        if small.losses.gram.teacher != "ema":
            small.losses.gram.teacher = "init"
    if runtime.device.type == "cpu":
        small.losses.koleo_group, small.engine.micro_batch = _GROUP_ON_CPU, None
    at_once = small.engine.micro_batch or small.losses.koleo_group
    small.optim.batch_size = at_once * runtime.world_size
    small.engine.probe_every, small.engine.tensorboard, small.engine.wandb = None, False, None
    small.data.workers = 0
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
