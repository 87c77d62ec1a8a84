"""How unsure a prediction is: the entropy of mean probabilities."""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor, nn
from torch.nn import functional as F

from nnunetv2_meddinov3.errors import UserError


class WithProbabilities(nn.Module):
    """A network whose output has its probabilities behind its logits, twice as many channels.

    The sliding window averages both over mirrorings, tiles and folds. The entropy of mean
    probabilities is large where members disagree, which that of mean logits need not be.

    Args:
        network: Gives logits.
        has_regions: Whether each channel is a region of its own (sigmoid), not a class (softmax).
    """

    def __init__(self, network: nn.Module, has_regions: bool) -> None:
        super().__init__()
        self.network, self.has_regions = network, has_regions

    def forward(
        self, images: Float[Tensor, "batch channel height width"]
    ) -> Float[Tensor, "batch both height width"]:
        """Return logits and probabilities."""
        logits = self.network(images)
        scores = logits.float()
        probabilities = scores.sigmoid() if self.has_regions else scores.softmax(1)
        return torch.cat([logits, probabilities.to(logits.dtype)], 1)


def entropy_share(
    probabilities: Float[Tensor, "class height width"], has_regions: bool
) -> Float32[Tensor, "height width"]:
    """Return the entropy of each pixel as a share of the largest possible, 0 to 1.

    Args:
        probabilities: Means, rounded to half precision: they need not sum to 1 exactly.
        has_regions: Whether each channel is a region of its own; the mean over them is returned.
    """
    p = probabilities.float().clamp(0, 1)
    if has_regions:
        return ((_summand(p) + _summand(1 - p)) / math.log(2)).mean(0)
    p = p / p.sum(0).clamp_min(1e-6)
    return _summand(p).sum(0) / math.log(len(p))


def _summand(p: Tensor) -> Tensor:
    return -torch.special.xlogy(p, p)


def doubt(
    probabilities: Float[Tensor, "class rows columns"], has_regions: bool, shape: tuple[int, ...]
) -> Float32[np.ndarray, "height width"]:
    """Return ``entropy_share``, of the network's pixels, interpolated to a shape."""
    share = entropy_share(probabilities, has_regions)
    if tuple(share.shape) != shape:
        share = F.interpolate(share[None, None], shape, mode="bilinear")[0, 0]
    return share.cpu().numpy()


def not_measurable() -> UserError:
    """Return the sentence about a model whose slices are not resampled one by one."""
    return UserError(
        "--uncertainty is for 2D configurations with linear resampling, but this model has "
        "another: leave it out."
    )
