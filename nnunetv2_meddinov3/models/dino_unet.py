"""Dino U-Net (https://arxiv.org/abs/2508.20909): a frozen ViT, an adapter and nnU-Net's decoder.

A clean room from the published description; the authors' code has no licence and was not read. With
16 classes they give 6.2, 13.2 and 20.0 M trainable parameters for ViT-S, B and L. What the
description leaves open was chosen so that the count comes out: it is 1,280 per unit of the ViT's
width, and a constant of 2.0 M, beside the adapter's. The first is five 1x1 convolutions to 256
channels, the shared one and one per scale. The second fits a refinement at 256 channels and a
transposed convolution per scale in front of nnU-Net's decoder of 32 to 256 channels. That decoder
ends at stride 2, and its logits are interpolated.
"""

from typing import Any

from jaxtyping import Float
from timm.layers import SqueezeExcite
from torch import Tensor, nn

from nnunetv2_meddinov3.models.segdino import check_four_maps
from nnunetv2_meddinov3.models.segmentation_network import ViTNetwork, resize
from nnunetv2_meddinov3.models.spatial_adapter import Adapter
from nnunetv2_meddinov3.models.unet_decoder import unet_decoder

WIDTHS = [32, 64, 128, 256]  # nnU-Net's, the finest scale first


class ScaleProjection(nn.Module):
    """What the fidelity-aware projection does on one scale.

    Args:
        dim: Width D of the maps.
        rank: Width of the subspace to which they are projected.
        width: Channels of the result.
    """

    def __init__(self, dim: int, rank: int, width: int) -> None:
        super().__init__()
        self.specific = nn.Conv2d(dim, rank, 1)
        self.modulation = nn.Conv2d(rank, 2 * rank, 1)
        self.refinement = nn.Sequential(
            nn.Conv2d(rank, rank, 3, padding=1, groups=rank, bias=False),
            nn.Conv2d(rank, rank, 1, bias=False),
            nn.BatchNorm2d(rank),
            nn.ReLU(inplace=True),
            SqueezeExcite(rank, rd_ratio=1 / 16, rd_divisor=1),
        )
        self.projection = nn.Conv2d(rank, width, 1)
        self.up = nn.ConvTranspose2d(width, width, kernel_size=2, stride=2)
        assert self.modulation.bias is not None
        nn.init.ones_(self.modulation.bias[:rank])  # gamma starts around 1, beta around 0
        nn.init.zeros_(self.modulation.bias[rank:])

    def forward(
        self,
        maps: Float[Tensor, "batch dim rows columns"],
        context: Float[Tensor, "batch rank rows columns"],
    ) -> Float[Tensor, "batch width 2*rows 2*columns"]:
        """Project maps; ``context`` is their projection by the layer that all scales share."""
        gamma, beta = self.modulation(context).chunk(2, dim=1)
        z = gamma * self.specific(maps) + beta
        return self.up(self.projection(z + self.refinement(z)))


class UNetOnMaps(nn.Module):
    """The adapter, the fidelity-aware projection of each scale, and nnU-Net's decoder.

    Args:
        channels: Of the images.
        dim: Width D of the ViT's maps.
        num_classes: Output channels K.
        drop_path: Rate of stochastic depth of the adapter.
        rank: Of the projections.
    """

    def __init__(
        self, channels: int, dim: int, num_classes: int, drop_path: float, rank: int = 256
    ) -> None:
        super().__init__()
        self.adapter = Adapter(channels, dim, drop_path)
        self.shared = nn.Conv2d(dim, rank, 1)
        self.scales = nn.ModuleList(ScaleProjection(dim, rank, width) for width in WIDTHS)
        self.unet = unet_decoder(WIDTHS, num_classes)

    def forward(
        self,
        images: Float[Tensor, "batch channel height width"],
        maps: list[Float[Tensor, "batch dim rows columns"]],
    ) -> Float[Tensor, "batch classes half_height half_width"]:
        """Decode maps of the ViT to logits at stride 2."""
        pyramid = self.adapter(images, maps)
        pairs = zip(self.scales, pyramid, strict=True)
        return self.unet([project(x, self.shared(x)) for project, x in pairs])


class DinoUNet(ViTNetwork):
    """Dino U-Net on a frozen ViT; sides are padded to multiples of 32 pixels.

    Args:
        input_channels: Channels of the images.
        num_classes: Output channels K.
        backbone: Fields of an ``Architecture`` with a patch size of 16 and a width that is a
            multiple of 32.
        layers: The four blocks; None for the end of every quarter of the depth (2, 5, 8, 11).
        drop_path: Rate of stochastic depth of the adapter; a frozen ViT drops nothing.
        activation_checkpointing: Not used: a frozen ViT keeps no activations.
        deep_supervision: Must be False.
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        backbone: dict[str, Any],
        layers: list[int] | None = None,
        drop_path: float = 0.3,
        activation_checkpointing: bool = False,
        deep_supervision: bool = False,
    ) -> None:
        super().__init__(
            input_channels,
            backbone,
            layers,
            frozen=True,
            multiple=32,
            deep_supervision=deep_supervision,
        )
        check_four_maps(self)
        self.decoder = UNetOnMaps(
            self.stem_channels, self.backbone.embed_dim, num_classes, drop_path
        )

    def _segment(
        self, images: Float[Tensor, "batch channel height width"]
    ) -> Float[Tensor, "batch classes height width"]:
        return resize(self.decoder(images, self._features(images)), images.shape[2:])
