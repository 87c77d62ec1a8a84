"""Who may write to a store at the same time.

The shards of one division (``--shard I/N``) may: every file is put in its place whole, and what one
process must do alone is done by one after the other. Anything else needs the store for itself.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from nnunetv2_meddinov3 import files, locks
from nnunetv2_meddinov3.store import layout

WHOLE = (0, 1)  # the shard of a process that writes alone
_LOCK_OF_SHARD = re.compile(r"lock-(\d+)-of-(\d+)\.json")
_LOCK_OF_ONE = "lock-alone.json"  # of ``one_at_a_time``


def check_target(folder: Path, shard: tuple[int, int] = WHOLE) -> None:
    """Refuse a folder that this process could not write a store to; nothing is written.

    Args:
        folder: May be missing.
        shard: (i, n), the i-th of n parts that may be written at once.

    Raises:
        UserError: If it holds something else, cannot be written to, or is being written.
    """
    try:
        layout.check_place(folder)
    except OSError as error:
        raise files.unwritable(folder, error) from error
    files.check_writable(folder)
    _refuse_others(folder, shard)


@contextlib.contextmanager
def writing(
    folder: Path, say: Callable[[str], None], shard: tuple[int, int] = WHOLE
) -> Iterator[None]:
    """Write to a store while the context lasts, alone or as one of the shards of a division.

    Args:
        folder: Made if missing.
        say: Gets a line when the lock of a killed process is taken over.
        shard: (i, n), the i-th of n parts that may be written at once.

    Raises:
        UserError: If a living process writes the same shard, or divides the work otherwise; if the
            folder cannot be written.
    """
    with locks.locked(folder, say, name=_lock_of(shard), rule=_rule(folder)):
        for name in _found(folder):
            locks.discard_lost(folder, name)
        _refuse_others(folder, shard, but=_lock_of(shard))
        yield


def refuse_written(folder: Path) -> None:
    """Refuse a store that a living process writes to.

    Raises:
        UserError: With that process.
    """
    for name in [*_found(folder), _LOCK_OF_ONE]:
        locks.refuse_locked(folder, name=name, rule=f"{folder} must not be written meanwhile")


@contextlib.contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Wait until no other process is in the same block for the same store.

    Raises:
        UserError: If the store cannot be written.
    """
    with locks.locked(folder, _say_nothing, name=_LOCK_OF_ONE, waits=True):
        yield


def is_lock(name: str) -> bool:
    """Return whether a file of a store is a lock."""
    return name in (locks.LOCK, _LOCK_OF_ONE) or _LOCK_OF_SHARD.fullmatch(name) is not None


def _lock_of(shard: tuple[int, int]) -> str:
    return locks.LOCK if shard[1] == 1 else f"lock-{shard[0]}-of-{shard[1]}.json"


def _found(folder: Path) -> list[str]:
    """Return the names of the locks of writers in a folder."""
    names = sorted(path.name for path in folder.glob("lock*.json"))
    return [name for name in names if is_lock(name) and name != _LOCK_OF_ONE]


def _refuse_others(folder: Path, shard: tuple[int, int], but: str = "") -> None:
    for name in _found(folder):
        match = _LOCK_OF_SHARD.fullmatch(name)
        index, number = (int(match[1]), int(match[2])) if match else WHOLE
        if name != but and (number != shard[1] or index == shard[0]):
            locks.refuse_locked(folder, name=name, rule=_rule(folder))


def _rule(folder: Path) -> str:
    return f"{folder} must be written by one process at a time, or by different shards of one I/N"


def _say_nothing(_: str) -> None:
    pass
