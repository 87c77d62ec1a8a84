"""The folders of the demo: what it empties, what it reads, what it measures on."""

import json
from pathlib import Path

import pytest

from nnunetv2_meddinov3.demo.data import (
    MARKER,
    check_raw,
    dataset_number,
    held_out_cases,
    prepare_out,
)
from nnunetv2_meddinov3.demo.phantom import write_phantom_dataset
from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.raw_dataset import open_raw_dataset

SMALL = {"shape": (4, 32, 32), "spacing_mm": (30.0, 12.0, 12.0)}


def make_raw(folder, num_train, num_test=0):
    write_phantom_dataset(folder, num_train=num_train, num_test=num_test, **SMALL)
    return folder


def test_an_earlier_demo_is_replaced_and_files_of_the_user_stay(tmp_path):
    out = prepare_out(tmp_path / "out", None)
    assert (out / MARKER).is_file()
    (out / "predictions").mkdir()
    (out / "predictions" / "old.nii.gz").write_text("old")
    (out / "report.html").write_text("old")
    (out / "notes.txt").write_text("mine")
    assert prepare_out(tmp_path / "out", None) == out
    assert sorted(path.name for path in out.iterdir()) == sorted([MARKER, "notes.txt"])


def test_held_out_are_the_test_cases_if_all_have_labels(tmp_path):
    folder = make_raw(tmp_path / "Dataset123_Mine", num_train=5, num_test=2)
    held_out = held_out_cases(check_raw(folder), tmp_path / "none", tmp_path / "held_out")
    assert (held_out.images, held_out.labels) == (folder / "imagesTs", folder / "labelsTs")


def test_held_out_are_fold_0s_validation_cases_if_a_test_case_has_no_label(tmp_path):
    folder = make_raw(tmp_path / "Dataset123_Mine", num_train=5, num_test=2)
    (folder / "labelsTs" / "phantom_006.nii.gz").unlink()
    splits = [{"train": [], "val": ["phantom_001", "phantom_003"]}, {"train": [], "val": []}]
    (tmp_path / "splits_final.json").write_text(json.dumps(splits))
    held_out = held_out_cases(open_raw_dataset(folder), tmp_path, tmp_path / "held_out")
    assert held_out.labels == tmp_path / "gt_segmentations"
    images = sorted(held_out.images.iterdir())
    assert [path.name for path in images] == ["phantom_001_0000.nii.gz", "phantom_003_0000.nii.gz"]
    assert images[1].read_bytes() == (folder / "imagesTr" / images[1].name).read_bytes()


def test_a_dataset_that_nnunet_can_split_passes(tmp_path, monkeypatch):
    make_raw(tmp_path / "Dataset123_Mine", num_train=5)
    monkeypatch.chdir(tmp_path)
    assert check_raw(Path("Dataset123_Mine")).folder == tmp_path / "Dataset123_Mine"


@pytest.mark.parametrize("key", ["channel_names", "labels", "file_ending"])
def test_what_dataset_json_lacks_is_named(key, tmp_path):
    folder = make_raw(tmp_path / "Dataset123_Mine", num_train=5)
    dataset = json.loads((folder / "dataset.json").read_text())
    del dataset[key]
    (folder / "dataset.json").write_text(json.dumps(dataset))
    with pytest.raises(UserError, match=f"lacks {key}"):
        check_raw(folder)


@pytest.mark.parametrize(("name", "number"), [("Dataset1234_Big", 1234), ("Dataset007_A", 7)])
def test_an_id_may_have_more_than_three_digits(name, number, tmp_path):
    folder = make_raw(tmp_path / name, num_train=5)
    (tmp_path / "Dataset008_Other").mkdir()
    assert dataset_number(check_raw(folder).folder.name) == number


@pytest.mark.parametrize("name", ["Dataset12_Short", "Dataset0123_Padded", "Dataset123", "123_A"])
def test_a_name_that_nnunet_does_not_find_by_its_id_is_refused(name, tmp_path):
    with pytest.raises(UserError, match="has another name"):
        check_raw(make_raw(tmp_path / name, num_train=5))


def test_an_id_that_is_the_beginning_of_another_is_refused_as_nnunet_does(tmp_path):
    folder = make_raw(tmp_path / "Dataset123_Mine", num_train=5)
    (tmp_path / "Dataset1234_Other").mkdir()
    with pytest.raises(UserError, match=r"begins with Dataset123, .*Dataset1234_Other and Dat"):
        check_raw(folder)


@pytest.mark.parametrize("removed", [["phantom_003"], ["phantom_001", "phantom_004"]])
def test_a_missing_label_file_is_named(removed, tmp_path):
    folder = make_raw(tmp_path / "Dataset123_Mine", num_train=5)
    for case in removed:
        (folder / "labelsTr" / f"{case}.nii.gz").unlink()
    with pytest.raises(UserError, match=f"there is no .*{removed[0]}.nii.gz") as caught:
        check_raw(folder)
    assert ("(2 are missing)" in str(caught.value)) is (len(removed) == 2)
