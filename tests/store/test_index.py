import itertools
import json
import threading
import tracemalloc
import weakref
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.store import index, layout
from nnunetv2_meddinov3.store.index import build_index, read_records
from nnunetv2_meddinov3.store.reader import SliceStore
from nnunetv2_meddinov3.store.verify import verify
from nnunetv2_meddinov3.store.writer import StoreWriter


def manifest_of(folder):
    return json.loads((folder / layout.MANIFEST).read_bytes())


def test_the_order_of_writing_leaves_no_trace(stores, tmp_path):
    volumes = [stores.volume(n) for n in range(4)]
    volumes.append(stores.volume(0, key="Set1/copy"))
    written = [
        stores.contents(stores.write(tmp_path / str(i), order))
        for i, order in enumerate(itertools.islice(itertools.permutations(volumes), 0, 120, 17))
    ]
    assert len(written) == 8
    assert all(other == written[0] for other in written[1:])


def test_an_index_built_again_has_the_same_bytes(stores, store):
    before = stores.contents(store)
    assert build_index(store) == store / layout.INDEX
    assert stores.contents(store) == before


def test_rows_are_sorted_by_volume_and_slice(store):
    rows = pq.read_table(store / layout.INDEX).select(["volume_id", "slice"]).to_pylist()
    pairs = [(row["volume_id"], row["slice"]) for row in rows]
    assert pairs == sorted(pairs)
    assert len(set(pairs)) == 20


def test_a_copy_of_a_volume_is_listed_once_and_stored_once(stores, tmp_path):
    volumes = [
        stores.volume(0, key="B/case"),
        stores.volume(0, key="A/zzz"),
        stores.volume(0, key="A/copy"),
        stores.volume(1, key="C/other"),
    ]
    folder = stores.write(tmp_path / "s", volumes)
    assert len(list((folder / layout.VOLUMES).iterdir())) == 2
    rows = SliceStore(folder).rows
    assert len(rows) == 8
    assert set(rows["source_key"].to_pylist()) == {"A/copy", "C/other"}
    manifest = manifest_of(folder)
    counts = {s["source_key"]: (s["slices"], s["duplicates"]) for s in manifest["sources"]}
    assert counts == {"A/copy": (4, 0), "A/zzz": (4, 4), "B/case": (4, 4), "C/other": (4, 0)}
    assert (manifest["volumes"], manifest["slices"], manifest["duplicates"]) == (4, 8, 8)


def test_a_cropped_copy_adds_only_the_slices_that_are_new(stores, tmp_path):
    slices = stores.slices(0, (6, 10, 12))
    volumes = [
        (stores.record("A/lower", slices[:4]), slices[:4]),
        (stores.record("B/upper", slices[2:], first_z=2), slices[2:]),
    ]
    folder = stores.write(tmp_path / "s", volumes)
    reader = SliceStore(folder)
    listed = {(row["source_key"], row["z"]) for _, row in (reader[i] for i in range(len(reader)))}
    assert listed == {("A/lower", z) for z in range(4)} | {("B/upper", 4), ("B/upper", 5)}
    for row_number in range(6):
        image, row = reader[row_number]
        np.testing.assert_array_equal(image, slices[row["z"]])


def test_of_equal_slices_in_one_volume_the_lowest_is_listed(stores, tmp_path):
    slices = stores.slices(0, (3, 8, 8))
    slices[2] = slices[0]
    reader = SliceStore(stores.write(tmp_path / "s", [(stores.record("A/a", slices), slices)]))
    assert reader.rows["z"].to_pylist() == [0, 1]


def test_the_manifest_tells_sources_versions_options_and_what_was_skipped(stores, tmp_path):
    record, slices = stores.volume(0, versions={"SimpleITK": "2.3", "numpy": "2.0"})
    volumes = [(record, slices), stores.volume(1, versions={"numpy": "1.26"})]
    manifest = manifest_of(stores.write(tmp_path / "s", volumes))
    assert manifest["options"] == stores.options
    assert manifest["versions"] == {"SimpleITK": ["2.3"], "numpy": ["1.26", "2.0"]}
    assert manifest["skipped"] == [{"source_key": "Set0/broken", "reason": "is empty"}]
    source = manifest["sources"][0]
    assert (source["source_key"], source["source_sha256"]) == ("Set0/case0", record.source_sha256)
    assert (source["slices"], source["left_out"], source["patient"]) == (4, 1, "case0")


def test_the_manifest_has_the_hash_of_all_bytes_before_it(store):
    data = (store / layout.MANIFEST).read_bytes()
    assert layout.unsealed(data, "manifest_sha256")["slices"] == 20
    with pytest.raises(layout.Damaged):
        layout.unsealed(data.replace(b'"slices": 20', b'"slices": 21'), "manifest_sha256")


def test_the_index_needs_nothing_of_ours_to_be_read(store):
    table = pq.read_table(store / layout.INDEX)
    assert table.num_rows == 20
    assert b"pandas" not in table.schema.metadata


def test_records_come_sorted_by_dataset_and_source(stores, tmp_path):
    folder = stores.write(tmp_path / "s", [stores.volume(n) for n in (3, 0, 2, 1)])
    keys = [(record.dataset, record.source_key) for record in read_records(folder)]
    assert keys == sorted(keys)
    assert len(keys) == 4


def test_an_older_view_of_the_records_never_replaces_a_newer_index(stores, tmp_path, monkeypatch):
    folder = tmp_path / "s"
    writer = StoreWriter(folder, stores.options)
    writer.write_volume(*stores.volume(0))
    read_catalogue, first_has_read, go_on = (
        index.read_catalogue,
        threading.Event(),
        threading.Event(),
    )

    def slow_at_first(*arguments):
        built = read_catalogue(*arguments)
        if not first_has_read.is_set():
            first_has_read.set()
            go_on.wait(10)
        return built

    monkeypatch.setattr(index, "read_catalogue", slow_at_first)
    first = threading.Thread(target=build_index, args=(folder,))
    second = threading.Thread(target=build_index, args=(folder,))
    first.start()
    assert first_has_read.wait(10)
    writer.write_volume(*stores.volume(1))
    second.start()
    second.join(0.3)  # long enough to finish, were it not waiting
    go_on.set()
    first.join()
    second.join()
    assert len(SliceStore(folder)) == 8
    assert verify(folder) == []


def _long_records(stores, folder, volumes, slices=1000):
    """A store of records alone, which an index is built from without looking at arrays."""
    writer = StoreWriter(folder, stores.options)
    for number in range(volumes):
        record = stores.record(f"Set0/case{number}", stores.slices(number, (slices, 2, 2)))
        record = replace(record, volume_id=f"{number:032x}")
        path = writer.folder / layout.RECORDS / layout.record_name(record.source_key)
        path.write_bytes(layout.sealed(record.to_dict(), "record_sha256"))


def _peaks_of_building(folder):
    """Bytes at most in use by Python and NumPy, and by Arrow, beyond what was in use before."""
    default = pa.default_memory_pool()
    pool = pa.proxy_memory_pool(default)
    pa.set_memory_pool(pool)
    tracemalloc.start()
    try:
        build_index(folder)
        return tracemalloc.get_traced_memory()[1], pool.max_memory()
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(default)


def test_memory_does_not_grow_with_the_rows_of_an_index(stores, tmp_path, monkeypatch):
    monkeypatch.setattr(index, "_ROWS_PER_BATCH", 1000)
    few, many = 3, 24
    _long_records(stores, tmp_path / "few", few)
    _long_records(stores, tmp_path / "many", many)
    build_index(tmp_path / "few")  # what is imported or cached once belongs to neither
    peaks = [_peaks_of_building(tmp_path / name) for name in ("few", "many")]
    assert pq.read_metadata(tmp_path / "many" / layout.INDEX).num_rows == many * 1000
    # What is kept of a row are 16 bytes of hash and a bit; finding equal ones takes some more.
    more_rows = (many - few) * 1000
    assert peaks[1][0] - peaks[0][0] < 50 * more_rows
    assert peaks[1][1] < 1.2 * peaks[0][1]


def test_records_are_read_once_each_and_let_go(stores, tmp_path, monkeypatch):
    _long_records(stores, tmp_path / "s", volumes=8, slices=4)
    read, paths, records, alive = index.read_record, [], [], []

    def watched(path):
        record = read(path)
        paths.append(path)
        records.append(weakref.ref(record))
        alive.append(sum(each() is not None for each in records))
        return record

    monkeypatch.setattr(index, "read_record", watched)
    build_index(tmp_path / "s")
    assert sorted(paths) == sorted((tmp_path / "s" / layout.RECORDS).iterdir())
    assert max(alive) <= 2


def test_building_an_index_leaves_no_other_file(stores, store):
    assert {path.name for path in store.iterdir()} == {
        *(layout.FILES - {layout.SPLITS, layout.REPORT}),
        *layout.FOLDERS,
    }


def test_a_disk_that_fills_up_while_rows_pass_is_a_sentence(stores, store, monkeypatch):
    before = stores.contents(store)

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(index.tempfile, "TemporaryFile", full)
    with pytest.raises(UserError, match=r"must be writable, but: No space left on device"):
        build_index(store)
    assert stores.contents(store) == before


def test_a_damaged_record_stops_the_index_and_is_named(stores, store):
    before = stores.contents(store)
    path = sorted((store / layout.RECORDS).iterdir())[2]
    path.write_bytes(path.read_bytes().replace(b'"CT"', b'"MR"'))
    with pytest.raises(UserError, match=rf"{path.name} is not what was written.*curate its source"):
        build_index(store)
    assert (store / layout.INDEX).read_bytes() == before[layout.INDEX]


def test_a_damaged_skip_stops_the_index_and_is_named(store):
    path = next((store / layout.SKIPPED).iterdir())
    path.write_bytes(b"{}")
    with pytest.raises(UserError, match=rf"{path.name} is not what was written"):
        build_index(store)


def test_a_folder_without_a_store_has_no_index(tmp_path):
    with pytest.raises(UserError, match="must be a slice store"):
        build_index(tmp_path)
