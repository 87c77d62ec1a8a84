import itertools
import json
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest

from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.store import codec, layout
from nnunetv2_meddinov3.store.manage import export_npy, merge, split_by_patient
from nnunetv2_meddinov3.store.reader import SliceStore
from nnunetv2_meddinov3.store.verify import verify
from nnunetv2_meddinov3.store.writer import StoreWriter

HALVES = {"train": 0.5, "val": 0.5}


@pytest.fixture
def parts(stores, tmp_path):
    """Three stores that share a source, a copy of a volume, and a source skipped in one."""
    copy = stores.volume(0, key="Set1/copy")
    volumes = [
        [stores.volume(0), stores.volume(1)],
        [stores.volume(1), stores.volume(2), copy],
        [stores.volume(3)],
    ]
    skips = [[("Set1/case3", "is truncated")], [("Set0/x", "is empty")], [("Set0/x", "is a map")]]
    return [
        stores.write(tmp_path / f"part{i}", volumes[i], skips=skips[i]) for i in range(len(volumes))
    ]


def test_a_merged_store_equals_one_curated_at_once(stores, parts, tmp_path):
    volumes = [stores.volume(n) for n in range(4)] + [stores.volume(0, key="Set1/copy")]
    whole = stores.write(tmp_path / "whole", volumes, skips=[("Set0/x", "is a map")])
    for order in itertools.permutations(parts):
        target = tmp_path / "-".join(part.name for part in order)
        assert merge(order, target) == target / layout.INDEX
        assert stores.contents(target) == stores.contents(whole)
    assert verify(target) == []


def test_stores_can_be_merged_one_after_the_other(stores, parts, tmp_path):
    merge(parts, tmp_path / "at-once")
    for part in parts:
        merge([part], tmp_path / "in-turn")
    assert stores.contents(tmp_path / "in-turn") == stores.contents(tmp_path / "at-once")


def test_a_merge_leaves_its_sources_alone_and_can_be_run_again(stores, parts, tmp_path):
    before = [stores.contents(part) for part in parts]
    merge(parts, tmp_path / "m")
    merged = stores.contents(tmp_path / "m")
    merge(parts, tmp_path / "m")
    assert stores.contents(tmp_path / "m") == merged
    assert [stores.contents(part) for part in parts] == before


def test_arrays_of_two_compressors_merge_to_one_that_all_records_know(
    stores, tmp_path, monkeypatch
):
    first = stores.write(tmp_path / "first", [stores.volume(0)])
    monkeypatch.setitem(codec._COMPRESSION, "clevel", 1)
    second = stores.write(tmp_path / "second", [stores.volume(0, key="Set9/copy")])
    names = [{path.name for path in (s / layout.VOLUMES).iterdir()} for s in (first, second)]
    assert names[0] == names[1]
    merge([first, second], tmp_path / "m")
    assert verify(tmp_path / "m") == []


def test_stores_of_other_options_are_not_merged(stores, store, tmp_path):
    other = stores.write(tmp_path / "other", [stores.volume(9)], options={"size": 256})
    with pytest.raises(UserError, match="must be made with the same options"):
        merge([store, other], tmp_path / "m")
    with pytest.raises(UserError, match="size was 256 and is now None"):
        merge([store], other)
    assert not (tmp_path / "m").exists()


def test_one_name_for_two_sources_is_refused_before_anything_is_written(stores, store, tmp_path):
    slices = stores.slices(60)
    other = stores.write(tmp_path / "other", [(stores.record("Set0/case0", slices), slices)])
    with pytest.raises(UserError, match="Set0/case0 must be the same in all stores"):
        merge([store, other], tmp_path / "m")
    assert not (tmp_path / "m").exists()
    with pytest.raises(UserError, match="Set0/case0 must be the same in all stores"):
        merge([store], other)


def test_records_of_one_source_that_differ_merge_the_same_way_in_any_order(stores, tmp_path):
    record, slices = stores.volume(0)
    older = replace(record, versions={"numpy": "1.26"})
    parts = [
        stores.write(tmp_path / str(i), [(each, slices)]) for i, each in enumerate((record, older))
    ]
    merge(parts, tmp_path / "a")
    merge(parts[::-1], tmp_path / "b")
    assert stores.contents(tmp_path / "a") == stores.contents(tmp_path / "b")


@pytest.mark.parametrize("damage", ["flipped", "missing"])
def test_a_damaged_array_does_not_get_into_a_merged_store(store, tmp_path, damage):
    path = sorted((store / layout.VOLUMES).iterdir())[0]
    data = path.read_bytes()
    path.unlink()
    if damage == "flipped":
        path.write_bytes(data[:600] + bytes([data[600] ^ 1]) + data[601:])
    with pytest.raises(UserError, match=rf"{path.name} .*missing or damaged.*store verify"):
        merge([store], tmp_path / "m")
    assert not (tmp_path / "m" / layout.array_name(path.stem)).exists()


def test_a_store_is_not_merged_into_itself_nor_nothing_into_one(store, tmp_path):
    with pytest.raises(UserError, match="must not be one of the stores merged"):
        merge([store], store.parent / "." / store.name)
    with pytest.raises(UserError, match="at least one store"):
        merge([], tmp_path / "m")
    with pytest.raises(UserError, match="must be a slice store"):
        merge([store, tmp_path / "none"], tmp_path / "m")


def test_an_export_holds_each_slice_as_numpy_reads_it(store, tmp_path):
    reader = SliceStore(store)
    assert export_npy(store, tmp_path / "new" / "npy") == 20
    rows = pq.read_table(tmp_path / "new" / "npy" / "index.parquet")
    assert rows.column_names[0] == "npy"
    assert rows.drop(["npy"]).to_pylist() == reader.rows.to_pylist()
    for number, name in enumerate(rows["npy"].to_pylist()):
        image = np.load(tmp_path / "new" / "npy" / name)
        assert image.dtype == np.int16
        np.testing.assert_array_equal(image, reader[number][0])
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["npy"]


def test_an_export_goes_into_an_empty_folder_only(store, tmp_path):
    (tmp_path / "empty").mkdir()
    assert export_npy(store, tmp_path / "empty") == 20
    with pytest.raises(UserError, match="must not exist or be an empty folder"):
        export_npy(store, tmp_path / "empty")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="must not exist or be an empty folder"):
        export_npy(store, tmp_path / "file")


def test_an_export_that_fails_leaves_nothing(store, tmp_path, monkeypatch):
    sorted((store / layout.VOLUMES).iterdir())[-1].unlink()
    target = tmp_path / "out" / "npy"
    with pytest.raises(UserError, match="cannot be read"):
        export_npy(store, target)
    assert list(target.parent.iterdir()) == []


def test_a_place_where_no_export_can_be_is_a_sentence(store, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="must be writable, but: Not a directory"):
        export_npy(store, tmp_path / "file" / "npy")


def patients_of(folder, rows):
    reader = SliceStore(folder)
    return {(reader[i][1]["dataset"], reader[i][1]["patient"]) for i in rows}


@pytest.fixture(scope="module")
def crowd(stores, tmp_path_factory):
    """Thirty volumes of fifteen patients in each of two datasets with the same patient names."""
    volumes = []
    for number in range(30):
        slices = stores.slices(number, (1 + number % 4, 6, 6))
        key = f"Set{number % 2}/case{number}"
        volumes.append((stores.record(key, slices, patient=f"p{number // 4}"), slices))
    return stores.write(tmp_path_factory.mktemp("crowd") / "store", volumes)


@pytest.mark.parametrize("seed", range(5))
def test_no_patient_is_in_two_splits_and_every_row_is_in_one(crowd, seed):
    fractions = {"train": 0.6, "val": 0.2, "test": 0.2}
    rows = split_by_patient(crowd, fractions, seed)
    assert list(rows) == list(fractions)
    dealt = sorted(row for part in rows.values() for row in part)
    assert dealt == list(range(len(SliceStore(crowd))))
    seen = [patients_of(crowd, part) for part in rows.values()]
    assert all(seen)
    assert sum(map(len, seen)) == len(set.union(*seen)) == 16


def test_the_fractions_are_met_as_nearly_as_patients_allow(crowd):
    rows = split_by_patient(crowd, {"train": 0.75, "val": 0.25})
    of = len(SliceStore(crowd))
    assert abs(len(rows["train"]) / of - 0.75) < 0.1


def test_a_split_is_the_same_again_and_another_with_another_seed(crowd):
    first = split_by_patient(crowd, HALVES, seed=1)
    data = (crowd / layout.SPLITS).read_bytes()
    assert split_by_patient(crowd, dict(reversed(HALVES.items())), seed=1) == first
    assert split_by_patient(crowd, HALVES, seed=1) == first
    assert (crowd / layout.SPLITS).read_bytes() == data
    assert split_by_patient(crowd, HALVES, seed=2) != first


def test_the_order_of_writing_does_not_change_a_split(stores, tmp_path):
    volumes = [stores.volume(n) for n in range(6)]
    splits = [
        split_by_patient(stores.write(tmp_path / str(i), order), HALVES)
        for i, order in enumerate((volumes, volumes[::-1]))
    ]
    assert splits[0] == splits[1]


def test_the_file_tells_what_was_asked_and_what_came(crowd):
    rows = split_by_patient(crowd, HALVES, seed=3)
    values = json.loads((crowd / layout.SPLITS).read_bytes())
    assert (values["seed"], values["fractions"], values["rows"]) == (3, HALVES, rows)
    assert values["records_sha256"] == SliceStore(crowd).records_sha256
    expected = sorted("/".join(pair) for pair in patients_of(crowd, rows["val"]))
    assert values["patients"]["val"] == expected


def test_patients_that_share_a_slice_stay_together(stores, tmp_path):
    chain = []
    for number in range(6):  # each shares a slice with the next, under other names
        slices = np.concatenate([stores.slices(n, (1, 6, 6)) for n in (number, number + 1)])
        chain.append((stores.record(f"Set{number}/a{number}", slices), slices))
    folder = stores.write(tmp_path / "s", [*chain, stores.volume(90), stores.volume(91)])
    for seed in range(10):
        rows = split_by_patient(folder, HALVES, seed)
        parts = [{d for d, p in patients_of(folder, r) if p.startswith("a")} for r in rows.values()]
        assert sorted(map(len, parts)) == [0, 6]


def test_equal_empty_slices_tie_no_patients(stores, tmp_path):
    volumes = []
    for number in range(4):
        slices = stores.slices(number)
        slices[0] = -1024
        volumes.append((stores.record(f"Set0/case{number}", slices), slices))
    rows = split_by_patient(stores.write(tmp_path / "s", volumes), HALVES)
    assert sorted(map(len, rows.values())) == [6, 7]


def test_no_split_is_empty_however_small_its_share(stores, store):
    rows = split_by_patient(store, {"train": 0.98, "val": 0.01, "test": 0.01})
    assert {name: len(part) for name, part in rows.items()} == {"train": 12, "val": 4, "test": 4}


@pytest.mark.parametrize(
    "fractions",
    [{}, {"a": 0.5}, {"a": 0.7, "b": 0.4}, {"a": 1.2, "b": -0.2}, {"a": float("nan")}, {"": 1.0}],
)
def test_fractions_must_be_positive_and_sum_to_one(store, fractions):
    with pytest.raises(UserError, match="positive fractions that sum to 1, got"):
        split_by_patient(store, fractions)
    assert not (store / layout.SPLITS).exists()


def test_more_splits_than_patients_are_refused(store):
    fractions = dict.fromkeys("abcdef", 1 / 6)
    with pytest.raises(UserError, match="as many unrelated patients as splits, but has 5 for 6"):
        split_by_patient(store, fractions)


def test_an_index_that_lists_what_is_gone_is_refused(stores, store):
    record, _ = stores.volume(0)
    slices = stores.slices(50)
    StoreWriter(store, stores.options).write_volume(
        stores.record(record.source_key, slices, patient="renamed"), slices
    )
    with pytest.raises(UserError, match="but it is older"):
        split_by_patient(store, HALVES)
