import itertools
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest

from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.store import arrays, layout
from nnunetv2_meddinov3.store.manage import export_npy, merge
from nnunetv2_meddinov3.store.reader import SliceStore
from nnunetv2_meddinov3.store.verify import verify


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
    monkeypatch.setitem(arrays._COMPRESSION, "clevel", 1)
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
