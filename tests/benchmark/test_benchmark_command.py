"""``meddinov3 benchmark`` as users run it."""

import csv
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import SimpleITK as sitk
import yaml

from nnunetv2_meddinov3.benchmark import running
from nnunetv2_meddinov3.benchmark.jobs import jobs, read_state
from nnunetv2_meddinov3.benchmark.recipe import load_recipe
from nnunetv2_meddinov3.cli import main
from nnunetv2_meddinov3.errors import UserError

pytest.importorskip("monai", reason="needs the extra benchmark (MONAI)")

RECIPE = {
    "name": "try",
    "title": "A comparison of two",
    "datasets": [{"name": "Dataset701_Discs", "evaluate_on": "test", "patients": r"case_(\d+)"}],
    "methods": [
        {
            "name": name,
            "trainer": trainer,
            "configuration": "2d_64",
            "backbone": "vit_tiny",
        }
        for name, trainer in (("one", "MedDINOv3Trainer_scratch"), ("two", "MedDINOv3Trainer_demo"))
    ],
    "budgets": [
        {"name": "equal iterations", "epochs": 2, "iterations": 2},
        {"name": "equal time", "minutes": 0.05},
    ],
    "few_cases": {"numbers": [2], "methods": ["one"], "budgets": ["equal iterations"]},
    "reference": "one",
    "published": {"Dataset701_Discs": {"two": {"dsc": 91.5}, "three": {"dsc": 80.0, "nsd": 70.0}}},
    "differences": ["They used other discs."],
}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """nnU-Net's folders with a raw dataset of eight cases, and a recipe."""
    folder = tmp_path / "raw" / "Dataset701_Discs"
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:40, :48]
    for case in range(8):
        split = "Tr" if case < 6 else "Ts"
        disc = (y - rng.integers(15, 25)) ** 2 + (x - rng.integers(15, 30)) ** 2 < 80
        label = np.repeat(disc[None], 3, axis=0).astype(np.uint8)
        ct = (rng.normal(-50, 30, label.shape) + 200 * label).astype(np.int16)
        for array, part, ending in ((ct, "images", "_0000"), (label, "labels", "")):
            path = folder / f"{part}{split}" / f"case_{case}{ending}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            image = sitk.GetImageFromArray(array)
            image.SetSpacing((0.8, 0.8, 3.0))
            sitk.WriteImage(image, str(path))
    content = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "disc": 1}}
    content |= {"numTraining": 6, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(content))
    for name in ("raw", "preprocessed"):
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    monkeypatch.setenv("nnUNet_def_n_proc", "1")
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    return tmp_path


def benchmark(place, verb, *more):
    command = ["benchmark", verb, place / "recipe.yaml", "-o", place / "out", *more]
    return main([str(part) for part in command])


def fake(commands, fail=lambda command: False, validate=lambda folder, trainer: None):
    """A stand-in for running commands, which leaves the files that they would leave."""

    def run_logged(command, log):
        commands.append(command)
        if fail(command):
            raise UserError(f"`{command}` failed with exit code 1; its log is {log}")
        arguments = list(command.arguments)
        if "nnUNetv2_plan_and_preprocess" in arguments:
            preprocessed = running.check_folders()["nnUNet_preprocessed"]
            (preprocessed / "Dataset701_Discs").mkdir(parents=True)
        elif "nnUNetv2_train" in arguments:
            given = arguments[arguments.index("nnUNetv2_train") + 1 :]
            _, config, fold, _, trainer, _, plans = given[:7]
            results = running.Path(command.variables["nnUNet_results"])
            folder = results / "Dataset701_Discs" / f"{trainer}__{plans}__{config}" / f"fold_{fold}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "checkpoint_final.pth").touch()
            validate(folder, trainer)
            (folder / "training_log_1.txt").write_text("Epoch time: 9 s\nEpoch time: 1.5 s\n")
        elif "evaluate" in arguments:
            out = running.Path(arguments[arguments.index("-o") + 1])
            seed = len(str(out)) % 7
            rows = [
                f"case_{n},disc,1,{0.5 + 0.05 * n + 0.01 * seed},0.5,0.6,2.5,0.1,10,11,1,"
                for n in range(6, 8)
            ]
            head = "case,label,label_value,dice,nsd_voxel,nsd_surface,hd95,volume_error,"
            head += "volume_prediction,volume_reference,tolerance,empty"
            out.mkdir(parents=True)
            (out / "cases.csv").write_text("\n".join([head, *rows, ""]))
        return 3.0

    return run_logged


def run_faked(place, monkeypatch, *more, **options):
    commands = []
    monkeypatch.setattr(running, "run_logged", fake(commands, **options))
    return benchmark(place, "run", "-device", "cpu", *more), commands


def trained(commands):
    return [command for command in commands if "nnUNetv2_train" in command.arguments]


def test_a_plan_prints_every_command_and_what_is_left(place, capsys):
    assert benchmark(place, "plan") == 0
    said = capsys.readouterr().out
    assert "MEDDINOV3_SIZE=64 MEDDINOV3_BACKBONE=vit_tiny nnUNetv2_plan_and_preprocess" in said
    assert said.count("nnUNetv2_train 701 2d_64") == 5
    assert "0/2 -tr MedDINOv3Trainer_scratch" in said
    assert "# seed 0  # for 0.05 minutes" in said
    assert "Done: 0, failed: 0, to do: 5." in said
    assert "Without an estimate until one is done: one (2 jobs), two (1 jobs)." in said


def test_work_that_is_done_is_not_repeated(place, monkeypatch, capsys):
    code, commands = run_faked(place, monkeypatch)
    assert code == 0
    assert len(trained(commands)) == 5
    (prepared,) = (c for c in commands if "nnUNetv2_plan_and_preprocess" in c.arguments)
    assert prepared.arguments[:3] == ("nnUNetv2_plan_and_preprocess", "-d", "701")
    folds = json.loads((place / "preprocessed/Dataset701_Discs/splits_final.json").read_text())
    assert [len(fold["train"]) for fold in folds] == [4, 5, 5, 5, 5, 2]
    few = [c for c in trained(commands) if "5" in c.arguments]
    assert len(few) == 1  # the sixth fold has the two cases
    again, commands = run_faked(place, monkeypatch)
    assert (again, commands) == (0, [])
    capsys.readouterr()
    benchmark(place, "plan")
    assert "Done: 5, failed: 0, to do: 0." in capsys.readouterr().out


def test_a_budget_in_minutes_is_as_many_epochs_as_fit(place, monkeypatch):
    _, commands = run_faked(place, monkeypatch)
    timed = trained(commands)[3:]
    # 0.05 minutes are 3 s; an epoch takes 1.5 s, as the logs of the first budget say
    assert [c.variables["MEDDINOV3_EPOCHS"] for c in timed] == ["2", "2"]
    assert [c.variables["MEDDINOV3_ITERATIONS"] for c in timed] == ["2", "2"]


def test_a_failed_job_is_noted_and_does_not_stop_the_others(place, monkeypatch, capsys):
    def fail(command):
        return {"nnUNetv2_train", "MedDINOv3Trainer_demo"} <= set(command.arguments)

    code, commands = run_faked(place, monkeypatch, fail=fail)
    assert code == 1
    assert len(trained(commands)) == 4  # the timed job of the failed method has no time to go by
    said = capsys.readouterr().err
    assert "failed with exit code 1" in said
    assert "must have a finished job of the budget 'equal iterations'" in said
    assert "Failed jobs: 2. --retry runs them again." in said
    code, commands = run_faked(place, monkeypatch)
    assert (code, trained(commands)) == (1, [])
    code, commands = run_faked(place, monkeypatch, "--retry")
    assert (code, len(trained(commands))) == (0, 2)


def test_one_job_can_be_run_alone_as_a_slurm_array_does(place, monkeypatch):
    code, commands = run_faked(place, monkeypatch, "--prepare")
    assert (code, len(commands)) == (0, 1)
    code, commands = run_faked(place, monkeypatch, "--job", "1")
    assert (code, len(trained(commands))) == (0, 1)
    with pytest.raises(UserError, match="--job must be from 0 to 4, got 5"):
        run_faked(place, monkeypatch, "--job", "5")


def test_a_stopped_training_goes_on(place, monkeypatch):
    run_faked(place, monkeypatch, "--prepare")
    recipe = load_recipe(str(place / "recipe.yaml"))
    job = jobs(recipe)[0]
    folder = job.model_folder(place / "out") / "fold_0"
    folder.mkdir(parents=True)
    (folder / "checkpoint_latest.pth").touch()
    commands = []
    monkeypatch.setattr(running, "run_logged", lambda command, log: commands.append(command) or 1.0)
    running._train(job, place / "out", "0", {}, "cpu")
    assert commands[0].arguments[-1] == "--c"


def test_a_job_that_another_process_runs_is_left_to_it(place, monkeypatch):
    run_faked(place, monkeypatch, "--prepare")
    job = jobs(load_recipe(str(place / "recipe.yaml")))[0]
    with running.locked(job.folder(place / "out"), print):
        code, commands = run_faked(place, monkeypatch, "--job", "0")
    assert (code, commands) == (1, [])
    assert read_state(job.folder(place / "out")) == {}


def test_jobs_are_spread_over_gpus(place, monkeypatch):
    _, commands = run_faked(place, monkeypatch, "--gpus", "0,3")
    assert {c.variables["CUDA_VISIBLE_DEVICES"] for c in trained(commands)} <= {"0", "3"}
    assert all("CUDA_VISIBLE_DEVICES" in c.variables for c in trained(commands))


def test_slurm_gets_a_script_that_prepares_and_an_array(place, monkeypatch, capsys):
    code, commands = run_faked(place, monkeypatch, "--slurm")
    assert (code, commands) == (0, [])
    said = capsys.readouterr().out
    assert "sbatch --dependency=afterok:$id" in said
    train = (place / "out" / "train.sbatch").read_text()
    assert "#SBATCH --array=0-4" in train
    assert '--job "$SLURM_ARRAY_TASK_ID"' in train
    assert f"export nnUNet_raw={place / 'raw'}" in train
    assert "--prepare" in (place / "out" / "prepare.sbatch").read_text()


def test_the_report_has_our_numbers_beside_the_published_ones(place, monkeypatch, capsys):
    run_faked(place, monkeypatch)
    assert benchmark(place, "collect") == 0
    assert "5 of 5 jobs are done." in capsys.readouterr().out
    with (place / "out" / "results" / "cases.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5 * 2
    page = (place / "out" / "report.html").read_text(encoding="utf-8")
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page.split("</style>")[-1]))
    assert "Dataset701_Discs, equal iterations, all training cases" in text
    assert "Dataset701_Discs, equal iterations, 2 training cases" in text
    assert "91.5" in text
    assert re.search(r"The worst patients, .* patient one two 6 0\.\d{3} 0\.\d{3} 7 0\.", text)
    assert "three (published)" in text
    assert "They used other discs." in text
    assert "- (below 6 patients)" in text
    assert page.count("data:image/png") == 4  # a plot a setting, and the few cases
    assert {p.name for p in (place / "out" / "figures").iterdir()} == {
        "dataset701_discs_equal_iterations_all_training_cases.png",
        "dataset701_discs_equal_iterations_2_training_cases.png",
        "dataset701_discs_equal_time_all_training_cases.png",
        "dataset701_discs_few_cases.png",
    }
    before = page
    elsewhere = ["benchmark", "collect", place / "recipe.yaml", "-o", place / "again"]
    main([str(p) for p in [*elsewhere, "--results", place / "out" / "results"]])
    assert (place / "again" / "report.html").read_text(encoding="utf-8") == before


def test_nothing_to_collect_and_unset_folders_get_a_sentence(place, monkeypatch):
    with pytest.raises(UserError, match="must hold finished jobs of try"):
        benchmark(place, "collect")
    monkeypatch.delenv("nnUNet_preprocessed")
    with pytest.raises(UserError, match="nnUNet_preprocessed must name a folder"):
        benchmark(place, "run")


def test_a_dataset_that_is_not_there_is_refused_before_any_work(place, monkeypatch):
    (place / "raw" / "Dataset701_Discs" / "dataset.json").unlink()
    with pytest.raises(UserError, match=r"has no dataset\.json: `meddinov3 dataset --help`"):
        run_faked(place, monkeypatch)


def test_the_batch_size_is_written_once_all_is_planned(place, monkeypatch):
    methods = [{**m, "plans": "mine"} for m in RECIPE["methods"]]
    methods.append({**methods[0], "name": "stock", "configuration": "2d"})
    recipe = {**RECIPE, "methods": methods, "batch_size": 3, "mirroring": False}
    (place / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    commands, leave = [], fake([])

    def run_logged(command, log):
        commands.append(command)
        if "nnUNetv2_plan_and_preprocess" not in command.arguments:
            return leave(command, log)
        folder = place / "preprocessed" / "Dataset701_Discs"
        folder.mkdir(parents=True, exist_ok=True)
        planned = {name: {"batch_size": 99} for name in ("2d", "2d_64", "3d_fullres")}
        (folder / "mine.json").write_text(json.dumps({"configurations": planned}))
        return 1.0

    monkeypatch.setattr(running, "run_logged", run_logged)
    for _ in range(2):
        assert benchmark(place, "run", "-device", "cpu") == 0
    plans = json.loads((place / "preprocessed" / "Dataset701_Discs" / "mine.json").read_text())
    sizes = {name: c["batch_size"] for name, c in plans["configurations"].items()}
    assert sizes == {"2d": 3, "2d_64": 3, "3d_fullres": 99}
    predicted = [c.arguments for c in commands if "nnUNetv2_predict" in c.arguments]
    assert predicted
    assert all("--disable_tta" in arguments for arguments in predicted)


def test_weights_are_made_before_they_are_used_and_once(place, monkeypatch, capsys):
    methods = [{**RECIPE["methods"][0], "weights": "pretrained"}, RECIPE["methods"][1]]
    recipe = {**RECIPE, "methods": methods, "pretraining": {"config": "tiny_stage1"}}
    (place / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    benchmark(place, "plan")
    said = capsys.readouterr().out
    assert said.index("meddinov3 curate") < said.index("meddinov3 pretrain tiny_stage1")
    _, commands = run_faked(place, monkeypatch)
    made = [c for c in commands if {"curate", "pretrain"} & set(c.arguments)]
    assert commands.index(made[-1]) < commands.index(trained(commands)[0])
    weights = [c.variables.get("MEDDINOV3_WEIGHTS") for c in trained(commands)]
    assert {w for w in weights if w} == {
        str(place / "out/prepared/Dataset701_Discs__pretrained/run/stage1/teacher.safetensors")
    }
    _, commands = run_faked(place, monkeypatch)
    assert commands == []


@pytest.mark.slow
def test_a_comparison_runs_to_its_report_by_stock_commands(place, capsys):
    one = {"methods": RECIPE["methods"][:1], "published": {}}
    few = {**RECIPE, "budgets": RECIPE["budgets"][:1], "few_cases": None, **one}
    (place / "recipe.yaml").write_text(yaml.safe_dump(few))
    assert benchmark(place, "run", "-device", "cpu") == 0, capsys.readouterr().err
    assert benchmark(place, "collect") == 0
    with (place / "out" / "results" / "cases.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["case"]) for row in rows] == [("one", "case_6"), ("one", "case_7")]
    assert all(0 <= float(row["dice"]) <= 1 for row in rows)
    with (place / "out" / "results" / "runs.csv").open() as file:
        (runs,) = {row["epochs"] for row in csv.DictReader(file)}
    assert runs == "2"
    (job,) = (place / "out" / "jobs").iterdir()
    assert not list(job.rglob("validation"))  # cases that nobody measures
    assert "/3 slices" in (job / "predict.txt").read_text()  # our predictor's


def test_a_command_that_fails_says_the_end_of_its_log(tmp_path):
    code = "import sys; print('words of it'); sys.exit(3)"
    command = running.Command((sys.executable, "-c", code), {})
    with pytest.raises(UserError, match=r"failed with exit code 3; its log is (.|\n)*words of it"):
        running.run_logged(command, tmp_path / "log.txt")
    with pytest.raises(UserError, match="nowhere must be installed"):
        running.run_logged(running.Command(("nowhere",), {}), tmp_path / "log.txt")


def test_folds_of_other_recipes_stay_where_they_are(place, monkeypatch):
    run_faked(place, monkeypatch, "--prepare")
    splits = place / "preprocessed" / "Dataset701_Discs" / "splits_final.json"
    before = json.loads(splits.read_text())
    assert len(before) == 6  # five, and one of two cases
    for numbers, count in (([3], 7), ([2, 3], 7)):
        few = {**RECIPE["few_cases"], "numbers": numbers}
        (place / "recipe.yaml").write_text(yaml.safe_dump({**RECIPE, "few_cases": few}))
        command = ["benchmark", "run", place / "recipe.yaml", "-o", place / f"out{len(numbers)}"]
        monkeypatch.setattr(running, "_prepare_one", lambda *arguments: None)
        main([str(part) for part in [*command, "--prepare"]])
        assert json.loads(splits.read_text())[:6] == before
        assert len(json.loads(splits.read_text())) == count
    index = json.loads((place / "out2/prepared/Dataset701_Discs__folds.json").read_text())
    assert index == {"0/all": 0, "0/2": 5, "0/3": 6}


def test_folds_that_are_not_the_datasets_own_are_kept_and_refused(place, monkeypatch):
    run_faked(place, monkeypatch, "--prepare")
    splits = place / "preprocessed" / "Dataset701_Discs" / "splits_final.json"
    before = splits.read_text()
    own = [dict(fold) for fold in json.loads(before)[:5]]
    own[0], own[1] = own[1], own[0]
    (place / "raw" / "Dataset701_Discs" / "splits_final.json").write_text(json.dumps(own))
    datasets = [{**RECIPE["datasets"][0], "splits": True}]
    (place / "recipe.yaml").write_text(yaml.safe_dump({**RECIPE, "datasets": datasets}))
    with pytest.raises(UserError, match=r"must begin with the folds of .*: remove it, or let"):
        run_faked(place, monkeypatch, "--prepare")
    assert splits.read_text() == before
    splits.unlink()
    run_faked(place, monkeypatch, "--prepare")
    assert json.loads(splits.read_text())[:5] == own


def with_rate(place, rate):
    methods = [{**method, "changes": {"vit_lr": rate}} for method in RECIPE["methods"]]
    (place / "recipe.yaml").write_text(yaml.safe_dump({**RECIPE, "methods": methods}))


def test_trainings_are_not_mistaken_for_those_of_other_settings(place, monkeypatch, capsys):
    with_rate(place, 1e-3)
    code, commands = run_faked(place, monkeypatch)
    assert (code, len(trained(commands))) == (0, 5)
    assert {command.arguments[4] for command in trained(commands)} == {'{"vit_lr": 0.001}'}
    code, commands = run_faked(place, monkeypatch)
    assert (code, trained(commands)) == (0, [])
    with_rate(place, 2e-3)
    capsys.readouterr()
    code, commands = run_faked(place, monkeypatch)
    assert (code, trained(commands)) == (1, [])
    said = capsys.readouterr().err
    assert "has the job with changes {'vit_lr': 0.001}, but the recipe says" in said


def test_plan_and_report_name_the_changes(place, monkeypatch, capsys):
    with_rate(place, 1e-3)
    assert benchmark(place, "plan") == 0
    assert capsys.readouterr().out.count("# vit_lr 0.001") == 5
    run_faked(place, monkeypatch)
    assert benchmark(place, "collect") == 0
    assert "two: vit_lr 0.001" in (place / "out" / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("trainer", "changes", "sentence"),
    [
        ("MedDINOv3Trainer_v2", {"vit_rate": 1e-3}, "must be of .*layer_decay.*vit_lr.*, but vit_"),
        ("MedDINOv3Trainer_v2", {"is_frozen": 3}, "is_frozen of .* is False, so 3 cannot be it"),
        ("MedDINOv3Trainer_v2", {"vit_lr": True}, "vit_lr of .* is 0.0001, so True cannot be it"),
        ("nnUNetTrainer", {"initial_lr": 1e-3}, "one of our trainers, but nnUNetTrainer is none"),
        ("UNetTrainer", {"initial_lr": 1e-3}, "must be of nothing, but initial_lr came"),
    ],
)
def test_changes_that_a_trainer_does_not_have_are_refused(
    trainer, changes, sentence, place, monkeypatch
):
    methods = [{**RECIPE["methods"][0], "trainer": trainer, "changes": changes}]
    recipe = {**RECIPE, "methods": methods}
    (place / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(UserError, match=sentence):
        run_faked(place, monkeypatch, "--prepare")


def test_changes_reach_the_optimiser(place):
    """In a process of its own, as ``run`` does it."""
    code = (
        "from nnunetv2_meddinov3 import discovery\n"
        "from nnunetv2_meddinov3.benchmark.nnunet_process import change\n"
        "change('MedDINOv3Trainer_v2', {'vit_lr': 7e-4, 'layer_decay': 1})\n"
        "trainer = discovery.resolve('MedDINOv3Trainer_v2')\n"
        "print(trainer.vit_lr, trainer.layer_decay, trainer.decoder_lr)\n"
        "print(discovery.resolve('MedDINOv3Trainer_scratch').vit_lr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["0.0007", "1", "0.001", "0.0003"]


def test_a_job_keeps_to_its_share_of_the_cores():
    """nnU-Net asks for all cores on a CPU, in training and in prediction."""
    code = (
        "import torch\n"
        "from nnunetv2_meddinov3.benchmark.nnunet_process import limit_threads\n"
        "limit_threads({share!r})\n"
        "before = torch.get_num_threads()\n"
        "torch.set_num_threads(7)\n"
        "print(before, torch.get_num_threads())\n"
    )
    for share, threads in (("1", ["1", "1"]), ("", ["2", "7"])):
        done = subprocess.run(
            [sys.executable, "-c", code.format(share=share)],
            check=True,
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "2"},
        )
        assert done.stdout.split() == threads


def validation(place):
    """A recipe that measures on the validation cases of fold 0: case_0 and case_3, with others."""
    datasets = [{"name": "Dataset701_Discs", "evaluate_on": "validation"}]
    recipe = {**RECIPE, "datasets": datasets, "budgets": RECIPE["budgets"][:1], "few_cases": None}
    (place / "recipe.yaml").write_text(yaml.safe_dump(recipe))


def predict_all(folder, trainer):
    """What nnU-Net leaves of a validation: its cases, then the summary."""
    splits = next(folder.parents[6].glob("preprocessed/*/splits_final.json"))
    for case in json.loads(splits.read_text())[0]["val"]:
        (folder / "validation").mkdir(exist_ok=True)
        (folder / "validation" / f"{case}.nii.gz").touch()
    (folder / "validation" / "summary.json").touch()


def killed_in_validation(folder, trainer):
    """The same, killed after the first case of one method."""
    predict_all(folder, trainer)
    if trainer == "MedDINOv3Trainer_demo":
        (folder / "validation" / "summary.json").unlink()
        _, *others = sorted((folder / "validation").glob("*.nii.gz"))
        assert others
        for path in others:
            path.unlink()


def test_a_validation_that_was_stopped_is_finished(place, monkeypatch, capsys):
    validation(place)
    code, commands = run_faked(place, monkeypatch, validate=killed_in_validation)
    assert code == 1
    assert (
        "must have all 2 validation cases of the fold, but lacks case_" in capsys.readouterr().err
    )
    code, commands = run_faked(place, monkeypatch, "--retry", validate=predict_all)
    assert code == 0
    (again,) = trained(commands)
    assert again.arguments[-1] == "--val"
    assert "--no-validation" not in again.arguments
    assert "MedDINOv3Trainer_demo" in again.arguments
    code, commands = run_faked(place, monkeypatch, validate=predict_all)
    assert (code, trained(commands)) == (0, [])


def test_runs_that_measured_other_cases_are_not_compared(place, monkeypatch):
    run_faked(place, monkeypatch)
    assert benchmark(place, "collect") == 0
    for folder in (place / "out" / "results", *(place / "out" / "jobs").glob("*two*/evaluation")):
        kept = (folder / "cases.csv").read_text().splitlines()
        at = max(i for i, line in enumerate(kept) if "case_7" in line)
        (folder / "cases.csv").write_text("\n".join(kept[:at] + kept[at + 1 :]) + "\n")
    lacks = (
        r"all runs on fold 0 of Dataset701_Discs must measure the same 2 cases, but .* lacks case_7"
    )
    with pytest.raises(UserError, match=lacks):
        benchmark(place, "collect")
    with pytest.raises(UserError, match=lacks):
        benchmark(place, "collect", "--results", place / "out" / "results")
