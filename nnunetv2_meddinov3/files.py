"""Files: put in place whole or not at all, rows of JSON, checksums.

Everything that this package writes goes through here: the bytes go to a ``.part`` file beside the
target, which a rename then puts in place, so a killed writer leaves the old file or the new one.
A folder is replaced by two renames: a writer killed between them leaves neither.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from nnunetv2_meddinov3.errors import UserError, first_line

_BLOCK = 1 << 20  # bytes read or written at once
_ABANDONED_AFTER_S = 24 * 3600  # a writer on another machine writes no file for that long
_PART = re.compile(r"\.(?P<host>[\w-]+)-(?P<pid>\d+)-\d+\.part$")
_HOST = re.sub(r"[^\w-]", "_", socket.gethostname())
_numbers = itertools.count()
_in_progress: set[str] = set()


@contextlib.contextmanager
def replacing(
    path: Path, *, keep_existing: bool = False, failures: tuple[type[Exception], ...] = ()
) -> Iterator[Path]:
    """Yield a path beside ``path`` to write to, and put it in place only if nothing failed.

    What is written may be a file, which is flushed to the disk first and keeps the permissions of
    the one it replaces, or a folder.

    Args:
        path: The target; a link is followed.
        keep_existing: Keep the file of the first of several writers.
        failures: What a library raises, besides ``OSError``, where it cannot write.

    Raises:
        UserError: If it cannot be written; the target is as it was.
    """
    path = path.resolve()
    expected: tuple[type[Exception], ...] = (OSError, *failures)
    try:
        with part_beside(path) as part:
            yield part
            _put_in_place(part, path, keep_existing)
    except expected as error:
        raise unwritable(path, error) from error


@contextlib.contextmanager
def part_beside(path: Path) -> Iterator[Path]:
    """Yield a name beside a path that no other process uses; what has it at the end is deleted.

    If this process is killed before, ``sweep_leftovers`` deletes it.
    """
    part = _part_beside(path)
    _in_progress.add(part.name)
    try:
        yield part
    finally:
        _remove(part)
        _in_progress.discard(part.name)


def write_bytes(path: Path, data: bytes, keep_existing: bool = False) -> None:
    """Write a whole file.

    Args:
        path: The file.
        data: Its bytes.
        keep_existing: Keep the file of the first of several writers.

    Raises:
        UserError: If it cannot be written (folder not writable, disk full).
    """
    if keep_existing and path.is_file():
        return
    with replacing(path, keep_existing=keep_existing) as part, part.open("wb") as file:
        for start in range(0, len(data), _BLOCK):
            file.write(data[start : start + _BLOCK])


def write_text(path: Path, text: str) -> None:
    """Write a whole text file, in UTF-8.

    Raises:
        UserError: If it cannot be written.
    """
    write_bytes(path, text.encode())


def unwritable(path: Path, error: Exception) -> UserError:
    """Return the sentence about a file or folder that could not be written."""
    return UserError(
        f"{path} must be writable, but: {first_line(error)}; make room or choose another folder, "
        "then run again (what was written before is kept)."
    )


def copy_file(source: Path, target: Path) -> None:
    """Copy a file; the target exists whole or not at all.

    Raises:
        OSError: If the source cannot be opened.
        UserError: If the target cannot be written.
    """
    with source.open("rb") as file, replacing(target) as part, part.open("wb") as copy:
        shutil.copyfileobj(file, copy, _BLOCK)


def existing(path: str | os.PathLike[str]) -> Path | None:
    """Return a path as a user gave it, with its ``~`` expanded, or None if nothing is there."""
    try:
        expanded = Path(path).expanduser()
        return expanded if expanded.exists() else None
    except (OSError, RuntimeError, ValueError):  # too long a name, an unknown ~user, a NUL
        return None


def sweep_leftovers(folder: Path) -> None:
    """Delete what killed writers left in a folder, but not what is still being written."""
    for part in folder.glob("*.part"):
        if is_leftover(part):
            _remove(part)


def is_leftover(part: Path) -> bool:
    """Return whether the writer of this ``.part`` is gone.

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


def check_writable(folder: Path) -> None:
    """Refuse a folder in which nothing can be written, without leaving anything there.

    Args:
        folder: May be missing; then the nearest folder above it is tried.

    Raises:
        UserError: If it cannot be made or written to.
    """
    nearest = folder.absolute()
    try:
        while not os.path.lexists(nearest) and nearest != nearest.parent:
            nearest = nearest.parent
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise unwritable(folder, error) from error


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a JSONL file, none if it is missing; skip a line that a kill tore.

    Args:
        path: One JSON object a line.
    """
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write a whole JSONL file.

    Raises:
        UserError: If it cannot be written.
    """
    write_text(path, "".join(f"{json.dumps(row)}\n" for row in rows))


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Append a row to a JSONL file, on a line of its own also where a kill tore the last one.

    Raises:
        OSError: If it cannot be written.
    """
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            is_torn = file.read(1) != b"\n"
        else:
            is_torn = False
        file.write(b"\n" * is_torn + json.dumps(row).encode() + b"\n")


def sha256(data: bytes) -> str:
    """Return the hash of bytes, hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def file_sha256(path: Path | str) -> str:
    """Return the hash of a file, as ``sha256sum`` prints it.

    Raises:
        OSError: If it cannot be read.
    """
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _part_beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.{_HOST}-{os.getpid()}-{next(_numbers)}.part")


def _put_in_place(part: Path, path: Path, keep_existing: bool) -> None:
    if part.is_dir():
        _replace_folder(part, path)
    else:
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        if keep_existing:
            _link(part, path)
        else:
            if path.exists():
                shutil.copymode(path, part)
            part.replace(path)
    _sync_folder(path.parent)


def _replace_folder(part: Path, path: Path) -> None:
    """Rename the old folder away first: a rename replaces files only, and deleting takes time."""
    if not path.is_dir():
        part.replace(path)
        return
    old = _part_beside(path)
    path.replace(old)
    try:
        part.replace(path)
    except OSError:
        old.replace(path)
        raise
    _remove(old)


def _link(part: Path, path: Path) -> None:
    """Put a file in its place unless another is there, which a rename would replace."""
    try:
        path.hardlink_to(part)
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links
        part.replace(path)


def _remove(part: Path) -> None:
    if part.is_dir():
        shutil.rmtree(part, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make a rename in a folder last, where the system can (POSIX)."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
