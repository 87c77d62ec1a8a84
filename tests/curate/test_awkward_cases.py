"""The inputs of ../shared/cases, which came out wrong once; its README says what must come."""

import numpy as np
import pytest

from nnunetv2_meddinov3.curate.pipeline import curate
from nnunetv2_meddinov3.store.index import read_records
from nnunetv2_meddinov3.store.reader import SliceStore


@pytest.fixture
def cases(shared):
    folder = shared / "cases"
    if not folder.is_dir():
        pytest.skip("needs the inputs of ../shared/cases, which are not beside this checkout")
    return folder


def stored(store):
    """Return the slices of a store by volume, in order."""
    reader = SliceStore(store)
    volumes = {}
    for index in range(len(reader)):
        image, record = reader[index]
        volumes.setdefault(record["source_key"], []).append((record["z"], image))
    return {
        key: np.stack([image for _, image in sorted(slices, key=lambda each: each[0])])
        for key, slices in volumes.items()
    }


@pytest.mark.parametrize("name", ["mono1", "iop_noise", "sc_inside"])
def test_the_volume_is_the_expected_one(tmp_path, cases, name):
    assert curate([cases / "dicom" / name], tmp_path / "store").exit_code == 0
    (volume,) = stored(tmp_path / "store").values()
    np.testing.assert_array_equal(volume, np.load(cases / f"expected/{name}.npy"))
    (record,) = read_records(tmp_path / "store")
    assert record.modality == "CT"
    assert any("Z0000.dcm" in note for note in record.notes) == (name == "sc_inside")


@pytest.mark.parametrize("name", ["dicom/norescale", "Dataset101_Norm"])
def test_what_is_not_hu_is_of_unknown_values(tmp_path, cases, name):
    curate([cases / name], tmp_path / "store")
    (record,) = read_records(tmp_path / "store")
    assert record.modality == "unknown"
    assert len(np.unique(next(iter(stored(tmp_path / "store").values())))) > 100


def test_phases_are_two_volumes(tmp_path, cases):
    assert curate([cases / "dicom/phases"], tmp_path / "store").exit_code == 0
    starts = []
    for record in read_records(tmp_path / "store"):
        positions = [each.position_mm for each in record.slices]
        np.testing.assert_allclose(np.diff(positions), 2.0, atol=1e-6)
        starts.append(round(positions[0], 3))
    assert sorted(starts) == [100.0, 100.7]


def test_a_scout_is_refused(tmp_path, cases):
    summary = curate([cases / "dicom/scout_cor"], tmp_path / "store")
    assert summary.exit_code == 2
    assert "scout" in summary.skipped[0][1]


def test_of_chaos_the_ct_alone_enters(tmp_path, cases):
    summary = curate([cases / "chaos_layout"], tmp_path / "store")
    assert (summary.exit_code, summary.entered, summary.skipped) == (0, 1, [])
    (volume,) = stored(tmp_path / "store").values()
    assert len(volume) == 12
