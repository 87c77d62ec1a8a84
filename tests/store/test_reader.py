import multiprocessing
import os
import pickle
import shutil
import threading

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.store import index as index_module
from nnunetv2_meddinov3.store import layout
from nnunetv2_meddinov3.store import reader as store_module
from nnunetv2_meddinov3.store.reader import SliceStore
from nnunetv2_meddinov3.store.writer import StoreWriter


def test_any_slice_read_at_random_is_what_was_written(stores, store):
    reader = SliceStore(store)
    expected = {f"Set{n % 2}/case{n}": stores.slices(n) for n in range(5)}
    assert len(reader) == 20
    for index in np.random.default_rng(0).permutation(20):
        image, record = reader[index]
        assert image.dtype == np.int16
        np.testing.assert_array_equal(image, expected[record["source_key"]][record["slice"]])
    assert {reader[i][1]["source_key"] for i in range(20)} == set(expected)


class _Watched(dict):
    """Columns that note which of them are read."""

    def __init__(self, columns):
        super().__init__(columns)
        self.read = set()

    def __getitem__(self, name):
        self.read.add(name)
        return super().__getitem__(name)

    def items(self):
        self.read.update(self)
        return super().items()


def test_a_slice_alone_is_read_without_making_its_row(store):
    reader = SliceStore(store)
    reader._columns = _Watched(reader._columns)
    for index in (0, 7, 19, -1, -20):
        image = reader.image(index)
        assert reader._columns.read == {"file", "slice"}
        assert image.dtype == np.int16
        np.testing.assert_array_equal(image, SliceStore(store)[index][0])
    _, record = reader[0]
    assert reader._columns.read == set(record) == set(reader.rows.column_names)


def test_an_index_of_several_batches_is_read_like_one_of_one(stores, store, tmp_path, monkeypatch):
    monkeypatch.setattr(index_module, "_ROWS_PER_BATCH", 5)
    copy = stores.write(tmp_path / "copy", [stores.volume(n) for n in range(5)])
    expected, batched = SliceStore(store), SliceStore(copy)
    assert batched.rows["z"].num_chunks == 3  # of two volumes, two and one
    assert expected.rows["z"].num_chunks == 1
    assert batched.rows.to_pylist() == expected.rows.to_pylist()
    for index in (0, 9, 15, 19, -20):
        assert batched[index][1] == expected[index][1]
        np.testing.assert_array_equal(batched.image(index), expected.image(index))
    (copy / layout.MAPPED_INDEX).unlink()
    assert SliceStore(copy).rows.to_pylist() == expected.rows.to_pylist()
    assert SliceStore(copy).records_sha256 == expected.records_sha256


def test_a_row_says_what_the_record_of_its_volume_says(stores, tmp_path):
    record, slices = stores.volume(
        3,
        modality="MR",
        spacing_mm=None,
        intensity={"low": 1.0, "high": 9.0, "stored_low": 0.0, "stored_high": 16384.0},
    )
    _, row = SliceStore(stores.write(tmp_path / "s", [(record, slices)]))[1]
    expected = {"dataset": "Set1", "patient": "case3", "modality": "MR", "windowed": False}
    expected |= {"spacing_z": None, "spacing_y": None, "height": 24, "width": 20, "z": 1}
    expected |= {"intensity_low": 1.0, "intensity_stored_high": 16384.0, "position_mm": 2.5}
    expected |= {"flags": ["saturated"], "body_fraction": 0.5, "orientation": "RAI", "slice": 1}
    expected |= {"sha256": record.slices[1].sha256, "hu_max": float(slices[1].max())}
    assert {name: row[name] for name in expected} == expected
    assert (tmp_path / "s" / row["file"]).is_file()


def test_spacing_is_listed_by_axis(store):
    _, row = SliceStore(store)[0]
    assert (row["spacing_z"], row["spacing_y"], row["spacing_x"]) == (2.5, 0.7, 0.8)
    assert row["intensity_low"] is None


def test_numbers_count_from_the_end_and_end_there(store):
    reader = SliceStore(store)
    assert reader[-1][1] == reader[19][1]
    assert reader[-20][1] == reader[0][1]
    for number in (20, -21, 10**12):
        for read in (reader.__getitem__, reader.image):
            with pytest.raises(IndexError, match=rf"-20\.\.19 .* got {number}"):
                read(number)
    with pytest.raises(TypeError):
        reader["0"]


def test_iterating_ends_after_the_last_slice(store):
    assert len(list(SliceStore(store))) == 20


def test_a_slice_is_a_copy_that_may_be_changed(store):
    reader = SliceStore(store)
    image, _ = reader[0]
    before = image.copy()
    image[:] = 0
    np.testing.assert_array_equal(reader[0][0], before)


def test_the_store_pickles_as_its_path(store, monkeypatch):
    monkeypatch.chdir(store.parent)
    data = pickle.dumps(SliceStore("store"))
    monkeypatch.chdir("/")
    assert len(data) < 500
    assert pickle.loads(data)[3][1] == SliceStore(store)[3][1]


def test_more_arrays_are_read_than_are_kept_open(store, monkeypatch):
    monkeypatch.setattr(store_module, "_OPEN_ARRAYS", 2)
    reader = SliceStore(store)
    first = [reader[i][0].sum() for i in range(20)]
    assert [reader[i][0].sum() for i in range(20)] == first
    assert len(reader._opened.arrays) == 2


def test_threads_read_side_by_side(store):
    reader = SliceStore(store)
    expected = [reader[i][0].tobytes() for i in range(20)]
    wrong = []

    def read(seed):
        for i in np.random.default_rng(seed).integers(0, 20, 100):
            if reader[i][0].tobytes() != expected[i]:
                wrong.append(i)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def _sums(reader):
    return [int(reader[i][0].astype(np.int64).sum()) for i in range(len(reader))]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_worker_processes_read_what_their_parent_reads(store, method):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} on this system")
    reader = SliceStore(store)
    sums = _sums(reader)  # arrays are open before the fork
    with multiprocessing.get_context(method).Pool(2) as pool:
        assert pool.map(_sums, [reader, reader]) == [sums, sums]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_opens_arrays_of_its_own(store):
    reader = SliceStore(store)
    mine = reader[0][0].tobytes()
    end, other_end = multiprocessing.Pipe()
    context = multiprocessing.get_context("fork")

    def child():
        image = reader[0][0].tobytes()
        other_end.send((image == mine, reader._opened.process == os.getpid()))

    process = context.Process(target=child)
    process.start()
    assert end.recv() == (True, True)
    process.join()


class _Sums:
    """A data set of torch: each item is the sum of a slice."""

    def __init__(self, reader):
        self.reader = reader

    def __len__(self):
        return len(self.reader)

    def __getitem__(self, index):
        return int(self.reader[index][0].astype(np.int64).sum())


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_the_workers_of_a_data_loader_read_the_store(store, method):
    from torch.utils.data import DataLoader

    dataset = _Sums(SliceStore(store))
    loader = DataLoader(dataset, batch_size=3, num_workers=2, multiprocessing_context=method)
    assert [int(x) for batch in loader for x in batch] == [dataset[i] for i in range(20)]


def test_rows_and_options_are_there_to_select_by(stores, store):
    reader = SliceStore(store)
    assert reader.options == stores.options
    chosen = pc.equal(reader.rows["dataset"].cast(pa.string()), "Set1").to_numpy()
    assert {reader[i][1]["dataset"] for i in np.flatnonzero(chosen)} == {"Set1"}
    assert chosen.sum() == 8


def test_the_index_is_mapped_into_memory_and_not_loaded(stores, tmp_path):
    slices = stores.slices(0, (500, 2, 2))
    store = stores.write(tmp_path / "s", [(stores.record("Set0/long", slices), slices)])
    before = pa.total_allocated_bytes()
    reader = SliceStore(store)
    assert reader[499][1]["slice"] == 499
    assert pa.total_allocated_bytes() - before < reader.rows.nbytes / 20


@pytest.mark.parametrize("damage", ["missing", "old", "cut"])
def test_without_a_fitting_mapped_copy_the_parquet_file_is_read(stores, store, tmp_path, damage):
    expected = SliceStore(store).rows.to_pylist()
    mapped = store / layout.MAPPED_INDEX
    data = mapped.read_bytes()
    mapped.unlink()  # what is mapped must not change under the first reader
    if damage == "cut":
        mapped.write_bytes(data[:100])
    elif damage == "old":
        other = stores.write(tmp_path / "other", [stores.volume(9)])
        shutil.copy(other / layout.MAPPED_INDEX, mapped)
    reader = SliceStore(store)
    assert reader.rows.to_pylist() == expected
    assert stores.record("a", reader[7][0][None]).slices[0].sha256 == expected[7]["sha256"]


def test_a_store_without_volumes_has_no_slices(stores, tmp_path):
    reader = SliceStore(stores.write(tmp_path / "s", []))
    assert len(reader) == 0
    with pytest.raises(IndexError):
        reader[0]


def test_a_folder_that_is_no_store_is_refused_with_its_remedy(tmp_path):
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError, match=r"must be a slice store .*meddinov3 curate"):
            SliceStore(path)


def test_a_store_that_was_not_finished_says_how_to_go_on(stores, tmp_path):
    StoreWriter(tmp_path / "s", stores.options).write_volume(*stores.volume(0))
    with pytest.raises(UserError, match=r"must have an index .*goes on where it stopped"):
        SliceStore(tmp_path / "s")


def test_a_store_of_another_format_is_refused(store):
    values = {"format": 2, "options": {}}
    (store / layout.STORE).write_bytes(layout.sealed(values, "store_sha256"))
    with pytest.raises(UserError, match="format 1, but has format 2"):
        SliceStore(store)


@pytest.mark.parametrize("text", [b"", b"PAR1 but not really PAR1"])
def test_a_damaged_index_is_a_sentence(store, text):
    (store / layout.INDEX).write_bytes(text)
    with pytest.raises(UserError, match=r"index.parquet cannot be read .*rebuilds it"):
        SliceStore(store)


def test_an_index_of_somebody_else_is_a_sentence(store):
    pq.write_table(pa.table({"a": [1]}), store / layout.INDEX)
    with pytest.raises(UserError, match=r"index.parquet cannot be read"):
        SliceStore(store)


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_damaged_array_is_a_sentence_that_names_it(store, damage):
    reader = SliceStore(store)
    row = reader.rows.slice(5, 1).to_pylist()[0]
    path = store / row["file"]
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:200])
    for read in (reader.__getitem__, reader.image):
        with pytest.raises(UserError) as caught:
            read(5)
        assert row["volume_id"] in str(caught.value)
        assert row["source_key"] in str(caught.value)
        assert "meddinov3 store verify" in str(caught.value)
