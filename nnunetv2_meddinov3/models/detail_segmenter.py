"""The segmenter of the project's own recipe: a ViT for context, convolutions for detail.

MedDINOv3's decoder maps each token to its 16 x 16 pixels alone, so borders show the grid of tokens.
Here a convolutional pyramid of strides 2, 4, 8 and 16 sees the pixels, the tokens of several depths
are added to its coarsest maps, and nnU-Net's decoder brings both together. ViT-Adapter
(https://arxiv.org/abs/2205.08534) and Dino U-Net (https://arxiv.org/abs/2508.20909) also put
convolutions beside a ViT; here they exchange nothing with it, so that the ViT stays plain.
"""

from typing import Any

import torch
from dynamic_network_architectures.building_blocks.plain_conv_encoder import PlainConvEncoder
from jaxtyping import Float
from torch import Tensor, nn

from nnunetv2_meddinov3.models.segmentation_network import ViTNetwork, resize
from nnunetv2_meddinov3.models.unet_decoder import CONVOLUTIONS, unet_decoder


class DetailDecoder(nn.Module):
    """Bring tokens and a convolutional pyramid of the image together.

    Args:
        channels: Of the images.
        dim: Width of the (concatenated) tokens; None for convolutions alone.
        num_classes: Output channels K.
        width: Channels of the finest maps; each coarser scale has twice as many.
    """

    def __init__(self, channels: int, dim: int | None, num_classes: int, width: int) -> None:
        super().__init__()
        widths = [width, 2 * width, 4 * width, 8 * width]
        self.pyramid = PlainConvEncoder(
            channels, len(widths), widths, kernel_sizes=3, strides=2, n_conv_per_stage=2,
            return_skips=True, **CONVOLUTIONS,
        )  # fmt: skip
        self.context = (
            None
            if dim is None
            else nn.Sequential(
                nn.Conv2d(dim, widths[-1], 1), nn.InstanceNorm2d(widths[-1], affine=True)
            )
        )
        self.unet = unet_decoder(widths, num_classes)

    def forward(
        self,
        images: Float[Tensor, "batch channel height width"],
        maps: Float[Tensor, "batch dim rows columns"] | None,
    ) -> Float[Tensor, "batch classes half_height half_width"]:
        """Decode images and the ViT's maps to logits at stride 2."""
        pyramid = self.pyramid(images)
        if self.context is not None:
            pyramid[-1] = pyramid[-1] + self.context(maps)
        return self.unet(pyramid)


class DetailSegmenter(ViTNetwork):
    """A ViT, convolutions beside it, and nnU-Net's decoder.

    Args:
        input_channels: Channels of the images.
        num_classes: Output channels K.
        backbone: Fields of an ``Architecture`` with a patch size of 16.
        layers: Blocks whose patch tokens are concatenated, in depth order; None for the end of
            every quarter of the depth.
        drop_path: Rate of stochastic depth.
        activation_checkpointing: Whether the ViT's blocks are recomputed in the backward pass.
        width: Channels of the maps at stride 2.
        context: Whether the ViT is read; without it, the convolutions segment alone.
        deep_supervision: Must be False: there is one output resolution.
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        backbone: dict[str, Any],
        layers: list[int] | None = None,
        drop_path: float = 0.0,
        activation_checkpointing: bool = False,
        width: int = 32,
        context: bool = True,
        deep_supervision: bool = False,
    ) -> None:
        super().__init__(
            input_channels,
            backbone,
            layers,
            drop_path,
            activation_checkpointing,
            frozen=not context,
            deep_supervision=deep_supervision,
        )
        if self.backbone.patch_size != 16:
            raise ValueError(
                "this decoder reads a ViT with patches of 16 pixels, got "
                f"{self.backbone.patch_size}"
            )
        dim = len(self.layers) * self.backbone.embed_dim if context else None
        self.decoder: DetailDecoder = DetailDecoder(self.stem_channels, dim, num_classes, width)

    def _segment(
        self, images: Float[Tensor, "batch channel height width"]
    ) -> Float[Tensor, "batch classes height width"]:
        reads_vit = self.decoder.context is not None
        maps = torch.cat(self._features(images), dim=1) if reads_vit else None
        return resize(self.decoder(images, maps), images.shape[2:])
