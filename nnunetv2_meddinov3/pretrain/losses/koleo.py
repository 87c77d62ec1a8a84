"""The spreading loss: features of a batch must not crowd."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class KoLeoLoss(nn.Module):
    """Kozachenko-Leonenko entropy of normalised features (Sablayrolles et al. 2019; DINOv2).

    Args:
        group: Images among which a neighbour is searched; None for the whole batch. A fixed group
            makes the value independent of the number of ranks and of accumulation steps.
        eps: Added to distances before the logarithm.
    """

    def __init__(self, group: int | None = None, eps: float = 1e-8) -> None:
        super().__init__()
        if group is not None and group < 2:
            raise ValueError(f"group must be at least 2 images, got {group}")
        self.group, self.eps = group, eps

    def forward(self, cls: Float[Tensor, "batch dim"]) -> Float[Tensor, ""]:
        """Return minus the mean logarithm of the distance to the nearest neighbour.

        Args:
            cls: Tokens before any head; computed in fp32, as bf16 cannot tell neighbours apart.

        Raises:
            ValueError: If there are fewer than two images, or groups do not divide the batch.
        """
        b = len(cls)
        group = self.group or b
        if b < 2 or b % group:
            raise ValueError(
                f"KoLeo needs at least two images and whole groups of {group}, got a batch of {b}"
            )
        x = F.normalize(cls.float(), dim=-1, eps=self.eps).view(b // group, group, -1)
        with torch.no_grad():
            similarity = x @ x.mT
            similarity.diagonal(dim1=1, dim2=2).fill_(-1)
            nearest = similarity.argmax(-1)  # (groups, group)
        neighbour = x.gather(1, nearest[..., None].expand_as(x))
        distance = (x - neighbour + self.eps).norm(dim=-1)
        return -(distance + self.eps).log().mean()
