"""``meddinov3 evaluate`` as users run it."""

import csv
import json
import math

import numpy as np
import pytest
import SimpleITK as sitk

from nnunetv2_meddinov3.cli import main
from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.evaluation.cli import read_tolerances

pytest.importorskip("monai", reason="needs the extra benchmark (MONAI)")

LABELS = {"background": 0, "liver": 1, "spleen": 2}
SPACING = (0.5, 0.5, 2.0)


def write(path, array, spacing=SPACING):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(np.asarray(array, np.uint8))
    image.SetSpacing(spacing[: image.GetDimension()])
    sitk.WriteImage(image, str(path))


def phantom(seed):
    array = np.zeros((6, 20, 20), np.uint8)
    array[1:4, 3 + seed : 10, 4:10] = 1
    array[2:5, 12:17, 11:17] = 2
    return array


@pytest.fixture
def dataset(tmp_path):
    """Three cases of two patients, predicted one pixel aside, with dataset.json beside labels."""
    folder = tmp_path / "raw" / "Dataset001_Phantom"
    for case, seed in (("a_1", 0), ("a_2", 1), ("b_1", 2)):
        write(folder / "labelsTr" / f"{case}.nii.gz", phantom(seed))
        write(tmp_path / "predictions" / f"{case}.nii.gz", np.roll(phantom(seed), 1, axis=2))
        write(folder / "imagesTr" / f"{case}_0000.nii.gz", phantom(seed) * 50)
    say(folder, LABELS)
    return folder


def say(folder, labels, ending=".nii.gz", **more):
    content = {"channel_names": {"0": "MRI"}, "labels": labels, "file_ending": ending, **more}
    (folder / "dataset.json").write_text(json.dumps(content))


def evaluate(dataset, *more, labels="labelsTr", out="out"):
    here = dataset.parents[1]
    command = ["evaluate", here / "predictions", dataset / labels, "-o", here / out, "-np", 1]
    assert main([str(part) for part in (*command, *more)]) == 0
    with (here / out / "cases.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return rows, json.loads((here / out / "summary.json").read_text(encoding="utf-8"))


def test_every_case_and_label_has_a_row(dataset, capsys):
    rows, summary = evaluate(dataset)
    assert [(r["case"], r["label"], r["label_value"]) for r in rows] == [
        (case, *label)
        for case in ("a_1", "a_2", "b_1")
        for label in (("liver", "1"), ("spleen", "2"))
    ]
    first = list(rows[0])
    assert first[:7] == [
        *("case", "label", "label_value", "dice", "nsd_voxel", "nsd_surface", "hd95"),
    ]
    spleen = rows[1]
    assert float(spleen["dice"]) == pytest.approx(5 / 6)  # 6 pixels wide, one aside
    assert float(spleen["hd95"]) == pytest.approx(0.5)
    assert float(spleen["nsd_voxel"]) == 1.0  # 0.5 mm is within 1 mm
    assert float(spleen["volume_reference"]) == 3 * 5 * 6 * 0.5
    assert summary["scores"]["spleen"]["dice"]["mean"] == pytest.approx(5 / 6)
    assert summary["scores"]["spleen"]["values"] == [2]
    mean = summary["scores"]["mean over labels"]["dice"]["mean"]
    assert mean == pytest.approx(np.mean([float(row["dice"]) for row in rows]))
    assert summary["patients"] == 3
    said = capsys.readouterr().out
    assert "0.833 [0.833, 0.833]" in said
    page = (dataset.parents[1] / "out" / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png") == 2
    assert "Worst cases" in page
    assert "0.833" in page


def test_patients_count_once(dataset):
    _, summary = evaluate(dataset, "--patients", "(.)_")
    assert summary["patients"] == 2
    with pytest.raises(UserError, match="must find a patient in every name"):
        evaluate(dataset, "--patients", "z", out="other")
    assert not (dataset.parents[1] / "other").exists()


def test_the_order_of_labels_in_dataset_json_changes_nothing(dataset):
    before = evaluate(dataset)
    say(dataset, {"spleen": 2, "background": 0, "liver": 1})
    assert evaluate(dataset) == before


def test_regions_are_unions_and_named_by_their_values(dataset):
    say(dataset, {"background": 0, "both": [2, 1], "spleen": 2}, regions_class_order=[1, 2])
    rows, _ = evaluate(dataset, "--tolerances", tolerances(dataset, {"1 2": 0.1, "spleen": 0.2}))
    assert [(r["label"], r["label_value"], r["tolerance"]) for r in rows[:2]] == [
        ("both", "1 2", "0.1"),
        ("spleen", "2", "0.2"),
    ]
    assert float(rows[0]["nsd_voxel"]) < 1.0


def tolerances(dataset, table):
    path = dataset / "tolerances.json"
    path.write_text(json.dumps(table) if not isinstance(table, str) else table)
    return path


def test_the_tolerances_of_kits23_are_shipped():
    table = read_tolerances("kits23")
    assert {name: round(mm, 4) for name, mm in table.items()} == {
        "1 2 3": 1.0331,
        "2 3": 1.1329,
        "2": 1.1498,
    }


def test_voxels_of_the_ignore_label_count_nowhere(dataset):
    say(dataset, {**LABELS, "ignore": 3})
    before, _ = evaluate(dataset)
    array = phantom(0)
    array[:, 15:] = 3
    write(dataset / "labelsTr" / "a_1.nii.gz", array)
    after, summary = evaluate(dataset)
    assert after[0] == before[0]  # the liver is elsewhere
    assert float(after[1]["volume_prediction"]) == 3 * 3 * 6 * 0.5
    assert summary["notes"] == []


@pytest.mark.parametrize(("policy", "dice"), [("strict", "0"), ("kits", "0"), ("paper", "")])
def test_an_invented_label_scores_by_the_policy(dataset, policy, dice):
    array = phantom(0)
    array[array == 2] = 0
    write(dataset / "labelsTr" / "a_1.nii.gz", array)
    rows, summary = evaluate(dataset, "--empty", policy)
    assert (rows[1]["dice"], rows[1]["empty"]) == (dice, "reference")
    assert summary["empty_masks"] == policy
    patients = summary["scores"]["spleen"]["dice"]["patients"]
    assert patients == (2 if policy == "paper" else 3)


def test_a_label_that_nobody_has_is_null_in_json_and_a_dash_on_the_page(dataset, capsys):
    say(dataset, {**LABELS, "kidney": 9})
    _, summary = evaluate(dataset)
    assert summary["scores"]["kidney"]["dice"]["mean"] is None
    assert math.isfinite(summary["scores"]["mean over labels"]["dice"]["mean"])
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "kidney" in line)
    assert line.split()[2] == "-"


def test_a_missing_prediction_is_an_error_unless_allowed(dataset, capsys):
    (dataset.parents[1] / "predictions" / "b_1.nii.gz").unlink()
    with pytest.raises(UserError, match=r"lacks b_1\.nii\.gz: predict again, or say --missing"):
        evaluate(dataset)
    rows, summary = evaluate(dataset, "--missing", "skip")
    assert {row["case"] for row in rows} == {"a_1", "a_2"}
    assert summary["missing_predictions"] == ["b_1"]
    assert "left out: b_1" in capsys.readouterr().out
    rows, summary = evaluate(dataset, "--missing", "empty")
    assert [row["dice"] for row in rows if row["case"] == "b_1"] == ["0", "0"]
    assert summary["notes"] == ["Cases without a prediction, counted as empty: b_1."]


def test_pictures_without_a_spacing_are_measured_in_pixels(dataset):
    here = dataset.parents[1]
    for case in ("a_1", "b_1"):
        flat = phantom(0)[2]
        write(dataset / "labelsTs" / f"{case}.png", flat)
        write(here / "flat" / f"{case}.png", np.roll(flat, 1, axis=0))
    say(dataset, LABELS, ".png")
    command = ["evaluate", here / "flat", dataset / "labelsTs", "-o", here / "out", "-np", 1]
    assert main([str(part) for part in command]) == 0
    with (here / "out" / "cases.csv").open() as file:
        row = next(csv.DictReader(file))
    assert float(row["hd95"]) == 1.0
    assert float(row["volume_reference"]) == 7 * 6


@pytest.mark.slow
def test_several_processes_give_the_same_files(dataset, capfd):
    here = dataset.parents[1]
    evaluate(dataset)
    evaluate(dataset, "-np", 2, out="parallel")
    assert (here / "parallel" / "cases.csv").read_bytes() == (
        here / "out" / "cases.csv"
    ).read_bytes()
    assert "evaluate: 3/3 cases" in capfd.readouterr().err


def test_odd_predictions_are_noted(dataset):
    array = np.roll(phantom(0), 1, axis=2)
    array[0, 0, 0] = 77
    write(dataset.parents[1] / "predictions" / "a_1.nii.gz", array, (0.5, 0.5, 3.0))
    rows, summary = evaluate(dataset)
    assert "counted as background: 77 (in 1 of 3 cases)" in summary["notes"][0]
    assert "state another voxel spacing than their reference" in summary["notes"][1]
    assert float(rows[1]["volume_prediction"]) == 3 * 5 * 6 * 0.5


def broken_prediction(dataset):
    (dataset.parents[1] / "predictions" / "a_2.nii.gz").write_bytes(b"nothing")


def other_shape(dataset):
    write(dataset.parents[1] / "predictions" / "a_2.nii.gz", np.zeros((6, 20, 19)))


def probabilities(dataset):
    image = sitk.GetImageFromArray(np.full((6, 20, 20), 0.5, np.float32))
    sitk.WriteImage(image, str(dataset.parents[1] / "predictions" / "a_2.nii.gz"))


def no_reference(dataset):
    (dataset / "labelsTr" / "a_2.nii.gz").unlink()


def no_dataset_json(dataset):
    (dataset / "dataset.json").unlink()


def no_predictions(dataset):
    for path in (dataset.parents[1] / "predictions").glob("*"):
        path.unlink()


MISTAKES = {
    broken_prediction: (r"a_2\.nii\.gz must be an image that \w+ reads", ()),
    other_shape: (r"has \(6, 20, 19\) and .* has \(6, 20, 20\) voxels along \(z, y, x\)", ()),
    probabilities: ("must hold whole numbers", ()),
    no_reference: (r"every prediction needs its reference, but .* lacks a_2\.nii\.gz", ()),
    no_dataset_json: ("name one with --dataset-json", ()),
    no_predictions: (r"must hold predictions, but there is no \*\.nii\.gz", ()),
}


@pytest.mark.parametrize("change", MISTAKES, ids=lambda change: change.__name__)
def test_mistakes_get_a_sentence_and_leave_no_file(dataset, change):
    change(dataset)
    words, more = MISTAKES[change]
    with pytest.raises(UserError, match=words):
        evaluate(dataset, *more)
    assert not (dataset.parents[1] / "out" / "cases.csv").exists()


ARGUMENTS = [
    (("--tolerance", "-1"), "must be 0 mm or more"),
    (("--tolerance", "nan"), "must be 0 mm or more"),
    (("-np", "0"), "-np must be at least 1"),
    (("--tolerances", "kits99"), "or one of kits23"),
    (("--tolerances", "kits23"), "'1 2 3' is none of liver"),
    (("--patients", "("), "must be a regular expression"),
    (("--images", "nowhere"), "must be a folder of images"),
]


@pytest.mark.parametrize(("more", "words"), ARGUMENTS, ids=lambda value: str(value))
def test_arguments_that_cannot_be_are_refused_before_any_work(dataset, more, words):
    with pytest.raises(UserError, match=words):
        evaluate(dataset, *more)
    assert not (dataset.parents[1] / "out" / "cases.csv").exists()


@pytest.mark.parametrize(
    "content", ["", "[]", '{"liver": "x"}', '{"liver": -1}', '{"liver": null}']
)
def test_a_table_of_tolerances_must_be_one(dataset, content):
    with pytest.raises(UserError, match=r"tolerances\.json must hold"):
        evaluate(dataset, "--tolerances", tolerances(dataset, content))
