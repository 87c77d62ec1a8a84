"""A picture of predictions beside their references."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib
import numpy as np
import SimpleITK as sitk
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure  # not pyplot: no display, no global state
from matplotlib.lines import Line2D

from nnunetv2_meddinov3.errors import UserError, first_line
from nnunetv2_meddinov3.evaluation.dice import DiceTable, format_dice, mean_of_known
from nnunetv2_meddinov3.files import replacing
from nnunetv2_meddinov3.raw_dataset import RawDataset

ABDOMEN_WINDOW_HU = (50.0, 400.0)  # level, width
MAX_CASES = 6

Labels = Mapping[str, tuple[int, ...]]


def save_overlay(
    path: Path,
    images: Mapping[str, Path],
    prediction_folder: Path,
    label_folder: Path,
    dataset: RawDataset,
    table: DiceTable,
) -> None:
    """Draw one slice of each case twice: with the contours of the reference and of the prediction.

    The slice is the one that shows the most labels and, of those, the most labelled pixels. CT is
    windowed for the abdomen, any other image between its 1st and 99th percentile.

    Args:
        path: The PNG to write.
        images: Case -> file of its first channel.
        prediction_folder: Label maps of the network.
        label_folder: Label maps of the reference.
        dataset: The raw dataset, which gives labels, file ending and modality.
        table: Dice of ``dice_per_label``; its first ``MAX_CASES`` cases are drawn.

    Raises:
        UserError: If an image cannot be read or the picture cannot be written.
    """
    cases = list(table)[:MAX_CASES]
    labels, colours, is_ct = dataset.labels, label_colours(dataset), shows_ct(dataset)

    figure = Figure(figsize=(9, 4.2 * len(cases) + 0.7), layout="constrained", facecolor="white")
    for case, axes in zip(cases, figure.subplots(len(cases), 2, squeeze=False), strict=True):
        file_name = case + dataset.ending
        image, reference, prediction = (
            upright(read_image(file))
            for file in (
                images[case],
                Path(label_folder) / file_name,
                Path(prediction_folder) / file_name,
            )
        )
        index = _busiest_slice(voxels(reference), labels)
        mean = format_dice(mean_of_known(table[case].values()))
        for axis, label_map, title in (
            (axes[0], reference, f"{case}, slice {index}: reference"),
            (axes[1], prediction, f"prediction, mean Dice of the case {mean}"),
        ):
            draw_grey(axis, image, index, is_ct)
            draw_contours(axis, voxels(label_map)[index], labels, colours)
            axis.set_title(title, fontsize=9)
    handles = [Line2D([], [], color=colour, label=name) for name, colour in colours.items()]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=min(6, len(handles)), frameon=False
    )
    with replacing(path) as part:
        figure.savefig(part, format="png", dpi=110)


def label_colours(dataset: RawDataset) -> dict[str, str]:
    """Return label -> colour as ``#rrggbb``, as different as their number allows."""
    names = list(dataset.labels)
    palette = matplotlib.colormaps["tab10" if len(names) <= 10 else "gist_ncar"]
    spread = range(len(names)) if len(names) <= 10 else np.linspace(0.05, 0.95, len(names))
    return {name: to_hex(palette(at)) for name, at in zip(names, spread, strict=True)}


def shows_ct(dataset: RawDataset) -> bool:
    """Return whether the first channel, which is drawn, is CT."""
    return next(iter(dataset.channel_names.values())).casefold() == "ct"


def read_image(path: Path) -> sitk.Image:
    """Read an image or a label map.

    Raises:
        UserError: If SimpleITK cannot read the file.
    """
    try:
        return sitk.ReadImage(str(path))
    except RuntimeError as error:
        raise UserError(
            f"{path} must be an image that SimpleITK reads, but: {first_line(error)}."
        ) from error


def voxels(image: sitk.Image) -> np.ndarray:
    """Return voxels as (z, y, x); a 2D image is one slice, colours are averaged."""
    array = sitk.GetArrayFromImage(image)
    if image.GetNumberOfComponentsPerPixel() > 1:
        array = array.mean(axis=-1)
    return array if array.ndim == 3 else array[None]


def upright(image: sitk.Image) -> sitk.Image:
    """Volumes as LPS: a slice then shows the front above and the patient's right at the left."""
    return sitk.DICOMOrient(image, "LPS") if image.GetDimension() == 3 else image


def _busiest_slice(label_map: np.ndarray, labels: Labels) -> int:
    areas = np.stack([np.isin(label_map, v).sum(axis=(1, 2)) for v in labels.values()])
    return int(np.lexsort((areas.sum(axis=0), (areas > 0).sum(axis=0)))[-1])


def draw_grey(axis: Axes, image: sitk.Image, index: int, is_ct: bool) -> None:
    """Draw a slice of an image in grey."""
    grey = voxels(image)[index]
    if is_ct:
        level, width = ABDOMEN_WINDOW_HU
        low, high = level - width / 2, level + width / 2
    else:
        low, high = np.percentile(grey, [1, 99])
    spacing_x, spacing_y = image.GetSpacing()[:2]
    axis.imshow(grey, cmap="gray", vmin=low, vmax=high, aspect=spacing_y / spacing_x)
    axis.set_axis_off()


def draw_contours(
    axis: Axes, label_map: np.ndarray, labels: Labels, colours: Mapping[str, str]
) -> None:
    """Draw the outline of each label on a slice (y, x)."""
    for name, values in labels.items():
        mask = np.isin(label_map, values)
        if mask.any() and not mask.all():
            axis.contour(mask, levels=[0.5], colors=[colours[name]], linewidths=1.4)
