"""Dice by hand, and what stands in the files that are written."""

import base64
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import SimpleITK as sitk

from nnunetv2_meddinov3.demo.report import (
    dice_per_label,
    foreground_labels,
    format_table,
    mean_dice,
    write_report,
)
from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.evaluation.overlay import save_overlay

DATASET = {
    "channel_names": {"0": "CT"},
    "labels": {"background": 0, "spleen": 7, "liver": 3},
    "file_ending": ".nii.gz",
}


@pytest.fixture
def folders(tmp_path):
    for name in ("predictions", "labels", "images"):
        (tmp_path / name).mkdir()
    return tmp_path


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
    dice = dice_of(folders, [1, 2, 3, 0], [1, 3, 2, 1], {**DATASET, "labels": labels})
    assert dice["kidney"] == pytest.approx(2 * 3 / 7)
    assert dice["masses"] == 1.0  # confused within the region
    assert dice["tumour"] == 0.0


def test_voxels_of_the_ignore_label_do_not_count(folders):
    labels = {"background": 0, "liver": 1, "ignore": 2}
    dice = dice_of(folders, [1, 1, 1, 0], [1, 2, 2, 0], {**DATASET, "labels": labels})
    assert dice == {"liver": 1.0}


def test_background_and_ignore_are_not_among_the_foreground_labels():
    labels = {"background": 0, "a": 1, "b": [1, 2], "ignore": 3}
    assert foreground_labels({"labels": labels}) == {"a": (1,), "b": (1, 2)}


def test_two_dimensional_images_are_measured_too(folders):
    for folder in ("predictions", "labels"):
        write(folders / folder / "a.png", np.array([[3, 0], [0, 3]], np.uint8))
    table = dice_per_label(
        folders / "predictions", folders / "labels", {**DATASET, "file_ending": ".png"}
    )
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
    assert not list(folders.glob("*.partial"))
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


class _Cells(HTMLParser):
    """Text of the table cells of a page, row by row."""

    def __init__(self, page):
        super().__init__()
        self.rows, self._in_cell = [], False
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        if tag == "tr":
            self.rows.append([])
        self._in_cell = tag in ("td", "th")

    def handle_data(self, data):
        if self._in_cell and data.strip():
            self.rows[-1].append(data)


def test_the_report_holds_table_picture_commands_and_versions(tmp_path):
    png = b"\x89PNG picture"
    (tmp_path / "overlay.png").write_bytes(png)
    page = tmp_path / "report.html"
    write_report(
        page,
        title="Demo <1>",
        note="Nothing about accuracy & all that.",
        table=TABLE,
        overlay=tmp_path / "overlay.png",
        commands=["nnUNetv2_train 900 2d_128 0", "nnUNetv2_predict -i 'a & b'"],
        versions={"torch": "2.99"},
    )
    text = page.read_text(encoding="utf-8")
    assert not list(tmp_path.glob("*.partial"))
    assert "Demo &lt;1&gt;" in text
    assert "Nothing about accuracy &amp; all that." in text
    assert "nnUNetv2_train 900 2d_128 0\nnnUNetv2_predict -i &#x27;a &amp; b&#x27;" in text
    assert _Cells(text).rows == [
        ["case", "spleen", "liver", "mean"],
        ["a", "0.500", "-", "0.500"],
        ["b", "1.000", "0.250", "0.625"],
        ["mean", "0.750", "0.250", "0.500"],
        ["software", "version"],
        ["torch", "2.99"],
    ]
    embedded = re.search(r'src="data:image/png;base64,([^"]+)"', text)[1]
    assert base64.b64decode(embedded) == png
    assert "http" not in text  # no other file, from nowhere


def count(pixels, colour):
    return int((np.abs(pixels - np.array(colour)).max(axis=-1) <= 3).sum())
