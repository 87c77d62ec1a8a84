"""What one forward pass sees: the views of some images and the masks of the student."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class ViewBatch:
    """The views of B images. Crops are crop-major: first crop 0 of every image, then crop 1.

    Attributes:
        global_crops: (G * B, C, H, W), normalised; C is 1, or the backbone's channels.
        local_crops: (L * B, C, h, w), normalised.
        masks: (G * B, P) bool over the patches of the global crops, True = masked out.
        gram_crops: (G * B, C, H', W'), the global crops at another size without photometric
            changes, or None.
        images: B.
        mask_indices: (M,) numbers of the masked patches in the flattened masks, ascending. Worked out on
            the CPU, they spare the wait that ``masks.nonzero()`` is on a GPU.
    """

    global_crops: Tensor
    local_crops: Tensor
    masks: Tensor
    gram_crops: Tensor | None = None
    images: int = 0
    mask_indices: Tensor | None = None

    def __post_init__(self) -> None:
        if not self.images:
            self.images = len(self.global_crops) // 2  # two global crops, as in every DINO
        for name in ("global_crops", "local_crops", "masks", "gram_crops"):
            value = getattr(self, name)
            if value is not None and len(value) % self.images:
                raise ValueError(
                    f"{name} must hold whole crops of {self.images} images, got {len(value)}"
                )
        if self.mask_indices is None:
            self.mask_indices = self.masks.flatten().nonzero()[:, 0]

    def to(self, device: torch.device | str, non_blocking: bool = True) -> ViewBatch:
        """Return the batch on a device."""
        move = lambda t: None if t is None else t.to(device, non_blocking=non_blocking)  # noqa: E731
        return ViewBatch(*map(move, self._tensors()), self.images, move(self.mask_indices))

    def pin_memory(self) -> ViewBatch:
        """Return the batch in memory that a GPU reads without waiting."""
        pinned = [None if t is None else t.pin_memory() for t in (*self._tensors(), self.mask_indices)]
        return ViewBatch(*pinned[:-1], self.images, pinned[-1])

    def split(self, images: int) -> list[ViewBatch]:
        """Cut into micro-batches of ``images`` images, in their order.

        Raises:
            ValueError: If that does not divide B.
        """
        if self.images % images:
            raise ValueError(f"{images} images do not divide a batch of {self.images}")
        if images == self.images:
            return [self]
        parts = [_split(t, self.images, images) for t in self._tensors()]
        return [ViewBatch(*tensors, images) for tensors in zip(*parts, strict=True)]

    def _tensors(self) -> tuple[Tensor | None, ...]:
        return self.global_crops, self.local_crops, self.masks, self.gram_crops


def join(batches: Sequence[ViewBatch]) -> ViewBatch:
    """Put the images of several batches of equal sizes into one, crop-major again."""
    if len(batches) == 1:
        return batches[0]
    columns = zip(*(b._tensors() for b in batches), strict=True)
    counts = [b.images for b in batches]
    return ViewBatch(*(_join(list(column), counts) for column in columns), sum(counts))


def _split(crops: Tensor | None, images: int, part: int) -> list[Tensor | None]:
    if crops is None:
        return [None] * (images // part)
    by_crop = crops.unflatten(0, (-1, images))
    return [each.flatten(0, 1) for each in by_crop.split(part, dim=1)]


def _join(crops: list[Tensor | None], images: list[int]) -> Tensor | None:
    if crops[0] is None:
        return None
    by_crop = [c.unflatten(0, (-1, n)) for c, n in zip(crops, images, strict=True)]
    return torch.cat(by_crop, dim=1).flatten(0, 1)
