import base64
import io
import re

import numpy as np
from PIL import Image

from nnunetv2_meddinov3.curate.pipeline import curate
from nnunetv2_meddinov3.curate.report import as_png, histogram_figure, montage_figure


def test_the_report_says_what_is_in_the_store_and_what_is_not(tmp_path, make_ct, write_image):
    array = make_ct(12, 24, seed=1)
    array[3] = -1000
    write_image(tmp_path / "North" / "a<b>.nii.gz", array)
    write_image(tmp_path / "South" / "copy.nii.gz", array[5:9], first_mm=10.0)
    (tmp_path / "South" / "broken.nii.gz").write_bytes(b"")
    curate([tmp_path / "North", tmp_path / "South"], tmp_path / "store")
    page = (tmp_path / "store" / "report.html").read_text(encoding="utf-8")
    assert "11 slices of 2 volumes" in page
    assert "sources that did not enter: 1" in page
    row = "<td>{}</td>" * 7
    assert row.format("North", "CT", 1, 1, 11, 0, 1) in page
    assert row.format("South", "-", 1, 1, 0, 4, 0) in page
    assert "<td>North/a&lt;b&gt;.nii.gz</td><td>1</td><td>constant</td>" in page
    assert "<td>South/broken.nii.gz</td>" in page


def test_the_report_needs_no_other_file_and_its_pictures_are_png(tmp_path, make_ct, write_image):
    write_image(tmp_path / "a" / "v.nii.gz", make_ct(3, 24))
    curate([tmp_path / "a"], tmp_path / "store")
    page = (tmp_path / "store" / "report.html").read_text(encoding="utf-8")
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(pictures) == page.count("<img") == 2
    for picture in pictures:
        assert Image.open(io.BytesIO(base64.b64decode(picture))).format == "PNG"
    assert not re.search(r'(src|href)="(?!data:)', page)


def test_a_store_without_slices_has_a_report_too(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "broken.nii.gz").write_bytes(b"")
    assert curate([tmp_path / "a"], tmp_path / "store").exit_code == 2
    page = (tmp_path / "store" / "report.html").read_text(encoding="utf-8")
    assert "0 slices of 0 volumes" in page
    assert "<td>a/broken.nii.gz</td>" in page


def test_reasons_and_notes_are_counted_by_kind_the_most_frequent_first(
    tmp_path, make_ct, write_image
):
    folder = tmp_path / "a"
    for name in ("v", "w"):
        write_image(folder / f"{name}.nii.gz", make_ct(3, 24) + np.float32(0.25))
    write_image(folder / "x.nii.gz", np.round(make_ct(3, 24), -1) / np.float32(1000))
    for name in ("v_seg", "w_mask", "empty"):
        (folder / f"{name}.nii.gz").write_bytes(b"x" if "_" in name else b"")
    curate([folder], tmp_path / "store")
    page = (tmp_path / "store" / "report.html").read_text(encoding="utf-8")
    grouped = "<td>2</td><td>it is named as the labels of ... beside it</td>"
    assert page.index(grouped) < page.index("<td>1</td><td>the file is empty</td>")
    assert "<td>a/v_seg.nii.gz</td><td>it is named as the labels of v.nii.gz beside it</td>" in page
    notes = page[page.index(">Notes<") : page.index(">Sources that did not enter<")]
    numbers = [int(number) for number in re.findall(r"<td>(\d+)</td>", notes)]
    assert numbers == sorted(numbers, reverse=True)
    assert len(set(numbers)) > 1


def test_the_montage_shows_each_slice_in_its_window():
    image = np.full((8, 8), 100, np.int16)
    rows = [("A", [(image, 0, 100), (image, 100, 200)])]
    pixels = np.asarray(Image.open(io.BytesIO(as_png(montage_figure(rows)))).convert("L"))
    height, width = pixels.shape
    left, right = pixels[height * 2 // 3, width // 4], pixels[height * 2 // 3, width * 3 // 4]
    assert (left, right) == (255, 0)


def test_the_montage_has_a_titled_row_for_each_dataset():
    images = [np.full((8, 8), number, np.int16) for number in range(3)]
    rows = [("A", [(image, 0, 9) for image in images]), ("B", [(images[2], 0, 9)])]
    axes = np.reshape(montage_figure(rows).axes, (2, 3))
    assert [[axis.get_title(loc="left") for axis in line] for line in axes] == [
        ["A", "", ""],
        ["B", "", ""],
    ]
    shown = [[len(axis.images) for axis in line] for line in axes]
    assert shown == [[1, 1, 1], [1, 0, 0]]
    np.testing.assert_array_equal(axes[1, 0].images[0].get_array(), images[2])


LABELS = [
    ("pixel spacing (mm)", "slices"),
    ("distance between slices (mm)", "slices"),
    ("HU, of a sample of CT slices", "pixels"),
    ("body fraction", "slices"),
]


def test_histograms_count_what_is_known():
    spacing_x, spacing_z = np.array([0.5, 0.5, 0.7]), np.array([2.0, 2.0, 2.5])
    values = np.array([-1000, -1000, 40, 2000])  # the last is beyond the bins
    figure = histogram_figure(spacing_x, spacing_z, values, np.array([0.0, 0.5, 1.0]))
    assert [(axis.get_xlabel(), axis.get_ylabel()) for axis in figure.axes] == LABELS
    assert [sum(bar.get_height() for bar in axis.patches) for axis in figure.axes] == [3, 3, 3, 3]
    hu = {bar.get_x(): bar.get_height() for bar in figure.axes[2].patches if bar.get_height()}
    assert hu == {-1000: 2, 40: 1}
    assert [axis.get_yscale() for axis in figure.axes] == ["linear", "linear", "log", "linear"]
    assert [len(axis.texts) for axis in figure.axes] == [0] * 4


def test_histograms_say_what_is_unknown():
    nothing, some = np.empty(0), np.array([0.5, 0.6])
    figure = histogram_figure(nothing, some, nothing, some)
    assert [(axis.get_xlabel(), axis.get_ylabel()) for axis in figure.axes] == LABELS
    told = [[text.get_text() for text in axis.texts] for axis in figure.axes]
    assert told == [["unknown"], [], ["unknown"], []]
    assert [len(axis.patches) > 0 for axis in figure.axes] == [False, True, False, True]
    assert figure.axes[2].get_yscale() == "linear"
