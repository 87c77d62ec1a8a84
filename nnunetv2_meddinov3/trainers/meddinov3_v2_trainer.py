"""The project's own recipe, beside the paper's.

Only trainer classes live here, because nnU-Net's search imports every module of this folder.
"""

from typing import Any, ClassVar

from nnunetv2_meddinov3 import fine_tuning, optimisation
from nnunetv2_meddinov3.trainers.meddinov3_trainers import MedDINOv3Trainer


class MedDINOv3Trainer_v2(MedDINOv3Trainer):
    """The project's own recipe: convolutions beside the ViT see what its tokens cannot.

    AdamW (0.9, 0.98) with weight decay 5e-2 and nnU-Net's gradient clipping; 1e-3 for the decoder
    with its convolutions, 1e-4 for the ViT's last block and 0.8 of the next one's rate for each
    block before, linear decay, drop path 0.1. Not the paper's: that is ``MedDINOv3Trainer``.
    """

    network_class = fine_tuning.DETAIL_SEGMENTER
    decoder_lr = 1e-3
    vit_lr = 1e-4
    layer_decay = 0.8
    drop_path = 0.1

    def _parameter_groups(self, network: Any) -> list[dict[str, Any]]:
        """Return the decoder's group and one per block of the ViT."""
        decoder = {"params": list(network.decoder.parameters()), "lr": self.decoder_lr}
        vit = optimisation.layerwise_groups(network.backbone, self.vit_lr, self.layer_decay)
        return [decoder, *vit]


class MedDINOv3Trainer_v2_convs(MedDINOv3Trainer_v2):
    """The same without the ViT: it says what the ViT is worth in v2."""

    network_options: ClassVar[dict[str, Any]] = {"context": False}
    weights = "none"
    weights_are_fixed = True
