"""The pictures of a run's report."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from nnunetv2_meddinov3.pretrain.monitor.features import pca_maps, similarity_maps

WINDOW_HU = (-160, 240)  # soft tissue
_BODY_HU = -300  # above it a pixel shows the body
_COLOURS = {"student": "#4477aa", "teacher": "#cc6677"}


def curves(rows: list[dict[str, Any]], panels: dict[str, list[str]], columns: int = 3) -> Figure:
    """Draw numbers over steps.

    Args:
        rows: With ``step``.
        panels: Title -> keys drawn in it; panels without any number are left out.
        columns: Panels beside each other.
    """
    panels = {t: k for t, keys in panels.items() if (k := [k for k in keys if _has(rows, k)])}
    lines = max(1, -(-len(panels) // columns))
    figure = Figure(figsize=(4 * columns, 2.6 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for axis, (title, keys) in zip(axes, panels.items(), strict=False):
        for key in keys:
            points = [(r["step"], r[key]) for r in rows if r.get(key) is not None]
            steps, values = zip(*points, strict=True)
            colour = next((c for who, c in _COLOURS.items() if key.endswith(who)), None)
            axis.plot(steps, values, label=key, color=colour, linewidth=1.2)
        axis.set_title(title, fontsize=10, loc="left")
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        if len(keys) > 1:
            axis.legend(fontsize=7, frameon=False)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    for axis in axes[max(0, len(panels) - columns) : len(panels)]:
        axis.set_xlabel("step", fontsize=8)
    return figure


def _has(rows: list[dict[str, Any]], key: str) -> bool:
    return any(row.get(key) is not None for row in rows)


def maps(moments: list[tuple[int, np.ndarray, np.ndarray]]) -> tuple[Figure, Figure]:
    """Draw the same slices over time: three principal components as colours, and similarities.

    Args:
        moments: (step, slices (n, H, W) in HU, patches (n, h, w, D)).

    Returns:
        Slices as rows and steps as columns, twice; in the second the cross is the patch to which
        every other is compared.
    """
    slices = moments[-1][1]
    places = [_place(s, p.shape[:2]) for s, p in zip(slices, moments[-1][2], strict=True)]
    colours = pca_maps([patches for _, _, patches in moments])
    grids = _rows_and_columns(moments, slices), _rows_and_columns(moments, slices)
    for k, (_, _, patches) in enumerate(moments):
        similar = similarity_maps(patches, places)
        for i in range(len(slices)):
            grids[0][1][i, k + 1].imshow(colours[k][i], interpolation="nearest")
            axis = grids[1][1][i, k + 1]
            shown = axis.imshow(similar[i], cmap="magma", vmin=-0.2, vmax=1)
            axis.plot(places[i][1], places[i][0], "+", color="#44dd88", markersize=9)
    bar = grids[1][0].colorbar(shown, ax=grids[1][1], shrink=0.5, aspect=30)
    bar.ax.tick_params(labelsize=8)
    bar.set_label("cosine", fontsize=8)
    return grids[0][0], grids[1][0]


def _rows_and_columns(moments: list, slices: np.ndarray) -> tuple[Figure, np.ndarray]:
    rows, columns = len(slices), len(moments) + 1
    figure = Figure(figsize=(1.9 * columns, 2.0 * rows + 0.3), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.ravel():
        axis.set_axis_off()
    axes[0, 0].set_title("slice", fontsize=9)
    for i, image in enumerate(slices):
        axes[i, 0].imshow(image, cmap="gray", vmin=WINDOW_HU[0], vmax=WINDOW_HU[1])
    for k, (step, _, _) in enumerate(moments):
        axes[0, k + 1].set_title(f"step {step}", fontsize=9)
    return figure, axes


def _place(image: np.ndarray, grid: tuple[int, int]) -> tuple[int, int]:
    """The patch nearest to the middle of the body."""
    body = np.argwhere(image > _BODY_HU)
    middle = body.mean(0) if len(body) else np.array(image.shape) / 2
    row, column = (middle * np.array(grid) / np.array(image.shape)).astype(int)
    return min(int(row), grid[0] - 1), min(int(column), grid[1] - 1)
