"""The folders of the demo: the dataset it reads, the folder it writes, the cases it measures."""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from nnunetv2_meddinov3 import __version__
from nnunetv2_meddinov3.errors import UserError, first_line
from nnunetv2_meddinov3.files import copy_file, write_text
from nnunetv2_meddinov3.raw_dataset import RawDataset, open_raw_dataset

MARKER = "meddinov3_demo.json"
FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results", "held_out", "predictions", "logs")
FILES = ("overlay.png", "report.html")
FOLDS = 5  # of nnU-Net's cross-validation, which wants a training case for each


def check_raw(raw: Path) -> RawDataset:
    """Check that nnU-Net can plan and split a raw dataset, which is only read.

    Returns:
        The dataset, in its absolute folder.

    Raises:
        UserError: If it is not one, is too small, or shares its id with another dataset.
    """
    raw = raw.expanduser().absolute()
    wanted = "--raw must be a raw dataset of nnU-Net (DatasetXXX_Name: dataset.json and images)"
    if not _is_dataset_name(raw.name):
        raise UserError(f"{wanted}, but {raw} has another name; give the dataset's own folder.")
    dataset = open_raw_dataset(raw)
    parts = {"labels": dataset.labels, "file_ending": dataset.ending}
    if missing := [name for name, value in parts.items() if not value]:
        names = " and ".join(missing)
        raise UserError(f"{wanted}, but {raw / 'dataset.json'} lacks {names}; add what is missing.")
    if (found := len(dataset.images())) < FOLDS:
        raise UserError(
            f"{wanted} with at least {FOLDS} training cases for nnU-Net's {FOLDS} folds, but "
            f"{raw} has {found}; add cases or run the demo without --raw."
        )
    if missing := dataset.unlabelled():
        raise UserError(
            f"{wanted} with a label file for each training case, but there is no "
            f"{dataset.label(missing[0])}"
            f"{f' ({len(missing)} are missing)' if len(missing) > 1 else ''}; add labels or take "
            "the images away."
        )
    start = f"Dataset{dataset_number(raw.name):03d}"  # nnU-Net takes whatever begins so
    same_id = sorted(path.name for path in raw.parent.glob(f"{start}*") if path.is_dir())
    if len(same_id) > 1:
        raise UserError(
            f"nnU-Net wants one dataset whose name begins with {start}, but {raw.parent} has "
            f"{' and '.join(same_id)}; give one of them another id."
        )
    return dataset


def dataset_number(name: str) -> int:
    """Return the id in a dataset's name; it has three digits or, above 999, more."""
    return int(name.removeprefix("Dataset").partition("_")[0])


def _is_dataset_name(name: str) -> bool:
    """Return whether nnU-Net finds a folder of this name by its id, as in ``-d 1234``."""
    match = re.fullmatch(r"Dataset([0-9]{3,})_.+", name)
    return match is not None and match[1] == f"{int(match[1]):03d}"


def prepare_out(out: Path, raw: Path | None) -> Path:
    """Make the output folder, or empty it of an earlier demo.

    Returns:
        Its absolute path.

    Raises:
        UserError: If it holds something that no demo wrote, is inside the dataset, or cannot
            be written.
    """
    out = out.expanduser().absolute()
    if raw is not None and (out == raw or raw in out.parents):
        raise UserError(
            f"--out must not be inside the dataset of --raw, but {out} is; choose another folder."
        )
    try:
        if not (out / MARKER).is_file() and out.exists() and (out.is_file() or any(out.iterdir())):
            raise UserError(
                "--out must be a new folder, an empty one or that of an earlier demo, but "
                f"{out} holds something else; choose another folder."
            )
        out.mkdir(parents=True, exist_ok=True)
        marker = {"made by": "meddinov3 demo", "version": __version__}
        write_text(out / MARKER, json.dumps(marker))
        for name in FOLDERS:
            if (out / name).exists():
                shutil.rmtree(out / name)
        for name in FILES:
            (out / name).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"--out must be a folder that can be written, but {out} cannot be "
            f"({first_line(error)}); choose another folder."
        ) from error
    return out


@dataclass(frozen=True)
class HeldOut:
    """Cases that were not trained on: a folder with their images, and one with their labels."""

    images: Path
    labels: Path


def held_out_cases(dataset: RawDataset, preprocessed: Path, folder: Path) -> HeldOut:
    """Return the test cases of a dataset if they have labels, else fold 0's validation cases.

    Args:
        dataset: The raw dataset.
        preprocessed: The same dataset after planning and training, with nnU-Net's split.
        folder: Where to gather the images of fold 0's validation cases, as links where possible.
    """
    test = dataset.images("imagesTs")
    if test and all(dataset.label(case, "labelsTs").is_file() for case in test):
        return HeldOut(dataset.folder / "imagesTs", dataset.folder / "labelsTs")
    splits = json.loads((preprocessed / "splits_final.json").read_text(encoding="utf-8"))
    images = dataset.images()
    folder.mkdir(parents=True)
    for case in splits[0]["val"]:
        for channel, path in images[case].items():
            _link(path.resolve(), folder / f"{case}_{channel:04d}{dataset.ending}")
    return HeldOut(folder, preprocessed / "gt_segmentations")


def _link(source: Path, target: Path) -> None:
    try:
        target.symlink_to(source)
    except OSError:  # Windows lets only some users make links
        copy_file(source, target)
