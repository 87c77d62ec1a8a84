"""Plans share a folder of preprocessed data only where they preprocess in the same way."""

import json

import pytest
from nnunetv2.experiment_planning import plan_and_preprocess_api as api
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import (
    ExperimentPlanner,
)
from nnunetv2.experiment_planning.experiment_planners.resampling.resample_with_torch import (
    nnUNetPlannerResEncL_torchres as TorchResampling,
)
from nnunetv2.experiment_planning.experiment_planners.residual_unets import (
    residual_encoder_unet_planners as resenc,
)

from nnunetv2_meddinov3.cli import main as meddinov3
from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.planning import MedDINOv3Planner

OURS, STOCK = "nnUNetMedDINOv3Plans", "nnUNetPlans"


@pytest.fixture
def square(folder, monkeypatch):
    """The folder of Dataset901, where nothing is planned."""
    monkeypatch.setenv("MEDDINOV3_SIZE", "128")
    return folder / "Dataset901_Square"


def edit(path, change):
    plans = json.loads(path.read_text())
    change(plans, plans["configurations"]["2d"])
    path.write_text(json.dumps(plans))


def identifiers(planner=MedDINOv3Planner, **options):
    plans, _ = api.plan_experiment_dataset(901, planner, **options)
    return {name: c.get("data_identifier") for name, c in plans["configurations"].items()}


DIFFERENCES = {
    "preprocessor": lambda plans, c: c.update(preprocessor_name="MyPreprocessor"),
    "spacing": lambda plans, c: c.update(spacing=[0.9, 0.9]),
    "normalisation": lambda plans, c: c.update(normalization_schemes=["ZScoreNormalization"]),
    "mask": lambda plans, c: c.update(use_mask_for_norm=[True]),
    "resampling of data": lambda plans, c: c.update(resampling_fn_data="resample_torch_simple"),
    "its options": lambda plans, c: c["resampling_fn_data_kwargs"].update(order=1),
    "resampling of labels": lambda plans, c: c.update(resampling_fn_seg="resample_torch_simple"),
    "their options": lambda plans, c: c["resampling_fn_seg_kwargs"].update(order=0),
    "transpose": lambda plans, c: plans.update(transpose_forward=[1, 0, 2]),
    "reader": lambda plans, c: plans.update(image_reader_writer="NibabelIO"),
    "intensities": lambda plans, c: plans["foreground_intensity_properties_per_channel"][
        "0"
    ].update(mean=-5.0),
    "inherited": lambda plans, c: (
        plans["configurations"].update({"mine": {**c, "spacing": [0.9, 0.9]}}),
        c.clear(),
        c.update(inherits_from="mine"),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("difference", DIFFERENCES)
def test_data_that_other_plans_made_differently_are_left_alone(difference, square):
    api.plan_experiment_dataset(901, ExperimentPlanner)
    edit(square / f"{STOCK}.json", DIFFERENCES[difference])
    ours = identifiers()
    assert ours["2d"] == f"{OURS}_2d"
    on_disk = json.loads((square / f"{OURS}.json").read_text())["configurations"]
    assert {n: c["data_identifier"] for n, c in on_disk.items()} == ours
    if difference in ("transpose", "reader", "intensities"):  # these are of all configurations
        assert ours["3d_fullres"] == f"{OURS}_3d_fullres"
    else:
        assert ours["3d_fullres"] == f"{STOCK}_3d_fullres"


@pytest.mark.slow
def test_data_are_shared_where_only_the_training_differs(square):
    api.plan_experiment_dataset(901, ExperimentPlanner)
    edit(
        square / f"{STOCK}.json",
        lambda plans, c: c.update(
            batch_size=99,
            patch_size=[32, 32],
            spacing=[mm * (1 + 1e-12) for mm in c["spacing"]],
            resampling_fn_probabilities="resample_torch_fornnunet",
        ),
    )
    (square / "torn.json").write_text('{"configurations"')
    (square / "list.json").write_text("[]")
    assert identifiers()["2d"] == f"{STOCK}_2d"


@pytest.mark.slow
def test_plans_of_any_name_are_asked_whose_data_these_are(square):
    api.plan_experiment_dataset(901, resenc.ResEncUNetPlanner)  # uses nnUNetPlans_2d too
    assert identifiers()["2d"] == f"{STOCK}_2d"
    edit(square / "nnUNetResEncUNetPlans.json", DIFFERENCES["normalisation"])
    assert identifiers()["2d"] == f"{OURS}_2d"
    edit(square / f"{OURS}.json", lambda plans, c: c.update(spacing=[1.0, 1.0]))
    (square / f"{OURS}.json").rename(
        square / "Copy.json"
    )  # its data are in nnUNetMedDINOv3Plans_2d
    assert identifiers()["2d"] == f"{OURS}_2d-2"


class Torch(MedDINOv3Planner):
    determine_resampling = TorchResampling.determine_resampling


class Normalised(MedDINOv3Planner):
    def determine_normalization_scheme_and_whether_mask_is_used_for_norm(self):
        return ["ZScoreNormalization"], [False]


class Coarse(MedDINOv3Planner):
    def determine_fullres_target_spacing(self):
        return 2 * super().determine_fullres_target_spacing()


class Turned(MedDINOv3Planner):
    def determine_transpose(self):
        return [2, 0, 1], [1, 2, 0]


class Same(MedDINOv3Planner):
    def determine_resampling(self, *arguments, **options):
        return super().determine_resampling(*arguments, **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("planner", "options", "owner"),
    [
        (MedDINOv3Planner, {}, STOCK),
        (Same, {}, STOCK),
        (Torch, {}, OURS),
        (Normalised, {}, OURS),
        (Coarse, {}, OURS),
        (Turned, {}, OURS),
        (MedDINOv3Planner, {"preprocess_class_name": "MyPreprocessor"}, OURS),
    ],
)
def test_before_nnunet_planned_its_own_rules_decide(planner, options, owner, square):
    chosen = identifiers(planner, **options)
    assert (chosen["2d"], chosen["3d_fullres"]) == (f"{owner}_2d", f"{owner}_3d_fullres")
    assert identifiers(planner, **options) == chosen  # its own earlier plans do not count


@pytest.mark.slow
def test_the_command_leaves_the_data_of_a_copy_of_the_plans(square, capsys):
    path, command = square / f"{STOCK}.json", ["plan", "-d", "901", "--size", "128"]
    api.plan_experiment_dataset(901, ExperimentPlanner)
    meddinov3(command)
    copied = path.read_text()
    (square / "Copy.json").write_text(copied)  # its plans_name is still nnUNetPlans
    meddinov3(command)
    assert path.read_text() == copied  # the same data: one folder
    edit(square / "Copy.json", lambda plans, c: c.update(use_mask_for_norm=[True]))
    meddinov3(command)
    assert path.read_text() == copied  # it was there before
    before = (square / "Copy.json").read_text()
    meddinov3(["plan", "-d", "901", "--size", "144", "-p", "Copy"])
    meddinov3(["plan", "-d", "901", "--size", "144"])
    added = json.loads(path.read_text())["configurations"]["2d_144"]
    assert added["data_identifier"] == f"{STOCK}_2d_144-2"
    assert (
        json.loads(before)["configurations"].items()
        <= json.loads((square / "Copy.json").read_text())["configurations"].items()
    )
    edit(path, lambda plans, c: c.update(spacing=[1.0, 1.0]))
    with pytest.raises(UserError, match="already has a 2d_144 with a different spacing"):
        meddinov3(["plan", "-d", "901", "--size", "144"])
