"""dataset.json as nnU-Net 2 and the Decathlon write it, and as it goes wrong."""

import json
import re

import pytest

from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.raw_dataset import foreground_labels, open_raw_dataset

NNUNET = {
    "channel_names": {"0": "CT", "1": "PET"},
    "labels": {"background": 0, "liver": 1, "tumour": 2},
    "numTraining": 2,
    "file_ending": ".nii.gz",
}
DECATHLON = {
    "name": "Liver",
    "modality": {"0": "CT"},
    "labels": {"0": "background", "1": "liver", "2": "cancer"},
    "training": [{"image": "./imagesTr/liver_0.nii.gz", "label": "./labelsTr/liver_0.nii.gz"}],
}


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "Dataset001_Liver"
    path.mkdir()
    return path


def opened(folder, content):
    (folder / "dataset.json").write_text(json.dumps(content), encoding="utf-8")
    return open_raw_dataset(folder)


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_a_dataset_of_nnunet_2_is_read(folder):
    dataset = opened(folder, NNUNET)
    assert dataset.name == "Dataset001_Liver"
    assert dataset.ending == ".nii.gz"
    assert dataset.channel_names == {0: "CT", 1: "PET"}
    assert dataset.labels == {"liver": (1,), "tumour": (2,)}
    assert (dataset.ignore, dataset.reader, dataset.entries) == (None, None, {})


def test_a_folder_may_be_given_as_text(folder):
    opened(folder, NNUNET)
    assert open_raw_dataset(str(folder)) == open_raw_dataset(folder)


def test_a_dataset_of_the_decathlon_is_read(folder):
    dataset = opened(folder, DECATHLON)
    assert dataset.channel_names == {0: "CT"}
    assert dataset.labels == {"liver": (1,), "cancer": (2,)}
    assert dataset.ending == ""


def test_regions_and_the_ignore_label_are_told_apart(folder):
    labels = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "rim": 1, "ignore": 4}
    dataset = opened(folder, {**NNUNET, "labels": labels, "regions_class_order": [1, 2, 3]})
    assert dataset.labels == {"whole": (1, 2, 3), "core": (2, 3), "rim": (1,)}
    assert list(dataset.labels) == ["whole", "core", "rim"]
    assert dataset.ignore == 4


@pytest.mark.parametrize("name", ["background", "Background", "BG", "air"])
@pytest.mark.parametrize("value", [0, [0], [0, 0]])
def test_the_background_is_what_has_the_value_0_whatever_its_name(name, value):
    assert foreground_labels({name: value, "a": 1}) == {"a": (1,)}


def test_only_the_name_ignore_ignores_as_in_nnunet(folder):
    labels = {"background": 0, "Ignored fat": 1, "Ignore": 2, "ignore": 3}
    dataset = opened(folder, {**NNUNET, "labels": labels})
    assert dataset.labels == {"Ignored fat": (1,), "Ignore": (2,)}
    assert dataset.ignore == 3


def test_foreground_labels_are_those_that_nnunet_trains():
    label_handling = pytest.importorskip("nnunetv2.utilities.label_handling.label_handling")
    labels = {"background": 0, "b": 2, "a": 1, "Background 2": 3, "ignore": 4}
    manager = label_handling.LabelManager(labels, None)
    assert sorted(v for (v,) in foreground_labels(labels).values()) == manager.foreground_labels
    regions = {"background": 0, "whole": [1, 2], "core": 2, "void": [0], "ignore": 3}
    manager = label_handling.LabelManager(regions, [1, 2])
    ours = [v if len(v) > 1 else v[0] for v in foreground_labels(regions).values()]
    assert ours == manager.foreground_regions


def test_values_written_as_text_are_numbers():
    # nnU-Net converts them; they are not the Decathlon's value -> name.
    assert foreground_labels({"background": "0", "liver": "1"}) == {"liver": (1,)}


def test_names_that_are_digits_are_names():
    assert foreground_labels({"background": 0, "7": 1}) == {"7": (1,)}


def test_images_are_found_by_case_and_channel_in_order(folder):
    dataset = opened(folder, {**NNUNET, "file_ending": ".png"})
    names = ("b_0001.png", "b_0000.png", "a-b_0000.png", "a_0000.png", "b.png", "b_0000.txt")
    touch(folder, *(f"imagesTr/{name}" for name in (*names, "a_0000_0000.png", "c_000.png")))
    found = dataset.images()
    assert list(found) == ["a", "a-b", "a_0000", "b"]
    assert {case: {c: p.name for c, p in files.items()} for case, files in found.items()} == {
        "a": {0: "a_0000.png"},
        "a-b": {0: "a-b_0000.png"},
        "a_0000": {0: "a_0000_0000.png"},
        "b": {0: "b_0000.png", 1: "b_0001.png"},
    }
    assert list(found["b"]) == [0, 1]


def test_the_dot_of_a_file_ending_is_a_dot(folder):
    touch(folder, "imagesTr/a_0000xnii.gz")
    assert opened(folder, NNUNET).images() == {}


def test_other_parts_and_other_folders_are_listed_too(folder, tmp_path):
    touch(folder, "imagesTs/t_0000.nii.gz")
    touch(tmp_path, "held_out/images/h_0000.nii.gz")
    dataset = opened(folder, NNUNET)
    assert dataset.images() == {}
    assert list(dataset.images("imagesTs")) == ["t"]
    assert dataset.images("imagesVal") == {}
    assert list(dataset.images_in(tmp_path / "held_out" / "images")) == ["h"]


def test_a_label_is_where_nnunet_expects_it(folder):
    dataset = opened(folder, NNUNET)
    assert dataset.label("a") == folder / "labelsTr" / "a.nii.gz"
    assert dataset.label("a", "labelsTs") == folder / "labelsTs" / "a.nii.gz"


def test_cases_that_dataset_json_lists_go_before_the_folder(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("DATA_OF_MINE", str(tmp_path / "elsewhere"))
    entries = {
        "b": {"images": ["imagesTr/b_0000.nii.gz"], "label": "labelsTr/b.nii.gz"},
        "a": {"images": ["$DATA_OF_MINE/a ct.nii.gz", "${DATA_OF_MINE}/a pet.nii.gz"]},
    }
    touch(folder, "imagesTr/other_0000.nii.gz", "imagesTs/t_0000.nii.gz")
    dataset = opened(folder, {**NNUNET, "dataset": entries})
    assert list(dataset.images()) == ["a", "b"]
    assert dataset.images()["a"] == {
        0: tmp_path / "elsewhere" / "a ct.nii.gz",
        1: tmp_path / "elsewhere" / "a pet.nii.gz",
    }
    assert dataset.images()["b"] == {0: folder / "imagesTr" / "b_0000.nii.gz"}
    assert dataset.label("b") == folder / "labelsTr" / "b.nii.gz"
    assert dataset.label("a") == folder / "labelsTr" / "a.nii.gz"  # not said
    assert dataset.label("b", "labelsTs") == folder / "labelsTs" / "b.nii.gz"
    assert list(dataset.images("imagesTs")) == ["t"]


def test_a_variable_that_is_not_set_stays_as_it_was_typed(folder, monkeypatch):
    monkeypatch.delenv("NOT_SET_AT_ALL", raising=False)
    entries = {"a": {"images": ["$NOT_SET_AT_ALL/a.nii.gz"], "label": None}}
    dataset = opened(folder, {**NNUNET, "dataset": entries})
    assert dataset.images()["a"][0] == folder / "$NOT_SET_AT_ALL" / "a.nii.gz"


def test_the_reader_that_dataset_json_asks_for_is_kept(folder):
    content = {**NNUNET, "overwrite_image_reader_writer": "NibabelIO"}
    assert opened(folder, content).reader == "NibabelIO"


def test_a_missing_dataset_json_is_named(folder):
    with pytest.raises(UserError, match=r"there is no .*Dataset001_Liver.dataset\.json"):
        open_raw_dataset(folder)


@pytest.mark.parametrize(
    "content", [b"{", b"", b"\xff\xfe\x00", b'{"channel_names": {"0": "CT"},}', b"NaN NaN"]
)
def test_broken_json_is_told_in_one_sentence(folder, content):
    (folder / "dataset.json").write_bytes(content)
    with pytest.raises(UserError, match=r"dataset\.json must be readable JSON: \S") as raised:
        open_raw_dataset(folder)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("content", [[], "text", None, 3, {}, {"labels": {"background": 0}}])
def test_json_of_another_kind_is_no_dataset(folder, content):
    with pytest.raises(UserError, match="lacks channel_names"):
        opened(folder, content)


@pytest.mark.parametrize(
    "wrong",
    [
        {"channel_names": ["CT"]},
        {"channel_names": {"first": "CT"}},
        {"channel_names": None},
        {"labels": ["background", "liver"]},
        {"labels": {"background": 0, "liver": "one"}},
        {"labels": {"background": 0, "liver": 1.5}},
        {"labels": {"background": 0, "liver": None}},
        {"labels": {"background": 0, "liver": {"value": 1}}},
        {"labels": {"background": 0, "whole": [1, [2]]}},
        {"file_ending": None},
        {"file_ending": 3},
        {"dataset": ["a"]},
        {"dataset": {"a": {"label": "a.nii.gz"}}},
        {"dataset": {"a": {"images": "imagesTr/a_0000.nii.gz"}}},
        {"dataset": {"a": {"images": [3]}}},
        {"dataset": {"a": "a_0000.nii.gz"}},
    ],
    ids=json.dumps,
)
def test_wrong_types_are_told_in_one_sentence(folder, wrong):
    with pytest.raises(UserError, match=re.escape(str(folder / "dataset.json"))) as raised:
        opened(folder, {**NNUNET, **wrong})
    assert "\n" not in str(raised.value)
    assert "must have" in str(raised.value)
