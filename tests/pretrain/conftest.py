"""Small synthetic volumes, and functions that write them as one file or as a DICOM series."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

# tests are not a package, so what several of them share is loaded by its path
_spec = importlib.util.spec_from_file_location(
    "pretrain_recorded", Path(__file__).with_name("recorded.py")
)
_recorded = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = _recorded
_spec.loader.exec_module(_recorded)


@pytest.fixture(scope="session")
def make_ct():
    """A function that draws a CT (S, H, W): a body in air, each slice with noise of its own."""
    return _make_ct


@pytest.fixture(scope="session")
def write_image():
    """A function that writes an array (S, H, W) in LPS as one file, the ending says which."""
    return _write_image


@pytest.fixture(scope="session")
def write_series():
    """A function that writes an array (S, H, W) as a DICOM series in shuffled order of files."""
    return _write_series


def _make_ct(slices=6, size=40, seed=0):
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    noise = generator.normal(0, 20, (slices, size, size))
    organs = 60 * np.sin(x * generator.uniform(3, 9)) * np.cos(y * generator.uniform(3, 9))
    body = (x / 0.8) ** 2 + (y / 0.6) ** 2 < 1
    return np.rint(np.where(body, 40 + organs, -1000) + noise).astype(np.int16)


def _write_image(path, array, spacing=(2.0, 0.8, 0.8), first_mm=0.0):
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing[::-1])
    image.SetOrigin((0.0, 0.0, first_mm))
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path))
    return path


def _write_series(folder, array, spacing=(2.0, 0.8, 0.8), modality="CT", series="1.2.826.0.1.7"):
    folder.mkdir(parents=True, exist_ok=True)
    order = np.random.default_rng(1).permutation(len(array))
    for name, z in enumerate(order):
        image = sitk.GetImageFromArray(array[z])
        image.SetSpacing(spacing[:0:-1])
        tags = {
            "0008|0016": "1.2.840.10008.5.1.4.1.1.2",
            "0008|0018": f"{series}.{z + 1}",
            "0008|0060": modality,
            "0010|0020": "P1",
            "0018|0050": str(spacing[0]),
            "0020|000d": "1.2.826.0.1.6",
            "0020|000e": series,
            "0020|0013": str(z + 1),
            "0020|0032": f"0\\0\\{z * spacing[0]}",
            "0020|0037": "1\\0\\0\\0\\1\\0",
        }
        for tag, value in tags.items():
            image.SetMetaData(tag, value)
        writer = sitk.ImageFileWriter()
        writer.KeepOriginalImageUIDOn()
        writer.SetFileName(str(folder / f"{name:03}.dcm"))
        writer.Execute(image)
    return folder


@pytest.fixture
def source(tmp_path, make_ct, write_image):
    """A folder of five volumes."""
    for number in range(5):
        write_image(tmp_path / "source" / f"v{number}.nii.gz", make_ct(4, 24, seed=number))
    return tmp_path / "source"


@pytest.fixture(scope="session")
def ct_store(tmp_path_factory):
    """A store of four synthetic CT volumes of six slices each."""
    from nnunetv2_meddinov3.pretrain.data.curate import curate

    folder = tmp_path_factory.mktemp("volumes")
    for i in range(4):
        _write_image(folder / f"patient{i}.nii.gz", _make_ct(6, 64, seed=i))
    store = tmp_path_factory.mktemp("store") / "ct"
    curate([folder], store)
    return store


# what makes a stage small enough for a test
_SMALL = [
    "crops.resolutions.0.global_size=48",
    "crops.resolutions.0.local_size=32",
    "crops.local_crops=2",
    "heads.dino={prototypes: 32, hidden_dim: 24, bottleneck_dim: 16, layers: 3}",
    "heads.ibot={prototypes: 24, hidden_dim: 24, bottleneck_dim: 16, layers: 2}",
    "optim.batch_size=8",
    "losses.koleo_group=4",
    "losses.teacher_temp.warmup_steps=0",
    "optim.lr.warmup_steps=0",
    "model.drop_path=0.3",
    "data.workers=0",
    "engine.device=cpu",
    "engine.log_every=1",
    "engine.health_every=2",
    "engine.export_at=[]",
]


@pytest.fixture(scope="session")
def small_stage(ct_store):
    """A function that gives the small overrides of a stage on the small store, and more."""
    return lambda *more: [*_SMALL, f"data.store={ct_store}", *more]
