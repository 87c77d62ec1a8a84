"""A whole nnU-Net in one process: synthetic raw datasets, planned, trained, predicted.

nnU-Net spawns process pools that each import torch again; here they are thread pools, so that a
full cycle takes seconds. The stock commands themselves run in test_stock_commands.py.
"""

import json
import multiprocessing
import multiprocessing.pool
import os
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import (
    DatasetFingerprintExtractor,
)
from nnunetv2.experiment_planning.plan_and_preprocess_api import (
    extract_fingerprints,
    plan_experiments,
    preprocess,
)
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.run.run_training import run_training
from nnunetv2.training.logging.nnunet_logger import LocalLogger

from nnunetv2_meddinov3.discovery import register
from nnunetv2_meddinov3.report import after_validation

PLANS = "nnUNetPlans"


class _Threads:
    """Stands for a multiprocessing context whose pools are threads."""

    Pool = staticmethod(multiprocessing.pool.ThreadPool)

    def __getattr__(self, name):
        return getattr(multiprocessing, name)


class Workplace:
    """nnU-Net's three folders under one temporary one, and its steps as functions."""

    def __init__(self, root: Path):
        self.root = root
        for part in ("raw", "preprocessed", "results"):
            (root / part).mkdir(parents=True, exist_ok=True)
            os.environ[f"nnUNet_{part}"] = str(root / part)

    def add_dataset(self, number, *, labels, channels=1, shape=(4, 40, 48), cases=5, regions=None):
        """Write volumes of bright boxes whose position is the label; returns the folder's name."""
        name = f"Dataset{number:03d}_Boxes"
        folder = self.root / "raw" / name
        rng = np.random.default_rng(number)
        foreground = [v for k, v in labels.items() if k not in ("background", "ignore")]
        values = sorted({v for entry in foreground for v in np.atleast_1d(entry)})
        for part in ("imagesTr", "labelsTr", "imagesTs"):
            (folder / part).mkdir(parents=True)
        for case in range(cases + 1):
            label = np.zeros(shape, dtype=np.uint8)
            for i, value in enumerate(values):
                y, x = rng.integers(2, 8) + 12 * (i % 2), rng.integers(2, 8) + 16 * (i // 2)
                label[:, y : y + 12, x : x + 12] = value
            if "ignore" in labels:
                label[:, : shape[1] // 4] = labels["ignore"]
            for channel in range(channels):
                ct = rng.normal(0, 20, shape) + 100.0 * label * (channel + 1)
                part = "imagesTs" if case == cases else "imagesTr"
                _write(ct.astype(np.int16), folder / part / f"case_{case}_{channel:04d}.nii.gz")
            if case < cases:
                _write(label, folder / "labelsTr" / f"case_{case}.nii.gz")
        description = {
            "channel_names": {str(c): "CT" if c == 0 else f"extra{c}" for c in range(channels)},
            "labels": labels,
            "numTraining": cases,
            "file_ending": ".nii.gz",
        }
        if regions is not None:
            description["regions_class_order"] = regions
        (folder / "dataset.json").write_text(json.dumps(description))
        return name

    def prepare(self, number, **changes):
        """Fingerprint, plan and preprocess `2d`; ``changes`` go into the configuration first."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("nnUNet_n_proc_DA", "1")  # nnU-Net's planner cannot do with 0
            extract_fingerprints([number], num_processes=1, check_dataset_integrity=False)
            plan_experiments([number])
        folder = next((self.root / "preprocessed").glob(f"Dataset{number:03d}_*"))
        plans = json.loads((folder / f"{PLANS}.json").read_text())
        plans["configurations"]["2d"].update({"batch_size": 2, **changes})
        (folder / f"{PLANS}.json").write_text(json.dumps(plans))
        preprocess([number], configurations=["2d"], num_processes=[1])
        return folder

    def train(self, number, trainer="MedDINOv3Trainer_scratch", fold=0, configuration="2d", **kw):
        """Run nnU-Net's training, validation included; returns the fold's folder."""
        torch.manual_seed(number)
        np.random.seed(number)  # noqa: NPY002  nnU-Net draws from the global generator
        run_training(str(number), configuration, fold, trainer, device=torch.device("cpu"), **kw)
        return self.fold_folder(number, trainer, fold, configuration)

    def fold_folder(self, number, trainer="MedDINOv3Trainer_scratch", fold=0, configuration="2d"):
        dataset = next((self.root / "raw").glob(f"Dataset{number:03d}_*")).name
        model = f"{trainer}__{PLANS}__{configuration}"
        return self.root / "results" / dataset / model / f"fold_{fold}"

    def predict(self, number, model_folder, out="predicted", checkpoint="checkpoint_final.pth"):
        """Predict imagesTs as nnUNetv2_predict does; returns file name -> voxels."""
        predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
        predictor.initialize_from_trained_model_folder(str(model_folder), (0,), checkpoint)
        images = next((self.root / "raw").glob(f"Dataset{number:03d}_*")) / "imagesTs"
        target = self.root / out
        target.mkdir(exist_ok=True)
        predictor.predict_from_files_sequential(str(images), str(target), False, True, None)
        files = sorted(target.glob("*.nii.gz"))
        return {p.name: sitk.GetArrayFromImage(sitk.ReadImage(str(p))) for p in files}


def _write(array, path):
    image = sitk.GetImageFromArray(array)
    image.SetSpacing((1.5, 1.5, 4.0))
    sitk.WriteImage(image, str(path))


@pytest.fixture(scope="module", autouse=True)
def fast_nnunet():
    """Threads for processes, few intensity samples, no plots; our names registered."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("nnUNet_n_proc_DA", "0")
        patch.setenv("MEDDINOV3_BACKBONE", "vit_tiny")
        patch.setattr(multiprocessing, "get_context", lambda *args: _Threads())
        patch.setattr(LocalLogger, "plot_progress_png", _touch_progress_png)
        patch.setattr(after_validation, "write_after_validation", lambda trainer: None)
        patch.setattr(DatasetFingerprintExtractor, "__init__", _with_few_voxels())
        register()
        yield


def _touch_progress_png(self, folder):
    (Path(folder) / "progress.png").touch()


def _with_few_voxels():
    original = DatasetFingerprintExtractor.__init__

    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.num_foreground_voxels_for_intensitystats = 1e4  # 1e8 takes seconds on any image

    return init


@pytest.fixture
def short_run(monkeypatch):
    """Two epochs of two iterations."""
    monkeypatch.setenv("MEDDINOV3_EPOCHS", "2")
    monkeypatch.setenv("MEDDINOV3_ITERATIONS", "2")


@pytest.fixture(scope="module")
def workplace(fast_nnunet, tmp_path_factory):
    """One workplace with Dataset001 (background, two labels, one channel), ready to train."""
    place = Workplace(tmp_path_factory.mktemp("nnunet"))
    place.add_dataset(1, labels={"background": 0, "one": 1, "two": 2})
    place.prepare(1)
    return place
