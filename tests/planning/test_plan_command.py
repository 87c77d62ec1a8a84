"""``meddinov3 plan`` on plans that nnU-Net made of small datasets."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from nnunetv2.experiment_planning import plan_and_preprocess_api as api
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import (
    ExperimentPlanner,
)

from nnunetv2_meddinov3.cli import main as meddinov3
from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.planning import MedDINOv3Planner

OURS, STOCK = "nnUNetMedDINOv3Plans", "nnUNetPlans"


def plan(number):
    return api.plan_experiment_dataset(number, MedDINOv3Planner)[0]


def fail(argv, capsys):
    """Run the command line on a mistake; return the sentence that the process would end with."""
    capsys.readouterr()
    with pytest.raises(UserError) as caught:
        meddinov3(argv)
    assert capsys.readouterr().out == ""
    return str(caught.value)


@pytest.fixture
def planned(folder):
    """The folder of Dataset901 with nnU-Net's own plans in it."""
    api.plan_experiment_dataset(901, ExperimentPlanner)
    return folder / "Dataset901_Square"


@pytest.mark.slow
def test_the_command_adds_the_configuration_and_nothing_else(planned, capsys):
    path = planned / f"{STOCK}.json"
    path.chmod(0o640)
    before = path.read_text()
    capsys.readouterr()
    assert meddinov3(["plan", "-d", "901", "--size", "128"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.strip() for line in printed[-2:]] == [
        "nnUNetv2_preprocess -d 901 -plans_name nnUNetPlans -c 2d_128",
        "nnUNetv2_train 901 2d_128 0 -p nnUNetPlans -tr MedDINOv3Trainer",
    ]
    plans = json.loads(path.read_text())
    added = plans["configurations"].pop("2d_128")
    assert json.dumps(plans, indent=4) == before  # byte for byte, order included
    assert added["data_identifier"] == "nnUNetPlans_2d_128"
    assert path.stat().st_mode & 0o777 == 0o640
    assert {file.suffix for file in planned.iterdir()} == {".json"}


@pytest.mark.slow
def test_the_command_makes_what_the_planner_makes(dataset, folder, monkeypatch):
    monkeypatch.setenv("MEDDINOV3_SIZE", "256")
    plan(dataset.number)
    path = folder / dataset.name / f"{OURS}.json"
    compact = json.dumps(json.loads(path.read_text()))
    path.write_text(compact)
    meddinov3(["plan", "-d", dataset.name])  # ours are there and as they should be: not touched
    assert path.read_text() == compact
    meddinov3(["plan", "-d", dataset.name, "--size", "128"])
    by_command = json.loads(path.read_text())["configurations"]["2d_128"]
    monkeypatch.setenv("MEDDINOV3_SIZE", "128")
    assert by_command == plan(dataset.number)["configurations"]["2d_128"]


@pytest.mark.slow
def test_a_different_configuration_is_replaced_only_when_told(planned, capsys):
    path = planned / f"{STOCK}.json"
    meddinov3(["plan", "-d", "901", "--size", "128"])
    plans = json.loads(path.read_text())
    plans["configurations"]["2d_128"]["batch_size"] = 5
    path.write_text(json.dumps(plans))
    edited = path.read_bytes()
    sentence = fail(["plan", "-d", "901", "--size", "128"], capsys)
    assert "already has a 2d_128 with a different batch_size" in sentence
    assert path.read_bytes() == edited
    assert meddinov3(["plan", "-d", "901", "--size", "128", "--overwrite"]) == 0
    assert json.loads(path.read_text())["configurations"]["2d_128"]["batch_size"] != 5


@pytest.mark.slow
def test_user_mistakes_get_one_sentence_and_change_nothing(planned, folder, monkeypatch, capsys):
    (folder / "Dataset9010_Other").mkdir()
    path = planned / f"{STOCK}.json"
    no_2d = json.loads(path.read_text())
    del no_2d["configurations"]["2d"]
    (planned / "No2dPlans.json").write_text(json.dumps(no_2d))
    (planned / "CutPlans.json").write_text(path.read_text()[:500])
    (planned / "WrongPlans.json").write_text("[]")
    before = {file: file.read_bytes() for file in folder.rglob("*.json")}
    mistakes = {
        "--size must be a multiple of 16 from 64 to 4096": ["-d", "901", "--size", "100"],
        "--size must be a multiple of 16 from 64 to 4096 ": ["-d", "901", "--size", ""],
        "-gpu_memory_target must be a positive": ["-d", "901", "-gpu_memory_target", "much"],
        "-gpu_memory_target must be a positive number": ["-d", "901", "-gpu_memory_target", "-3"],
        "'77' matches 0": ["-d", "77"],
        "'77' matches 0 of those": ["-d", "901", "77"],
        "has no plans named nnUNetMedDINOv3Plans or nnUNetPlans (there: none)": ["-d", "902"],
        "has no plans named foo (there: CutPlans, No2dPlans, WrongPlans, nnUNetPlans)": [
            *("-d", "901", "-p", "foo"),
        ],
        "may not contain '__'": ["-d", "901", "-p", "a__b"],
        "needs a configuration 2d to inherit from, but nnUNetPlans of Dataset901_Square have "
        "3d_fullres": ["-d", "901", "-p", "No2dPlans"],
        "CutPlans.json must be a JSON file": ["-d", "901", "-p", "CutPlans"],
        "WrongPlans.json must hold nnU-Net plans, but lacks configurations": [
            *("-d", "901", "-p", "WrongPlans"),
        ],
    }
    for expected, arguments in mistakes.items():
        sentence = fail(["plan", *arguments], capsys)
        assert expected.strip() in sentence
        assert "\n" not in sentence
    (folder / "Dataset901_Twin").mkdir()
    assert "'901' matches 2 of those there (Dataset901_Square, Dataset901_Twin)" in fail(
        ["plan", "-d", "901"], capsys
    )
    monkeypatch.setenv("MEDDINOV3_BACKBONE", "resnet")
    assert "MEDDINOV3_BACKBONE must be one of vit_tiny" in fail(["plan", "-d", "902"], capsys)
    assert {file: file.read_bytes() for file in folder.rglob("*.json")} == before


@pytest.mark.parametrize(
    ("value", "expected"), [(None, "is not set"), ("/nowhere/at/all", "not a folder")]
)
def test_the_command_needs_nnunets_folder(value, expected, folder, monkeypatch, capsys):
    if value is None:
        monkeypatch.delenv("nnUNet_preprocessed")
    else:
        monkeypatch.setenv("nnUNet_preprocessed", value)
    sentence = fail(["plan", "-d", "901"], capsys)
    assert sentence.startswith("nnUNet_preprocessed must name the folder")
    assert expected in sentence


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Dataset1234_Big", "Dataset012345_Long", "Dataset007"])
def test_an_id_has_as_many_digits_as_the_folder_says(name, planned, capsys):
    planned.rename(planned.with_name(name))
    number = str(int(name[7:].partition("_")[0]))
    capsys.readouterr()
    for dataset in (number, name):
        assert meddinov3(["plan", "-d", dataset, "--size", "128"]) == 0
        assert f"  nnUNetv2_preprocess -d {number} " in capsys.readouterr().out


@pytest.mark.slow
def test_a_dataset_without_its_description_is_refused(planned, capsys):
    (planned / "dataset.json").write_text("{}")
    assert "must hold numTraining" in fail(["plan", "-d", "901", "--size", "128"], capsys)
    (planned / "dataset.json").unlink()
    assert "dataset.json must be a JSON file" in fail(["plan", "-d", "901"], capsys)


@pytest.mark.slow
@pytest.mark.parametrize("step", ["open", "replace"])
def test_plans_that_cannot_be_written_stay_whole(step, planned, monkeypatch, capsys):
    path = planned / f"{STOCK}.json"
    before = path.read_bytes()
    real = getattr(Path, step)

    def refuse(self, *arguments, **options):
        if self.suffix == ".part":
            raise OSError(30, "Read-only file system")
        return real(self, *arguments, **options)

    monkeypatch.setattr(Path, step, refuse)
    sentence = fail(["plan", "-d", "901", "--size", "128"], capsys)
    assert f"{path} must be writable, but: Read-only file system" in sentence
    assert path.read_bytes() == before
    assert sorted(file.suffix for file in planned.iterdir()) == [".json"] * 3


@pytest.mark.slow
def test_plans_behind_a_link_are_changed_where_they_are(planned, tmp_path):
    path, elsewhere = planned / f"{STOCK}.json", tmp_path / "elsewhere.json"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    meddinov3(["plan", "-d", "901", "--size", "128"])
    assert path.is_symlink()
    assert "2d_128" in json.loads(elsewhere.read_text())["configurations"]


@pytest.mark.slow
def test_a_mistake_ends_the_process_with_code_1_and_the_sentence_alone(folder):
    command = "import sys; from nnunetv2_meddinov3.cli import main; sys.exit(main(sys.argv[1:]))"
    run = subprocess.run(
        [sys.executable, "-c", command, "plan", "-d", "901", "--size", "900"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 1
    assert run.stdout == ""
    assert run.stderr.splitlines()[-1] == (
        "--size must be a multiple of 16 from 64 to 4096 (pixels), but is '900': give one, for "
        "example 896."
    )
    assert "Traceback" not in run.stderr
