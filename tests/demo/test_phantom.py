"""The synthetic CT: laws that hold for every patient, and the dataset written from it."""

import json

import numpy as np
import pytest
import SimpleITK as sitk
from scipy.ndimage import binary_erosion, binary_fill_holes, label

from nnunetv2_meddinov3.demo.phantom import (
    DEFAULT_SHAPE,
    DEFAULT_SPACING_MM,
    ENHANCING_HU,
    LABELS,
    NOISE_SD_HU,
    TISSUE_HU,
    make_phantom,
    write_phantom_dataset,
)
from nnunetv2_meddinov3.errors import UserError

PATIENTS = range(4)
ORGANS = [name for name in LABELS if name != "background"]


@pytest.fixture(scope="module")
def patients():
    return [make_phantom(np.random.default_rng([7, index])) for index in PATIENTS]


def test_arrays_have_the_asked_shape_and_types():
    ct, labels = make_phantom(np.random.default_rng(0), shape=(5, 40, 50), spacing_mm=(8, 9, 7))
    assert ct.shape == labels.shape == (5, 40, 50)
    assert ct.dtype == np.int16
    assert labels.dtype == np.uint8


def test_every_patient_has_every_organ_and_no_other_label(patients):
    for _, labels in patients:
        assert set(np.unique(labels)) == set(LABELS.values())


@pytest.mark.parametrize("organ", ["liver", "spleen", "kidney", "aorta"])
def test_the_mean_of_an_organ_lies_in_its_range(patients, organ):
    low, high = ENHANCING_HU[organ]
    for ct, labels in patients:
        # Without its rim, where the blur mixes it with its neighbours.
        core = binary_erosion(labels == LABELS[organ], np.ones((1, 3, 3)))
        assert low - 5 <= ct[core].mean() <= high + 5


def test_bone_has_a_core_and_a_brighter_rim(patients):
    for ct, labels in patients:
        spine = labels == LABELS["spine"]
        core = binary_erosion(spine, np.ones((1, 5, 5)))
        rim = spine & ~binary_erosion(spine, np.ones((1, 3, 3)))
        low, high = TISSUE_HU["trabecular bone"]
        # At pixels of 3 mm the blur lets the rim shine into the core, so the core's bound is loose.
        assert low <= np.median(ct[core]) <= high + 60
        assert ct[rim].mean() > ct[core].mean() + 50


def test_air_surrounds_the_body_and_fat_is_its_outermost_tissue(patients):
    for ct, labels in patients:
        for corner in (ct[:, :8, :8], ct[:, :8, -8:]):
            assert abs(corner.mean() + 1000) < 15
        body = _body(ct)
        rim = body & ~binary_erosion(body, np.ones((1, 3, 3)), iterations=2)
        inside_rim = binary_erosion(body, np.ones((1, 3, 3))) & rim  # not the pixel mixed with air
        low, high = TISSUE_HU["fat"]
        assert low - 30 <= np.median(ct[inside_rim]) <= high + 30
        assert not (labels.astype(bool) & rim).any()


def test_every_label_lies_inside_the_body(patients):
    for ct, labels in patients:
        assert not ((labels > 0) & ~_body(ct)).any()


def test_organs_lie_where_anatomy_puts_them(patients):
    for _, labels in patients:
        z, y, x = (
            {o: np.nonzero(labels == LABELS[o])[axis].mean() for o in ORGANS} for axis in range(3)
        )
        assert x["liver"] < x["aorta"] < x["spleen"]  # LPS: the patient's right has the smaller x
        assert y["liver"] < y["spine"]  # the back has the greater y
        assert y["aorta"] < y["spine"]
        assert z["kidney"] < z["liver"]


def test_there_are_two_kidneys(patients):
    for _, labels in patients:
        parts, count = label(labels == LABELS["kidney"])
        sizes = np.bincount(parts.ravel())[1 : count + 1]
        assert (sizes > 200).sum() == 2


def test_there_is_gas_in_the_bowel_and_a_table_under_the_patient(patients):
    for ct, _ in patients:
        body = _body(ct)
        assert ((ct < -500) & binary_erosion(body, iterations=3)).sum() > 20
        rows_below = ct[:, 100:, :][~body[:, 100:, :]]
        assert (rows_below > -600).sum() > 100


def test_noise_is_as_strong_as_in_a_scan_and_correlated_in_plane(patients):
    for ct, labels in patients:
        core = binary_erosion(labels == LABELS["liver"], np.ones((1, 3, 3)), iterations=2)
        assert NOISE_SD_HU[0] - 1 < ct[core].std() < NOISE_SD_HU[1] + 1
        residual = ct - ct[core].mean()
        both = core[:, :, 1:] & core[:, :, :-1]
        neighbours = np.corrcoef(residual[:, :, 1:][both], residual[:, :, :-1][both])[0, 1]
        assert neighbours > 0.3
        slices = core[1:] & core[:-1]
        assert abs(np.corrcoef(residual[1:][slices], residual[:-1][slices])[0, 1]) < 0.1


def test_the_same_seed_gives_the_same_patient():
    first, second = (make_phantom(np.random.default_rng([7, 0])) for _ in range(2))
    np.testing.assert_array_equal(first[0], second[0])
    np.testing.assert_array_equal(first[1], second[1])


def test_patients_differ_in_shape_size_and_contrast(patients):
    for organ in ("liver", "spleen", "kidney"):
        volumes = [(labels == LABELS[organ]).sum() for _, labels in patients]
        assert max(volumes) > 1.05 * min(volumes)
    livers = [labels == LABELS["liver"] for _, labels in patients]
    overlap = 2 * (livers[0] & livers[1]).sum() / (livers[0].sum() + livers[1].sum())
    assert overlap < 0.95
    means = [ct[labels == LABELS["liver"]].mean() for ct, labels in patients]
    assert max(means) - min(means) > 5


def test_anatomy_is_in_millimetres_not_in_voxels():
    def liver_litres(shape, spacing_mm):
        _, labels = make_phantom(np.random.default_rng(3), shape, spacing_mm)
        return (labels == LABELS["liver"]).sum() * np.prod(spacing_mm) * 1e-6

    coarse = liver_litres((12, 64, 64), (12.0, 6.0, 6.0))
    fine = liver_litres((24, 128, 128), (6.0, 3.0, 3.0))
    assert coarse == pytest.approx(fine, rel=0.05)
    assert 0.4 < fine < 2.5  # a liver has about 1.5 litres; part of it may lie above the volume


def test_the_dataset_is_what_nnunet_wants_to_read(tmp_path):
    folder = tmp_path / "Dataset900_Phantom"
    write_phantom_dataset(folder, num_train=2, num_test=1, seed=7)

    assert not list(tmp_path.glob("*.partial"))
    dataset = json.loads((folder / "dataset.json").read_text())
    assert dataset["labels"] == LABELS
    assert dataset["channel_names"] == {"0": "CT"}
    assert dataset["numTraining"] == 2
    files = sorted(path.relative_to(folder).as_posix() for path in folder.glob("*/*"))
    assert files == [
        "imagesTr/phantom_000_0000.nii.gz",
        "imagesTr/phantom_001_0000.nii.gz",
        "imagesTs/phantom_002_0000.nii.gz",
        "labelsTr/phantom_000.nii.gz",
        "labelsTr/phantom_001.nii.gz",
        "labelsTs/phantom_002.nii.gz",
    ]


def test_the_dataset_keeps_voxels_and_spacing(tmp_path):
    folder = tmp_path / "Dataset900_Phantom"
    write_phantom_dataset(folder, num_train=1, num_test=1, seed=7)

    ct, labels = make_phantom(np.random.default_rng([7, 1]))
    image = sitk.ReadImage(str(folder / "imagesTs" / "phantom_001_0000.nii.gz"))
    reference = sitk.ReadImage(str(folder / "labelsTs" / "phantom_001.nii.gz"))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), ct)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(reference), labels)
    assert image.GetSpacing() == reference.GetSpacing() == tuple(reversed(DEFAULT_SPACING_MM))
    assert image.GetSize() == tuple(reversed(DEFAULT_SHAPE))


def test_an_existing_dataset_is_not_overwritten(tmp_path):
    folder = tmp_path / "Dataset900_Phantom"
    folder.mkdir()
    with pytest.raises(UserError, match="exists"):
        write_phantom_dataset(folder, num_train=1, num_test=0)
    assert list(folder.iterdir()) == []


def _body(ct):
    """Each slice's largest region above -500 HU with its holes filled: the trunk, not the table."""
    body = np.zeros(ct.shape, bool)
    for index, ct_slice in enumerate(ct):
        parts, _ = label(ct_slice > -500)
        largest = np.argmax(np.bincount(parts.ravel())[1:]) + 1
        body[index] = binary_fill_holes(parts == largest)
    return body
