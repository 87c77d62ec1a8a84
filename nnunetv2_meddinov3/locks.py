"""A folder for one process at a time: a lock with machine, process and time, or whose is gone."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.files import part_beside, unwritable

LOCK = "lock.json"
LOST_AFTER_S = 120.0  # a lock of another machine that was not touched for so long is nobody's
_REFRESH_S = 15.0  # a held lock is touched that often
_POLL_S = 0.1  # between two looks at a lock that is waited for


@contextlib.contextmanager
def locked(
    folder: Path,
    say: Callable[[str], None],
    *,
    name: str = LOCK,
    rule: str | None = None,
    waits: bool = False,
) -> Iterator[None]:
    """Keep a folder, or a task in it, for this process while the context lasts.

    ``lock.json`` in it names the process; it is touched every 15 s and deleted at the end. One that
    a killed process left is taken over: at once on its machine, elsewhere when it was not touched
    for two minutes.

    Args:
        folder: Made if missing.
        say: Gets a line when a lock is taken over.
        name: Of the lock's file; a folder may have several locks for several tasks.
        rule: What must hold, for the sentence; by default that one process may use the folder.
        waits: Whether to wait for the other process instead of refusing.

    Raises:
        UserError: If another process holds it, or it cannot be written.
    """
    path = folder / name
    mine = json.dumps({**_this_process(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}).encode()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while not _claim(path, mine):
            found = _holder(path)
            if found is None:
                continue  # it was released meanwhile
            if not _is_gone(path, found):
                if not waits:
                    raise _held(path, found, rule)
                time.sleep(_POLL_S)
                continue
            if _discard(path, found):
                say(f"took over {path}: {_named(found)}, which held it, is gone")
    except OSError as error:
        raise unwritable(path, error) from error
    done = threading.Event()
    thread = threading.Thread(target=_keep_fresh, args=(path, mine, done), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        with contextlib.suppress(OSError):
            if _holder(path) == mine:
                path.unlink()


def refuse_locked(folder: Path, *, name: str = LOCK, rule: str | None = None) -> None:
    """Refuse a folder that a living process holds; nothing is written.

    Args:
        folder: May be missing.
        name: As for ``locked``, and so is ``rule``.
        rule: What must hold.

    Raises:
        UserError: With that process's machine, number and start.
    """
    path = folder / name
    try:
        found = _holder(path)
    except OSError as error:
        raise unwritable(path, error) from error
    if found is not None and not _is_gone(path, found):
        raise _held(path, found, rule)


def living_holder(folder: Path, *, name: str = LOCK) -> str | None:
    """Return which living process holds a folder, None where none does.

    Args:
        folder: May be missing.
        name: As for ``locked``.

    Returns:
        Such as ``process 812 on node7 (since 2026-03-01 10:00:00 +0100)``.
    """
    path = folder / name
    try:
        found = _holder(path)
    except OSError:
        return None
    return None if found is None or _is_gone(path, found) else _named(found)


def discard_lost(folder: Path, name: str) -> None:
    """Delete a lock that a process left which is gone.

    Args:
        folder: May be missing.
        name: Of the lock's file.
    """
    path = folder / name
    with contextlib.suppress(OSError):
        found = _holder(path)
        if found is not None and _is_gone(path, found):
            _discard(path, found)


def _held(path: Path, lock: bytes, rule: str | None) -> UserError:
    return UserError(
        f"{rule or f'{path.parent} must be used by one process at a time'}, but {_named(lock)} "
        f"works on it: wait until that one ends, or give another folder ({path} may be deleted "
        "where it is known to be gone)."
    )


def _this_process() -> dict[str, Any]:
    """Return what tells this process from all others, also of other machines and containers."""
    host = socket.gethostname()
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        machine = f"{host} {boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        machine = host
    pid = os.getpid()
    return {"host": host, "machine": machine, "pid": pid, "started": _start_of(pid)}


def _start_of(pid: int) -> str | None:
    """Return when a process started, in the system's words; empty if gone, None if not known."""
    try:
        said = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return "" if Path("/proc/self/stat").exists() else None
    except OSError:
        return None
    state, *rest = said.rpartition(")")[2].split()
    return "" if state in "ZX" else rest[18]  # a killed one whose parent has not noticed yet


def _claim(path: Path, mine: bytes) -> bool:
    """Write a lock unless there is one; its content comes with it where links can be made."""
    with part_beside(path) as part:
        part.write_bytes(mine)
        try:
            path.hardlink_to(part)
            return True
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links
            pass
    try:
        with path.open("xb") as file:
            file.write(mine)
    except FileExistsError:
        return False
    return True


def _holder(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _facts(lock: bytes) -> dict[str, Any]:
    try:
        facts = json.loads(lock)
    except ValueError:  # torn
        return {}
    return facts if isinstance(facts, dict) else {}


def _named(lock: bytes) -> str:
    facts = {"pid": "unknown", "host": "an unknown machine", "since": "unknown", **_facts(lock)}
    return f"process {facts['pid']} on {facts['host']} (since {facts['since']})"


def _is_gone(path: Path, lock: bytes) -> bool:
    """Return whether the process of a lock ended; of another machine's the lock's age tells."""
    facts, me = _facts(lock), _this_process()
    if facts.get("machine") == me["machine"] and isinstance(facts.get("pid"), int):
        start = _start_of(facts["pid"])
        if start is not None:
            return start != facts.get("started")
    try:
        with part_beside(path) as part:
            part.touch()  # by the clock of the file system, which may be another machine's
            now = part.stat().st_mtime
    except OSError:  # a folder that can only be read
        now = time.time()
    try:
        return now - path.stat().st_mtime > LOST_AFTER_S
    except FileNotFoundError:
        return True


def _discard(path: Path, lock: bytes) -> bool:
    """Delete a lock if it still is the one found; another process may have taken it over."""
    with contextlib.suppress(OSError), part_beside(path) as part:
        path.replace(part)
        if part.read_bytes() == lock:
            return True
        path.hardlink_to(part)
    return False


def _keep_fresh(path: Path, mine: bytes, done: threading.Event) -> None:
    while not done.wait(_REFRESH_S):
        with contextlib.suppress(OSError):
            if _holder(path) == mine:
                os.utime(path)
