import os
import pickle
from dataclasses import replace

import numpy as np
import pytest

from nnunetv2_meddinov3 import files
from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.store import codec, layout
from nnunetv2_meddinov3.store.index import build_index, read_records, read_skips
from nnunetv2_meddinov3.store.verify import verify
from nnunetv2_meddinov3.store.writer import StoreWriter


def test_a_second_run_writes_nothing(stores, store):
    before = {path: path.stat().st_mtime_ns for path in (store / layout.VOLUMES).iterdir()}
    writer = StoreWriter(store, stores.options)
    for number in range(5):
        record, _ = stores.volume(number)
        assert writer.has(record.source_key, record.source_sha256)
    assert {p: p.stat().st_mtime_ns for p in (store / layout.VOLUMES).iterdir()} == before


def test_a_source_has_not_entered_if_it_changed_or_its_files_are_damaged(stores, store):
    writer = StoreWriter(store, stores.options)
    record, slices = stores.volume(0)
    assert not writer.has(record.source_key, "0" * 64)
    assert not writer.has("Set0/another", record.source_sha256)
    written = writer.write_volume(record, slices)
    array = store / layout.array_name(written.volume_id)
    whole = array.read_bytes()
    array.write_bytes(whole[:-1])
    assert not writer.has(record.source_key, record.source_sha256)
    array.unlink()
    assert not writer.has(record.source_key, record.source_sha256)
    writer.write_volume(record, slices)
    assert array.read_bytes() == whole
    path = store / layout.RECORDS / layout.record_name(record.source_key)
    path.write_bytes(path.read_bytes().replace(b"RAI", b"RAS"))
    assert not writer.has(record.source_key, record.source_sha256)


def test_a_damaged_array_is_written_anew(stores, store):
    record, slices = stores.volume(0)
    writer = StoreWriter(store, stores.options)
    array = store / layout.array_name(writer.write_volume(record, slices).volume_id)
    whole = array.read_bytes()
    array.write_bytes(whole[:700] + bytes([whole[700] ^ 1]) + whole[701:])
    writer.write_volume(record, slices)
    assert array.read_bytes() == whole


def test_an_equal_array_of_another_compressor_stays_as_other_records_know_it(
    stores, store, monkeypatch
):
    record, slices = stores.volume(0)
    writer = StoreWriter(store, stores.options)
    first = writer.write_volume(record, slices)
    monkeypatch.setitem(codec._COMPRESSION, "clevel", 1)
    assert codec.encode(slices) != (store / layout.array_name(first.volume_id)).read_bytes()
    copy = writer.write_volume(replace(record, source_key="Set9/copy"), slices)
    assert copy.array_sha256 == first.array_sha256
    build_index(store)
    assert verify(store) == []


def test_a_changed_source_replaces_its_record(stores, store):
    record, _ = stores.volume(0)
    slices = stores.slices(77)
    changed = stores.record(record.source_key, slices)
    stores.write(store, [(changed, slices)])
    assert [r.slices for r in read_records(store) if r.source_key == record.source_key] == [
        changed.slices
    ]


def test_a_record_comes_back_as_it_was_written(stores, tmp_path):
    record, slices = stores.volume(1, notes=("gantry tilt 12 degrees",), intensity={"low": 0.5})
    written = StoreWriter(tmp_path / "s", stores.options).write_volume(record, slices)
    assert list(read_records(tmp_path / "s")) == [written]
    names = ("volume_id", "array_sha256", "array_bytes")
    assert replace(written, **{name: getattr(record, name) for name in names}) == record


def test_a_source_that_enters_at_last_is_no_longer_skipped(stores, tmp_path):
    writer = StoreWriter(tmp_path / "s", stores.options)
    writer.write_skip("Set0/case0", "is truncated")
    writer.write_skip("Set0/other", "is empty")
    assert read_skips(tmp_path / "s") == [
        ("Set0/case0", "is truncated"),
        ("Set0/other", "is empty"),
    ]
    writer.write_volume(*stores.volume(0))
    assert read_skips(tmp_path / "s") == [("Set0/other", "is empty")]
    writer.write_skip("Set0/case0", "cannot be read any more")
    assert read_skips(tmp_path / "s") == [("Set0/other", "is empty")]


def test_a_store_is_not_continued_with_other_options(stores, store):
    before = stores.contents(store)
    with pytest.raises(UserError, match="size was None and is now 256: give the same options"):
        StoreWriter(store, {**stores.options, "size": 256})
    assert stores.contents(store) == before
    StoreWriter(store, dict(reversed(stores.options.items())))


def test_a_store_of_another_format_is_not_continued(stores, store):
    values = {"format": 7, "options": stores.options}
    (store / layout.STORE).write_bytes(layout.sealed(values, "store_sha256"))
    with pytest.raises(UserError, match="format 1, but has format 7"):
        StoreWriter(store, stores.options)


def test_a_folder_with_other_files_is_left_alone(stores, tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match=r"holds other files such as thesis\.tex"):
        StoreWriter(tmp_path, stores.options)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_place_where_no_folder_can_be_is_a_sentence(stores, tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "store"):
        with pytest.raises(UserError, match="must be a folder that can be written"):
            StoreWriter(path, stores.options)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write all")
def test_a_folder_without_permission_is_a_sentence(stores, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="Permission denied"):
        StoreWriter(tmp_path / "store", stores.options)


def test_a_full_disk_is_a_sentence_and_leaves_the_store_whole(stores, store, monkeypatch):
    before = stores.contents(store)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device; make room"):
        StoreWriter(store, stores.options).write_volume(*stores.volume(8))
    assert stores.contents(store) == before
    assert list(store.rglob("*.part")) == []


@pytest.mark.parametrize(
    "slices",
    [np.zeros((4, 24, 20), np.float32), np.zeros((24, 20), np.int16), np.zeros((0, 4, 4), "i2")],
)
def test_only_stacks_of_int16_slices_are_written(stores, tmp_path, slices):
    writer = StoreWriter(tmp_path / "s", stores.options)
    with pytest.raises(ValueError, match="must be int16 of shape"):
        writer.write_volume(stores.volume(0)[0], slices)


def test_a_record_must_describe_its_slices(stores, tmp_path):
    record, slices = stores.volume(0)
    writer = StoreWriter(tmp_path / "s", stores.options)
    for wrong in (
        replace(record, slices=record.slices[:3]),
        replace(record, slices=record.slices[::-1]),
        replace(record, shape=(4, 20, 24)),
    ):
        with pytest.raises(ValueError, match="must describe each of the 4 slices"):
            writer.write_volume(wrong, slices)
    assert stores.contents(tmp_path / "s").keys() == {layout.STORE}


def test_a_writer_goes_to_other_processes(stores, tmp_path):
    writer = pickle.loads(pickle.dumps(StoreWriter(tmp_path / "s", stores.options)))
    writer.write_volume(*stores.volume(0))
    assert len(list(read_records(tmp_path / "s"))) == 1
