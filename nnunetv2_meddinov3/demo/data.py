"""The folders of the demo: the dataset it reads, the folder it writes, the cases it measures."""

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nnunetv2_meddinov3 import __version__
from nnunetv2_meddinov3.errors import UserError

MARKER = "meddinov3_demo.json"
FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results", "held_out", "predictions", "logs")
FILES = ("overlay.png", "report.html")
FOLDS = 5  # of nnU-Net's cross-validation, which wants a training case for each


def read_dataset_json(raw: Path) -> dict:
    """The content of a raw dataset's dataset.json."""
    return json.loads((raw / "dataset.json").read_text(encoding="utf-8"))


def check_raw(raw: Path) -> Path:
    """Check that nnU-Net can plan and split a raw dataset, which is only read.

    Returns:
        Its absolute path.

    Raises:
        UserError: If it is not one, is too small, or shares its id with another dataset.
    """
    raw = raw.expanduser().absolute()
    wanted = "--raw must be a raw dataset of nnU-Net (DatasetXXX_Name: dataset.json and images)"
    if not re.fullmatch(r"Dataset\d{3}_.+", raw.name):
        raise UserError(f"{wanted}, but {raw} is not named so; give the dataset's own folder.")
    try:
        dataset = read_dataset_json(raw)
        missing = {"channel_names", "labels", "file_ending"} - dataset.keys()
        cases = {} if missing else training_images(raw, dataset)
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{wanted}, but reading {raw} failed: {error}") from error
    if missing:
        names = ", ".join(sorted(missing))
        raise UserError(f"{wanted}, but {raw / 'dataset.json'} lacks {names}; add what is missing.")
    if len(cases) < FOLDS:
        raise UserError(
            f"{wanted} with at least {FOLDS} training cases for nnU-Net's {FOLDS} folds, but "
            f"{raw} has {len(cases)}; add cases or run the demo without --raw."
        )
    same_id = sorted(path.name for path in raw.parent.glob(f"{raw.name[:10]}_*") if path.is_dir())
    if len(same_id) > 1:
        raise UserError(
            f"nnU-Net wants one dataset for each id, but {raw.parent} has {' and '.join(same_id)}; "
            "give one of them another id."
        )
    return raw


def training_images(raw: Path, dataset_json: Mapping) -> dict[str, list[Path]]:
    """Case -> files of its channels, from dataset.json if it lists them, else from imagesTr."""
    if "dataset" in dataset_json:
        return {
            case: [raw / os.path.expandvars(image) for image in entry["images"]]
            for case, entry in dataset_json["dataset"].items()
        }
    return images_in(raw / "imagesTr", dataset_json)


def images_in(folder: Path, dataset_json: Mapping) -> dict[str, list[Path]]:
    """Case -> files of its channels (``CASE_0000.nii.gz``, ...) in a folder."""
    pattern = re.compile(r"(.+)_\d{4}" + re.escape(dataset_json["file_ending"]))
    cases: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*")):
        if match := pattern.fullmatch(path.name):
            cases.setdefault(match[1], []).append(path)
    return cases


def prepare_out(out: Path, raw: Path | None) -> Path:
    """Make the output folder, or empty it of an earlier demo.

    Returns:
        Its absolute path.

    Raises:
        UserError: If it holds something that no demo wrote, lies in the dataset, or cannot be
            written.
    """
    out = out.expanduser().absolute()
    if raw is not None and (out == raw or raw in out.parents):
        raise UserError(
            f"--out must not lie in the dataset of --raw, but {out} does; choose another folder."
        )
    try:
        if not (out / MARKER).is_file() and out.exists() and (out.is_file() or any(out.iterdir())):
            raise UserError(
                "--out must be a new folder, an empty one or that of an earlier demo, but "
                f"{out} holds something else; choose another folder."
            )
        out.mkdir(parents=True, exist_ok=True)
        marker = {"made by": "meddinov3 demo", "version": __version__}
        (out / MARKER).write_text(json.dumps(marker), encoding="utf-8")
        for name in FOLDERS:
            if (out / name).exists():
                shutil.rmtree(out / name)
        for name in FILES:
            (out / name).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"--out must be a folder that can be written, but {out} cannot be ({error.strerror}); "
            "choose another folder."
        ) from error
    return out


@dataclass(frozen=True)
class HeldOut:
    """Cases that were not trained on: a folder with their images, and one with their labels."""

    images: Path
    labels: Path

    def first_channels(self, dataset_json: Mapping) -> dict[str, Path]:
        """Case -> file of its first channel."""
        return {case: paths[0] for case, paths in images_in(self.images, dataset_json).items()}


def held_out_cases(raw: Path, preprocessed: Path, folder: Path) -> HeldOut:
    """The test cases of a dataset if they have labels, else the validation cases of fold 0.

    Args:
        raw: The raw dataset.
        preprocessed: The same dataset after planning and training, with nnU-Net's split.
        folder: Where to gather the images of fold 0's validation cases, as links where possible.
    """
    dataset_json = read_dataset_json(raw)
    ending = dataset_json["file_ending"]
    test = images_in(raw / "imagesTs", dataset_json)
    if test and all((raw / "labelsTs" / f"{case}{ending}").is_file() for case in test):
        return HeldOut(raw / "imagesTs", raw / "labelsTs")
    splits = json.loads((preprocessed / "splits_final.json").read_text(encoding="utf-8"))
    images = training_images(raw, dataset_json)
    folder.mkdir(parents=True)
    for case in splits[0]["val"]:
        for channel, path in enumerate(images[case]):
            _link(path.resolve(), folder / f"{case}_{channel:04d}{ending}")
    return HeldOut(folder, preprocessed / "gt_segmentations")


def _link(source: Path, target: Path) -> None:
    try:
        target.symlink_to(source)
    except OSError:  # Windows lets only some users make links
        shutil.copyfile(source, target)
