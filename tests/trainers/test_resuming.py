"""``--c``, ``--val``, ``-pretrained_weights`` and folds: the architecture comes with the model."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.models import load_backbone, save_backbone
from nnunetv2_meddinov3.models.architecture import architecture_of
from nnunetv2_meddinov3.models.backbone import Backbone

SMALLER = {"embed_dim": 64, "depth": 2, "num_heads": 1, "ffn_hidden": 128}


@pytest.fixture
def small_weights(tmp_path):
    """A pretrained file of another size than vit_tiny, which is the default of these tests."""
    torch.manual_seed(3)
    path = tmp_path / "small.safetensors"
    save_backbone(Backbone(architecture_of("vit_tiny", **SMALLER)), path, licence="test")
    return path


@pytest.fixture
def trained(workplace, small_weights, monkeypatch, short_run):
    """A finished fold 0 whose weights file is deleted afterwards, and no variable describes."""
    if not any((workplace.root / "raw").glob("Dataset021_*")):
        workplace.add_dataset(21, labels={"background": 0, "one": 1})
        workplace.prepare(21)
    monkeypatch.setenv("MEDDINOV3_WEIGHTS", str(small_weights))
    monkeypatch.delenv("MEDDINOV3_BACKBONE")
    fold = workplace.train(21, "MedDINOv3Trainer")
    small_weights.unlink()
    monkeypatch.delenv("MEDDINOV3_WEIGHTS")
    return fold


def _equal(first, second):
    return first.keys() == second.keys() and all(np.array_equal(first[k], second[k]) for k in first)


@pytest.mark.slow
def test_a_finished_run_survives_continue_and_validation_without_its_weights_file(
    workplace, trained
):
    plans_before = _preprocessed_plans(workplace, 21)
    before = workplace.predict(21, trained.parent, out="before")
    bytes_before = _files(workplace.root / "before")
    workplace.train(21, "MedDINOv3Trainer", continue_training=True)
    workplace.predict(21, trained.parent, out="after_c")
    assert _files(workplace.root / "after_c") == bytes_before
    workplace.train(
        21, "MedDINOv3Trainer", only_run_validation=True, export_validation_probabilities=True
    )
    assert list((trained / "validation").glob("*.npz"))
    after = workplace.predict(21, trained.parent, out="after_val")
    assert _equal(before, after)
    assert _preprocessed_plans(workplace, 21) == plans_before  # never edited
    entry = json.loads((trained.parent / "plans.json").read_text())["configurations"]["2d"]
    assert entry["architecture"]["arch_kwargs"]["backbone"]["embed_dim"] == 64


def _preprocessed_plans(workplace, number):
    folder = next((workplace.root / "preprocessed").glob(f"Dataset{number:03d}_*"))
    return (folder / "nnUNetPlans.json").read_bytes()


def _files(folder):
    return {p.name: p.read_bytes() for p in Path(folder).glob("*.nii.gz")}


@pytest.mark.slow
def test_a_run_continues_where_its_schedule_was(workplace, trained, monkeypatch):
    checkpoint = torch.load(trained / "checkpoint_final.pth", weights_only=False)
    rates = [g["lr"] for g in checkpoint["optimizer_state"]["param_groups"]]
    assert rates == pytest.approx([3e-4 / 2, 3e-5 / 2])  # the second of two epochs
    (trained / "checkpoint_final.pth").rename(trained / "checkpoint_latest.pth")
    monkeypatch.setenv("MEDDINOV3_EPOCHS", "4")
    workplace.train(21, "MedDINOv3Trainer", continue_training=True)
    checkpoint = torch.load(trained / "checkpoint_final.pth", weights_only=False)
    rates = [g["lr"] for g in checkpoint["optimizer_state"]["param_groups"]]
    assert rates == pytest.approx([3e-4 / 4, 3e-5 / 4])
    assert checkpoint["current_epoch"] == 4


@pytest.mark.slow
def test_another_fold_must_have_the_same_architecture(workplace, trained, monkeypatch):
    monkeypatch.setenv("MEDDINOV3_WEIGHTS", "none")
    monkeypatch.setenv("MEDDINOV3_BACKBONE", "vit_tiny")
    kept = _files(trained), (trained.parent / "plans.json").read_bytes()
    with pytest.raises(UserError, match=r"one architecture.*fold_0.*depth.*embed_dim"):
        workplace.train(21, "MedDINOv3Trainer", fold=1)
    assert (_files(trained), (trained.parent / "plans.json").read_bytes()) == kept


@pytest.mark.slow
def test_pretrained_weights_of_another_dataset_transfer_but_for_the_last_layer(
    workplace, short_run, monkeypatch
):
    source = workplace.train(1)
    workplace.add_dataset(22, labels={"background": 0, "one": 1, "two": 2, "three": 3})
    workplace.prepare(22)
    monkeypatch.setenv("MEDDINOV3_ITERATIONS", "1")
    monkeypatch.setattr(
        "nnunetv2_meddinov3.trainers.meddinov3_trainers.MedDINOv3Trainer_scratch.decoder_lr", 1e-12
    )
    monkeypatch.setattr(
        "nnunetv2_meddinov3.trainers.meddinov3_trainers.MedDINOv3Trainer_scratch.vit_lr", 1e-12
    )
    given = source / "checkpoint_final.pth"
    target = workplace.train(22, pretrained_weights=str(given))
    old, new = (
        torch.load(p, weights_only=False)["network_weights"]
        for p in (given, target / "checkpoint_final.pth")
    )
    assert old["decoder.seg_layers.0.weight"].shape[0] == 3
    assert new["decoder.seg_layers.0.weight"].shape[0] == 4
    for key in old:
        if "seg_layers" not in key:
            torch.testing.assert_close(old[key], new[key], rtol=1e-6, atol=1e-7)


@pytest.mark.slow
def test_without_checkpointing_nothing_is_written(workplace, short_run):
    fold = workplace.train(1, "MedDINOv3Trainer_scratch", fold=4, disable_checkpointing=True)
    assert not list(fold.glob("checkpoint_*"))
    assert (fold / "validation" / "summary.json").exists()


@pytest.mark.slow
def test_a_trained_fold_can_be_read_back_as_a_backbone_file(workplace, trained):
    network = torch.load(trained / "checkpoint_final.pth", weights_only=False)["network_weights"]
    torch.save(network, workplace.root / "network.pth")
    backbone = load_backbone(workplace.root / "network.pth", norm_eps=1e-5)
    assert backbone.embed_dim == 64
