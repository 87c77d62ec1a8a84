"""The files of a store: their names and their checksums."""

from __future__ import annotations

import hashlib
import json
import secrets
from pathlib import Path
from typing import Any

from nnunetv2_meddinov3 import files
from nnunetv2_meddinov3.errors import UserError

FORMAT = 1
STORE = "store.json"
KEY = "store.key"
INDEX = "index.parquet"
MAPPED_INDEX = "index.arrow"
MANIFEST = "manifest.json"
SPLITS = "splits.json"
REPORT = "report.html"
VOLUMES = "volumes"
RECORDS = "records"
SKIPPED = "skipped"
FILES = {STORE, KEY, INDEX, MAPPED_INDEX, MANIFEST, SPLITS, REPORT}
LOCKS = ("lock.json", "lock-")  # names of locks begin so, see ``sharing``
FOLDERS = {VOLUMES, RECORDS, SKIPPED}


class Damaged(ValueError):
    """A file of a store is not what was written; the message says how, without the path."""


def record_name(source_key: str) -> str:
    """Return the file name of the record, or of the skip, of a source."""
    return f"{hashlib.sha256(source_key.encode()).hexdigest()[:32]}.json"


def array_name(volume_id: str) -> str:
    """Return the path of an array, relative to the store, posix."""
    return f"{VOLUMES}/{volume_id}.b2nd"


def sealed(values: dict[str, Any], seal: str) -> bytes:
    """Return JSON with sorted keys whose last field ``seal`` is the SHA-256 of all bytes before it.

    Raises:
        ValueError: If a value is NaN or infinite.
    """
    body = json.dumps(values, sort_keys=True, ensure_ascii=False, allow_nan=False)[:-1].encode()
    return body + _seal(body, seal)


def unsealed(data: bytes, seal: str) -> dict[str, Any]:
    """Return the values that ``sealed`` was given.

    Raises:
        Damaged: If any byte differs from what was written.
    """
    body = data[: -len(_seal(b"", seal))]
    if body + _seal(body, seal) != data:
        raise Damaged("is not what was written (its checksum differs)")
    values = json.loads(data)
    del values[seal]
    return values


def _seal(body: bytes, seal: str) -> bytes:
    return f', "{seal}": "{files.sha256(body)}"}}\n'.encode()


def read_options(folder: Path) -> dict[str, Any]:
    """Read the options a store was made with.

    Raises:
        UserError: If there is no store, it is damaged, or of another format.
    """
    return _read_store(folder)["options"]


def is_keyed(folder: Path) -> bool:
    """Return whether a store was made with a key; those of before have none.

    Raises:
        UserError: As ``read_options``.
    """
    return bool(_read_store(folder).get("keyed", False))


def read_key(folder: Path) -> bytes | None:
    """Return the secret key of a store, 32 bytes; None where it was made without.

    It is for hashes in this store alone, and nobody who only reads slices needs it.

    Raises:
        UserError: If the store was made with a key that is missing or damaged; as
            ``read_options``.
    """
    if not is_keyed(folder):
        return None
    path = folder / KEY
    try:
        return bytes.fromhex(unsealed(path.read_bytes(), "key_sha256")["key"])
    except (OSError, Damaged, KeyError, ValueError) as error:
        why = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
        raise UserError(
            f"a store is continued with its key, but {path} {why}: copy it from where the store "
            "was made, let those who write the store read it, or curate into another folder."
        ) from error


def write_key(folder: Path, key: bytes | None = None) -> None:
    """Give a folder that becomes a store a key, unless it has one.

    Only the user who makes the store may read the file. Where several processes may make one store,
    call this in ``sharing.one_at_a_time``.

    Args:
        folder: Of the store.
        key: 32 bytes; random ones by default.

    Raises:
        UserError: If it cannot be written.
    """
    path = folder / KEY
    if path.is_file():
        return
    data = sealed({"key": (key or secrets.token_bytes(32)).hex()}, "key_sha256")
    with files.replacing(path, keep_existing=True) as part:
        part.touch(mode=0o600)
        part.write_bytes(data)


def check_place(folder: Path) -> None:
    """Refuse a folder that is no store and holds other files.

    Raises:
        UserError: With the name of a file.
        OSError: If it cannot be read.
    """
    if (folder / STORE).is_file() or not folder.is_dir():
        return
    others = [path.name for path in folder.iterdir() if not _may_precede(path.name)]
    if others:
        raise UserError(
            f"{folder} must be a slice store or an empty folder, but holds other files such as "
            f"{min(others)}: give another folder."
        )


def _may_precede(name: str) -> bool:
    """Return whether a writer killed while making the store, or the system, may have left it."""
    return name in FOLDERS or name.startswith((".", STORE, KEY, *LOCKS))


def _read_store(folder: Path) -> dict[str, Any]:
    path = folder / STORE
    if not path.is_file():
        raise UserError(
            f"{folder} must be a slice store (a folder with {STORE}), but has no such file: give "
            "the folder of a store, or make one with `meddinov3 curate`."
        )
    try:
        values = unsealed(path.read_bytes(), "store_sha256")
    except Damaged as error:
        raise UserError(
            f"{path} {error}: restore it from a copy, or curate into another folder."
        ) from error
    check_format(values["format"], folder)
    return values


def check_format(number: int, folder: Path) -> None:
    """Refuse a store of another format.

    Raises:
        UserError: If the format differs.
    """
    if number != FORMAT:
        raise UserError(
            f"{folder} must be a store of format {FORMAT}, but has format {number}: use the "
            "version of nnunetv2_meddinov3 that made it, or curate again into another folder."
        )
