"""The picture of predictions beside their references."""

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.evaluation.overlay import save_overlay
from nnunetv2_meddinov3.raw_dataset import RawDataset

DATASET = RawDataset(Path(), ".nii.gz", {0: "CT"}, labels={"spleen": (7,), "liver": (3,)})


def write(path, voxels, spacing=(1.0, 1.0, 1.0)):
    image = sitk.GetImageFromArray(np.asarray(voxels))
    image.SetSpacing(spacing[: image.GetDimension()])
    sitk.WriteImage(image, str(path))


def test_the_overlay_draws_each_case_twice_with_contours_where_the_labels_are(folders):
    reference, prediction = np.zeros((2, 3, 40, 40), np.uint8)
    reference[1, 10:30, 10:30] = 3
    prediction[1, 10:30, 10:20] = 7
    for folder, voxels in (("labels", reference), ("predictions", prediction)):
        write(folders / folder / "a.nii.gz", voxels)
    write(folders / "images" / "a_0000.nii.gz", np.full((3, 40, 40), 50, np.int16))
    overlay = folders / "overlay.png"
    save_overlay(
        overlay,
        {"a": folders / "images" / "a_0000.nii.gz"},
        folders / "predictions",
        folders / "labels",
        DATASET,
        {"a": {"spleen": 0.0, "liver": 0.0}},
    )
    pixels = sitk.GetArrayFromImage(sitk.ReadImage(str(overlay)))[..., :3].astype(int)
    assert not list(folders.glob("*.part"))
    middle = pixels.shape[1] // 2
    above_legend = slice(0, int(0.85 * pixels.shape[0]))
    left, right = pixels[above_legend, :middle], pixels[above_legend, middle:]
    blue, orange = (31, 119, 180), (255, 127, 14)  # spleen and liver, first and second of tab10
    assert count(left, orange) > 100
    assert count(left, blue) == 0
    assert count(right, blue) > 100
    assert count(right, orange) == 0
    grey = 128  # 50 HU is the middle of the abdomen window
    assert count(left, (grey,) * 3) > 10_000


def test_the_overlay_shows_the_slice_with_most_labels(folders):
    reference = np.zeros((4, 40, 40), np.uint8)
    reference[1, 5:35, 5:35] = 3  # a large label
    reference[2, 5:9, 5:9], reference[2, 20:24, 20:24] = 3, 7  # two small ones
    ct = np.full((4, 40, 40), -1000, np.int16)
    ct[2] = 1000
    for folder in ("labels", "predictions"):
        write(folders / folder / "a.nii.gz", reference)
    write(folders / "images" / "a_0000.nii.gz", ct)
    overlay = folders / "overlay.png"
    save_overlay(
        overlay,
        {"a": folders / "images" / "a_0000.nii.gz"},
        folders / "predictions",
        folders / "labels",
        DATASET,
        {"a": {"spleen": 1.0, "liver": 1.0}},
    )
    pixels = sitk.GetArrayFromImage(sitk.ReadImage(str(overlay)))[..., :3]
    assert (pixels.reshape(-1, 3) == 0).all(axis=1).mean() < 0.1  # not the black slices


def test_an_image_that_cannot_be_read_is_named_in_one_sentence(folders):
    image = folders / "images" / "a_0000.nii.gz"
    image.write_bytes(b"no image")
    arguments = (folders / "predictions", folders / "labels", DATASET, {"a": {"spleen": 0.0}})
    with pytest.raises(
        UserError, match=r"a_0000\.nii\.gz must be an image .*but: \w.*\.$"
    ) as raised:
        save_overlay(folders / "overlay.png", {"a": image}, *arguments)
    assert "\n" not in str(raised.value)
    assert not (folders / "overlay.png").exists()


def count(pixels, colour):
    return int((np.abs(pixels - np.array(colour)).max(axis=-1) <= 3).sum())
