"""Figures of the report of a store, as PNG: histograms and a montage of slices."""

import io
from collections.abc import Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_HU_BINS = np.arange(-1100, 1600, 20)


def histogram_figure(
    spacing_x: np.ndarray, spacing_z: np.ndarray, values: np.ndarray, body: np.ndarray
) -> bytes:
    """Histograms of the index, and of the values of a sample of its slices.

    Args:
        spacing_x: (N,) in-plane spacing of each slice in mm, without the unknown.
        spacing_z: (N,) spacing between slices in mm, without the unknown.
        values: (M,) HU of a sample of CT pixels, empty where there is no CT.
        body: (N,) body fraction of each slice.

    Returns:
        A PNG.
    """
    figure = Figure(figsize=(11, 5.6), layout="constrained")
    axes = figure.subplots(2, 2)
    panels = (
        (axes[0, 0], spacing_x, 40, "pixel spacing (mm)", "slices"),
        (axes[0, 1], spacing_z, 40, "distance between slices (mm)", "slices"),
        (axes[1, 0], values, _HU_BINS, "HU, of a sample of CT slices", "pixels"),
        (axes[1, 1], body, np.linspace(0, 1, 41), "body fraction", "slices"),
    )
    for axis, data, bins, label, counted in panels:
        if len(data):
            axis.hist(data, bins=bins, color="#36c")
        else:
            axis.text(0.5, 0.5, "unknown", ha="center", va="center", transform=axis.transAxes)
        axis.set_xlabel(label)
        axis.set_ylabel(counted)
    axes[1, 0].set_yscale("log" if len(values) else "linear")
    return _png(figure)


def montage_figure(rows: Sequence[tuple[str, Sequence[tuple[np.ndarray, float, float]]]]) -> bytes:
    """One row of slices per dataset.

    Args:
        rows: title of a row, and its slices, each as (H, W) values and the low and high end of
            the window to show it in.

    Returns:
        A PNG.
    """
    columns = max(len(slices) for _, slices in rows)
    figure = Figure(figsize=(1.5 * columns, 1.75 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for line, (title, slices) in zip(axes, rows, strict=True):
        line[0].set_title(title, fontsize=8, loc="left")
        for axis, (image, low, high) in zip(line, slices, strict=False):
            axis.imshow(image, cmap="gray", vmin=low, vmax=high, interpolation="bilinear")
    return _png(figure)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()
