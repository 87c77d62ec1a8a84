"""The files of a store: their names, how they are written whole, and how damage shows."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nnunetv2_meddinov3.errors import UserError

FORMAT = 1
STORE = "store.json"
INDEX = "index.parquet"
MAPPED_INDEX = "index.arrow"
MANIFEST = "manifest.json"
SPLITS = "splits.json"
REPORT = "report.html"
VOLUMES = "volumes"
RECORDS = "records"
SKIPPED = "skipped"
FILES = {STORE, INDEX, MAPPED_INDEX, MANIFEST, SPLITS, REPORT}
FOLDERS = {VOLUMES, RECORDS, SKIPPED}

_BLOCK = 1 << 20  # bytes written at once
_ABANDONED_AFTER_S = 24 * 3600  # a writer on another machine writes no file for that long
_PART = re.compile(r"\.(?P<host>[\w-]+)-(?P<pid>\d+)-\d+\.part$")
_HOST = re.sub(r"[^\w-]", "_", socket.gethostname())
_numbers = itertools.count()
_in_progress: set[str] = set()


class Damaged(ValueError):
    """A file of a store is not what was written; the message says how, without the path."""


def name_of(source_key: str) -> str:
    """File name of the record or the skip of a source."""
    return f"{hashlib.sha256(source_key.encode()).hexdigest()[:32]}.json"


def array_name(volume_id: str) -> str:
    """Path of an array, relative to the store, posix."""
    return f"{VOLUMES}/{volume_id}.b2nd"


def sealed(values: dict[str, Any], seal: str) -> bytes:
    """JSON with sorted keys whose last field ``seal`` is the SHA-256 of all bytes before it.

    Raises:
        ValueError: If a value is NaN or infinite.
    """
    body = json.dumps(values, sort_keys=True, ensure_ascii=False, allow_nan=False)[:-1].encode()
    return body + _seal(body, seal)


def unsealed(data: bytes, seal: str) -> dict[str, Any]:
    """The values of ``sealed``.

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
    return f', "{seal}": "{hashlib.sha256(body).hexdigest()}"}}\n'.encode()


def read_options(folder: Path) -> dict[str, Any]:
    """The options a store was made with.

    Raises:
        UserError: If there is no store, it is damaged, or of another format.
    """
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
    return values["options"]


def check_format(number: int, folder: Path) -> None:
    """Refuses a store of a format that is not ours.

    Raises:
        UserError: If the format differs.
    """
    if number != FORMAT:
        raise UserError(
            f"{folder} must be a store of format {FORMAT}, but has format {number}: use the "
            "version of nnunetv2_meddinov3 that made it, or curate again into another folder."
        )


def write_atomically(path: Path, data: bytes, keep_existing: bool = False) -> None:
    """Writes a file beside its place and puts it there whole, safe against a loss of power.

    Args:
        path: the file.
        data: its bytes.
        keep_existing: of several writers, the first one's file stays.

    Raises:
        UserError: If the file cannot be written (folder not writable, disk full).
    """
    if keep_existing and path.is_file():
        return
    part = path.with_name(f"{path.name}.{_HOST}-{os.getpid()}-{next(_numbers)}.part")
    _in_progress.add(part.name)
    try:
        with part.open("wb") as file:
            for start in range(0, len(data), _BLOCK):
                file.write(data[start : start + _BLOCK])
            file.flush()
            os.fsync(file.fileno())
        if keep_existing:
            _link(part, path)
        else:
            part.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise unwritable(path, error) from error
    finally:
        _in_progress.discard(part.name)


def unwritable(path: Path, error: OSError) -> UserError:
    """The sentence about a file or folder that could not be written."""
    return UserError(
        f"{path} must be writable, but: {error.strerror or error}; make room or choose another "
        "folder, then run again (what was written before is kept)."
    )


def _link(part: Path, path: Path) -> None:
    """Puts a file in its place unless another is there, which a rename would replace."""
    try:
        path.hardlink_to(part)
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links
        part.replace(path)
        return
    part.unlink()


def _sync_folder(folder: Path) -> None:
    """Makes a rename in a folder last, where the system can (POSIX)."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Waits until no other process is in the same block for the same store.

    The lock ends with its process. Where the system or the file system has none, nobody waits.

    Raises:
        UserError: If the store cannot be written.
    """
    try:
        file = (folder / STORE).open("r+b")
    except OSError as error:
        raise unwritable(folder / STORE, error) from error
    with file:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def sweep_leftovers(folder: Path) -> None:
    """Deletes what killed writers left half written; files being written now stay."""
    for place in (folder, *(folder / name for name in FOLDERS)):
        for part in place.glob("*.part"):
            if is_leftover(part):
                part.unlink(missing_ok=True)


def is_leftover(part: Path) -> bool:
    """Whether nobody writes this ``.part`` file any more.

    On this machine its process tells; of another machine's only its age is known.
    """
    match = _PART.search(part.name)
    if match is None:
        return False
    if match["host"] != _HOST or os.name != "posix":
        try:
            return time.time() - part.stat().st_mtime > _ABANDONED_AFTER_S
        except FileNotFoundError:
            return False
    pid = int(match["pid"])
    if pid == os.getpid():
        return part.name not in _in_progress
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False
