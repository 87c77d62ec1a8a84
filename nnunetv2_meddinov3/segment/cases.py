"""Scans to be segmented: files that the model's reader opens, and others, converted for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnunetv2_meddinov3.curate.discover import find_sources, named, plain_name
from nnunetv2_meddinov3.curate.readers import read
from nnunetv2_meddinov3.curate.readers.images import PICTURES
from nnunetv2_meddinov3.curate.volume import Grid, Image, Unreadable, VolumeSource
from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.raw_dataset import RawDataset


@dataclass(frozen=True)
class Case:
    """One scan.

    Attributes:
        name: Of the files that are written.
        files: One for each channel, as the model's reader opens them; empty where the scan has to
            be converted.
        source: The scan to convert.
    """

    name: str
    files: tuple[Path, ...] = ()
    source: VolumeSource | None = None

    @property
    def said(self) -> str:
        """What messages call it."""
        return ", ".join(map(str, self.files)) if self.source is None else self.source.key


def find_cases(path: Path, dataset: RawDataset) -> list[Case]:
    """List the scans of a file or folder, each with a name of its own.

    Args:
        path: A file; or a folder with ``CASE_0000.ending`` for each channel as nnU-Net wants them,
            or with anything that ``meddinov3 curate`` reads, where the model has one channel.
        dataset: The model's, which gives file ending and channels.

    Raises:
        UserError: If there is none, or channels are missing.
    """
    if not path.exists():
        raise UserError(f"VOLUME must be a file or folder, but there is no {path}.")
    ending, channels = dataset.ending, len(dataset.channel_names)
    if path.is_dir():
        files = [file for file in path.glob(f"*{ending}") if not file.name.startswith(".")]
        if files and all(dataset.split_name(file.name) for file in files):
            return _with_all_channels(path, dataset)
    elif found := dataset.split_name(path.name):
        cases = _with_all_channels(path.parent, dataset, only=found[0])
        return cases if channels > 1 else [Case(cases[0].name, (path,))]
    if channels > 1:
        raise UserError(
            f"this model needs {channels} channels ({', '.join(dataset.channel_names.values())}), "
            f"a file each, but {path} is not named so: give a folder with CASE_0000{ending}, "
            f"CASE_0001{ending} and so on, or CASE_0000{ending} in it."
        )
    if path.is_file() and path.name.endswith(ending):
        return [Case(plain_name(path.name.removesuffix(ending)), (path,))]
    sources, refused = find_sources([path])
    if not sources:
        why = "".join(f"; {key}: {reason}" for key, reason in refused[:3])
        raise UserError(
            f"VOLUME must be a scan (NIfTI, NRRD, MHA, DICOM) or a folder of them, but {path} "
            f"holds none{why}."
        )
    return [
        Case(name, (Path(source.paths[0]),))
        if source.kind != "dicom" and source.paths[0].endswith(ending)
        else Case(name, source=source)
        for name, source in named(sources)
    ]


def _with_all_channels(folder: Path, dataset: RawDataset, only: str | None = None) -> list[Case]:
    wanted = list(range(len(dataset.channel_names)))
    cases = []
    for name, files in dataset.images_in(folder).items():
        if only not in (None, name):
            continue
        if list(files) != wanted:
            numbers = ", ".join(f"{n:04d}" for n in wanted)
            raise UserError(
                f"each case must have the channels {numbers} "
                f"({', '.join(dataset.channel_names.values())}), but {folder} has "
                f"{', '.join(f'{n:04d}' for n in files)} of {name}: add or remove files."
            )
        cases.append(Case(name, tuple(files.values())))
    return cases


def read_source(source: VolumeSource) -> Image:
    """Read a scan that has to be converted.

    Raises:
        UserError: If it cannot be read or has no geometry.
    """
    try:
        image = read(source)
    except Unreadable as error:
        raise UserError(f"{source.key} cannot be segmented: {error}.") from error
    if image.grid is None:
        raise UserError(
            f"{source.key} must be a volume with a geometry for this model, but is a picture: "
            "convert it to NIfTI with its spacing."
        )
    if fault := image.grid.fault():
        raise UserError(f"{source.key} cannot be segmented: {fault}.")
    return image


def write_for_model(image: Image, path: Path) -> Path:
    """Write an image where the model's reader finds it.

    Axes that are not perpendicular (gantry tilt) are replaced by the nearest ones that are: the
    reader uses them for nothing but the order of axes, and labels get the image's own geometry.

    Raises:
        UserError: If the model reads pictures.
    """
    if path.name.lower().endswith(PICTURES):
        raise UserError(
            f"this model reads {path.suffix} pictures, but was given a volume: give pictures."
        )
    assert image.grid is not None
    array = image.array if image.array.dtype != np.float64 else image.array.astype(np.float32)
    written = sitk.GetImageFromArray(array)
    left, _, right = np.linalg.svd(image.grid.direction)
    written.SetDirection((left @ right).ravel().tolist())
    written.SetSpacing(image.grid.spacing)
    written.SetOrigin(image.grid.origin.tolist())
    sitk.WriteImage(written, str(path))
    return path


def write_nifti(path: Path, array: np.ndarray, grid: Grid) -> None:
    """Write an array (z, y, x) as NIfTI with a grid, whose axes need not be perpendicular."""
    import nibabel

    image = nibabel.Nifti1Image(np.ascontiguousarray(array.T), grid.affine_ras())
    image.header.set_xyzt_units("mm")
    nibabel.save(image, path)


def warn_of_modality(image: Image, channel_names: Sequence[str]) -> str | None:
    """Return a sentence where a scan states another modality than the model was trained on."""
    model_is_ct = channel_names[0].casefold() == "ct"
    if image.modality == "MR" and model_is_ct:
        return "it is MR, but the model was trained on CT: its labels mean nothing"
    if image.modality == "CT" and channel_names[0].casefold().startswith(("mr", "t1", "t2")):
        return f"it is CT, but the model was trained on {channel_names[0]}: its labels mean nothing"
    return None
