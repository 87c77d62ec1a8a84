"""From one's own model: nnU-Net's checkpoints as weights, and ``-pretrained_weights``."""

import importlib
import os
import pickle
import re
from copy import deepcopy

import numpy as np
import pytest
import torch
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights

from nnunetv2_meddinov3 import fine_tuning
from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.models import load_backbone, save_backbone
from nnunetv2_meddinov3.models.architecture import architecture_of
from nnunetv2_meddinov3.models.backbone import Backbone
from nnunetv2_meddinov3.models.build import adapt_stem
from nnunetv2_meddinov3.models.weights import read_checkpoint

ODD = {"embed_dim": 64, "depth": 2, "num_heads": 1, "ffn_hidden": 128, "norm_eps": 3e-5}


@pytest.fixture(scope="module")
def trained(workplace, tmp_path_factory):
    """The final checkpoint of a run from weights with an epsilon that nobody would guess."""
    path = tmp_path_factory.mktemp("weights") / "odd.safetensors"
    torch.manual_seed(3)
    save_backbone(Backbone(architecture_of("vit_tiny", **ODD)), path, licence="test")
    workplace.add_dataset(51, labels={"background": 0, "one": 1})
    workplace.prepare(51)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDDINOV3_EPOCHS", "1")
        patch.setenv("MEDDINOV3_ITERATIONS", "1")
        patch.delenv("MEDDINOV3_BACKBONE")
        patch.setenv("MEDDINOV3_WEIGHTS", str(path))
        fold = workplace.train(51, "MedDINOv3Trainer", fold=0)
    return fold / "checkpoint_final.pth"


@pytest.fixture
def content(trained):
    return torch.load(trained, weights_only=False)


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No variable names weights, and the default ones are not here."""
    monkeypatch.delenv("MEDDINOV3_WEIGHTS", raising=False)
    monkeypatch.delenv("MEDDINOV3_BACKBONE", raising=False)
    monkeypatch.setenv("MEDDINOV3_EPOCHS", "1")
    monkeypatch.setenv("MEDDINOV3_ITERATIONS", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))


@pytest.mark.slow
def test_a_checkpoint_of_ours_is_read_with_the_architecture_of_its_plans(trained, content):
    assert any(isinstance(v, np.generic) for v in content["logging"]["mean_fg_dice"])
    checkpoint = read_checkpoint(trained)
    assert checkpoint.architecture.norm_eps == 3e-5
    assert "nnU-Net checkpoint of MedDINOv3Trainer" in checkpoint.report()
    backbone = load_backbone(trained)
    for name, tensor in backbone.state_dict().items():
        assert torch.equal(tensor, content["network_weights"][f"backbone.{name}"])
    plans = content["init_args"]["plans"]
    facts = plans["foreground_intensity_properties_per_channel"]["0"]
    assert checkpoint.fine_tuned_on == {
        "unit": "HU",
        "clip": [facts["percentile_00_5"], facts["percentile_99_5"]],
        "mean": facts["mean"],
        "std": facts["std"],
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "schemes", [["ZScoreNormalization"], ["CTNormalization"] * 2, [], None, "CTNormalization"]
)
def test_other_normalisations_than_that_of_one_ct_are_no_contract(schemes, content, tmp_path):
    for configuration in content["init_args"]["plans"]["configurations"].values():
        configuration["normalization_schemes"] = schemes
    torch.save(content, tmp_path / "other.pth")
    assert read_checkpoint(tmp_path / "other.pth").fine_tuned_on is None


def test_the_file_of_pretrained_weights_is_found_however_nnunet_calls_its_argument(monkeypatch):
    run_training = importlib.import_module("nnunetv2.run.run_training")

    def renamed(trainer, goes_on, validates, file=None):
        found = fine_tuning.pretrained_file()
        return found if file else (found, "none given")

    monkeypatch.setattr(run_training, "maybe_load_checkpoint", renamed)
    assert run_training.maybe_load_checkpoint(None, False, False, "a.pth") == "a.pth"
    assert run_training.maybe_load_checkpoint(None, False, False) == (None, "none given")
    assert fine_tuning.pretrained_file() is None

    def maybe_load_checkpoint(pretrained_weights_file):  # somebody else's function of that name
        return fine_tuning.pretrained_file()

    assert maybe_load_checkpoint("b.pth") is None
    monkeypatch.delattr(run_training, "maybe_load_checkpoint")
    command = "/bin/nnUNetv2_train 1 2d 0 -tr MedDINOv3Trainer -pretrained_weights=c.pth"
    monkeypatch.setattr("sys.argv", command.split())
    assert fine_tuning.pretrained_file() == "c.pth"
    monkeypatch.setattr("sys.argv", ["somebodys.py", "-pretrained_weights", "c.pth"])
    assert fine_tuning.pretrained_file() is None


def cascaded(content, images, one_hot):
    """A checkpoint of the second stage of a cascade, made from one of a single stage."""
    content = deepcopy(content)
    stem = content["network_weights"]["backbone.vit.patch_embed.proj.weight"]
    shape = (stem.shape[0], images + one_hot, *stem.shape[2:])
    new = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    content["network_weights"]["backbone.vit.patch_embed.proj.weight"] = new
    arguments = content["init_args"]
    configurations = arguments["plans"]["configurations"]
    configurations["2d_fine"] = {"inherits_from": "2d", "previous_stage": "2d"}
    configurations["2d_finer"] = {"inherits_from": "2d_fine"}
    arguments["configuration"] = "2d_finer"
    backbone = configurations["2d"]["architecture"]["arch_kwargs"]["backbone"]
    backbone["input_channels"] = images + one_hot
    configurations["2d_finer"]["architecture"] = configurations["2d"]["architecture"]
    channels = {str(n): f"c{n}" for n in range(images)}
    arguments["dataset_json"] = {**arguments["dataset_json"], "channel_names": channels}
    return content, new


@pytest.mark.slow
@pytest.mark.parametrize(("images", "one_hot"), [(1, 1), (1, 2), (2, 3), (3, 1)])
def test_of_a_cascade_the_kernels_of_one_hot_labels_are_left_out(
    images, one_hot, content, tmp_path
):
    whole, stem = cascaded(content, images, one_hot)
    torch.save(whole, tmp_path / "fine.pth")
    checkpoint = read_checkpoint(tmp_path / "fine.pth")
    assert checkpoint.architecture.input_channels == images
    kept = load_backbone(tmp_path / "fine.pth").vit.patch_embed.proj.weight
    assert torch.equal(kept, stem[:, :images])
    for wanted in {1, 2, 4} - {images}:  # for images of other channels, as from any weights
        fitted = adapt_stem(kept.detach(), wanted, wanted)
        expected = stem[:, :images].mean(1) * images / wanted
        torch.testing.assert_close(fitted[:, -1], expected)
    again = adapt_stem(kept.detach(), images, images + one_hot)  # for the same cascade
    assert not again[:, images:].any()


@pytest.mark.slow
def test_of_a_model_that_is_no_cascade_every_channel_is_kept(content, tmp_path):
    whole, stem = cascaded(content, 2, 2)
    del whole["init_args"]["plans"]["configurations"]["2d_fine"]["previous_stage"]
    torch.save(whole, tmp_path / "plain.pth")
    assert torch.equal(load_backbone(tmp_path / "plain.pth").vit.patch_embed.proj.weight, stem)


@pytest.mark.slow
@pytest.mark.parametrize("channels", [1, 2])
def test_its_backbone_starts_a_run_with_other_classes_and_channels(
    channels, workplace, trained, content, offline, monkeypatch
):
    number = 51 + channels
    workplace.add_dataset(
        number, labels={"background": 0, "a": 1, "b": 2, "c": 3}, channels=channels
    )
    workplace.prepare(number)
    monkeypatch.setenv("MEDDINOV3_WEIGHTS", str(trained))
    monkeypatch.setattr("torch.optim.AdamW.step", lambda self, closure=None: None)
    fold = workplace.train(number, "MedDINOv3Trainer")
    new = torch.load(fold / "checkpoint_final.pth", weights_only=False)
    entry = new["init_args"]["plans"]["configurations"]["2d"]["architecture"]
    assert entry["arch_kwargs"]["backbone"]["norm_eps"] == 3e-5
    for name, tensor in new["network_weights"].items():
        if name.startswith("backbone.") and (channels == 1 or "patch_embed" not in name):
            assert torch.equal(tensor, content["network_weights"][name]), name


@pytest.mark.parametrize("core", ["core", "_core"])
def test_values_of_numpy_of_any_version_build_nothing(core, tmp_path, monkeypatch):
    backbone = Backbone(architecture_of("vit_tiny"))
    weights = {f"backbone.{k}": v for k, v in backbone.state_dict().items()}
    log = {"a": np.float64(1), "b": np.arange(3.0), "c": [np.float32(2)], "d": np.bool_(True)}
    torch.save({"network_weights": weights, "logging": log}, tmp_path / "now.pth")
    data = (tmp_path / "now.pth").read_bytes()
    here = b"numpy._core" if b"numpy._core" in data else b"numpy.core"
    torch.save({"network_weights": weights, "logging": log}, tmp_path / "then.pth")
    other = _rewritten(tmp_path / "then.pth", here, f"numpy.{core}".encode())
    for name in ("scalar", "_reconstruct"):
        monkeypatch.setattr(f"numpy.{here.decode()[6:]}.multiarray.{name}", _explode)
    assert load_backbone(other).embed_dim == 128


def _explode(*args):
    raise AssertionError("numpy was called")


def _rewritten(path, old, new):
    """A torch file whose pickle names another module, as another numpy would have written it."""
    import zipfile

    target = path.with_name("rewritten.pth")
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(target, "w") as out:
        for name in source.namelist():
            data = source.read(name)
            out.writestr(name, data.replace(old, new) if name.endswith("data.pkl") else data)
    return target


class _Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["logging", "init_args", "network_weights"])
def test_code_beside_values_of_numpy_does_not_run(place, content, tmp_path, workplace, offline):
    content[place] = {**content[place], "more": [np.float64(1), _Hostile(str(tmp_path / "ran"))]}
    torch.save(content, tmp_path / "hostile.pth")
    with pytest.raises(UserError, match="would run Python code"):
        load_backbone(tmp_path / "hostile.pth")
    with pytest.raises(UserError, match="would run Python code"):
        workplace.train(
            51, "MedDINOv3Trainer", fold=2, pretrained_weights=str(tmp_path / "hostile.pth")
        )
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
def test_with_pretrained_weights_the_default_ones_are_not_needed(
    workplace, trained, content, offline, monkeypatch
):
    monkeypatch.setattr("torch.optim.AdamW.step", lambda self, closure=None: None)
    fold = workplace.train(51, "MedDINOv3Trainer", fold=1, pretrained_weights=str(trained))
    new = torch.load(fold / "checkpoint_final.pth", weights_only=False)["network_weights"]
    for name, tensor in content["network_weights"].items():
        assert "seg_layers" in name or torch.equal(tensor, new[name])
    log = "".join(p.read_text() for p in fold.glob("training_log*"))
    assert "The network starts from" in log


@pytest.mark.slow
def test_a_file_without_plans_is_loaded_as_before(
    workplace, content, offline, tmp_path, monkeypatch
):
    """Such as one that was slimmed: the architecture is that of the weights then."""
    torch.save({"network_weights": content["network_weights"]}, tmp_path / "slim.pth")
    small = Backbone(architecture_of("vit_tiny", **ODD))
    save_backbone(small, tmp_path / "small.safetensors", licence="test")
    monkeypatch.setenv("MEDDINOV3_WEIGHTS", str(tmp_path / "small.safetensors"))
    fold = workplace.train(
        51, "MedDINOv3Trainer", fold=2, pretrained_weights=str(tmp_path / "slim.pth")
    )
    assert (fold / "checkpoint_final.pth").exists()


def _stock(content):
    content["network_weights"] = {"encoder.stages.0.weight": torch.zeros(3)}


def _wider(content):
    weights = content["network_weights"]
    name = next(k for k in weights if "upsampling.0.conv.weight" in k)
    weights[name] = torch.cat([weights[name], weights[name]], 1)


def _shorter(content):
    name = next(k for k in content["network_weights"] if k.startswith("decoder.upsampling"))
    del content["network_weights"][name]


def _not_finite(content):
    content["network_weights"]["backbone.vit.norm.weight"][0] = torch.nan


WRONG = {
    "a stock network": (_stock, r"must be a checkpoint_\*\.pth of a MedDINOv3 trainer"),
    "another decoder": (_wider, r"decoder\.upsampling\.0\.conv\.weight is \(.*\) is needed"),
    "half a decoder": (_shorter, r"decoder\.upsampling\S* is missing"),
    "NaN": (_not_finite, r"must be finite numbers"),
    "a bare state dict": (lambda c: c.pop("network_weights"), r"must be a checkpoint|hold tensors"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_file_for_pretrained_weights_gets_a_sentence(
    kind, workplace, content, offline, tmp_path
):
    change, sentence = WRONG[kind]
    content = deepcopy(content)
    change(content)
    torch.save(content, tmp_path / "wrong.pth")
    with pytest.raises(UserError) as caught:
        workplace.train(
            51, "MedDINOv3Trainer", fold=3, pretrained_weights=str(tmp_path / "wrong.pth")
        )
    assert re.search(sentence, str(caught.value))
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["missing", "backbone", "pickle"])
def test_a_file_of_another_kind_for_pretrained_weights_gets_a_sentence(
    what, workplace, trained, offline, tmp_path
):
    path = tmp_path / "file.pth"
    if what == "backbone":
        save_backbone(Backbone(architecture_of("vit_tiny")), path, licence="test")
    elif what == "pickle":
        path.write_bytes(pickle.dumps({"network_weights": {}}))
    with pytest.raises(UserError, match=r"file\.pth"):
        workplace.train(51, "MedDINOv3Trainer", fold=3, pretrained_weights=str(path))


@pytest.mark.slow
def test_other_channels_for_pretrained_weights_get_the_way_that_works(workplace, trained, offline):
    workplace.add_dataset(54, labels={"background": 0, "one": 1}, channels=2)
    workplace.prepare(54)
    with pytest.raises(UserError, match=r"patch_embed\S* is .*set MEDDINOV3_WEIGHTS to it"):
        workplace.train(54, "MedDINOv3Trainer", pretrained_weights=str(trained))


@pytest.mark.slow
def test_the_check_asks_for_what_nnunet_asks_for(trained, content, offline):
    from nnunetv2_meddinov3 import fine_tuning
    from nnunetv2_meddinov3.models.segmenter import Segmenter

    entry = content["init_args"]["plans"]["configurations"]["2d"]["architecture"]
    network = Segmenter(1, 5, **entry["arch_kwargs"])
    fine_tuning.check_pretrained(fine_tuning.read_pretrained(str(trained)), network)
    load_pretrained_weights(network, str(trained))
