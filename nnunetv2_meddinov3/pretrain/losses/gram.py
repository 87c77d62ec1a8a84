"""The anchoring loss: the relations between patches must stay those of an earlier teacher."""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class GramLoss(nn.Module):
    """Squared error between the patch-similarity (Gram) matrices (DINOv3, sec. 4.2).

    It ties the relations between patches to those of a Gram teacher, which keeps dense features
    from degrading in long runs.

    Args:
        remove_negatives: Whether negative similarities of both count as 0; no released run does.
    """

    def __init__(self, remove_negatives: bool = False) -> None:
        super().__init__()
        self.remove_negatives = remove_negatives

    def forward(
        self,
        student: Float[Tensor, "batch patch student_dim"],
        teacher: Float[Tensor, "batch patch teacher_dim"],
    ) -> Float[Tensor, ""]:
        """Average over all pairs of patches of an image, then over the batch.

        Args:
            student: Patch tokens after the last norm, before any head.
            teacher: The same patches as the Gram teacher sees them; no gradient is taken through
                them.

        Raises:
            ValueError: If the numbers of images or patches differ.
        """
        if student.ndim != 3 or student.shape[:2] != teacher.shape[:2]:
            raise ValueError(
                "student and teacher must be (B, P, D) with equal B and P, got "
                f"{tuple(student.shape)} and {tuple(teacher.shape)}"
            )
        student = F.normalize(student.float(), dim=-1)
        teacher = F.normalize(teacher.detach().float(), dim=-1)
        ours, theirs = student @ student.mT, teacher @ teacher.mT  # (B, P, P)
        if self.remove_negatives:
            ours, theirs = ours.clamp(min=0), theirs.clamp(min=0)
        return F.mse_loss(ours, theirs)
