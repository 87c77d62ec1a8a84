"""Finding damage in a store: every byte of every file is covered by a checksum."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from nnunetv2_meddinov3 import files
from nnunetv2_meddinov3.errors import UserError, first_line
from nnunetv2_meddinov3.progress import Progress
from nnunetv2_meddinov3.store import layout
from nnunetv2_meddinov3.store.codec import open_array
from nnunetv2_meddinov3.store.fingerprints import slice_sha256
from nnunetv2_meddinov3.store.index import read_catalogue, read_records
from nnunetv2_meddinov3.store.records import VolumeRecord, read_record
from nnunetv2_meddinov3.store.sharing import is_lock, refuse_written

_VOLUMES_PER_LINE = 100  # of progress, where it is not a bar
_AGAIN = "run the same `meddinov3 curate` again"


def verify(folder: Path | str, stream: TextIO | None = None) -> list[str]:
    """Return what is wrong with a store, one sentence each; an empty list if nothing is.

    All files are read and compared with their checksums, all slices with those of their records,
    the index and the manifest with all records, and files that belong to nothing are named.

    Args:
        folder: The store; nothing in it is changed.
        stream: Where to write how many volumes are checked, None for nowhere.

    Raises:
        UserError: If there is no store, or a process writes to it.
    """
    folder = Path(folder)
    if not (folder / layout.STORE).is_file():
        layout.read_options(folder)
    refuse_written(folder)
    found: list[str] = []
    options: dict[str, Any] | None = None
    try:
        options = layout.read_options(folder)
    except UserError as error:
        found.append(str(error))
    manifest, about_manifest = _manifest(folder)
    volumes, about_records, about_arrays = _records(folder, manifest, stream)
    about_skips = [*_skips(folder), *_key(folder)]
    found += about_manifest + about_records + about_arrays + about_skips
    if not about_records and not about_skips and options is not None:
        found += _index(folder, manifest, options)
    known = {each["volume_id"] for each in manifest.get("sources", [])} | volumes
    return found + sorted(_strays(folder, known))


def _manifest(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Return the manifest, empty where it is missing or damaged, and sentences about it."""
    path = folder / layout.MANIFEST
    if not path.is_file():
        return {}, [f"{path} is missing, so curating has not finished: {_AGAIN}."]
    try:
        return layout.unsealed(path.read_bytes(), "manifest_sha256"), []
    except layout.Damaged as error:
        return {}, [f"the manifest {path} {error}: {_AGAIN}, which rebuilds it."]


def _records(
    folder: Path, manifest: dict[str, Any], stream: TextIO | None
) -> tuple[set[str], list[str], list[str]]:
    """Return the volumes that intact records name, sentences about records, and about arrays."""
    expected = {layout.record_name(s["source_key"]): s for s in manifest.get("sources", [])}
    present = {path.name for path in (folder / layout.RECORDS).glob("*.json")}
    volumes: set[str] = set()
    about_records: list[str] = []
    about_arrays: list[str] = []
    names = sorted(present | set(expected))
    progress = Progress(len(names), "volumes", every=_VOLUMES_PER_LINE, stream=stream)
    for name in names:
        path = folder / layout.RECORDS / name
        source = expected.get(name)
        whose = "" if source is None else _whose(source["volume_id"], source["source_key"])
        try:
            record = read_record(path)
            if layout.record_name(record.source_key) != name:
                raise layout.Damaged(f"is that of another source, {record.source_key}")
            volumes.add(record.volume_id)
            about_arrays += _array(folder, record)
        except FileNotFoundError:
            about_records.append(f"the record {path}{whose} is missing: {_AGAIN}.")
        except layout.Damaged as error:
            about_records.append(f"the record {path}{whose} {error}: delete it and {_AGAIN}.")
        progress.advance()
    progress.close()
    return volumes, about_records, about_arrays


def _whose(volume_id: str, source_key: str) -> str:
    return f" of volume {volume_id} (from {source_key})"


def _array(folder: Path, record: VolumeRecord) -> Iterator[str]:
    """Yield sentences about the array of one record."""
    path = folder / layout.array_name(record.volume_id)
    whose = _whose(record.volume_id, record.source_key)
    fix = f"delete it and {_AGAIN}"
    if not path.is_file():
        yield f"the array {path}{whose} is missing: {_AGAIN}."
        return
    size = path.stat().st_size
    if size != record.array_bytes:
        yield f"the array {path}{whose} has {size} bytes, not {record.array_bytes}: {fix}."
        return
    try:
        # Only what is known to be whole is decompressed: damaged sizes could ask for any memory.
        if files.file_sha256(path) != record.array_sha256:
            yield f"the array {path}{whose} is not what was written (checksum differs): {fix}."
            return
        array = open_array(path)
        wrong = [each.index for each in record.slices if _differs(array[each.index], each.sha256)]
    except OSError as error:
        yield f"the array {path}{whose} cannot be read ({first_line(error)}): {fix}."
        return
    if wrong:
        yield (
            f"the array {path}{whose} does not hold the slices of its record (first at "
            f"{wrong[0]}): {fix}."
        )


def _differs(image: Any, sha256: str) -> bool:
    return slice_sha256(image) != sha256


def _skips(folder: Path) -> Iterator[str]:
    """Yield sentences about the notes on sources that did not enter."""
    for path in sorted((folder / layout.SKIPPED).glob("*.json")):
        try:
            layout.unsealed(path.read_bytes(), "skip_sha256")
        except layout.Damaged as error:
            yield f"{path} {error}: delete it and {_AGAIN}."


def _key(folder: Path) -> Iterator[str]:
    """Yield a sentence about a key that is damaged; a copy for readers does without one."""
    path = folder / layout.KEY
    try:
        if path.is_file():
            layout.unsealed(path.read_bytes(), "key_sha256")
    except layout.Damaged as error:
        yield f"the key {path} {error}: restore it from a copy."
    except PermissionError:
        return  # it is its owner's alone


def _index(folder: Path, manifest: dict[str, Any], options: dict[str, Any]) -> Iterator[str]:
    """Yield sentences about the index; the records are intact."""
    for name, sha256 in manifest.get("index_sha256", {}).items():
        path = folder / name
        if not path.is_file():
            yield f"the index {path} is missing: {_AGAIN}, which rebuilds it."
        elif files.file_sha256(path) != sha256:
            yield f"the index {path} is not what was written (checksum differs): {_AGAIN}."
    catalogue = read_catalogue(folder, options, read_records(folder, in_order=False))
    now = catalogue.about["records_sha256"]
    if manifest and now != manifest["records_sha256"]:
        yield (
            f"the index of {folder} does not list what its records hold, since curating was "
            f"interrupted or still runs: {_AGAIN}."
        )
    splits = folder / layout.SPLITS
    if splits.is_file():
        fix = "delete it, or split again with `meddinov3 store split`"
        try:
            if layout.unsealed(splits.read_bytes(), "splits_sha256")["records_sha256"] != now:
                yield f"{splits} is of an older index, whose rows had other numbers: {fix}."
        except layout.Damaged as error:
            yield f"{splits} {error}: {fix}."


def _strays(folder: Path, volumes: set[str]) -> Iterator[str]:
    """Yield sentences about files that belong to nothing; hidden files are the system's."""
    named = {layout.array_name(volume) for volume in volumes} | layout.FILES
    for place, _, names in os.walk(folder):
        for name in names:
            path = Path(place, name)
            relative = path.relative_to(folder).as_posix()
            if name.startswith(".") or relative in named or _is_json(path, folder):
                continue
            if is_lock(relative):
                yield f"{path} was left by a writer that was killed: {_AGAIN}, which deletes it."
            elif not name.endswith(".part"):
                yield f"{path} belongs to no record: delete it, or {_AGAIN} if one was interrupted."
            elif files.is_leftover(path):
                yield f"{path} was left by an interrupted writer: {_AGAIN}, which deletes it."


def _is_json(path: Path, folder: Path) -> bool:
    """Return whether it is a record or a skip, which were checked already."""
    return path.suffix == ".json" and path.parent in (
        folder / layout.RECORDS,
        folder / layout.SKIPPED,
    )
