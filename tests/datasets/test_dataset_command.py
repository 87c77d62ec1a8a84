"""``meddinov3 dataset`` on miniature downloads in each official layout."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile

import nibabel as nib
import numpy as np
import pytest

from nnunetv2_meddinov3.cli import main
from nnunetv2_meddinov3.datasets import benchmarks
from nnunetv2_meddinov3.datasets.affines import Verdict, judge
from nnunetv2_meddinov3.datasets.convert import five_folds
from nnunetv2_meddinov3.errors import UserError

AFFINE = np.array([[-0.8, 0, 0, 100], [0, 0.8, 0, -90], [0, 0, 2.5, -600], [0, 0, 0, 1.0]])
AMOS_NAMES = [
    *("background", "spleen", "right kidney", "left kidney", "gall bladder", "esophagus", "liver"),
    *("stomach", "arota", "postcava", "pancreas", "right adrenal gland", "left adrenal gland"),
    *("duodenum", "bladder", "prostate/uterus"),
]


def volume(path, array, affine=AFFINE, dtype=np.int16):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(np.asarray(array, dtype), affine), path)


def pair(image, label, seed, top=2, affine=AFFINE, label_affine=None):
    rng = np.random.default_rng(seed)
    volume(image, rng.integers(-1000, 1000, (6, 5, 4)), affine)
    labels = rng.integers(0, top + 1, (6, 5, 4))
    volume(label, labels, affine if label_affine is None else label_affine, np.uint8)


def amos(folder):
    root = folder / "amos22"
    parts = {"Tr": [1, 4, 507], "Va": [8, 540], "Ts": [2, 600]}
    for part, numbers in parts.items():
        for n in numbers:
            image, label = (
                root / f"{k}{part}" / f"amos_{n:04d}.nii.gz" for k in ("images", "labels")
            )
            pair(image, label, n, top=15)
    for n in parts["Ts"]:
        (root / "labelsTs" / f"amos_{n:04d}.nii.gz").unlink()
    listed = {
        name: [{"image": f"./images{part}/amos_{n:04d}.nii.gz"} for n in parts[part]]
        for name, part in (("training", "Tr"), ("validation", "Va"), ("test", "Ts"))
    }
    labels = {str(value): name for value, name in enumerate(AMOS_NAMES)}
    (root / "dataset.json").write_text(json.dumps({"labels": labels, **listed}))


def btcv(folder):
    for n in (1, 2, 40):
        root = folder / "Abdomen" / "RawData" / "Training"
        pair(root / "img" / f"img{n:04d}.nii.gz", root / "label" / f"label{n:04d}.nii.gz", n, 13)
    volume(
        folder / "Abdomen" / "RawData" / "Testing" / "img" / "img0061.nii.gz", np.zeros((3, 3, 3))
    )


def kits23(folder):
    for n in (0, 299, 400):
        root = folder / "kits23" / "dataset" / f"case_{n:05d}"
        pair(root / "imaging.nii.gz", root / "segmentation.nii.gz", n, 3)
        volume(root / "instances" / "tumor_instance-1_annotation-1.nii.gz", np.zeros((6, 5, 4)))


def lits(folder):
    for n, batch in ((0, 1), (27, 1), (28, 2), (53, 2), (130, 2)):
        root = folder / f"Training Batch {batch}"
        own = np.diag([1.0, 1, 1, 1]) if n == 28 else AFFINE
        other = np.array(np.eye(4)) if n in (28, 53) else None
        pair(root / f"volume-{n}.nii", root / f"segmentation-{n}.nii", n, 2, own, other)


MAKERS = {"amos22": amos, "btcv": btcv, "kits23": kits23, "lits": lits}


@pytest.fixture
def download(tmp_path):
    """A function that makes a miniature download and returns its folder."""

    def make(name):
        folder = tmp_path / "download"
        MAKERS[name](folder)
        return folder

    return make


def convert(tmp_path, name, *more, folder=None):
    command = ["dataset", name, folder or tmp_path / "download", "-o", tmp_path / "raw", *more]
    assert main([str(part) for part in command]) == 0


def raw(tmp_path, name):
    folder = tmp_path / "raw" / name
    files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return files, json.loads((folder / "dataset.json").read_text(encoding="utf-8"))


def array(path):
    return np.asarray(nib.load(path).dataobj)


def test_amos22_is_ct_and_mr_with_its_names_put_right(download, tmp_path, capsys):
    download("amos22")
    convert(tmp_path, "amos22", "--partial")
    files, description = raw(tmp_path, "Dataset219_AMOS2022_postChallenge_task2")
    cases = ["amos_0001", "amos_0004", "amos_0008", "amos_0507", "amos_0540"]
    assert files == sorted(
        ["dataset.json", "splits_final.json"]
        + [f"imagesTr/{case}_0000.nii.gz" for case in cases]
        + [f"labelsTr/{case}.nii.gz" for case in cases]
    )
    assert description["labels"]["aorta"] == 8
    assert description["channel_names"] == {"0": "either_CT_or_MR"}
    said = capsys.readouterr().out
    assert "Licence: CC BY" in said
    assert "lacks 355 more of 360 labelled cases" in said


def test_amos22_can_be_ct_alone_and_have_its_test_images(download, tmp_path):
    download("amos22")
    convert(tmp_path, "amos22", "--partial", "--ct", "--with-test", "-d", 1218)
    files, description = raw(tmp_path, "Dataset1218_AMOS2022_postChallenge_task1")
    assert [f for f in files if f.startswith("images")] == [
        "imagesTr/amos_0001_0000.nii.gz",
        "imagesTr/amos_0004_0000.nii.gz",
        "imagesTr/amos_0008_0000.nii.gz",
        "imagesTs/amos_0002_0000.nii.gz",
    ]
    assert description["channel_names"] == {"0": "CT"}
    assert description["numTraining"] == 3


def test_btcv_has_thirty_labelled_cases_and_says_why(download, tmp_path, capsys):
    folder = download("btcv")
    with pytest.raises(UserError, match="lacks the image of btcv_0003, the image of btcv_0004"):
        convert(tmp_path, "btcv")
    convert(tmp_path, "btcv", "--partial")
    files, description = raw(tmp_path, "Dataset017_BTCV")
    assert [f for f in files if f.startswith("labels")] == [
        f"labelsTr/btcv_{n:04d}.nii.gz" for n in (1, 2, 40)
    ]
    assert description["labels"]["portal_and_splenic_veins"] == 10
    assert "The paper says 50 CT: 30 have published labels" in capsys.readouterr().out
    source = folder / "Abdomen" / "RawData" / "Training" / "label" / "label0040.nii.gz"
    there = tmp_path / "raw" / "Dataset017_BTCV" / "labelsTr" / "btcv_0040.nii.gz"
    np.testing.assert_array_equal(array(there), array(source))


def test_kits23_has_labels_as_the_paper_or_regions_as_the_challenge(download, tmp_path):
    download("kits23")
    convert(tmp_path, "kits23", "--partial")
    convert(tmp_path, "kits23", "--partial", "--regions")
    files, description = raw(tmp_path, "Dataset230_KiTS2023_labels")
    assert description["labels"] == {"background": 0, "kidney": 1, "tumor": 2, "cyst": 3}
    others, regions = raw(tmp_path, "Dataset220_KiTS2023")
    assert files == others
    assert regions["labels"]["masses"] == [2, 3]
    assert regions["regions_class_order"] == [1, 3, 2]


def test_identity_affines_of_lits_are_repaired_or_refused_by_the_rule(download, tmp_path, capsys):
    folder = download("lits")
    with pytest.raises(UserError, match=r"volume-28\.nii and its label have identity affines"):
        convert(tmp_path, "lits", "--partial")
    assert not (tmp_path / "raw" / "Dataset029_LiTS" / "dataset.json").exists()
    convert(tmp_path, "lits", "--partial", "--unknown-spacing", "skip")
    files, description = raw(tmp_path, "Dataset029_LiTS")
    assert description["numTraining"] == 4
    assert not any("028" in file for file in files)
    said = capsys.readouterr().out
    assert "The label got the affine of its image: lits_053." in said
    assert "left out: lits_028." in said
    here = tmp_path / "raw" / "Dataset029_LiTS"
    np.testing.assert_allclose(nib.load(here / "labelsTr" / "lits_053.nii.gz").affine, AFFINE)
    stored = array(folder / "Training Batch 2" / "volume-53.nii")
    np.testing.assert_array_equal(array(here / "imagesTr" / "lits_053_0000.nii.gz"), stored)


def test_a_spacing_that_is_not_stated_can_be_kept(download, tmp_path):
    download("lits")
    convert(tmp_path, "lits", "--partial", "--unknown-spacing", "keep")
    here = tmp_path / "raw" / "Dataset029_LiTS" / "imagesTr" / "lits_028_0000.nii.gz"
    np.testing.assert_allclose(nib.load(here).affine, np.eye(4))


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_archives_need_not_be_unpacked(download, tmp_path, name, kind):
    folder = download(name)
    more = ["--partial", "--unknown-spacing", "keep"]
    convert(tmp_path, name, *more)
    packed = tmp_path / "packed"
    packed.mkdir()
    pack(folder, packed / f"all.{kind}")
    there = tmp_path / "elsewhere"
    assert main(["dataset", name, str(packed), "-o", str(there), *more]) == 0
    for path in (tmp_path / "raw").rglob("*.nii.gz"):
        twin = there / path.relative_to(tmp_path / "raw")
        np.testing.assert_array_equal(array(path), array(twin))
    assert count(there) == count(tmp_path / "raw")


def pack(folder, archive):
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    names = [(path, path.relative_to(folder).as_posix()) for path in files]
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive, "w") as opened:
            for path, name in names:
                opened.write(path, name)
                opened.writestr(f"__MACOSX/{name}", b"of macOS")
        return
    with tarfile.open(archive, "w:gz") as opened:
        for path, name in names:
            opened.add(path, name)


def count(folder):
    return sum(1 for path in folder.rglob("*") if path.is_file())


NNUNETS = {
    "amos22": ("Dataset219_Amos2022_task2", "convert_amos_task2", "amos22", ()),
    "kits23": ("Dataset220_KiTS2023", "convert_kits2023", "kits23/dataset", ("--regions",)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NNUNETS)
def test_the_dataset_is_that_of_nnunets_own_converter(download, tmp_path, name):
    module, function, part, more = NNUNETS[name]
    folder = download(name)
    convert(tmp_path, name, "--partial", *more)
    code = f"from nnunetv2.dataset_conversion.{module} import {function}; "
    code += f"{function}({str(folder / part)!r})"
    theirs = tmp_path / "theirs"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=os.environ | {"nnUNet_raw": str(theirs)},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (other,) = theirs.iterdir()
    ours = tmp_path / "raw" / other.name
    assert ours.is_dir()
    expected = sorted(p.relative_to(other) for p in other.glob("*Tr/*.nii.gz"))
    assert sorted(p.relative_to(ours) for p in ours.glob("*Tr/*.nii.gz")) == expected
    for path in expected:
        np.testing.assert_array_equal(array(ours / path), array(other / path))
        np.testing.assert_allclose(nib.load(ours / path).affine, nib.load(other / path).affine)
    descriptions = [json.loads((d / "dataset.json").read_text()) for d in (ours, other)]
    for key in ("channel_names", "numTraining", "file_ending", "overwrite_image_reader_writer"):
        assert descriptions[0][key] == descriptions[1][key]
    assert list(descriptions[0]["labels"].values()) == list(descriptions[1]["labels"].values())
    assert descriptions[0].get("regions_class_order") == descriptions[1].get("regions_class_order")


def test_an_interrupted_conversion_goes_on(download, tmp_path):
    download("kits23")
    convert(tmp_path, "kits23", "--partial")
    here = tmp_path / "raw" / "Dataset230_KiTS2023_labels"
    kept = here / "imagesTr" / "case_00000_0000.nii.gz"
    before = kept.stat().st_mtime_ns
    (here / "dataset.json").unlink()
    (here / "labelsTr" / "case_00299.nii.gz").unlink()
    convert(tmp_path, "kits23", "--partial")
    assert kept.stat().st_mtime_ns == before
    assert (here / "labelsTr" / "case_00299.nii.gz").is_file()
    with pytest.raises(UserError, match="must not be a dataset already"):
        convert(tmp_path, "kits23", "--partial")


def missing_label(folder):
    (folder / "kits23" / "dataset" / "case_00299" / "segmentation.nii.gz").unlink()


def damaged(folder):
    path = folder / "kits23" / "dataset" / "case_00299" / "imaging.nii.gz"
    path.write_bytes(path.read_bytes()[:-40])


def no_nifti(folder):
    (folder / "kits23" / "dataset" / "case_00000" / "segmentation.nii.gz").write_text("<html>")


def misnamed(folder):
    (folder / "kits23" / "dataset" / "case_00299").rename(folder / "kits23" / "dataset" / "case299")


def other_values(folder):
    volume(
        folder / "kits23" / "dataset" / "case_00400" / "segmentation.nii.gz", np.full((6, 5, 4), 9)
    )


def other_shape(folder):
    volume(
        folder / "kits23" / "dataset" / "case_00400" / "segmentation.nii.gz", np.zeros((6, 5, 3))
    )


def fractions(folder):
    path = folder / "kits23" / "dataset" / "case_00400" / "segmentation.nii.gz"
    volume(path, np.full((6, 5, 4), 0.5), dtype=np.float32)


def flipped(folder):
    path = folder / "kits23" / "dataset" / "case_00400" / "segmentation.nii.gz"
    volume(path, np.zeros((6, 5, 4)), AFFINE * [[1, -1, 1, 1]])


def nothing(folder):
    shutil.rmtree(folder / "kits23")


# How the download is wrong -> what is said, whether --partial is given
WRONG = {
    missing_label: (r"lacks .*the image of case_00001", False),
    damaged: (r"case_00299/imaging\.nii\.gz must be a whole NIfTI file", True),
    no_nifti: (r"case_00000/segmentation\.nii\.gz must be a whole NIfTI file", True),
    misnamed: (r"must hold all 489 labelled cases .* lacks the image of", False),
    other_values: (r"must hold the values 0 to 3, but holds 9", True),
    other_shape: (r"has \(6, 5, 4\) and .* has \(6, 5, 3\) voxels", True),
    fractions: ("must be a label map of whole numbers", True),
    flipped: ("must lie in one place", True),
    nothing: (r"with images such as case_00001/imaging\.nii\.gz, but there is none", True),
}


@pytest.mark.parametrize("change", WRONG, ids=lambda change: change.__name__)
def test_a_wrong_download_gets_a_sentence_and_no_dataset(download, tmp_path, change):
    change(download("kits23"))
    words, partial = WRONG[change]
    with pytest.raises(UserError, match=words):
        convert(tmp_path, "kits23", *(["--partial"] if partial else []))
    assert not list(tmp_path.rglob("raw/*/dataset.json"))
    assert not list(tmp_path.rglob("*.part*"))


def test_several_wrong_cases_are_counted(download, tmp_path):
    folder = download("kits23")
    damaged(folder)
    other_values(folder)
    with pytest.raises(UserError, match=r"imaging\.nii\.gz must be .* Wrong cases in all: 2\."):
        convert(tmp_path, "kits23", "--partial")


def test_a_damaged_archive_is_named(download, tmp_path):
    folder = download("btcv")
    packed = tmp_path / "packed"
    packed.mkdir()
    pack(folder, packed / "RawData.zip")
    whole = (packed / "RawData.zip").read_bytes()
    (packed / "RawData.zip").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"RawData\.zip must be a whole archive"):
        convert(tmp_path, "btcv", folder=packed)


def test_another_dataset_with_the_layout_of_amos_is_refused(download, tmp_path):
    folder = download("amos22")
    path = folder / "amos22" / "dataset.json"
    content = json.loads(path.read_text())
    content["labels"]["3"] = "spine"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"value 3 must be left_kidney in AMOS22, .* says spine"):
        convert(tmp_path, "amos22", "--partial")


MISTAKES = [
    (("btcv", "--ct"), "--ct must go with amos22"),
    (("lits", "--regions"), "--regions must go with kits23"),
    (("btcv", "-d", "0"), "-d must be a number"),
]


@pytest.mark.parametrize(("given", "words"), MISTAKES)
def test_arguments_that_cannot_be_are_refused(tmp_path, given, words):
    name, *more = given
    with pytest.raises(UserError, match=words):
        convert(tmp_path, name, *more)


def test_the_place_of_raw_datasets_is_needed(tmp_path, monkeypatch):
    monkeypatch.delenv("nnUNet_raw", raising=False)
    with pytest.raises(UserError, match="nnUNet_raw must name the folder"):
        main(["dataset", "btcv", str(tmp_path)])


def test_counts_and_labels_are_those_of_the_benchmarks():
    counts = {
        b.name: (len(b.expected), b.count, len(b.labels) - 1)
        for b in (
            benchmarks.btcv(),
            benchmarks.kits23(),
            benchmarks.kits23("regions"),
            benchmarks.lits(),
        )
    }
    assert counts == {
        "BTCV": (30, 30, 13),
        "KiTS2023_labels": (489, 489, 3),
        "KiTS2023": (489, 489, 3),
        "LiTS": (131, 131, 2),
    }
    assert len(benchmarks.amos22().labels) == 16


def test_folds_are_nnunets_and_share_no_case():
    folds = five_folds([f"case_{n:05d}" for n in range(30)])
    assert [len(fold["val"]) for fold in folds] == [6] * 5
    assert sorted(case for fold in folds for case in fold["val"]) == [
        f"case_{n:05d}" for n in range(30)
    ]
    assert not any(set(fold["train"]) & set(fold["val"]) for fold in folds)


def moved(by):
    other = AFFINE.copy()
    other[:3, 3] += by
    return other


JUDGED = [
    (AFFINE, AFFINE, Verdict.AGREE),
    (AFFINE, moved(1e-3), Verdict.AGREE),
    (AFFINE, moved(40.0), Verdict.USE_IMAGE),
    (AFFINE, np.eye(4), Verdict.USE_IMAGE),
    (np.eye(4), AFFINE, Verdict.USE_LABEL),
    (np.eye(4), np.diag([-1.0, -1, 1, 1]), Verdict.UNKNOWN_SPACING),
    (AFFINE, AFFINE * [[1, 1, 2, 1]], Verdict.REFUSED),
    (AFFINE, AFFINE * [[1, 1, -1, 1]], Verdict.REFUSED),
]


@pytest.mark.parametrize(("image", "label", "verdict"), JUDGED)
def test_the_rule_on_affines(image, label, verdict):
    assert judge(image, label) is verdict
