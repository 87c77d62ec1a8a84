import gzip
import json
import os
import shutil
import signal

import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image

from nnunetv2_meddinov3.curate.pipeline import Summary, curate, in_shard
from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.progress import Progress
from nnunetv2_meddinov3.store.index import read_records, read_skips
from nnunetv2_meddinov3.store.reader import SliceStore
from nnunetv2_meddinov3.store.verify import verify


def contents(store):
    """Name -> bytes of everything but the report and the manifest."""
    names = [p for p in store.rglob("*") if p.is_file() and p.suffix in (".b2nd", ".parquet")]
    return {path.relative_to(store).as_posix(): path.read_bytes() for path in names}


def test_copies_in_other_formats_have_equal_slices_and_enter_once(
    tmp_path, make_ct, write_image, write_series
):
    array = make_ct(6, seed=3)
    path = write_image(tmp_path / "a" / "nifti.nii.gz", array)
    write_image(tmp_path / "a" / "cropped.nrrd", array[2:5], first_mm=4.0)
    write_series(tmp_path / "a" / "dicom", array)
    summary = curate([tmp_path / "a"], tmp_path / "store")
    assert (summary.entered, summary.slices, summary.exit_code) == (3, 15, 0)
    records = list(read_records(tmp_path / "store"))
    hashes = {
        record.source_key.split("#")[0]: [s.sha256 for s in record.slices] for record in records
    }
    assert hashes["a/nifti.nii.gz"] == hashes["a/dicom"]
    assert hashes["a/nifti.nii.gz"][2:5] == hashes["a/cropped.nrrd"]
    store = SliceStore(tmp_path / "store")
    assert len(store) == 6
    reference = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
    first = {"a/cropped.nrrd": 2}  # slice of the whole volume that is the copy's first
    listed = [store[i] for i in range(6)]
    assert sum(record["source_key"] == "a/cropped.nrrd" for _, record in listed) == 3
    for image, record in listed:
        z = record["z"] + first.get(record["source_key"], 0)
        np.testing.assert_array_equal(image, reference[z])


@pytest.mark.slow
def test_shards_together_equal_one_run(tmp_path, source):
    curate([source], tmp_path / "one")
    parts = [curate([source], tmp_path / "two", shard=(i, 3)) for i in (2, 0, 1)]
    assert sum(part.entered for part in parts) == 5
    assert max(part.entered for part in parts) < 5
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_key_falls_to_the_same_shard_for_ever():
    assert [in_shard("source/v0.nii.gz", (i, 4)) for i in range(4)] == [False, True, False, False]


@pytest.mark.slow
def test_a_second_run_adds_only_what_is_new_or_changed(tmp_path, source, make_ct, write_image):
    curate([source], tmp_path / "store")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "store" / "records").iterdir()}
    write_image(source / "v5.nii.gz", make_ct(4, 24, seed=5))
    write_image(source / "v0.nii.gz", make_ct(4, 24, seed=6))
    summary = curate([source], tmp_path / "store")
    assert (summary.entered, summary.present, summary.slices) == (2, 4, 8)
    after = {p: p.stat().st_mtime_ns for p in (tmp_path / "store" / "records").iterdir()}
    assert len(after) == 6
    assert sum(after[path] == before[path] for path in before) == 4
    assert len(SliceStore(tmp_path / "store")) == 24


def hostile(folder, kind, make_ct, write_image, write_series):
    """Writes one malformed input and returns the end of its key and a part of the reason."""
    path = folder / f"{kind}.nii.gz"
    array = make_ct(3, 24)
    if kind == "truncated gz":
        write_image(path, array)
        path.write_bytes(path.read_bytes()[:-200])
    elif kind == "no image":
        path.write_bytes(gzip.compress(b"nothing of an image" * 50))
    elif kind == "empty file":
        path.write_bytes(b"")
    elif kind == "4D":
        image = sitk.JoinSeries([sitk.GetImageFromArray(array)] * 2)
        sitk.WriteImage(image, str(path))
    elif kind == "huge declared size":
        raw = bytearray(gzip.decompress(write_image(path, array).read_bytes()))
        raw[42:48] = np.array([32000] * 3, "<i2").tobytes()
        path.write_bytes(gzip.compress(bytes(raw)))
    elif kind == "all NaN":
        write_image(path, np.full((2, 8, 8), np.nan, np.float32))
    elif kind == "all air":
        write_image(path, np.full((2, 8, 8), -1000, np.int16))
    elif kind == "directory loop":
        (folder / kind).mkdir()
        (folder / kind / "again").symlink_to(folder, target_is_directory=True)
        return
    elif kind == "non-CT DICOM":
        write_series(folder / kind, array, modality="SEG")
    elif kind == "unknown ending":
        (folder / f"{kind}.xyz").write_bytes(b"abc")
    elif kind == "truncated PNG":
        Image.fromarray(array[0].astype(np.uint8)).save(folder / f"{kind}.png")
        (folder / f"{kind}.png").write_bytes((folder / f"{kind}.png").read_bytes()[:60])


KINDS = [
    "truncated gz",
    "no image",
    "empty file",
    "4D",
    "huge declared size",
    "all NaN",
    "all air",
    "directory loop",
    "non-CT DICOM",
    "unknown ending",
    "truncated PNG",
]


def test_hostile_inputs_are_skipped_with_name_and_reason_and_the_store_is_intact(
    tmp_path, source, make_ct, write_image, write_series
):
    for kind in KINDS:
        hostile(source, kind, make_ct, write_image, write_series)
    summary = curate([source], tmp_path / "store")
    assert (summary.entered, summary.exit_code) == (5, 3)
    for kind in KINDS:
        reasons = [reason for key, reason in summary.skipped if kind in key]
        assert len(reasons) == 1, kind
        assert len(reasons[0]) > 10, kind
        assert str(tmp_path) not in reasons[0], kind
    assert len(summary.skipped) == len(KINDS)
    assert read_skips(tmp_path / "store") == sorted(summary.skipped)
    reasons = dict(summary.skipped)
    assert reasons["source/all air.nii.gz"] == "no slice is left (2 constant)"
    assert reasons["source/all NaN.nii.gz"] == "no slice is left (2 NaN or infinity)"
    assert verify(tmp_path / "store") == []
    assert len(SliceStore(tmp_path / "store")) == 20


@pytest.mark.slow
def test_a_skipped_source_that_was_fixed_enters(tmp_path, source, make_ct, write_image):
    (source / "v9.nii.gz").write_bytes(b"broken")
    assert curate([source], tmp_path / "store").exit_code == 3
    write_image(source / "v9.nii.gz", make_ct(4, 24, seed=9))
    summary = curate([source], tmp_path / "store")
    assert (summary.entered, summary.present, summary.exit_code) == (1, 5, 0)
    assert read_skips(tmp_path / "store") == []


@pytest.mark.slow
def test_a_signal_stops_between_volumes_and_the_next_run_continues(tmp_path, source, monkeypatch):
    advance = Progress.advance

    def interrupt(self, facts="", units=1):
        advance(self, facts, units)
        if self.done == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    handler = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(Progress, "advance", interrupt)
        summary = curate([source], tmp_path / "store")
    assert (summary.entered, summary.exit_code) == (2, 128 + signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is handler
    assert len(SliceStore(tmp_path / "store")) == 8
    summary = curate([source], tmp_path / "store")
    assert (summary.entered, summary.present, summary.exit_code) == (3, 2, 0)
    curate([source], tmp_path / "unbroken")
    assert contents(tmp_path / "store") == contents(tmp_path / "unbroken")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"workers": 0}, "number of workers must be at least 1, but is 0"),
        ({"shard": (4, 4)}, "i from 0 to n - 1, but is 4/4"),
        ({"size": 3}, "size must be from 16"),
        ({"exclude": ["nowhere"]}, "--exclude must name what exists"),
    ],
)
def test_mistakes_are_refused_before_anything_is_written(tmp_path, source, options, sentence):
    with pytest.raises(UserError, match=sentence):
        curate([source], tmp_path / "store", **options)
    assert not (tmp_path / "store").exists()


def test_a_folder_without_volumes_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="must hold volumes, but there is none in"):
        curate([tmp_path / "empty"], tmp_path / "store")


def test_a_store_is_not_continued_with_other_rules(tmp_path, source):
    curate([source], tmp_path / "store")
    with pytest.raises(UserError, match="min_gap_mm"):
        curate([source], tmp_path / "store", min_gap_mm=3.0)


def test_a_store_that_was_deleted_is_made_again(tmp_path, source):
    for _ in range(2):
        assert curate([source], tmp_path / "store").entered == 5
        shutil.rmtree(tmp_path / "store")


def test_a_summary_groups_skipped_sources_by_reason():
    skipped = [(f"k{i}", f"cannot be read (OSError: byte {i} of 'k{i}')") for i in range(25)]
    summary = Summary(skipped=[*skipped, ("a", "the file is empty"), ("b", "the file is empty")])
    assert summary.exit_code == 2
    assert str(summary).splitlines()[1:] == [
        "  skipped 25 sources: cannot be read (OSError: byte N of ...) (k0, k1, k2 and 22 more)",
        "  skipped 2 sources: the file is empty (a, b)",
    ]
    summary = Summary(entered=1, skipped=[("k", "it is 4D (2x3 voxels), not one volume")])
    assert str(summary).endswith("\n  skipped k: it is 4D (2x3 voxels), not one volume")


def test_a_summary_lists_some_of_many_reasons():
    summary = Summary(skipped=[(f"k{i}", "why " + "x" * i) for i in range(25)])
    assert str(summary).count("why") == 20
    assert "and 5 more for other reasons, which the report lists" in str(summary)


def test_exclusions_are_told_apart_from_failures(tmp_path, source, make_ct, write_image):
    tests = tmp_path / "tests"
    write_image(tests / "t.nii.gz", make_ct(4, 24, seed=0))
    write_image(tests / "u.nii.gz", make_ct(4, 24, seed=1))
    summary = curate([source], tmp_path / "s", exclude=[tests])
    assert (summary.entered, len(summary.excluded), summary.exit_code) == (3, 2, 0)
    said = str(summary)
    assert "2 excluded on request, 0 skipped." in said
    named = "(source/v0.nii.gz, source/v1.nii.gz)"
    assert f"  excluded 2 sources: shares 4 slices with tests {named}" in said
    page = (tmp_path / "s" / "report.html").read_text(encoding="utf-8")
    assert "sources that did not enter: 0, excluded on request: 2." in page
    everything = tmp_path / "all"
    shutil.copytree(source, everything)
    assert curate([source], tmp_path / "t", exclude=[everything]).exit_code == 0
    (source / "broken.nii.gz").write_bytes(b"")
    assert curate([source], tmp_path / "s", exclude=[tests]).exit_code == 3


def test_notes_are_counted_by_kind_in_summary_manifest_and_report(
    tmp_path, make_ct, write_image, write_dicom
):
    for number in range(3):
        array = make_ct(4, 24, seed=number)
        write_image(tmp_path / "a" / f"{number}.nii.gz", array.astype(np.float32) + np.float32(0.3))
        image = (array[0] + np.int16(number), (0.0, 0.0, 0.0))
        tags = {"t0020_000e": f"1.2.{number}", "t0018_0050": f"{number + 1}.5"}
        write_dicom(tmp_path / "a" / f"d{number}" / "x.dcm", *image, **tags)
    summary = curate([tmp_path / "a"], tmp_path / "s")
    assert summary.notes["values rounded to whole numbers"] == 3
    assert summary.notes["slice thickness N mm"] == 3
    assert "  note on 3 volumes: slice thickness N mm" in str(summary).splitlines()
    manifest = json.loads((tmp_path / "s" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["notes"] == dict(sorted(summary.notes.items()))
    page = (tmp_path / "s" / "report.html").read_text(encoding="utf-8")
    assert "<td>3</td><td>slice thickness N mm</td>" in page
    assert curate([tmp_path / "a"], tmp_path / "s").notes == {}  # of volumes that entered now
    assert verify(tmp_path / "s") == []


def test_a_pattern_names_the_patients(tmp_path, make_ct, write_image):
    for number in range(6):
        name = f"site/pat{number // 2}_scan{number % 2}.nii.gz"
        write_image(tmp_path / "a" / name, make_ct(3, 24, seed=number))
    store = tmp_path / "s"

    def patients():
        return [record.patient for record in read_records(store)]

    curate([tmp_path / "a"], store)
    assert patients()[:2] == ["site/pat0_scan0", "site/pat0_scan1"]
    arrays = {path: path.stat().st_mtime_ns for path in (store / "volumes").iterdir()}
    summary = curate([tmp_path / "a"], store, patients=r"pat(\d+)_")
    assert (summary.present, patients()) == (6, ["0", "0", "1", "1", "2", "2"])
    curate([tmp_path / "a"], store)  # without it, what the records say stays
    assert patients() == ["0", "0", "1", "1", "2", "2"]
    curate([tmp_path / "a"], store, patients=r"pat\d+")
    assert set(patients()) == {"pat0", "pat1", "pat2"}
    assert {path: path.stat().st_mtime_ns for path in (store / "volumes").iterdir()} == arrays
    assert verify(store) == []


@pytest.mark.parametrize(
    ("pattern", "sentence"),
    [
        ("v(", r"must be a regular expression, got 'v\('"),
        ("v[1-4]", r"'v\[1-4\]' does not match 'v0' \(source/v0.nii.gz\)"),
        ("(x)?v", "finds no patient in 'v0'"),
        ("x*", "finds no patient in 'v0'"),
    ],
)
def test_a_pattern_that_names_no_patient_is_refused(tmp_path, source, pattern, sentence):
    with pytest.raises(UserError, match=sentence):
        curate([source], tmp_path / "store", patients=pattern)
    assert not (tmp_path / "store").exists()


def test_dicom_keeps_the_patients_of_its_headers(tmp_path, make_ct, write_image, write_series):
    write_series(tmp_path / "a" / "dicom", make_ct(3, 24))
    with pytest.raises(UserError, match="all sources are DICOM"):
        curate([tmp_path / "a"], tmp_path / "s", patients="p")
    write_image(tmp_path / "a" / "p1.nii.gz", make_ct(3, 24, seed=1))
    assert curate([tmp_path / "a"], tmp_path / "s", patients="p.").exit_code == 0
    found = {r.source_key: r.patient for r in read_records(tmp_path / "s")}
    assert found.pop("a/p1.nii.gz") == "p1"
    assert len(next(iter(found.values()))) == 16
