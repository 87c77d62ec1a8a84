"""Every kind of labels and channels that nnU-Net knows goes through training and prediction."""

import json

import numpy as np
import pytest

PLAIN = {"background": 0, "one": 1, "two": 2}
REGIONS = {"background": 0, "whole": [1, 2], "core": 2}
CASES = {
    "plain": (11, {"labels": PLAIN}),
    "regions": (12, {"labels": REGIONS, "regions": [1, 2], "channels": 2}),
    "ignore": (13, {"labels": {**PLAIN, "ignore": 3}, "channels": 4}),
    "both": (14, {"labels": {**REGIONS, "ignore": 3}, "regions": [1, 2], "channels": 3}),
    "one_slice": (15, {"labels": PLAIN, "shape": (1, 40, 48)}),
}


@pytest.mark.slow
@pytest.mark.parametrize("scheme", CASES)
def test_a_label_scheme_trains_and_predicts(scheme, workplace, short_run):
    number, dataset = CASES[scheme]
    workplace.add_dataset(number, **dataset)
    workplace.prepare(number)
    fold = workplace.train(number)
    assert (fold / "validation" / "summary.json").exists()
    predicted = workplace.predict(number, fold.parent, out=f"predicted_{scheme}")
    expected = dataset.get("shape", (4, 40, 48))
    assert [v.shape for v in predicted.values()] == [expected]
    assert set(np.unique(next(iter(predicted.values())))) <= {0, 1, 2}


@pytest.mark.slow
def test_a_patch_of_56_by_40_pixels_trains_and_predicts(workplace, short_run):
    workplace.add_dataset(16, labels=PLAIN, shape=(3, 60, 44))
    workplace.prepare(16, patch_size=[56, 40])
    fold = workplace.train(16)
    predicted = workplace.predict(16, fold.parent, out="predicted_56x40")
    assert next(iter(predicted.values())).shape == (3, 60, 44)


@pytest.mark.slow
def test_a_2d_cascade_trains_both_stages(workplace, short_run):
    workplace.add_dataset(17, labels=PLAIN)
    folder = workplace.prepare(17, next_stage="2d_fine")
    plans = json.loads((folder / "nnUNetPlans.json").read_text())
    second = {"inherits_from": "2d", "previous_stage": "2d", "next_stage": None}
    plans["configurations"]["2d_fine"] = second
    (folder / "nnUNetPlans.json").write_text(json.dumps(plans))
    workplace.train(17, fold="all")
    fold = workplace.train(17, fold="all", configuration="2d_fine")
    assert (fold / "validation" / "summary.json").exists()
    entry = json.loads((fold.parent / "plans.json").read_text())["configurations"]["2d_fine"]
    assert entry["architecture"]["arch_kwargs"]["backbone"]["input_channels"] == 3


@pytest.mark.slow
def test_training_learns_the_boxes(workplace, monkeypatch):
    # the labels differ in brightness and place: a network that learns at all finds them
    monkeypatch.setenv("MEDDINOV3_EPOCHS", "4")
    monkeypatch.setenv("MEDDINOV3_ITERATIONS", "30")
    fold = workplace.train(1, "MedDINOv3Trainer_demo")
    summary = (fold / "validation" / "summary.json").read_text()
    assert json.loads(summary)["foreground_mean"]["Dice"] > 0.5  # untrained: below 0.2
