"""Whole stores: merging several into one, splitting one by patient, exporting ``.npy`` files."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from nnunetv2_meddinov3 import files
from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.store import layout
from nnunetv2_meddinov3.store.fingerprints import digests, first_of_equal
from nnunetv2_meddinov3.store.index import build_index, read_records, read_skips
from nnunetv2_meddinov3.store.reader import SliceStore
from nnunetv2_meddinov3.store.records import read_frame, read_record
from nnunetv2_meddinov3.store.sharing import check_target, refuse_written, writing
from nnunetv2_meddinov3.store.writer import StoreWriter


def merge(folders: Sequence[Path | str], target: Path | str, *, with_key: bool = False) -> Path:
    """Make one store of several: the one that curating all their sources at once would give.

    Merging into an existing store adds to it; a merge that was interrupted can be run again.

    Args:
        folders: Stores that were made with the same options; they are not changed.
        target: A new folder, or a store with the same options.
        with_key: Give the target the key that all stores have, so that a patient who enters it
            later has the same hash; by default it gets a key of its own.

    Returns:
        The index of the merged store.

    Raises:
        UserError: If a folder is not a store, options differ, a source key stands for different
            files, the target is one of the folders, a source store is damaged, a process writes
            to one of them, or ``with_key`` is set and they have not one key.
    """
    stores, target = [Path(folder) for folder in folders], Path(target)
    options = _shared_options(stores, target)
    check_target(target)
    for store in stores:
        refuse_written(store)
    chosen = _choose_records([*stores, target] if target.is_dir() else stores)
    new_key = _shared_key(stores, target) if with_key else None
    keyed = any(layout.is_keyed(store) for store in stores)
    with writing(target, _say_nothing):
        writer = StoreWriter(target, options, keyed=keyed, new_key=new_key)
        for path in chosen.values():
            record = read_record(path)
            if writer.has(record.source_key, record.source_sha256):
                continue
            writer.adopt(record, read_frame(path.parents[1], record))
        skips = sorted({skip for store in stores for skip in read_skips(store)}, reverse=True)
        # of two reasons for one source the first in order is written last
        for key, reason in skips:
            if key not in chosen:
                writer.write_skip(key, reason)
        return build_index(target)


def _say_nothing(_: str) -> None:
    pass


def _shared_options(stores: list[Path], target: Path) -> dict[str, Any]:
    if not stores:
        raise UserError("at least one store must be given to merge, got none: name some.")
    if target.resolve() in [store.resolve() for store in stores]:
        raise UserError(
            f"the target {target} must not be one of the stores merged: name another folder."
        )
    options = layout.read_options(stores[0])
    for store in stores[1:]:
        if layout.read_options(store) != options:
            raise UserError(
                f"stores to merge must be made with the same options, but {stores[0]} has "
                f"{options} and {store} has {layout.read_options(store)}: curate one of them "
                "again with the other's options."
            )
    return options


def _shared_key(stores: list[Path], target: Path) -> bytes:
    merged = [*stores, target] if (target / layout.STORE).is_file() else stores
    keys = {layout.read_key(store) for store in merged}
    key = next(iter(keys))
    if len(keys) > 1 or key is None:
        raise UserError(
            f"stores merged with their key must have one and the same, but {len(stores)} stores "
            f"for {target} have {'different ones' if len(keys) > 1 else 'none'}: leave out "
            f"--with-key, or copy {layout.KEY} into an empty folder before curating into it."
        )
    return key


def _choose_records(stores: list[Path]) -> dict[str, Path]:
    """Return for each source key the record that stands for it, whatever the order of the stores.

    Raises:
        UserError: If a record is damaged, or a source key stands for different files.
    """
    chosen: dict[str, tuple[Path, str]] = {}
    for store in stores:
        for record in read_records(store, in_order=False):
            key, sha256 = record.source_key, record.source_sha256
            path = store / layout.RECORDS / layout.record_name(key)
            other, other_sha256 = chosen.setdefault(key, (path, sha256))
            if other_sha256 != sha256:
                raise UserError(
                    f"source {key} must be the same in all stores, but differs in "
                    f"{other.parents[1]} and {store}: curate one of them from a folder of "
                    "another name."
                )
            if other != path:
                first = min(path, other, key=lambda each: (each.read_bytes(), each))
                chosen[key] = first, sha256
    return {key: path for key, (path, _) in sorted(chosen.items())}


def split_by_patient(
    folder: Path | str, fractions: dict[str, float], seed: int = 0
) -> dict[str, list[int]]:
    """Divide the rows of a store into named splits, and write them to ``splits.json``.

    A patient is a (dataset, patient) pair. Patients that share a slice, because one volume is in
    two datasets, go together. The same store, fractions and seed give the same splits.

    Args:
        folder: The store.
        fractions: Name to share of the slices; shares are met as nearly as whole patients allow,
            and no split stays empty.
        seed: Another number gives other splits.

    Returns:
        For each name the numbers of its rows, ascending.

    Raises:
        UserError: If there is no store, its index is old, the fractions are not positive numbers
            that sum to 1, or there are fewer patients than splits.
    """
    _check_fractions(fractions)
    folder = Path(folder)
    store = SliceStore(folder)
    datasets, patients = (store.rows[name].to_pylist() for name in ("dataset", "patient"))
    of_row = [_patient(*pair) for pair in zip(datasets, patients, strict=True)]
    group_of_row = _groups_of_rows(folder, of_row)
    split_of_group = _deal(group_of_row, fractions, seed, folder)
    split_of_row = np.array([split_of_group[group] for group in group_of_row])
    rows = {name: np.flatnonzero(split_of_row == name).tolist() for name in fractions}
    values = {
        "seed": seed,
        "fractions": fractions,
        "records_sha256": store.records_sha256,
        "patients": {name: sorted({of_row[row] for row in rows[name]}) for name in fractions},
        "rows": rows,
    }
    files.write_bytes(folder / layout.SPLITS, layout.sealed(values, "splits_sha256"))
    return rows


def _check_fractions(fractions: dict[str, float]) -> None:
    usable = fractions and all(name and 0 < share <= 1 for name, share in fractions.items())
    if not usable or not math.isclose(sum(fractions.values()), 1, abs_tol=1e-6):
        given = ", ".join(f"{name}={share:g}" for name, share in fractions.items()) or "none"
        raise UserError(
            f"splits must have positive fractions that sum to 1, got {given}: give for example "
            "train=0.9 val=0.1."
        )


def _patient(dataset: str, patient: str) -> str:
    return f"{dataset}/{patient}"


def _groups_of_rows(folder: Path, of_row: list[str]) -> np.ndarray:
    """Return the group of each row, given its patient."""
    groups = _groups(folder)
    if not groups.keys() >= set(of_row):
        raise UserError(
            f"the index of {folder} must list what its records hold, but it is older: run the "
            "same `meddinov3 curate` again."
        )
    return np.array([groups[patient] for patient in of_row])


def _groups(folder: Path) -> dict[str, str]:
    """Return for each patient the first of the patients that equal slices tie together.

    Constant slices tie nobody: all empty slices of one size are equal.
    """
    of_record, found = [], [np.empty((0, 2), np.uint64)]
    for record in read_records(folder, in_order=False):
        of_record.append(_patient(record.dataset, record.patient))
        found.append(digests(s.sha256 for s in record.slices if s.hu_min != s.hu_max))
    names, numbers = np.unique(np.array(of_record, dtype=str), return_inverse=True)
    patients = np.repeat(numbers, [len(each) for each in found[1:]])
    slices = first_of_equal(np.concatenate(found)) + len(names)
    size = len(names) + len(slices)
    graph = coo_array((np.ones(len(slices), bool), (patients, slices)), shape=(size, size))
    _, components = connected_components(graph, directed=False)
    first: dict[int, str] = {}
    return {
        str(name): first.setdefault(component, str(name))
        for name, component in zip(names, components[: len(names)], strict=True)
    }


def _deal(
    group_of_row: np.ndarray, fractions: dict[str, float], seed: int, folder: Path
) -> dict[str, str]:
    """Return the split of each group: drawn by hash, each goes where most is missing."""
    groups, sizes = np.unique(group_of_row, return_counts=True)
    if len(groups) < len(fractions):
        raise UserError(
            f"{folder} must hold at least as many unrelated patients as splits, but has "
            f"{len(groups)} for {len(fractions)}: ask for fewer splits, or curate more patients."
        )
    drawn = sorted(
        zip(groups.tolist(), sizes.tolist(), strict=True),
        key=lambda each: hashlib.sha256(f"{seed}/{each[0]}".encode()).digest(),
    )
    dealt = dict.fromkeys(fractions, 0)
    splits = {}
    for group, size in drawn:
        split = min(fractions, key=lambda n: (dealt[n] / fractions[n], -fractions[n], n))
        dealt[split] += size
        splits[group] = split
    return splits


def export_npy(folder: Path | str, target: Path | str) -> int:
    """Write each slice of a store as ``slice_<row>.npy`` (H, W) int16, and the index beside them.

    ``index.parquet`` there is that of the store with the file names as its first column, ``npy``.
    The folder appears only when it is complete.

    Args:
        folder: The store.
        target: A folder that does not exist, or is empty.

    Returns:
        The number of slices.

    Raises:
        UserError: If there is no store, an array is damaged, or the target holds files or cannot
            be written.
    """
    store, target = SliceStore(folder), Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} must not exist or be an empty folder: name another folder.")
    with files.replacing(target) as part:
        part.mkdir(parents=True)
        names = [f"slice_{number:07d}.npy" for number in range(len(store))]
        for number, name in enumerate(names):
            np.save(part / name, store.image(number))
        rows = store.rows.add_column(0, "npy", pa.array(names, pa.string()))
        pq.write_table(rows, part / layout.INDEX, compression="zstd")
        if target.exists():
            target.rmdir()  # fails if somebody filled it meanwhile
    return len(store)
