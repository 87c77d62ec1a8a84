"""``MedDINOv3Planner`` on small datasets, with nnU-Net's own functions around it."""

import json
import math
import os
import pickle

import blosc2
import numpy as np
import pytest
from nnunetv2.experiment_planning import plan_and_preprocess_api as api
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import (
    ExperimentPlanner,
)
from nnunetv2.inference.export_prediction import (
    convert_predicted_logits_to_segmentation_with_correct_shape as export,
)
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_meddinov3 import discovery, planning
from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.planning import MedDINOv3Planner

OURS, STOCK = "nnUNetMedDINOv3Plans", "nnUNetPlans"


def plan(number, **options):
    return api.plan_experiment_dataset(number, MedDINOv3Planner, **options)[0]


def read(folder, dataset, name):
    return json.loads((folder / dataset.name / f"{name}.json").read_text())


@pytest.mark.slow
def test_the_planner_adds_to_what_nnunet_plans(dataset, folder, monkeypatch):
    monkeypatch.setenv("MEDDINOV3_SIZE", "128")
    api.plan_experiment_dataset(dataset.number, ExperimentPlanner)
    ours = plan(dataset.number)
    assert ours["plans_name"] == OURS
    assert ours["experiment_planner_used"] == "MedDINOv3Planner"
    written = read(folder, dataset, OURS)["configurations"]
    added = written.pop("2d_128")
    # equal to nnU-Net's down to the data identifiers: preprocessed data are shared
    assert written == read(folder, dataset, STOCK)["configurations"]
    assert written["2d"]["data_identifier"] == "nnUNetPlans_2d"
    assert added["data_identifier"] == "nnUNetMedDINOv3Plans_2d_128"
    assert max(added["patch_size"]) == 128
    assert added["batch_size"] <= max(2, _stock_limit(dataset, added))
    assert not [name for name in [OURS, *ours["configurations"]] if "__" in name]


@pytest.mark.slow
def test_no_augmentation_processes_do_not_stop_the_planner(dataset, folder, monkeypatch):
    before = plan(dataset.number)
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    assert plan(dataset.number) == before
    assert os.environ["nnUNet_n_proc_DA"] == "0"


def _stock_limit(dataset, added):
    """nnU-Net's 5 % rule, from the whole dataset's voxels at the added in-plane spacing."""
    shape, spacing = dataset.shape, dataset.spacing or (999, 1, 1)
    volume = shape[0] * math.prod(
        n * old / new for n, old, new in zip(shape[1:], spacing[1:], added["spacing"], strict=True)
    )
    return math.ceil(dataset.cases * volume * 0.05 / math.prod(added["patch_size"]))


@pytest.mark.slow
def test_the_memory_target_and_the_backbone_reach_the_batch_size(folder, monkeypatch, capsys):
    monkeypatch.setattr(planning, "MAX_DATASET_COVERED", 1.0)  # small data: memory must decide
    monkeypatch.setenv("MEDDINOV3_SIZE", "448")
    for backbone, gigabytes in (("vit_base", 8), ("vit_base", 16), ("vit_tiny", 8)):
        monkeypatch.setenv("MEDDINOV3_BACKBONE", backbone)
        added = plan(901, gpu_memory_target_in_gb=gigabytes)["configurations"]["2d_448"]
        for more, fits in ((0, True), (1, False)):
            batch = added["batch_size"] + more
            need = planning.estimate_gpu_memory(backbone, batch, added["patch_size"])
            assert (need <= gigabytes) is fits
        assert f"training {backbone} takes about" in capsys.readouterr().out


@pytest.mark.slow
def test_planning_again_with_another_size_leaves_both_and_what_the_user_added(folder, monkeypatch):
    monkeypatch.setenv("MEDDINOV3_SIZE", "128")
    plan(901)
    path = folder / "Dataset901_Square" / f"{OURS}.json"
    plans = json.loads(path.read_text())
    plans["configurations"]["2d_mine"] = {"inherits_from": "2d", "batch_size": 7}
    path.write_text(json.dumps(plans))
    monkeypatch.setenv("MEDDINOV3_SIZE", "256")
    returned = plan(901)["configurations"]
    again = json.loads(path.read_text())["configurations"]
    assert again == json.loads(json.dumps(returned))  # tuples are lists in a file
    assert set(again) == {*plans["configurations"], "2d_256"}
    for name in ("2d_128", "2d_mine"):
        assert again[name] == plans["configurations"][name]
    assert again["2d_256"]["spacing"][0] == again["2d_128"]["spacing"][0] / 2


@pytest.mark.slow
def test_data_that_differ_from_nnunets_are_not_shared(folder, monkeypatch):
    monkeypatch.setenv("MEDDINOV3_SIZE", "128")
    plans = plan(901, overwrite_target_spacing=(3.0, 1.0, 1.0), overwrite_plans_name="Mine")
    owners = {n: c.get("data_identifier") for n, c in plans["configurations"].items()}
    assert owners == {"2d": "Mine_2d", "3d_fullres": "Mine_3d_fullres", "2d_128": "Mine_2d_128"}
    assert plans["configurations"]["2d_128"]["inherits_from"] == "2d"
    assert not (folder / "Dataset901_Square" / f"{OURS}.json").exists()
    # the spacing of 3d_lowres follows from the memory, that of the others does not
    planner = MedDINOv3Planner(901, gpu_memory_target_in_gb=24)
    assert planner.generate_data_identifier("3d_lowres") == f"{OURS}_3d_lowres"
    assert planner.generate_data_identifier("3d_fullres") == "nnUNetPlans_3d_fullres"
    assert MedDINOv3Planner(901).generate_data_identifier("3d_lowres") == "nnUNetPlans_3d_lowres"


@pytest.mark.slow
def test_nnunet_preprocesses_and_exports_with_the_added_configuration(dataset, folder, monkeypatch):
    shape = dataset.shape
    monkeypatch.setenv("MEDDINOV3_SIZE", "128")
    discovery.register()
    name = api.plan_experiments([dataset.number], "MedDINOv3Planner")
    api.preprocess([dataset.number], name, ["2d_128"], [1], show_progress_bar=False)

    manager = PlansManager(read(folder, dataset, OURS))
    configuration = manager.get_configuration("2d_128")
    case = folder / dataset.name / configuration.data_identifier / "case_03"
    properties = pickle.loads(case.with_suffix(".pkl").read_bytes())
    label = blosc2.open(str(case.with_name("case_03_seg.b2nd")), mode="r")[:]
    factor = max(manager.get_configuration("2d").patch_size) / 128
    assert label.shape == (1, shape[0], *(round(n / factor) for n in shape[1:]))
    assert list(label.shape[2:]) == configuration.median_image_size_in_voxels

    logits = np.stack([label[0] == 0, label[0] == 1]).astype(np.float16)
    labels = manager.get_label_manager(read(folder, dataset, "dataset"))
    exported = export(logits, manager, configuration, labels, properties, num_threads_torch=1)
    original = dataset.organ()
    assert exported.shape == shape
    dice = 2 * np.sum(exported * original) / (exported.sum() + original.sum())
    assert dice > 0.98


@pytest.mark.parametrize(
    "size", ["100", "48", "4112", "896.0", "-896", "٨٩٦", "big", "0x380", "8 96"]
)
def test_the_planner_refuses_a_size_before_any_work(size, folder, monkeypatch):
    monkeypatch.setenv("MEDDINOV3_SIZE", size)
    with pytest.raises(UserError, match="MEDDINOV3_SIZE must be a multiple of 16 from 64 to 4096"):
        plan(901)
    assert not list(folder.glob(f"*/{OURS}*"))


def test_an_empty_variable_is_as_good_as_none(folder, monkeypatch):
    monkeypatch.setenv("MEDDINOV3_SIZE", "")
    monkeypatch.setenv("MEDDINOV3_BACKBONE", " ")
    planner = MedDINOv3Planner(901)
    assert (planner.added_size, planner.backbone) == (896, "vit_base")


def test_the_planner_refuses_an_unknown_backbone_by_naming_the_known(folder, monkeypatch):
    monkeypatch.setenv("MEDDINOV3_BACKBONE", "vit_giant")
    with pytest.raises(UserError, match=r"vit_tiny, vit_small, .*vit_7b, got 'vit_giant'"):
        plan(901)


def test_the_planner_refuses_a_variable_that_is_misspelt(folder, monkeypatch):
    monkeypatch.setenv("MEDDINOV3_SIZ", "448")
    with pytest.raises(UserError, match="did you mean MEDDINOV3_SIZE"):
        plan(901)


@pytest.mark.parametrize("gigabytes", [0, -8, math.nan, math.inf])
def test_the_planner_refuses_a_memory_target_that_is_none(gigabytes, folder):
    with pytest.raises(UserError, match="positive number of GB"):
        plan(901, gpu_memory_target_in_gb=gigabytes)


def test_the_planner_refuses_a_name_that_nnunet_could_not_split(folder):
    with pytest.raises(UserError, match="may not contain '__'"):
        plan(901, overwrite_plans_name="my__plans")
