"""Stock nnU-Net's commands with a mistake in them: one sentence, in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nnunetv2_meddinov3 import discovery, stock_commands
from nnunetv2_meddinov3.errors import UserError

OURS = "nnUNetMedDINOv3Plans"
ROOT = Path(__file__).parents[1]

# What the start-up file and then the script that pip writes for a command do.
COMMAND = """
import sys
from importlib.metadata import entry_points
from nnunetv2_meddinov3 import discovery
discovery.autoregister()
sys.argv = ["somewhere/" + sys.argv[1], *sys.argv[2:]]
(entry,) = entry_points(group="console_scripts", name=sys.argv[0].partition("/")[2])
sys.exit(entry.load()())
"""


@pytest.fixture
def places(monkeypatch, tmp_path):
    """nnU-Net's folders with Dataset1234_Big, its plans, and fold 0 of a trained model."""
    for part in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{part}", str(tmp_path / part))
        (tmp_path / part / "Dataset1234_Big").mkdir(parents=True)
    monkeypatch.delenv("nnUNet_extTrainer", raising=False)
    monkeypatch.delenv("MEDDINOV3_SIZE", raising=False)
    monkeypatch.setenv("MEDDINOV3_AUTOREGISTER", "1")
    (tmp_path / "raw/Dataset1234_Big/dataset.json").write_text("{}")
    (tmp_path / "images").mkdir()
    plans = {
        "dataset_name": "Dataset1234_Big",
        "plans_name": OURS,
        "configurations": {"2d": {}, "2d_896": {}},
    }
    (tmp_path / f"preprocessed/Dataset1234_Big/{OURS}.json").write_text(json.dumps(plans))
    model = tmp_path / "results/Dataset1234_Big" / f"MedDINOv3Trainer__{OURS}__2d_896"
    (model / "fold_0/validation").mkdir(parents=True)
    for name in ("plans.json", "dataset.json", "fold_0/checkpoint_final.pth"):
        (model / name).write_text("{}")
    (model / "fold_2").mkdir()
    (model / "fold_2/checkpoint_latest.pth").touch()
    return tmp_path


def words(places, line):
    """A command line; MODEL and IMAGES stand for folders."""
    model = places / "results/Dataset1234_Big" / f"MedDINOv3Trainer__{OURS}__2d_896"
    line = line.replace("MODEL", str(model)).replace("IMAGES", str(places / "images"))
    return line.split()


def check(places, line):
    command, *arguments = words(places, line)
    return stock_commands.check(command, arguments, discovery.TRAINERS, discovery.PLANNERS)


PREDICT = f"-p {OURS} -o OUT -device cpu"
MISTAKES = {
    "nnUNetv2_train 1234 2d_896 0 -tr MedDINOv3Trainner": "did you mean MedDINOv3Trainer?",
    "nnUNetv2_train 1234 2d_896 0 -tr MedDNIOv3Trainer": "did you mean MedDINOv3Trainer?",
    "nnUNetv2_train 1234 2d_896 0 -tr=DINOv3Trainer_10epochs": "export MEDDINOV3_EPOCHS=10,",
    "nnUNetv2_predict -d 1234 -i A -o B -c 2d -tr DINOv3Trainer_300epoch": "MEDDINOV3_EPOCHS=300",
    "nnUNetv2_find_best_configuration 1234 -tr nnUNetTrainer MedDINOTrainer -c 2d": (
        "did you mean MedDINOv3Trainer?"
    ),
    "nnUNetv2_accumulate_crossval_results 1234 -c 2d -tr MeddinoTrainer": "did you mean MedDINOv3",
    "nnUNetv2_export_model_to_zip -d 1234 -o o.zip -tr MedDINOv3": "did you mean MedDINOv3Trainer?",
    "nnUNetv2_plan_and_preprocess -d 1234 -pl MedDINOv3Planer": "did you mean MedDINOv3Planner?",
    "nnUNetv2_plan_experiment -d 1234 -pl MeDDINOv3Planner": "did you mean MedDINOv3Planner?",
    "nnUNetv2_train 77 2d 0 -tr MedDINOv3Trainer -device cpu": r"none of them has a Dataset077_",
    "nnUNetv2_train 123 2d 0 -tr MedDINOv3Trainer -device cpu": (
        r"Dataset123_\.\.\. \(nnU-Net would take Dataset1234_Big, which begins so\)"
    ),
    "nnUNetv2_train Big 2d 0 -tr MedDINOv3Trainer -device cpu": "its id, such as 802, or its name",
    "nnUNetv2_train 1234 2d_896 0 -tr MedDINOv3Trainer -device cpu": f"-p {OURS} is: add it",
    f"nnUNetv2_train 1234 2d_448 0 -tr DINOv3Trainer -p {OURS} -device cpu": (
        f"meddinov3 plan -d 1234 --size 448 -p {OURS}"
    ),
    "nnUNetv2_train Dataset999_New 2d_448 0 -tr DINOv3Trainer -p Mine -device cpu": (
        "`MEDDINOV3_SIZE=448 nnUNetv2_plan_and_preprocess -d 999 -pl MedDINOv3Planner -c 2d_448`"
    ),
    "nnUNetv2_train Dataset999_New 2d 0 -tr DINOv3Trainer -device cpu": (
        "`nnUNetv2_plan_and_preprocess -d 999 -c 2d`"
    ),
    f"nnUNetv2_train 1234 2d_896 1 -tr MedDINOv3Trainer -p {OURS} -device cpu --val": (
        r"no .*fold_1/checkpoint_final.pth: run the same command without --val.*\(there: fold_0\)"
    ),
    f"nnUNetv2_train 1234 2d_896 2 -tr MedDINOv3Trainer -p {OURS} -device cpu --val": (
        "its training is not finished: continue it with --c"
    ),
    f"nnUNetv2_train 1234 2d_896 0 -tr MedDINOv3Trainer -p {OURS} -device cpu --val --val_best": (
        r"no .*fold_0/checkpoint_best.pth"
    ),
    f"nnUNetv2_predict -d 1234 -c 2d_896 -i IMAGES -tr MedDINOv3Trainer {PREDICT}": (
        r"fold_1/checkpoint_final.pth does not exist: give -f 0, or train it"
    ),
    f"nnUNetv2_predict -d 1234 -c 2d -i IMAGES -tr MedDINOv3Trainer {PREDICT}": (
        rf"must hold a trained model.* there are MedDINOv3Trainer__{OURS}__2d_896: check -tr, -p"
    ),
    f"nnUNetv2_predict -d 1234 -c 2d_896 -i GONE -f 0 -tr MedDINOv3Trainer {PREDICT}": (
        "-i must name a folder of images, but there is no folder GONE"
    ),
    "nnUNetv2_predict_from_modelfolder -m MODEL -i IMAGES -o OUT -f 0 2 -device cpu": (
        r"fold_2/checkpoint_final.pth does not exist: give -f 0,"
    ),
    f"nnUNetv2_find_best_configuration 1234 -tr MedDINOv3Trainer -p {OURS}": (
        "must hold a trained model"
    ),
    f"nnUNetv2_find_best_configuration 1234 -tr MedDINOv3Trainer -p {OURS} -c 2d_896": (
        "fold_1/validation does not exist: give -f 0"
    ),
    "nnUNetv2_find_best_configuration 1234 -tr MedDINOv3Trainer -c 2d_896 -f 0": (
        f"-p {OURS} is: add it"
    ),
    "nnUNetv2_plan_and_preprocess -d 1234 -pl MedDINOv3Planner -c 2d_448": (
        "export MEDDINOV3_SIZE=448, or add it"
    ),
    "nnUNetv2_plan_and_preprocess -d 8 -pl MedDINOv3Planner": r"none of them has a Dataset008_",
    "nnUNetv2_preprocess -d 1234 -c 2d_896": f"-plans_name {OURS} is: add it",
    f"nnUNetv2_preprocess -d 1234 -plans_name {OURS} -c 2d_448": "meddinov3 plan -d 1234 --size 44",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_in_a_stock_command_is_one_sentence(line, places):
    with pytest.raises(UserError, match=MISTAKES[line]) as caught:
        check(places, line)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "ours"),
    [
        (f"nnUNetv2_train 1234 2d_896 0 -tr MedDINOv3Trainer -p {OURS} -device cpu", True),
        (f"nnUNetv2_train Dataset1234_Big 2d 0 -tr DINOv3Trainer -p {OURS} -device=cpu", True),
        (f"nnUNetv2_train 1234 2d_896 0 -tr MedDINOv3Trainer -p {OURS} -device cpu --val", True),
        (f"nnUNetv2_train 1234 2d_896 2 -tr MedDINOv3Trainer -p {OURS} -device cpu --c", True),
        (f"nnUNetv2_predict -d 1234 -c 2d_896 -i IMAGES -f 0 -tr MedDINOv3Trainer {PREDICT}", True),
        ("nnUNetv2_predict_from_modelfolder -m MODEL -i IMAGES -o O -f 0 -device cpu --c", True),
        (f"nnUNetv2_find_best_configuration 1234 -tr MedDINOv3Trainer -p {OURS} -c 2d_896 -f 0", 1),
        ("nnUNetv2_plan_and_preprocess -d 1234 -pl MedDINOv3Planner -c 2d_896 2d", True),
        ("nnUNetv2_plan_and_preprocess -d 1234 -pl MedDINOv3Planner -c 2d_448 --no_pp", True),
        (f"nnUNetv2_preprocess -d 1234 -plans_name {OURS} -c 2d_896", True),
        # what is nobody's of ours, or what nnU-Net's own parser answers
        ("nnUNetv2_train 9999 2d 0", False),
        ("nnUNetv2_train 9999 2d 0 -tr MyMedDINOv3Trainer", False),
        ("nnUNetv2_predict -d 9 -c 2d -i A -o B -tr nnUNetTrainer_5epochs", False),
        ("nnUNetv2_predict_from_modelfolder -m model -i A -o B", False),
        ("nnUNetv2_find_best_configuration 1234", False),
        ("nnUNetv2_plan_and_preprocess -d 9 -c 3d_fullres", False),
        ("nnUNetv2_preprocess -d 9 -c 2d 3d_fullres", False),
        ("nnUNetv2_train -tr MedDINOv3Trainer", False),
        ("nnUNetv2_train 9 2d 0 -tr MedDINOv3Trainr --help", False),
        ("nnUNetv2_evaluate_simple gt predicted -l 1 2", False),
    ],
)
def test_what_can_run_and_what_is_not_ours_passes(line, ours, places):
    assert check(places, line) == ours


def test_an_id_of_several_datasets_is_told_which_name_to_give(places):
    (places / "raw/Dataset123_Small").mkdir()
    line = f"nnUNetv2_train 123 2d 0 -tr MedDINOv3Trainer -p {OURS} -device cpu"
    with pytest.raises(
        UserError, match=r"Dataset1234_Big, Dataset123_Small: give the name Dataset123"
    ):
        check(places, line)


@pytest.mark.parametrize("variable", ["nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"])
def test_a_variable_that_is_not_set_is_named_in_every_command_that_needs_it(
    variable, places, monkeypatch
):
    lines = {
        "nnUNet_raw": ["nnUNetv2_plan_and_preprocess -d 1234 -pl MedDINOv3Planner"],
        "nnUNet_preprocessed": [
            "nnUNetv2_train 1234 2d 0 -tr MedDINOv3Trainer -device cpu",
            "nnUNetv2_find_best_configuration 1234 -tr MedDINOv3Trainer",
            "nnUNetv2_preprocess -d 1234 -c 2d_896",
        ],
        "nnUNet_results": [
            "nnUNetv2_predict -d 1234 -c 2d -i A -o B -tr DINOv3Trainer -device cpu",
            "nnUNetv2_export_model_to_zip -d 1234 -o o.zip -tr MedDINOv3Trainer",
        ],
    }
    monkeypatch.delenv(variable)
    for line in lines[variable]:
        with pytest.raises(UserError, match=rf"^{variable} must name .* export {variable}=FOLDER"):
            check(places, line)


def run(line, places, **variables):
    """A finished process of a stock command."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MEDDINOV3_WEIGHTS": "none", **variables}
    return subprocess.run(
        [sys.executable, "-c", COMMAND, *words(places, line)],
        env={name: value for name, value in environment.items() if value is not None},
        cwd=places,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize(
    "line",
    [
        "nnUNetv2_train 1234 2d_896 0 -tr MedDINOv3Trainer_75epochs",
        "nnUNetv2_predict -d 1234 -i A -o B -c 2d -tr MedDINOv3Trainer_frozn",
        "nnUNetv2_find_best_configuration 1234 -tr MedDINOv3Traner -c 2d",
        "nnUNetv2_plan_and_preprocess -d 1234 -pl MedDINOv3Plannner",
        f"nnUNetv2_train 1234 2d_896 1 -tr MedDINOv3Trainer -p {OURS} -device cpu --val",
    ],
)
def test_the_process_ends_with_the_sentence_alone_before_torch_is_imported(line, places):
    done = run(line, places, PYTHONPROFILEIMPORTTIME="1")
    said = [each for each in done.stderr.splitlines() if not each.startswith("import time:")]
    assert done.returncode == 1
    assert len(said) == 1, said
    assert "| torch" not in done.stderr
    assert not done.stdout


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("folder", ["MODEL", "renamed"])
def test_a_prediction_without_a_cuda_device_says_which_option_to_add(folder, places):
    where, is_renamed = words(places, "MODEL")[0], folder == "renamed"
    plans = json.loads((places / f"preprocessed/Dataset1234_Big/{OURS}.json").read_text())
    plans |= {"image_reader_writer": "SimpleITKIO", "label_manager": "LabelManager"}
    plans["configurations"]["2d_896"] = {"architecture": {}}
    facts = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "a": 1}}
    Path(where, "plans.json").write_text(json.dumps(plans))
    Path(where, "dataset.json").write_text(json.dumps(facts))
    content = {
        "trainer_name": "MedDINOv3Trainer",
        "init_args": {"configuration": "2d_896"},
        "network_weights": {},
    }
    torch.save(content, Path(where, "fold_0/checkpoint_final.pth"))
    if is_renamed:
        Path(where).rename(places / "renamed")
        where = places / "renamed"
    line = f"nnUNetv2_predict_from_modelfolder -m {where} -i IMAGES -o OUT -f 0"
    done = run(line, places, nnUNet_results=None, nnUNet_raw=None, nnUNet_preprocessed=None)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("-device cuda needs such a device")
    assert "Traceback" not in done.stderr
    assert is_renamed or done.stderr.count("\n") == 1


@pytest.mark.slow
def test_other_trainers_are_left_to_nnunet(places):
    done = run("nnUNetv2_train 77 2d 0 -tr nnUNetTrainer", places)
    assert "RuntimeError: Could not find a dataset with the ID 77" in done.stderr
