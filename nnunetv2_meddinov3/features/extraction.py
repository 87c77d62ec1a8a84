"""From slices to the tokens of a backbone."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.features.scans import Scan
from nnunetv2_meddinov3.features.tiles import tiles
from nnunetv2_meddinov3.models.backbone import Window
from nnunetv2_meddinov3.models.build import backbone_from
from nnunetv2_meddinov3.models.contracts import contracts_of
from nnunetv2_meddinov3.models.precision import has_bf16
from nnunetv2_meddinov3.models.weights import Checkpoint
from nnunetv2_meddinov3.pretrain.config import Contract, Intensity
from nnunetv2_meddinov3.pretrain.intensity import contract_in
from nnunetv2_meddinov3.pretrain.probe.comparison import chosen_device, read_weights

MAX_SIDE = 8192  # pixels: 262,144 patches of 16 pixels


class Tokens(NamedTuple):
    """What a backbone makes of a slice, after its last block and the final norm."""

    cls: Float[np.ndarray, " dim"]
    patches: Float[np.ndarray, "row column dim"]


class Extractor:
    """A backbone that looks at slices of scans.

    Args:
        weights: Anything that ``load_backbone`` takes, or the folder of a pretraining stage.
        size: Pixels along a slice's longer side, in which the backbone sees it.
        device: ``auto``, ``cpu`` or ``cuda``.
        tile: Side in pixels of the tiles that a larger slice is cut into; None cuts none. A tile's
            tokens attend to each other alone, at the positions that they have in the slice.

    Raises:
        UserError: If the weights cannot be read, size or tile is no multiple of the patch size, or
            there is no such device.
    """

    def __init__(
        self, weights: str, size: int, device: str = "auto", tile: int | None = None
    ) -> None:
        self.device = torch.device(chosen_device(device))
        self.weights = weights
        checkpoint = read_weights(weights)
        self.patch_size = patch = checkpoint.architecture.patch_size
        for option, pixels in (("--size", size), ("--tile", patch if tile is None else tile)):
            if not patch <= pixels <= MAX_SIDE or pixels % patch:
                raise UserError(
                    f"{option} must be a multiple of the {patch} pixels of a patch, at most "
                    f"{MAX_SIDE}, got {pixels}: take "
                    f"{max(patch, min(MAX_SIDE, round(pixels / patch) * patch))}."
                )
        self.size, self.tile = size, tile
        self.identity = identity_of(checkpoint)
        self._stated: dict[str, Any] | None = (
            checkpoint.metadata.get("intensity") or checkpoint.fine_tuned_on
        )
        self._told: set[str] = set()
        self.backbone = backbone_from(checkpoint).eval().requires_grad_(False).to(self.device)

    def grid_size(self, scan: Scan) -> tuple[int, int]:
        """Return the patches along height and width: the longer side, in mm, has ``size`` pixels.

        The other is rounded to whole patches.
        """
        height, width = scan.slices.shape[1:]
        if scan.spacing is not None:
            height, width = height * scan.spacing[1], width * scan.spacing[2]
        most = self.size // self.patch_size
        longer = max(height, width)
        return max(1, round(most * height / longer)), max(1, round(most * width / longer))

    def tokens(self, scan: Scan, index: int) -> Tokens:
        """Return the tokens of one slice, in fp32."""
        return self.tokens_of(scan, [index])[0]

    @torch.inference_mode()
    def tokens_of(self, scan: Scan, indices: Sequence[int]) -> list[Tokens]:
        """Return the tokens of some slices, which the backbone sees together.

        Fewer together where the device is out of memory. In tiles, a cls token is the mean of the
        tiles', and a patch's token is that of the tile in which it lies deepest.

        Raises:
            UserError: If the device is out of memory with one slice.
        """
        images = torch.cat([self.input(scan, index) for index in indices])
        try:
            cls, patches = self._look(images, self.grid_size(scan))
        except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is one of the latter
            if not _is_out_of_memory(error):
                raise
            if len(indices) > 1:
                half = len(indices) // 2
                return self.tokens_of(scan, indices[:half]) + self.tokens_of(scan, indices[half:])
            side = self.tile or self.size
            less = max(self.patch_size, side // 2 // self.patch_size * self.patch_size)
            raise UserError(
                f"a slice of {side} pixels must fit into the memory of {self.device}, but does "
                f"not: add --tile {less}, or take a smaller --size."
            ) from error
        return [Tokens(*each) for each in zip(cls, patches, strict=True)]

    def _look(
        self, images: Float[Tensor, "slice 1 height width"], grid_size: tuple[int, int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return cls (slice, dim) and patch tokens (slice, row, column, dim) of slices."""
        most = max(grid_size) if self.tile is None else self.tile // self.patch_size
        side, layer = self.patch_size, self.backbone.depth - 1
        dim, channels = self.backbone.embed_dim, self.backbone.architecture.input_channels
        patches = np.empty((len(images), *grid_size, dim), np.float32)
        of_tiles = []
        lower = has_bf16(self.device)
        for rows, columns in tiles(grid_size, most):
            height, width = (
                slice(span.tile.start * side, span.tile.stop * side) for span in (rows, columns)
            )
            part = images[:, :, height, width].to(self.device).expand(-1, channels, -1, -1)
            window = Window(grid_size, rows.tile.start, columns.tile.start)
            with torch.autocast("cuda", torch.bfloat16) if lower else nullcontext():
                found = self.backbone.intermediate_tokens(part, [layer], window)[0]
            of_tiles.append(found.cls.float().cpu().numpy())
            seen = tuple(span.tile.stop - span.tile.start for span in (rows, columns))
            own = tuple(
                slice(span.kept.start - span.tile.start, span.kept.stop - span.tile.start)
                for span in (rows, columns)
            )
            tokens = found.patches.float().unflatten(1, seen)[:, own[0], own[1]]
            patches[:, rows.kept, columns.kept] = tokens.cpu().numpy()
        return np.mean(of_tiles, axis=0), patches

    def input(self, scan: Scan, index: int) -> Float[Tensor, "1 1 height width"]:
        """Return a slice as the backbone sees it: resized as in pretraining, and normalised."""
        contract = self.contract(scan)
        pixels = torch.from_numpy(scan.slices[index].astype(np.float32))[None, None]
        if scan.ends is not None:
            low, high = scan.ends
            pixels = (pixels - low) / (high - low)
        size = [side * self.patch_size for side in self.grid_size(scan)]
        pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True, align_corners=False)
        return (pixels.clamp(*contract.clip) - contract.mean) / contract.std

    def contract(self, scan: Scan) -> Contract:
        """Return the weights' intensity contract for a scan's values; say so where they have none.

        A network that nnU-Net trained on CT sees it as it did there. Without a contract it is the
        one by which this package trains; for HU that of MedDINOv3's release.
        """
        contracts, unit = contracts_of(self._stated), scan.unit
        if unit in contracts:
            return Contract(**{key: contracts[unit][key] for key in ("clip", "mean", "std")})
        usual = contract_in(unit, Intensity())
        if unit not in self._told:
            self._told.add(unit)
            known = f"is for values in {' and '.join(contracts)}" if contracts else "states none"
            print(
                f"the intensity contract of {self.weights} {known}, and {scan.name} is "
                f"{scan.modality} in {unit}: taken as pretraining here takes them, clipped to "
                f"{usual.clip[0]:g} to {usual.clip[1]:g}, mean {usual.mean:g}, standard deviation "
                f"{usual.std:g}.",
                file=sys.stderr,
            )
        return usual


def _is_out_of_memory(error: Exception) -> bool:
    """Return whether a device or the machine has no memory left."""
    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or "can't allocate memory" in str(error)


def unit(tokens: Float[np.ndarray, "*any dim"]) -> Float[np.ndarray, "*any dim"]:
    """Return tokens of length 1, whose products are cosines."""
    return tokens / np.maximum(np.linalg.norm(tokens, axis=-1, keepdims=True), 1e-9)


def identity_of(checkpoint: Checkpoint) -> str:
    """Return a hash of a backbone's tensors, by which its features are known again."""
    digest = hashlib.sha256()
    for name, tensor in sorted(checkpoint.tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def body_patches(
    scan: Scan, index: int, grid_size: tuple[int, int]
) -> Bool[np.ndarray, "row column"]:
    """Return which patches of a slice show the body, at least half of each."""
    body = torch.from_numpy(scan.body(index)).float()[None, None]
    return F.interpolate(body, grid_size, mode="area")[0, 0].numpy() >= 0.5


def shown_by_patches(
    scan: Scan, index: int, extractor: Extractor
) -> Float[np.ndarray, "row column 3"]:
    """Return brightness, row and column of each patch."""
    rows, columns = extractor.grid_size(scan)
    image, patch = extractor.input(scan, index)[0, 0].numpy(), extractor.patch_size
    brightness = image.reshape(rows, patch, columns, patch).mean((1, 3))
    y, x = np.mgrid[:rows, :columns]
    return np.stack([brightness, y / rows, x / columns], axis=-1)


def patch_of_pixels(
    shape: tuple[int, int], grid_size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Return for each row and each column of pixels the row and column of its patch."""
    rows, columns = (
        ((np.arange(n) + 0.5) * patches / n).astype(int)
        for n, patches in zip(shape, grid_size, strict=True)
    )
    return rows, columns
