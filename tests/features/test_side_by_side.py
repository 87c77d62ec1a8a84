import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from nnunetv2_meddinov3.cli import main
from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.features.extraction import Tokens
from nnunetv2_meddinov3.features.side_by_side import measured

pytestmark = pytest.mark.slow
SMALL = ["--size", "128", "--slices", "4", "--device", "cpu"]


def test_a_page_shows_two_checkpoints_on_the_same_slices(
    tmp_path, marked_ct, oriented, weights, other_weights
):
    path = oriented(tmp_path / "ct.nii.gz", marked_ct)
    output = tmp_path / "page.html"
    arguments = [weights, other_weights, "--on", str(path), "-o", str(output), *SMALL]
    assert main(["features", "compare", *arguments]) == 0
    page = output.read_text(encoding="utf-8")
    assert "The same 4 slices of ct." in page
    rows = re.findall(r"<tr><td>(.*?)</td><td>(.*?)</td><td>(.*?)</td></tr>", page)
    assert len(rows) == 5
    assert sum(float(a) != float(b) for _, a, b in rows) >= 3
    pictures = [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")).astype(int)
        for data in re.findall(r"data:image/png;base64,([^\"]+)", page)
    ]
    assert len(pictures) == 2
    for pixels in pictures:  # the left third is grey, the others are not
        third = pixels.shape[1] // 3
        spread = np.ptp(pixels, axis=-1)
        assert (spread[:, :third] > 30).mean() < 0.02
        assert (spread[:, third:] > 30).mean() > 0.1
    assert len(re.findall(r'<img alt="Slices, and', page)) == 2


def test_probes_are_shown_where_there_are_labels(tmp_path, source, weights, other_weights):
    import json

    import SimpleITK as sitk

    raw = tmp_path / "Dataset001_X"
    for folder in ("imagesTr", "labelsTr"):
        (raw / folder).mkdir(parents=True)
    for number in range(4):
        image = sitk.ReadImage(str(source / f"v{number}.nii.gz"))
        sitk.WriteImage(image, str(raw / "imagesTr" / f"c{number}_0000.nii.gz"))
        label = sitk.Cast(image > 60, sitk.sitkUInt8)
        sitk.WriteImage(label, str(raw / "labelsTr" / f"c{number}.nii.gz"))
    (raw / "dataset.json").write_text(
        json.dumps(
            {
                "channel_names": {"0": "CT"},
                "labels": {"background": 0, "bright": 1},
                "numTraining": 4,
                "file_ending": ".nii.gz",
            }
        )
    )
    output = tmp_path / "page.html"
    arguments = [weights, other_weights, "--on", str(source), "--dataset", str(raw)]
    assert main(["features", "compare", *arguments, "-o", str(output), *SMALL]) == 0
    page = output.read_text(encoding="utf-8")
    assert "segmentation (Dice)" in page
    assert "blind guess" in page


def slices_of(patches):
    return [Tokens(patch.mean((0, 1)), patch.astype(np.float32)) for patch in patches]


def test_the_numbers_tell_good_features_from_bad_ones():
    generator = np.random.default_rng(0)
    body = [np.ones((12, 12), bool)] * 3
    noise = generator.normal(size=(3, 12, 12, 32))
    smooth = np.cumsum(np.cumsum(noise, 1), 2)
    flat = noise[..., :1] * generator.normal(size=32)  # along one line
    long = noise.copy()
    long[:, 0, :6] *= 10
    found = {name: measured(slices_of(x), body) for name, x in
             {"noise": noise, "smooth": smooth, "flat": flat, "long": long}.items()}  # fmt: skip
    assert found["noise"]["patch_rank"] > 25
    assert found["flat"]["patch_rank"] == pytest.approx(1, abs=0.1)
    assert abs(found["noise"]["smoothness"]) < 0.05
    assert found["smooth"]["smoothness"] > 0.8
    assert found["noise"]["outliers"] == 0
    assert found["long"]["outliers"] == pytest.approx(6 / 144, abs=0.01)


def test_a_mistake_is_a_sentence_and_leaves_no_page(tmp_path, source, weights):
    output = tmp_path / "page.html"
    base = ["features", "compare", "--on", str(source), "-o", str(output), *SMALL]
    with pytest.raises(UserError, match="two to 26 different weights, got 2 with a repetition"):
        main([*base, "--", weights, weights])
    with pytest.raises(UserError, match=r"nothing\.pth"):
        main([*base, "--", weights, "nothing.pth"])
    with pytest.raises(UserError, match="--size must be a multiple"):
        main([*base, "--size", "100", "--", weights, f"{weights} "])
    assert not output.exists()
