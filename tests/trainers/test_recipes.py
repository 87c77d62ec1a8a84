"""The recipes: rates, parameters, weights, and what a run starts from."""

import json
import os
import subprocess
import sys

import pytest
import torch

from nnunetv2_meddinov3 import fine_tuning
from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.models import load_backbone
from nnunetv2_meddinov3.trainers import meddinov3_trainers as trainers


def make_trainer(workplace, cls, number=1, **kw):
    folder = next((workplace.root / "preprocessed").glob(f"Dataset{number:03d}_*"))
    plans = json.loads((folder / "nnUNetPlans.json").read_text())
    plans["continue_training"] = False
    dataset = json.loads((folder / "dataset.json").read_text())
    return cls(plans, kw.get("configuration", "2d"), 0, dataset, torch.device("cpu"))


def test_the_papers_recipe_is_the_default(workplace, tmp_path, monkeypatch, released_file):
    released_file(tmp_path / "model.pth")
    monkeypatch.setenv("MEDDINOV3_WEIGHTS", str(tmp_path / "model.pth"))
    trainer = make_trainer(workplace, trainers.MedDINOv3Trainer)
    trainer.initialize()
    assert (trainer.num_epochs, trainer.num_iterations_per_epoch) == (1000, 250)
    decoder, vit = trainer.optimizer.param_groups
    assert (decoder["lr"], vit["lr"]) == (3e-4, 3e-5)
    assert decoder["betas"] == vit["betas"] == (0.9, 0.98)
    assert decoder["weight_decay"] == vit["weight_decay"] == 5e-2
    grouped = {id(p) for g in trainer.optimizer.param_groups for p in g["params"]}
    assert grouped == {id(p) for p in trainer.network.parameters()}
    assert trainer.network.backbone.vit.blocks[0].drop_path1.drop_prob == 0.2
    assert trainer.network.backbone.architecture.norm_eps == 1e-6
    assert trainer.grad_scaler is None
    for epoch, factor in ((0, 1), (250, 0.75), (999, 0.001)):
        trainer.lr_scheduler.step(epoch)
        assert [g["lr"] for g in trainer.optimizer.param_groups] == pytest.approx(
            [3e-4 * factor, 3e-5 * factor]
        )


def test_training_starts_from_the_file(workplace, tmp_path, monkeypatch, released_file):
    backbone = released_file(tmp_path / "model.pth", seed=5)
    monkeypatch.setenv("MEDDINOV3_WEIGHTS", str(tmp_path / "model.pth"))
    trainer = make_trainer(workplace, trainers.MedDINOv3Trainer)
    trainer.initialize()
    loaded = trainer.network.backbone.state_dict()
    for name, tensor in backbone.state_dict().items():
        assert torch.equal(loaded[name], tensor), name
    images = torch.randn(1, 3, 32, 48)
    torch.testing.assert_close(
        trainer.network.backbone.eval().intermediate_features(images, [3])[0],
        load_backbone(tmp_path / "model.pth").intermediate_features(images, [3])[0],
    )


@pytest.mark.parametrize("size", ["vit_tiny", pytest.param("vit_base", marks=pytest.mark.slow)])
def test_another_file_changes_the_loss_of_step_0(
    size, workplace, tmp_path, monkeypatch, released_file
):
    monkeypatch.delenv("MEDDINOV3_BACKBONE")
    losses = []
    for seed in (0, 0, 1):
        released_file(tmp_path / "model.pth", size=size, seed=seed)
        monkeypatch.setenv("MEDDINOV3_WEIGHTS", str(tmp_path / "model.pth"))
        torch.manual_seed(9)
        trainer = make_trainer(workplace, trainers.MedDINOv3Trainer)
        trainer.initialize()
        torch.manual_seed(9)
        batch = {"data": torch.randn(2, 1, 48, 48), "target": torch.randint(0, 3, (2, 1, 48, 48))}
        losses.append(float(trainer.train_step(batch)["loss"]))
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize(
    ("name", "check"),
    [
        ("DINOv3Trainer", lambda t: t.optimizer.param_groups[1]["lr"] == 1e-4),
        ("MedDINOv3Trainer_scratch", lambda t: t.optimizer.param_groups[1]["lr"] == 3e-4),
        ("MedDINOv3Trainer_singlescale", lambda t: t.network.layers == [3]),
        ("MedDINOv3Trainer_50epochs", lambda t: t.num_epochs == 50),
        ("MedDINOv3Trainer_250epochs", lambda t: t.num_epochs == 250),
        ("MedDINOv3Trainer_NoMirroring", lambda t: _mirroring(t) is None),
        ("MedDINOv3Trainer", lambda t: _mirroring(t) == (0, 1)),
    ],
)
def test_a_named_recipe_differs_in_what_its_name_says(
    name, check, workplace, tmp_path, monkeypatch, released_file
):
    released_file(tmp_path / "model.pth")
    monkeypatch.setenv("MEDDINOV3_WEIGHTS", str(tmp_path / "model.pth"))
    trainer = make_trainer(workplace, getattr(trainers, name))
    trainer.initialize()
    assert check(trainer)


def _mirroring(trainer):
    trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    return trainer.inference_allowed_mirroring_axes


def test_the_frozen_recipe_trains_the_decoder_alone(
    workplace, tmp_path, monkeypatch, released_file
):
    released_file(tmp_path / "model.pth")
    monkeypatch.setenv("MEDDINOV3_WEIGHTS", str(tmp_path / "model.pth"))
    trainer = make_trainer(workplace, trainers.MedDINOv3Trainer_frozen)
    trainer.initialize()
    before = {k: v.clone() for k, v in trainer.network.state_dict().items()}
    batch = {"data": torch.randn(2, 1, 48, 48), "target": torch.randint(0, 3, (2, 1, 48, 48))}
    trainer.train_step(batch)
    changed = {k for k, v in trainer.network.state_dict().items() if not torch.equal(v, before[k])}
    assert changed
    assert all(k.startswith("decoder.") for k in changed)


def test_every_trainable_parameter_gets_a_gradient_as_ddp_demands(
    workplace, tmp_path, monkeypatch, released_file
):
    released_file(tmp_path / "model.pth")
    monkeypatch.setenv("MEDDINOV3_WEIGHTS", str(tmp_path / "model.pth"))
    for cls in (
        trainers.MedDINOv3Trainer,
        trainers.MedDINOv3Trainer_singlescale,
        trainers.MedDINOv3Trainer_frozen,
    ):
        trainer = make_trainer(workplace, cls)
        trainer.initialize()
        trainer.network.train()(torch.randn(4, 1, 48, 48)).square().mean().backward()
        trainable = [(n, p) for n, p in trainer.network.named_parameters() if p.requires_grad]
        assert [n for n, p in trainable if p.grad is None] == []


def test_the_number_of_input_channels_makes_the_stem(
    workplace, tmp_path, monkeypatch, released_file
):
    released_file(tmp_path / "model.pth")
    monkeypatch.setenv("MEDDINOV3_WEIGHTS", str(tmp_path / "model.pth"))
    folder = next((workplace.root / "preprocessed").glob("Dataset001_*"))
    plans = json.loads((folder / "nnUNetPlans.json").read_text())
    dataset = json.loads((folder / "dataset.json").read_text())
    given = load_backbone(tmp_path / "model.pth").vit.patch_embed.proj.weight
    # a 2D cascade: one image channel and the one-hot of two labels make three, which are not RGB
    plans["configurations"]["2d_fine"] = {"inherits_from": "2d", "previous_stage": "2d"}
    plans["configurations"]["2d"]["next_stage"] = "2d_fine"
    trainer = trainers.MedDINOv3Trainer(
        {**plans, "continue_training": False}, "2d_fine", 0, dataset, torch.device("cpu")
    )
    trainer.initialize()
    stem = trainer.network.backbone.vit.patch_embed.proj.weight
    assert stem.shape[1] == trainer.num_input_channels == 3
    torch.testing.assert_close(stem[:, 0], given.sum(1))
    assert not stem[:, 1:].any()


def test_random_weights_are_only_ever_asked_for(workplace, monkeypatch, tmp_path):
    monkeypatch.delenv("MEDDINOV3_WEIGHTS", raising=False)
    monkeypatch.delenv("MEDDINOV3_BACKBONE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for cls in (trainers.MedDINOv3Trainer, trainers.DINOv3Trainer):
        trainer = make_trainer(workplace, cls)
        with pytest.raises(UserError, match="MEDDINOV3_WEIGHTS"):
            trainer.initialize()
        assert trainer.network is None


def test_weights_of_another_size_than_the_variable_names_are_refused(
    workplace, monkeypatch, tmp_path, released_file
):
    released_file(tmp_path / "model.pth")
    monkeypatch.setenv("MEDDINOV3_WEIGHTS", str(tmp_path / "model.pth"))
    monkeypatch.setenv("MEDDINOV3_BACKBONE", "vit_small")
    with pytest.raises(UserError, match="embed_dim 128 instead of 384"):
        make_trainer(workplace, trainers.MedDINOv3Trainer).initialize()


def test_a_checkpoint_of_a_stock_trainer_is_refused(workplace):
    plans = {"configurations": {"2d": {"architecture": {"network_class_name": "x.PlainConvUNet"}}}}
    with pytest.raises(UserError, match=r"x\.PlainConvUNet"):
        fine_tuning.checkpoint_architecture({"init_args": {"plans": plans}}, "2d")


def test_checkpointing_is_a_variable_and_no_other_architecture(workplace, monkeypatch):
    monkeypatch.setenv("MEDDINOV3_CHECKPOINTING", "1")
    trainer = make_trainer(workplace, trainers.MedDINOv3Trainer_scratch)
    trainer.initialize()
    assert trainer.network.backbone.vit.grad_checkpointing
    entry = trainer.configuration_manager.configuration["architecture"]
    monkeypatch.setenv("MEDDINOV3_CHECKPOINTING", "0")
    other = make_trainer(workplace, trainers.MedDINOv3Trainer_scratch)
    other.initialize()
    assert not other.network.backbone.vit.grad_checkpointing
    again = other.configuration_manager.configuration["architecture"]
    assert again["arch_kwargs"]["backbone"] == entry["arch_kwargs"]["backbone"]


@pytest.mark.slow
def test_the_network_compiles_as_one_graph(workplace):
    """In a process of its own: torch.compile cannot trace the checks of shapes in these tests."""
    trainer = make_trainer(workplace, trainers.MedDINOv3Trainer_scratch)
    trainer.initialize()
    arguments = trainer.configuration_manager.network_arch_init_kwargs
    program = (
        "import json, sys, torch\n"
        "from nnunetv2_meddinov3.models.segmenter import Segmenter\n"
        "network = Segmenter(1, 3, **json.loads(sys.argv[1]), decoder_chunk=5).eval()\n"
        "images = torch.randn(2, 1, 56, 40)\n"
        "compiled = torch.compile(network, backend='aot_eager', fullgraph=True)\n"
        "torch.testing.assert_close(compiled(images), network(images))\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, json.dumps(arguments)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
