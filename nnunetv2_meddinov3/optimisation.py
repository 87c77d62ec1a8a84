"""Optimisers, learning rates of parts of a network, and their decay, as trainers use them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from nnunetv2_meddinov3.models.backbone import Backbone


class GroupwisePolyLR(LRScheduler):
    """Polynomial decay that keeps the ratio between parameter groups.

    nnU-Net's own scheduler writes one learning rate into every group. This one scales each group's
    ``initial_lr`` by ``(1 - step / max_steps) ** exponent`` and is a function of the step alone, so
    a resumed run continues exactly.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, max_steps: int, exponent: float = 1.0
    ) -> None:
        self.max_steps, self.exponent = max_steps, exponent
        super().__init__(optimizer)

    def step(self, epoch: int | None = None) -> None:
        """Set the learning rates of an epoch (nnU-Net passes it); of the next one without it."""
        self.last_epoch = self.last_epoch + 1 if epoch is None else epoch
        factor = max(0.0, 1 - self.last_epoch / self.max_steps) ** self.exponent
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]


def adamw(groups: list[dict[str, Any]], weight_decay: float) -> torch.optim.Optimizer:
    """Return the paper's optimiser for groups with learning rates of their own."""
    return torch.optim.AdamW(groups, weight_decay=weight_decay, betas=(0.9, 0.98))


def layerwise_groups(
    backbone: Backbone, learning_rate: float, decay: float
) -> list[dict[str, Any]]:
    """Return a group per block of a ViT, each with ``decay`` times the rate of the next one.

    The last block and the final norm have the rate itself; what comes before the blocks has that of
    the first, decayed once more. Parameters without a gradient are left out.

    Args:
        backbone: The ViT.
        learning_rate: Of the last block.
        decay: Factor from a block to the one before; 1 gives one group.
    """
    groups: dict[int, list[nn.Parameter]] = {}
    for name, parameter in backbone.named_parameters():
        if parameter.requires_grad:
            below = max(0, backbone.depth - backbone.layer_of(name))
            groups.setdefault(0 if decay == 1 else below, []).append(parameter)
    return [
        {"params": parameters, "lr": learning_rate * decay**below}
        for below, parameters in sorted(groups.items())
    ]


def nnunet_sgd(groups: list[dict[str, Any]], weight_decay: float) -> torch.optim.Optimizer:
    """Return nnU-Net's kind of optimiser for groups with learning rates of their own."""
    return torch.optim.SGD(groups, weight_decay=weight_decay, momentum=0.99, nesterov=True)
