"""What is refused before anything is allocated: sizes, memory and rescales no file can mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from nnunetv2_meddinov3.curate.volume import Unreadable

MAX_VOXELS = 4e9
MAX_RATIO = 1040  # deflate, the codec of the volume formats, cannot shrink more than 1032-fold
MAX_RESCALE = 1e5  # of a slope or intercept that leads to HU or to the units of MR


def check_size(size: Sequence[int], n_bytes: int, file_bytes: int, compressed: bool) -> None:
    """Refuse a declared size that the file cannot hold or the memory not take.

    Args:
        size: voxels along each axis.
        n_bytes: bytes a voxel in the file.
        file_bytes: size of the file, or infinite where the voxels stand in another one.
        compressed: whether the voxels may be compressed.

    Raises:
        Unreadable: With the size that was declared.
    """
    shape = "x".join(map(str, size))
    if not size or min(size) < 1:
        raise Unreadable(f"its header declares {shape or 'no'} voxels")
    voxels = math.prod(size)
    if voxels > MAX_VOXELS:
        raise Unreadable(f"its header declares {shape} voxels, more than {MAX_VOXELS:.0e}")
    if voxels * n_bytes > file_bytes * (MAX_RATIO if compressed else 1):
        raise Unreadable(f"its header declares {shape} voxels, more than the file can hold")
    check_memory(voxels * (n_bytes + 4))  # as in the file, and as int16 or float32


def check_memory(n_bytes: float) -> None:
    """Refuse what would not fit into memory.

    Raises:
        Unreadable: If more is needed than is free.
    """
    free = free_memory()
    if free is not None and n_bytes > free:
        raise Unreadable(
            f"it needs about {n_bytes / 1e9:.1f} GB of memory, of which {free / 1e9:.1f} are free"
        )


def check_rescale(slope: float, intercept: float) -> None:
    """Refuse a rescale that cannot be meant.

    Raises:
        Unreadable: If the slope is 0, or one of both is not finite or out of all proportion.
    """
    sane = math.isfinite(slope) and math.isfinite(intercept) and slope != 0
    if not sane or max(abs(slope), abs(intercept)) > MAX_RESCALE:
        raise Unreadable(f"its rescale is absurd (slope {slope:g}, intercept {intercept:g})")


def free_memory() -> int | None:
    """Bytes that can be allocated without swapping, None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    values = dict(line.split(":", 1) for line in lines)
    return int(values["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in values else None
