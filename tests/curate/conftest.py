"""Made in the test: a small CT with air, body and noise, and DICOM files of any tags."""

import numpy as np
import pytest
import SimpleITK as sitk

from nnunetv2_meddinov3.curate.modalities import identify
from nnunetv2_meddinov3.curate.orient import reorient
from nnunetv2_meddinov3.curate.readers import read
from nnunetv2_meddinov3.curate.volume import Unreadable, VolumeSource

SPACING = (0.7, 0.8, 2.5)  # x, y, z in mm
ORIGIN = (-12.0, -9.0, -104.0)


@pytest.fixture(scope="session")
def ct():
    """A CT of 6 slices, 20 rows and 26 columns without any symmetry, as an image in LPS."""
    rng = np.random.default_rng(0)
    array = rng.integers(-1000, 1500, (6, 20, 26)).astype(np.int16)
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(SPACING)
    image.SetOrigin(ORIGIN)
    return image


@pytest.fixture(scope="session")
def write_dicom():
    """A function that writes one slice (rows, columns) as DICOM, with tags of one's own."""
    return _write_dicom


def _write_dicom(path, pixels, position=(0.0, 0.0, 0.0), number=1, spacing=SPACING, **tags):
    """Tags are given as ``t0008_0060="CT"``; None leaves one out."""
    image = sitk.GetImageFromArray(pixels, isVector=pixels.ndim == 3 and pixels.shape[-1] == 3)
    image.SetSpacing(spacing[: image.GetDimension()])
    values = {
        "0008|0060": "CT",
        "0008|0008": "ORIGINAL\\PRIMARY\\AXIAL",
        "0008|0016": "1.2.840.10008.5.1.4.1.1.2",
        "0010|0020": "patient-7",
        "0020|000d": "1.2.3",
        "0020|000e": "1.2.3.4",
        "0020|0013": str(number),
        "0020|0032": "\\".join(f"{value:.6f}" for value in position),
        "0020|0037": "1\\0\\0\\0\\1\\0",
        "0018|0050": "2.5",
    }
    values |= {name[1:].replace("_", "|"): value for name, value in tags.items()}
    for tag, value in values.items():
        if value is not None:
            image.SetMetaData(tag, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    writer.SetImageIO("GDCMImageIO")
    writer.SetFileName(str(path))
    writer.Execute(image)
    return path


@pytest.fixture(scope="session")
def read_source():
    """A function that reads a source as a volume."""
    return _read_source


def _read_source(source):
    return identify(reorient(read(source)), source)


@pytest.fixture(scope="session")
def read_path():
    """A function that reads a file as a volume."""
    return _read_path


def _read_path(path, kind="file", channel_name=None):
    source = VolumeSource(path.name, kind, (str(path),), "d", path.stem, channel_name)
    return _read_source(source)


@pytest.fixture(scope="session")
def reason_of():
    """A function that returns why a file cannot be read."""
    return _reason_of


def _reason_of(path, kind="file"):
    with pytest.raises(Unreadable) as caught:
        _read_path(path, kind)
    told = str(caught.value)
    assert told
    assert path.name not in told
    assert str(path.parent) not in told
    return told


@pytest.fixture(scope="session")
def write_as():
    """A function that writes an image with SimpleITK and returns the path."""
    return _write_as


def _write_as(image, path):
    sitk.WriteImage(image, str(path))
    return path
