"""What every segmentation network here shares: channels, padding, number format, the ViT."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from nnunetv2_meddinov3.models.architecture import Architecture, check_layers, default_layers
from nnunetv2_meddinov3.models.backbone import Backbone
from nnunetv2_meddinov3.models.precision import has_bf16


class Network(nn.Module):
    """Images of any size -> logits of that size; a subclass segments padded images.

    ``decoder`` is what a subclass trains from random weights.

    Args:
        input_channels: Channels of the images, cascade one-hot channels included.
        stem_channels: Channels that the first layer takes. A single image channel is repeated for a
            stem of three, as in the paper.
        multiple: Sides are padded with zeros to multiples of this many pixels.
        deep_supervision: Must be False: there is one output resolution.
    """

    decoder: nn.Module

    def __init__(
        self, input_channels: int, stem_channels: int, multiple: int, deep_supervision: bool = False
    ) -> None:
        super().__init__()
        if deep_supervision:
            raise ValueError("this network has no deep supervision: deep_supervision must be False")
        self.input_channels, self.stem_channels = input_channels, stem_channels
        self.multiple = multiple
        # fp16 needs a gradient scaler and its predictions overflow first: prefer native bf16
        self.autocast_dtype = torch.bfloat16 if has_bf16() else None

    def forward(
        self, images: Float[Tensor, "batch channel height width"]
    ) -> Float[Tensor, "batch classes height width"]:
        """Segment images of any size; padded sides are cropped again.

        Returns:
            Logits, in fp32 where bf16 autocast is active.
        """
        if self.autocast_dtype and images.is_cuda and torch.is_autocast_enabled():
            with torch.autocast("cuda", dtype=self.autocast_dtype):
                logits = self._forward(images)
            return logits.float()
        return self._forward(images)

    def _forward(
        self, images: Float[Tensor, "batch channel height width"]
    ) -> Float[Tensor, "batch classes height width"]:
        height, width = images.shape[-2:]
        images = F.pad(images, (0, -width % self.multiple, 0, -height % self.multiple))
        if self.input_channels == 1 and self.stem_channels == 3:
            images = images.expand(-1, 3, -1, -1)
        return self._segment(images)[..., :height, :width]

    def _segment(
        self, images: Float[Tensor, "batch channel height width"]
    ) -> Float[Tensor, "batch classes height width"]:
        """Return the logits of images with the stem's channels and whole multiples as sides."""
        raise NotImplementedError


class ViTNetwork(Network):
    """A network on a DINOv3 ViT, ``backbone``; everything else of it is in ``decoder``.

    Args:
        input_channels: Channels of the images, cascade one-hot channels included.
        backbone: Fields of an ``Architecture``; its input channels are those of the stem.
        layers: Blocks that are read, in depth order; None for the end of every quarter of the
            depth, ``"last"`` for the last block alone.
        drop_path: Rate of stochastic depth.
        activation_checkpointing: Whether the ViT's blocks are recomputed in the backward pass.
        frozen: Whether the ViT gets no gradient, and stays in evaluation mode.
        multiple: As for ``Network``; the ViT's patch size by default.
        deep_supervision: Must be False.
    """

    def __init__(
        self,
        input_channels: int,
        backbone: dict[str, Any],
        layers: list[int] | str | None = None,
        drop_path: float = 0.0,
        activation_checkpointing: bool = False,
        *,
        frozen: bool = False,
        multiple: int | None = None,
        deep_supervision: bool = False,
    ) -> None:
        architecture = Architecture(**backbone)
        stem = architecture.input_channels
        super().__init__(
            input_channels, stem, multiple or architecture.patch_size, deep_supervision
        )
        if input_channels != stem and (input_channels, stem) != (1, 3):
            raise ValueError(
                f"a backbone with {stem} input channels takes {stem} image channels"
                f"{' or 1' if stem == 3 else ''}, got {input_channels}"
            )
        self.layers = resolve_layers(layers, architecture.depth)
        self.is_frozen = frozen
        self.backbone = Backbone(
            architecture,
            drop_path=drop_path,
            activation_checkpointing=activation_checkpointing,
        )
        if frozen:
            self.backbone.requires_grad_(False)
        # blocks behind the last one read get no gradient, which DDP forbids for trainable ones
        for block in self.backbone.vit.blocks[self.layers[-1] + 1 :]:
            block.requires_grad_(False)

    def train(self, mode: bool = True) -> "ViTNetwork":
        """Switch to training mode, but for a frozen ViT."""
        super().train(mode)
        if self.is_frozen:
            self.backbone.eval()
        return self

    def _features(
        self, images: Float[Tensor, "batch channel height width"]
    ) -> list[Float[Tensor, "batch dim rows columns"]]:
        """Return the patch tokens of every layer read as maps, each after the final norm."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.is_frozen):
            return self.backbone.intermediate_features(images, self.layers)


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of maps."""

    def forward(
        self, maps: Float[Tensor, "batch dim height width"]
    ) -> Float[Tensor, "batch dim height width"]:
        """Normalise every pixel."""
        return super().forward(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def resize(
    maps: Float[Tensor, "batch dim rows columns"], size: Sequence[int]
) -> Float[Tensor, "batch dim height width"]:
    """Interpolate maps bilinearly to a height and a width."""
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)


def resolve_layers(layers: list[int] | str | None, depth: int) -> list[int]:
    """Return block indices for a list of them, ``"last"`` or None (the end of every quarter).

    Raises:
        ValueError: If they are not block indices of a ViT of that depth in depth order.
    """
    if layers is None:
        return default_layers(depth)
    if layers == "last":
        return [depth - 1]
    if isinstance(layers, str):
        raise ValueError(f'layers must be block indices or "last", got {layers!r}')
    check_layers(layers, depth)
    return list(layers)
