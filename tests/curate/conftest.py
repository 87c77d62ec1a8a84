"""Made in the test: a small CT with air, body and noise, and DICOM files of any tags."""

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.dataset import Dataset, FileMetaDataset

from nnunetv2_meddinov3.curate.modalities import identify
from nnunetv2_meddinov3.curate.orient import reorient
from nnunetv2_meddinov3.curate.readers import read
from nnunetv2_meddinov3.curate.volume import Unreadable, VolumeSource

ENHANCED_CT = "1.2.840.10008.5.1.4.1.1.2.1"
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
def enhanced():
    """A function that makes a multi-frame CT, a dataset of pydicom's, from frames (``frame``)."""
    return _enhanced


@pytest.fixture(scope="session")
def frame():
    """A function that makes a frame: its values, its place, and elements by group and keyword."""
    return _frame


def _frame(values, position, axes=(1, 0, 0, 0, 1, 0), rescale=(1, -1024), **elements):
    """Elements are given as ``FrameContentSequence__StackID="1"``; None leaves one out."""
    slope, intercept = rescale
    return np.rint((values - intercept) / slope).astype(np.uint16), {
        "PlanePositionSequence__ImagePositionPatient": list(position),
        "PlaneOrientationSequence__ImageOrientationPatient": list(axes),
        "PixelValueTransformationSequence__RescaleSlope": slope,
        "PixelValueTransformationSequence__RescaleIntercept": intercept,
        "PixelValueTransformationSequence__RescaleType": "HU",
    } | elements


def _enhanced(frames, shared=None, syntax=pydicom.uid.ExplicitVRLittleEndian, **elements):
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = elements.get("SOPClassUID", ENHANCED_CT)
    meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    meta.TransferSyntaxUID = syntax
    dataset = Dataset()
    dataset.file_meta, dataset.preamble = meta, bytes(128)
    stored = np.stack([values for values, _ in frames])
    shared = {
        "PixelMeasuresSequence__PixelSpacing": [SPACING[1], SPACING[0]],
        "PixelMeasuresSequence__SliceThickness": SPACING[2],
    } | (shared or {})
    for name, value in {
        "SOPClassUID": ENHANCED_CT,
        "SOPInstanceUID": meta.MediaStorageSOPInstanceUID,
        "Modality": "CT",
        "ImageType": ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"],
        "PatientID": "patient-7",
        "StudyInstanceUID": "1.2.3",
        "SeriesInstanceUID": "1.2.3.4",
        "InstanceNumber": 1,
        "NumberOfFrames": len(frames),
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "Rows": stored.shape[1],
        "Columns": stored.shape[2],
        "BitsAllocated": 16,
        "BitsStored": 12,
        "HighBit": 11,
        "PixelRepresentation": 0,
        "SharedFunctionalGroupsSequence": [_groups(shared)],
        "PerFrameFunctionalGroupsSequence": [_groups(own) for _, own in frames],
        **elements,
    }.items():
        if value is not None:
            setattr(dataset, name, value)
    order = ">" if syntax == pydicom.uid.ExplicitVRBigEndian else "<"
    dataset.PixelData = stored.astype(f"{order}u2").tobytes()
    dataset["PixelData"].VR = "OW"
    return dataset


def _groups(elements):
    result = Dataset()
    for name, value in elements.items():
        if value is not None:
            sequence, keyword = name.split("__")
            if sequence not in result:
                setattr(result, sequence, [Dataset()])
            setattr(result[sequence][0], keyword, value)
    return result


@pytest.fixture(scope="session")
def save():
    """A function that writes a dataset of pydicom's and returns the path."""
    return _save


def _save(dataset, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    pydicom.dcmwrite(path, dataset, enforce_file_format=True)
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
