"""Writing a store: one array and one record per source, each put in its place whole."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from nnunetv2_meddinov3 import files
from nnunetv2_meddinov3.errors import UserError, first_line
from nnunetv2_meddinov3.store import codec, layout
from nnunetv2_meddinov3.store.records import VolumeRecord, read_record, volume_identity
from nnunetv2_meddinov3.store.sharing import one_at_a_time


class StoreWriter:
    """Adds volumes to a store; any number of processes may do so at once.

    A volume has entered once its record exists, which is written after its array, so a writer may
    be killed at any moment: the store is then as if the volume had never been started.

    Args:
        folder: The store; made where it does not exist.
        options: What the slices depend on, as JSON can hold it; a store has one set of options.
        keyed: Whether a new store gets a key for the hashes of patients.
        new_key: The key of a new store; random by default. All writers of one store share its key.

    Raises:
        UserError: If the folder cannot be written, holds something else, or was made with other
            options.
    """

    def __init__(
        self,
        folder: Path | str,
        options: dict[str, Any],
        *,
        keyed: bool = True,
        new_key: bytes | None = None,
    ):
        self.folder = Path(folder)
        self.options = json.loads(json.dumps(options))
        _make_folders(self.folder)
        for place in (self.folder, *(self.folder / name for name in layout.FOLDERS)):
            files.sweep_leftovers(place)
        if not (self.folder / layout.STORE).is_file():
            with one_at_a_time(self.folder):
                self._make(keyed, new_key)
        made_with = layout.read_options(self.folder)
        if made_with != self.options:
            raise UserError(
                f"{self.folder} must be continued with the options it was made with, but "
                f"{_differences(made_with, self.options)}: give the same options or another "
                "folder."
            )

    def _make(self, keyed: bool, new_key: bytes | None) -> None:
        """Make the folder a store, unless another process did so meanwhile."""
        path = self.folder / layout.STORE
        if keyed and not path.is_file():
            layout.write_key(self.folder, new_key)  # first: a keyed store has its key
        values = {"format": layout.FORMAT, "options": self.options}
        data = layout.sealed(values | ({"keyed": True} if keyed else {}), "store_sha256")
        files.write_bytes(path, data, keep_existing=True)

    def key(self) -> bytes | None:
        """Return the secret key of the store, None where it was made without.

        Raises:
            UserError: If it is missing or damaged.
        """
        return layout.read_key(self.folder)

    def has(self, source_key: str, source_sha256: str) -> bool:
        """Return whether a source has entered as it is now, with its array in place."""
        return self.present(source_key, source_sha256) is not None

    def present(self, source_key: str, source_sha256: str) -> VolumeRecord | None:
        """Return the record of a source that has entered as it is now, None if it has not."""
        try:
            record = read_record(self._record_path(source_key))
            size = (self.folder / layout.array_name(record.volume_id)).stat().st_size
        except (FileNotFoundError, layout.Damaged):
            return None
        is_whole = record.source_sha256 == source_sha256 and size == record.array_bytes
        return record if is_whole else None

    def name_patient(self, source_key: str, patient: str) -> None:
        """Correct the patient of a source that has entered.

        Raises:
            UserError: If the record cannot be written.
        """
        record = read_record(self._record_path(source_key))
        if record.patient != patient:
            self._write_record(replace(record, patient=patient))

    def remark(
        self, source_key: str, notes: Sequence[str], flag: str, marked: Sequence[int]
    ) -> int:
        """Add notes to the record of a source that has entered, and a flag to some of its slices.

        Args:
            source_key: Of the source.
            notes: What the record says already is not said again.
            flag: Of the slices.
            marked: Their indices in the stored array.

        Returns:
            The number of slices that did not have the flag.

        Raises:
            UserError: If the record cannot be written.
        """
        record = read_record(self._record_path(source_key))
        fresh = {index for index in marked if flag not in record.slices[index].flags}
        slices = [
            replace(each, flags=[*each.flags, flag]) if each.index in fresh else each
            for each in record.slices
        ]
        added = [note for note in notes if note not in record.notes]
        self._write_record(replace(record, slices=slices, notes=(*record.notes, *added)))
        return len(fresh)

    def write_volume(self, record: VolumeRecord, slices: np.ndarray) -> VolumeRecord:
        """Store the slices of one source and return its completed record.

        Args:
            record: What is known of the source; name, hash and size of the array are filled in.
            slices: (S, H, W) int16, at least one slice.

        Raises:
            UserError: If a file cannot be written.
            ValueError: If the slices are not int16, or do not fit the record.
        """
        if slices.dtype != np.int16 or slices.ndim != 3 or 0 in slices.shape:
            raise ValueError(
                f"slices must be int16 of shape (S, H, W) with at least one slice, got "
                f"{slices.dtype} of shape {slices.shape}; a source without slices is a skip."
            )
        indices = [each.index for each in record.slices]
        if tuple(record.shape) != slices.shape or indices != list(range(len(slices))):
            raise ValueError(
                f"the record must describe each of the {len(slices)} slices in order and have "
                f"their shape {slices.shape}, got {len(indices)} and shape {record.shape}."
            )
        named = replace(record, volume_id=volume_identity(slices))
        return self.adopt(named, codec.encode(slices))

    def adopt(self, record: VolumeRecord, frame: bytes) -> VolumeRecord:
        """Store an array that is compressed already, and return its completed record.

        Args:
            record: Has the ``volume_id`` of the array.
            frame: The bytes of the array file.

        Raises:
            UserError: If a file cannot be written.
        """
        frame = self._place(record.volume_id, frame)
        record = replace(record, array_sha256=files.sha256(frame), array_bytes=len(frame))
        self._write_record(record)
        name = layout.record_name(record.source_key)
        (self.folder / layout.SKIPPED / name).unlink(missing_ok=True)
        return record

    def write_skip(self, source_key: str, reason: str) -> None:
        """Note why a source did not enter; an earlier record of it stays, and outranks this.

        Raises:
            UserError: If the file cannot be written.
        """
        values = {"source_key": source_key, "reason": reason}
        path = self.folder / layout.SKIPPED / layout.record_name(source_key)
        files.write_bytes(path, layout.sealed(values, "skip_sha256"))

    def _record_path(self, source_key: str) -> Path:
        return self.folder / layout.RECORDS / layout.record_name(source_key)

    def _write_record(self, record: VolumeRecord) -> None:
        data = layout.sealed(record.to_dict(), "record_sha256")
        files.write_bytes(self._record_path(record.source_key), data)

    def _place(self, volume_id: str, frame: bytes) -> bytes:
        """Write an array unless it exists, and return the bytes of the file.

        An array that another version of the compressor made is kept, since the records of other
        sources have its checksum.
        """
        path = self.folder / layout.array_name(volume_id)
        present = path.read_bytes() if path.is_file() else b""
        if present == frame:
            return frame
        if present and _decodes_to(present, volume_id):
            return present
        files.write_bytes(path, frame)
        return frame


def _decodes_to(frame: bytes, volume_id: str) -> bool:
    try:
        return volume_identity(codec.decode(frame)) == volume_id
    except Exception:  # the decompressor raises whatever damaged bytes lead it to
        return False


def _make_folders(folder: Path) -> None:
    try:
        layout.check_place(folder)
        for name in sorted(layout.FOLDERS):
            (folder / name).mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as error:
        raise UserError(
            f"the store {folder} must be a folder that can be written, but: "
            f"{first_line(error)}; give another folder, or change its permissions."
        ) from error


def _differences(made_with: dict[str, Any], given: dict[str, Any]) -> str:
    """Return how two sets of options differ, for a sentence."""
    names = sorted(n for n in {*made_with, *given} if made_with.get(n) != given.get(n))
    return ", ".join(f"{n} was {made_with.get(n)!r} and is now {given.get(n)!r}" for n in names)
