"""Cross-entropy with the teacher's assignments: of whole views (DINO), of masked patches (iBOT)."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn


class _CrossEntropyLoss(nn.Module):
    """What both losses share.

    Args:
        student_temp: Temperature of the student's softmax.
    """

    def __init__(self, student_temp: float = 0.1) -> None:
        super().__init__()
        self.student_temp = student_temp

    def log_probs(
        self, logits: Float[Tensor, "*rows prototype"]
    ) -> Float[Tensor, "*rows prototype"]:
        """Return the student's log-probabilities in fp32."""
        return (logits.float() / self.student_temp).log_softmax(-1)


class DINOLoss(_CrossEntropyLoss):
    """The image-level loss: every student view against every teacher view of the same image.

    Cross-entropy between teacher assignments and student logits (DINO, eq. 1; DINOv3, sec. 3).

    Args:
        student_temp: Temperature of the student's softmax.
    """

    def forward(
        self,
        student_logits: Float[Tensor, "student image prototype"],
        teacher_probs: Float[Tensor, "teacher image prototype"],
        ignore_diagonal: bool = False,
    ) -> Float[Tensor, ""]:
        """Average the cross-entropy over view pairs and images.

        Args:
            student_logits: Of S student views of B images.
            teacher_probs: Of T teacher views of the same; no gradient is taken through them.
            ignore_diagonal: Leave out the pairs of equal index, where both saw the same view.

        Raises:
            ValueError: If the shapes do not fit, or no pair is left.
        """
        if student_logits.ndim != 3 or student_logits.shape[1:] != teacher_probs.shape[1:]:
            raise ValueError(
                "student_logits (S, B, K) and teacher_probs (T, B, K) must share B and K, got "
                f"{tuple(student_logits.shape)} and {tuple(teacher_probs.shape)}"
            )
        s, b, _ = student_logits.shape
        t = len(teacher_probs)
        pairs = s * t - (min(s, t) if ignore_diagonal else 0)
        if not pairs or not b:
            raise ValueError(f"no pair of views is left of {s} student and {t} teacher views")
        # s, t = student and teacher views, b = images, k = prototypes
        losses = -torch.einsum(
            "sbk,tbk->st", self.log_probs(student_logits), teacher_probs.detach().float()
        )
        total = losses.sum() - losses.diagonal().sum() if ignore_diagonal else losses.sum()
        return total / (b * pairs)


class IBOTLoss(_CrossEntropyLoss):
    """The patch-level loss: masked patches of the student against the teacher's unmasked ones.

    Cross-entropy at masked patches, averaged per crop (iBOT, eq. 2; DINOv3, sec. 3).

    Args:
        student_temp: Temperature of the student's softmax.
    """

    def forward(
        self,
        student_logits: Float[Tensor, "masked prototype"],
        teacher_probs: Float[Tensor, "masked prototype"],
        mask: Bool[Tensor, "crop patch"],
        mask_indices: Int[Tensor, " masked"] | None = None,
    ) -> Float[Tensor, ""]:
        """Average within each crop over its masked patches, then over all crops.

        Crops without a masked patch count in the last average, as in the original: with half of the
        crops masked the value is half of a mean cross-entropy.

        Args:
            student_logits: At the masked patches, in the order of ``mask``.
            teacher_probs: At the same patches; no gradient is taken through them.
            mask: True = masked out.
            mask_indices: Of the masked patches in the flattened ``mask``; given, nothing is read
                back from a GPU.

        Raises:
            ValueError: If the shapes do not fit.
        """
        if mask_indices is None:
            mask_indices = mask.flatten().nonzero()[:, 0]
        if student_logits.shape != teacher_probs.shape or len(student_logits) != len(mask_indices):
            raise ValueError(
                "student_logits and teacher_probs must be (M, K) for "
                f"{len(mask_indices)} masked patches, "
                f"got {tuple(student_logits.shape)} and {tuple(teacher_probs.shape)}"
            )
        log_probs = self.log_probs(student_logits)
        losses = -(teacher_probs.detach().float() * log_probs).sum(-1)  # (M,)
        # (crops, 1) -> (crops, patches) -> (M,)
        weight = 1 / mask.sum(1, keepdim=True).clamp(min=1)
        return (losses * weight.expand_as(mask).flatten()[mask_indices]).sum() / len(mask)
