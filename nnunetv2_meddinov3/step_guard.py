"""Optimiser steps that leave out a batch whose loss or gradient is not finite."""

from collections.abc import Callable
from typing import Any

import torch
from torch import distributed, nn

from nnunetv2_meddinov3.errors import UserError


class StepGuard:
    """Skip the steps of an optimiser that would write NaN or infinity into the weights.

    This is for runs without nnU-Net's gradient scaler (bf16, fp32, MPS), and does what the scaler
    does: it looks at the elements of the gradients, and a skipped step leaves weights and moments
    untouched. It looks at the loss besides. It hangs on hooks of the optimiser and of the loss, so
    a trainer with a ``train_step`` of its own is guarded too. In DDP all ranks skip together.

    nnU-Net clips the gradients before the step: an element that is not finite makes others NaN but
    stays not finite itself, so it is still seen here.

    Args:
        optimizer: Whose steps are guarded.
        loss: What computes the loss; only a module's values are looked at.
        limit: Skipped steps in a row after which the run stops.
        say: Writes a sentence to the log.

    Attributes:
        batch: What the next step is made from, with the names of the cases under ``keys``.
        skipped: Whether the last step was skipped.
        in_a_row: How many were, up to the last one.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        loss: Any,
        limit: int,
        say: Callable[[str], None],
    ) -> None:
        self.limit, self.say = limit, say
        self.batch: dict[str, Any] = {}
        self.skipped, self.in_a_row = False, 0
        self._loss: torch.Tensor | None = None
        optimizer.register_step_pre_hook(self._before_step)
        if isinstance(loss, nn.Module):
            loss.register_forward_hook(self._see_loss)

    def _see_loss(self, module: nn.Module, inputs: Any, loss: Any) -> None:
        if isinstance(loss, torch.Tensor) and loss.requires_grad:  # not a validation's
            self._loss = loss.detach()

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Take the gradients away from a step that must not be: it then changes nothing.

        Raises:
            UserError: If it is the last of ``limit`` in a row.
        """
        parameters = [p for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        is_bad = ~torch.isfinite(norm)
        if self._loss is not None:
            is_bad = is_bad | ~torch.isfinite(self._loss).all()
        self._loss = None
        self.skipped = agreed(is_bad)
        if not self.skipped:
            self.in_a_row = 0
            return
        for parameter in parameters:
            parameter.grad = None
        self.in_a_row += 1
        cases = self._cases()
        self.say(
            f"A batch with a loss or gradient of NaN or infinity is left out, {self.in_a_row} in a "
            f"row ({self.limit} stop the run): {cases}."
        )
        if self.in_a_row >= self.limit:
            raise UserError(
                f"training must have finite losses and gradients, but {self.in_a_row} batches in a "
                f"row had NaN or infinity, the last with {cases}: correct these images and "
                "preprocess them again; if they are finite, lower the learning rates."
            )

    def _cases(self) -> str:
        """Name the cases of the batch, of all ranks, and those whose images are not finite."""
        names = [str(name) for name in self.batch.get("keys", ())]
        images = self.batch.get("data", ())
        poisoned = [n for n, x in zip(names, images, strict=False) if not torch.isfinite(x).all()]
        if _is_distributed():
            everybody: list[Any] = [None] * distributed.get_world_size()
            distributed.all_gather_object(everybody, (names, poisoned))
            names, poisoned = (
                [n for part in parts for n in part] for parts in zip(*everybody, strict=True)
            )
        text = f"cases {', '.join(dict.fromkeys(names)) or 'of unknown names'}"
        if poisoned:
            text += f"; NaN or infinity is in the images of {', '.join(dict.fromkeys(poisoned))}"
        return text


def _is_distributed() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def agreed(flag: torch.Tensor) -> bool:
    """Return whether a flag is set on any rank: the same answer on all of them."""
    if _is_distributed():
        number = flag.float()
        distributed.all_reduce(number, distributed.ReduceOp.MAX)
        return bool(number.item())
    return bool(flag.item())
