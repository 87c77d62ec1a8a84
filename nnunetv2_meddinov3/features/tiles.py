"""Slices in overlapping tiles, for a device that cannot hold all their tokens at once."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

OVERLAP = 2  # neighbouring tiles share at least one part of so many


class Span(NamedTuple):
    """A tile along one axis, in patches.

    Attributes:
        tile: What the backbone sees.
        kept: What is taken from it: where it lies deeper in this tile than in its neighbours.
    """

    tile: slice
    kept: slice


def spans(patches: int, most: int) -> list[Span]:
    """Cut an axis into tiles that overlap by half, or a little more.

    Args:
        patches: Along the axis.
        most: That a tile may have.

    Returns:
        Tiles of one length, whose kept parts make up the axis.
    """
    if patches <= most:
        return [Span(slice(0, patches), slice(0, patches))]
    stride = max(1, most - most // OVERLAP)
    count = 1 + -(-(patches - most) // stride)
    starts = [round(i * (patches - most) / (count - 1)) for i in range(count)]
    edges = [(a + most + b) // 2 for a, b in itertools.pairwise(starts)]
    return [
        Span(slice(start, start + most), slice(low, high))
        for start, low, high in zip(starts, [0, *edges], [*edges, patches], strict=True)
    ]


def tiles(grid_size: tuple[int, int], most: int) -> Iterator[tuple[Span, Span]]:
    """Yield the tiles of a slice as spans of rows and columns.

    Args:
        grid_size: Patches along height and width.
        most: Patches along a tile's side.
    """
    for rows in spans(grid_size[0], most):
        for columns in spans(grid_size[1], most):
            yield rows, columns
