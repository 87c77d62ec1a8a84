"""Two gloo processes against one with the doubled batch; started by test_ranks.py."""

import os
import sys
from pathlib import Path

import torch
from torch import distributed as dist

from nnunetv2_meddinov3.models.architecture import Architecture
from nnunetv2_meddinov3.models.backbone import Backbone
from nnunetv2_meddinov3.pretrain.checkpoints import whole_model
from nnunetv2_meddinov3.pretrain.config import Engine, Optim
from nnunetv2_meddinov3.pretrain.distillation import Distillation, LossOptions
from nnunetv2_meddinov3.pretrain.distributed import Parallel, Runtime
from nnunetv2_meddinov3.pretrain.export import whole_backbone
from nnunetv2_meddinov3.pretrain.heads import ProjectionHead
from nnunetv2_meddinov3.pretrain.optim import build_optimizer, clip_gradients, set_rates
from nnunetv2_meddinov3.pretrain.step import forward_backward
from nnunetv2_meddinov3.pretrain.student import Student
from nnunetv2_meddinov3.pretrain.views.batch import ViewBatch
from nnunetv2_meddinov3.pretrain.views.masking import draw_masks

IMAGES, GROUP = 8, 2


def networks(regulariser):
    def student(seed):
        torch.manual_seed(seed)
        architecture = Architecture(32, 2, 2, patch_size=8, layer_scale=0.5)
        heads = (ProjectionHead(32, 24, 20, 12) for _ in range(2))
        student = Student(Backbone(architecture, mask_token=True), *heads)
        with torch.no_grad():  # fresh weights are so small that every loss is the same
            for p in student.parameters():
                p.add_(0.1 * torch.randn(p.shape))
        return student

    gram = student(2).backbone
    sigreg_weight = 0.05 if regulariser == "sigreg" else None
    options = LossOptions(koleo_group=GROUP, gram=True, sigreg_weight=sigreg_weight)
    return Distillation(student(0), student(1), gram, options)


def views():
    """The whole batch; one mask for each group, as the loader draws them."""
    import numpy as np

    g = torch.Generator().manual_seed(0)
    crops = [torch.randn(n * IMAGES, 1, s, s, generator=g) for n, s in ((2, 32), (3, 16), (2, 48))]
    rng = np.random.default_rng(0)
    masks = [draw_masks(2 * GROUP, (4, 4), 0.5, (0.2, 0.5), rng) for _ in range(IMAGES // GROUP)]
    masks = torch.from_numpy(np.stack(masks)).unflatten(1, (2, GROUP)).transpose(0, 1)
    return ViewBatch(crops[0], crops[1], masks.flatten(0, 2), crops[2], IMAGES)


def run(way, micro_batches, out, regulariser):
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        dist.init_process_group("gloo")
    runtime = Runtime(rank, world, torch.device("cpu"), "fp32", False)
    distillation = networks(regulariser)
    parallel = Parallel(distillation, Engine(parallel=way), runtime)
    optimizer = build_optimizer(distillation.student, Optim(), runtime.device)
    set_rates(optimizer, 1e-3, 0.04, 1e-3)
    own = views().split(IMAGES // world)[rank]
    batches = own.split(own.images // micro_batches)
    means, _ = forward_backward(
        distillation,
        parallel,
        batches,
        [torch.Generator() for _ in batches],
        teacher_temp=0.06,
        local_weight=1.0,
        gram_weight=2.0,
        shared_seed=3,
    )
    gradients = {
        n: p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        for n, p in distillation.student.named_parameters()
    }
    gradients = {n: g.clone() for n, g in gradients.items()}
    norms = clip_gradients(distillation.student, 0.5)
    optimizer.step()
    distillation.update_teacher(0.9)
    losses = runtime.reduce(torch.stack(list(means.values()))) / world
    state = whole_model(distillation)
    exported = whole_backbone(distillation.teacher, runtime)
    assert bool(exported) == runtime.is_main
    if rank == 0:
        torch.save(
            {
                "losses": dict(zip(means, losses, strict=True)),
                "gradients": gradients,
                "norms": norms,
                "state": state,
                "exported": exported,
            },
            out,
        )
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    run(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
