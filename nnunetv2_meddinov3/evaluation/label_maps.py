"""Label maps on the disk, read by the reader that nnU-Net chooses for them."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nnunetv2_meddinov3.errors import UserError, first_line
from nnunetv2_meddinov3.raw_dataset import RawDataset

_FLAT = 999  # what nnU-Net's readers give as the thickness of a picture that has none


@dataclass(frozen=True)
class LabelMap:
    """A label map as stored.

    Attributes:
        array: ([Z,] Y, X), of integers; a 2D picture has two axes.
        spacing: Of its axes, in mm; 1 where the file states none (a picture).
    """

    array: np.ndarray
    spacing: tuple[float, ...]


def reader_for(dataset: RawDataset, example: Path) -> Any:
    """Return the reader that nnU-Net chooses for a dataset's files.

    Raises:
        UserError: If none opens the example.
    """
    from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json

    chosen = dataset.reader or "None"  # nnU-Net's own way of saying that none is
    facts = {"file_ending": dataset.ending, "overwrite_image_reader_writer": chosen}
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # it prints the traceback of each attempt
            return determine_reader_writer_from_dataset_json(facts, str(example), verbose=False)()
    except RuntimeError as error:
        raise UserError(
            f"{example} must be an image that one of nnU-Net's readers for {dataset.ending} files "
            "opens, but none does; predict it again."
        ) from error


def read_label_map(reader: Any, path: Path) -> LabelMap:
    """Read a label map.

    Raises:
        UserError: If the reader cannot read it, or it holds something else than whole numbers.
    """
    try:
        array, properties = reader.read_seg(str(path))
    except Exception as error:  # each reader raises what its library does
        raise UserError(
            f"{path} must be an image that {type(reader).__name__} reads, but: {first_line(error)}."
        ) from error
    spacing = tuple(float(side) for side in properties["spacing"])
    if len(array) == 1:
        array = array[0]
    elif array.shape[1] == 1:  # pages of a TIFF, which this reader takes as colours
        array, spacing = array[:, 0], (1.0, *spacing[1:])
    else:
        raise UserError(
            f"{path} must hold one label map, but holds {len(array)}: split it, or give that of "
            "the labels."
        )
    whole = array.astype(np.int32)
    if not np.issubdtype(array.dtype, np.integer) and not np.array_equal(whole, array):
        raise UserError(
            f"{path} must hold whole numbers, one a label, but holds others: give label maps, not "
            "probabilities or images."
        )
    if len(array) == 1 and spacing[0] == _FLAT:
        return LabelMap(whole[0], spacing[1:])
    return LabelMap(whole, spacing)


def check_pair(prediction: LabelMap, reference: LabelMap, files: tuple[Path, Path]) -> None:
    """Refuse a prediction whose shape is not that of its reference.

    Args:
        prediction: A label map.
        reference: The one that it is compared with.
        files: Where both were read from.

    Raises:
        UserError: If the shapes differ.
    """
    if prediction.array.shape != reference.array.shape:
        axes = "(z, y, x)" if reference.array.ndim == 3 else "(y, x)"
        raise UserError(
            f"A prediction must have the shape of its reference, but {files[0]} has "
            f"{prediction.array.shape} and {files[1]} has {reference.array.shape} voxels along "
            f"{axes}; predict the images that belong to these labels."
        )
