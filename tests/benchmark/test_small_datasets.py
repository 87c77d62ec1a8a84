"""The script that makes the datasets of the recipe ``small``."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nnunetv2_meddinov3.benchmark.recipe import load_recipe

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "small_datasets.py"
PICTURES = {
    "full": ["PANCREAS_0001-100.jpg", "PANCREAS_0002-7.jpg", "PANCREAS_0003-8.jpg"],
    "cropped": [
        "PANCREAS_0001-cropped-0-100.jpg",
        "PANCREAS_0001-100.jpg",
        "PANCREAS_0004-5.jpg",
        "PANCREAS_0005-5.jpg",
    ],
}


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("small_datasets", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def make(script, monkeypatch, tmp_path):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["small_datasets.py", *map(str, arguments)])
        script.main()
        return tmp_path / "raw"

    return run


def hippocampus(folder, numbers, end=""):
    for part in ("images", "labels"):
        (folder / f"{part}{end}").mkdir(parents=True)
        for number in numbers:
            name = f"hippocampus_{int(number):03d}.nii.gz"
            (folder / f"{part}{end}" / name).write_bytes(f"{part}{number}".encode())
    return folder


def pictures(folder):
    """Top half light and bottom half dark, and a mask of the upper left."""
    for source, names in PICTURES.items():
        for part in ("images", "masks"):
            (folder / source / part).mkdir(parents=True)
        for name in names:
            picture = np.zeros((16, 16), np.uint8)
            picture[:8] = 200
            mask = np.zeros((16, 16), np.uint8)
            mask[:8, :8] = 255
            Image.fromarray(picture).convert("RGB").save(folder / source / "images" / name)
            Image.fromarray(mask).save(folder / source / "masks" / name)
    return [folder / source for source in PICTURES]


@pytest.mark.parametrize("end", ["", "Tr"])
def test_hippocampus_holds_out_a_fifth_and_has_five_folds(end, script, make, tmp_path):
    numbers = script.HIPPOCAMPUS_CASES.split()
    source = hippocampus(tmp_path / "source", [*numbers, 2], end)
    folder = make(tmp_path / "raw", "--hippocampus", source) / "Dataset804_Hippocampus"
    train = {p.name.removesuffix(".nii.gz") for p in (folder / "labelsTr").iterdir()}
    test = {p.name.removesuffix(".nii.gz") for p in (folder / "labelsTs").iterdir()}
    assert (len(train), len(test)) == (156, 39)
    assert "hippocampus_002" not in train | test
    assert (folder / "imagesTs" / f"{min(test)}_0000.nii.gz").read_bytes().startswith(b"images")
    folds = json.loads((folder / "splits_final.json").read_text())
    assert len(folds) == 5
    assert sorted(case for fold in folds for case in fold["val"]) == sorted(train)
    assert all({*fold["train"], *fold["val"]} == train for fold in folds)
    assert json.loads((folder / "dataset.json").read_text())["numTraining"] == 156


def test_slices_of_a_patient_stay_together_and_are_front_up(script, make, monkeypatch, tmp_path):
    monkeypatch.setattr(script, "PANCREAS_CASES", 6)
    folder = make(tmp_path / "raw", "--pancreas", *pictures(tmp_path)) / "Dataset801_Pancreas"
    train, test = (
        {p.name.removesuffix("_0000.png") for p in (folder / part).iterdir()}
        for part in ("imagesTr", "imagesTs")
    )
    assert "panc_0001_crop0_100" in train | test
    assert len(train | test) == 6
    assert not {n.split("_")[1] for n in train} & {n.split("_")[1] for n in test}
    image = np.asarray(Image.open(next((folder / "imagesTr").iterdir())))
    label = np.asarray(Image.open(next((folder / "labelsTr").iterdir())))
    assert image.shape == (16, 16)
    assert image[2, 2] < 20
    assert image[14, 2] > 180
    assert (label[12, 2], label[12, 12], label[2, 2]) == (1, 0, 0)


def test_what_is_missing_or_there_already_is_said(script, make, tmp_path):
    numbers = script.HIPPOCAMPUS_CASES.split()
    some = hippocampus(tmp_path / "some", numbers[1:])
    with pytest.raises(SystemExit, match=r"must hold 195 cases, but lacks .*hippocampus_001"):
        make(tmp_path / "raw", "--hippocampus", some)
    with pytest.raises(SystemExit, match="1040 slices of the pancreas were used; found 6"):
        make(tmp_path / "raw", "--pancreas", *pictures(tmp_path))
    assert not (tmp_path / "raw").exists()
    whole = hippocampus(tmp_path / "whole", numbers)
    make(tmp_path / "raw", "--hippocampus", whole)
    with pytest.raises(SystemExit, match="must not exist yet"):
        make(tmp_path / "raw", "--hippocampus", whole)


def test_the_recipe_is_of_these_datasets():
    assert [dataset.name for dataset in load_recipe("small").datasets] == [
        "Dataset804_Hippocampus",
        "Dataset801_Pancreas",
    ]
