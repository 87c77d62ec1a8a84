"""Student, teacher and Gram teacher: from a batch of views to named losses (DINOv3, sec. 3, 4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nnunetv2_meddinov3.models.backbone import Backbone
from nnunetv2_meddinov3.pretrain.losses import (
    DINOLoss,
    GramLoss,
    IBOTLoss,
    KoLeoLoss,
    sinkhorn_knopp,
)
from nnunetv2_meddinov3.pretrain.student import GramTeacher, Outputs, Student
from nnunetv2_meddinov3.pretrain.views.batch import ViewBatch


@dataclass(frozen=True)
class LossOptions:
    """Weights and options that stay the same over a stage; see ``schema.Losses``."""

    dino_weight: float = 1.0
    ibot_weight: float = 1.0
    koleo_weight: float = 0.1
    koleo_group: int | None = None
    ignore_diagonal: bool = True
    student_temp: float = 0.1
    gram: bool = False
    gram_from_teacher: bool = False
    remove_negatives: bool = False


class Targets(NamedTuple):
    """What the teacher wants of the student, for one micro-batch of B images.

    Attributes:
        cls: (G, B, K) assignments of the global crops.
        patches: (M, K') assignments of the masked patches.
        cls_features: (G * B, D) of the teacher, before its head.
        patch_features: (G * B, P, D) of the teacher.
    """

    cls: Tensor
    patches: Tensor
    cls_features: Tensor
    patch_features: Tensor


class Distillation(nn.Module):
    """The networks of a stage and the losses between them.

    Args:
        student: What is trained.
        teacher: Its moving average, of the same architecture.
        gram_teacher: An earlier teacher's backbone for Gram anchoring, or None.
        options: Weights and options of the losses.

    Attributes:
        teacher_temp: Temperature of the targets; set for every step.
        local_weight: Factor of the local DINO term; set for every step.
        gram_weight: Factor of the Gram loss; set for every step.
        seen: Detached tensors of the last ``losses``, for the figures of health.
    """

    def __init__(
        self,
        student: Student,
        teacher: Student,
        gram_teacher: Backbone | None = None,
        options: LossOptions = LossOptions(),
    ) -> None:
        super().__init__()
        self.student, self.teacher, self.options = student, teacher, options
        self.gram_teacher = None if gram_teacher is None else GramTeacher(gram_teacher)
        for frozen in (teacher, gram_teacher):
            if frozen is not None:
                frozen.requires_grad_(False)
        self.teacher_temp, self.local_weight, self.gram_weight = 0.07, 1.0, 0.0
        self._runner: tuple[Callable] = (student,)
        self.seen: dict[str, Tensor] = {}
        self.dino_loss = DINOLoss(options.student_temp)
        self.ibot_loss = IBOTLoss(options.student_temp)
        self.koleo_loss = KoLeoLoss(options.koleo_group)
        self.gram_loss = GramLoss(options.remove_negatives)
        self.train()

    @property
    def student_forward(self) -> Callable:
        """What runs the student: itself, or DDP around it."""
        return self._runner[0]

    def run_student_by(self, runner: Callable) -> None:
        """Let DDP run the student; in a tuple, as a module would register as a second student."""
        self._runner = (runner,)

    def train(self, mode: bool = True) -> Distillation:
        """Switch the student alone: the teachers are always in evaluation mode."""
        super().train(mode)
        self.teacher.eval()
        if self.gram_teacher is not None:
            self.gram_teacher.eval()
        return self

    @torch.no_grad()
    def targets(self, batches: Sequence[ViewBatch]) -> list[Targets]:
        """Run the teacher on all micro-batches of a step, then Sinkhorn-Knopp over all of them.

        Images of all ranks and micro-batches are assigned together, so that neither changes what
        the student is to learn.

        Args:
            batches: The micro-batches of this rank.

        Returns:
            One for each.
        """
        outputs = [self.teacher(batch.global_crops, batch.mask_indices) for batch in batches]
        with _without_autocast(batches[0].global_crops):
            cls = sinkhorn_knopp(torch.cat([o.dino_global for o in outputs]), self.teacher_temp)
            patches = sinkhorn_knopp(torch.cat([o.ibot for o in outputs]), self.teacher_temp)
        cls_parts = cls.split([len(o.dino_global) for o in outputs])
        patch_parts = patches.split([len(o.ibot) for o in outputs])
        return [
            Targets(c.unflatten(0, (-1, b.images)), p, o.cls_global, o.patches_global)
            for c, p, o, b in zip(cls_parts, patch_parts, outputs, batches, strict=True)
        ]

    def losses(
        self,
        batch: ViewBatch,
        targets: Targets | None = None,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """Run the student on a micro-batch and compare it with its targets.

        Args:
            batch: Views of B images.
            targets: From ``targets``; computed for this batch alone if None.
            generator: On the CPU, for drop path and RoPE augmentation.

        Returns:
            Scalars ``dino_local``, ``dino_global``, ``koleo`` (mean over crops), ``ibot``, ``gram``
            (in stages with it) and their weighted sum ``total``.
        """
        if targets is None:
            targets = self.targets([batch])[0]
        out = self.student_forward(
            batch.global_crops,
            batch.mask_indices,
            masks=batch.masks,
            local_crops=batch.local_crops,
            generator=generator,
        )
        anchor = self._anchor(targets, batch)
        with _without_autocast(batch.global_crops):
            losses = self._compare(out, targets, anchor, batch)
        self.seen = {
            "cls_student": out.cls_global.detach(),
            "patches_student": out.patches_global.detach(),
            "cls_teacher": targets.cls_features,
            "patches_teacher": targets.patch_features,
            "cls_targets": targets.cls.flatten(0, 1),
            "patch_targets": targets.patches,
        }
        return losses

    def _compare(
        self, out: Outputs, targets: Targets, anchor: Tensor | None, batch: ViewBatch
    ) -> dict[str, Tensor]:
        crops, local_crops = len(targets.cls), len(batch.local_crops) // batch.images
        by_crop = lambda t: t.unflatten(0, (-1, batch.images))  # noqa: E731
        losses = {
            "dino_local": self.dino_loss(by_crop(out.dino_local), targets.cls),
            "dino_global": self.dino_loss(
                by_crop(out.dino_global), targets.cls, self.options.ignore_diagonal
            ),
            "koleo": torch.stack(
                [self.koleo_loss(cls) for cls in out.cls_global.chunk(crops)]
            ).mean(),
            "ibot": self.ibot_loss(out.ibot, targets.patches, batch.masks, batch.mask_indices),
        }
        if self.options.gram:
            losses["gram"] = (
                out.patches_global.new_zeros((), dtype=torch.float32)
                if anchor is None
                else self.gram_loss(out.patches_global, anchor)
            )
        losses["total"] = self._total(losses, crops, local_crops)
        return losses

    def _total(self, losses: dict[str, Tensor], crops: int, local_crops: int) -> Tensor:
        """Sum with the original's weights: DINO terms by their number of pairs, KoLeo per crop."""
        options = self.options
        global_pairs = crops * (crops - 1) if options.ignore_diagonal else crops * crops
        local_pairs = crops * local_crops
        pairs = global_pairs + local_pairs
        dino = (
            global_pairs / pairs * losses["dino_global"]
            + self.local_weight * local_pairs / pairs * losses["dino_local"]
        )
        total = (
            options.dino_weight * dino
            + options.koleo_weight * crops * losses["koleo"]
            + options.ibot_weight * losses["ibot"]
        )
        return total + self.gram_weight * losses["gram"] if "gram" in losses else total

    @torch.no_grad()
    def _anchor(self, targets: Targets, batch: ViewBatch) -> Tensor | None:
        """Patch tokens the Gram loss holds on to; None, and no forward, while its weight is 0."""
        if not self.options.gram or self.gram_weight == 0:
            return None
        if self.options.gram_from_teacher:
            return targets.patch_features
        if self.gram_teacher is None or batch.gram_crops is None:
            raise ValueError("Gram anchoring needs a Gram teacher and Gram crops, got one without")
        tokens = self.gram_teacher(batch.gram_crops)
        patch = self.gram_teacher.backbone.patch_size
        return resize_tokens(
            tokens,
            tuple(side // patch for side in batch.gram_crops.shape[-2:]),
            tuple(side // patch for side in batch.global_crops.shape[-2:]),
        )

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """Move the teacher's parameters towards the student's: t = m * t + (1 - m) * s."""
        ours = [_local(p) for p in self.teacher.parameters()]
        theirs = [_local(p) for p in self.student.parameters()]
        torch._foreach_lerp_(ours, theirs, 1 - momentum)

    @torch.no_grad()
    def refresh_gram_teacher(self) -> None:
        """Copy the teacher's backbone into the Gram teacher."""
        if self.gram_teacher is not None:
            ours = [_local(t) for t in _tensors(self.gram_teacher.backbone)]
            torch._foreach_copy_(ours, [_local(t) for t in _tensors(self.teacher.backbone)])


def resize_tokens(tokens: Tensor, grid: tuple[int, ...], target: tuple[int, ...]) -> Tensor:
    """Resize patch tokens (B, P, D) from one grid to another, bicubic, before normalisation."""
    if grid == target:
        return tokens
    maps = tokens.float().transpose(1, 2).unflatten(2, grid)
    maps = F.interpolate(maps, target, mode="bicubic", align_corners=False, antialias=False)
    return maps.flatten(2).transpose(1, 2)


def _without_autocast(where: Tensor) -> torch.autocast:
    """Keep losses and targets in fp32: autocast runs products of fp32 tensors in bf16."""
    return torch.autocast(where.device.type, enabled=False)


def _tensors(backbone: Backbone) -> list[Tensor]:
    return [*backbone.parameters(), *backbone.buffers()]


def _local(tensor: Tensor) -> Tensor:
    """This rank's share of a tensor that FSDP2 sharded; student and teacher are sharded alike."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
