"""One step: forward, backward, update of student and teacher; a function of its arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nnunetv2_meddinov3.pretrain.distillation import Distillation
from nnunetv2_meddinov3.pretrain.distributed import Parallel
from nnunetv2_meddinov3.pretrain.optim import clip_gradients, set_rates
from nnunetv2_meddinov3.pretrain.views.batch import ViewBatch
from nnunetv2_meddinov3.signals import Stop


class StepResult(NamedTuple):
    """The result of a step.

    Attributes:
        losses: Name -> mean over this rank's micro-batches, on the device.
        observed: Tensors of the last micro-batch for the figures of health.
        norms: Part of the student -> norm of its gradient before clipping.
        skipped: Whether a loss or gradient of some rank was not finite, and nothing was updated.
        stopped: Whether some rank was told to stop.
    """

    losses: dict[str, Tensor]
    observed: dict[str, Tensor]
    norms: dict[str, Tensor]
    skipped: bool
    stopped: bool


def train_step(
    distillation: Distillation,
    parallel: Parallel,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[ViewBatch],
    generators: Sequence[torch.Generator],
    stop: Stop,
    *,
    lr: float,
    last_layer_lr: float,
    weight_decay: float,
    momentum: float,
    teacher_temp: float,
    local_weight: float,
    gram_weight: float,
    clip_grad: float,
    shared_seed: int = 0,
) -> StepResult:
    """Forward, backward, update of student and teacher.

    Args:
        distillation: The networks.
        parallel: How the student is run.
        optimizer: Of the student.
        batches: The micro-batches of this rank.
        generators: One for each, for what the student draws.
        stop: Signals that came to this process.
        lr: Learning rate, scaled to the batch; up to ``gram_weight``, all are the values of
            ``schedules.Schedules`` at this step.
        last_layer_lr: Learning rate of the last layers of both heads.
        weight_decay: Weight decay of AdamW.
        momentum: Momentum of the teacher's moving average.
        teacher_temp: Temperature of the targets.
        local_weight: Factor of the local DINO term.
        gram_weight: Factor of the Gram loss.
        clip_grad: Largest gradient norm of each part of the student.
        shared_seed: For what all ranks draw alike.
    """
    set_rates(optimizer, lr=lr, weight_decay=weight_decay, last_layer_lr=last_layer_lr)
    losses, observed = forward_backward(
        distillation,
        parallel,
        batches,
        generators,
        teacher_temp=teacher_temp,
        local_weight=local_weight,
        gram_weight=gram_weight,
        shared_seed=shared_seed,
    )
    norms = clip_gradients(distillation.student, clip_grad)
    finite = torch.isfinite(torch.stack([losses["total"], *norms.values()])).all()
    # one exchange and one look at the device per step
    signs = torch.stack([~finite, torch.tensor(stop.number is not None).to(finite.device)])
    skipped, stopped = parallel.runtime.reduce(signs.int(), "MAX").tolist()
    if not skipped:
        optimizer.step()
        distillation.update_teacher(momentum)
    optimizer.zero_grad(set_to_none=True)
    return StepResult(losses, observed, norms, bool(skipped), bool(stopped))


def forward_backward(
    distillation: Distillation,
    parallel: Parallel,
    batches: Sequence[ViewBatch],
    generators: Sequence[torch.Generator],
    *,
    teacher_temp: float,
    local_weight: float,
    gram_weight: float,
    shared_seed: int = 0,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Accumulate the gradients of all micro-batches; arguments as for ``train_step``.

    Returns:
        The mean of each loss over the micro-batches, and what is observed of the last.
    """
    means: dict[str, Tensor] = {}
    observed: dict[str, Tensor] = {}
    with parallel.autocast():
        targets = distillation.targets(batches, teacher_temp)
    for i, (batch, target) in enumerate(zip(batches, targets, strict=True)):
        with parallel.accumulating(is_last=i == len(batches) - 1):
            with parallel.autocast():
                losses, observed = distillation.losses(
                    parallel.student,
                    batch,
                    target,
                    local_weight=local_weight,
                    gram_weight=gram_weight,
                    generator=generators[i],
                    shared_seed=shared_seed,
                )
            (losses["total"] / len(batches)).backward()
        for name, loss in losses.items():
            share = loss.detach() / len(batches)
            means[name] = means[name] + share if name in means else share
    return means, observed
