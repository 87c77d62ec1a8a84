"""From stored values to HU: bits, sign, rescale, and what is shown the other way round."""

import numpy as np
import pydicom
import pytest

from nnunetv2_meddinov3.curate.discover import find_sources
from nnunetv2_meddinov3.curate.modalities import identify
from nnunetv2_meddinov3.curate.orient import reorient
from nnunetv2_meddinov3.curate.readers import read
from nnunetv2_meddinov3.curate.volume import Unreadable

CT_CLASS = "1.2.840.10008.5.1.4.1.1.2"


def stored_values(bits, signed, seed=0):
    """Every end of the range, and noise."""
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
    values = np.random.default_rng(seed).integers(low, high + 1, (20, 26))
    values[0, :2] = low, high
    return values


def write(path, stored, bits=12, signed=False, packed=False, implicit=False, **elements):
    """Write one slice as pydicom does; an element that is None is left out."""
    meta = pydicom.dataset.FileMetaDataset()
    meta.MediaStorageSOPClassUID = CT_CLASS
    meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    little = pydicom.uid.ImplicitVRLittleEndian if implicit else pydicom.uid.ExplicitVRLittleEndian
    meta.TransferSyntaxUID = little
    dataset = pydicom.dataset.FileDataset(path, {}, file_meta=meta, preamble=bytes(128))
    values = {
        "SOPClassUID": CT_CLASS,
        "SOPInstanceUID": meta.MediaStorageSOPInstanceUID,
        "Modality": "CT",
        "PatientID": "p",
        "StudyInstanceUID": "1.2.3",
        "SeriesInstanceUID": "1.2.3.4",
        "InstanceNumber": 1,
        "ImagePositionPatient": [0, 0, 0],
        "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
        "PixelSpacing": [0.8, 0.7],
        "SliceThickness": 2,
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "Rows": stored.shape[0],
        "Columns": stored.shape[1],
        "BitsAllocated": 8 if bits <= 8 else 16,
        "BitsStored": bits,
        "HighBit": bits - 1,
        "PixelRepresentation": int(signed),
        "RescaleSlope": 1,
        "RescaleIntercept": -1024,
    }
    for name, value in (values | elements).items():
        if value is not None:
            setattr(dataset, name, value)
    kind = ("i" if signed else "u") + ("1" if bits <= 8 else "2")
    dataset.PixelData = stored.astype(f"<{kind}").tobytes()
    dataset["PixelData"].VR = "OW" if implicit or bits > 8 else "OB"
    if packed:
        dataset.compress(pydicom.uid.RLELossless, generate_instance_uid=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)
    return path


def read_only(folder):
    (source,), refused = find_sources([folder])
    assert refused == []
    return identify(reorient(read(source)), source)


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("bits", [8, 12, 16])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(
    ("slope", "intercept"), [(1, 0), (1, -1024), (1, 24), (2, -24), (0.5, -100), (-1, 1000)]
)
def test_how_an_image_is_shown_never_changes_its_values(
    tmp_path, photometric, bits, signed, slope, intercept
):
    stored = stored_values(bits, signed)
    write(tmp_path / "in/a.dcm", stored, bits, signed, RescaleSlope=slope,
          RescaleIntercept=intercept, PhotometricInterpretation=photometric)  # fmt: skip
    np.testing.assert_array_equal(read_only(tmp_path / "in").array[0], stored * slope + intercept)


@pytest.mark.parametrize("storage", [{"packed": True}, {"implicit": True}])
@pytest.mark.parametrize("signed", [False, True])
def test_inverted_images_are_read_in_every_encoding(tmp_path, storage, signed):
    stored = stored_values(12, signed)
    path = tmp_path / "in/a.dcm"
    write(path, stored, 12, signed, PhotometricInterpretation="MONOCHROME1", **storage)
    before = path.read_bytes()
    np.testing.assert_array_equal(read_only(tmp_path / "in").array[0], stored - 1024)
    assert path.read_bytes() == before


def test_inverted_mr_is_read_as_stored(tmp_path):
    stored = stored_values(12, False)
    write(tmp_path / "in/a.dcm", stored, Modality="MR", PhotometricInterpretation="MONOCHROME1",
          SOPClassUID="1.2.840.10008.5.1.4.1.1.4", RescaleSlope=None,
          RescaleIntercept=None)  # fmt: skip
    volume = read_only(tmp_path / "in")
    assert volume.modality == "MR"
    np.testing.assert_array_equal(volume.array[0], stored)


@pytest.mark.parametrize("missing", ["RescaleSlope", "RescaleIntercept", "both"])
@pytest.mark.parametrize("is_hu", [False, True])
def test_a_ct_without_a_rescale_is_ct_only_if_its_values_are(tmp_path, make_ct, missing, is_hu):
    hu = make_ct(1, 40)[0]
    stored = hu if is_hu else hu + 1100
    names = ("RescaleSlope", "RescaleIntercept") if missing == "both" else (missing,)
    identity = {"RescaleSlope": 1, "RescaleIntercept": 0} | dict.fromkeys(names)
    write(tmp_path / "in/a.dcm", stored, 16, True, **identity)
    volume = read_only(tmp_path / "in")
    assert volume.modality == ("CT" if is_hu else "unknown")
    assert "a CT whose header states no rescale to HU" in volume.notes
    np.testing.assert_array_equal(volume.array[0], stored)


def test_a_stated_identity_does_not_make_shifted_values_hu(tmp_path, make_ct):
    stored = make_ct(1, 40)[0] + 1024
    write(tmp_path / "in/a.dcm", stored, 16, True, RescaleIntercept=0)
    assert read_only(tmp_path / "in").modality == "unknown"


@pytest.mark.parametrize(
    ("unit", "modality"),
    [("HU", "CT"), ("US", "CT"), (None, "CT"), ("Z_EFF", "unknown"), ("MGML", "unknown")],
)
def test_a_ct_in_another_unit_is_of_unknown_values(tmp_path, make_ct, unit, modality):
    write(tmp_path / "in/a.dcm", make_ct(1, 40)[0], 16, True, RescaleIntercept=0, RescaleType=unit)
    assert read_only(tmp_path / "in").modality == modality


def test_a_table_of_values_is_not_taken_as_identity(tmp_path, make_ct):
    table = pydicom.Dataset()
    table.LUTDescriptor, table.ModalityLUTType, table.LUTData = [4, 0, 16], "HU", bytes(8)
    write(tmp_path / "in/a.dcm", make_ct(1, 40)[0] + 1024, RescaleSlope=None,
          RescaleIntercept=None, ModalityLUTSequence=[table])  # fmt: skip
    (source,), _ = find_sources([tmp_path / "in"])
    with pytest.raises(Unreadable, match="ModalityLUTSequence"):
        read(source)


def test_a_slice_without_the_rescale_of_the_others_costs_itself(tmp_path, make_ct):
    for z, hu in enumerate(make_ct(5, 40)):
        lost = dict.fromkeys(["RescaleSlope", "RescaleIntercept"]) if z == 4 else {}
        write(tmp_path / f"in/{z}.dcm", hu + 1024, ImagePositionPatient=[0, 0, 2 * z], **lost)
    volume = read_only(tmp_path / "in")
    assert (volume.modality, len(volume.array)) == ("CT", 4)
    assert "1 image left out, without the rescale of the others: 4.dcm" in volume.notes
