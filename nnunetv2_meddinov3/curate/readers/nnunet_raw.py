"""Raw datasets of nnU-Net (and the Medical Segmentation Decathlon) as folders of images.

Read from dataset.json alone, without nnU-Net, so that pretraining does not need it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from nnunetv2_meddinov3.curate.readers.imagefile import ENDINGS
from nnunetv2_meddinov3.curate.volume import Unreadable


@dataclass(frozen=True)
class RawDataset:
    """What dataset.json says.

    Attributes:
        folder: the dataset.
        ending: file ending of its images; empty for any known one (Decathlon).
        channel_names: number of a channel to its name.
        pattern: matches file names of images, with the groups ``case`` and ``channel``.
        entries: case -> paths of its channels, where dataset.json lists them.
    """

    folder: Path
    ending: str
    channel_names: dict[int, str]
    pattern: re.Pattern
    entries: dict[str, list[str]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name of the dataset: its folder's."""
        return self.folder.name

    def listed(self) -> Iterator[tuple[str, int, Path]]:
        """(case, channel, path) of the images that dataset.json lists itself."""
        for case, images in sorted(self.entries.items()):
            for channel, image in enumerate(images):
                yield case, channel, self.folder / os.path.expandvars(image)


def dataset_around(folder: Path) -> RawDataset | None:
    """The dataset that a folder of images or labels is a part of, if it is one."""
    if not re.match(r"images|labels", folder.name):
        return None
    try:
        return open_dataset(folder.parent)
    except Unreadable:
        return None


def open_dataset(folder: Path) -> RawDataset | None:
    """Read a folder's dataset.json; None if there is none or it is of another kind.

    Raises:
        Unreadable: If it is no JSON or not as nnU-Net wants it.
    """
    path = folder / "dataset.json"
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Unreadable("it is no JSON that can be read") from error
    if not isinstance(content, dict):
        return None
    channels = content.get("channel_names", content.get("modality"))
    if channels is None:
        return None
    try:
        names = {int(number): str(name) for number, name in channels.items()}
        ending = str(content.get("file_ending", ""))
        entries = {
            str(case): [str(image) for image in entry["images"]]
            for case, entry in content.get("dataset", {}).items()
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise Unreadable("its channel_names or dataset are not as nnU-Net wants them") from error
    return RawDataset(folder, ending, names, _pattern(ending), entries)


def _pattern(ending: str) -> re.Pattern:
    if ending:
        return re.compile(rf"(?P<case>.+)_(?P<channel>\d{{4}}){re.escape(ending)}")
    endings = "|".join(re.escape(known) for known in ENDINGS)
    return re.compile(rf"(?P<case>.+?)(?:_(?P<channel>\d{{4}}))?(?:{endings})")
