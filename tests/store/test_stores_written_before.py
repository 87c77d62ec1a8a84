"""A store written before the index was built in batches is read, verified and managed as it was.

data/store_format_1 holds three volumes, of which two share a slice, a skip and a split.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from nnunetv2_meddinov3.store import layout
from nnunetv2_meddinov3.store.fingerprints import slice_sha256
from nnunetv2_meddinov3.store.index import build_index, read_records
from nnunetv2_meddinov3.store.manage import merge, split_by_patient
from nnunetv2_meddinov3.store.reader import SliceStore
from nnunetv2_meddinov3.store.verify import verify
from nnunetv2_meddinov3.store.writer import StoreWriter

WRITTEN = Path(__file__).parent / "data" / "store_format_1"
RECORDS_SHA256 = "5b29b3db3951d2a35e1a1221dc7a403dbb4b24af8a8c491036c2040de4213541"


@pytest.fixture
def old(tmp_path):
    """A copy that may be changed."""
    return shutil.copytree(WRITTEN, tmp_path / "old")


def manifest_without_hashes(folder):
    values = json.loads((folder / layout.MANIFEST).read_bytes())
    return {name: value for name, value in values.items() if not name.endswith("_sha256")}


@pytest.mark.parametrize("mapped", [True, False])
def test_it_opens_and_every_slice_is_the_one_of_its_row(old, mapped):
    if not mapped:
        (old / layout.MAPPED_INDEX).unlink()
    reader = SliceStore(old)
    assert (len(reader), reader.records_sha256) == (6, RECORDS_SHA256)
    assert reader.options["keep_flagged"] is False
    for index in range(6):
        image, row = reader[index]
        assert slice_sha256(image) == slice_sha256(reader.image(index)) == row["sha256"]
    found = {(row["source_key"], row["z"], row["spacing_y"]) for _, row in reader}
    ct = {("A/lower", 0, 0.7), ("A/lower", 1, 0.7), ("A/lower", 2, 0.7), ("B/upper", 3, 0.7)}
    assert found == ct | {("C/mr", 0, None), ("C/mr", 1, None)}


def test_it_is_intact(old):
    assert verify(old) == []


def test_an_index_built_anew_lists_the_same(stores, old):
    rows, manifest = SliceStore(old).rows, manifest_without_hashes(old)
    build_index(old)
    again = SliceStore(old)
    assert again.rows.schema.equals(rows.schema, check_metadata=True)
    assert again.rows.to_pylist() == rows.to_pylist()
    assert again.records_sha256 == RECORDS_SHA256
    notes = {"notes": {"gantry tilt N degrees": 1}}  # which manifests did not count
    assert manifest_without_hashes(old) == manifest | notes
    assert verify(old) == []
    assert stores.contents(old).keys() == stores.contents(WRITTEN).keys()


def test_it_is_continued_and_merged_with_a_new_store(stores, old, tmp_path):
    record, slices = stores.volume(9)
    new = stores.write(tmp_path / "new", [(record, slices)])
    merge([old, new], tmp_path / "merged")
    StoreWriter(old, stores.options).write_volume(record, slices)
    build_index(old)
    (stale,) = verify(old)
    assert f"{old / layout.SPLITS} is of an older index" in stale
    assert verify(tmp_path / "merged") == []
    assert list(read_records(old)) == list(read_records(tmp_path / "merged"))
    continued, merged = SliceStore(old), SliceStore(tmp_path / "merged")
    assert len(continued) == 10
    assert merged.rows.to_pylist() == continued.rows.to_pylist()
    np.testing.assert_array_equal(merged.image(9), continued.image(9))


def test_a_split_deals_as_it_did(old):
    data = (old / layout.SPLITS).read_bytes()
    (old / layout.SPLITS).unlink()
    split_by_patient(old, {"train": 0.5, "val": 0.5})
    assert (old / layout.SPLITS).read_bytes() == data
