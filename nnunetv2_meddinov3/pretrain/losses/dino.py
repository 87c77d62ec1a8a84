"""The image-level loss: every student view against every teacher view of the same image."""

import torch
from torch import Tensor, nn


class DINOLoss(nn.Module):
    """Cross-entropy between teacher assignments and student logits (DINO, eq. 1; DINOv3, sec. 3).

    Args:
        student_temp: Temperature of the student's softmax.
    """

    def __init__(self, student_temp: float = 0.1) -> None:
        super().__init__()
        self.student_temp = student_temp

    def forward(
        self, student_logits: Tensor, teacher_probs: Tensor, ignore_diagonal: bool = False
    ) -> Tensor:
        """Average the cross-entropy over view pairs and images.

        Args:
            student_logits: (S, B, K) of S student views.
            teacher_probs: (T, B, K) of T teacher views; no gradient is taken through them.
            ignore_diagonal: Leave out the pairs of equal index, where both saw the same view.

        Returns:
            A scalar.

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
        log_probs = (student_logits.float() / self.student_temp).log_softmax(-1)
        # s, t = student and teacher views, b = images, k = prototypes
        losses = -torch.einsum("sbk,tbk->st", log_probs, teacher_probs.detach().float())
        total = losses.sum() - losses.diagonal().sum() if ignore_diagonal else losses.sum()
        return total / (b * pairs)
