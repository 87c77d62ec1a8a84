"""``--c``, ``--val``, ``-pretrained_weights`` and folds: the architecture comes with the model."""

import json
import shutil
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch

from nnunetv2_meddinov3 import fine_tuning, folds
from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.models import load_backbone, save_backbone
from nnunetv2_meddinov3.models.architecture import architecture_of
from nnunetv2_meddinov3.models.backbone import Backbone
from nnunetv2_meddinov3.trainers.meddinov3_trainers import MedDINOv3Trainer_scratch as Trainer

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


def _log(fold):
    return "\n".join(p.read_text() for p in sorted(fold.glob("training_log*.txt")))


def _rates(fold):
    groups = torch.load(fold / "checkpoint_final.pth", weights_only=False)["optimizer_state"]
    return [g["lr"] for g in groups["param_groups"]]


@pytest.fixture
def stopped(workplace, monkeypatch):
    """A function that trains 2 of 4 epochs of 2 iterations and returns the fold."""

    def train(fold):
        shutil.rmtree(workplace.fold_folder(1, fold=fold), ignore_errors=True)
        with monkeypatch.context() as patch:
            patch.setenv("MEDDINOV3_EPOCHS", "4")
            patch.setenv("MEDDINOV3_ITERATIONS", "2")
            patch.setattr(Trainer, "on_epoch_end", _stop_after_two(Trainer.on_epoch_end))
            with pytest.raises(KeyboardInterrupt):
                workplace.train(1, fold=fold)
        folder = workplace.fold_folder(1, fold=fold)
        (folder / "checkpoint_best.pth").rename(folder / "checkpoint_latest.pth")
        return folder

    return train


def _stop_after_two(original):
    def on_epoch_end(self):
        self._best_ema = None  # so that every epoch writes a checkpoint
        original(self)
        if self.current_epoch == 2:
            raise KeyboardInterrupt

    return on_epoch_end


@pytest.mark.slow
def test_a_continued_run_keeps_its_length_where_no_variable_tells_another(
    workplace, stopped, monkeypatch
):
    fold = stopped(2)
    for name in ("MEDDINOV3_EPOCHS", "MEDDINOV3_ITERATIONS"):
        monkeypatch.delenv(name, raising=False)
    workplace.train(1, fold=2, continue_training=True)
    assert _rates(fold) == pytest.approx([3e-4 / 4, 3e-4 / 4])
    log = _log(fold)
    assert "done 2 of 4 epochs of 2 iterations" in log
    assert "epochs are kept, because MEDDINOV3_EPOCHS is unset" in log
    assert "iterations are kept, because MEDDINOV3_ITERATIONS is unset" in log


@pytest.mark.slow
def test_a_continued_run_says_that_a_variable_changes_its_length(workplace, stopped, monkeypatch):
    fold = stopped(2)
    monkeypatch.setenv("MEDDINOV3_EPOCHS", "3")
    monkeypatch.setenv("MEDDINOV3_ITERATIONS", "1")
    workplace.train(1, fold=2, continue_training=True)
    assert _rates(fold) == pytest.approx([1e-4, 1e-4])
    log = _log(fold)
    assert "MEDDINOV3_EPOCHS=3 replaces its 4 epochs; the learning rates follow it" in log
    assert "MEDDINOV3_ITERATIONS=1 replaces its 2 iterations." in log


@pytest.mark.slow
def test_the_length_of_a_checkpoint_of_an_earlier_version_follows_from_its_rates(
    workplace, stopped, monkeypatch
):
    fold = stopped(2)
    checkpoint = torch.load(fold / "checkpoint_latest.pth", weights_only=False)
    for group in checkpoint["optimizer_state"]["param_groups"]:
        del group["num_epochs"], group["num_iterations"]
    torch.save(checkpoint, fold / "checkpoint_latest.pth")
    monkeypatch.delenv("MEDDINOV3_EPOCHS", raising=False)
    monkeypatch.setenv("MEDDINOV3_ITERATIONS", "2")
    workplace.train(1, fold=2, continue_training=True)
    assert _rates(fold) == pytest.approx([3e-4 / 4, 3e-4 / 4])
    assert "does not say its number of iterations, which is now 2" in _log(fold)


@pytest.mark.parametrize(
    ("done", "left", "expected"),
    [(4, 0.7, 10), (1, 1.0, None), (1000, 0.001, 1000), (2, 0.999, 1000), (3, 0.81, None)],
)
def test_only_a_linear_decay_tells_the_number_of_epochs(done, left, expected):
    groups = [{"lr": 3e-4 * left, "initial_lr": 3e-4}]
    checkpoint = {"current_epoch": done, "optimizer_state": {"param_groups": groups}}
    assert fine_tuning.noted_length(checkpoint) == (done, expected, None)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "told", "then"), [("0", "1", True), ("1", "0", False)])
def test_checkpointing_can_be_changed_when_a_run_continues(
    before, told, then, workplace, short_run, monkeypatch
):
    monkeypatch.setenv("MEDDINOV3_CHECKPOINTING", before)
    fold = workplace.train(1, fold=3)
    seen = []
    step = Trainer.on_train_epoch_start

    def see(self):
        seen.append(self.network.backbone.vit.grad_checkpointing)
        step(self)

    monkeypatch.setattr(Trainer, "on_train_epoch_start", see)
    monkeypatch.setenv("MEDDINOV3_EPOCHS", "3")
    monkeypatch.setenv("MEDDINOV3_CHECKPOINTING", told)
    workplace.train(1, fold=3, continue_training=True)
    monkeypatch.delenv("MEDDINOV3_CHECKPOINTING")  # and then it stays
    monkeypatch.setenv("MEDDINOV3_EPOCHS", "4")
    workplace.train(1, fold=3, continue_training=True)
    assert seen == [then, then]
    assert f"checkpointing is {'on' if then else 'off'}" in _log(fold)


def _changed(plans, dataset, **changes):
    """Plans and dataset.json with values at dotted places replaced."""
    plans, dataset = deepcopy((plans, dataset))
    for place, value in changes.items():
        *outer, last = place.split("__")
        level = {"plans": plans, "dataset": dataset, "conf": plans["configurations"]["2d"]}
        for name in outer:
            level = level[name]
        level[last] = value
    return plans, dataset


DIFFERENT = {
    "patch size": ({"conf__patch_size": [32, 32]}, "the patch size (patch_size: [32, 32] here"),
    "spacing": ({"conf__spacing": [9.0, 9.0]}, "the spacing (spacing: [9.0, 9.0] here"),
    "scheme": (
        {"conf__normalization_schemes": ["ZScoreNormalization"]},
        "the normalisation (normalization_schemes: ['ZScoreNormalization'] here",
    ),
    "statistics": (
        {"plans__foreground_intensity_properties_per_channel": {"0": {"mean": 1.0}}},
        "the intensities of the dataset",
    ),
    "axes": ({"plans__transpose_forward": [2, 0, 1]}, "the order of axes"),
    "labels": ({"dataset__labels": {"background": 0, "b": 1}}, "the values of the labels"),
    "norm_eps": (
        {"conf__architecture__arch_kwargs__backbone__norm_eps": 1e-6},
        "the epsilon of the LayerNorms (norm_eps: 1e-06 here, 1e-05 in fold_0)",
    ),
    "layers": (
        {"conf__architecture__arch_kwargs__layers": [3]},
        "the blocks that the decoder reads (layers: [3] here",
    ),
}
ALIKE = {
    "batch size": {"conf__batch_size": 7},
    "identifier": {"conf__data_identifier": "other"},
    "drop path": {"conf__architecture__arch_kwargs__drop_path": 0.5},
    "checkpointing": {"conf__architecture__arch_kwargs__activation_checkpointing": True},
    "names of labels": {"dataset__labels": {"background": 0, "a": 1, "b": 2}},
    "names of channels": {"dataset__channel_names": {"0": "MR"}},
    "statistics that ZScore does not read": {
        "conf__normalization_schemes": ["ZScoreNormalization"],
        "plans__foreground_intensity_properties_per_channel": {"0": {"mean": 1.0}},
    },
}


@pytest.fixture
def saved_model(workplace, tmp_path):
    """A model folder with a trained fold 0, and its plans and dataset.json."""
    folder = next((workplace.root / "preprocessed").glob("Dataset001_*"))
    plans = json.loads((folder / "nnUNetPlans.json").read_text())
    dataset = json.loads((folder / "dataset.json").read_text())
    architecture = architecture_of("vit_tiny")
    entry = fine_tuning.plans_entry(architecture, 1, None, 0.2)
    plans["configurations"]["2d"]["architecture"] = entry
    (tmp_path / "fold_0").mkdir()
    (tmp_path / "fold_0" / "checkpoint_final.pth").touch()
    return tmp_path, plans, dataset


def _compare(saved_model, changes, base=None):
    folder, plans, dataset = saved_model
    old = _changed(plans, dataset, **(base or {}))
    (folder / "plans.json").write_text(json.dumps(old[0]))
    (folder / "dataset.json").write_text(json.dumps(old[1]))
    plans, dataset = _changed(*old, **changes)
    entry = plans["configurations"]["2d"]["architecture"]
    folds.check_other_folds(folds.Fold(plans, dataset, entry, str(folder), "fold_1", "2d"))


@pytest.mark.parametrize("kind", DIFFERENT)
def test_a_fold_that_predicts_otherwise_is_refused_in_words(kind, saved_model):
    changes, words = DIFFERENT[kind]
    with pytest.raises(
        UserError, match=r"one architecture and one preprocessing.*fold_0"
    ) as caught:
        _compare(saved_model, changes)
    assert words in str(caught.value)
    assert str(caught.value).count("the ") < 12  # nothing else


@pytest.mark.parametrize("kind", ALIKE)
def test_a_fold_that_predicts_alike_is_taken(kind, saved_model):
    _compare(saved_model, ALIKE[kind], {k: v for k, v in ALIKE[kind].items() if "schemes" in k})


@pytest.mark.slow
def test_continuing_with_other_plans_is_said(workplace, short_run, monkeypatch):
    fold = workplace.train(1, fold="all", trainer="MedDINOv3Trainer_demo")
    path = next((workplace.root / "preprocessed").glob("Dataset001_*")) / "nnUNetPlans.json"
    kept = path.read_text()
    plans = json.loads(kept)
    plans["configurations"]["2d"]["patch_size"] = [32, 32]
    path.write_text(json.dumps(plans))
    for other in fold.parent.glob("fold_0"):
        shutil.rmtree(other)
    try:
        workplace.train(1, fold="all", trainer="MedDINOv3Trainer_demo", continue_training=True)
    finally:
        path.write_text(kept)
    assert "differ from the saved ones in the patch size (patch_size: [32, 32] here" in _log(fold)
