"""``meddinov3 pretrain --dry-run``: parameters, operations and memory, counted; one step, timed."""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch

from nnunetv2_meddinov3.models.architecture import Architecture
from nnunetv2_meddinov3.pretrain.config import (
    GLOBAL_CROPS,
    StageConfig,
    effective_lr_factor,
)
from nnunetv2_meddinov3.pretrain.distributed import Runtime, started
from nnunetv2_meddinov3.pretrain.loader import open_store, said_of_slices
from nnunetv2_meddinov3.pretrain.memory import (
    Measured,
    backbone_parameters,
    head_parameters,
    memory_gb,
    widest,
)
from nnunetv2_meddinov3.pretrain.operations import mean_flops, step_flops
from nnunetv2_meddinov3.pretrain.stated import of_random_weights
from nnunetv2_meddinov3.pretrain.train import Stage
from nnunetv2_meddinov3.pretrain.views.batch import ViewBatch, join
from nnunetv2_meddinov3.processes import forget_peak, installed_gb, peak_gb
from nnunetv2_meddinov3.progress import in_words
from nnunetv2_meddinov3.signals import Stop

_GROUP_ON_CPU = 2  # images: the fewest that losses can be computed of
_SECONDS_ON_CPU = 60.0  # of all threads, for the largest step whose memory is measured
_SHARE_ON_CPU = 0.25  # of the machine's memory that it may take


@dataclass(frozen=True)
class Step:
    """A step that was made.

    Attributes:
        seconds: It took, at the largest crops.
        images: It was of.
        architecture: Of the backbone.
        measured: Its memory; None where it is not measured.
    """

    seconds: float
    images: int
    architecture: Architecture
    measured: Measured | None


def describe(
    config: StageConfig, a: Architecture, runtime: Runtime, measured: Measured | None = None
) -> str:
    """Return crops, grids, parameters, operations and memory of a stage as text.

    Args:
        config: Of the stage.
        a: Of the backbone.
        runtime: This process.
        measured: Memory of small steps, from which that of whole ones follows.
    """
    optim, crops = config.optim, config.crops
    per_rank = optim.batch_size // runtime.world_size
    at_once = _at_once(config, runtime)
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
    is_bf16 = runtime.precision == "bf16"
    count = memory_gb if measured is None else measured.memory_gb
    memory = count(config, a, at_once, is_bf16, per_rank)
    parts = ", ".join(f"{name} {value:.1f}" for name, value in memory.items())
    how = "counted without sharding" if measured is None else "from measured small steps"
    lines.append(f"  memory of a process    about {sum(memory.values()):.1f} GB ({parts}; {how})")
    return "\n".join(lines)


def _at_once(config: StageConfig, runtime: Runtime) -> int:
    """Return how many images a process forwards at once: whole groups of them."""
    per_rank, group = config.optim.batch_size // runtime.world_size, config.losses.koleo_group
    micro = config.engine.micro_batch
    return per_rank if micro is None else min(per_rank, max(1, micro // group) * group)


def _peak(config: StageConfig) -> float:
    lr = config.optim.lr
    return max(lr.start, lr.peak, lr.end)


def _grid(size: int, a: Architecture) -> str:
    return f"{size} px ({size // a.patch_size} x {size // a.patch_size} patches)"


def dry_run(stages: tuple[StageConfig, ...], stream: TextIO) -> None:
    """Describe each stage and make one step of it; nothing is kept.

    The step has random weights, so that neither weights nor an earlier stage must be there, and the
    largest crops. On the CPU it is of two images; elsewhere of one micro-batch.

    Args:
        stages: Configs, checked by ``stages.check``.
        stream: Where to write, by the main process.

    Raises:
        UserError: If a config does not fit the store.
    """
    with started(stages[0].engine) as runtime:
        for config in stages:
            step = _make_a_step(config, runtime)
            gc.collect()  # its networks
            whole = step.seconds * config.optim.batch_size / step.images
            a = step.architecture  # the step was of the largest crops
            whole *= mean_flops(config, a) / step_flops(config, a, widest(config, a)).total
            time_of_all = in_words(whole * config.optim.steps)
            if runtime.is_main:
                said = said_of_slices(config, *open_store(config))
                stream.write("".join(f"{line}\n" for line in said))
                stream.write(
                    f"{describe(config, step.architecture, runtime, step.measured)}\n"
                    f"  one step               {step.seconds:.2f} s for {step.images} images on "
                    f"{runtime.device.type}: {step.images / step.seconds:.1f} images/s, about "
                    f"{time_of_all} for {config.optim.steps} steps of {config.optim.batch_size}\n\n"
                )
                stream.flush()


def _make_a_step(config: StageConfig, runtime: Runtime) -> Step:
    """Make a first step, one that is timed, and on the CPU one of more images for its memory."""
    small = _shortened(config, runtime)
    images = small.optim.batch_size
    with tempfile.TemporaryDirectory() as folder:
        stage = Stage(small, Path(folder) / "stage", runtime, previous=None, stream=None)
        a = stage.start.architecture
        batches = stage.loader.iterate(0)
        _seconds_of(stage, next(batches))  # compiles and allocates
        forget_peak()
        before = time.process_time()
        seconds = _seconds_of(stage, next(batches))
        of_threads = time.process_time() - before  # whatever else the machine does meanwhile
        measured = None
        if runtime.device.type == "cpu" and (peak := peak_gb()) is not None:
            measured = Measured({images: peak})
            more = _affordable(config, a, runtime, of_threads / images)
            micro_batches = min(2, config.optim.batch_size // runtime.world_size // more)
            if more > images:
                for _ in range(2):  # gaps of the allocator grow from one to the next
                    _seconds_of(stage, _joined(batches, more // images) * micro_batches)
                measured = Measured({images: peak, more: peak_gb() or peak})
        batches.close()
        stage.observer.close()
        return Step(seconds, images, a, measured)


def _seconds_of(stage: Stage, views: list[ViewBatch]) -> float:
    start = time.perf_counter()
    stage.one_step(views, Stop())
    if stage.runtime.device.type == "cuda":
        torch.cuda.synchronize()
    stage.step += 1
    return time.perf_counter() - start


def _joined(batches: Iterator[list[ViewBatch]], steps: int) -> list[ViewBatch]:
    """Return the images of several steps as one micro-batch."""
    return [join([batch for _ in range(steps) for batch in next(batches)])]


def _affordable(config: StageConfig, a: Architecture, runtime: Runtime, seconds: float) -> int:
    """Return of how many images a step is made to measure its memory.

    Args:
        config: Of the stage.
        a: Of the backbone.
        runtime: This process; all make a step of as many images.
        seconds: That an image takes all threads.
    """
    images = min(
        max(int(_SECONDS_ON_CPU / max(seconds, 1e-3)), 2 * _GROUP_ON_CPU), _at_once(config, runtime)
    )
    is_bf16, free = runtime.precision == "bf16", _SHARE_ON_CPU * installed_gb()
    while images > _GROUP_ON_CPU and sum(memory_gb(config, a, images, is_bf16).values()) > free:
        images //= 2
    images = images // _GROUP_ON_CPU * _GROUP_ON_CPU
    return int(runtime.reduce(torch.tensor(images), "MIN").item())


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
    small.crops.resolutions = [widest(config, of_random_weights(config))]
    return small
