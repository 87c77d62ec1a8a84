import io
import os
import shutil

import numpy as np
import pytest

from nnunetv2_meddinov3 import files
from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.store import codec, layout
from nnunetv2_meddinov3.store import verify as verify_module
from nnunetv2_meddinov3.store.index import build_index, read_records
from nnunetv2_meddinov3.store.manage import split_by_patient
from nnunetv2_meddinov3.store.verify import verify
from nnunetv2_meddinov3.store.writer import StoreWriter


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 0x10
    path.write_bytes(data)


def one_record(store):
    return list(read_records(store))[2]


def record_path(store, record):
    return store / layout.RECORDS / layout.record_name(record.source_key)


def only(sentences):
    assert len(sentences) == 1, sentences
    return sentences[0]


def test_a_whole_store_is_intact_and_is_not_changed(stores, store):
    split_by_patient(store, {"train": 0.5, "val": 0.5})
    (store / layout.REPORT).write_text("<html>")
    before = stores.contents(store)
    assert verify(store) == []
    assert stores.contents(store) == before


@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 0.5, 0.9, 0.999])
def test_a_flipped_byte_in_an_array_names_the_volume_and_its_source(store, share):
    record = one_record(store)
    path = store / layout.array_name(record.volume_id)
    flip(path, int(share * record.array_bytes))
    sentence = only(verify(store))
    assert record.volume_id in sentence
    assert record.source_key in sentence
    assert "checksum differs" in sentence


@pytest.mark.slow
def test_any_flipped_byte_of_any_file_is_found(store):
    split_by_patient(store, {"train": 0.5, "val": 0.5})
    rng = np.random.default_rng(0)
    paths = [path for path in sorted(store.rglob("*")) if path.is_file()]
    assert len(paths) == 17  # 5 arrays, 5 records, a skip and 6 in the folder itself
    for path in paths:
        whole = path.read_bytes()
        for place in {0, len(whole) - 1, *rng.integers(0, len(whole), 3).tolist()}:
            flip(path, place)
            assert any(str(path) in sentence for sentence in verify(store)), (path, place)
            path.write_bytes(whole)
    assert verify(store) == []


def test_a_flipped_byte_in_a_record_names_the_volume_and_its_source(store):
    record = one_record(store)
    flip(record_path(store, record), 300)
    sentence = only(verify(store))
    assert "the record" in sentence
    assert record.volume_id in sentence
    assert record.source_key in sentence


@pytest.mark.parametrize("name", [layout.INDEX, layout.MAPPED_INDEX])
def test_a_flipped_byte_in_the_index_is_found(store, name):
    flip(store / name, 1500)
    assert f"the index {store / name} is not what was written" in only(verify(store))


def test_a_flipped_byte_in_the_options_is_found(store):
    flip(store / layout.STORE, 20)
    assert layout.STORE in only(verify(store))


def test_a_cut_array_tells_both_sizes(store):
    record = one_record(store)
    path = store / layout.array_name(record.volume_id)
    path.write_bytes(path.read_bytes()[:-100])
    expected = f"has {record.array_bytes - 100} bytes, not {record.array_bytes}"
    sentence = only(verify(store))
    assert expected in sentence
    assert record.volume_id in sentence


def test_missing_files_are_named_with_their_source(store):
    record = one_record(store)
    array = store / layout.array_name(record.volume_id)
    array.unlink()
    assert f"the array {array} of volume {record.volume_id}" in only(verify(store))
    record_path(store, record).unlink()
    sentence = only(verify(store))
    assert "the record" in sentence
    assert "is missing" in sentence
    assert record.source_key in sentence


def test_missing_parts_of_the_index_are_named(store):
    for name in (layout.INDEX, layout.MAPPED_INDEX, layout.MANIFEST):
        data = (store / name).read_bytes()
        (store / name).unlink()
        assert f"{store / name} is missing" in only(verify(store))
        (store / name).write_bytes(data)


def test_an_array_that_is_not_the_one_of_its_record_is_found(stores, store):
    record = one_record(store)
    frame = codec.encode(stores.slices(55))
    (store / layout.array_name(record.volume_id)).write_bytes(frame)
    StoreWriter(store, stores.options)
    path = record_path(store, record)
    values = record.to_dict() | {"array_sha256": files.sha256(frame), "array_bytes": len(frame)}
    path.write_bytes(layout.sealed(values, "record_sha256"))
    build_index(store)
    sentence = only(verify(store))
    assert "does not hold the slices of its record (first at 0)" in sentence
    assert record.volume_id in sentence


def test_a_record_under_a_wrong_name_is_found(store):
    record = one_record(store)
    copy = store / layout.RECORDS / f"{'0' * 32}.json"
    shutil.copy(record_path(store, record), copy)
    sentence = only(verify(store))
    assert str(copy) in sentence
    assert f"is that of another source, {record.source_key}" in sentence


def test_stray_files_are_named_and_hidden_ones_are_not(stores, store):
    strays = [store / "notes.txt", store / "volumes" / "old.b2nd", store / "records" / "a" / "b"]
    strays[2].parent.mkdir()
    for path in (*strays, store / ".nfs0001", store / "volumes" / ".DS_Store"):
        path.write_bytes(b"x")
    found = verify(store)
    assert len(found) == 3
    assert all(any(str(path) in sentence for sentence in found) for path in strays)


def test_an_array_without_a_record_is_a_stray(stores, store):
    writer = StoreWriter(store, stores.options)
    record = writer.write_volume(*stores.volume(9))
    record_path(store, record).unlink()
    assert f"{record.volume_id}.b2nd belongs to no record" in only(verify(store))


def test_leftovers_of_other_machines_are_named_only_when_they_are_old(store):
    part = store / layout.VOLUMES / "a.b2nd.elsewhere-1-0.part"
    part.write_bytes(b"half")
    assert verify(store) == []
    os.utime(part, (0, 0))
    assert f"{part} was left by an interrupted writer" in only(verify(store))


def test_an_index_older_than_the_records_is_found(stores, store):
    StoreWriter(store, stores.options).write_volume(*stores.volume(9))
    assert "does not list what its records hold" in only(verify(store))
    build_index(store)
    assert verify(store) == []


def test_splits_of_an_older_index_are_found(stores, store):
    split_by_patient(store, {"train": 0.5, "val": 0.5})
    stores.write(store, [stores.volume(9)])
    assert "is of an older index" in only(verify(store))


def test_progress_counts_to_the_number_of_volumes(store):
    stream = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify_module, "_VOLUMES_PER_LINE", 1)
        verify(store, stream)
    lines = stream.getvalue().splitlines()
    assert [line.split(",")[0] for line in lines] == [f"{n}/5 volumes" for n in range(1, 6)]


def test_a_folder_without_a_store_is_refused(tmp_path):
    with pytest.raises(UserError, match="must be a slice store"):
        verify(tmp_path)
