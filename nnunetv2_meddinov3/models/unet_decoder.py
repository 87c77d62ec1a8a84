"""nnU-Net's decoder for maps that other networks than its encoder made."""

from types import SimpleNamespace
from typing import Any

from dynamic_network_architectures.building_blocks.unet_decoder import UNetDecoder
from torch import nn

CONVOLUTIONS: dict[str, Any] = {
    "conv_op": nn.Conv2d,
    "conv_bias": True,
    "norm_op": nn.InstanceNorm2d,
    "norm_op_kwargs": {"eps": 1e-5, "affine": True},
    "dropout_op": None,
    "dropout_op_kwargs": None,
    "nonlin": nn.LeakyReLU,
    "nonlin_kwargs": {"inplace": True},
}
"""nnU-Net's blocks, as the classes of dynamic-network-architectures take them."""


def unet_decoder(widths: list[int], num_classes: int) -> Any:
    """Return a module that decodes a list of maps, the finest first, to logits of the finest.

    Args:
        widths: Channels of the maps, each of which has half the sides of the one before.
        num_classes: Output channels K.
    """
    encoder = SimpleNamespace(
        output_channels=widths,
        strides=[2] * len(widths),
        kernel_sizes=[3] * len(widths),
        **CONVOLUTIONS,
    )
    decoder: Any = UNetDecoder(encoder, num_classes, 2, deep_supervision=False)
    # only the finest of the layers for deep supervision is used, and DDP forbids the others
    for stage in range(len(decoder.seg_layers) - 1):
        decoder.seg_layers[stage] = nn.Identity()
    return decoder
