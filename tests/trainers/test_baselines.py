"""The baselines: recipes, weights, that they learn, continue, and predict without variables."""

import json
import os
import random

import numpy as np
import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.variants.optimizer.nnUNetTrainerAdam import (
    nnUNetTrainerAdam1en3,
)
from safetensors.torch import save_file

from nnunetv2_meddinov3 import discovery
from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.models import load_backbone, segformer

NAMES = [
    *(name for name, module in discovery.TRAINERS.items() if module.endswith("baseline_trainers")),
    "MedDINOv3Trainer_singlescale_matched",
    "MedDINOv3Trainer_v2",
    "MedDINOv3Trainer_v2_convs",
]
for unet in ("UNetTrainer", "UNetTrainer_adamw"):  # nnU-Net's own
    NAMES.remove(unet)
RANDOM = ["SegFormerTrainer", "MedDINOv3Trainer_v2_convs"]  # on purpose
ON_A_VIT = [name for name in NAMES if "SegFormer" not in name and name not in RANDOM]
FROZEN = ["SegDINOTrainer", "DinoUNetTrainer"]


@pytest.fixture(autouse=True)
def no_weights(monkeypatch):
    monkeypatch.setenv("MEDDINOV3_WEIGHTS", "none")


@pytest.fixture
def make(workplace):
    """Makes a trainer of a name on Dataset001, not initialised."""

    def trainer(name, **changes):
        folder = next((workplace.root / "preprocessed").glob("Dataset001_*"))
        plans = json.loads((folder / "nnUNetPlans.json").read_text())
        plans["configurations"]["2d"].update(changes)
        dataset = json.loads((folder / "dataset.json").read_text())
        plans["continue_training"] = False
        stock = {"nnUNetTrainer": nnUNetTrainer, "nnUNetTrainerAdam1en3": nnUNetTrainerAdam1en3}
        kind = stock.get(name) or discovery.resolve(name)
        return kind(plans, "2d", 0, dataset, torch.device("cpu"))

    return trainer


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_loss_falls_on_nnunets_own_batches(name, make):
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  nnU-Net draws from the global generator
    trainer = make(name)
    trainer.initialize()
    batch = next(trainer.get_dataloaders()[0])
    trainer.network.train()
    losses = [float(trainer.train_step(batch)["loss"]) for _ in range(12)]
    assert sum(losses[-4:]) / 4 < sum(losses[:4]) / 4 - 0.02  # dropout and drop path are on


@pytest.mark.parametrize(
    ("name", "kind", "rates", "decay"),
    [
        ("SegFormerTrainer", "AdamW", [5e-5], 5e-2),
        ("SegFormerTrainer_imagenet", "AdamW", [5e-5], 5e-2),
        ("SegDINOTrainer", "AdamW", [1e-4], 5e-2),
        ("DinoUNetTrainer", "SGD", [1e-3], 3e-5),
        ("MedDINOv3Trainer_sam", "SGD", [1e-3, 1e-3], 3e-5),
        ("MedDINOv3Trainer_sam_x4", "SGD", [1e-3, 1e-3], 3e-5),
        ("MedDINOv3Trainer_singlescale_matched", "AdamW", [3e-4, 3e-5], 5e-2),
    ],
)
def test_each_baseline_has_its_recipe_and_the_length_of_the_others(name, kind, rates, decay, make):
    trainer = make(name)
    trainer.initialize()
    groups = trainer.optimizer.param_groups
    assert type(trainer.optimizer).__name__ == kind
    assert [g["lr"] for g in groups] == rates
    assert {g["weight_decay"] for g in groups} == {decay}
    assert (trainer.num_epochs, trainer.num_iterations_per_epoch) == (1000, 250)
    grouped = {id(p) for g in groups for p in g["params"]}
    trained = {id(p) for p in trainer.network.parameters() if p.requires_grad}
    assert grouped == trained
    if kind == "SGD":
        assert all(g["momentum"] == 0.99 and g["nesterov"] for g in groups)
    exponent = 0.9 if "SegFormer" in name or kind == "SGD" else 1.0
    trainer.lr_scheduler.step(500)
    assert [g["lr"] for g in groups] == pytest.approx([r * 0.5**exponent for r in rates])


def test_the_unet_is_nnunets_own_but_for_its_length(make, workplace, monkeypatch):
    monkeypatch.setenv("MEDDINOV3_EPOCHS", "7")
    monkeypatch.setenv("MEDDINOV3_ITERATIONS", "11")
    trainer = make("UNetTrainer")
    stock = make("nnUNetTrainer")
    for one in (trainer, stock):
        one.initialize()
    assert (trainer.num_epochs, trainer.num_iterations_per_epoch) == (7, 11)
    assert trainer.num_val_iterations_per_epoch == 2
    assert (stock.num_epochs, stock.num_iterations_per_epoch) == (1000, 250)
    shapes = [{n: t.shape for n, t in x.network.state_dict().items()} for x in (trainer, stock)]
    assert shapes[0] == shapes[1]
    assert trainer.enable_deep_supervision
    assert {type(x.optimizer) for x in (trainer, stock)} == {torch.optim.SGD}
    overridden = {name for name in vars(type(trainer)) if not name.startswith("__")}
    assert overridden == {"perform_actual_validation"}  # the same, and a page about it


def test_the_unet_with_adamw_differs_from_nnunets_own_variant_in_its_length_alone(
    make, monkeypatch
):
    monkeypatch.setenv("MEDDINOV3_EPOCHS", "7")
    monkeypatch.setenv("MEDDINOV3_ITERATIONS", "11")
    trainer = make("UNetTrainer_adamw")
    stock = make("nnUNetTrainerAdam1en3")
    for one in (trainer, stock):
        one.initialize()
    assert (trainer.num_epochs, trainer.num_iterations_per_epoch) == (7, 11)
    (ours,), (theirs,) = (
        [{k: v for k, v in group.items() if k != "params"} for group in one.optimizer.param_groups]
        for one in (trainer, stock)
    )
    assert ours == theirs
    assert (ours["lr"], ours["amsgrad"]) == (1e-3, True)
    assert type(trainer.optimizer) is torch.optim.AdamW


def test_the_vit_of_v2_learns_more_slowly_towards_the_image(make):
    trainer = make("MedDINOv3Trainer_v2")
    trainer.initialize()
    decoder, *vit = trainer.optimizer.param_groups
    assert decoder["lr"] == trainer.decoder_lr
    rates = [group["lr"] for group in vit]
    decay = trainer.layer_decay
    assert rates == pytest.approx([trainer.vit_lr * decay**n for n in range(len(rates))])
    blocks = trainer.network.backbone.vit.blocks
    by_id = {id(p): group["lr"] for group in vit for p in group["params"]}
    assert {by_id[id(p)] for p in blocks[-1].parameters()} == {trainer.vit_lr}
    stem = trainer.network.backbone.vit.patch_embed.proj.weight
    assert by_id[id(stem)] == pytest.approx(trainer.vit_lr * decay ** len(blocks))
    grouped = sum(len(group["params"]) for group in trainer.optimizer.param_groups)
    assert grouped == sum(p.requires_grad for p in trainer.network.parameters())


def test_v2_without_the_vit_neither_runs_nor_trains_it(make, monkeypatch):
    trainer = make("MedDINOv3Trainer_v2_convs")
    trainer.initialize()
    network, whole = trainer.network, make("MedDINOv3Trainer_v2")
    whole.initialize()
    monkeypatch.setattr(type(network), "_features", lambda *args: pytest.fail("the ViT ran"))
    assert network(torch.randn(1, 1, 64, 64)).shape == (1, 3, 64, 64)
    groups = trainer.optimizer.param_groups
    assert {id(p) for g in groups for p in g["params"]} == {
        id(p) for p in network.decoder.parameters()
    }
    left_out = {n for n, _ in whole.network.decoder.named_parameters()} - {
        n for n, _ in network.decoder.named_parameters()
    }
    assert left_out
    assert all(name.startswith("context.") for name in left_out)


def test_networks_are_what_their_names_say(make):
    def network(name):
        trainer = make(name)
        trainer.initialize()
        return trainer.network

    assert "norm" in dict(network("SegFormerTrainer").encoder.block1[0].mlp.named_children())
    plain = dict(network("SegFormerTrainer_imagenet").encoder.block1[0].mlp.named_children())
    assert "norm" not in plain
    assert network("MedDINOv3Trainer_sam_x4").input_scale == 4
    assert network("MedDINOv3Trainer_sam").input_scale == 1
    assert network("MedDINOv3Trainer_sam").backbone.vit.blocks[0].drop_path1.drop_prob == 0.3
    matched = network("MedDINOv3Trainer_singlescale_matched")
    assert (matched.layers, matched.copies) == ([3], 4)
    for name in FROZEN:
        assert network(name).layers == [0, 1, 2, 3]
        assert network(name).is_frozen


def test_the_size_of_segformer_follows_that_of_the_vit(make, monkeypatch):
    for size, encoder in (("", "mit_b2"), ("vit_small", "mit_b1"), ("vit_base", "mit_b2")):
        monkeypatch.setenv("MEDDINOV3_BACKBONE", size)
        entry, _ = make("SegFormerTrainer")._choose_architecture(None)
        assert entry["arch_kwargs"]["encoder"] == encoder


@pytest.mark.parametrize("name", ON_A_VIT)
def test_the_vit_starts_from_the_file(name, make, tmp_path, monkeypatch, released_file):
    backbone = released_file(tmp_path / "model.pth", seed=5)
    monkeypatch.setenv("MEDDINOV3_WEIGHTS", str(tmp_path / "model.pth"))
    trainer = make(name)
    trainer.initialize()
    loaded = trainer.network.backbone.state_dict()
    for key, tensor in backbone.state_dict().items():
        assert torch.equal(loaded[key], tensor), key


def test_segformer_starts_from_the_file_or_from_random_weights_on_purpose(
    make, tmp_path, monkeypatch, capsys
):
    library = segformer.require_library()
    encoder = library.encoders.get_encoder("mit_b0", weights=None)
    save_file(
        {n: t.clone() for n, t in encoder.state_dict().items()}, tmp_path / "mit_b0.safetensors"
    )
    monkeypatch.setenv("MEDDINOV3_WEIGHTS", str(tmp_path / "mit_b0.safetensors"))
    first = next(encoder.parameters())
    for name, is_read in (("SegFormerTrainer_imagenet", True), ("SegFormerTrainer", False)):
        trainer = make(name)
        trainer.initialize()
        assert torch.equal(next(trainer.network.encoder.parameters()), first) == is_read
        said = "NVIDIA Source Code License" in capsys.readouterr().out
        assert said == is_read


def test_random_weights_are_only_ever_asked_for(make, monkeypatch, tmp_path):
    monkeypatch.delenv("MEDDINOV3_WEIGHTS")
    monkeypatch.delenv("MEDDINOV3_BACKBONE")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for name in NAMES:
        if name in RANDOM:
            continue
        trainer = make(name)
        with pytest.raises(UserError, match=r"offline.*MEDDINOV3_WEIGHTS"):
            trainer.initialize()
        assert trainer.network is None


def test_an_option_for_vits_does_not_disturb_segformer(make, monkeypatch):
    monkeypatch.setenv("MEDDINOV3_CHECKPOINTING", "1")
    trainer = make("SegFormerTrainer")
    trainer.initialize()
    trainer.save_checkpoint(f"{trainer.output_folder}/checkpoint_latest.pth")
    again = make("SegFormerTrainer")
    again.load_checkpoint(f"{trainer.output_folder}/checkpoint_latest.pth")
    assert again.was_initialized
    os.remove(f"{trainer.output_folder}/checkpoint_latest.pth")  # noqa: PTH107


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SegFormerTrainer", "DinoUNetTrainer"])
def test_a_baseline_trains_continues_and_predicts_without_variables(
    name, workplace, short_run, monkeypatch
):
    fold = workplace.train(1, name)
    expected = workplace.predict(1, fold.parent, out=f"before_{name}")
    assert expected
    for variable in [v for v in os.environ if v.startswith("MEDDINOV3_")]:
        monkeypatch.delenv(variable)
    workplace.train(1, name, only_run_validation=True)
    workplace.train(1, name, continue_training=True)
    again = workplace.predict(1, fold.parent, out=f"after_{name}")
    assert {n: a.tolist() for n, a in again.items()} == {n: a.tolist() for n, a in expected.items()}


@pytest.mark.slow
def test_a_trained_baseline_gives_its_vit_and_its_network_to_others(
    workplace, make, short_run, monkeypatch
):
    fold = workplace.train(1, "MedDINOv3Trainer_sam")
    file = str(fold / "checkpoint_final.pth")
    weights = torch.load(file, weights_only=False)["network_weights"]
    monkeypatch.setenv("MEDDINOV3_WEIGHTS", file)
    trainer = make("DinoUNetTrainer")
    trainer.initialize()
    stem = "vit.patch_embed.proj.weight"
    assert torch.equal(trainer.network.backbone.state_dict()[stem], weights[f"backbone.{stem}"])
    assert load_backbone(file).embed_dim == 128

    # another fold, and nnU-Net's -pretrained_weights, which take the whole network
    other = workplace.train(1, "MedDINOv3Trainer_sam", fold=1, pretrained_weights=file)
    assert (other / "checkpoint_final.pth").exists()
    with pytest.raises(UserError, match="must be the one that is trained"):
        workplace.train(1, "DinoUNetTrainer", fold=2, pretrained_weights=file)
    with pytest.raises(UserError, match="of a MedDINOv3 trainer"):
        workplace.train(1, "SegFormerTrainer", fold=2, pretrained_weights=file)
    monkeypatch.undo()
    with pytest.raises(UserError, match="from a trainer of DinoUNet"):
        make("DinoUNetTrainer").load_checkpoint(file)


@pytest.mark.slow
def test_folds_of_segformer_have_one_encoder(workplace, make, short_run, monkeypatch):
    workplace.train(1, "SegFormerTrainer_imagenet")
    monkeypatch.setenv("MEDDINOV3_BACKBONE", "vit_small")
    with pytest.raises(UserError, match=r"the encoder \(encoder: mit_b1 here, mit_b0 in fold_0\)"):
        workplace.train(1, "SegFormerTrainer_imagenet", fold=1)
