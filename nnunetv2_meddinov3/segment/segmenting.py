"""From a scan to the files that a user wants of it: labels, a picture, uncertainty, DICOM SEG."""

from __future__ import annotations

import contextlib
import io
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import SimpleITK as sitk

from nnunetv2_meddinov3.curate.readers.images import PICTURES
from nnunetv2_meddinov3.curate.volume import Image
from nnunetv2_meddinov3.errors import UserError, first_line
from nnunetv2_meddinov3.files import part_beside, replacing, unwritable, write_text
from nnunetv2_meddinov3.raw_dataset import RawDataset, read_dataset_json
from nnunetv2_meddinov3.segment.cases import (
    Case,
    read_source,
    warn_of_modality,
    write_for_model,
    write_nifti,
)
from nnunetv2_meddinov3.segment.dicom_seg import write_dicom_seg
from nnunetv2_meddinov3.segment.model_source import TrainedModel
from nnunetv2_meddinov3.segment.picture import save_picture

if TYPE_CHECKING:
    from nnunetv2_meddinov3.prediction.predictor import MedDINOv3Predictor

_STEPS = 65535  # of uncertainty from 0 to 1, in files of label maps
_NIFTI = ".nii.gz"
LABELS = "labels.json"


@dataclass(frozen=True)
class Wanted:
    """What is written of each scan besides its labels.

    Attributes:
        picture: ``CASE_overlay.png``.
        uncertainty: ``CASE_uncertainty.nii.gz``.
        dicom_seg: ``CASE.dcm``, of DICOM series.
    """

    picture: bool = True
    uncertainty: bool = False
    dicom_seg: bool = False


def labels_name(case: Case, dataset: RawDataset) -> str:
    """Return the file name of a scan's labels: NIfTI, or of pictures what the model writes."""
    is_of_pictures = dataset.ending.lower().endswith(PICTURES)
    return f"{case.name}{dataset.ending if is_of_pictures else _NIFTI}"


def load_predictor(model: TrainedModel, device: str, mirroring: bool = True) -> MedDINOv3Predictor:
    """Return a predictor with the networks of a model's folds.

    Raises:
        UserError: If the trainer is not installed, or weights do not fit the plans.
    """
    silent = io.StringIO()
    with contextlib.redirect_stdout(silent):  # nnU-Net misses its variables, which nothing needs
        import torch

        from nnunetv2_meddinov3.prediction.predictor import MedDINOv3Predictor

        predictor = MedDINOv3Predictor(
            use_mirroring=mirroring,
            device=torch.device(device),
            perform_everything_on_device=device.startswith("cuda"),
        )
        try:
            predictor.initialize_from_trained_model_folder(
                str(model.folder), model.folds, model.checkpoint
            )
        except UserError:
            raise
        except Exception as error:  # whatever nnU-Net and torch raise of what does not fit
            raise UserError(
                f"the model in {model.folder} must fit its plans and a trainer that is installed "
                f"here, but: {first_line(error)}."
            ) from error
    if predictor.configuration_manager.previous_stage_name is not None:
        raise UserError(
            "this model is the second stage of a cascade, which needs the labels of the first: "
            "use nnUNetv2_predict with -prev_stage_predictions."
        )
    predictor.allow_tqdm = True
    return predictor


def segment_cases(
    cases: Sequence[Case],
    model: TrainedModel,
    predictor: MedDINOv3Predictor,
    out: Path,
    wanted: Wanted,
    say: Callable[[str], None] = print,
) -> list[str]:
    """Segment scans one after the other; a scan that fails is told and does not stop the others.

    Args:
        cases: The scans.
        model: Its dataset.json names the labels.
        predictor: Of the model.
        out: Folder of the results.
        wanted: Which there are.
        say: Gets a line for each scan.

    Returns:
        Sentences on the scans that failed.

    Raises:
        UserError: If a result cannot be written.
    """
    from nnunetv2_meddinov3.prediction.ahead import in_threads
    from nnunetv2_meddinov3.prediction.uncertainty import not_measurable

    dataset = read_dataset_json(model.folder / "dataset.json")
    if wanted.uncertainty and not predictor.is_2d:
        raise not_measurable()
    predictor.measures_uncertainty = wanted.uncertainty
    out.mkdir(parents=True, exist_ok=True)
    labels = {name: v[0] if len(v) == 1 else list(v) for name, v in dataset.labels.items()}
    write_text(out / LABELS, f"{json.dumps(labels, indent=1)}\n")
    failed: list[str] = []
    with tempfile.TemporaryDirectory(prefix="meddinov3_segment_") as folder:
        reader = _Reader(predictor, dataset, Path(folder))
        for case, read in zip(cases, in_threads(reader, cases, 1), strict=True):
            if isinstance(read, UserError):
                failed.append(str(read))
                print(f"meddinov3: {read}", file=sys.stderr)
                continue
            if read.image is not None and (
                said := warn_of_modality(read.image, list(dataset.channel_names.values()))
            ):
                print(f"warning: {case.said}: {said}.", file=sys.stderr)
            said, wrong = _segment(read, predictor, dataset, out, wanted)
            say(said)
            if wrong:
                failed.append(wrong)
                print(f"meddinov3: {wrong}", file=sys.stderr)
            read.tidy()
    return failed


@dataclass
class _Read:
    """A scan as the predictor takes it."""

    case: Case
    files: tuple[Path, ...]
    image: Image | None
    data: Any
    properties: dict[str, Any]

    def tidy(self) -> None:
        """Delete the files that were written for the model's reader."""
        if self.image is not None:
            for file in self.files:
                file.unlink()


@dataclass(frozen=True)
class _Reader:
    """Reads and preprocesses a scan, in a thread of its own."""

    predictor: MedDINOv3Predictor
    dataset: RawDataset
    folder: Path

    def __call__(self, case: Case) -> _Read | UserError:
        from nnunetv2_meddinov3.prediction.predictor import GO_ON

        try:
            image, files = None, case.files
            if case.source is not None:
                image = read_source(case.source)
                target = self.folder / f"{case.name}_0000{self.dataset.ending}"
                files = (write_for_model(image, target),)
            found = self.predictor.read(([str(file) for file in files], None, None))
        except UserError as error:
            said = str(error).partition(f" {GO_ON}")[0]  # advice for another command
            return UserError(f"{case.said} was not segmented: {said}")
        return _Read(case, files, image, found["data"], found["data_properties"])


def _segment(
    read: _Read, predictor: MedDINOv3Predictor, dataset: RawDataset, out: Path, wanted: Wanted
) -> tuple[str, str]:
    """Segment one scan and write its files, the labels last.

    Returns:
        A line about it, and a sentence about what could not be made of it, or nothing.
    """
    case, wrong = read.case, ""
    labels = predictor.segment(read.data, read.properties, title=case.name)
    target = out / labels_name(case, dataset)
    with tempfile.TemporaryDirectory(prefix="meddinov3_labels_") as folder:
        written = Path(folder) / f"{case.name}{dataset.ending}"
        writer = predictor.plans_manager.image_reader_writer_class()
        writer.write_seg(labels, str(written), read.properties)
        if predictor.uncertainty is not None:
            doubts = np.rint(np.clip(predictor.uncertainty, 0, 1) * _STEPS).astype(np.uint16)
            path = Path(folder) / f"uncertainty{dataset.ending}"
            writer.write_seg(doubts, str(path), read.properties)
            share = sitk.Cast(sitk.ReadImage(str(path)) / float(_STEPS), sitk.sitkFloat32)
            _deliver(share, out / f"{case.name}_uncertainty{_NIFTI}", read.image)
        if wanted.picture:
            picture = out / f"{case.name}_overlay.png"  # labels of pictures are CASE.png
            save_picture(picture, case.name, read.files[0], written, dataset)
        image = sitk.ReadImage(str(written))
        if wanted.dicom_seg and read.image is not None and case.source is not None:
            path, name = out / f"{case.name}.dcm", str(predictor.trainer_name)
            array = sitk.GetArrayFromImage(image)
            try:
                if case.source.kind == "dicom":
                    write_dicom_seg(path, case.source, read.image, array, dataset.labels, name)
            except UserError as error:
                wrong = str(error)
        if read.image is None and written.name == target.name:
            with replacing(target) as part:
                part.write_bytes(written.read_bytes())
        else:
            _deliver(image, target, read.image)
    return f"{case.name}: {_volumes(image, dataset)}", wrong


def _deliver(image: sitk.Image, target: Path, original: Image | None) -> None:
    """Write what lies on a scan's voxels as NIfTI, with the scan's own geometry."""
    target = target.resolve()
    try:
        with part_beside(target) as part:
            part.mkdir()  # a folder, as the ending tells writers the format
            inside = part / target.name
            if original is None:
                sitk.WriteImage(image, str(inside))
            else:
                assert original.grid is not None
                write_nifti(inside, sitk.GetArrayFromImage(image), original.grid)
            inside.replace(target)
    except OSError as error:
        raise unwritable(target, error) from error


def _volumes(image: sitk.Image, dataset: RawDataset) -> str:
    """Return how much of each label was found, in ml where the voxels have a size."""
    array = sitk.GetArrayViewFromImage(image)
    ml = float(np.prod(image.GetSpacing())) / 1000
    parts = []
    for name, values in dataset.labels.items():
        if count := int(np.isin(array, values).sum()):
            amount = f"{count * ml:.4g} ml" if image.GetDimension() == 3 else f"{count} pixels"
            parts.append(f"{name} {amount}")
    return ", ".join(parts) or "nothing was found"
