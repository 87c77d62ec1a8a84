"""SegDINO: a frozen ViT and a light decoder (https://arxiv.org/abs/2509.00833).

Written from the paper's text: maps of several blocks are brought to one resolution and one width,
and an MLP over channels predicts the classes. The paper gives 2.21 M trainable parameters with a
ViT-S; how the maps are brought there is DPT's reassembling (https://arxiv.org/abs/2103.13413) in
the widths that are usual for a ViT-S, which comes within 2.5 % of that figure.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nnunetv2_meddinov3.models.segmentation_network import ViTNetwork, resize


class LightDecoder(nn.Module):
    """Reassemble four maps at strides 4, 8, 16 and 32, bring them together, classify each pixel.

    Args:
        dim: Width D of the ViT's maps, which have a stride of 16 pixels.
        num_classes: Output channels K.
    """

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        widths = [dim // 8, dim // 4, dim // 2, dim]
        width = dim // 6
        self.projections = nn.ModuleList(nn.Conv2d(dim, w, 1) for w in widths)
        self.rescalings = nn.ModuleList(
            [
                nn.ConvTranspose2d(widths[0], widths[0], kernel_size=4, stride=4),
                nn.ConvTranspose2d(widths[1], widths[1], kernel_size=2, stride=2),
                nn.Identity(),
                nn.Conv2d(widths[3], widths[3], kernel_size=3, stride=2, padding=1),
            ]
        )
        self.alignments = nn.ModuleList(
            nn.Conv2d(w, width, kernel_size=3, padding=1, bias=False) for w in widths
        )
        self.mlp = nn.Sequential(nn.Conv2d(4 * width, 4 * width, 1), nn.GELU())
        # nnU-Net's -pretrained_weights leaves out what is called seg_layers
        self.seg_layers = nn.ModuleList([nn.Conv2d(4 * width, num_classes, 1)])

    def forward(
        self, maps: list[Float[Tensor, "batch dim rows columns"]]
    ) -> Float[Tensor, "batch classes 4*rows 4*columns"]:
        """Decode maps to logits at stride 4."""
        aligned: list[Tensor] = []
        parts = zip(maps, self.projections, self.rescalings, self.alignments, strict=True)
        for features, project, rescale, align in parts:
            x = align(rescale(project(features)))
            aligned.append(x if not aligned else resize(x, aligned[0].shape[2:]))
        return self.seg_layers[0](self.mlp(torch.cat(aligned, dim=1)))


class SegDINO(ViTNetwork):
    """A frozen ViT, four blocks of it, and ``LightDecoder``.

    Args:
        input_channels: Channels of the images.
        num_classes: Output channels K.
        backbone: Fields of an ``Architecture`` with a patch size of 16.
        layers: The four blocks; None for the end of every quarter of the depth (2, 5, 8, 11).
        drop_path: Not used: a frozen ViT drops nothing.
        activation_checkpointing: Not used: a frozen ViT keeps no activations.
        deep_supervision: Must be False.
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        backbone: dict[str, Any],
        layers: list[int] | None = None,
        drop_path: float = 0.0,
        activation_checkpointing: bool = False,
        deep_supervision: bool = False,
    ) -> None:
        super().__init__(
            input_channels, backbone, layers, frozen=True, deep_supervision=deep_supervision
        )
        check_four_maps(self)
        self.decoder = LightDecoder(self.backbone.embed_dim, num_classes)

    def _segment(
        self, images: Float[Tensor, "batch channel height width"]
    ) -> Float[Tensor, "batch classes height width"]:
        return resize(self.decoder(self._features(images)), images.shape[2:])


def check_four_maps(network: ViTNetwork) -> None:
    """Refuse a ViT that does not give four maps at a stride of 16 pixels.

    Raises:
        ValueError: If it has another patch size, or another number of blocks is read.
    """
    if len(network.layers) != 4 or network.backbone.patch_size != 16:
        raise ValueError(
            "this decoder reads four blocks of a ViT with patches of 16 pixels, got blocks "
            f"{network.layers} and patches of {network.backbone.patch_size} pixels"
        )
