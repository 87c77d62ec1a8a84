"""Student, teacher and Gram teacher: from a batch of views to named losses (DINOv3, sec. 3, 4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from nnunetv2_meddinov3.models.backbone import Backbone
from nnunetv2_meddinov3.pretrain.losses import (
    DINOLoss,
    GramLoss,
    IBOTLoss,
    KoLeoLoss,
    SIGRegLoss,
    sinkhorn_knopp,
)
from nnunetv2_meddinov3.pretrain.student import GramTeacher, Outputs, Student
from nnunetv2_meddinov3.pretrain.views.batch import ViewBatch


@dataclass(frozen=True)
class LossOptions:
    """Weights and options that stay the same over a stage, as in its config's ``losses``."""

    dino_weight: float = 1.0
    ibot_weight: float = 1.0
    koleo_weight: float = 0.1
    koleo_group: int | None = None
    sigreg_weight: float | None = None  # in place of KoLeo, None: KoLeo
    sigreg_slices: int = 1024
    ignore_diagonal: bool = True
    student_temp: float = 0.1
    gram: bool = False
    gram_from_teacher: bool = False


class Targets(NamedTuple):
    """What the teacher wants of the student, for one micro-batch.

    Attributes:
        cls: Assignments of the global crops.
        patches: Assignments of the masked patches.
        cls_features: Of the teacher, before its head.
        patch_features: Of the teacher.
    """

    cls: Float[Tensor, "crop image prototype"]
    patches: Float[Tensor, "masked ibot_prototype"]
    cls_features: Float[Tensor, "globals dim"]
    patch_features: Float[Tensor, "globals patch dim"]


class Distillation(nn.Module):
    """The networks of a stage and the losses between them.

    Args:
        student: What is trained.
        teacher: Its moving average, of the same architecture.
        gram_teacher: An earlier teacher's backbone for Gram anchoring, or None.
        options: Weights and options of the losses.
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
        self.dino_loss = DINOLoss(options.student_temp)
        self.ibot_loss = IBOTLoss(options.student_temp)
        self.koleo_loss = KoLeoLoss(options.koleo_group)
        self.sigreg_loss = SIGRegLoss(options.sigreg_slices)
        self.gram_loss = GramLoss()
        self.train()

    def train(self, mode: bool = True) -> Distillation:
        """Switch the student alone: the teachers are always in evaluation mode."""
        super().train(mode)
        self.teacher.eval()
        if self.gram_teacher is not None:
            self.gram_teacher.eval()
        return self

    @torch.no_grad()
    def targets(self, batches: Sequence[ViewBatch], teacher_temp: float) -> list[Targets]:
        """Run the teacher on all micro-batches of a step, then Sinkhorn-Knopp over all of them.

        Images of all ranks and micro-batches are assigned together, so that neither changes what
        the student is to learn.

        Args:
            batches: The micro-batches of this rank.
            teacher_temp: Temperature of the targets.

        Returns:
            One for each.
        """
        outputs = [self.teacher(batch.global_crops, batch.mask_indices) for batch in batches]
        with _without_autocast(batches[0].global_crops):
            cls = sinkhorn_knopp(torch.cat([o.dino_global for o in outputs]), teacher_temp)
            patches = sinkhorn_knopp(torch.cat([o.ibot for o in outputs]), teacher_temp)
        cls_parts = cls.split([len(o.dino_global) for o in outputs])
        patch_parts = patches.split([len(o.ibot) for o in outputs])
        return [
            Targets(c.unflatten(0, (-1, b.images)), p, o.cls_global, o.patches_global)
            for c, p, o, b in zip(cls_parts, patch_parts, outputs, batches, strict=True)
        ]

    def losses(
        self,
        run_student: Callable[..., Outputs],
        batch: ViewBatch,
        targets: Targets,
        *,
        local_weight: float,
        gram_weight: float,
        generator: torch.Generator | None = None,
        shared_seed: int = 0,
    ) -> tuple[dict[str, Float[Tensor, ""]], dict[str, Tensor]]:
        """Run the student on a micro-batch and compare it with its targets.

        Args:
            run_student: The student, or DDP around it.
            batch: Views of B images.
            targets: One of those that ``targets`` returned.
            local_weight: Factor of the local DINO term.
            gram_weight: Factor of the Gram loss; at 0 the Gram teacher is not run.
            generator: On the CPU, for drop path and RoPE augmentation.
            shared_seed: For what all ranks draw alike, SIGReg's directions.

        Returns:
            Losses ``dino_local``, ``dino_global``, ``koleo`` or ``sigreg`` (mean over crops),
            ``ibot``, ``gram`` (in stages with it) and their weighted sum ``total``; and what is
            observed: detached tensors of both networks for the figures of health.
        """
        out = run_student(
            batch.global_crops,
            batch.mask_indices,
            masks=batch.masks,
            local_crops=batch.local_crops,
            generator=generator,
        )
        anchor = self._anchor(targets, batch) if self.options.gram and gram_weight else None
        with _without_autocast(batch.global_crops):
            losses = self._compare(out, targets, anchor, batch, shared_seed)
            crops, local_crops = len(targets.cls), len(batch.local_crops) // batch.images
            losses["total"] = self._total(losses, crops, local_crops, local_weight, gram_weight)
        observed = {
            "cls_student": out.cls_global.detach(),
            "patches_student": out.patches_global.detach(),
            "cls_teacher": targets.cls_features,
            "patches_teacher": targets.patch_features,
            "cls_targets": targets.cls.flatten(0, 1),
            "patch_targets": targets.patches,
        }
        return losses, observed

    def _compare(
        self,
        out: Outputs,
        targets: Targets,
        anchor: Tensor | None,
        batch: ViewBatch,
        shared_seed: int,
    ) -> dict[str, Tensor]:
        def by_crop(logits: Tensor) -> Tensor:
            return logits.unflatten(0, (-1, batch.images))

        assert out.dino_local is not None  # every batch has local crops
        ignore_diagonal = self.options.ignore_diagonal
        crops = out.cls_global.chunk(len(targets.cls))
        if self.options.sigreg_weight is None:
            spread = {"koleo": torch.stack([self.koleo_loss(cls) for cls in crops]).mean()}
        else:
            each = [self.sigreg_loss(cls, shared_seed) for cls in crops]
            spread = {"sigreg": torch.stack(each).mean()}
        losses = {
            "dino_local": self.dino_loss(by_crop(out.dino_local), targets.cls),
            "dino_global": self.dino_loss(by_crop(out.dino_global), targets.cls, ignore_diagonal),
            **spread,
            "ibot": self.ibot_loss(out.ibot, targets.patches, batch.masks, batch.mask_indices),
        }
        if self.options.gram:
            losses["gram"] = (
                out.patches_global.new_zeros((), dtype=torch.float32)
                if anchor is None
                else self.gram_loss(out.patches_global, anchor)
            )
        return losses

    def _total(
        self,
        losses: dict[str, Tensor],
        crops: int,
        local_crops: int,
        local_weight: float,
        gram_weight: float,
    ) -> Tensor:
        """Sum with the original's weights: DINO terms by their number of pairs, KoLeo per crop.

        SIGReg, which is not the original's, has its weight once.
        """
        options = self.options
        global_pairs = crops * (crops - 1) if options.ignore_diagonal else crops * crops
        local_pairs = crops * local_crops
        pairs = global_pairs + local_pairs
        dino = (
            global_pairs / pairs * losses["dino_global"]
            + local_weight * local_pairs / pairs * losses["dino_local"]
        )
        if options.sigreg_weight is None:
            spread = options.koleo_weight * crops * losses["koleo"]
        else:
            spread = options.sigreg_weight * losses["sigreg"]
        total = options.dino_weight * dino + spread + options.ibot_weight * losses["ibot"]
        return total + gram_weight * losses["gram"] if "gram" in losses else total

    @torch.no_grad()
    def _anchor(self, targets: Targets, batch: ViewBatch) -> Tensor:
        """Return the patch tokens that the Gram loss holds on to."""
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


def resize_tokens(
    tokens: Float[Tensor, "batch patch dim"], grid: tuple[int, ...], target: tuple[int, ...]
) -> Float[Tensor, "batch resized_patch dim"]:
    """Resize patch tokens from one grid (h, w) to another, bicubic, before normalisation."""
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
