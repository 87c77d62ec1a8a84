import base64
import json
import re
import shutil

import nibabel
import numpy as np
import pytest

from nnunetv2_meddinov3.cli import main
from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.features.extraction import Extractor
from nnunetv2_meddinov3.features.scans import find_scans, open_scans
from nnunetv2_meddinov3.features.similarity import reduced

pytestmark = pytest.mark.slow
SMALL = ["--size", "128", "--slices", "all", "--device", "cpu"]
MARK = (90, 40, 2)  # voxel x, y, z of the marked CT in LPS, in patch row 2 and column 5


def similarity(output, *arguments):
    assert main(["features", "similarity", *SMALL, *map(str, arguments), "-o", str(output)]) == 0
    return output


def voxels_of(path):
    """Numbers (z, y, x) of a NIfTI as its file has them, and its affine."""
    image = nibabel.load(path)
    return np.asarray(image.dataobj).transpose(2, 1, 0), image.affine


def data_of(output):
    """What the page has for its script."""
    page = (output / "similarity.html").read_text(encoding="utf-8")
    (text,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', page)
    return json.loads(text)


def cosines_of(data):
    """The cosines that the page shows at first, of all slices of the first scan."""
    scan, start = data["scans"][0], data["start"]
    tokens = np.frombuffer(base64.b64decode(scan["tokens"]), np.int8).astype(float)
    tokens = tokens.reshape(len(scan["slices"]), scan["rows"], scan["columns"], data["dims"])
    tokens /= np.linalg.norm(tokens, axis=-1, keepdims=True)
    return tokens @ tokens[start["slice"], start["row"], start["column"]]


@pytest.fixture(scope="module")
def axial(tmp_path_factory, marked_ct, oriented, weights):
    """The output for the marked scan as LPS, and its file."""
    folder = tmp_path_factory.mktemp("similarity")
    path = oriented(folder / "ct.nii.gz", marked_ct)
    point = ",".join(map(str, MARK))
    return similarity(folder / "out", path, "--point", point, "--weights", weights), path


def test_a_patch_is_most_like_itself_and_then_like_the_rest_of_the_mark(axial):
    cosines, affine = voxels_of(axial[0] / "ct_similarity.nii.gz")
    np.testing.assert_allclose(affine, nibabel.load(axial[1]).affine, atol=1e-4)
    assert cosines[2, 40, 90] == pytest.approx(1, abs=1e-5)
    assert (cosines[2, 32:48, 80:96] == cosines[2, 40, 90]).all()  # the whole patch
    other = cosines[3, 40, 90]  # the mark in the next slice
    outside = np.delete(cosines, [2, 3], axis=0)
    assert other > outside.max()


def test_cosines_are_those_of_the_backbones_tokens(axial, weights):
    cosines, _ = voxels_of(axial[0] / "ct_similarity.nii.gz")
    (scan,) = open_scans(find_scans([axial[1]]))
    extractor = Extractor(weights, 128, "cpu")
    a = extractor.tokens(scan, 2).patches[2, 5]
    b = extractor.tokens(scan, 0).patches[4, 3]
    wanted = a @ b / (np.linalg.norm(a) * np.linalg.norm(b))
    assert cosines[0, 4 * 16 + 3, 3 * 16 + 7] == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize(("letters", "degrees"), [("RSA", 0), ("PIR", 0), ("LPS", 20)])
@pytest.mark.parametrize("in_mm", [False, True])
def test_a_point_is_the_same_place_whatever_the_axes(
    tmp_path, marked_ct, oriented, weights, axial, letters, degrees, in_mm
):
    path = oriented(tmp_path / "ct.nii.gz", marked_ct, letters, degrees)
    image = nibabel.load(path)
    bright = np.argwhere(np.asarray(image.dataobj) > 600)
    voxel = bright[len(bright) // 2]
    point = nibabel.affines.apply_affine(image.affine, voxel) if in_mm else voxel
    arguments = [path, f"--point={','.join(map(str, point))}", "--weights", weights]
    output = similarity(tmp_path / "out", *arguments, *(["--mm"] if in_mm else []))
    cosines, affine = voxels_of(output / "ct_similarity.nii.gz")
    np.testing.assert_allclose(affine, image.affine, atol=1e-4)
    assert cosines[tuple(voxel[::-1])] == pytest.approx(1, abs=1e-5)
    same = np.asarray(image.dataobj).transpose(2, 1, 0) > 600
    assert cosines[same].min() > 0.9 * cosines[same].max()


def test_the_page_holds_what_the_nifti_holds_within_the_error_that_it_states(axial):
    data = data_of(axial[0])
    assert data["start"] == {
        "scan": 0, "slice": 2, "row": 2, "column": 5, "toScan": 0, "toSlice": 2
    }  # fmt: skip
    (scan,) = data["scans"]
    assert (scan["rows"], scan["columns"]) == (6, 8)
    assert [s["said"] for s in scan["slices"]][2] == "slice 2, 16 mm"
    page = (axial[0] / "similarity.html").read_text(encoding="utf-8")
    stated = float(re.search(r"differ by up to ([\d.]+)", page)[1])
    assert stated <= 0.02
    wanted, _ = voxels_of(axial[0] / "ct_similarity.nii.gz")
    found = cosines_of(data)
    assert np.abs(found - wanted[:, 8::16, 8::16]).max() <= stated + 0.005
    assert "src=" not in page.replace('picture.src = "data:', "")
    assert "http" not in page


def test_another_scan_is_compared_and_comes_second(tmp_path, axial, source, weights):
    point = ",".join(map(str, MARK))
    arguments = [axial[1], "--point", point, "--weights", weights, "--to", source / "v3.nii.gz"]
    output = similarity(tmp_path / "out", *arguments)
    assert sorted(p.name for p in output.iterdir()) == [
        "ct_similarity.nii.gz", "similarity.html", "v3_similarity.nii.gz"
    ]  # fmt: skip
    data = data_of(output)
    assert [scan["name"] for scan in data["scans"]] == ["ct", "v3"]
    assert data["start"]["toScan"] == 1
    there, _ = voxels_of(output / "v3_similarity.nii.gz")
    assert 0 < there.max() < 1


def test_the_slice_of_the_point_is_looked_at_even_if_few_are_wanted(tmp_path, axial, weights):
    output = similarity(
        tmp_path / "o", axial[1], "--point", "90,40,5", "--weights", weights, "--slices", "1"
    )
    cosines, _ = voxels_of(output / "ct_similarity.nii.gz")
    assert np.flatnonzero(cosines.any((1, 2))).tolist() == [2, 5]


def test_fewer_numbers_are_taken_where_they_are_near_enough():
    generator = np.random.default_rng(0)
    flat = generator.normal(size=(1, 30, 40, 20)) @ generator.normal(size=(20, 384))
    flat /= np.linalg.norm(flat, axis=-1, keepdims=True)
    (small,), error = reduced([flat.astype(np.float32)])
    assert small.shape == (1, 30, 40, 64)
    assert error < 0.02
    full = generator.normal(size=(1, 30, 40, 384))
    full /= np.linalg.norm(full, axis=-1, keepdims=True)
    (small,), error = reduced([full.astype(np.float32)])
    assert small.shape[-1] == 384
    assert error < 0.02


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--point", "128,0,0"], r"must lie inside ct, .* to 127, 95, 5, but 128,0,0 is voxel 128"),
        (["--point=-1,0,0"], r"must lie inside ct"),
        (["--point=0,0,900", "--mm"], r"but 0,0,900 mm is voxel .*, 297"),
        (["--point", "1,2"], r"--point must be three numbers such as 120,96,40, got '1,2'"),
        (["--point", "a,b,c"], r"--point must be three numbers"),
        (["--point", "nan,0,0"], r"--point must be three numbers"),
        (["--to", "nothing.nii.gz"], r"nothing.nii.gz does not exist"),
    ],
)
def test_a_mistake_is_a_sentence_and_leaves_nothing(tmp_path, axial, weights, more, sentence):
    output = tmp_path / "out"
    arguments = [str(axial[1]), "--point", "1,1,1", "--weights", weights, "-o", str(output)]
    with pytest.raises(UserError, match=sentence):
        main(["features", "similarity", *arguments, *SMALL, *more])
    assert not output.exists()


def test_a_folder_of_scans_is_no_place_for_a_point(tmp_path, source, weights):
    arguments = [str(source), "--point", "1,1,1", "--weights", weights, "-o", str(tmp_path / "o")]
    with pytest.raises(UserError, match=r"VOLUME must be one scan, .* holds 5"):
        main(["features", "similarity", *arguments, *SMALL])


def test_a_page_too_large_for_a_browser_is_refused_before_any_work(
    tmp_path, axial, weights, monkeypatch
):
    monkeypatch.setattr("nnunetv2_meddinov3.features.similarity._MOST_BYTES", 1e4)
    monkeypatch.setattr(Extractor, "tokens", None)  # must not be asked
    arguments = [str(axial[1]), "--point", "1,1,1", "--weights", weights, "-o", str(tmp_path / "o")]
    with pytest.raises(UserError, match=r"one of about \d+ MB: make --slices or --size smaller"):
        main(["features", "similarity", *arguments, *SMALL])


def test_a_click_moves_the_map_in_a_browser(axial):
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    if (chromium := shutil.which("chromium")) is None:
        pytest.skip("needs chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        errors = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto((axial[0] / "similarity.html").as_uri())
        assert "row 2, column 5 of ct, slice 2" in page.inner_text("#to-said")
        assert "at most 1.00" in page.inner_text("#to-said")
        page.keyboard.press("ArrowUp")
        assert page.inner_text("#to-said").startswith("ct, slice 3")
        box = page.locator("#from").bounding_box()
        page.mouse.click(box["x"] + box["width"] * 0.95, box["y"] + box["height"] * 0.55)
        assert "row 3, column 7 of ct, slice 2" in page.inner_text("#to-said")
        page.locator("#to-slice").fill("0")
        assert page.inner_text("#to-said").startswith("ct, slice 0")
        assert not errors
        browser.close()


def test_a_click_moves_the_map_in_firefox(axial, firefox):
    said = "return document.querySelector('#to-said').innerText"
    firefox.ask("WebDriver:Navigate", url=(axial[0] / "similarity.html").as_uri())
    assert "row 2, column 5 of ct, slice 2" in firefox.run(said)
    firefox.press("\ue013")  # the arrow up
    assert firefox.run(said).startswith("ct, slice 3")
    box = firefox.run("return document.querySelector('#from').getBoundingClientRect()")
    firefox.click(box["x"] + box["width"] * 0.95, box["y"] + box["height"] * 0.55)
    assert "row 3, column 7 of ct, slice 2" in firefox.run(said)
