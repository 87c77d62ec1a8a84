"""A raw dataset of nnU-Net as a folder: its cases, channels and labels.

Read from dataset.json and file names alone, without nnU-Net, so that every part of this package
can use it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nnunetv2_meddinov3.errors import UserError, first_line

_WANTED = "a raw dataset of nnU-Net is a folder DatasetXXX_Name with dataset.json and images"
IGNORE = "ignore"  # nnU-Net's name of the label whose voxels count nowhere


@dataclass(frozen=True)
class RawDataset:
    """What dataset.json says.

    Attributes:
        folder: The dataset.
        ending: File ending of images and labels; empty where none is given (Decathlon).
        channel_names: Number of a channel -> its name, which tells the modality.
        labels: Name -> the values that belong to it, one or those of a region, in the order of
            dataset.json, without background and ignore.
        ignore: Value of the ignore label, None without one.
        reader: Name of the reader of nnU-Net that dataset.json asks for, None where it asks for
            none.
        entries: Case -> paths of its channels and of its label (None if not given), where
            dataset.json lists them itself.
    """

    folder: Path
    ending: str
    channel_names: dict[int, str]
    labels: dict[str, tuple[int, ...]] = field(default_factory=dict)
    ignore: int | None = None
    reader: str | None = None
    entries: dict[str, tuple[tuple[Path, ...], Path | None]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name of the dataset: its folder's."""
        return self.folder.resolve().name

    def images(self, part: str = "imagesTr") -> dict[str, dict[int, Path]]:
        """Return case -> channel -> file of a part, both sorted.

        The training cases are those that dataset.json lists, if it lists any; otherwise, and in
        other parts, the files ``CASE_0000.ending`` of the folder.
        """
        if part == "imagesTr" and self.entries:
            return {case: dict(enumerate(e[0])) for case, e in sorted(self.entries.items())}
        return self.images_in(self.folder / part)

    def images_in(self, folder: Path) -> dict[str, dict[int, Path]]:
        """Return case -> channel -> file ``CASE_0000.ending`` of any folder, both sorted."""
        pattern = re.compile(rf"(.+)_(\d{{4}}){re.escape(self.ending)}")
        cases: dict[str, dict[int, Path]] = {}
        for path in sorted(folder.glob("*")):
            if match := pattern.fullmatch(path.name):
                cases.setdefault(match[1], {})[int(match[2])] = path
        return dict(sorted(cases.items()))

    def split_name(self, name: str, endings: Sequence[str] = ()) -> tuple[str, int] | None:
        """Return case and channel of an image's file name, None if nnU-Net names no image so.

        Args:
            name: Of the file.
            endings: Those to accept where dataset.json names none (Decathlon); a name without a
                channel is then channel 0.
        """
        if self.ending:
            match = re.fullmatch(rf"(.+)_(\d{{4}}){re.escape(self.ending)}", name)
        else:
            known = "|".join(map(re.escape, endings))
            match = re.fullmatch(rf"(.+?)(?:_(\d{{4}}))?(?:{known})", name)
        return (match[1], int(match[2] or 0)) if match else None

    def label(self, case: str, part: str = "labelsTr") -> Path:
        """Return the label file of a case, which need not exist."""
        listed = self.entries.get(case, ((), None))[1] if part == "labelsTr" else None
        return listed or self.folder / part / f"{case}{self.ending}"

    def unlabelled(self) -> list[str]:
        """Return the training cases whose label file does not exist, sorted."""
        return [case for case in self.images() if not self.label(case).is_file()]


def open_raw_dataset(folder: Path | str) -> RawDataset:
    """Read a dataset's dataset.json, nnU-Net's or the Medical Segmentation Decathlon's.

    Raises:
        UserError: If there is none, it cannot be read, or it is not as nnU-Net wants it.
    """
    return read_dataset_json(Path(folder) / "dataset.json")


def read_dataset_json(path: Path) -> RawDataset:
    """Read a dataset.json, whatever its name; its folder counts as the dataset's.

    Raises:
        UserError: As ``open_raw_dataset``.
    """
    content = _read_json(path)
    if not _is_of_a_raw_dataset(content):
        raise UserError(f"{_WANTED}, but {path} lacks channel_names: add what is missing.")
    return _checked(path, content)


def find_raw_dataset(folder: Path) -> RawDataset | None:
    """Return the dataset of a folder without its labels, None if the folder is not a dataset.

    For those who read images alone: the labels may be anything. A dataset.json that is not about
    images does not count.

    Raises:
        UserError: If dataset.json cannot be read or is not as nnU-Net wants it; the cause of the
            error says why without the path.
    """
    path = folder / "dataset.json"
    if not path.is_file():
        return None
    content = _read_json(path)
    return _checked(path, {**content, "labels": {}}) if _is_of_a_raw_dataset(content) else None


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{_WANTED}, but there is no {path}: give the dataset's folder.") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} must be readable JSON: {first_line(error)}.") from error


def _is_of_a_raw_dataset(content: Any) -> bool:
    return isinstance(content, dict) and bool({"channel_names", "modality"} & content.keys())


def _checked(path: Path, content: dict[str, Any]) -> RawDataset:
    try:
        return _parse(path.parent, content)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} must have channel_names, labels and dataset as nnU-Net "
            f"wants them, but has not ({type(error).__name__}: {first_line(error)})."
        ) from error


def foreground_labels(labels: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return name -> values of the ``labels`` of a dataset.json, without background and ignore.

    As in nnU-Net, the background is what has the value 0, whatever its name, and the ignore label
    is what is called ``ignore``.

    Args:
        labels: Name -> value or list of values (a region), as nnU-Net 2 wants it, or value -> name
            as the Decathlon has it.

    Raises:
        ValueError: If a value is not a whole number.
    """
    return {
        name: values
        for name, values in _by_name(labels).items()
        if name != IGNORE and set(values) != {0}
    }


def _by_name(labels: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    if all(isinstance(name, str) and value.isdecimal() for value, name in labels.items()):
        labels = {name: value for value, name in labels.items()}  # the Decathlon's
    return {
        str(name): tuple(map(_whole, value if isinstance(value, list | tuple) else [value]))
        for name, value in labels.items()
    }


def _whole(value: Any) -> int:
    if int(value) != float(value):
        raise ValueError(f"the label value {value!r} is not a whole number")
    return int(value)


def _parse(folder: Path, content: dict[str, Any]) -> RawDataset:
    labels = content.get("labels", {})
    channels = content.get("channel_names", content.get("modality", {}))
    ignore = _by_name(labels).get(IGNORE)
    return RawDataset(
        folder=folder,
        ending=_text(content.get("file_ending", "")),
        channel_names={int(number): str(name) for number, name in channels.items()},
        labels=foreground_labels(labels),
        ignore=ignore[0] if ignore else None,
        reader=content.get("overwrite_image_reader_writer"),
        entries={
            str(case): (
                tuple(_place(folder, image) for image in _list(entry["images"])),
                _place(folder, entry["label"]) if entry.get("label") else None,
            )
            for case, entry in content.get("dataset", {}).items()
        },
    )


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not text")
    return value


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"{value!r} is not a list")
    return value


def _place(folder: Path, path: str) -> Path:
    """A path of dataset.json, which nnU-Net expands and takes from the dataset's folder."""
    return folder / os.path.expandvars(path)
