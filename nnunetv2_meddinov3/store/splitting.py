"""Splitting a store by patient, so that no patient is in two parts."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.store import layout
from nnunetv2_meddinov3.store.index import read_records, tabulate
from nnunetv2_meddinov3.store.reader import SliceStore


def split_by_patient(
    folder: Path | str, fractions: dict[str, float], seed: int = 0
) -> dict[str, list[int]]:
    """Deals the rows of a store to named parts, and writes them to ``splits.json``.

    A patient is a (dataset, patient) pair. Patients that share a slice, because one volume is in
    two datasets, go together. The same store, fractions and seed give the same parts.

    Args:
        folder: the store.
        fractions: name to share of the slices; shares are met as nearly as whole patients allow,
            and no part stays empty.
        seed: another number gives other parts.

    Returns:
        For each name the numbers of its rows, ascending.

    Raises:
        UserError: If there is no store, its index is old, the fractions are not positive numbers
            that sum to 1, or there are fewer patients than parts.
    """
    _check(fractions)
    folder = Path(folder)
    store = SliceStore(folder)
    patients = _patients(store.rows)
    groups = _groups_of(folder, set(patients))
    group_of_row = np.array([groups[patient] for patient in patients])
    part_of_group = _deal(group_of_row, fractions, seed, folder)
    part_of_row = np.array([part_of_group[group] for group in group_of_row])
    rows = {name: np.flatnonzero(part_of_row == name).tolist() for name in fractions}
    values = {
        "seed": seed,
        "fractions": fractions,
        "records_sha256": store.records_sha256,
        "patients": {n: sorted({patients[row] for row in rows[n]}) for n in fractions},
        "rows": rows,
    }
    layout.write_atomically(folder / layout.SPLITS, layout.sealed(values, "splits_sha256"))
    return rows


def _check(fractions: dict[str, float]) -> None:
    usable = fractions and all(name and 0 < share <= 1 for name, share in fractions.items())
    if not usable or not math.isclose(sum(fractions.values()), 1, abs_tol=1e-6):
        given = ", ".join(f"{name}={share:g}" for name, share in fractions.items()) or "none"
        raise UserError(
            f"the parts of a split must be positive fractions that sum to 1, got {given}: give "
            "for example train=0.9 val=0.1."
        )


def _patients(rows: pa.Table) -> list[str]:
    """``dataset/patient`` of each row."""
    datasets, patients = (rows[name].to_pylist() for name in ("dataset", "patient"))
    return [f"{dataset}/{patient}" for dataset, patient in zip(datasets, patients, strict=True)]


def _groups_of(folder: Path, patients: set[str]) -> dict[str, str]:
    everything, _, _ = tabulate(read_records(folder))
    groups = _groups(everything)
    if not patients <= set(groups):
        raise UserError(
            f"the index of {folder} must list what its records hold, but it is older: run the "
            "same `meddinov3 curate` again."
        )
    return groups


def _groups(everything: pa.Table) -> dict[str, str]:
    """For each patient the first of the patients it is tied to by equal slices.

    Constant slices tie nobody: all empty slices of one size are equal.
    """
    names, patients = np.unique(_patients(everything), return_inverse=True)
    slices = pc.dictionary_encode(everything["sha256"].combine_chunks()).indices.to_numpy()
    telling = pc.not_equal(everything["hu_min"], everything["hu_max"]).to_numpy()
    edges = (patients[telling], slices[telling] + len(names))
    size = len(names) + len(slices)
    graph = coo_array((np.ones(len(edges[0]), bool), edges), shape=(size, size))
    _, components = connected_components(graph, directed=False)
    first: dict[int, str] = {}
    return {
        str(name): first.setdefault(component, str(name))
        for name, component in zip(names, components[: len(names)], strict=True)
    }


def _deal(
    group_of_row: np.ndarray, fractions: dict[str, float], seed: int, folder: Path
) -> dict[str, str]:
    """Group to part: in an order drawn by hash, each to the part that has least of its share."""
    groups, sizes = np.unique(group_of_row, return_counts=True)
    if len(groups) < len(fractions):
        raise UserError(
            f"{folder} must hold at least as many unrelated patients as parts, but has "
            f"{len(groups)} for {len(fractions)}: ask for fewer parts, or curate more patients."
        )
    drawn = sorted(
        zip(groups.tolist(), sizes.tolist(), strict=True),
        key=lambda each: hashlib.sha256(f"{seed}/{each[0]}".encode()).digest(),
    )
    dealt = dict.fromkeys(fractions, 0)
    parts = {}
    for group, size in drawn:
        part = min(fractions, key=lambda n: (dealt[n] / fractions[n], -fractions[n], n))
        dealt[part] += size
        parts[group] = part
    return parts
