import json

import numpy as np
import pytest

from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.store import layout
from nnunetv2_meddinov3.store.reader import SliceStore
from nnunetv2_meddinov3.store.splitting import split_by_patient
from nnunetv2_meddinov3.store.writer import StoreWriter

HALVES = {"train": 0.5, "val": 0.5}


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
def test_no_patient_is_in_two_parts_and_every_row_is_in_one(crowd, seed):
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


def test_no_part_is_empty_however_small_its_share(stores, store):
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


def test_more_parts_than_patients_are_refused(store):
    fractions = dict.fromkeys("abcdef", 1 / 6)
    with pytest.raises(UserError, match="as many unrelated patients as parts, but has 5 for 6"):
        split_by_patient(store, fractions)


def test_an_index_that_lists_what_is_gone_is_refused(stores, store):
    record, _ = stores.volume(0)
    slices = stores.slices(50)
    StoreWriter(store, stores.options).write_volume(
        stores.record(record.source_key, slices, patient="renamed"), slices
    )
    with pytest.raises(UserError, match="but it is older"):
        split_by_patient(store, HALVES)
