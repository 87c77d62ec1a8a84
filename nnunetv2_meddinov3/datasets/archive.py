"""What was downloaded: files in folders, or still in their .zip and .tar archives."""

from __future__ import annotations

import contextlib
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from nnunetv2_meddinov3.errors import UserError, first_line

_ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz")


@dataclass(frozen=True)
class Member:
    """A file of a download.

    Attributes:
        name: Its path within the download, ``RawData/Training/img/img0001.nii.gz``.
        archive: The archive that it is in, None if it is a file of its own.
        path: Its path on the disk, if it is a file of its own.
    """

    name: PurePosixPath
    archive: Path | None = None
    path: Path | None = None

    def __str__(self) -> str:
        return str(self.path) if self.archive is None else f"{self.name} in {self.archive}"

    @contextlib.contextmanager
    def on_disk(self) -> Iterator[Path]:
        """Yield a path to read the file from, unpacked into a temporary folder if need be.

        Raises:
            UserError: If the archive is damaged.
        """
        if self.path is not None:
            yield self.path
            return
        assert self.archive is not None
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / self.name.name
            try:
                _unpack(self.archive, str(self.name), target)
            except (OSError, EOFError, zipfile.BadZipFile, tarfile.TarError) as error:
                raise UserError(
                    f"{self} must be readable, but: {first_line(error)}; download it again."
                ) from error
            yield target


def _unpack(archive: Path, name: str, target: Path) -> None:
    if archive.name.endswith(".zip"):
        with zipfile.ZipFile(archive) as zipped, zipped.open(name) as source:
            _write(source, target)
        return
    with tarfile.open(archive) as tarred:
        found = tarred.extractfile(name)
        assert found is not None  # listed as a file
        _write(found, target)


def _write(source: IO[bytes], target: Path) -> None:
    with target.open("wb") as copy:
        shutil.copyfileobj(source, copy)


def members(folder: Path) -> list[Member]:
    """Return all files of a folder and of the archives in it, by name.

    A file that is there unpacked and in an archive counts once, unpacked. What macOS adds to
    archives is left out.

    Raises:
        UserError: If there is no such folder or an archive is damaged.
    """
    if not folder.is_dir():
        raise UserError(
            f"the download must be a folder, with archives or with what they hold, but {folder} "
            "is none: give the folder."
        )
    plain, packed = [], []
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not _is_of_macos(PurePosixPath(path.relative_to(folder).as_posix())):
            if path.name.lower().endswith(_ARCHIVES):
                packed += [Member(name, archive=path) for name in _names(path)]
            else:
                name = PurePosixPath(path.relative_to(folder).as_posix())
                plain.append(Member(name, path=path))
    return plain + [member for member in packed if not _is_of_macos(member.name)]


def _names(archive: Path) -> list[PurePosixPath]:
    try:
        if archive.name.endswith(".zip"):
            with zipfile.ZipFile(archive) as opened:
                names = [info.filename for info in opened.infolist() if not info.is_dir()]
        else:
            with tarfile.open(archive) as opened:
                names = [info.name for info in opened if info.isfile()]
    except (OSError, EOFError, zipfile.BadZipFile, tarfile.TarError) as error:
        raise UserError(
            f"{archive} must be a whole archive, but: {first_line(error)}; download it again."
        ) from error
    return sorted(map(PurePosixPath, names))


def _is_of_macos(name: PurePosixPath) -> bool:
    return "__MACOSX" in name.parts or name.name.startswith("._")
