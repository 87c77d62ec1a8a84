import base64
import io
import re

import numpy as np
from PIL import Image

from nnunetv2_meddinov3.curate.pipeline import curate
from nnunetv2_meddinov3.curate.report import histogram_figure, montage_figure


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


def test_the_montage_shows_each_slice_in_its_window():
    image = np.full((8, 8), 100, np.int16)
    rows = [("A", [(image, 0, 100), (image, 100, 200)])]
    pixels = np.asarray(Image.open(io.BytesIO(montage_figure(rows))).convert("L"))
    height, width = pixels.shape
    left, right = pixels[height * 2 // 3, width // 4], pixels[height * 2 // 3, width * 3 // 4]
    assert (left, right) == (255, 0)


def test_histograms_say_what_is_unknown():
    some = np.array([0.5, 0.6])
    unknown = histogram_figure(np.empty(0), np.empty(0), np.empty(0), np.empty(0))
    known = histogram_figure(some, some, np.array([-1000, 40]), some)
    assert unknown != known
