"""A picture of what a model found in a scan."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure  # not pyplot: no display, no global state
from matplotlib.lines import Line2D

from nnunetv2_meddinov3.evaluation.overlay import (
    draw_contours,
    draw_grey,
    label_colours,
    read_image,
    shows_ct,
    upright,
    voxels,
)
from nnunetv2_meddinov3.files import replacing
from nnunetv2_meddinov3.raw_dataset import RawDataset

SHOWN = 3  # slices


def save_picture(
    path: Path, name: str, image_file: Path, label_file: Path, dataset: RawDataset
) -> None:
    """Draw slices of a scan with the contours of its labels, evenly spread over what was found.

    Args:
        path: The PNG to write.
        name: What the scan is called.
        image_file: Its first channel.
        label_file: Its labels.
        dataset: Of the model.

    Raises:
        UserError: If an image cannot be read or the picture cannot be written.
    """
    image, label_map = (upright(read_image(file)) for file in (image_file, label_file))
    labels = voxels(label_map)
    found = np.flatnonzero((labels > 0).any(axis=(1, 2)))
    shown = _spread(found if len(found) else np.arange(len(labels)))
    colours = label_colours(dataset)
    figure = Figure(figsize=(4.2 * len(shown), 4.9), layout="constrained", facecolor="white")
    present = set(np.unique(labels).tolist())
    for axis, index in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        draw_grey(axis, image, index, shows_ct(dataset))
        draw_contours(axis, labels[index], dataset.labels, colours)
        axis.set_title(f"{name}, slice {index}", fontsize=9)
    lines = [
        Line2D([], [], color=colours[label], label=label)
        for label, values in dataset.labels.items()
        if present.intersection(values)
    ]
    if lines:
        columns = min(6, len(lines))
        figure.legend(handles=lines, loc="outside lower center", ncols=columns, frameon=False)
    else:
        figure.suptitle("nothing was found", fontsize=10)
    with replacing(path) as part:
        figure.savefig(part, format="png", dpi=110)


def _spread(indices: np.ndarray) -> list[int]:
    """Return up to three of some ascending numbers, at even distances."""
    places = np.linspace(0, len(indices) - 1, SHOWN + 2)[1:-1]
    return sorted({int(indices[round(place)]) for place in places.tolist()})
