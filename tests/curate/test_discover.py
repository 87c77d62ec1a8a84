import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

from nnunetv2_meddinov3.curate.discover import find_sources, named
from nnunetv2_meddinov3.curate.volume import VolumeSource
from nnunetv2_meddinov3.errors import UserError


def touch(path, content=b"x"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def make_dataset(folder, ending=".nii.gz", channels=("CT",), cases=("a", "b"), **more):
    names = {str(number): name for number, name in enumerate(channels)}
    content = {"channel_names": names, "labels": {"background": 0}, "file_ending": ending, **more}
    touch(folder / "dataset.json", json.dumps(content).encode())
    for case in cases:
        touch(folder / "labelsTr" / f"{case}{ending}")
        for channel in range(len(channels)):
            touch(folder / "imagesTr" / f"{case}_{channel:04d}{ending}")
    return folder


def keys(found):
    return [source.key for source in found]


@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".nrrd", ".mha", ".gipl", ".png", ".tif"])
def test_an_nnunet_dataset_gives_its_images_and_never_its_labels(tmp_path, ending):
    dataset = make_dataset(tmp_path / "Dataset007_X", ending, channels=("CT", "T1"))
    touch(dataset / "imagesTs" / f"c_0000{ending}")
    touch(dataset / "labelsTs" / f"c{ending}")
    found, refused = find_sources([dataset])
    assert refused == []
    images = [f"Tr/a_0000{ending}", f"Tr/a_0001{ending}", f"Tr/b_0000{ending}",
              f"Tr/b_0001{ending}", f"Ts/c_0000{ending}"]  # fmt: skip
    assert keys(found) == [f"Dataset007_X/images{name}" for name in images]
    assert [source.patient for source in found] == ["a", "a", "b", "b", "c"]
    assert [source.channel_name for source in found] == ["CT", "T1", "CT", "T1", "CT"]
    assert {source.dataset for source in found} == {"Dataset007_X"}
    assert {source.kind for source in found} == {"png" if ending in (".png", ".tif") else "file"}
    assert all(Path(path).is_absolute() for source in found for path in source.paths)


def test_a_part_of_a_dataset_has_the_keys_of_the_whole(tmp_path):
    dataset = make_dataset(tmp_path / "Dataset007_X")
    whole, _ = find_sources([dataset])
    part, refused = find_sources([dataset / "imagesTr"])
    assert part == whole
    assert refused == []
    raw, _ = find_sources([tmp_path])
    assert [source.dataset for source in raw] == ["Dataset007_X"] * 2
    (single,), _ = find_sources([dataset / "imagesTr" / "a_0000.nii.gz"])
    assert (single.key, single.patient, single.channel_name) == ("a_0000.nii.gz", "a", "CT")


def test_the_labels_of_a_dataset_are_refused_as_a_source(tmp_path):
    dataset = make_dataset(tmp_path / "Dataset007_X")
    found, refused = find_sources([dataset / "labelsTr"])
    assert found == []
    assert refused == [("Dataset007_X/labelsTr", "it holds labels, which are never read")]


def test_images_listed_in_dataset_json_are_found_where_they_lie(tmp_path):
    image = touch(tmp_path / "elsewhere" / "scan.nii.gz")
    entries = {"z": {"images": [str(image)], "label": "never/read.nii.gz"},
               "y": {"images": ["../elsewhere/none.nii.gz"]}}  # fmt: skip
    dataset = make_dataset(tmp_path / "Dataset008_Y", cases=(), dataset=entries)
    found, refused = find_sources([dataset])
    assert [(source.key, source.paths) for source in found] == [
        ("Dataset008_Y/z_0000.nii.gz", (str(image),))
    ]
    assert refused[0][0] == "Dataset008_Y/y_0000.nii.gz"
    assert "cannot be read" in refused[0][1]


def test_a_decathlon_task_gives_its_images_without_channel_numbers(tmp_path):
    task = tmp_path / "Task09_Spleen"
    touch(task / "dataset.json", json.dumps({"modality": {"0": "CT"}, "training": []}).encode())
    touch(task / "imagesTr" / "spleen_2.nii.gz")
    touch(task / "imagesTr" / "._spleen_2.nii.gz")
    touch(task / "labelsTr" / "spleen_2.nii.gz")
    (source,), refused = find_sources([task])
    assert (source.patient, source.channel_name) == ("spleen_2", "CT")
    assert refused == []


def test_wrongly_named_images_and_broken_dataset_files_are_reported(tmp_path):
    dataset = make_dataset(tmp_path / "D1")
    touch(dataset / "imagesTr" / "c.nii.gz")
    touch(tmp_path / "D2" / "dataset.json", b"{")
    touch(tmp_path / "D2" / "labelsTr" / "c.nii.gz")
    touch(tmp_path / "D2" / "imagesTr" / "d.nii.gz")
    found, refused = find_sources([dataset, tmp_path / "D2"])
    assert dict(refused) == {
        "D1/imagesTr/c.nii.gz": "its name is not CASE_0000.nii.gz, as nnU-Net wants",
        "D2/dataset.json": "it is not as nnU-Net wants it (Expecting property name enclosed in "
        "double quotes: line 1 column 2 (char 1))",
    }
    assert "D2/imagesTr/d.nii.gz" in keys(found)
    assert not any("labels" in key for key in keys(found))


LABEL_FOLDERS = """Ground, ground_truth, GroundTruth, gt, GT, Masks, mask, train_masks, seg, labels,
label, segmentations, Segmentation, MASKS_DICOM, LABELLED_DICOM, annotations, labelsTr, labelmap"""


@pytest.mark.parametrize("name", re.split(r",\s+", LABEL_FOLDERS))
def test_folders_of_labels_are_not_entered_whatever_their_format(tmp_path, name, write_dicom):
    touch(tmp_path / "in/1/ct.nii.gz")
    for label in ("liver_GT_000.png", "liver.nii.gz", "liver.jpg", "a.nrrd"):
        touch(tmp_path / "in/1" / name / label)
    write_dicom(tmp_path / "in/1" / name / "liver.dcm", np.zeros((4, 5), dtype=np.int16))
    found, refused = find_sources([tmp_path / "in"])
    assert (keys(found), refused) == (["in/1/ct.nii.gz"], [])
    found, refused = find_sources([tmp_path / "in/1" / name])
    assert (found, refused) == ([], [(name, "it holds labels, which are never read")])
    found, refused = find_sources([tmp_path / "in/1" / name / "a.nrrd"])
    assert (found, refused) == ([], [("a.nrrd", "it holds labels, which are never read")])


@pytest.mark.parametrize(
    "name", ["unlabelled", "no_masks", "images_and_masks", "ground_floor", "segmented", "grounds"]
)
def test_folders_that_only_sound_like_labels_are_entered(tmp_path, name):
    touch(tmp_path / "in" / name / "ct.nii.gz")
    found, _ = find_sources([tmp_path / "in"])
    assert keys(found) == [f"in/{name}/ct.nii.gz"]


@pytest.mark.parametrize(
    ("image", "labels"),
    [
        ("a.nii.gz", "a_seg.nii.gz"),
        ("a.nii.gz", "a-label.nrrd"),
        ("a_0000.nii.gz", "a_gt.nii.gz"),
        ("a.jpg", "a_mask.png"),
        ("a.mha", "a.segmentation.mha"),
    ],
)
def test_files_named_as_the_labels_of_an_image_beside_them_are_refused(tmp_path, image, labels):
    touch(tmp_path / "in" / labels)
    found, refused = find_sources([tmp_path / "in"])
    assert (keys(found), refused) == ([f"in/{labels}"], [])  # of nothing: its content decides
    touch(tmp_path / "in" / image)
    found, refused = find_sources([tmp_path / "in"])
    assert keys(found) == [f"in/{image}"]
    assert refused == [(f"in/{labels}", f"it is named as the labels of {image} beside it")]


def test_folders_are_walked_and_what_is_no_image_is_told_apart(tmp_path):
    folder = tmp_path / "scans"
    for name in ("p1/ct.nii.gz", "p2/ct.NII", "p2/x.nrrd", "y.mha", "z.mhd", "z.raw", "s.PNG"):
        touch(folder / name)
    for name in ("README.md", "LICENSE", "SHA256SUMS", "table.csv", ".hidden.nii"):
        touch(folder / name)
    touch(folder / "archive.zip")
    touch(folder / "lost.raw")
    touch(folder / "empty.nii.gz", b"")
    touch(folder / "noending", b"\0" * 200)
    touch(folder / "slice.dcm", b"\0" * 200)
    found, refused = find_sources([folder])
    expected = ["p1/ct.nii.gz", "p2/ct.NII", "p2/x.nrrd", "s.PNG", "y.mha", "z.mhd"]
    assert keys(found) == [f"scans/{name}" for name in expected]
    assert [source.patient for source in found] == ["p1/ct", "p2/ct", "p2/x", "s", "y", "z"]
    assert {source.dataset for source in found} == {"scans"}
    assert dict(refused) == {
        "scans/archive.zip": "its ending .zip is not known",
        "scans/empty.nii.gz": "the file is empty",
        "scans/lost.raw": "its ending .raw is not known",
        "scans/noending": "its ending (none) is not known",
        "scans/slice.dcm": "it is not a DICOM file",
    }


def test_loops_broken_links_and_pipes_are_reported_and_doubles_entered_once(tmp_path):
    folder = tmp_path / "in"
    touch(folder / "a" / "ct.nii")
    (folder / "a" / "back").symlink_to(folder)
    (folder / "again").symlink_to(folder / "a")
    (folder / "nothing.nii").symlink_to(folder / "gone.nii")
    os.mkfifo(folder / "pipe.nii")
    (folder / "linked.nii").symlink_to(folder / "a" / "ct.nii")
    found, refused = find_sources([folder, folder / "a" / "ct.nii"])
    assert keys(found) == ["in/a/ct.nii"]
    assert dict(refused) == {
        "in/a/back": "it is a link to a folder that contains it",
        "in/nothing.nii": "it is a link to nothing",
        "in/pipe.nii": "it is not a regular file",
    }


def test_a_loop_inside_the_images_of_a_dataset_is_reported(tmp_path):
    dataset = make_dataset(tmp_path / "D1")
    (dataset / "imagesTr" / "back").symlink_to(dataset)
    found, refused = find_sources([dataset])
    assert len(found) == 2
    assert refused == [("D1/imagesTr/back", "it is a link to a folder that contains it")]


def test_a_folder_that_cannot_be_read_is_reported_and_the_others_are_walked(tmp_path, monkeypatch):
    touch(tmp_path / "in" / "closed" / "a.nii")
    touch(tmp_path / "in" / "open" / "b.nii")
    listed = Path.iterdir

    def iterdir(self):  # root may read everything, so permissions cannot be used here
        if self.name == "closed":
            raise PermissionError(13, "Permission denied")
        return listed(self)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    found, refused = find_sources([tmp_path / "in"])
    assert keys(found) == ["in/open/b.nii"]
    assert refused == [("in/closed", "the folder cannot be read (Permission denied)")]


def test_sources_are_sorted_and_do_not_depend_on_the_order_of_arguments(tmp_path, write_dicom):
    touch(tmp_path / "b" / "1.nii")
    touch(tmp_path / "a" / "2.nii")
    write_dicom(tmp_path / "a" / "s" / "7.dcm", np.zeros((4, 5), dtype=np.int16))
    forward, _ = find_sources([tmp_path / "a", tmp_path / "b"])
    backward, _ = find_sources([tmp_path / "b", tmp_path / "a"])
    assert forward == backward
    assert keys(forward) == ["a/2.nii", "a/s#1.2.3.4", "b/1.nii"]


def test_names_that_are_no_unicode_are_escaped_in_keys_and_still_opened(tmp_path):
    folder = os.fsencode(tmp_path / "in")
    (tmp_path / "in").mkdir()
    for name in (b"caf\xe9.nii", b"\xe9.zip"):
        touch(Path(os.fsdecode(folder + b"/" + name)))
    (source,), refused = find_sources([tmp_path / "in"])
    assert (source.key, source.patient) == ("in/caf\\udce9.nii", "caf\\udce9")
    assert Path(source.paths[0]).is_file()
    assert refused == [("in/\\udce9.zip", "its ending .zip is not known")]


def test_a_single_dicom_file_is_a_series(tmp_path, write_dicom):
    path = write_dicom(tmp_path / "7", np.zeros((4, 5), dtype=np.int16))
    (source,), refused = find_sources([path])
    assert (source.key, source.kind, source.paths) == ("7#1.2.3.4", "dicom", (str(path),))
    assert refused == []


def test_two_patients_under_one_uid_are_not_mixed(tmp_path, write_dicom):
    pixels = np.zeros((4, 5), dtype=np.int16)
    for name, patient in (("1", "x"), ("2", "y")):
        write_dicom(tmp_path / "in" / f"{name}.dcm", pixels, t0010_0020=patient)
    found, refused = find_sources([tmp_path / "in"])
    assert [len(source.paths) for source in found] == [1, 1]
    assert found[0].key == "in#1.2.3.4"
    assert re.fullmatch(r"in#1\.2\.3\.4\+[0-9a-f]{8}", found[1].key)
    assert found[0].patient != found[1].patient
    assert refused == []


def test_missing_sources_and_two_of_one_name_are_mistakes_of_the_user(tmp_path):
    with pytest.raises(UserError, match=r"none.nii does not exist"):
        find_sources([tmp_path / "none.nii"])
    for name in ("x", "y"):
        touch(tmp_path / name / "images" / "a.nii")
    with pytest.raises(UserError, match="must have different names"):
        find_sources([tmp_path / "x" / "images", tmp_path / "y" / "images"])
    same, _ = find_sources([tmp_path / "x", tmp_path / "x" / ".." / "x"])
    assert keys(same) == ["x/images/a.nii"]


@pytest.mark.parametrize("labels", [None, [], {"liver": "one"}, {"liver": {"value": 1}}])
def test_labels_may_be_anything_because_they_are_never_read(tmp_path, labels):
    dataset = make_dataset(tmp_path / "D1", labels=labels)
    found, refused = find_sources([dataset])
    assert keys(found) == ["D1/imagesTr/a_0000.nii.gz", "D1/imagesTr/b_0000.nii.gz"]
    assert refused == []


@pytest.mark.parametrize("content", [b"[]", b'{"name": "a table"}', b'"text"'])
def test_a_dataset_json_that_is_not_about_images_makes_no_dataset(tmp_path, content):
    touch(tmp_path / "in" / "dataset.json", content)
    touch(tmp_path / "in" / "imagesTr" / "c.nii.gz")
    found, refused = find_sources([tmp_path / "in"])
    assert keys(found) == ["in/imagesTr/c.nii.gz"]
    assert refused == []


def test_a_linked_dataset_has_the_name_of_its_link(tmp_path):
    make_dataset(tmp_path / "elsewhere" / "D1")
    (tmp_path / "Dataset001_Mine").symlink_to(tmp_path / "elsewhere" / "D1")
    found, _ = find_sources([tmp_path / "Dataset001_Mine"])
    assert {source.dataset for source in found} == {"Dataset001_Mine"}
    assert keys(found)[0] == "Dataset001_Mine/imagesTr/a_0000.nii.gz"


@pytest.mark.parametrize(
    ("keys", "names"),
    [
        (["a/chest.nii.gz", "b/chest.nrrd"], ["chest", "chest_"]),
        (["chest.dcm", "IM0001", "x/SCAN.IMA#7"], ["chest", "IM0001", "SCAN"]),
        (["1.2.840.7", "a/1.2.840.dcm"], ["1.2.840.7", "1.2.840"]),  # series are called by numbers
        (["a b/c d(1).mha", ".dcm"], ["c_d_1_", ".dcm"]),
    ],
)
def test_scans_are_called_by_their_files_without_the_ending(keys, names):
    sources = [VolumeSource(key, "file", (f"/{key}",), "", "") for key in keys]
    assert [name for name, _ in named(sources)] == names
