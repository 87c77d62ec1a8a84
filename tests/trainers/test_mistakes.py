"""A user's mistakes, through the commands: one sentence on stderr, exit code 1, nothing lost."""

import hashlib
import json
import os
import pickle
import re

import pytest
import torch

from nnunetv2_meddinov3.models import save_backbone
from nnunetv2_meddinov3.models.architecture import architecture_of
from nnunetv2_meddinov3.models.backbone import Backbone


@pytest.fixture(autouse=True)
def commands(meddinov3_command):
    """Lets ``run`` reach the process that runs commands."""
    global _command
    _command = meddinov3_command


def run(*arguments, **variables):
    """Run ``meddinov3 ...``; returns exit code and the lines of stderr that are no warnings."""
    environment = {**os.environ, "nnUNet_n_proc_DA": "0", "PYTHONWARNINGS": "ignore", **variables}
    environment = {k: v for k, v in environment.items() if v is not None}
    code, _, stderr = _command(arguments, environment)
    lines = [line for line in stderr.splitlines() if line.strip()]
    return code, [line for line in lines if "it/s]" not in line and "?it" not in line]


def train(number, configuration, fold="0", trainer="MedDINOv3Trainer", **variables):
    return run("train", number, configuration, fold, "-tr", trainer, "-device", "cpu", **variables)


def contents(folder):
    """Every file below a folder with its hash, but for the log that nnU-Net opens for each run."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and "training_log" not in p.name
    }


class _Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture(scope="module")
def scene(workplace, tmp_path_factory):
    """A trained fold 0 of Dataset031, and files of weights with every kind of damage."""
    folder = tmp_path_factory.mktemp("weights")
    workplace.add_dataset(31, labels={"background": 0, "one": 1})
    preprocessed = workplace.prepare(31)
    torch.manual_seed(0)
    good = Backbone(architecture_of("vit_tiny", embed_dim=64, depth=2, num_heads=1, ffn_hidden=64))
    save_backbone(good, folder / "good.safetensors", licence="test")
    whole = (folder / "good.safetensors").read_bytes()
    (folder / "truncated.safetensors").write_bytes(whole[: len(whole) // 2])
    torch.save({"state": _Hostile(str(folder / "hacked"))}, folder / "hostile.pth")
    (folder / "hostile.pkl").write_bytes(pickle.dumps(_Hostile(str(folder / "hacked"))))
    with torch.no_grad():
        good.vit.blocks[1].mlp.fc1.weight[3, 3] = float("nan")
    save_backbone(good, folder / "nan.safetensors", licence="test")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDDINOV3_EPOCHS", "1")
        patch.setenv("MEDDINOV3_ITERATIONS", "1")
        patch.delenv("MEDDINOV3_BACKBONE")
        patch.setenv("MEDDINOV3_WEIGHTS", str(folder / "good.safetensors"))
        workplace.train(31, "MedDINOv3Trainer")
    plans = json.loads((preprocessed / "nnUNetPlans.json").read_text())
    plans["configurations"]["2d_into_3d"] = {"inherits_from": "2d", "next_stage": "3d_fullres"}
    unprepared = {"inherits_from": "2d", "data_identifier": "nnUNetPlans_2d_unprepared"}
    plans["configurations"]["2d_unprepared"] = unprepared
    (preprocessed / "nnUNetPlans.json").write_text(json.dumps(plans))
    return workplace, folder


MISTAKES = {
    "missing weights offline": (
        {"weights": None, "HF_HUB_OFFLINE": "1", "MEDDINOV3_BACKBONE": None},
        r"offline.*set MEDDINOV3_WEIGHTS to a local file",
    ),
    "a file that does not exist": ({"weights": "absent.pth"}, r"there is no .*absent\.pth"),
    "weights of another size": (
        {"weights": "good.safetensors", "MEDDINOV3_BACKBONE": "vit_base"},
        r"MEDDINOV3_BACKBONE=vit_base must be the size .*embed_dim 64 instead of 768",
    ),
    "a truncated file": ({"weights": "truncated.safetensors"}, r"truncated\.safetensors .*damaged"),
    "a hostile pickle": ({"weights": "hostile.pth"}, r"would run Python code"),
    "a bare hostile pickle": ({"weights": "hostile.pkl"}, r"would run Python code"),
    "weights with NaN": ({"weights": "nan.safetensors"}, r"'blocks\.1\.mlp\.fc1\.weight'.*NaN"),
    "a 3D configuration": ({"configuration": "3d_fullres"}, r"needs a 2D .*3d_fullres is 3D"),
    "a cascade into 3D": (
        {"configuration": "2d_into_3d"},
        r"2d_into_3d belongs to a cascade with 3d_fullres, which is 3D",
    ),
    "an unknown configuration": ({"configuration": "2d_896"}, r"must hold .*2d_896.*plan it"),
    "a size that was not planned": (
        {"configuration": "2d_448"},
        r"meddinov3 plan -d 31 --size 448 -p nnUNetPlans.*nnUNetv2_preprocess -d 31 .*-c 2d_448",
    ),
    "data that were not preprocessed": (
        {"configuration": "2d_unprepared", "weights": "absent.pth"},  # which are not read
        r"does not exist: run `nnUNetv2_preprocess -d 31 -plans_name nnUNetPlans -c 2d_unprepared",
    ),
    "a second fold of another architecture": (
        {"weights": "none", "fold": "1", "MEDDINOV3_BACKBONE": "vit_tiny"},
        r"all folds .* one architecture.*differs from fold_0",
    ),
    "an unknown value": (
        {"weights": "none", "MEDDINOV3_BACKBONE": "vit_giant"},
        r"MEDDINOV3_BACKBONE must be one of vit_tiny, .*'vit_giant'",
    ),
    "an unknown variable": (
        {"MEDDINOV3_WEIGTHS": "x.pth"},
        r"MEDDINOV3_WEIGTHS is unknown: did you mean MEDDINOV3_WEIGHTS",
    ),
    "a count that is none": (
        {"MEDDINOV3_EPOCHS": "0.5"},
        r"MEDDINOV3_EPOCHS must be a whole number .*'0\.5'",
    ),
    "an unwritable results folder": (
        {"weights": "none", "results": "good.safetensors", "MEDDINOV3_BACKBONE": "vit_tiny"},
        r"results folder \(nnUNet_results\) must be writable",
    ),
    "an unknown source of weights": ({"weights": "ftp:there"}, r"weights must be a path, timm:"),
}


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_sentence_and_loses_nothing(mistake, scene, tmp_path):
    workplace, folder = scene
    settings, sentence = MISTAKES[mistake]
    settings = dict(settings)
    weights = settings.pop("weights", "good.safetensors")
    variables = {"MEDDINOV3_BACKBONE": None, "HF_HOME": str(tmp_path)}
    if weights is not None and ":" not in weights and weights != "none":
        weights = str(folder / weights)
    if "results" in settings:
        variables["nnUNet_results"] = str(folder / settings.pop("results"))
    before = contents(workplace.root), contents(folder)
    code, lines = train(
        "31",
        settings.pop("configuration", "2d"),
        settings.pop("fold", "0"),
        **{**variables, "MEDDINOV3_WEIGHTS": weights, **settings},
    )
    assert code == 1
    assert len(lines) == 1, lines
    assert re.search(sentence, lines[0]), lines[0]
    assert (contents(workplace.root), contents(folder)) == before
    assert not (folder / "hacked").exists()


@pytest.mark.slow
@pytest.mark.parametrize("size", ["900", "big", "32", "-16"])
def test_an_unknown_planner_size_gets_one_sentence(size, scene):
    workplace, _ = scene
    before = contents(workplace.root)
    code, lines = run("plan", "-d", "31", f"--size={size}")
    assert code == 1
    assert len(lines) == 1, lines
    assert size in lines[0]
    assert "16" in lines[0]
    assert contents(workplace.root) == before
