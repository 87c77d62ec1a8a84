"""MR and other values that are not HU: one mapping, whatever the numbers; ``--modality``."""

import json

import numpy as np
import pytest
from PIL import Image

from nnunetv2_meddinov3.curate.cli import main
from nnunetv2_meddinov3.curate.leakage import build_guard
from nnunetv2_meddinov3.curate.modalities import MODALITIES
from nnunetv2_meddinov3.curate.pipeline import curate
from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.store.fingerprints import as_numbers, bit_distances
from nnunetv2_meddinov3.store.index import read_records
from nnunetv2_meddinov3.store.reader import SliceStore
from nnunetv2_meddinov3.store.verify import verify


def make_mr(seed=0, slices=5, size=48):
    """A head in noise, 0 to about 250."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    tissue = 90 + 50 * np.sin(x * generator.uniform(3, 8)) * np.cos(y * generator.uniform(3, 8))
    inside = (x / 0.8) ** 2 + (y / 0.7) ** 2 < 1
    array = np.where(inside, tissue, 3) + np.abs(generator.normal(0, 6, (slices, size, size)))
    return array.clip(0, 255)


def uint8(array):
    return np.rint(array).astype(np.uint8)


LOOKS = {
    "8 bits": uint8,
    "whole numbers": lambda a: np.rint(a * 20).astype(np.int16),
    "beyond int16": lambda a: np.rint(a * 200).astype(np.int32),
    "fractions": lambda a: (a / 250).astype(np.float32),
    "large fractions": lambda a: (a * 2500.7).astype(np.float32),
}


@pytest.fixture
def volumes(tmp_path, write_image):
    """The same head with all kinds of numbers, and a name for each."""
    for number, change in enumerate(LOOKS.values()):
        write_image(tmp_path / f"mr/v{number}.nii.gz", change(make_mr()))
    return tmp_path / "mr"


def record_of(store):
    (record,) = read_records(store)
    return record


def test_every_kind_of_numbers_takes_the_same_road(volumes, tmp_path):
    assert curate([volumes], tmp_path / "s", modality="MR").entered == len(LOOKS)
    records = list(read_records(tmp_path / "s"))
    assert {r.modality for r in records} == {"MR"}
    assert not any(r.windowed for r in records)
    ends = {(r.intensity["stored_low"], r.intensity["stored_high"]) for r in records}
    assert ends == {(0.0, 16384.0)}
    assert verify(tmp_path / "s") == []
    first = as_numbers([s.phash for s in records[0].slices])
    for record in records:  # 8 bits and fractions of one image are near duplicates
        for mine, theirs in zip(as_numbers([s.phash for s in record.slices]), first, strict=True):
            assert bit_distances(mine, np.array([theirs]))[0] <= 4
        assert record.slices[0].hu_mean == pytest.approx(records[0].slices[0].hu_mean, abs=100)


@pytest.mark.parametrize("look", LOOKS)
def test_a_record_gives_the_values_back(look, tmp_path, write_image):
    values = LOOKS[look](make_mr())
    write_image(tmp_path / "mr/v.nii.gz", values)
    curate([tmp_path / "mr"], tmp_path / "s", modality="MR")
    facts, store = record_of(tmp_path / "s").intensity, SliceStore(tmp_path / "s")
    assert (facts["low_percentile"], facts["high_percentile"]) == (0.5, 99.5)
    for row in range(len(store)):
        image, record = store[row]
        back = image * facts["slope"] + facts["intercept"]
        error = np.abs(back - values[record["z"]]).max()
        assert error <= facts["slope"] * 0.5001, look
        assert store.ends(row) == (0.0, 16384.0)


@pytest.fixture
def raw(tmp_path, write_image):
    """A raw dataset of one 8-bit volume, whose channel is called MRI."""
    write_image(tmp_path / "Dataset001_Head/imagesTr/a_0000.nii.gz", uint8(make_mr()))
    facts = {"channel_names": {"0": "MRI"}, "labels": {"background": 0}, "file_ending": ".nii.gz"}
    (tmp_path / "Dataset001_Head/dataset.json").write_text(json.dumps(facts))
    return tmp_path / "Dataset001_Head"


def test_a_channel_name_makes_8_bits_mr_and_no_name_leaves_them_as_they_were(
    raw, tmp_path, write_image
):
    write_image(tmp_path / "plain/v.nii.gz", uint8(make_mr()))
    curate([raw], tmp_path / "named")
    curate([tmp_path / "plain"], tmp_path / "unnamed")
    named, unnamed = record_of(tmp_path / "named"), record_of(tmp_path / "unnamed")
    assert (named.modality, named.windowed) == ("MR", False)
    assert (unnamed.modality, unnamed.windowed) == ("unknown", True)
    assert unnamed.intensity == {
        "low": 0.0, "high": 255.0, "stored_low": 0.0, "stored_high": 255.0
    }  # fmt: skip
    assert np.array_equal(SliceStore(tmp_path / "unnamed").image(0), uint8(make_mr())[0])


@pytest.mark.parametrize("modality", [m for m in MODALITIES if m != "CT"])
def test_pictures_are_grey_until_a_modality_is_stated(tmp_path, modality):
    (tmp_path / "p").mkdir()
    Image.fromarray(uint8(make_mr()[0])).save(tmp_path / "p/a.png")
    curate([tmp_path / "p"], tmp_path / "grey")
    curate([tmp_path / "p"], tmp_path / "stated", modality=modality)
    assert record_of(tmp_path / "grey").windowed
    stated = record_of(tmp_path / "stated")
    assert (stated.modality, stated.windowed) == (modality, False)
    assert stated.intensity["stored_high"] == 16384


def test_pictures_stated_to_be_ct_stay_windowed(tmp_path):
    (tmp_path / "p").mkdir()
    Image.fromarray(uint8(make_mr()[0])).save(tmp_path / "p/a.png")
    curate([tmp_path / "p"], tmp_path / "s", modality="CT")
    record = record_of(tmp_path / "s")
    assert (record.modality, record.windowed) == ("CT", True)


@pytest.mark.parametrize("look", ["whole numbers", "fractions", "beyond int16"])
def test_values_outrank_a_stated_ct(look, tmp_path, write_image):
    write_image(tmp_path / "v/a.nii.gz", LOOKS[look](make_mr()))
    curate([tmp_path / "v"], tmp_path / "s", modality="CT")
    record = record_of(tmp_path / "s")
    assert record.modality == "unknown"
    assert any(note.startswith("said to be CT, but its values are no HU") for note in record.notes)


def test_a_ct_that_says_nothing_may_be_stated(tmp_path, make_ct, write_image):
    write_image(tmp_path / "v/inside.nii.gz", make_ct(5, 60)[:, 20:40, 15:45])  # no air
    curate([tmp_path / "v"], tmp_path / "guessed")
    curate([tmp_path / "v"], tmp_path / "stated", modality="CT")
    assert record_of(tmp_path / "guessed").modality == "unknown"
    stated = record_of(tmp_path / "stated")
    assert (stated.modality, stated.intensity) == ("CT", None)


def test_what_a_volume_says_itself_is_kept_and_the_contradiction_is_said(
    tmp_path, make_ct, write_series, write_image, capsys
):
    write_series(tmp_path / "v/dicom", make_ct(4, 40))
    write_image(tmp_path / "v/plain.nii.gz", uint8(make_mr()))
    command = ["curate", str(tmp_path / "v"), "--store", str(tmp_path / "s"), "--modality", "MR"]
    assert main(command[1:]) == 0
    said = "note on 1 volume: --modality MR is not used, since the volume itself says CT"
    assert said in capsys.readouterr().out
    assert {r.modality for r in read_records(tmp_path / "s")} == {"CT", "MR"}


def test_hu_that_are_stated_to_be_mr_are_remarked(tmp_path, make_ct, write_image):
    write_image(tmp_path / "v/a.nii.gz", make_ct(4, 40))
    curate([tmp_path / "v"], tmp_path / "s", modality="MR")
    record = record_of(tmp_path / "s")
    assert record.modality == "MR"
    assert "said to be MR, but its values look like HU" in record.notes


def test_another_modality_is_refused_before_anything_is_written(volumes, tmp_path):
    with pytest.raises(UserError, match=r"--modality must be one of CT \(.*got 'mr'"):
        main([str(volumes), "--store", str(tmp_path / "s"), "--modality", "mr"])
    assert not (tmp_path / "s").exists()


def test_a_modality_that_comes_too_late_is_said(volumes, tmp_path):
    curate([volumes], tmp_path / "s")
    summary = curate([volumes], tmp_path / "s", modality="MR")
    assert summary.present == len(LOOKS)
    assert "entered before as unknown, without --modality MR: use a new store" in str(summary)
    assert "entered before" not in str(curate([volumes], tmp_path / "s"))


@pytest.mark.parametrize("value", [0, -7, 0.5, np.nan])
def test_a_constant_volume_is_one_sentence(value, tmp_path, write_image):
    dtype = np.int16 if isinstance(value, int) else np.float32
    write_image(tmp_path / "v/a.nii.gz", np.full((4, 40, 40), value, dtype))
    summary = curate([tmp_path / "v"], tmp_path / "s", modality="MR")
    ((_, reason),) = summary.skipped
    assert "no contrast" in reason or "no slice is left (4 NaN or infinity)" in reason


def test_slices_with_nan_are_left_out_and_the_others_enter(tmp_path, write_image):
    array = make_mr().astype(np.float32)
    array[2, 5, 5] = np.nan
    write_image(tmp_path / "v/a.nii.gz", array)
    curate([tmp_path / "v"], tmp_path / "s", modality="MR")
    record = record_of(tmp_path / "s")
    assert record.left_out == [(2, "NaN or infinity (1 pixel)")]
    assert len(record.slices) == 4


# the leakage guard


@pytest.mark.parametrize("theirs", LOOKS)
@pytest.mark.parametrize("stated", [True, False])
def test_a_test_volume_is_found_whatever_is_stated(theirs, stated, tmp_path, write_image):
    """Its copy says that it is MR, or does not, and so do the tests: both ways are compared."""
    values = LOOKS[theirs](make_mr())
    write_image(tmp_path / "tests/t.nii.gz", values)
    write_image(tmp_path / "mine/m.nii.gz", values[:, ::-1])
    modality = "MR" if stated else None
    summary = curate(
        [tmp_path / "mine"], tmp_path / "s", exclude=[tmp_path / "tests"], modality=modality
    )
    assert len(summary.excluded) == 1


@pytest.mark.parametrize("by_store", [False, True])
@pytest.mark.parametrize("tests_are_named", [False, True])
def test_a_copy_that_does_not_say_what_the_test_says_is_found(
    tests_are_named, by_store, raw, tmp_path, write_image
):
    write_image(tmp_path / "plain/v.nii.gz", uint8(make_mr()))
    tests, mine = (raw, tmp_path / "plain") if tests_are_named else (tmp_path / "plain", raw)
    if by_store:
        curate([tests], tmp_path / "tests")
        tests = tmp_path / "tests"
    assert len(curate([mine], tmp_path / "s", exclude=[tests]).excluded) == 1


@pytest.mark.parametrize("theirs", LOOKS)
def test_a_test_volume_with_other_numbers_only_looks_alike(theirs, tmp_path, write_image):
    write_image(tmp_path / "tests/t.nii.gz", LOOKS[theirs](make_mr()))
    mine = make_mr() * 3.3 + np.random.default_rng(3).normal(0, 4, make_mr().shape)
    write_image(tmp_path / "mine/m.nii.gz", mine.astype(np.float32))
    curate([tmp_path / "mine"], tmp_path / "s", exclude=[tmp_path / "tests"], modality="MR")
    flags = [s.flags for s in record_of(tmp_path / "s").slices]
    assert all("near_excluded" in each for each in flags)


def test_a_constant_volume_among_the_tests_stops_nothing(tmp_path, write_image):
    write_image(tmp_path / "tests/empty.nii.gz", np.full((4, 48, 48), -7, np.int16))
    write_image(tmp_path / "tests/t.nii.gz", uint8(make_mr()))
    assert len(build_guard([tmp_path / "tests"]).origins) == 10  # five slices in two ways


def test_the_hashes_of_a_store_of_before_still_find_whole_number_mr(tmp_path, write_image):
    """Such a store holds the numbers as they were, here written as a list."""
    from nnunetv2_meddinov3.store.fingerprints import slice_sha256

    values = LOOKS["whole numbers"](make_mr())
    (tmp_path / "tests.txt").write_text("\n".join(map(slice_sha256, values)))
    write_image(tmp_path / "mine/m.nii.gz", values)
    summary = curate(
        [tmp_path / "mine"], tmp_path / "s", exclude=[tmp_path / "tests.txt"], modality="MR"
    )
    assert len(summary.excluded) == 1
    assert len(build_guard([tmp_path / "tests.txt"]).origins) == len(values)


def test_mr_in_dicom_is_mapped_too(tmp_path, write_series):
    array = LOOKS["whole numbers"](make_mr())
    write_series(tmp_path / "v/dicom", array, modality="MR")
    curate([tmp_path / "v"], tmp_path / "s")
    record = record_of(tmp_path / "s")
    assert record.modality == "MR"
    assert record.intensity["stored_high"] == 16384
