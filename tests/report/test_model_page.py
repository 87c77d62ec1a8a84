"""``meddinov3 report`` on model folders made by hand; tests/trainers has one that was trained."""

import json
import os
import pickle
import re

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from nnunetv2_meddinov3 import cli
from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.report.model_folder import epoch_rows, read_model
from nnunetv2_meddinov3.report.model_page import commands, write_model_page

MODEL = "nnUNetTrainer__nnUNetPlans__2d"
LABELS = {"background": 0, "liver": 1, "tumour": 2}


def logging_of(epochs, labels=2):
    """As nnU-Net logs: lists with numbers of numpy."""
    each = [[np.float32(0.1 * i + 0.05 * n) for n in range(labels)] for i in range(epochs)]
    return {
        "mean_fg_dice": [np.float32(0.1 * i) for i in range(epochs)],
        "ema_fg_dice": [np.float64(0.05 * i) for i in range(epochs)],
        "dice_per_class_or_region": each,
        "train_losses": [np.float32(1 - 0.2 * i) for i in range(epochs)],
        "val_losses": [np.float32(1 - 0.1 * i) for i in range(epochs)],
        "lrs": [0.01 * (1 - i / epochs) for i in range(epochs)],
        "epoch_start_timestamps": [100.0 * i for i in range(epochs)],
        "epoch_end_timestamps": [100.0 * i + 60 for i in range(epochs)],
    }


class Maker:
    """Makes a raw dataset and a model folder in nnU-Net's places below a root."""

    def __init__(self, root, labels=LABELS, name="Dataset007_Made"):
        self.root, self.name, self.labels = root, name, labels
        self.raw = root / "raw" / name
        self.folder = root / "results" / name / MODEL
        self.facts = {
            "channel_names": {"0": "CT"},
            "labels": labels,
            "numTraining": 8,
            "file_ending": ".nii.gz",
        }
        for part in (self.raw / "imagesTr", self.raw / "labelsTr", self.folder):
            part.mkdir(parents=True)
        plans = {
            "dataset_name": name,
            "plans_name": "nnUNetPlans",
            "configurations": {
                "base": {"patch_size": [64, 48], "spacing": [1.5, 1.5], "batch_size": 3},
                "2d": {
                    "inherits_from": "base",
                    "batch_size": 12,
                    "normalization_schemes": ["CTNormalization"],
                    "architecture": {
                        "network_class_name": "some.module.PlainConvUNet",
                        "arch_kwargs": {"n_stages": 4},
                    },
                },
            },
        }
        (self.folder / "plans.json").write_text(json.dumps(plans))
        for folder in (self.raw, self.folder):
            (folder / "dataset.json").write_text(json.dumps(self.facts))

    def fold(self, name="fold_0", epochs=3, checkpoint="checkpoint_final.pth", **content):
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        torch.save(
            {
                "network_weights": {"a": torch.zeros(1000, 1500), "b": torch.zeros(3)},
                "optimizer_state": {"param_groups": [{"lr": 0.01}], "state": {}},
                "logging": logging_of(epochs, len(self.labels) - 1),
                "_best_ema": np.float32(0.5),
                "current_epoch": epochs,
                "init_args": {"configuration": "2d"},
                "trainer_name": "nnUNetTrainer",
                **content,
            },
            folder / checkpoint,
        )
        return folder

    def validate(self, fold, dice, files=True):
        """Write what nnU-Net's validation leaves; ``dice`` is case -> summary's key -> Dice."""
        folder = self.folder / fold / "validation"
        folder.mkdir(parents=True, exist_ok=True)
        per_case = []
        for number, (case, found) in enumerate(dice.items()):
            label = np.zeros((3, 20, 24), np.uint8)
            label[:, 4:12, 4:12] = 1
            predicted = np.roll(label, number, axis=2)
            for array, path in (
                (label * 90 - 20, self.raw / "imagesTr" / f"{case}_0000.nii.gz"),
                (label, self.raw / "labelsTr" / f"{case}.nii.gz"),
                (predicted, folder / f"{case}.nii.gz"),
            ):
                if files:
                    sitk.WriteImage(sitk.GetImageFromArray(array.astype(np.int16)), str(path))
            per_case.append(
                {
                    "metrics": {key: {"Dice": value} for key, value in found.items()},
                    "prediction_file": f"/some/where/{case}.nii.gz",
                    "reference_file": f"/else/where/{case}.nii.gz",
                }
            )
        content = {"metric_per_case": per_case, "mean": {}, "foreground_mean": {}}
        (folder / "summary.json").write_text(json.dumps(content))


@pytest.fixture
def made(tmp_path, monkeypatch):
    for part in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{part}", str(tmp_path / part))
    return Maker(tmp_path)


def page_of(maker, **kw):
    path = write_model_page(maker.root / "page.html", read_model(maker.folder, **kw))
    return path.read_text(encoding="utf-8")


def pictures(text):
    return re.findall(r'<img alt="([^"]*)" src="data:image/png;base64,', text)


def rows(text):
    found = re.findall(r"<tr>(.*?)</tr>", text)
    return [re.findall(r"<t[hd]>(.*?)</t[hd]>", row) for row in found]


def test_a_stock_training_has_a_page(made, capsys):
    made.fold()
    cases = {f"c{i}": {"1": 0.9 - 0.1 * i, "2": 0.5} for i in range(8)}
    made.validate("fold_0", cases)
    assert cli.main(["report", str(made.folder)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("fold_0: 3 epochs done, mean Dice 0.525 of 8 validation cases.\n")
    text = (made.folder / "report.html").read_text()
    assert "<h1>Dataset007_Made, nnUNetTrainer, 2d</h1>" in text
    dots, worst, best, curves = pictures(text)
    assert dots == "Dice of each case and mean of each label: liver 0.550, tumour 0.500"
    assert worst.endswith("c7, mean Dice 0.350, c6, mean Dice 0.400, c5, mean Dice 0.450")
    assert best.endswith("c0, mean Dice 0.700, c1, mean Dice 0.650, c2, mean Dice 0.600")
    assert "loss: training from 1 to 0.6, validation patches from 1 to 0.8" in curves
    assert "pseudo Dice of each label: liver from 0 to 0.2, tumour from 0.05 to 0.25" in curves
    table = rows(text)
    assert ["fold_0", "8", "0.550", "0.500", "0.525"] in table
    assert ["c3", "0.600", "0.500", "0.550"] in table
    assert ["patch", "64 x 48 pixels at 1.5 x 1.5 mm"] in table  # inherited
    assert ["batch size", "12"] in table  # not inherited
    assert ["network", "PlainConvUNet"] in table
    assert ["parameters", "1.5 million"] in table
    assert ["started from", "the logs do not say"] in table
    assert ["length", "3 epochs, 60 s each (median), 0.05 h in all"] in table
    assert "nnUNetv2_predict -i IN -o OUT -d Dataset007_Made -c 2d -f 0 -tr nnUNetTrainer" in text


def test_what_the_logs_say_of_weights_is_on_the_page(made):
    folder = made.fold()
    lines = [
        "2026-11-26 10:00:00.1: The ViT starts from random weights. ",
        "2026-11-26 10:00:01.1: A batch with a loss or gradient of NaN or infinity is left out, 1 "
        "in a row (20 stop the run): cases a. ",
        "2026-11-26 10:00:02.1: A batch with a loss or gradient of NaN or infinity is left out, 2 "
        "in a row (20 stop the run): cases b. ",
    ]
    (folder / "training_log_2026_11_26_10_00_00.txt").write_text("\n".join(lines))
    later = [
        "2026-11-27 10:00:00.1: The ViT starts from w.pth (release): 9 tensors used. ",
        "2026-11-27 10:00:00.1: Licence of these weights: DINOv3 License. ",
    ]
    (folder / "training_log_2026_11_27_10_00_00.txt").write_text("\n".join(later))
    text = page_of(made)
    assert ["started from", "ViT: w.pth (release): 9 tensors used"] in rows(text)
    assert ["licence of the weights", "DINOv3 License"] in rows(text)
    assert "A batch with a loss or gradient of NaN or infinity is left out (2 times)." in text


def test_folds_are_counted_together_and_fold_all_is_not(made):
    for name in ("fold_0", "fold_1", "fold_all"):
        made.fold(name, epochs=2)
    made.validate("fold_0", {"a": {"1": 0.8, "2": 0.6}})
    made.validate("fold_1", {"b": {"1": 0.4, "2": None}})
    made.validate("fold_all", {"a": {"1": 1.0, "2": 1.0}, "b": {"1": 1.0, "2": 1.0}})
    text = page_of(made)
    table = rows(text)
    assert ["fold_1", "1", "0.400", "-", "0.400"] in table
    assert ["fold_all", "2", "1.000", "1.000", "1.000"] in table
    assert ["all 2 folds", "2", "0.600", "0.600", "0.600"] in table
    assert "mean Dice 1.000 of 2 validation cases (which it was trained on)." in text
    assert "-f 0 1 all -tr" in text
    assert text.count("<h2>Curves, fold_") == 3


def test_regions_are_found_by_their_values(made):
    maker = Maker(made.root / "r", {"background": 0, "whole": [1, 2], "core": [2], "edge": 1})
    maker.fold()
    maker.validate("fold_0", {"a": {"(1, 2)": 0.9, "(2,)": 0.7, "1": float("nan")}})
    assert read_model(maker.folder, maker.raw).folds[0].dice["a"] == pytest.approx(
        {"whole": 0.9, "core": 0.7, "edge": np.nan}, nan_ok=True
    )


def test_of_many_labels_the_lowest_are_drawn(made):
    maker = Maker(made.root / "m", {"background": 0, **{f"l{i}": i for i in range(1, 31)}})
    maker.fold()
    (alt,) = pictures(page_of(maker))
    assert "pseudo Dice, the 8 lowest labels: l1 from" in alt
    assert "l9" not in alt


@pytest.mark.parametrize("name", ["checkpoint_latest.pth", "checkpoint_best.pth"])
def test_a_training_that_goes_on_has_a_page(made, name):
    made.fold(checkpoint=name, optimizer_state={"param_groups": [{"num_epochs": 9}]})
    text = page_of(made)
    assert "fold_0: 3 of 9 epochs done, not validated yet." in text
    assert "No fold has a validation yet" in text
    assert f"-chk {name}" in text
    assert "export" not in text


def test_a_training_of_no_epoch_has_a_page(made):
    (made.folder / "fold_0").mkdir()
    text = page_of(made)
    assert "fold_0: no checkpoint yet, not validated yet." in text
    assert pictures(text) == []


def test_an_exported_model_has_a_page_without_pictures_of_cases(made):
    made.fold()
    made.validate("fold_0", {"a": {"1": 0.8, "2": 0.6}}, files=False)
    text = page_of(made)
    assert "are not on this machine" in text
    assert len(pictures(text)) == 2
    assert ["a", "0.800", "0.600", "0.700"] in rows(text)


def test_without_images_the_labels_are_drawn_and_the_page_says_so(made, monkeypatch):
    made.fold()
    made.validate("fold_0", {"a": {"1": 0.8, "2": 0.6}})
    references = made.root / "preprocessed" / made.name / "gt_segmentations"
    references.mkdir(parents=True)
    (made.raw / "labelsTr" / "a.nii.gz").rename(references / "a.nii.gz")
    monkeypatch.delenv("nnUNet_raw")
    text = page_of(made)
    assert "The images of a were not found: set nnUNet_raw" in text
    assert len(pictures(text)) == 3
    assert "were not found" not in page_of(made, raw=made.raw)


def test_a_torn_image_leaves_the_rest_of_the_page(made):
    made.fold()
    made.validate("fold_0", {"a": {"1": 0.8, "2": 0.6}})
    (made.folder / "fold_0" / "validation" / "a.nii.gz").write_bytes(b"torn")
    text = page_of(made)
    assert "must be an image that SimpleITK reads" in text
    assert len(pictures(text)) == 2


class Evil:
    def __reduce__(self):
        return os.mkdir, (os.environ["EVIL"],)


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_hostile_checkpoint_is_not_run(made, monkeypatch, is_zip):
    monkeypatch.setenv("EVIL", str(made.root / "evil"))
    made.fold(checkpoint="checkpoint_best.pth")
    path = made.folder / "fold_0" / "checkpoint_final.pth"
    if is_zip:
        torch.save({"logging": Evil()}, path)
    else:
        path.write_bytes(pickle.dumps({"logging": Evil()}))
    text = page_of(made)
    assert not (made.root / "evil").exists()
    assert "checkpoint_final.pth must" in text
    assert "fold_0: 3 epochs done" in text  # of the other checkpoint


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 torn", b"text, not a checkpoint"])
def test_a_torn_checkpoint_is_told_and_the_one_before_is_shown(made, content):
    made.fold(checkpoint="checkpoint_best.pth")
    (made.folder / "fold_0" / "checkpoint_latest.pth").write_bytes(content)
    text = page_of(made)
    assert "checkpoint_latest.pth must be" in text
    assert "fold_0: 3 epochs done" in text


def test_another_file_of_torch_is_no_checkpoint(made):
    folder = made.fold(checkpoint="checkpoint_best.pth")
    torch.save([1, 2], folder / "checkpoint_final.pth")
    assert "must be a checkpoint of nnU-Net" in page_of(made)


def test_a_fold_stands_for_its_model_and_the_page_goes_where_it_is_told(made, tmp_path):
    made.fold()
    (tmp_path / "out").mkdir()
    assert cli.main(["report", str(made.folder / "fold_0"), "-o", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "report.html").is_file()
    assert not (made.folder / "report.html").exists()


def test_a_renamed_folder_is_predicted_with_by_its_path(made):
    made.fold()
    moved = made.folder.rename(made.root / "my model")
    model = read_model(moved)
    assert (model.trainer, model.configuration) == ("nnUNetTrainer", "2d")
    assert commands(model).startswith("nnUNetv2_predict_from_modelfolder -i IN -o OUT -m '")


def test_an_epoch_that_is_not_whole_is_left_out():
    logging = logging_of(3)
    logging["val_losses"].pop()
    assert [row["epoch"] for row in epoch_rows(logging, ["a", "b"])] == [1, 2]


def missing(made):
    return made.root / "nowhere", "there is no folder"


def of_a_dataset(made):
    made.fold()
    return made.folder.parent, f"it holds {MODEL}"


def of_pretraining(made):
    (made.root / "run" / "stage1").mkdir(parents=True)
    (made.root / "run" / "stage1" / "metrics.jsonl").write_text("")
    return made.root / "run", "is a run of `meddinov3 pretrain`"


def without_plans(made):
    made.fold()
    (made.folder / "plans.json").unlink()
    return made.folder, "must hold plans.json, dataset.json and"


def without_folds(made):
    return made.folder, "must hold plans.json, dataset.json and"


def with_torn_plans(made):
    made.fold()
    (made.folder / "plans.json").write_text("{")
    return made.folder, "must be readable JSON"


def with_other_plans(made):
    made.fold()
    (made.folder / "plans.json").write_text("{}")
    return made.folder, "must hold nnU-Net's plans"


def without_dataset(made):
    made.fold()
    (made.folder / "dataset.json").unlink()
    return made.folder, "must hold plans.json, dataset.json and"


def with_another_summary(made):
    made.fold()
    made.validate("fold_0", {"a": {"1": 0.8}})
    (made.folder / "fold_0" / "validation" / "summary.json").write_text('{"mean": 1}')
    return made.folder, "must be nnU-Net's summary of a validation"


MISTAKES = [missing, of_a_dataset, of_pretraining, without_plans, without_folds]
MISTAKES += [with_torn_plans, with_other_plans, without_dataset, with_another_summary]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda f: f.__name__)
def test_mistakes_are_one_sentence(made, mistake):
    folder, said = mistake(made)
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        cli.main(["report", str(folder)])
    assert "\n" not in str(caught.value)
    assert not list(made.root.rglob("report.html"))


def test_a_page_that_cannot_be_written_is_one_sentence(made):
    made.fold()
    (made.root / "file").write_text("")
    with pytest.raises(UserError, match="writ"):
        cli.main(["report", str(made.folder), "-o", str(made.root / "file" / "page.html")])


def test_a_raw_dataset_that_is_none_is_one_sentence(made):
    made.fold()
    with pytest.raises(UserError, match="there is no"):
        cli.main(["report", str(made.folder), "--raw", str(made.root / "nowhere")])
