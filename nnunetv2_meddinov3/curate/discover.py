"""Finding inputs: nnU-Net raw datasets, folders of volumes, DICOM, single files.

Nothing but DICOM headers is opened here. Labels are never listed: of an nnU-Net dataset only the
folders of images are, and elsewhere folders named as labels are (``LABEL_FOLDERS``) are skipped.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from nnunetv2_meddinov3.curate.readers.dicom import is_slice
from nnunetv2_meddinov3.curate.readers.dicom_guard import has_mark
from nnunetv2_meddinov3.curate.readers.dicom_header import SliceHeader
from nnunetv2_meddinov3.curate.readers.dicom_multiframe import read_headers
from nnunetv2_meddinov3.curate.readers.dicom_pixels import check_decodable
from nnunetv2_meddinov3.curate.readers.dicom_series import volumes_of
from nnunetv2_meddinov3.curate.readers.images import DETACHED, ENDINGS, PICTURES, ending_of
from nnunetv2_meddinov3.curate.volume import Unreadable, VolumeSource, plain_text
from nnunetv2_meddinov3.errors import UserError, first_line
from nnunetv2_meddinov3.raw_dataset import RawDataset, find_raw_dataset

DICOM_ENDINGS = (".dcm", ".dicom", ".ima")
IDENTITY = (  # of an image in a series; keys in stores follow from it, so it never changes
    "SOPInstanceUID",
    "AcquisitionNumber",
    "SliceThickness",
    "InstanceNumber",
    "ImagePositionPatient",
)
DETACHED_DATA = (".raw", ".zraw", ".raw.gz")  # beside a header of DETACHED
DOCUMENTS = re.compile(
    r".*\.(txt|md|rst|json|csv|tsv|xml|html?|pdf|docx?|xlsx?|ya?ml|py|sh|log|sha256|md5|bib)"
    r"|(LICEN[SC]E|README|CHANGES|NOTICE|COPYING|DICOMDIR|(SHA|MD5)\w*)(\..*)?",
    re.IGNORECASE,
)  # what is kept beside images
LABEL_FOLDERS = re.compile(
    r"labels?(Tr|Ts|Va|Val)?|labelmaps?|labell?ed_dicom|masks_dicom|gts?|gt_segmentations"
    r"|ground([ _-]?truths?)?|annotations?"
    r"|((train(ing)?|test(ing)?|val(idation)?|manual)[ _-])?(masks?|segs?|segmentations?)",
    re.IGNORECASE,
)
LABEL_NAME = re.compile(
    r"(.+)[._-](seg|segmentation|mask|gt|ground_?truth|labels?|labelmap)", re.IGNORECASE
)
LABELS = "it holds labels, which are never read"


def find_sources(
    arguments: Sequence[Path],
) -> tuple[list[VolumeSource], list[tuple[str, str]]]:
    """List every input below some files and folders, each once, sorted by its key.

    Links are followed. A file that several arguments lead to belongs to the first of them.

    Returns:
        What was found, and (key, reason) of what cannot be an input: loops of folders, empty
        files, folders that cannot be read, unknown endings and the like. Documents beside
        images (README, .csv, .json, ...) are neither.

    Raises:
        UserError: If an argument does not exist, or two different ones have the same name.
    """
    finder = _Finder()
    names: dict[str, Path] = {}
    for argument in arguments:
        path = Path(argument).expanduser().absolute()
        if not path.exists():
            raise UserError(f"A source must be a file or folder, but {path} does not exist.")
        path = path.resolve() if ".." in path.parts else path
        dataset = _dataset_around(path) if path.is_dir() else None
        base = f"{dataset.folder.name}/{path.name}" if dataset else path.name or "root"
        base = plain_text(base)
        if names.setdefault(base, path).resolve() != path.resolve():
            raise UserError(
                "Sources must have different names, since the names in the store begin with "
                f"them, but {names[base]} and {path} are both {base}; give the folder above them "
                "or rename one."
            )
        finder.argument(path, base, dataset)
    return finder.results()


def named(sources: Sequence[VolumeSource]) -> list[tuple[str, VolumeSource]]:
    """Return sources, each with a name of its own that files can have."""
    names: dict[str, VolumeSource] = {}
    for source in sources:
        first = PurePosixPath(source.key.split("#")[0])
        stem = first.name.removesuffix(ending_of(first.name) or "")
        if first.suffix.casefold() in DICOM_ENDINGS:
            stem = first.stem
        name = plain_name(stem)
        while name in names:
            name += "_"
        names[name] = source
    return list(names.items())


def plain_name(stem: str) -> str:
    """Return what files can be called after a scan's name."""
    return re.sub(r"[^\w.-]+", "_", stem) or "scan"


class _Finder:
    """Collects sources and refusals over all arguments."""

    def __init__(self) -> None:
        self.found: dict[str, VolumeSource] = {}
        self.refused: dict[str, str] = {}
        self.seen: set[tuple[int, int]] = set()  # device and inode of files and folders
        # of a series and a patient: key, header and dataset of each image
        self.series: dict[tuple[str, str], list[tuple[str, SliceHeader, str]]] = {}

    def argument(self, path: Path, base: str, dataset: RawDataset | None) -> None:
        """Take one argument; ``dataset`` if it is a folder of an nnU-Net dataset."""
        folder = path if path.is_dir() else path.parent
        if LABEL_FOLDERS.fullmatch(folder.name):
            self.refused[base] = LABELS
        elif not path.is_dir():
            around = _dataset_around(path.parent)
            if around is None or not self._image(path, base, around):
                name = around.folder.name if around else path.parent.name
                self._file(path, base, name, path.name)
        elif dataset is not None:
            self._images(path, base, dataset, (self._identity(path),))
        else:
            self._folder(path, base, base, base, ())

    def results(self) -> tuple[list[VolumeSource], list[tuple[str, str]]]:
        """Return everything found and refused, sorted by key, with the DICOM files as series."""
        for (uid, patient), members in sorted(self.series.items(), key=lambda item: item[0]):
            members_of = {member[1].member: member for member in members}
            for volume in volumes_of([header for _, header, _ in members], is_slice):
                self._volume(uid, patient, [members_of[header.member] for header in volume])
        return [self.found[key] for key in sorted(self.found)], sorted(self.refused.items())

    def _volume(self, uid: str, patient: str, members: list[tuple[str, SliceHeader, str]]) -> None:
        """Take a volume of a series; the first has the plain key, others a suffix of their own."""
        members = sorted(members, key=lambda member: member[0])
        folder = os.path.commonpath([PurePosixPath(key).parent for key, _, _ in members])
        key = f"{members[0][0] if folder in ('', '.') else folder}#{uid}"
        if key in self.found:
            first = min([header.text(word) for word in IDENTITY] for _, header, _ in members)
            text = "\\".join([patient, *first])
            key += f"+{hashlib.sha256(text.encode()).hexdigest()[:8]}"
        if key in self.found:
            self.refused[members[0][0]] = (
                "another volume of its series has images of the same headers"
            )
            return
        frames: dict[str, list[int]] = {}
        for _, header, _ in members:
            of_file = frames.setdefault(str(header.path), [])
            if header.frame is not None:
                of_file.append(header.frame)
        some = tuple(map(tuple, frames.values())) if any(frames.values()) else ()
        self.found[key] = VolumeSource(
            key, "dicom", tuple(frames), plain_text(members[0][2]), patient, frames=some
        )

    def _identity(self, path: Path) -> tuple[int, int]:
        status = path.stat()
        return status.st_dev, status.st_ino

    def _entries(self, folder: Path, key: str) -> list[Path]:
        """Return the contents of a folder by name, without hidden ones, links last."""
        try:
            entries = [path for path in folder.iterdir() if not path.name.startswith(".")]
            return sorted(entries, key=lambda path: (path.is_symlink(), path.name))
        except OSError as error:
            self.refused[key] = f"the folder cannot be read ({error.strerror})"
            return []

    def _folder(
        self, folder: Path, key: str, dataset: str, base: str, above: tuple[tuple[int, int], ...]
    ) -> None:
        """Walk a folder; ``above`` are the identities of the folders that contain it."""
        identity = self._identity(folder)
        if identity in above:
            self.refused[key] = "it is a link to a folder that contains it"
            return
        if identity in self.seen:
            return
        self.seen.add(identity)
        above = (*above, identity)
        raw = self._raw_dataset(folder, key)
        if raw is not None:
            for path in self._entries(folder, key):
                if path.name.startswith("images") and _is_folder(path):
                    self._images(path, f"{key}/{path.name}", raw, above)
            self._listed(raw, key)
            return
        for path in self._entries(folder, key):
            child = f"{key}/{plain_text(path.name)}"
            if not _is_folder(path) and not DOCUMENTS.fullmatch(path.name):
                self._file(path, child, dataset, child.removeprefix(f"{base}/"))
            elif _is_folder(path) and not LABEL_FOLDERS.fullmatch(path.name):
                self._folder(path, child, dataset, base, above)

    def _raw_dataset(self, folder: Path, key: str) -> RawDataset | None:
        try:
            return find_raw_dataset(folder)
        except UserError as error:
            why = first_line(error.__cause__ or error)
            self.refused[f"{key}/dataset.json"] = f"it is not as nnU-Net wants it ({why})"
            return None

    def _images(
        self, folder: Path, key: str, raw: RawDataset, above: tuple[tuple[int, int], ...]
    ) -> None:
        """Take the images in one folder of an nnU-Net dataset, which has no folders in it."""
        for path in self._entries(folder, key):
            child = f"{key}/{plain_text(path.name)}"
            if _is_folder(path):
                loop = path.is_symlink() and self._identity(path) in above
                self.refused[child] = (
                    "it is a link to a folder that contains it" if loop
                    else "a folder, where nnU-Net keeps only images"
                )  # fmt: skip
            elif not self._image(path, child, raw) and path.suffix != ".json":
                self.refused[child] = f"its name is not CASE_0000{raw.ending}, as nnU-Net wants"

    def _listed(self, raw: RawDataset, key: str) -> None:
        """Take the images that dataset.json lists, which may be in other places."""
        for case, (images, _) in sorted(raw.entries.items()):
            for channel, path in enumerate(images):
                child = f"{key}/{case}_{channel:04d}{raw.ending}"
                if self._regular(path, child):
                    name = raw.channel_names.get(channel)
                    self._add(path, child, raw.folder.name, case, name)

    def _image(self, path: Path, key: str, raw: RawDataset) -> bool:
        """Take an image that is named as the dataset wants; False if it is not."""
        named = raw.split_name(path.name, ENDINGS)
        if named is None:
            return False
        case, channel = named
        if self._regular(path, key):
            self._add(path, key, raw.folder.name, case, raw.channel_names.get(channel))
        return True

    def _file(self, path: Path, key: str, dataset: str, relative: str) -> None:
        """Take a file of any kind: volume, picture, DICOM, or none of them."""
        if not self._regular(path, key):
            return
        ending = ending_of(path.name)
        if ending is not None:
            if image := _image_of_labels(path, ending):
                self.refused[key] = f"it is named as the labels of {plain_text(image)} beside it"
                return
            self._add(path, key, dataset, relative[: -len(ending)])
            return
        try:
            if path.suffix.lower() not in DICOM_ENDINGS and not has_mark(path):
                if not self._belongs_to_header(path):
                    self.refused[key] = f"its ending {path.suffix or '(none)'} is not known"
                return
            headers = read_headers(path)
            check_decodable(headers[0])
        except OSError as error:
            self.refused[key] = f"it cannot be read ({error.strerror})"
        except Unreadable as error:
            self.refused[key] = str(error)
        else:
            series, patient = headers[0].series, headers[0].patient
            if not series:
                self.refused[key] = "it has no SeriesInstanceUID"
                return
            members = self.series.setdefault((series, patient), [])
            members += [(key, header, dataset) for header in headers]

    def _belongs_to_header(self, path: Path) -> bool:
        data = next((end for end in DETACHED_DATA if path.name.lower().endswith(end)), None)
        stem = path.name[: -len(data)] if data else None
        return stem is not None and any(path.with_name(stem + end).is_file() for end in DETACHED)

    def _regular(self, path: Path, key: str) -> bool:
        """Return whether a file can be opened and was not seen yet; refuse what cannot."""
        try:
            status = path.stat()
        except OSError as error:
            broken = path.is_symlink()
            self.refused[key] = (
                "it is a link to nothing" if broken else f"it cannot be read ({error.strerror})"
            )
            return False
        if not stat.S_ISREG(status.st_mode):
            self.refused[key] = "it is not a regular file"
            return False
        identity = (status.st_dev, status.st_ino)
        if identity in self.seen:
            return False
        self.seen.add(identity)
        if status.st_size == 0:
            self.refused[key] = "the file is empty"
            return False
        return True

    def _add(
        self, path: Path, key: str, dataset: str, patient: str, channel_name: str | None = None
    ) -> None:
        kind = "png" if ending_of(path.name) in PICTURES else "file"
        self.found[key] = VolumeSource(
            key, kind, (str(path),), plain_text(dataset), plain_text(patient), channel_name
        )


def _dataset_around(folder: Path) -> RawDataset | None:
    """Return the dataset that a folder of images or labels is a part of, if it is one."""
    if not re.match(r"images|labels", folder.name):
        return None
    try:
        return find_raw_dataset(folder.parent)
    except UserError:
        return None


def _image_of_labels(path: Path, ending: str) -> str | None:
    """Return the name of the image beside a file that is named as its labels, if there is one."""
    named = LABEL_NAME.fullmatch(path.name[: -len(ending)])
    if named is None:
        return None
    names = (f"{named[1]}{part}{end}" for part in ("", "_0000") for end in ENDINGS)
    return next((name for name in names if path.with_name(name).is_file()), None)


def _is_folder(path: Path) -> bool:
    """Return whether it is a folder or a link to one; False where that cannot be told."""
    try:
        return path.is_dir()
    except OSError:
        return False
