"""Data for the tests of planning: three datasets made here, with nnU-Net's fingerprints."""

import json
import multiprocessing
import shutil
from multiprocessing.pool import ThreadPool
from typing import NamedTuple

import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.experiment_planning import plan_and_preprocess_api as api
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import (
    DatasetFingerprintExtractor,
)
from PIL import Image

CASES = 12


class Dataset(NamedTuple):
    """A dataset: shape (z, y, x) in voxels, spacing (z, y, x) in mm or None for PNGs."""

    name: str
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float] | None
    cases: int = CASES

    @property
    def number(self) -> int:
        return int(self.name[7:10])

    def organ(self) -> np.ndarray:
        """The label of every case: a box that reaches through all slices."""
        _, height, width = self.shape
        label = np.zeros(self.shape, np.uint8)
        label[:, height // 4 : height // 2, width // 3 : width // 2] = 1
        return label


DATASETS = [
    Dataset("Dataset901_Square", (14, 64, 64), (3.0, 0.8, 0.8)),
    Dataset("Dataset902_Long", (10, 100, 60), (4.0, 0.8, 1.1)),
    Dataset("Dataset903_Natural", (1, 72, 96), None),
]


class Pools:
    """What ``multiprocessing.get_context`` returns here: threads do the work of processes."""

    Pool = ThreadPool


class QuickExtractor(DatasetFingerprintExtractor):
    """Draws fewer intensities: nnU-Net's 10^8 take seconds however small the images are."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.num_foreground_voxels_for_intensitystats = 1e4


def write_case(folder, case, dataset, rng):
    label = dataset.organ()
    image = rng.normal(0, 30, dataset.shape) + 200 * label
    if dataset.spacing is None:
        gray = Image.fromarray(np.clip(image[0], 0, 255).astype(np.uint8))
        gray.save(folder / "imagesTr" / f"{case}_0000.png")
        Image.fromarray(label[0]).save(folder / "labelsTr" / f"{case}.png")
        return
    for array, name in (
        (image.astype(np.int16), f"imagesTr/{case}_0000"),
        (label, f"labelsTr/{case}"),
    ):
        volume = sitk.GetImageFromArray(array)
        volume.SetSpacing(dataset.spacing[::-1])
        sitk.WriteImage(volume, folder / f"{name}.nii.gz")


def write_dataset(folder, dataset):
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(dataset.cases):
        write_case(folder, f"case_{i:02d}", dataset, rng)
    description = {
        "channel_names": {"0": "CT" if dataset.spacing else "gray"},
        "labels": {"background": 0, "organ": 1},
        "numTraining": dataset.cases,
        "file_ending": ".nii.gz" if dataset.spacing else ".png",
    }
    (folder / "dataset.json").write_text(json.dumps(description))


@pytest.fixture(scope="package")
def fingerprinted(tmp_path_factory):
    """nnU-Net's raw and preprocessed folders; all datasets have fingerprints and none has plans."""
    root = tmp_path_factory.mktemp("planning")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("nnUNet_raw", str(root / "raw"))
        patch.setenv("nnUNet_preprocessed", str(root / "preprocessed"))
        patch.setattr(multiprocessing, "get_context", lambda method: Pools)
        for dataset in DATASETS:
            write_dataset(root / "raw" / dataset.name, dataset)
            api.extract_fingerprint_dataset(
                dataset.number, QuickExtractor, num_processes=1, show_progress_bar=False
            )
    return root


@pytest.fixture
def folder(fingerprinted, tmp_path, monkeypatch):
    """A copy of the preprocessed folder that the test may change, with nnU-Net's variables set."""
    copied = tmp_path / "preprocessed"
    shutil.copytree(fingerprinted / "preprocessed", copied)
    monkeypatch.setenv("nnUNet_raw", str(fingerprinted / "raw"))
    monkeypatch.setenv("nnUNet_preprocessed", str(copied))
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")
    monkeypatch.delenv("MEDDINOV3_SIZE", raising=False)
    monkeypatch.delenv("MEDDINOV3_BACKBONE", raising=False)
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: Pools)
    return copied


@pytest.fixture(params=DATASETS, ids=lambda dataset: dataset.name)
def dataset(request):
    """Each of the datasets in turn."""
    return request.param
