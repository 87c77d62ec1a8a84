"""Real CT and MR through the command: what the store gives is what SimpleITK reads."""

import hashlib
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from nnunetv2_meddinov3.curate.cli import main
from nnunetv2_meddinov3.store.index import read_records
from nnunetv2_meddinov3.store.reader import SliceStore
from nnunetv2_meddinov3.store.verify import verify

SHARED = Path(__file__).parents[3] / "shared" / "data"
VOLUMES = [
    "lidc_idri_0314/lidc_idri_0314_ct.nii.gz",
    "totalsegmentator_example/example_ct.nii.gz",
    "totalsegmentator_example/example_ct_sm.nii.gz",
    "totalsegmentator_example/example_mr_sm.nii.gz",
    "totalsegmentator_example/aorta/ct_cropped.nii.gz",
]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not SHARED.is_dir(), reason="shared/data is not beside this checkout"),
]


@pytest.fixture(scope="module")
def curated(tmp_path_factory):
    """A store of every volume, of some pancreas slices, and of a shuffled DICOM copy of LIDC."""
    folder = tmp_path_factory.mktemp("real")
    for name in VOLUMES:
        (folder / "nifti").mkdir(exist_ok=True)
        shutil.copy(SHARED / name, folder / "nifti")
    (folder / "jpeg").mkdir()
    for path in sorted((SHARED / "pancreas_ct_slices/full_repo/images").glob("*.jpg"))[:20]:
        shutil.copy(path, folder / "jpeg")
    write_shuffled_series(sitk.ReadImage(str(SHARED / VOLUMES[0])), folder / "dicom")
    sources = [str(folder / name) for name in ("nifti", "jpeg", "dicom")]
    assert main([*sources, "--store", str(folder / "store")]) == 0
    return folder


def write_shuffled_series(image, folder):
    folder.mkdir()
    names = [f"{hashlib.md5(str(z).encode()).hexdigest()}.dcm" for z in range(image.GetSize()[2])]
    random.Random(0).shuffle(names)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for z, name in enumerate(names):
        slice_ = image[:, :, z]
        position = image.TransformIndexToPhysicalPoint((0, 0, z))
        tags = {
            "0008|0060": "CT",
            "0010|0020": "someone",
            "0020|000e": "1.2.826.0.1.3680043.2.1125.1",
            "0020|000d": "1.2.826.0.1.3680043.2.1125.2",
            "0008|0018": f"1.2.826.0.1.3680043.2.1125.3.{z + 1}",
            "0020|0013": str(z + 1),
            "0020|0032": "\\".join(f"{c:.6f}" for c in position),
            "0020|0037": "\\".join(
                f"{c:.6f}" for c in np.reshape(image.GetDirection(), (3, 3)).T[:2].ravel()
            ),
        }
        for tag, value in tags.items():
            slice_.SetMetaData(tag, value)
        writer.SetFileName(str(folder / name))
        writer.Execute(slice_)


def test_every_kept_slice_equals_simpleitks(curated):
    store = SliceStore(curated / "store")
    wanted = {}
    for name in VOLUMES:
        image = sitk.ReadImage(str(SHARED / name))
        wanted[Path(name).name] = sitk.GetArrayFromImage(sitk.DICOMOrient(image, "LPS"))
    compared = 0
    for i in range(len(store)):
        image, record = store[i]
        if record["dataset"] == "jpeg":
            continue
        file = Path(VOLUMES[0] if record["dataset"] == "dicom" else record["source_key"]).name
        expected = wanted[file][record["z"]]
        if record["modality"] != "CT":  # MR: mapped by percentiles, and back to rounding
            low, high = record["intensity_low"], record["intensity_high"]
            step = (high - low) / record["intensity_stored_high"]
            back = low + image * step
            assert np.abs(back - expected).max() <= step / 2 + 1e-9, record["source_key"]
            continue
        assert np.array_equal(image, expected), record["source_key"]
        compared += 1
    assert compared > 300


def test_a_shuffled_dicom_copy_adds_nothing_new(curated):
    records = {r.source_key: r for r in read_records(curated / "store")}
    dicom = next(r for key, r in records.items() if key.startswith("dicom"))
    nifti = next(r for key, r in records.items() if "lidc" in key)
    assert dicom.volume_id == nifti.volume_id
    assert [s.sha256 for s in dicom.slices] == [s.sha256 for s in nifti.slices]
    manifest = json.loads((curated / "store" / "manifest.json").read_text())
    assert manifest["duplicates"] >= 80 + 30  # example_ct_sm is a part of example_ct
    assert verify(curated / "store") == []
