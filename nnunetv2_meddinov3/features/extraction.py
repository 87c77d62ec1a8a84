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

    Raises:
        UserError: If the weights cannot be read, the size is no multiple of the patch size, or
            there is no such device.
    """

    def __init__(self, weights: str, size: int, device: str = "auto") -> None:
        self.device = torch.device(chosen_device(device))
        self.weights = weights
        checkpoint = read_weights(weights)
        self.patch_size = patch = checkpoint.architecture.patch_size
        if not patch <= size <= MAX_SIDE or size % patch:
            raise UserError(
                f"--size must be a multiple of the {patch} pixels of a patch, at most {MAX_SIDE}, "
                f"got {size}: take {max(patch, min(MAX_SIDE, round(size / patch) * patch))}."
            )
        self.size = size
        self.identity = identity_of(checkpoint)
        self._stated: dict[str, Any] | None = checkpoint.metadata.get("intensity")
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
        """Return the tokens of some slices, which the backbone sees together."""
        rows, columns = self.grid_size(scan)
        images = torch.cat([self.input(scan, index) for index in indices]).to(self.device)
        images = images.expand(-1, self.backbone.architecture.input_channels, -1, -1)
        lower = has_bf16(self.device)
        with torch.autocast("cuda", torch.bfloat16) if lower else nullcontext():
            found = self.backbone.intermediate_tokens(images, [self.backbone.depth - 1])[0]
        cls = found.cls.float().cpu().numpy()
        patches = found.patches.float().unflatten(1, (rows, columns)).cpu().numpy()
        return [Tokens(*each) for each in zip(cls, patches, strict=True)]

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

        Then it is the one by which this package trains; for HU that of MedDINOv3's release.
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
