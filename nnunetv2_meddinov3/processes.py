"""Processes: workers of one thread, which end with their parent, and main memory."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from nnunetv2_meddinov3.signals import leave_stopping_to_the_parent

# The processes share the cores, and thread pools would fight over them.
_ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def prepare_worker() -> None:
    """Make this process a worker: signals are left to its parent, with which it ends."""
    leave_stopping_to_the_parent()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End a worker whose parent was killed: it would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


@contextlib.contextmanager
def one_thread_each() -> Iterator[None]:
    """Let the processes that are started meanwhile compute with one thread."""
    before = {name: os.environ.get(name) for name in _ONE_THREAD}
    os.environ.update(dict.fromkeys(_ONE_THREAD, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def forget_peak() -> None:
    """Let the peak of this process's memory begin anew where the system can."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_gb() -> float | None:
    """Return the most main memory that this process held, in GB; None where it is not known.

    Not that of ``getrusage``, where Linux lets a process begin with the peak of its parent.
    """
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        return _peak_of_getrusage_gb()
    return None if found is None else int(found[1]) * 1024 / 1e9


def _peak_of_getrusage_gb() -> float | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def installed_gb() -> float:
    """Return the main memory of this machine in GB, infinite where it is not known."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    except (AttributeError, OSError, ValueError):
        return float("inf")
