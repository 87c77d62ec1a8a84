"""The sliding window over the slices of an image: tiles in batches, one slice after the other.

The order of sums and their rounding to half precision are nnU-Net's, so that the labels are too.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

import torch
from jaxtyping import Float, Float16
from torch import Tensor, nn
from torch._dynamo import OptimizedModule

from nnunetv2_meddinov3.prediction.ahead import in_threads

_PIXELS_CPU = 256 * 256  # of the tiles of a batch; more are not faster
_PIXELS_GPU = 32 * 512 * 512

Tile = tuple  # (slice(None), z, slice of rows, slice of columns), as nnU-Net lists them


class SlidingWindow:
    """Predicts the slices of an image by networks that see one tile of one slice.

    Args:
        networks: One for each fold, on the device and in evaluation mode.
        device: Where they are.
        num_classes: Output channels K.
        mirror_axes: Of (Y, X), 0 and 1: predictions of mirrored tiles are averaged.
        weight: What a pixel of a tile counts for, (h, w) in half precision; None for 1.
        batch: Tiles at once, mirrored ones counted; None chooses. Halved where a GPU's memory does
            not suffice.
        threads: Used on a CPU.
    """

    def __init__(
        self,
        networks: Sequence[nn.Module],
        device: torch.device,
        num_classes: int,
        *,
        mirror_axes: Sequence[int] = (),
        weight: Float16[Tensor, "height width"] | None = None,
        batch: int | None = None,
        threads: int = 1,
    ) -> None:
        self.networks, self.device, self.num_classes = networks, device, num_classes
        self.weight, self.batch, self.threads = weight, batch, threads
        dims = [axis + 2 for axis in mirror_axes]
        counts = range(len(dims) + 1)
        # of (B, C, Y, X), none first
        self.mirrorings = [axes for n in counts for axes in itertools.combinations(dims, n)]

    def slices(
        self, data: Float[Tensor, "channel _ _ _"], tiles: Sequence[Tile]
    ) -> Iterator[tuple[int, Float16[Tensor, "class height width"]]]:
        """Yield each slice's number and its logits, the mean over networks.

        Args:
            data: (C, Z, Y, X), at least as large as a tile.
            tiles: Which there are, slice by slice.

        Raises:
            RuntimeError: If a logit is infinite in half precision.
            torch.OutOfMemoryError: If a single tile is too much for the device.
        """
        height, width = data.shape[2:]
        weights = torch.zeros((height, width), dtype=torch.half, device=self.device)
        one = 1 if self.weight is None else self.weight
        for tile in tiles:
            if tile[1] == tiles[0][1]:
                weights[tile[2:]] += one
        sums: list[Tensor] = []
        last = None
        for tile, predictions in self.predictions(data, tiles):
            if tile[1] != last:
                if last is not None:
                    yield last, _mean(sums, weights)
                last = tile[1]
                sums = [
                    torch.zeros(
                        (self.num_classes, height, width), dtype=torch.half, device=self.device
                    )
                    for _ in self.networks
                ]
            for total, prediction in zip(sums, predictions, strict=True):
                index = (slice(None), *tile[2:])
                total[index] += prediction.mul_(one)
        if last is not None:
            yield last, _mean(sums, weights)

    def predictions(
        self, data: Float[Tensor, "channel _ _ _"], tiles: Sequence[Tile]
    ) -> Iterator[tuple[Tile, list[Float[Tensor, "class _ _"]]]]:
        """Yield each tile with what every network predicts for it; arguments as for ``slices``."""
        batches = self._in_threads if self.device.type == "cpu" else self.in_batches
        for batch, predictions in batches(data, tiles):
            for i, tile in enumerate(batch):
                yield tile, [each[i] for each in predictions]

    def _in_threads(
        self, data: Tensor, tiles: Sequence[Tile]
    ) -> Iterator[tuple[Sequence[Tile], list[Tensor]]]:
        """Let each thread compute tiles of its own: that uses cores better than a shared tile."""
        size = self._tiles_at_once(data, tiles, _PIXELS_CPU)
        batches = [tiles[i : i + size] for i in range(0, len(tiles), size)]
        inner = [getattr(network, "network", network) for network in self.networks]
        is_compiled = any(isinstance(network, OptimizedModule) for network in inner)
        workers = 1 if is_compiled else max(1, min(self.threads, len(batches)))

        def predict(batch: Sequence[Tile]) -> list[Tensor]:
            with torch.inference_mode():
                images = torch.stack([data[tile] for tile in batch])
                return [self._mirrored(network, images) for network in self.networks]

        before = torch.get_num_threads()
        torch.set_num_threads(max(1, self.threads // workers))
        try:
            yield from zip(batches, in_threads(predict, batches, workers), strict=True)
        finally:
            torch.set_num_threads(before)

    def in_batches(
        self, data: Tensor, tiles: Sequence[Tile]
    ) -> Iterator[tuple[Sequence[Tile], list[Tensor]]]:
        """Yield batches of tiles and every network's predictions, halved until they fit."""
        done = 0
        while done < len(tiles):
            size = self._tiles_at_once(data, tiles, _PIXELS_GPU)
            batch = tiles[done : done + size]
            images = torch.stack([data[tile] for tile in batch]).to(self.device)
            try:
                predictions = [self._mirrored(network, images) for network in self.networks]
            except torch.OutOfMemoryError:
                if self.batch == 1:
                    raise
                assert self.batch is not None
                self.batch //= 2
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
                continue
            yield batch, predictions
            done += len(batch)

    def _tiles_at_once(self, data: Tensor, tiles: Sequence[Tile], pixels: int) -> int:
        """Return how many tiles to predict at once, each with its mirrored ones."""
        if self.batch is None:
            self.batch = max(1, pixels // data[tiles[0]][0].numel())
        return max(1, self.batch // len(self.mirrorings))

    def _mirrored(
        self, network: nn.Module, images: Float[Tensor, "tile channel _ _"]
    ) -> Float[Tensor, "tile class _ _"]:
        """Return the mean over mirrorings, summed up as nnU-Net does."""
        mirrorings = self.mirrorings
        if len(mirrorings) == 1:
            return network(images)
        assert self.batch is not None
        if len(images) * len(mirrorings) <= self.batch:
            mirrored = torch.cat([torch.flip(images, axes) for axes in mirrorings])
            parts: Iterator[Tensor] = iter(network(mirrored).chunk(len(mirrorings)))
        else:
            parts = (network(torch.flip(images, axes)) for axes in mirrorings)
        total = next(parts)
        for axes, part in zip(mirrorings[1:], parts, strict=True):
            total += torch.flip(part, axes)
        return total.div_(len(mirrorings))


def _mean(
    sums: Iterable[Float16[Tensor, "class height width"]],
    weights: Float16[Tensor, "height width"],
) -> Float16[Tensor, "class height width"]:
    """Divide by the weights and average over networks, each step rounded as nnU-Net's."""
    first, *others = (total.div_(weights) for total in sums)
    for other in others:
        first += other
    if others:
        first /= 1 + len(others)
    if torch.isinf(first).any():
        raise RuntimeError(
            "logits must stay below 65504, which is the largest number in half precision, but some "
            "are infinite: the network's weights are not usable"
        )
    return first
