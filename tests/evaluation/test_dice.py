"""Dice by hand, and the tables made of it."""

import math
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.evaluation.dice import dice_per_label, format_table, mean_dice
from nnunetv2_meddinov3.raw_dataset import RawDataset, foreground_labels

LABELS = {"background": 0, "spleen": 7, "liver": 3}


def dataset_of(labels, ending=".nii.gz", reader=None):
    ignore = labels.get("ignore")
    named = foreground_labels(labels)
    return RawDataset(Path(), ending, {0: "CT"}, labels=named, ignore=ignore, reader=reader)


DATASET = dataset_of(LABELS)


def write(path, voxels, spacing=(1.0, 1.0, 1.0)):
    image = sitk.GetImageFromArray(np.asarray(voxels))
    image.SetSpacing(spacing[: image.GetDimension()])
    sitk.WriteImage(image, str(path))


def dice_of(folders, prediction, reference, dataset=DATASET):
    write(folders / "predictions" / "a.nii.gz", np.array([[prediction]], np.uint8))
    write(folders / "labels" / "a.nii.gz", np.array([[reference]], np.uint8))
    return dice_per_label(folders / "predictions", folders / "labels", dataset)["a"]


def test_dice_is_twice_the_overlap_over_both_volumes(folders):
    dice = dice_of(folders, [3, 3, 3, 0, 7, 7], [3, 3, 0, 0, 7, 0])
    assert dice == {"spleen": pytest.approx(2 * 1 / 3), "liver": pytest.approx(2 * 2 / 5)}


def test_labels_go_by_value_and_not_by_position(folders):
    # Value 7 is the first name and 3 the second: positions 1 and 2 would find nothing.
    assert dice_of(folders, [7, 3, 3], [7, 0, 0]) == {"spleen": 1.0, "liver": 0.0}


def test_a_label_absent_from_both_has_no_dice(folders):
    dice = dice_of(folders, [3, 0], [3, 0])
    assert math.isnan(dice["spleen"])
    assert dice["liver"] == 1.0


@pytest.mark.parametrize(("prediction", "reference"), [([7, 0], [0, 0]), ([0, 0], [7, 0])])
def test_a_label_in_only_one_of_them_has_a_dice_of_zero(folders, prediction, reference):
    assert dice_of(folders, prediction, reference)["spleen"] == 0.0


def test_a_region_is_the_union_of_its_labels(folders):
    labels = {"background": 0, "kidney": [1, 2, 3], "masses": [2, 3], "tumour": 2}
    dice = dice_of(folders, [1, 2, 3, 0], [1, 3, 2, 1], dataset_of(labels))
    assert dice["kidney"] == pytest.approx(2 * 3 / 7)
    assert dice["masses"] == 1.0  # confused within the region
    assert dice["tumour"] == 0.0


def test_voxels_of_the_ignore_label_do_not_count(folders):
    labels = {"background": 0, "liver": 1, "ignore": 2}
    dice = dice_of(folders, [1, 1, 1, 0], [1, 2, 2, 0], dataset_of(labels))
    assert dice == {"liver": 1.0}


def test_two_dimensional_images_are_measured_too(folders):
    for folder in ("predictions", "labels"):
        write(folders / folder / "a.png", np.array([[3, 0], [0, 3]], np.uint8))
    table = dice_per_label(folders / "predictions", folders / "labels", dataset_of(LABELS, ".png"))
    assert table["a"]["liver"] == 1.0


def test_more_references_than_predictions_are_allowed(folders):
    write(folders / "labels" / "b.nii.gz", np.zeros((1, 1, 2), np.uint8))
    assert set(dice_of(folders, [3], [3])) == {"spleen", "liver"}


def test_an_empty_folder_a_missing_and_a_misshapen_reference_are_refused(folders):
    with pytest.raises(UserError, match=r"holds no \*\.nii\.gz file"):
        dice_per_label(folders / "predictions", folders / "labels", DATASET)
    write(folders / "predictions" / "a.nii.gz", np.zeros((1, 2, 3), np.uint8))
    with pytest.raises(UserError, match=r"a\.nii\.gz does not exist"):
        dice_per_label(folders / "predictions", folders / "labels", DATASET)
    write(folders / "labels" / "a.nii.gz", np.zeros((1, 3, 2), np.uint8))
    with pytest.raises(UserError, match=r"\(1, 2, 3\) and .* has \(1, 3, 2\)"):
        dice_per_label(folders / "predictions", folders / "labels", DATASET)


def test_an_unreadable_image_is_named(folders):
    (folders / "predictions" / "a.nii.gz").write_bytes(b"no image")
    write(folders / "labels" / "a.nii.gz", np.zeros((1, 1, 1), np.uint8))
    with pytest.raises(UserError, match=r"predictions.a\.nii\.gz must be an image"):
        dice_per_label(folders / "predictions", folders / "labels", DATASET)


def test_numbers_are_those_of_the_definition_on_random_volumes_with_regions_and_ignore(folders):
    labels = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "rim": 1, "ignore": 5}
    rng = np.random.default_rng(0)
    dataset, pairs = dataset_of(labels), {}
    for case in "abc":
        pairs[case] = rng.integers(0, 4, (2, 3, 17, 19), dtype=np.uint8)
        pairs[case][1][rng.random((3, 17, 19)) < 0.2] = 5
        for folder, voxels in zip(("predictions", "labels"), pairs[case], strict=True):
            write(folders / folder / f"{case}.nii.gz", voxels, spacing=(0.5, 0.5, 3.0))
    table = dice_per_label(folders / "predictions", folders / "labels", dataset)
    assert list(table) == ["a", "b", "c"]
    for case, (prediction, reference) in pairs.items():
        for name, values in dataset.labels.items():
            p, r = (np.isin(a, values) & (reference != 5) for a in (prediction, reference))
            assert table[case][name] == 2 * (p & r).sum() / (p.sum() + r.sum())


@pytest.mark.parametrize("flip", [False, True])
def test_volumes_of_tif_are_read_as_nnunet_reads_them(folders, flip):
    tifffile = pytest.importorskip("tifffile")
    reference = np.zeros((3, 4, 5), np.uint8)
    reference[0], reference[2] = 3, 7
    tifffile.imwrite(folders / "labels" / "a.tif", reference, photometric="minisblack")
    prediction = reference[::-1] if flip else reference
    tifffile.imwrite(folders / "predictions" / "a.tif", prediction, photometric="minisblack")
    dataset = dataset_of(LABELS, ".tif")
    dice = dice_per_label(folders / "predictions", folders / "labels", dataset)["a"]
    assert set(dice.values()) == {0.0 if flip else 1.0}


def test_the_reader_that_dataset_json_asks_for_is_used(folders):
    for folder in ("predictions", "labels"):
        write(folders / folder / "a.nii.gz", np.full((1, 2, 2), 3, np.uint8))
    dataset = dataset_of(LABELS, reader="NibabelIO")
    (folders / "labels" / "a.nii.gz").write_bytes(b"no image")
    with pytest.raises(UserError, match="that NibabelIO reads"):
        dice_per_label(folders / "predictions", folders / "labels", dataset)


def test_a_broadcastable_shape_is_refused_too(folders):
    write(folders / "predictions" / "a.nii.gz", np.full((2, 1, 3), 3, np.uint8))
    write(folders / "labels" / "a.nii.gz", np.full((1, 1, 3), 3, np.uint8))
    with pytest.raises(UserError, match="must have the shape of its reference"):
        dice_per_label(folders / "predictions", folders / "labels", DATASET)


TABLE = {"a": {"spleen": 0.5, "liver": math.nan}, "b": {"spleen": 1.0, "liver": 0.25}}


def test_means_leave_out_what_has_no_dice():
    assert mean_dice(TABLE) == {"spleen": 0.75, "liver": 0.25}
    assert math.isnan(mean_dice({"a": {"liver": math.nan}})["liver"])


def test_the_text_table_has_means_below_and_at_the_right():
    assert format_table(TABLE).splitlines() == [
        "case  spleen  liver   mean",
        "a      0.500      -  0.500",
        "b      1.000  0.250  0.625",
        "mean   0.750  0.250  0.500",
    ]
