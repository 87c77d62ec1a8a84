"""``meddinov3 segment``: nnU-Net's labels of any scan, without anything of nnU-Net's."""

import json
import math
import re

import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnunetv2_meddinov3 import cli
from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.prediction.uncertainty import entropy_share
from nnunetv2_meddinov3.segment import dicom_seg
from tests.segment.conftest import make_model

pytestmark = pytest.mark.filterwarnings("ignore:.*person name:UserWarning")


def segment(volume, model, out, *options):
    return cli.main(
        ["segment", str(volume), "--model", str(model), "-o", str(out), "-device", "cpu", *options]
    )


def stock(model, files, out, folds=(0,)):
    """Predict with nnU-Net's own predictor."""
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), folds)
    predictor.predict_from_files_sequential([[str(f) for f in files]], [str(out)], False, True)


def read(path):
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


def test_labels_are_those_of_nnunet_to_the_byte(model, scan, zip_of, tmp_path, capsys):
    file = scan(tmp_path / "chest.nii.gz")
    stock(model, [file], tmp_path / "stock")
    assert segment(file, model, tmp_path / "out") == 0
    expected = (tmp_path / "stock.nii.gz").read_bytes()
    assert (tmp_path / "out" / "chest.nii.gz").read_bytes() == expected
    assert len(np.unique(read(tmp_path / "stock.nii.gz"))) == 3
    assert json.loads((tmp_path / "out" / "labels.json").read_text()) == {"liver": 1, "spleen": 2}
    assert sitk.ReadImage(str(tmp_path / "out" / "chest_overlay.png")).GetSize()[0] > 900
    liver = (read(tmp_path / "stock.nii.gz") == 1).sum() * 1.9 * 1.9 * 4 / 1000
    assert f"chest: liver {liver:.4g} ml, spleen " in capsys.readouterr().out
    segment(file, zip_of(model, tmp_path / "m.zip"), tmp_path / "zipped", "--no-picture")
    assert (tmp_path / "zipped" / "chest.nii.gz").read_bytes() == expected
    assert not (tmp_path / "zipped" / "chest_overlay.png").exists()


OBLIQUE = (0.8, -0.6, 0.0, 0.6, 0.8, 0.0, 0.0, 0.0, 1.0)
SAGITTAL = (0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, -1.0, 0.0)


@pytest.mark.parametrize("direction", [None, OBLIQUE, SAGITTAL], ids=["LPS", "oblique", "turned"])
@pytest.mark.parametrize("ending", [".mha", ".nrrd", ".nii"])
def test_scans_in_other_formats_are_labelled_where_they_lie(
    ending, direction, model, scan, tmp_path
):
    file = scan(tmp_path / f"chest{ending}", direction=direction)
    same = scan(tmp_path / "same.nii.gz", direction=direction)
    stock(model, [same], tmp_path / "stock")
    assert segment(file, model, tmp_path / "out", "--no-picture") == 0
    ours, theirs = tmp_path / "out" / "chest.nii.gz", tmp_path / "stock.nii.gz"
    np.testing.assert_array_equal(read(ours), read(theirs))
    np.testing.assert_allclose(nibabel.load(ours).affine, nibabel.load(theirs).affine, atol=1e-4)


@pytest.fixture
def series(tmp_path, make_ct, write_series):
    folder = write_series(tmp_path / "dicom" / "s1", make_ct(3, 40), (4.0, 1.9, 1.9))
    for path in folder.iterdir():  # what a scanner writes besides
        dataset = pydicom.dcmread(path)
        dataset.FrameOfReferenceUID = "1.2.826.0.1.9"
        for word in ("PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID"):
            setattr(dataset, word, "")
        dataset.StudyDate, dataset.StudyTime, dataset.PatientName = "20260101", "120000", "A^B"
        dataset.Manufacturer = dataset.ReferringPhysicianName = ""
        dataset.save_as(path)
    return folder


def test_dicom_becomes_nifti_and_dicom_seg(series, model, scan, tmp_path):
    import highdicom

    stock(model, [scan(tmp_path / "same.nii.gz")], tmp_path / "stock")
    assert segment(series.parent, model, tmp_path / "out", "--dicom-seg", "--uncertainty") == 0
    labels = read(tmp_path / "out" / "s1.nii.gz")
    np.testing.assert_array_equal(labels, read(tmp_path / "stock.nii.gz"))
    assert read(tmp_path / "out" / "s1_uncertainty.nii.gz").shape == labels.shape
    found = highdicom.seg.segread(tmp_path / "out" / "s1.dcm")
    assert [item.SegmentLabel for item in found.SegmentSequence] == ["liver", "spleen"]
    files = [pydicom.dcmread(path) for path in series.iterdir()]
    files.sort(key=lambda dataset: float(dataset.ImagePositionPatient[2]))
    frames = found.get_pixels_by_source_instance(
        [dataset.SOPInstanceUID for dataset in files],
        combine_segments=True,
        assert_missing_frames_are_empty=True,
    )
    np.testing.assert_array_equal(frames, labels)
    assert found.PatientID == "P1"


@pytest.fixture
def multi_frame(series, tmp_path):
    """The series as one file of frames, in another order than the slices."""
    import highdicom

    files = [pydicom.dcmread(path) for path in series.iterdir()]
    files.sort(key=lambda dataset: float(dataset.ImagePositionPatient[2]))
    converted = highdicom.legacy.LegacyConvertedEnhancedCTImage(
        legacy_datasets=[files[i] for i in (1, 0, 2)],
        series_instance_uid=highdicom.UID(),
        series_number=2,
        sop_instance_uid=highdicom.UID(),
        instance_number=1,
    )
    path = tmp_path / "enhanced" / "chest.dcm"
    path.parent.mkdir()
    converted.save_as(path)
    return path


def test_a_multi_frame_file_becomes_nifti_and_dicom_seg(multi_frame, model, scan, tmp_path):
    import highdicom

    stock(model, [scan(tmp_path / "same.nii.gz")], tmp_path / "stock")
    assert segment(multi_frame, model, tmp_path / "out", "--dicom-seg") == 0
    labels = read(tmp_path / "out" / "chest.nii.gz")
    np.testing.assert_array_equal(labels, read(tmp_path / "stock.nii.gz"))
    source, found = pydicom.dcmread(multi_frame), highdicom.seg.segread(tmp_path / "out/chest.dcm")
    heights = [
        float(group.PlanePositionSequence[0].ImagePositionPatient[2])
        for group in source.PerFrameFunctionalGroupsSequence
    ]
    frames = found.get_pixels_by_source_frame(
        source.SOPInstanceUID,
        [1 + heights.index(height) for height in sorted(heights)],
        combine_segments=True,
        assert_missing_frames_are_empty=True,
    )
    np.testing.assert_array_equal(frames, labels)
    assert len(np.unique(labels)) == 3


def test_regions_that_overlap_are_segments_that_overlap(series, tmp_path):
    import highdicom

    regions = {"background": 0, "whole": [1, 2], "core": [2]}
    model = make_model(tmp_path / "results", labels=regions, regions=[1, 2])
    assert segment(series.parent, model, tmp_path / "out", "--dicom-seg", "--uncertainty") == 0
    labels = read(tmp_path / "out" / "s1.nii.gz")
    found = highdicom.seg.segread(tmp_path / "out" / "s1.dcm")
    files = [pydicom.dcmread(path) for path in series.iterdir()]
    files.sort(key=lambda dataset: float(dataset.ImagePositionPatient[2]))
    frames = found.get_pixels_by_source_instance(
        [dataset.SOPInstanceUID for dataset in files], assert_missing_frames_are_empty=True
    )
    np.testing.assert_array_equal(frames[..., 0], labels > 0)
    np.testing.assert_array_equal(frames[..., 1], labels == 2)
    assert json.loads((tmp_path / "out" / "labels.json").read_text())["whole"] == [1, 2]
    doubts = read(tmp_path / "out" / "s1_uncertainty.nii.gz")
    assert 0 <= doubts.min() < doubts.max() <= 1


def test_a_series_that_dicom_seg_cannot_repeat_still_has_its_labels(
    series, model, tmp_path, capsys
):
    for path in series.iterdir():
        dataset = pydicom.dcmread(path)
        del dataset.FrameOfReferenceUID
        dataset.save_as(path)
    assert segment(series.parent, model, tmp_path / "out", "--dicom-seg") == 1
    assert (tmp_path / "out" / "s1.nii.gz").is_file()
    assert not (tmp_path / "out" / "s1.dcm").exists()
    assert "no DICOM SEG was made of dicom/s1" in capsys.readouterr().err


def test_uncertainty_is_the_entropy_of_mean_probabilities(scan, tmp_path):
    model = make_model(tmp_path / "results", folds=("0", "1"))
    # one tile, as planned: nothing is interpolated or averaged over tiles
    image = sitk.ReadImage(str(scan(tmp_path / "big.nii.gz", spacing=(1.5, 1.5, 4.0))))
    sitk.WriteImage(image[:32, :32], str(tmp_path / "one.nii.gz"))
    stock(model, [tmp_path / "one.nii.gz"], tmp_path / "stock", (0, 1))
    segment(tmp_path / "one.nii.gz", model, tmp_path / "out", "--uncertainty", "--no-picture")
    labels = tmp_path / "out" / "one.nii.gz"
    assert labels.read_bytes() == (tmp_path / "stock.nii.gz").read_bytes()

    array = read(tmp_path / "one.nii.gz").astype(np.float32)
    data = torch.from_numpy((array - array.mean()) / array.std())[:, None]
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), (0, 1))
    total = 0
    with torch.no_grad():
        for weights in predictor.list_of_parameters:
            predictor.network.load_state_dict(weights)
            predictor.network.eval()
            for axes in ((), (2,), (3,), (2, 3)):
                logits = predictor.network(torch.flip(data, axes))
                total = total + torch.flip(logits.softmax(1), axes)
    mean = (total / 8).numpy().astype(np.float64)
    expected = -(mean * np.log(mean + 1e-12)).sum(1) / math.log(3)
    found = read(tmp_path / "out" / "one_uncertainty.nii.gz")
    assert found.dtype == np.float32
    assert expected.std() > 0.05
    # probabilities are summed up in half precision, with small weights at the rim of a tile
    np.testing.assert_allclose(found, expected, atol=1e-2)
    assert np.abs(found - expected).mean() < 1e-3


def test_entropy_goes_from_sure_to_a_guess():
    sure, guess = torch.tensor([1.0, 0, 0]), torch.full((3,), 1 / 3)
    share = entropy_share(torch.stack([sure, guess], 1)[:, None], has_regions=False)
    np.testing.assert_allclose(share, [[0, 1]], atol=1e-6)
    regions = torch.tensor([[[1.0, 0.5, 0.5]], [[0.0, 0.5, 1.0]]])
    np.testing.assert_allclose(entropy_share(regions, has_regions=True), [[0, 1, 0.5]], atol=1e-6)


def test_a_folder_goes_on_where_it_was_stopped(model, scan, tmp_path, capsys):
    for number in range(3):
        scan(tmp_path / "scans" / f"c{number}_0000.nii.gz", number)
    out = tmp_path / "out"
    assert segment(tmp_path / "scans", model, out, "--no-picture") == 0
    (out / "c1.nii.gz").unlink()
    (out / "c1_overlay.png").write_bytes(b"")  # of a run that was killed before the labels
    kept = (out / "c0.nii.gz").stat().st_mtime_ns
    capsys.readouterr()
    assert segment(tmp_path / "scans", model, out, "--no-picture") == 0
    said = capsys.readouterr().out
    assert "2 of 3 were done before" in said
    assert [line[:3] for line in said.splitlines() if " ml" in line] == ["c1:"]
    assert (out / "c0.nii.gz").stat().st_mtime_ns == kept
    segment(tmp_path / "scans", model, out, "--no-picture", "--overwrite")
    assert (out / "c0.nii.gz").stat().st_mtime_ns > kept


@pytest.mark.parametrize("ending", [".nii.gz", ".mha"])
def test_a_scan_that_fails_does_not_stop_the_others(ending, model, scan, tmp_path, capsys):
    for number in range(3):
        scan(tmp_path / "scans" / f"c{number}{ending}", number)
    (tmp_path / "scans" / f"c1{ending}").write_bytes(b"torn")
    assert segment(tmp_path / "scans", model, tmp_path / "out", "--no-picture") == 1
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["c0.nii.gz", "c2.nii.gz", "labels.json"]
    (line,) = [s for s in capsys.readouterr().err.splitlines() if s.startswith("meddinov3:")]
    assert "c1" in line
    assert "--continue_prediction" not in line  # of another command


def test_several_channels_are_found_by_one_of_them(scan, tmp_path):
    model = make_model(tmp_path / "results", channels=("T1", "T2"))
    files = [scan(tmp_path / "mr" / f"a_000{n}.nii.gz", n) for n in (0, 1)]
    stock(model, files, tmp_path / "stock")
    for volume, out in ((files[0], "one"), (tmp_path / "mr", "folder")):
        assert segment(volume, model, tmp_path / out, "--no-picture") == 0
        expected = (tmp_path / "stock.nii.gz").read_bytes()
        assert (tmp_path / out / "a.nii.gz").read_bytes() == expected


def test_pictures_become_pictures(tmp_path, make_ct):
    model = make_model(tmp_path / "results", ending=".png", channels=("photo",))
    grey = np.clip(make_ct(1, 48)[0] // 8 + 128, 0, 255).astype(np.uint8)
    sitk.WriteImage(sitk.GetImageFromArray(grey), str(tmp_path / "a.png"))
    stock(model, [tmp_path / "a.png"], tmp_path / "stock")
    assert segment(tmp_path / "a.png", model, tmp_path / "out") == 0
    np.testing.assert_array_equal(read(tmp_path / "out" / "a.png"), read(tmp_path / "stock.png"))
    assert (tmp_path / "out" / "a_overlay.png").is_file()


def test_mr_for_a_model_of_ct_is_told(tmp_path, model, make_ct, write_series, capsys):
    write_series(tmp_path / "mr" / "s", np.abs(make_ct(3, 40)), (4.0, 1.9, 1.9), modality="MR")
    segment(tmp_path / "mr", model, tmp_path / "out", "--no-picture")
    assert "it is MR, but the model was trained on CT" in capsys.readouterr().err


def no_volume(tmp_path, model, scan):
    return [tmp_path / "nowhere", model], "VOLUME must be a file or folder"


def empty_folder(tmp_path, model, scan):
    (tmp_path / "empty").mkdir()
    return [tmp_path / "empty", model], "holds none"


def no_model(tmp_path, model, scan):
    return [scan(tmp_path / "a.nii.gz"), tmp_path / "nowhere"], "--model must be"


def model_is_a_text(tmp_path, model, scan):
    (tmp_path / "m.zip").write_text("text")
    return [scan(tmp_path / "a.nii.gz"), tmp_path / "m.zip"], "is neither"


def folder_without_a_model(tmp_path, model, scan):
    return [scan(tmp_path / "a.nii.gz"), tmp_path], "holds no plans.json"


def another_fold(tmp_path, model, scan):
    return [scan(tmp_path / "a.nii.gz"), model, "-f", "3"], "-f must name folds"


def another_checkpoint(tmp_path, model, scan):
    (model / "fold_0" / "checkpoint_final.pth").rename(model / "fold_0" / "checkpoint_best.pth")
    return [scan(tmp_path / "a.nii.gz"), model], "--checkpoint checkpoint_best.pth"


def another_configuration(tmp_path, model, scan):
    return [scan(tmp_path / "a.nii.gz"), model.parent, "-c", "3d"], "3d is none of"


def several_models(tmp_path, model, scan):
    other = model.with_name("MedDINOv3Trainer__nnUNetPlans__2d_64")
    other.mkdir()
    (other / "plans.json").write_text("{}")
    return [scan(tmp_path / "a.nii.gz"), model.parent], "say which with -c"


def dicom_seg_of_nifti(tmp_path, model, scan):
    return [scan(tmp_path / "a.nii.gz"), model, "--dicom-seg"], "needs DICOM series"


def trainer_of_strangers(tmp_path, model, scan):
    path = model / "fold_0" / "checkpoint_final.pth"
    content = torch.load(path, weights_only=False)
    torch.save({**content, "trainer_name": "TheirTrainer"}, path)
    return [scan(tmp_path / "a.nii.gz"), model], "a trainer that is installed here"


def weights_of_another_network(tmp_path, model, scan):
    path = model / "fold_0" / "checkpoint_final.pth"
    content = torch.load(path, weights_only=False)
    content["network_weights"].popitem()
    torch.save(content, path)
    return [scan(tmp_path / "a.nii.gz"), model], "must fit its plans"


def another_file_of_torch(tmp_path, model, scan):
    torch.save({"model": 1}, model / "fold_0" / "checkpoint_final.pth")
    return [scan(tmp_path / "a.nii.gz"), model], "must be a checkpoint of nnU-Net, but lacks"


def out_is_a_file(tmp_path, model, scan):
    (tmp_path / "out").write_text("")
    return [scan(tmp_path / "a.nii.gz"), model], "writ"


MISTAKES = [no_volume, empty_folder, no_model, model_is_a_text, folder_without_a_model]
MISTAKES += [another_fold, another_checkpoint, another_configuration, several_models]
MISTAKES += [dicom_seg_of_nifti, trainer_of_strangers, weights_of_another_network]
MISTAKES += [another_file_of_torch, out_is_a_file]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda f: f.__name__)
def test_mistakes_are_one_sentence_before_any_work(mistake, tmp_path, model, scan):
    (volume, given, *options), said = mistake(tmp_path, model, scan)
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        segment(volume, given, tmp_path / "out", *options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").is_dir()


@pytest.mark.parametrize("channels", [("T1", "T2"), ("T1", "T2", "FLAIR")])
def test_missing_channels_are_one_sentence(channels, tmp_path, model, scan):
    given = make_model(tmp_path / "more", channels=channels[:2])
    file = scan(tmp_path / "mr" / "a_0000.nii.gz")
    with pytest.raises(UserError, match="must have the channels 0000, 0001"):
        segment(file, given, tmp_path / "out")
    other = scan(tmp_path / "plain.nii.gz")
    with pytest.raises(UserError, match=r"needs 2 channels \(T1, T2\)"):
        segment(other, given, tmp_path / "out")


def test_without_highdicom_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "highdicom", None)
    with pytest.raises(UserError, match=r"pip install 'nnunetv2_meddinov3\[dicom\]'"):
        dicom_seg.check_highdicom()
