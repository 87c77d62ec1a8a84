"""Model folders with random weights, as a training of ours leaves them, and scans for them."""

import json
import zipfile

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from nnunetv2_meddinov3.discovery import register
from nnunetv2_meddinov3.models.architecture import architecture_of
from nnunetv2_meddinov3.models.segmenter import Segmenter

NAME = "MedDINOv3Trainer__nnUNetPlans__2d"
PLAIN = {"background": 0, "liver": 1, "spleen": 2}


@pytest.fixture(autouse=True)
def as_a_user_has_it(monkeypatch):
    """Our names registered, none of nnU-Net's variables, one thread."""
    register()
    for part in ("raw", "preprocessed", "results"):
        monkeypatch.delenv(f"nnUNet_{part}", raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_model(
    results, *, labels=PLAIN, regions=None, channels=("CT",), ending=".nii.gz", folds=("0",), **plan
):
    """Write a model folder; weights are scaled so that labels change from patch to patch."""
    folder = results / "Dataset007_Made" / NAME
    folder.mkdir(parents=True)
    architecture = architecture_of(
        "vit_tiny", embed_dim=64, depth=2, num_heads=1, ffn_hidden=64, num_registers=0
    )
    arguments = {
        "backbone": {**architecture.to_dict(), "input_channels": 3 if len(channels) == 1 else 2},
        "layers": [0, 1],
    }
    resampling = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
    configuration = {
        "data_identifier": "nnUNetPlans_2d",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": [32, 32],
        "spacing": [1.5, 1.5],
        "normalization_schemes": ["ZScoreNormalization"] * len(channels),
        "use_mask_for_norm": [False] * len(channels),
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": resampling,
        "resampling_fn_seg_kwargs": {**resampling, "is_seg": True, "order": 1},
        "resampling_fn_probabilities": "resample_torch_fornnunet",
        "resampling_fn_probabilities_kwargs": {"is_seg": False, "force_separate_z": False},
        "architecture": {
            "network_class_name": "nnunetv2_meddinov3.models.segmenter.Segmenter",
            "arch_kwargs": arguments,
            "_kw_requires_import": [],
        },
        **plan,
    }
    is_2d = ending == ".png"
    plans = {
        "dataset_name": "Dataset007_Made",
        "plans_name": "nnUNetPlans",
        "image_reader_writer": "NaturalImage2DIO" if is_2d else "SimpleITKIO",
        "label_manager": "LabelManager",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "foreground_intensity_properties_per_channel": {str(i): {} for i in range(len(channels))},
        "configurations": {"2d": configuration},
    }
    (folder / "plans.json").write_text(json.dumps(plans))
    description = {
        "channel_names": {str(i): name for i, name in enumerate(channels)},
        "labels": labels,
        "numTraining": 5,
        "file_ending": ending,
    }
    if regions:
        description["regions_class_order"] = regions
    (folder / "dataset.json").write_text(json.dumps(description))
    heads = len(labels) - 1 if regions else len(labels)
    for number, fold in enumerate(folds):
        torch.manual_seed(number)
        network = Segmenter(len(channels), heads, **arguments)
        with torch.no_grad():
            network.decoder.seg_layers[0].weight.mul_(6)
        content = {
            "network_weights": network.state_dict(),
            "trainer_name": "MedDINOv3Trainer",
            "init_args": {"configuration": "2d", "fold": number},
            "inference_allowed_mirroring_axes": (0, 1),
            "_best_ema": np.float32(0.5),
        }
        (folder / f"fold_{fold}").mkdir()
        torch.save(content, folder / f"fold_{fold}" / "checkpoint_final.pth")
    return folder


@pytest.fixture
def model(tmp_path):
    """A model of one channel, CT."""
    return make_model(tmp_path / "results")


@pytest.fixture
def zip_of():
    """A function that zips a model folder as nnU-Net exports it."""

    def write(folder, path):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for file in sorted(p for p in folder.rglob("*") if p.is_file()):
                archive.write(file, file.relative_to(folder.parents[1]))
        return path

    return write


@pytest.fixture
def scan(make_ct):
    """A function that writes a scan; its axes may be turned."""

    def write(path, seed=0, direction=None, spacing=(1.9, 1.9, 4.0)):
        image = sitk.GetImageFromArray(make_ct(3, 40, seed))
        image.SetSpacing(spacing)
        image.SetOrigin((-10.0, 20.0, 5.0))
        if direction is not None:
            image.SetDirection(direction)
        path.parent.mkdir(parents=True, exist_ok=True)
        sitk.WriteImage(image, str(path))
        return path

    return write
