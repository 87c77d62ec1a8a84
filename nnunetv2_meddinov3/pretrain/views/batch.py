"""What one forward pass sees: the views of some images and the masks of the student."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass
class ViewBatch:
    """The views of B images. Crops are crop-major: first crop 0 of every image, then crop 1.

    Attributes:
        global_crops: G * B of them, normalised; one channel, or the backbone's.
        local_crops: L * B of them, normalised.
        masks: Over the patches of the global crops, True = masked out.
        gram_crops: The global crops at another size without photometric changes, or None.
        images: B.
        mask_indices: Of the masked patches in the flattened masks, ascending. Worked out on the
            CPU, they spare the wait that ``masks.nonzero()`` is on a GPU.
    """

    global_crops: Float[Tensor, "global channel height width"]
    local_crops: Float[Tensor, "local channel local_height local_width"]
    masks: Bool[Tensor, "global patch"]
    gram_crops: Float[Tensor, "global channel gram_height gram_width"] | None = None
    images: int = 0
    mask_indices: Int[Tensor, " masked"] = None  # type: ignore[assignment]  # None: found here

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
        return self._each(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> ViewBatch:
        """Return the batch in memory that a GPU reads without waiting."""
        return self._each(Tensor.pin_memory)

    def _each(self, function: Callable[[Tensor], Tensor]) -> ViewBatch:
        """Return the batch with a function applied to every tensor."""
        return ViewBatch(
            function(self.global_crops),
            function(self.local_crops),
            function(self.masks),
            None if self.gram_crops is None else function(self.gram_crops),
            self.images,
            function(self.mask_indices),
        )

    def split(self, images: int) -> list[ViewBatch]:
        """Cut into micro-batches of ``images`` images, in their order.

        Raises:
            ValueError: If that does not divide B.
        """
        if self.images % images:
            raise ValueError(f"{images} images do not divide a batch of {self.images}")
        if images == self.images:
            return [self]
        parts = [_split(t, self.images, images) for t in self._crops()]
        return [_batch(each, images) for each in zip(*parts, strict=True)]

    def _crops(self) -> list[Tensor]:
        """Return what is crop-major, the Gram crops last where there are any."""
        crops = [self.global_crops, self.local_crops, self.masks]
        return crops if self.gram_crops is None else [*crops, self.gram_crops]


def join(batches: Sequence[ViewBatch]) -> ViewBatch:
    """Put the images of several batches of equal sizes into one, crop-major again."""
    if len(batches) == 1:
        return batches[0]
    counts = [b.images for b in batches]
    columns = zip(*(b._crops() for b in batches), strict=True)
    joined = [_join(column, counts) for column in columns]
    mask_indices = _join_indices(batches, sum(counts))
    return _batch(joined, sum(counts), mask_indices=mask_indices)


def _join_indices(batches: Sequence[ViewBatch], images: int) -> Int[Tensor, " masked"]:
    """Return where the masked patches of several batches are in the joined masks, ascending.

    Worked out from the indices that the batches have: looking into the masks would be a wait.
    """
    moved, before = [], 0
    for batch in batches:
        patches = batch.masks.shape[1]
        crop = batch.mask_indices // (batch.images * patches)
        moved.append(batch.mask_indices + (crop * (images - batch.images) + before) * patches)
        before += batch.images
    return torch.cat(moved).sort().values


def _batch(crops: Sequence[Tensor], images: int, **more: Tensor) -> ViewBatch:
    global_crops, local_crops, masks, *gram = crops
    return ViewBatch(global_crops, local_crops, masks, gram[0] if gram else None, images, **more)


def _split(crops: Tensor, images: int, part: int) -> list[Tensor]:
    by_crop = crops.unflatten(0, (-1, images))
    return [each.flatten(0, 1) for each in by_crop.split(part, dim=1)]


def _join(crops: Sequence[Tensor], images: list[int]) -> Tensor:
    by_crop = [c.unflatten(0, (-1, n)) for c, n in zip(crops, images, strict=True)]
    return torch.cat(by_crop, dim=1).flatten(0, 1)
