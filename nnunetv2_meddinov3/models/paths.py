"""Paths as users give them."""

import os
from pathlib import Path


def existing(path: str | os.PathLike[str]) -> Path | None:
    """Return a path with its ``~`` expanded, or None where there is nothing."""
    try:
        expanded = Path(path).expanduser()
        return expanded if expanded.exists() else None
    except (OSError, RuntimeError, ValueError):  # too long a name, an unknown ~user, a NUL
        return None
