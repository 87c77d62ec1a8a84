"""The paper's recipe with nnU-Net's augmentation on the GPU."""

from __future__ import annotations

from typing import Any

import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms

from nnunetv2_meddinov3 import augmentation
from nnunetv2_meddinov3.trainers.meddinov3_trainers import MedDINOv3Trainer


class MedDINOv3Trainer_gpuaug(MedDINOv3Trainer):
    """As ``MedDINOv3Trainer``, but patches are augmented on the device that trains.

    nnU-Net's workers then only read: for machines whose few CPU cores cannot augment as fast as the
    GPU trains. Transforms, probabilities and ranges are the same. Second stages of a cascade are
    augmented by the workers as before, since their masks need the CPU.
    """

    _transforms: BasicTransform | None = None

    def get_dataloaders(self) -> tuple[Any, Any]:
        """Return nnU-Net's loaders, of which the training's does not augment."""
        if self.is_cascaded:
            return super().get_dataloaders()
        make = self.get_training_transforms

        def keep(*args: Any, **kwargs: Any) -> BasicTransform:
            self._transforms = make(*args, **kwargs)
            return ComposeTransforms([])

        self.get_training_transforms = keep  # type: ignore[method-assign]  # nnU-Net asks for them
        try:
            return super().get_dataloaders()
        finally:
            del self.get_training_transforms

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Augment a batch on the device and train on it."""
        if self._transforms is not None:
            data, target = (
                batch[name].to(self.device, non_blocking=True) for name in ("data", "target")
            )
            with torch.no_grad():
                data, target = augmentation.augment_batch(self._transforms, data, target)
            batch = {**batch, "data": data, "target": target}
        return super().train_step(batch)
