"""The trainers' augmentation in training: in nnU-Net's loader, or on the device."""

import copy
import json

import numpy as np
import pytest
import torch

from nnunetv2_meddinov3 import augmentation
from nnunetv2_meddinov3.trainers.meddinov3_gpuaug_trainer import MedDINOv3Trainer_gpuaug
from nnunetv2_meddinov3.trainers.meddinov3_trainers import MedDINOv3Trainer


def a_trainer(workplace, cls, monkeypatch):
    monkeypatch.setenv("MEDDINOV3_WEIGHTS", "none")
    folder = next((workplace.root / "preprocessed").glob("Dataset001_*"))
    plans = json.loads((folder / "nnUNetPlans.json").read_text())
    plans["continue_training"] = False
    dataset = json.loads((folder / "dataset.json").read_text())
    trainer = cls(plans, "2d", 0, dataset, torch.device("cpu"))
    trainer.initialize()
    return trainer


def test_the_loader_augments_faster_with_nnunets_transforms(workplace, monkeypatch):
    trainer = a_trainer(workplace, MedDINOv3Trainer, monkeypatch)
    loader, _ = trainer.get_dataloaders()
    kinds = [type(each) for each in loader.data_loader.transforms.transforms]
    assert augmentation.RemoveTransform in kinds
    assert next(loader)["data"].shape[2:] == tuple(trainer.configuration_manager.patch_size)


@pytest.mark.slow
def test_patches_are_augmented_on_the_device(workplace, monkeypatch):
    trainer = a_trainer(workplace, MedDINOv3Trainer_gpuaug, monkeypatch)
    loader, validation = trainer.get_dataloaders()
    size = tuple(trainer.configuration_manager.patch_size)
    batch = next(loader)
    assert batch["data"].shape[2:] > size  # as read: with room for rotation
    assert int(batch["target"].min()) == -1
    assert next(validation)["data"].shape[2:] == size
    assert "get_training_transforms" not in vars(trainer)
    seen = []
    network = trainer.network
    network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))
    losses = []
    for _ in range(2):  # the same batch in two ways
        np.random.seed(len(seen))  # noqa: NPY002  nnU-Net draws from the global generators
        torch.manual_seed(len(seen))
        losses.append(float(trainer.train_step(copy.deepcopy(batch))["loss"]))
    assert np.isfinite(losses).all()
    assert [tuple(images.shape[2:]) for images in seen] == [size, size]
    assert not torch.equal(*seen)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
    wanted, _ = augmentation.augment_batch(trainer._transforms, batch["data"], batch["target"])
    assert torch.equal(seen[0], wanted)


@pytest.mark.slow
def test_a_training_that_augments_on_the_device_ends_as_others_do(
    workplace, monkeypatch, short_run
):
    monkeypatch.setenv("MEDDINOV3_WEIGHTS", "none")
    fold = workplace.train(1, trainer="MedDINOv3Trainer_gpuaug")
    assert (fold / "validation" / "summary.json").exists()
    assert workplace.predict(1, fold.parent, out="predicted_gpuaug")
