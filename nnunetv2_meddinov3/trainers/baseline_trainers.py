"""The networks that MedDINOv3 is compared with, on nnU-Net's data, loss, sampling and augmentation.

Each is chosen with ``-tr NAME`` and trains as long as ``MedDINOv3Trainer`` does, with the optimiser
and the rates of its own paper or of the comparison. Only trainer classes live here, because
nnU-Net's search imports every module of this folder.
"""

from typing import Any, ClassVar

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.variants.optimizer.nnUNetTrainerAdam import (
    nnUNetTrainerAdam1en3,
)

from nnunetv2_meddinov3 import fine_tuning, optimisation
from nnunetv2_meddinov3.models import segformer
from nnunetv2_meddinov3.report import after_validation
from nnunetv2_meddinov3.settings import backbone_setting, check_variables, count_setting
from nnunetv2_meddinov3.trainers.meddinov3_trainers import MedDINOv3Trainer


class UNetTrainer(nnUNetTrainer):
    """nnU-Net's own trainer and U-Net, for budgets that it has no trainer for.

    ``MEDDINOV3_EPOCHS`` and ``MEDDINOV3_ITERATIONS`` are obeyed; all else is ``nnUNetTrainer``.
    """

    def __init__(
        self,
        plans: dict[str, Any],
        configuration: str,
        fold: int,
        dataset_json: dict[str, Any],
        device: torch.device = torch.device("cuda"),  # noqa: B008  nnU-Net's signature
    ) -> None:
        check_variables()
        epochs, iterations = map(count_setting, ("MEDDINOV3_EPOCHS", "MEDDINOV3_ITERATIONS"))
        super().__init__(plans, configuration, fold, dataset_json, device)
        if epochs is not None:
            self.num_epochs = epochs
        if iterations is not None:
            fine_tuning.set_iterations(self, iterations)

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Validate as nnU-Net does, and write the page of the model."""
        super().perform_actual_validation(save_probabilities)
        after_validation.write_after_validation(self)


class UNetTrainer_adamw(UNetTrainer, nnUNetTrainerAdam1en3):
    """The same with the optimiser of nnU-Net's ``nnUNetTrainerAdam1en3``: AdamW (AMSGrad) at 1e-3.

    It says how much of another row's lead over ``UNetTrainer`` is its optimiser's.
    """


class SegFormerTrainer(MedDINOv3Trainer):
    """The paper's SegFormer row: MiT-B2 from random weights; reads no ``MEDDINOV3_WEIGHTS``.

    AdamW (0.9, 0.98) at 5e-5 with weight decay 5e-2 and nnU-Net's decay of the rate. (The authors'
    code has 2e-5 where their paper says 5e-5.) ``MEDDINOV3_BACKBONE`` chooses the MiT that stands
    beside a ViT of that size, B2 where it is unset.
    """

    network_class = fine_tuning.SEGFORMER
    network_options: ClassVar[dict[str, Any]] = {"skip_in_ffn": True}
    weights = "none"
    weights_are_fixed = True
    pretrained_part = "Mix Transformer"
    decoder_lr = vit_lr = 5e-5
    lr_exponent = 0.9

    def _read_pretrained(self, file: str) -> fine_tuning.Pretrained:
        return fine_tuning.read_pretrained(file, "encoder.")

    def _choose_architecture(
        self, given: fine_tuning.Pretrained | None
    ) -> tuple[dict[str, Any], segformer.EncoderWeights | None]:
        segformer.require_library()
        encoder = segformer.ENCODERS[backbone_setting() or "vit_base"]
        weights = fine_tuning.chosen_weights(self.weights, self.weights_are_fixed)
        if weights == fine_tuning.LIBRARY:
            weights = segformer.imagenet_source(encoder)
        read = None if given or weights is None else segformer.read_encoder(weights, encoder)
        arguments = {"encoder": encoder, **self.network_options}
        return fine_tuning.network_entry(self.network_class, arguments), read

    def _load_weights(self, network: Any, checkpoint: Any, image_channels: int) -> None:
        network.load_encoder(checkpoint, image_channels)

    def _parameter_groups(self, network: Any) -> list[dict[str, Any]]:
        return [{"params": list(network.parameters()), "lr": self.decoder_lr}]


class SegFormerTrainer_imagenet(SegFormerTrainer):
    """SegFormer as its users train it: MiT-B2 with ImageNet weights, its own MixFFN.

    The weights are those of segmentation-models-pytorch on the Hugging Face hub;
    ``MEDDINOV3_WEIGHTS`` names a local file of them, or ``none`` for random weights.
    """

    network_options: ClassVar[dict[str, Any]] = {"skip_in_ffn": False}
    weights = fine_tuning.LIBRARY
    weights_are_fixed = False


class SegDINOTrainer(MedDINOv3Trainer):
    """SegDINO: Meta's frozen ViT and a light decoder on blocks 2, 5, 8 and 11.

    AdamW at 1e-4, as published; (0.9, 0.98), weight decay 5e-2, and the linear decay are those of
    ``MedDINOv3Trainer``, because its paper names none.
    """

    network_class = fine_tuning.SEGDINO
    weights = "timm:vit_base_patch16_dinov3.lvd1689m"
    decoder_lr = 1e-4
    drop_path = 0.0


class DinoUNetTrainer(MedDINOv3Trainer):
    """Dino U-Net: Meta's frozen ViT-B, an adapter, and nnU-Net's decoder.

    SGD at 1e-3 with nnU-Net's momentum, weight decay 3e-5 and decay of the rate, drop path 0.3 in
    the adapter; published with 200 epochs on 512 pixels (``MEDDINOV3_EPOCHS=200``).
    """

    network_class = fine_tuning.DINO_UNET
    make_optimizer = staticmethod(optimisation.nnunet_sgd)
    weights = "timm:vit_base_patch16_dinov3.lvd1689m"
    decoder_lr = 1e-3
    decay = 3e-5
    lr_exponent = 0.9
    drop_path = 0.3


class MedDINOv3Trainer_sam(MedDINOv3Trainer):
    """MedDINOv3's ViT with the mask decoder of Segment Anything, as the authors' code has it.

    SGD at 1e-3 for all, with nnU-Net's momentum, weight decay 3e-5 and decay of the rate, drop path
    0.3. The images have the size of the other rows, and the logits, at stride 4, are interpolated.
    """

    network_class = fine_tuning.SAM_SEGMENTER
    make_optimizer = staticmethod(optimisation.nnunet_sgd)
    decoder_lr = vit_lr = 1e-3
    decay = 3e-5
    lr_exponent = 0.9
    layers = "last"
    drop_path = 0.3


class MedDINOv3Trainer_sam_x4(MedDINOv3Trainer_sam):
    """The same with the reference's images, enlarged four times: 16 times the tokens."""

    network_options: ClassVar[dict[str, Any]] = {"input_scale": 4}
