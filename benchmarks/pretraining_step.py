"""Where the time of a pretraining step goes: parts, operators, and waits for the device.

    python benchmarks/pretraining_step.py --size vit_small --prototypes 65536 --images 8

Two global crops and eight local ones of random noise per image, one micro-batch, one process. The
parts are timed in every step and their medians printed; then one step runs under torch's profiler,
which counts operators and what would make a GPU's host wait (``item``, ``nonzero``). AdamW is timed
fused, as the run uses it, and as its foreach form, in turns.
"""

import argparse
import copy
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

from nnunetv2_meddinov3.models.architecture import architecture_of
from nnunetv2_meddinov3.models.backbone import Backbone
from nnunetv2_meddinov3.pretrain.distillation import Distillation
from nnunetv2_meddinov3.pretrain.heads import ProjectionHead
from nnunetv2_meddinov3.pretrain.optim import PARTS
from nnunetv2_meddinov3.pretrain.student import StochasticOptions, Student
from nnunetv2_meddinov3.pretrain.views.batch import ViewBatch

T = TypeVar("T")
_WAITS = ("aten::_local_scalar_dense", "aten::nonzero")


class Step:
    """A step of stage 1 whose parts can be timed one by one."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(0)
        self.device = torch.device(args.device)
        architecture = architecture_of(args.size)
        dim = architecture.embed_dim
        heads = [ProjectionHead(dim, args.prototypes) for _ in range(2)]
        backbone = Backbone(architecture, mask_token=True)
        student = Student(backbone, *heads, StochasticOptions(drop_path=0.3, rope_rescale=2.0))
        teacher = copy.deepcopy(student)
        self.distillation = Distillation(student, teacher).to(self.device)
        n, patches = args.images, (args.global_side // architecture.patch_size) ** 2
        masks = torch.rand(2 * n, patches) < 0.25
        self.batch = ViewBatch(
            torch.randn(2 * n, 1, args.global_side, args.global_side),
            torch.randn(8 * n, 1, args.local_side, args.local_side),
            masks,
            images=n,
        ).to(self.device)
        parameters = list(student.parameters())
        self.fused = torch.optim.AdamW(parameters, 1e-4, fused=True)
        self.foreach = torch.optim.AdamW(parameters, 1e-4, foreach=True)
        self.number = 0
        self.seconds: dict[str, list[float]] = defaultdict(list)

    def timed(self, name: str, function: Callable[[], T]) -> T:
        """Run a part and note its seconds."""
        start = time.perf_counter()
        result = function()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds[name].append(time.perf_counter() - start)
        return result

    def gradients(self, generator: torch.Generator) -> None:
        """Run teacher and student, forward and backward, and clip."""
        networks = self.distillation
        (targets,) = self.timed("teacher, Sinkhorn", lambda: networks.targets([self.batch], 0.05))
        losses, _ = self.timed(
            "student, losses",
            lambda: networks.losses(
                networks.student,
                self.batch,
                targets,
                local_weight=1.0,
                gram_weight=0.0,
                generator=generator,
            ),
        )
        self.timed("backward", losses["total"].backward)
        for part in PARTS:
            parameters = list(getattr(networks.student, part).parameters())
            torch.nn.utils.clip_grad_norm_(parameters, 3.0)

    def run(self) -> None:
        """Make a step; both forms of AdamW take it."""
        self.gradients(torch.Generator().manual_seed(self.number))
        ways = [("AdamW, fused", self.fused), ("AdamW, foreach", self.foreach)]
        for name, optimizer in ways if self.number % 2 else ways[::-1]:
            self.timed(name, optimizer.step)
        self.fused.zero_grad(set_to_none=True)
        self.timed("moving average", lambda: self.distillation.update_teacher(0.99))
        self.number += 1

    def counted(self) -> tuple[int, int, int]:
        """Return operators of the student's forward pass and of a step, and a step's waits."""
        networks = self.distillation
        with profile(activities=[ProfilerActivity.CPU]) as forward, torch.no_grad():
            networks.student(
                self.batch.global_crops,
                self.batch.mask_indices,
                masks=self.batch.masks,
                local_crops=self.batch.local_crops,
                generator=torch.Generator().manual_seed(0),
            )
        with profile(activities=[ProfilerActivity.CPU]) as step:
            self.gradients(torch.Generator().manual_seed(0))
            networks.update_teacher(0.99)
        waits = sum(event.name in _WAITS for event in step.events())
        return operators(forward), operators(step), waits


def operators(found: profile) -> int:
    """Count what was called, not what those calls call."""
    events = found.events() or []
    return sum(e.cpu_parent is None and e.name.startswith("aten::") for e in events)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="vit_small")
    parser.add_argument("--prototypes", type=int, default=65536)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--global-side", type=int, default=128)
    parser.add_argument("--local-side", type=int, default=64)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    step = Step(args)
    for _ in range(args.steps + 1):
        step.run()
    print(f"torch {torch.__version__}, {args.threads} threads, {args.device}; {vars(args)}")
    medians = {name: statistics.median(times[1:]) for name, times in step.seconds.items()}
    whole = sum(medians.values()) - medians["AdamW, foreach"]
    for name, median in medians.items():
        share = "" if name == "AdamW, foreach" else f"{median / whole:8.0%}"
        print(f"{name:22}{median * 1000:9.0f} ms{share}")
    print(f"{'step':22}{whole * 1000:9.0f} ms")
    forward, step_operators, waits = step.counted()
    said = f"{forward} operators in the student's forward pass, {step_operators} in a step"
    print(f"{said} without AdamW")
    print(f"{waits} waits for the device in a step")


if __name__ == "__main__":
    main()
