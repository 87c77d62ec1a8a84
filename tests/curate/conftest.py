"""Made in the test: a small CT with air, body and noise, and DICOM files of any tags."""

import numpy as np
import pytest
import SimpleITK as sitk

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
