"""What a store says of patients and of the names of files."""

import hashlib
import hmac
import json
import re
import shutil

import numpy as np
import pytest

from nnunetv2_meddinov3.curate.pipeline import curate
from nnunetv2_meddinov3.curate.privacy import Names
from nnunetv2_meddinov3.curate.slices import SliceRules
from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.store import layout
from nnunetv2_meddinov3.store.index import read_records, read_skips
from nnunetv2_meddinov3.store.manage import export_npy, merge
from nnunetv2_meddinov3.store.reader import SliceStore
from nnunetv2_meddinov3.store.verify import verify
from nnunetv2_meddinov3.store.writer import StoreWriter

OF_P1 = hashlib.sha256(b"P1").hexdigest()[:16]  # as stores of before have it
KEY = bytes(range(32))


@pytest.fixture
def dicom(tmp_path, make_ct, write_series):
    """A folder of two series of one patient, P1."""
    for number in range(2):
        series = f"1.2.826.0.1.{number}"
        write_series(tmp_path / f"dicom/s{number}", make_ct(3, 24, seed=number), series=series)
    return tmp_path / "dicom"


def patients(store):
    return {record.patient for record in read_records(store)}


def test_a_patient_is_found_with_the_key_of_the_store_alone(tmp_path, dicom):
    curate([dicom], tmp_path / "a")
    curate([dicom], tmp_path / "b")
    (a,), (b,) = patients(tmp_path / "a"), patients(tmp_path / "b")
    assert len({a, b, OF_P1}) == 3
    key = layout.read_key(tmp_path / "a")
    assert len(key) == 32
    assert a == hmac.new(key, f"patient/{OF_P1}".encode(), "sha256").hexdigest()[:16]
    assert (tmp_path / "a" / layout.KEY).stat().st_mode & 0o077 == 0
    assert verify(tmp_path / "a") == []


def test_a_store_of_before_keeps_its_hashes(tmp_path, dicom, write_series, make_ct):
    StoreWriter(tmp_path / "s", SliceRules().options(), keyed=False)
    assert "keyed" not in json.loads((tmp_path / "s" / layout.STORE).read_bytes())
    curate([dicom], tmp_path / "s")
    write_series(dicom / "s2", make_ct(3, 24, seed=2), series="1.2.826.0.1.2")
    summary = curate([dicom], tmp_path / "s")
    assert (summary.entered, summary.present) == (1, 2)
    assert patients(tmp_path / "s") == {OF_P1}
    assert not (tmp_path / "s" / layout.KEY).exists()


def test_shards_and_later_runs_share_the_key(tmp_path, dicom, write_series, make_ct):
    for part in range(3):
        curate([dicom], tmp_path / "s", shard=(part, 3))
    write_series(dicom / "s2", make_ct(3, 24, seed=2), series="1.2.826.0.1.2")
    summary = curate([dicom], tmp_path / "s")
    assert (summary.entered, summary.present) == (1, 2)
    assert len(patients(tmp_path / "s")) == 1


def test_a_key_that_was_lost_is_not_replaced(tmp_path, dicom):
    curate([dicom], tmp_path / "s")
    key = (tmp_path / "s" / layout.KEY).read_bytes()
    (tmp_path / "s" / layout.KEY).write_bytes(key.replace(b"key", b"kex", 1))
    assert any("store.key" in sentence for sentence in verify(tmp_path / "s"))
    (tmp_path / "s" / layout.KEY).unlink()
    assert verify(tmp_path / "s") == []  # a copy for readers
    assert len(SliceStore(tmp_path / "s")) == 6
    with pytest.raises(UserError, match=r"store.key is missing: copy it from where"):
        curate([dicom], tmp_path / "s")


def test_a_key_that_lies_in_an_empty_folder_is_taken(tmp_path, dicom):
    curate([dicom], tmp_path / "a")
    (tmp_path / "b").mkdir()
    shutil.copy(tmp_path / "a" / layout.KEY, tmp_path / "b")
    curate([dicom], tmp_path / "b")
    assert patients(tmp_path / "a") == patients(tmp_path / "b")


def test_the_key_leaves_a_store_only_where_it_is_asked_for(tmp_path, dicom):
    curate([dicom], tmp_path / "a")
    key = layout.read_key(tmp_path / "a")
    merge([tmp_path / "a"], tmp_path / "m")
    assert layout.read_key(tmp_path / "m") not in (None, key)
    merge([tmp_path / "a"], tmp_path / "k", with_key=True)
    assert layout.read_key(tmp_path / "k") == key
    export_npy(tmp_path / "a", tmp_path / "e")
    files = [path for path in (tmp_path / "e").rglob("*") if path.is_file()]
    assert layout.KEY not in {path.name for path in files}
    assert not any(key.hex().encode() in path.read_bytes() for path in files)
    curate([dicom], tmp_path / "b")
    with pytest.raises(UserError, match=r"must have one and the same, but .* different ones"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "n", with_key=True)
    assert not (tmp_path / "n").exists()


def test_stores_without_a_key_merge_to_one_without(tmp_path):
    for name in "ab":
        StoreWriter(tmp_path / name, {}, keyed=False)
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "m")
    assert layout.read_key(tmp_path / "m") is None
    with pytest.raises(UserError, match="have none: leave out --with-key"):
        merge([tmp_path / "a"], tmp_path / "n", with_key=True)


SECRETS = ("Doe", "47110815", "hospital", "Smith", "tests_of", "1.2.826")


def everything_said(store):
    """All text of a store, with the rows of its index; without the pictures' base64."""
    files = [*store.rglob("*.json"), store / layout.REPORT]
    rows = str(SliceStore(store).rows.to_pylist())
    said = "\n".join([*(path.read_text(encoding="utf-8") for path in files), rows])
    return re.sub(r"base64,[A-Za-z0-9+/=]+", "", said)


@pytest.fixture
def named(tmp_path, make_ct, write_image, write_series):
    """Sources whose names are those of people, one of them broken, one to be excluded."""
    folder = tmp_path / "hospital"
    write_image(folder / "JohnDoe_47110815" / "ct.nii.gz", make_ct(3, 24, seed=0))
    write_image(folder / "Smith.nrrd", make_ct(3, 24, seed=1))
    write_series(folder / "JaneDoe", make_ct(3, 24, seed=2))
    (folder / "JohnDoe_47110815" / "Doe.nii.gz").write_bytes(b"no image")
    (folder / "Smith.xyz").write_bytes(b"what")
    (folder / "Doe.nii.gz").symlink_to(tmp_path / "nowhere")
    write_image(tmp_path / "tests_of_Smith" / "t.nii.gz", make_ct(3, 24, seed=1))
    return folder


@pytest.mark.slow
def test_hidden_names_are_nowhere_in_the_store_and_stay_the_same(tmp_path, named):
    tests, store = tmp_path / "tests_of_Smith", tmp_path / "s"
    summary = curate([named], store, hide_paths=True, exclude=[tests])
    assert (summary.entered, len(summary.excluded), len(summary.skipped)) == (2, 1, 3)
    assert any("JohnDoe_47110815" in key for key, _ in summary.skipped)  # who runs it may know
    said = everything_said(store)
    assert [secret for secret in SECRETS if secret in said] == []
    assert len(read_skips(store)) == 4
    again = curate([named], store, hide_paths=True, exclude=[tests])
    assert (again.entered, again.present) == (0, 2)
    assert len(read_skips(store)) == 4
    assert verify(store) == []
    with pytest.raises(UserError, match="hide_paths was True and is now None"):
        curate([named], store, exclude=[tests])


def test_one_file_of_a_hidden_store_that_was_mended_enters_in_its_place(tmp_path, named, make_ct):
    store = tmp_path / "s"
    curate([named / "Smith.nrrd", named / "JohnDoe_47110815"], store, hide_paths=True)
    before = {record.source_key for record in read_records(store)}
    shutil.copy(named / "Smith.nrrd", named / "JohnDoe_47110815" / "x.nrrd")
    shutil.copy(named / "JohnDoe_47110815" / "ct.nii.gz", named / "JohnDoe_47110815" / "Doe.nii.gz")
    curate([named / "Smith.nrrd", named / "JohnDoe_47110815"], store, hide_paths=True)
    assert before < {record.source_key for record in read_records(store)}
    assert read_skips(store) == []


def test_a_store_of_plain_names_is_not_continued_with_hidden_ones(tmp_path, dicom):
    curate([dicom], tmp_path / "s")
    assert "hide_paths" not in layout.read_options(tmp_path / "s")
    with pytest.raises(UserError, match="hide_paths was None and is now True"):
        curate([dicom], tmp_path / "s", hide_paths=True)


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ("excluded: shares 3 slices with excluded", "slices with excluded"),
        ("cannot be read (OSError: '/data/John Doe/x.nii')", "John Doe"),
        ("it is beside /data/other/file.raw, which is empty", "other"),
        ("the file Smith is of Smith-2", "Smith"),
    ],
)
def test_names_in_reasons_become_hashes(text, secret):
    names = Names(KEY, True, ("excluded",))
    found = names.remark(text, "a/Smith.nii.gz#1.2.3")
    assert secret not in found
    assert found.split(" ")[0] == text.split(" ")[0]
    assert found == names.remark(text, "a/Smith.nii.gz#1.2.3")
    assert Names(KEY).remark(text, "a/Smith.nii.gz") == text


def test_numbers_in_notes_stay_where_a_file_has_the_same_name():
    names = Names(KEY, True)
    assert names.remark("slice thickness 5 mm", "a/5.nii.gz") == "slice thickness 5 mm"


def test_names_that_nnunet_asks_for_stay(tmp_path, make_ct, write_image):
    dataset = tmp_path / "Dataset042_Mine"
    write_image(dataset / "imagesTr" / "JohnDoe_0000.nii.gz", np.asarray(make_ct(3, 24)))
    (dataset / "dataset.json").write_text(
        '{"channel_names": {"0": "CT"}, "labels": {"background": 0}, "numTraining": 1,'
        ' "file_ending": ".nii.gz"}'
    )
    curate([dataset], tmp_path / "s", hide_paths=True)
    (record,) = read_records(tmp_path / "s")
    assert record.dataset == "Dataset042_Mine"
    assert "JohnDoe" not in everything_said(tmp_path / "s")
