"""From the records of a store to its index and manifest, whatever order they were written in."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.store import arrays, layout
from nnunetv2_meddinov3.store.records import SliceRecord, VolumeRecord
from nnunetv2_meddinov3.store.writer import read_record

METADATA = b"meddinov3"  # key of ours in the schema of the index
_ROWS_PER_GROUP = 1 << 20
_VOLUME = "_volume"  # number of the volume a row belongs to, while the table is built

# Columns that differ from slice to slice, and those that a volume's slices share.
_OF_SLICES: dict[str, tuple[pa.DataType, Callable[[SliceRecord], Any]]] = {
    "slice": (pa.int32(), lambda each: each.index),
    "z": (pa.int32(), lambda each: each.z),
    "position_mm": (pa.float64(), lambda each: each.position_mm),
    "body_fraction": (pa.float64(), lambda each: each.body_fraction),
    "saturated_fraction": (pa.float64(), lambda each: each.saturated_fraction),
    "padding_fraction": (pa.float64(), lambda each: each.padding_fraction),
    "hu_min": (pa.float64(), lambda each: each.hu_min),
    "hu_max": (pa.float64(), lambda each: each.hu_max),
    "hu_mean": (pa.float64(), lambda each: each.hu_mean),
    "flags": (pa.list_(pa.string()), lambda each: each.flags),
    "sha256": (pa.string(), lambda each: each.sha256),
    "phash": (pa.string(), lambda each: each.phash),
}
_NAME = pa.dictionary(pa.int32(), pa.string())
_OF_VOLUMES: dict[str, tuple[pa.DataType, Callable[[VolumeRecord], Any]]] = {
    "volume_id": (_NAME, lambda each: each.volume_id),
    "file": (_NAME, lambda each: layout.array_name(each.volume_id)),
    "source_key": (_NAME, lambda each: each.source_key),
    "dataset": (_NAME, lambda each: each.dataset),
    "patient": (_NAME, lambda each: each.patient),
    "modality": (_NAME, lambda each: each.modality),
    "orientation": (_NAME, lambda each: each.orientation),
    "windowed": (pa.bool_(), lambda each: each.windowed),
    "height": (pa.int32(), lambda each: each.shape[1]),
    "width": (pa.int32(), lambda each: each.shape[2]),
    **{
        f"spacing_{axis}": (pa.float64(), lambda each, i=i: each.spacing_mm and each.spacing_mm[i])
        for i, axis in enumerate("zyx")
    },
    **{
        f"intensity_{end}": (pa.float64(), lambda each, end=end: (each.intensity or {}).get(end))
        for end in ("low", "high", "stored_low", "stored_high")
    },
}


class BuiltIndex(NamedTuple):
    """The bytes of everything that is derived from the records of a store, and their hash."""

    records_sha256: str
    parquet: bytes
    mapped: bytes
    manifest: bytes


def build_index(folder: Path | str) -> Path:
    """Writes ``index.parquet``, its memory-mapped copy and ``manifest.json`` from all records.

    Rows are sorted by volume and slice. A slice that several volumes hold is listed once, with the
    volume whose (dataset, source key, z) sorts first. Processes that finish together may all call
    this: they take turns, so the last one reads every record.

    Returns:
        The path of ``index.parquet``.

    Raises:
        UserError: If there is no store, a record is damaged, or a file cannot be written.
    """
    folder = Path(folder)
    options = layout.read_options(folder)
    with layout.one_at_a_time(folder):
        built = derive(folder, options)
        # The parquet file first: a reader takes the mapped copy only where it belongs to it.
        layout.write_atomically(folder / layout.INDEX, built.parquet)
        layout.write_atomically(folder / layout.MAPPED_INDEX, built.mapped)
        layout.write_atomically(folder / layout.MANIFEST, built.manifest)
    return folder / layout.INDEX


def derive(folder: Path, options: dict[str, Any]) -> BuiltIndex:
    """What ``build_index`` writes, as bytes.

    Raises:
        UserError: If a record is damaged.
    """
    skips = read_skips(folder)
    everything, sources, versions = tabulate(read_records(folder))
    table = without_duplicates(everything)
    listed = Counter(table["source_key"].to_pylist())
    for source in sources:
        source["duplicates"] = source["slices"] - listed[source["source_key"]]
    about = {"format": layout.FORMAT, "options": options}
    fingerprint = json.dumps([about, sources, skips], sort_keys=True).encode()
    about["records_sha256"] = arrays.sha256(fingerprint)
    table = table.replace_schema_metadata({METADATA: json.dumps(about, sort_keys=True)})
    parquet, mapped = _parquet(table), _mapped(table)
    manifest = {
        **about,
        "index_sha256": {
            layout.INDEX: arrays.sha256(parquet),
            layout.MAPPED_INDEX: arrays.sha256(mapped),
        },
        "volumes": len(sources),
        "slices": len(table),
        "duplicates": len(everything) - len(table),
        "versions": {name: sorted(found) for name, found in versions.items()},
        "sources": sources,
        "skipped": [{"source_key": key, "reason": reason} for key, reason in skips],
    }
    sealed = layout.sealed(manifest, "manifest_sha256")
    return BuiltIndex(about["records_sha256"], parquet, mapped, sealed)


def tabulate(
    records: Iterable[VolumeRecord],
) -> tuple[pa.Table, list[dict[str, Any]], dict[str, set[str]]]:
    """All slices of all volumes in the order of the records, duplicates included.

    Returns:
        The table; a summary of each source; for each tool the versions that were used.
    """
    parts: list[pa.RecordBatch] = []
    columns: dict[str, list] = {name: [] for name in _OF_VOLUMES}
    sources: list[dict[str, Any]] = []
    versions: dict[str, set[str]] = {}
    for number, record in enumerate(records):
        for name, (_, value) in _OF_VOLUMES.items():
            columns[name].append(value(record))
        slices = sorted(record.slices, key=lambda each: each.z)
        part = {n: pa.array([f(s) for s in slices], type=t) for n, (t, f) in _OF_SLICES.items()}
        part[_VOLUME] = pa.array(np.full(len(slices), number, np.int64))
        parts.append(pa.RecordBatch.from_pydict(part))
        for tool, version in record.versions.items():
            versions.setdefault(tool, set()).add(version)
        names = ("source_key", "source_sha256", "dataset", "patient", "volume_id", "array_sha256")
        counts = {"slices": len(slices), "left_out": len(record.left_out)}
        sources.append({name: getattr(record, name) for name in names} | counts)
    schema = pa.schema([(n, t) for n, (t, _) in _OF_SLICES.items()] + [(_VOLUME, pa.int64())])
    table = pa.Table.from_batches(parts, schema=schema).combine_chunks()
    number = table[_VOLUME]
    for name, (kind, _) in _OF_VOLUMES.items():
        plain = pa.string() if kind == _NAME else kind
        column = pa.array(columns[name], type=plain)
        column = column.dictionary_encode() if kind == _NAME else column
        table = table.append_column(pa.field(name, kind), column.take(number.combine_chunks()))
    return table.drop([_VOLUME]), sources, versions


def without_duplicates(everything: pa.Table) -> pa.Table:
    """The first row of each content, sorted by volume and slice, volumes' columns in front."""
    first = everything.select(["sha256"]).append_column("row", pa.array(np.arange(len(everything))))
    kept = first.group_by("sha256", use_threads=False).aggregate([("row", "min")])["row_min"]
    table = everything.take(kept)
    order = pa.table({"v": table["volume_id"].cast(pa.string()), "s": table["slice"]})
    order = pc.sort_indices(order, [("v", "ascending"), ("s", "ascending")])
    table = table.take(order).combine_chunks()
    lead = ["volume_id", "file", "slice", "z"]
    return table.select([*lead, *(name for name in table.column_names if name not in lead)])


def read_records(folder: Path | str) -> Iterator[VolumeRecord]:
    """All records of a store, one in memory at a time, sorted by dataset and source key.

    Raises:
        UserError: If a record is damaged.
    """
    paths = []
    for path in (Path(folder) / layout.RECORDS).glob("*.json"):
        record = _undamaged(path)
        paths.append((record.dataset, record.source_key, path))
    for _, _, path in sorted(paths):
        yield _undamaged(path)


def _undamaged(path: Path) -> VolumeRecord:
    try:
        return read_record(path)
    except layout.Damaged as error:
        raise UserError(
            f"the record {path} {error}: delete it and curate its source again "
            "(`meddinov3 store verify` lists all damage)."
        ) from error


def read_skips(folder: Path | str) -> list[tuple[str, str]]:
    """(source key, reason) of the sources that did not enter, sorted.

    Raises:
        UserError: If a file is damaged.
    """
    skips = []
    for path in (Path(folder) / layout.SKIPPED).glob("*.json"):
        if (Path(folder) / layout.RECORDS / path.name).is_file():
            continue  # entered at another time
        try:
            values = layout.unsealed(path.read_bytes(), "skip_sha256")
        except layout.Damaged as error:
            raise UserError(f"{path} {error}: delete it and curate again.") from error
        skips.append((values["source_key"], values["reason"]))
    return sorted(skips)


def _parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", row_group_size=_ROWS_PER_GROUP)
    return sink.getvalue()


def _mapped(table: pa.Table) -> bytes:
    """Arrow's own layout, uncompressed, which processes can map into memory and share."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()
