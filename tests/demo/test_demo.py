"""The demo: mistakes it refuses, what it shows, and two whole runs with nnU-Net's own commands."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import SimpleITK as sitk

from nnunetv2_meddinov3.demo.phantom import LABELS, write_phantom_dataset
from nnunetv2_meddinov3.evaluation.dice import dice_per_label, mean_dice
from nnunetv2_meddinov3.raw_dataset import open_raw_dataset

ROOT = Path(__file__).resolve().parents[2]
EXECUTE = """
import sys
import nbformat
from nbclient import NotebookClient
notebook = nbformat.read(sys.argv[1], as_version=4)
NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
nbformat.write(notebook, sys.argv[2])
"""
SMALL = {"shape": (8, 64, 64), "spacing_mm": (16.0, 6.0, 6.0)}


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
    """The environment of a user; our names are registered also where nothing is installed."""
    site = tmp_path_factory.mktemp("site")
    lines = "from nnunetv2_meddinov3.discovery import autoregister\nautoregister()\n"
    (site / "sitecustomize.py").write_text(lines)
    path = os.pathsep.join([str(site), str(ROOT), os.environ.get("PYTHONPATH", "")])
    unset = ("nnUNet_", "MEDDINOV3_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(unset)}
    return {**kept, "PYTHONPATH": path.rstrip(os.pathsep)}


def demo(environment, *arguments, **variables):
    return subprocess.run(
        [sys.executable, "-m", "nnunetv2_meddinov3", "demo", *map(str, arguments)],
        env={**environment, **variables},
        capture_output=True,
        text=True,
        timeout=540,
        check=False,
    )


def make_raw(folder, num_train=6, num_test=0):
    folder.parent.mkdir(parents=True, exist_ok=True)
    write_phantom_dataset(folder, num_train=num_train, num_test=num_test, **SMALL)
    return folder


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    return make_raw(tmp_path_factory.mktemp("data") / "Dataset123_Mine")


def files_of(folder):
    """Everything below a folder, with times and contents."""
    return {
        path.relative_to(folder): (path.stat().st_mtime_ns, path.is_file() and path.read_bytes())
        for path in sorted(folder.rglob("*"))
    }


def not_named(tmp_path):
    (tmp_path / "mydata").mkdir()
    return ["--raw", tmp_path / "mydata"], "has another name"


def no_dataset_json(tmp_path):
    (tmp_path / "Dataset001_Empty").mkdir()
    return ["--raw", tmp_path / "Dataset001_Empty"], "dataset.json"


def broken_dataset_json(tmp_path):
    folder = tmp_path / "Dataset001_Broken"
    folder.mkdir()
    (folder / "dataset.json").write_text("{")
    return ["--raw", folder], "Dataset001_Broken.* must be readable JSON"


def too_few_cases(tmp_path):
    folder = make_raw(tmp_path / "Dataset001_Few", num_train=2)
    return ["--raw", folder], "at least 5 training cases .* has 2"


def two_datasets_of_one_id(tmp_path):
    folder = make_raw(tmp_path / "Dataset001_One", num_train=5)
    (tmp_path / "Dataset001_Other").mkdir()
    return ["--raw", folder], "Dataset001_One and Dataset001_Other"


def out_in_the_dataset(tmp_path):
    folder = make_raw(tmp_path / "Dataset001_One", num_train=5)
    return ["--raw", folder, "--out", folder / "demo"], "must not be inside the dataset"


def out_of_someone_else(tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.tex").write_text("years of work")
    return ["--out", tmp_path / "work"], "holds something else"


def out_is_a_file(tmp_path):
    (tmp_path / "file").write_text("text")
    return ["--out", tmp_path / "file"], "holds something else"


def out_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("text")
    return ["--out", tmp_path / "file" / "demo"], "can be written"


@pytest.mark.slow
@pytest.mark.parametrize(
    "mistake",
    [
        not_named,
        no_dataset_json,
        broken_dataset_json,
        too_few_cases,
        two_datasets_of_one_id,
        out_in_the_dataset,
        out_of_someone_else,
        out_is_a_file,
        out_cannot_be_written,
    ],
)
def test_a_mistake_gets_one_sentence_and_changes_nothing(mistake, tmp_path, environment):
    arguments, sentence = mistake(tmp_path)
    before = files_of(tmp_path)
    if "--out" not in arguments:
        arguments += ["--out", tmp_path / "out"]
    done = demo(environment, *arguments, "--device", "cpu")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert re.search(sentence, done.stderr)
    assert done.stdout == ""
    assert files_of(tmp_path) == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["--size", "100"], 1, "--size must be a multiple of 16"),
        (["--epochs", "0"], 2, "--epochs: must be at least 1"),
        (["--device", "tpu"], 2, "--device: invalid choice"),
    ],
)
def test_a_wrong_value_is_refused_before_anything_is_written(
    arguments, code, sentence, tmp_path, environment
):
    done = demo(environment, "--out", tmp_path / "out", "--device", "cpu", *arguments)
    assert done.returncode == code
    assert sentence in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("variable", "sentence"),
    [("MEDDINOV3_ITERATIONS", "at least 1, got 'many'"), ("MEDDINOV3_ITERATION", "did you mean")],
)
def test_a_wrong_variable_is_refused_before_anything_is_written(
    variable, sentence, tmp_path, environment
):
    done = demo(environment, "--out", tmp_path / "out", **{variable: "many"})
    assert done.returncode == 1
    assert sentence in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def learnt(environment, tmp_path_factory):
    """A whole demo: its folder, and what it wrote to the terminal."""
    out = tmp_path_factory.mktemp("learnt") / "demo"
    arguments = ["--out", out, "--size", 64, "--epochs", 5, "--device", "cpu"]
    done = demo(environment, *arguments, MEDDINOV3_ITERATIONS="40")
    assert done.returncode == 0, done.stderr
    return out, done


@pytest.mark.slow
def test_the_notebook_goes_from_a_volume_to_features_and_labels(learnt, environment):
    out, _ = learnt
    scripts = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])
    variables = {**environment, "PATH": scripts, "MEDDINOV3_EXAMPLE": str(out.parent)}
    executed = out.parent / "executed.ipynb"
    places = [ROOT / "docs/example.ipynb", executed]
    command = [sys.executable, "-c", EXECUTE, *map(str, places)]
    subprocess.run(command, env=variables, cwd=out.parent, check=True, timeout=540)
    written = {path.name for path in (out.parent / "segmented").iterdir()}
    case = "phantom_012"
    assert {f"{case}.nii.gz", f"{case}_overlay.png", f"{case}_uncertainty.nii.gz"} <= written
    assert min(sitk.ReadImage(str(out.parent / "example.png")).GetSize()) > 500
    labels = [out.parent / "segmented" / f"{case}.nii.gz", out / "predictions" / f"{case}.nii.gz"]
    ours, stock = (sitk.GetArrayFromImage(sitk.ReadImage(str(path))) for path in labels)
    assert (ours == stock).all()
    cells = json.loads(executed.read_text(encoding="utf-8"))["cells"]
    shown = [output.get("data", {}) for cell in cells for output in cell.get("outputs", ())]
    assert sum("image/png" in data for data in shown) == 3
    assert (out.parent / "scores" / "report.html").is_file()


@pytest.mark.slow
def test_the_demo_learns_organs_and_leaves_a_report(learnt):
    out, done = learnt
    for command in ("nnUNetv2_plan_and_preprocess", "nnUNetv2_train", "nnUNetv2_predict"):
        assert f"  $ {command} " in done.stdout
    assert "trained: 5/5 epochs, loss" in done.stdout

    dataset = open_raw_dataset(out / "nnUNet_raw" / "Dataset900_Phantom")
    references = out / "nnUNet_raw" / "Dataset900_Phantom" / "labelsTs"
    table = dice_per_label(out / "predictions", references, dataset)
    assert sorted(table) == ["phantom_012", "phantom_013", "phantom_014"]
    assert mean_dice(table).keys() == LABELS.keys() - {"background"}
    # Painting everything with one organ scores 0.13 for the liver and 0.03 for the spine.
    assert mean_dice(table)["liver"] > 0.5
    assert mean_dice(table)["spine"] > 0.4

    shown = next(line for line in done.stdout.splitlines() if line.startswith("mean "))
    assert shown.split()[1] == f"{mean_dice(table)['liver']:.3f}"
    page = (out / "report.html").read_text(encoding="utf-8")
    assert f"<td>{mean_dice(table)['liver']:.3f}</td>" in page
    assert "nothing about accuracy" in page
    assert "nnUNetv2_train 900 2d_64 0 -tr MedDINOv3Trainer_demo" in page
    width, height = sitk.ReadImage(str(out / "overlay.png")).GetSize()
    assert height > width > 500  # three cases, one below the other
    assert len(list((out / "logs").iterdir())) == 3


@pytest.mark.slow
def test_the_demo_runs_on_a_dataset_of_the_users_and_only_reads_it(raw, tmp_path, environment):
    before = files_of(raw.parent)
    out = tmp_path / "out"
    arguments = ["--out", out, "--raw", raw, "--size", 64, "--epochs", 1, "--device", "cpu"]
    done = demo(environment, *arguments, MEDDINOV3_ITERATIONS="2")
    assert done.returncode == 0, done.stderr
    assert files_of(raw.parent) == before
    splits = json.loads((out / "nnUNet_preprocessed" / raw.name / "splits_final.json").read_text())
    predicted = {path.name for path in (out / "predictions").glob("*.nii.gz")}
    assert predicted == {f"{case}.nii.gz" for case in splits[0]["val"]}
    assert "this dataset work together" in (out / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_trainer_that_does_not_exist_ends_the_demo_with_nnunets_own_words(
    raw, tmp_path, environment
):
    out = tmp_path / "out"
    arguments = ["--out", out, "--raw", raw, "--size", 64, "--device", "cpu"]
    done = demo(environment, *arguments, "--trainer", "NoTrainer")
    assert done.returncode == 1
    assert done.stderr.startswith("nnUNetv2_train failed with exit code 1")
    assert "Could not find requested nnunet trainer NoTrainer" in done.stderr
    assert str(out / "logs") in done.stderr
    assert not (out / "report.html").exists()
