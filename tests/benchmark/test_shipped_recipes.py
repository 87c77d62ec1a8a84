"""The commands of the shipped recipes are ones that nnU-Net's own parsers accept."""

import re
from pathlib import Path
from unittest import mock

import pytest
import torch
from nnunetv2.experiment_planning import plan_and_preprocess_entrypoints
from nnunetv2.inference import predict_from_raw_data
from nnunetv2.run import run_training

from nnunetv2_meddinov3.benchmark import running
from nnunetv2_meddinov3.benchmark.jobs import jobs, preparations
from nnunetv2_meddinov3.benchmark.planned import plan_lines
from nnunetv2_meddinov3.benchmark.recipe import SHIPPED, load_recipe
from nnunetv2_meddinov3.discovery import PLANNERS, TRAINERS

RECIPES = sorted(path.stem for path in SHIPPED.glob("*.yaml"))
DOCS = Path(__file__).parents[2] / "docs" / "reproduce.md"


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


@pytest.mark.parametrize("name", RECIPES)
def test_nnunet_accepts_every_command(name, monkeypatch, tmp_path):
    recipe = load_recipe(name)
    for preparation in preparations(recipe):
        program, *arguments = preparation.command().arguments
        assert program == "nnUNetv2_plan_and_preprocess"
        planning = parse_plan(arguments, monkeypatch)
        assert planning["extract_fingerprints"][0] == [int(preparation.dataset.number)]
        assert planning["plan_experiments"][1] in {*PLANNERS, "ExperimentPlanner"}
        assert planning["preprocess"][2] == [preparation.method.configuration]
    commands = []
    monkeypatch.setattr(running, "run_logged", lambda command, log: commands.append(command) or 1.0)
    for variable in ("nnUNet_raw", "nnUNet_preprocessed"):
        monkeypatch.setenv(variable, str(tmp_path))
    for job in jobs(recipe):
        commands.clear()
        test = job.dataset.model_copy(update={"evaluate_on": "test"})
        job = type(job)(**{**vars(job), "dataset": test})
        running._train(job, tmp_path, "0", {}, "cuda")
        running._predictions(job, tmp_path, "0", {}, "cuda", ())
        train, predict = (command.arguments for command in commands)
        training = parse_train(train[train.index("nnUNetv2_train") + 1 :], monkeypatch)
        chosen = (job.dataset.number, job.method.configuration, "0", job.method.trainer)
        assert training[:5] == (*chosen, job.method.plans)
        assert training[5:] == (None, 1, False, False, False, False, False, torch.device("cuda"))
        assert job.method.trainer in {*TRAINERS, "nnUNetTrainer"}
        model, predictor = parse_predict(
            list(predict[predict.index("nnUNetv2_predict") + 1 :]), monkeypatch, tmp_path
        )
        names = (job.method.trainer, job.method.plans, job.method.configuration)
        assert model == (job.dataset.number, *names)
        initialise = predictor.return_value.initialize_from_trained_model_folder
        assert initialise.call_args.args[1] == [0]
        assert predictor.call_args.kwargs["device"] == torch.device("cuda")


def test_a_wrong_flag_would_be_noticed(monkeypatch, tmp_path):
    with pytest.raises(SystemExit):
        parse_plan(["-d", "219", "-planner", "x", "-c", "2d"], monkeypatch)
    with pytest.raises(SystemExit):
        parse_train(["219", "2d_896", "0", "-trainer", "x"], monkeypatch)
    with pytest.raises(SystemExit):
        parse_predict(["-i", "x", "-o", "y", "-d", "219"], monkeypatch, tmp_path)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_the_docs_have_the_trainings_and_the_hours_of_the_plans(number, tmp_path):
    row = re.search(rf"^\| {number}, .*\| (\d+) \| (\d+) \| [\d.]+ TB \|$", DOCS.read_text(), re.M)
    lines = plan_lines(load_recipe(f"table{number}"), tmp_path, "cuda")
    said = "\n".join(lines)
    assert f"Train, predict and measure ({row[1]} jobs):" in said
    assert f"Training still takes about {row[2]}.0 hours on one device" in said
