"""The index and the manifest of a store, which follow from its records in whatever order written.

An index may list millions of slices: they pass through in batches, and only hashes stay in memory.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nnunetv2_meddinov3 import files
from nnunetv2_meddinov3.errors import UserError, first_line
from nnunetv2_meddinov3.store import layout
from nnunetv2_meddinov3.store.fingerprints import digests, first_of_equal
from nnunetv2_meddinov3.store.records import SliceRecord, VolumeRecord, kind_of, read_record
from nnunetv2_meddinov3.store.sharing import one_at_a_time

METADATA = b"meddinov3"  # key of ours in the schema of the index
_ROWS_PER_BATCH = 1 << 16  # of both files, at least; 16 MB in memory


def _spacing(place: int) -> Callable[[VolumeRecord], float | None]:
    return lambda each: each.spacing_mm and each.spacing_mm[place]


def _intensity(name: str) -> Callable[[VolumeRecord], float | None]:
    return lambda each: (each.intensity or {}).get(name)


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
    **{f"spacing_{axis}": (pa.float64(), _spacing(place)) for place, axis in enumerate("zyx")},
    **{
        f"intensity_{name}": (pa.float64(), _intensity(name))
        for name in ("low", "high", "stored_low", "stored_high")
    },
}
_LEAD = ("volume_id", "file", "slice", "z")  # the first columns of an index
_SLICES = pa.schema([(name, kind) for name, (kind, _) in _OF_SLICES.items()])


@dataclass(frozen=True)
class Catalogue:
    """What the records of a store add up to: all of its index but the columns of slices.

    Attributes:
        about: Format, options and ``records_sha256``; stands in the index and in the manifest.
        skips: (source key, reason) of the sources that did not enter.
        sources: A summary of each record, sorted by dataset and source key.
        versions: For each tool the versions that were used.
        notes: Kind of a note -> number of records that have it.
        volumes: Columns that the slices of a record share, one value for each record.
        listed: For each record, whether the index lists a slice, (S,) bool in the order of z.
        places: For each record its place in the order in which records were read.
    """

    about: dict[str, Any]
    skips: list[tuple[str, str]]
    sources: list[dict[str, Any]]
    versions: dict[str, set[str]]
    notes: Counter[str]
    volumes: dict[str, pa.Array]
    listed: list[np.ndarray]
    places: list[int]

    def manifest(self, index_sha256: dict[str, str]) -> dict[str, Any]:
        """Return the values of the manifest, given the hash of each index file."""
        return {
            **self.about,
            "index_sha256": index_sha256,
            "volumes": len(self.sources),
            "slices": sum(int(each.sum()) for each in self.listed),
            "duplicates": sum(int((~each).sum()) for each in self.listed),
            "versions": {name: sorted(found) for name, found in self.versions.items()},
            "notes": dict(sorted(self.notes.items())),
            "sources": self.sources,
            "skipped": [{"source_key": key, "reason": reason} for key, reason in self.skips],
        }


def build_index(folder: Path | str) -> Path:
    """Write ``index.parquet``, its memory-mapped copy and ``manifest.json`` from all records.

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
    try:
        with one_at_a_time(folder), tempfile.TemporaryFile(dir=folder, prefix=".") as rows:
            records = _with_rows_kept(read_records(folder, in_order=False), rows)
            catalogue = read_catalogue(folder, options, records)
            index_sha256 = _write_rows(folder, catalogue, rows)
            manifest = layout.sealed(catalogue.manifest(index_sha256), "manifest_sha256")
            files.write_bytes(folder / layout.MANIFEST, manifest)
    except OSError as error:
        raise files.unwritable(folder / layout.INDEX, error) from error
    return folder / layout.INDEX


def read_catalogue(
    folder: Path, options: dict[str, Any], records: Iterable[VolumeRecord]
) -> Catalogue:
    """Sum up the records of a store, of which one at a time is in memory.

    Args:
        folder: The store.
        options: Its options.
        records: All its records, in any order.

    Raises:
        UserError: If a record or a skip is damaged.
    """
    skips = read_skips(folder)  # before the records: what enters meanwhile is not a skip
    sources, shared, found = [], [], []
    versions: dict[str, set[str]] = {}
    notes: Counter[str] = Counter()
    for record in records:
        sources.append(_summary(record))
        shared.append([value(record) for _, value in _OF_VOLUMES.values()])
        found.append(digests(each.sha256 for each in _by_z(record)))
        notes.update({kind_of(note) for note in record.notes})
        for tool, version in record.versions.items():
            versions.setdefault(tool, set()).add(version)
    places = sorted(
        range(len(sources)), key=lambda n: (sources[n]["dataset"], sources[n]["source_key"])
    )
    sources = [sources[place] for place in places]
    listed = _listed([found[place] for place in places])
    _count_duplicates(sources, listed)
    about = {"format": layout.FORMAT, "options": options}
    fingerprint = json.dumps([about, sources, skips], sort_keys=True).encode()
    about["records_sha256"] = files.sha256(fingerprint)
    volumes = _columns_of_volumes([shared[place] for place in places])
    return Catalogue(about, skips, sources, versions, notes, volumes, listed, places)


def read_records(folder: Path | str, in_order: bool = True) -> Iterator[VolumeRecord]:
    """Yield all records of a store, one in memory at a time.

    Args:
        folder: The store.
        in_order: Sort them by dataset and source key, for which each is read twice; otherwise they
            come in the order of their files.

    Raises:
        UserError: If a record is damaged.
    """
    paths = sorted((Path(folder) / layout.RECORDS).glob("*.json"))
    for path in sorted(paths, key=_order_of) if in_order else paths:
        yield _undamaged(path)


def _order_of(path: Path) -> tuple[str, str]:
    record = _undamaged(path)
    return record.dataset, record.source_key


def _undamaged(path: Path) -> VolumeRecord:
    try:
        return read_record(path)
    except layout.Damaged as error:
        raise UserError(
            f"the record {path} {error}: delete it and curate its source again "
            "(`meddinov3 store verify` lists all damage)."
        ) from error
    except OSError as error:
        raise UserError(
            f"the record {path} must be readable, but: {first_line(error)}; repair the file "
            "system or its permissions, then run again."
        ) from error


def read_skips(folder: Path | str) -> list[tuple[str, str]]:
    """Return (source key, reason) of the sources that did not enter, sorted.

    Raises:
        UserError: If a file is damaged.
    """
    skips = []
    for path in (Path(folder) / layout.SKIPPED).glob("*.json"):
        if (Path(folder) / layout.RECORDS / path.name).is_file():
            continue  # entered at another time
        try:
            values = layout.unsealed(path.read_bytes(), "skip_sha256")
        except FileNotFoundError:
            continue  # entered just now
        except layout.Damaged as error:
            raise UserError(f"{path} {error}: delete it and curate again.") from error
        skips.append((values["source_key"], values["reason"]))
    return sorted(skips)


def _with_rows_kept(records: Iterable[VolumeRecord], file: IO[bytes]) -> Iterator[VolumeRecord]:
    """Write the slices of each record to a file, one batch a record, as it passes through."""
    with pa.ipc.new_file(file, _SLICES) as writer:
        for record in records:
            slices = _by_z(record)
            columns = [
                pa.array([value(each) for each in slices], kind)
                for kind, value in _OF_SLICES.values()
            ]
            writer.write_batch(pa.record_batch(columns, schema=_SLICES))
            yield record


def _by_z(record: VolumeRecord) -> list[SliceRecord]:
    return sorted(record.slices, key=lambda each: each.z)


def _summary(record: VolumeRecord) -> dict[str, Any]:
    names = ("source_key", "source_sha256", "dataset", "patient", "volume_id", "array_sha256")
    counts = {"slices": len(record.slices), "left_out": len(record.left_out)}
    return {name: getattr(record, name) for name in names} | counts


def _listed(found: list[np.ndarray]) -> list[np.ndarray]:
    """Return which slices are the first of their content, given the digests of each record."""
    if not found:
        return []
    first = first_of_equal(np.concatenate(found))
    is_listed = first == np.arange(len(first))
    return np.split(is_listed, np.cumsum([len(each) for each in found])[:-1])


def _count_duplicates(sources: list[dict[str, Any]], listed: list[np.ndarray]) -> None:
    """Add to each source how many of its slices the index leaves out."""
    counts: Counter[str] = Counter()
    for source, each in zip(sources, listed, strict=True):
        counts[source["source_key"]] += int(each.sum())
    for source in sources:
        source["duplicates"] = source["slices"] - counts[source["source_key"]]


def _columns_of_volumes(shared: list[list[Any]]) -> dict[str, pa.Array]:
    columns = {}
    for number, (name, (kind, _)) in enumerate(_OF_VOLUMES.items()):
        values = [each[number] for each in shared]
        if kind == _NAME:
            columns[name] = pa.array(values, pa.string()).dictionary_encode()
        else:
            columns[name] = pa.array(values, kind)
    return columns


def _write_rows(folder: Path, catalogue: Catalogue, rows: IO[bytes]) -> dict[str, str]:
    """Write both files of the index and return the SHA-256 of each."""
    kinds = {name: kind for name, (kind, _) in (_OF_SLICES | _OF_VOLUMES).items()}
    names = [*_LEAD, *(name for name in kinds if name not in _LEAD)]
    about = {METADATA: json.dumps(catalogue.about, sort_keys=True)}
    schema = pa.schema([(name, kinds[name]) for name in names], about)
    with (
        files.replacing(folder / layout.MAPPED_INDEX) as mapped,
        # Put in place first: a reader takes the mapped copy only where it belongs to it.
        files.replacing(folder / layout.INDEX) as parquet,
    ):
        with (
            mapped.open("wb") as mapped_file,
            parquet.open("wb") as parquet_file,
            # Arrow's own layout, uncompressed, which processes can map into memory and share
            pa.ipc.new_file(mapped_file, schema) as mapped_writer,
            pq.ParquetWriter(parquet_file, schema, compression="zstd") as parquet_writer,
        ):
            for table in _tables(catalogue, schema, rows):
                mapped_writer.write_table(table)
                parquet_writer.write_table(_with_own_names(table))
        written = {layout.INDEX: parquet, layout.MAPPED_INDEX: mapped}
        return {name: files.file_sha256(path) for name, path in written.items()}


def _tables(catalogue: Catalogue, schema: pa.Schema, rows: IO[bytes]) -> Iterator[pa.Table]:
    """Yield the rows of the index, sorted by volume and slice, a batch at a time."""
    reader = pa.ipc.open_file(rows)
    for numbers in _batches(catalogue):
        records = [reader.get_batch(catalogue.places[number]) for number in numbers]
        slices = pa.Table.from_batches(records, _SLICES).combine_chunks()
        lengths = [len(each) for each in records]
        ids = np.array([catalogue.sources[each]["volume_id"] for each in numbers], dtype=str)
        number = np.repeat(np.array(numbers, np.int64), lengths)  # of each row: its record
        volume = np.repeat(np.unique(ids, return_inverse=True)[1], lengths)
        is_listed = [np.empty(0, bool), *(catalogue.listed[each] for each in numbers)]
        listed = np.flatnonzero(np.concatenate(is_listed))
        order = listed[np.lexsort((slices["slice"].to_numpy()[listed], volume[listed]))]
        columns = dict(zip(_SLICES.names, slices.take(order).columns, strict=True))
        of_record = pa.array(number[order])
        columns |= {name: each.take(of_record) for name, each in catalogue.volumes.items()}
        yield pa.table([columns[name] for name in schema.names], schema=schema)


def _with_own_names(table: pa.Table) -> pa.Table:
    """Reduce the names in a batch to those it uses: Parquet stores them with each batch."""
    for place, field in enumerate(table.schema):
        if field.type == _NAME:
            names = table[place].cast(pa.string()).dictionary_encode()
            table = table.set_column(place, field, names)
    return table


def _batches(catalogue: Catalogue) -> Iterator[list[int]]:
    """Yield the numbers of the records of each batch; at least one batch, the last may be small."""

    def volume_id(number: int) -> str:
        return catalogue.sources[number]["volume_id"]

    batch: list[int] = []
    rows = 0
    with_rows = [number for number, each in enumerate(catalogue.listed) if each.any()]
    for _, same_volume in groupby(sorted(with_rows, key=volume_id), key=volume_id):
        if rows >= _ROWS_PER_BATCH:
            yield batch
            batch, rows = [], 0
        for number in same_volume:
            batch.append(number)
            rows += len(catalogue.listed[number])
    yield batch
