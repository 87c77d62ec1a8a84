"""The patch-level loss: masked patches of the student against the teacher's unmasked ones."""

from torch import Tensor, nn


class IBOTLoss(nn.Module):
    """Cross-entropy at masked patches, averaged per crop (iBOT, eq. 2; DINOv3, sec. 3).

    Args:
        student_temp: Temperature of the student's softmax.
    """

    def __init__(self, student_temp: float = 0.1) -> None:
        super().__init__()
        self.student_temp = student_temp

    def forward(
        self,
        student_logits: Tensor,
        teacher_probs: Tensor,
        mask: Tensor,
        masked: Tensor | None = None,
    ) -> Tensor:
        """Average within each crop over its masked patches, then over all crops.

        Crops without a masked patch count in the last average, as in the original: with half of the
        crops masked the value is half of a mean cross-entropy.

        Args:
            student_logits: (M, K) at the masked patches, in the order of ``mask``.
            teacher_probs: (M, K) at the same patches; no gradient is taken through them.
            mask: (crops, patches), True = masked out.
            masked: (M,) numbers of the masked patches in the flattened ``mask``; given, nothing is
                read back from a GPU.

        Returns:
            A scalar.

        Raises:
            ValueError: If the shapes do not fit.
        """
        masked = mask.flatten().nonzero()[:, 0] if masked is None else masked
        if student_logits.shape != teacher_probs.shape or len(student_logits) != len(masked):
            raise ValueError(
                f"student_logits and teacher_probs must be (M, K) for {len(masked)} masked "
                f"patches, "
                f"got {tuple(student_logits.shape)} and {tuple(teacher_probs.shape)}"
            )
        log_probs = (student_logits.float() / self.student_temp).log_softmax(-1)
        losses = -(teacher_probs.detach().float() * log_probs).sum(-1)  # (M,)
        # (crops, 1) -> (crops, patches) -> (M,)
        weight = 1 / mask.sum(1, keepdim=True).clamp(min=1)
        return (losses * weight.expand_as(mask).flatten()[masked]).sum() / len(mask)
