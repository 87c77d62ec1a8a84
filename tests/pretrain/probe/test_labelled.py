import json
import shutil

import numpy as np
import pytest

from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.pretrain.probe.labelled import ProbeData


@pytest.fixture(scope="module")
def data(dataset):
    return ProbeData.from_nnunet(dataset, size=64, slices_per_case=6)


def test_slices_masks_and_patients_belong_together(data):
    n = len(data.images)
    assert data.images.shape == (n, 1, 64, 64)
    assert data.masks.shape == (n, 3, 64, 64)
    assert data.structures == ["liver", "kidney", "organs"]
    assert (data.masks[:, 0] <= data.masks[:, 2]).all()  # a region holds its labels
    liver = data.images[:, 0][data.masks[:, 0]]
    assert 60 < liver.mean() < 150  # HU
    assert data.images.min() < -800


def test_no_patient_is_on_both_sides(data):
    patients = np.array(data.patients)
    fitted, held_out = (set(patients[data.is_held_out == side]) for side in (False, True))
    assert not fitted & held_out
    assert (len(fitted), len(held_out)) == (4, 2)


def test_a_given_split_is_taken_and_one_through_a_patient_refused(dataset, tmp_path):
    folder = tmp_path / "Dataset002"
    shutil.copytree(dataset, folder)
    cases = [f"p{i}" for i in range(6)]
    (folder / "splits_final.json").write_text(json.dumps([{"train": cases[2:], "val": cases[:2]}]))
    data = ProbeData.from_nnunet(folder, size=64, slices_per_case=1)
    assert set(np.array(data.patients)[data.is_held_out]) == {"p0", "p1"}
    with pytest.raises(UserError, match="p is in both parts"):
        ProbeData.from_nnunet(folder, patients="p")


def test_a_dataset_without_labels_is_one_sentence(dataset, tmp_path):
    folder = tmp_path / "Dataset003"
    shutil.copytree(dataset, folder, ignore=shutil.ignore_patterns("labelsTr"))
    with pytest.raises(UserError, match="holds no case with both"):
        ProbeData.from_nnunet(folder)


def test_a_case_without_its_label_file_is_named_and_left_out(dataset, tmp_path, capsys):
    folder = tmp_path / "Dataset004"
    shutil.copytree(dataset, folder)
    ProbeData.from_nnunet(folder, size=64, slices_per_case=1)
    assert capsys.readouterr().err == ""
    missing = sorted((folder / "labelsTr").iterdir())[1]
    missing.unlink()
    data = ProbeData.from_nnunet(folder, size=64, slices_per_case=1)
    said = capsys.readouterr().err
    assert "1 training case without a label file" in said
    assert str(missing) in said
    assert missing.name.split(".")[0] not in data.patients


LABELS = {
    "background": 0,
    "liver": 1,
    "kidney": 3,
    "organs": [1, 2, 3],
    "rest": [4, 5],
    "ignore": 6,
}


def test_pixels_of_the_ignore_label_are_known_to_be_unknown(phantoms, write_dataset, tmp_path):
    cases = {}
    for case, (ct, labels) in phantoms.items():
        labels = labels.copy()
        labels[:, :, 40:] = 6
        cases[case] = (ct, labels)
    folder = write_dataset(tmp_path / "Dataset004", cases, LABELS)
    data = ProbeData.from_nnunet(folder, size=64, slices_per_case=6)
    assert data.structures == ["liver", "kidney", "organs", "rest"]
    assert data.ignored[:, :, 40:].all()
    assert not data.ignored[:, :, :40].any()
    assert not (data.masks & data.ignored[:, None]).any()
    assert data.masks.any()


def test_of_a_pixel_that_is_partly_ignored_the_labelled_part_counts(write_dataset, tmp_path):
    labels = np.full((4, 64, 64), 4, np.uint8)
    labels[:, ::2] = 0  # every other line is labelled
    labels[:, ::2, :32] = 1
    cases = {f"p{i}": (np.zeros((4, 64, 64), np.int16), labels) for i in range(2)}
    folder = write_dataset(tmp_path / "Dataset004", cases, {"background": 0, "a": 1, "ignore": 4})
    data = ProbeData.from_nnunet(folder, size=32)
    assert not data.ignored.any()
    assert data.masks[:, 0, :, :16].all()
    assert not data.masks[:, 0, :, 16:].any()


def test_slices_without_any_known_label_are_not_taken(phantoms, write_dataset, tmp_path):
    cases, known = {}, (2, 5, 7)  # such as when every few slices were annotated
    for case, (ct, labels) in phantoms.items():
        sparse = np.full_like(labels, 6)
        sparse[list(known)] = labels[list(known)]
        cases[case] = (ct, sparse)
    folder = write_dataset(tmp_path / "Dataset004", cases, LABELS)
    data = ProbeData.from_nnunet(folder, size=64, slices_per_case=6)
    assert len(data.images) == 6 * len(known)
    assert not data.ignored.any()


def test_without_an_ignore_label_no_pixel_is_ignored(data):
    assert data.ignored.shape == data.masks[:, 0].shape
    assert not data.ignored.any()


def test_what_is_added_to_make_a_slice_square_shows_air_and_no_structure(write_dataset, tmp_path):
    image, labels = np.full((3, 32, 64), 40, np.int16), np.ones((3, 32, 64), np.uint8)
    image[:, :2] = -1000
    cases = {f"p{i}": (image, labels) for i in range(2)}
    folder = write_dataset(tmp_path / "Dataset005", cases, {"background": 0, "all": 1})
    data = ProbeData.from_nnunet(folder, size=64)
    assert data.masks[:, 0, 16:48].all()
    for rows in (slice(0, 16), slice(48, 64)):
        assert not data.masks[:, 0, rows].any()
        assert (data.images[:, 0, rows] == -1000).all()


def test_pictures_in_colours_are_taken_for_grey(write_dataset, tmp_path):
    grey = np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)
    labels = (grey > 128).astype(np.uint8)
    cases = {f"p{i}": (np.stack([grey] * 3, -1), labels) for i in range(2)}
    folder = write_dataset(tmp_path / "Dataset006", cases, {"background": 0, "bright": 1}, ".png")
    data = ProbeData.from_nnunet(folder, size=64)
    assert data.images.shape == (2, 1, 64, 64)
    np.testing.assert_allclose(255 * data.images[0, 0].numpy(), grey, atol=1e-3)


@pytest.mark.parametrize(
    ("facts", "sentence"),
    [
        ({"labels": {"background": 0}}, "dataset.json must name labels, but it names none"),
        ({"labels": {"background": 0, "ignore": 1}}, "must name labels, but it names none"),
        ({"file_ending": ".nrrd"}, r"no case with both \(file_ending .nrrd\)"),
    ],
)
def test_a_dataset_that_cannot_be_probed_is_one_sentence(dataset, tmp_path, facts, sentence):
    folder = tmp_path / "Dataset007"
    shutil.copytree(dataset, folder)
    before = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps({**before, **facts}))
    with pytest.raises(UserError, match=sentence) as caught:
        ProbeData.from_nnunet(folder)
    assert "\n" not in str(caught.value)


def test_pictures_of_a_ct_are_windows_and_no_hu(tmp_path, write_dataset):
    rng = np.random.default_rng(0)
    cases = {}
    for case in range(6):
        image = rng.integers(0, 256, (40, 48)).astype(np.uint8)
        image[0, :2] = 0, 255
        label = np.zeros_like(image)
        label[10:20, 10:20] = 1
        cases[f"case_{case}"] = (image, label)
    folder = write_dataset(tmp_path / "Dataset007", cases, {"background": 0, "square": 1}, ".png")
    data = ProbeData.from_nnunet(folder, size=48)
    assert data.unit == "normalised"
    assert 0 <= float(data.images.min()) < 0.1
    assert 0.9 < float(data.images.max()) <= 1.1  # resized by a cubic spline
