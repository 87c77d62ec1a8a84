"""Pictures of where predictions are wrong."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure  # not pyplot: no display, no global state
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from nnunetv2_meddinov3.evaluation.overlay import (
    draw_contours,
    draw_grey,
    label_colours,
    read_image,
    shows_ct,
    upright,
    voxels,
)
from nnunetv2_meddinov3.raw_dataset import RawDataset

# Okabe and Ito's colours, which colour-blind readers tell apart
_ERRORS = {"missed": "#D55E00", "invented": "#0072B2", "another label": "#E69F00"}


def error_maps(
    cases: Mapping[str, str],
    pairs: Mapping[str, tuple[Path | None, Path]],
    images: Mapping[str, Path],
    dataset: RawDataset,
) -> bytes:
    """Draw the slice of each case that has the most wrong pixels, three times.

    With the contours of the reference, with those of the prediction, and with the wrong pixels:
    missed, invented, or given another label. Labels stand where image files are missing.

    Args:
        cases: Name of a case -> what to say of it.
        pairs: Case -> label maps of prediction (None is drawn as empty) and reference.
        images: Case -> file of its first channel; cases may be missing.
        dataset: Gives labels, file ending and modality.

    Returns:
        A PNG.

    Raises:
        UserError: If an image cannot be read.
    """
    colours, is_ct = label_colours(dataset), shows_ct(dataset)
    figure = Figure(figsize=(11, 3.7 * len(cases) + 0.9), layout="constrained", facecolor="white")
    rows = figure.subplots(len(cases), 3, squeeze=False)
    for (case, said), axes in zip(cases.items(), rows, strict=True):
        prediction_file, reference_file = pairs[case]
        reference = upright(read_image(reference_file))
        maps = [voxels(reference).astype(int)]
        if prediction_file is None:
            maps.append(np.zeros_like(maps[0]))
        else:
            maps.append(voxels(upright(read_image(prediction_file))).astype(int))
        wrong = _wrong_pixels(maps[0], maps[1], dataset)
        index = int(np.argmax((wrong > 0).sum(axis=(1, 2))))
        grey = upright(read_image(images[case])) if case in images else reference
        titles = (f"{case}, slice {index}: reference", f"prediction, {said}", "wrong pixels")
        for axis, title in zip(axes, titles, strict=True):
            draw_grey(axis, grey, index, is_ct and case in images)
            axis.set_title(title, fontsize=9)
        for axis, label_map in zip(axes, maps, strict=False):
            draw_contours(axis, label_map[index], dataset.labels, colours)
        _draw_wrong(axes[2], wrong[index])
    lines = [Line2D([], [], color=colour, label=name) for name, colour in colours.items()]
    patches = [Patch(color=colour, label=name) for name, colour in _ERRORS.items()]
    handles = [*lines, *patches]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=min(6, len(handles)), frameon=False
    )
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=100)
    return png.getvalue()


def _wrong_pixels(reference: np.ndarray, prediction: np.ndarray, dataset: RawDataset) -> np.ndarray:
    """Return 0 where right or of no label, else 1 (missed), 2 (invented), 3 (another label)."""
    values = sorted({value for found in dataset.labels.values() for value in found})
    is_labelled, is_predicted = np.isin(reference, values), np.isin(prediction, values)
    wrong = np.where(is_labelled & ~is_predicted, 1, 0)
    wrong[is_predicted & ~is_labelled] = 2
    wrong[is_predicted & is_labelled & (reference != prediction)] = 3
    if dataset.ignore is not None:
        wrong[reference == dataset.ignore] = 0
    return wrong


def _draw_wrong(axis: Axes, wrong: np.ndarray) -> None:
    shown = np.ma.masked_equal(wrong, 0)
    axis.imshow(
        shown, cmap=ListedColormap(list(_ERRORS.values())), vmin=1, vmax=3, aspect=axis.get_aspect()
    )
