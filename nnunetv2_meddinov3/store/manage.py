"""Whole stores: merging several into one, and exporting one as plain ``.npy`` files."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.store import layout
from nnunetv2_meddinov3.store.arrays import sha256
from nnunetv2_meddinov3.store.index import build_index, read_records, read_skips
from nnunetv2_meddinov3.store.reader import SliceStore
from nnunetv2_meddinov3.store.writer import StoreWriter, read_record


def merge(folders: Sequence[Path | str], target: Path | str) -> Path:
    """Makes one store of several: the one that curating all their sources at once would give.

    Merging into a store that exists adds to it; a merge that was interrupted can be run again.

    Args:
        folders: stores that were made with the same options; they are not changed.
        target: a new folder, or a store with the same options.

    Returns:
        The index of the merged store.

    Raises:
        UserError: If a folder is no store, options differ, a source key stands for different
            files, the target is one of the folders, or a source store is damaged.
    """
    stores, target = [Path(folder) for folder in folders], Path(target)
    options = _shared_options(stores, target)
    chosen = _choose_records([*stores, target] if target.is_dir() else stores)
    writer = StoreWriter(target, options)
    for path in chosen.values():
        record = read_record(path)
        if writer.has(record.source_key, record.source_sha256):
            continue
        array = path.parents[1] / layout.array_name(record.volume_id)
        frame = array.read_bytes() if array.is_file() else b""
        if sha256(frame) != record.array_sha256:
            raise UserError(
                f"the array {array} (from {record.source_key}) must be as it was written, but is "
                f"missing or damaged: mend that store first, `meddinov3 store verify "
                f"{path.parents[1]}` says how."
            )
        writer.adopt(record, frame)
    skips = sorted({skip for store in stores for skip in read_skips(store)}, reverse=True)
    for key, reason in skips:  # of two reasons for one source the first in order is written last
        if key not in chosen:
            writer.write_skip(key, reason)
    return build_index(target)


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


def _choose_records(stores: list[Path]) -> dict[str, Path]:
    """Source key to the record that stands for it, whatever the order of the stores.

    Raises:
        UserError: If a record is damaged, or a source key stands for different files.
    """
    chosen: dict[str, tuple[bytes, Path, str]] = {}
    for store in stores:
        for record in read_records(store):
            path = store / layout.RECORDS / layout.name_of(record.source_key)
            one = (path.read_bytes(), path, record.source_sha256)
            other = chosen.setdefault(record.source_key, one)
            if other[2] != record.source_sha256:
                raise UserError(
                    f"source {record.source_key} must be the same in all stores, but differs in "
                    f"{other[1].parents[1]} and {store}: curate one of them from a folder of "
                    "another name."
                )
            chosen[record.source_key] = min(one, other)
    return {key: path for key, (_, path, _) in sorted(chosen.items())}


def export_npy(folder: Path | str, target: Path | str) -> int:
    """Writes each slice of a store as ``slice_<row>.npy`` (H, W) int16, and the index beside them.

    ``index.parquet`` there is that of the store with the file names as its first column, ``npy``.
    The folder appears only when it is complete.

    Args:
        folder: the store.
        target: a folder that does not exist, or is empty.

    Returns:
        The number of slices.

    Raises:
        UserError: If there is no store, an array is damaged, or the target holds files or cannot
            be written.
    """
    store, target = SliceStore(folder), Path(target).absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} must not exist or be an empty folder: name another folder.")
    beside = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        beside.mkdir(parents=True)
        names = [f"slice_{number:07d}.npy" for number in range(len(store))]
        for number, name in enumerate(names):
            np.save(beside / name, store[number][0])
        rows = store.rows.add_column(0, "npy", pa.array(names, pa.string()))
        pq.write_table(rows, beside / layout.INDEX, compression="zstd")
        if target.exists():
            target.rmdir()
        beside.replace(target)
    except OSError as error:
        raise layout.unwritable(target, error) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return len(store)
