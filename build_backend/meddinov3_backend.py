"""Build backend: setuptools, plus the start-up files at the top of site-packages.

setuptools has no way to put a ``.pth`` file into wheels and into editable installs alike, so the
finished wheel is written again with the two files added. All metadata stay in setup.cfg.
"""

import base64
import hashlib
import shutil
import zipfile
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import (  # noqa: F401 (hooks of PEP 517 and PEP 660)
    build_sdist,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    get_requires_for_build_wheel,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

STARTUP_FILES = ("nnunetv2_meddinov3.pth", "nnunetv2_meddinov3.start")


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    """Builds the wheel (PEP 517) and returns its file name."""
    # setuptools would pack modules that were deleted since the last build.
    shutil.rmtree("build/lib", ignore_errors=True)
    name = build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)
    return _add_startup_files(Path(wheel_directory) / name)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    """Builds the wheel of an editable install (PEP 660) and returns its file name."""
    name = build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
    return _add_startup_files(Path(wheel_directory) / name)


def _add_startup_files(wheel: Path) -> str:
    """Writes the wheel again: the start-up files, a new RECORD, timestamps that never change."""
    with zipfile.ZipFile(wheel) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    record = next(name for name in files if name.endswith(".dist-info/RECORD"))
    del files[record]
    files |= {name: Path(__file__).with_name(name).read_bytes() for name in STARTUP_FILES}
    rows = [f"{name},sha256={_digest(data)},{len(data)}\n" for name, data in files.items()]
    files[record] = "".join([*rows, f"{record},,\n"]).encode()
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, data, zipfile.ZIP_DEFLATED)
    return wheel.name


def _digest(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
