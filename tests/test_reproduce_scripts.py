"""The scripts of benchmarks/reproduce print commands that nnU-Net's own parsers accept."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from unittest import mock

import pytest
import torch
from nnunetv2.experiment_planning import plan_and_preprocess_entrypoints
from nnunetv2.inference import predict_from_raw_data
from nnunetv2.run import run_training

from nnunetv2_meddinov3.discovery import PLANNERS, TRAINERS
from nnunetv2_meddinov3.planning import PLANS_NAME

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks" / "reproduce"
BENCHMARKS = {  # script -> id and the paper's row for MedDINOv3 (table 2: DSC, NSD)
    "amos22.sh": (219, "87.38 | 77.15"),
    "btcv.sh": (17, "78.79 | 70.38"),
    "kits23.sh": (220, "70.68 | 62.67"),
    "lits.sh": (3, "75.28 | 53.01"),
}
VARIABLES = ("DATASET", "FOLD", "WEIGHTS", "DEVICE", "IMAGES", "PREDICTIONS", "DRY_RUN")

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


def run_script(name, **variables):
    kept = {
        key: value
        for key, value in os.environ.items()
        if key not in VARIABLES and not key.startswith(("nnUNet_", "MEDDINOV3_"))
    }
    return subprocess.run(
        ["bash", str(FOLDER / name)],
        env={**kept, **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def printed_commands(output):
    lines = [shlex.split(line[2:]) for line in output.splitlines() if line.startswith("$ ")]
    return {line[0]: line[1:] for line in lines}


def parse_plan(arguments, monkeypatch):
    """What nnU-Net's planning, given these arguments, would do: calls of its three parts."""
    module = plan_and_preprocess_entrypoints
    names = ("extract_fingerprints", "plan_experiments", "preprocess")
    parts = {name: mock.Mock() for name in names}
    for name, part in parts.items():
        monkeypatch.setattr(module, name, part)
    monkeypatch.setattr("sys.argv", ["nnUNetv2_plan_and_preprocess", *arguments])
    module.plan_and_preprocess_entry()
    return {name: part.call_args.args for name, part in parts.items()}


def parse_train(arguments, monkeypatch):
    """The positional arguments with which nnU-Net would train."""
    train = mock.Mock()
    monkeypatch.setattr(run_training, "run_training", train)
    _keep_threads(monkeypatch)
    monkeypatch.setattr("sys.argv", ["nnUNetv2_train", *arguments])
    run_training.run_training_entry()
    return (*train.call_args.args, train.call_args.kwargs["device"])


def parse_predict(arguments, monkeypatch, tmp_path):
    """The model that nnU-Net would predict with, and the predictor that was asked to."""
    model, predictor = mock.Mock(), mock.MagicMock()
    monkeypatch.setattr(predict_from_raw_data, "get_output_folder", model)
    monkeypatch.setattr(predict_from_raw_data, "nnUNetPredictor", predictor)
    _keep_threads(monkeypatch)
    monkeypatch.setattr("sys.argv", ["nnUNetv2_predict", *arguments])
    monkeypatch.chdir(tmp_path)
    predict_from_raw_data.predict_entry_point()
    return model.call_args.args, predictor


def _keep_threads(monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", mock.Mock())
    monkeypatch.setattr(torch, "set_num_interop_threads", mock.Mock())


@pytest.mark.parametrize("script", BENCHMARKS)
def test_nnunet_accepts_every_printed_command(script, monkeypatch, tmp_path):
    number, _ = BENCHMARKS[script]
    done = run_script(script, DRY_RUN="1")
    assert done.returncode == 0, done.stderr
    commands = printed_commands(done.stdout)
    assert list(commands) == ["nnUNetv2_plan_and_preprocess", "nnUNetv2_train", "nnUNetv2_predict"]

    planning = parse_plan(commands["nnUNetv2_plan_and_preprocess"], monkeypatch)
    assert planning["extract_fingerprints"][0] == [number]
    assert planning["extract_fingerprints"][3] is True  # the dataset's integrity is verified
    assert planning["plan_experiments"][:2] == ([number], "MedDINOv3Planner")
    assert planning["preprocess"][2] == ["2d_896"]

    training = parse_train(commands["nnUNetv2_train"], monkeypatch)
    assert training[:5] == (str(number), "2d_896", "0", "MedDINOv3Trainer", PLANS_NAME)
    assert training[5:] == (None, 1, False, False, False, False, False, torch.device("cuda"))

    model, predictor = parse_predict(commands["nnUNetv2_predict"], monkeypatch, tmp_path)
    assert model == (str(number), "MedDINOv3Trainer", PLANS_NAME, "2d_896")
    initialise = predictor.return_value.initialize_from_trained_model_folder
    assert initialise.call_args.args[1] == [0]
    assert predictor.call_args.kwargs["device"] == torch.device("cuda")


def test_the_names_in_the_commands_are_ours():
    assert "MedDINOv3Trainer" in TRAINERS
    assert "MedDINOv3Planner" in PLANNERS


def test_a_wrong_flag_would_be_noticed(monkeypatch, tmp_path):
    with pytest.raises(SystemExit):
        parse_plan(["-d", "219", "-planner", "x", "-c", "2d"], monkeypatch)
    with pytest.raises(SystemExit):
        parse_train(["219", "2d_896", "0", "-trainer", "x"], monkeypatch)
    with pytest.raises(SystemExit):
        parse_predict(["-i", "x", "-o", "y", "-d", "219"], monkeypatch, tmp_path)


@pytest.mark.parametrize("script", BENCHMARKS)
def test_the_papers_numbers_and_the_caveats_are_printed(script):
    output = run_script(script, DRY_RUN="1").stdout
    assert re.search(rf"^MedDINOv3 +\| {re.escape(BENCHMARKS[script][1])}$", output, re.MULTILINE)
    for word in ("test images included", "One fold", "nnU-Net (2D)"):
        assert word in output


def test_variables_reach_the_commands():
    done = run_script(
        "amos22.sh",
        DRY_RUN="1",
        DATASET="Dataset042_My Own",
        FOLD="3",
        DEVICE="cpu",
        WEIGHTS="my weights.pth",
        nnUNet_raw="/a b",
    )
    commands = printed_commands(done.stdout)
    assert commands["export"] == ["MEDDINOV3_WEIGHTS=my weights.pth"]
    assert commands["nnUNetv2_train"][:3] == ["42", "2d_896", "3"]
    assert commands["nnUNetv2_train"][-1] == "cpu"
    predict = commands["nnUNetv2_predict"]
    assert predict[:2] == ["-i", "/a b/Dataset042_My Own/imagesTs"]
    assert predict[predict.index("-f") + 1] == "3"


def test_without_dry_run_the_commands_run_in_order_and_a_failure_stops_them(tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("nnUNetv2_plan_and_preprocess", "nnUNetv2_train", "nnUNetv2_predict"):
        body = f'echo "{name} with $MEDDINOV3_WEIGHTS" >> "$LOG"; [ {name} != "$FAILS" ]\n'
        (tools / name).write_text(f"#!/bin/sh\n{body}")
        (tools / name).chmod(0o755)
    raw = tmp_path / "raw" / "Dataset003_Liver"
    (raw / "imagesTs").mkdir(parents=True)
    (raw / "dataset.json").write_text("{}")
    variables = {
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
        "nnUNet_raw": str(tmp_path / "raw"),
        "nnUNet_preprocessed": str(tmp_path),
        "nnUNet_results": str(tmp_path),
        "WEIGHTS": "w.pth",
    }
    done = run_script("lits.sh", LOG=str(tmp_path / "all"), FAILS="none", **variables)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "all").read_text().splitlines() == [
        "nnUNetv2_plan_and_preprocess with w.pth",
        "nnUNetv2_train with w.pth",
        "nnUNetv2_predict with w.pth",
    ]
    done = run_script("lits.sh", LOG=str(tmp_path / "some"), FAILS="nnUNetv2_train", **variables)
    assert done.returncode != 0
    assert len((tmp_path / "some").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({}, "nnUNet_raw must name a folder"),
        ({"DATASET": "219"}, "DATASET must be a folder name"),
        (
            dict.fromkeys(("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"), "nowhere"),
            "nowhere/",
        ),
    ],
)
def test_a_mistake_gets_one_sentence(variables, sentence):
    done = run_script("lits.sh", **variables)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert sentence in done.stderr
