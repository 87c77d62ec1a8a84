import hashlib
import os
import random
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from nnunetv2_meddinov3.curate.discover import find_sources
from nnunetv2_meddinov3.curate.modalities import identify
from nnunetv2_meddinov3.curate.orient import reorient
from nnunetv2_meddinov3.curate.readers import dicom_header, dicom_pixels, read
from nnunetv2_meddinov3.curate.volume import Unreadable

LIDC = Path(__file__).parents[4] / "shared/data/lidc_idri_0314/lidc_idri_0314_ct.nii.gz"


@pytest.fixture
def write_series(tmp_path, ct, write_dicom):
    """A function that writes the CT, or slices of it, under shuffled file names."""

    def write(indices=None, folder="series", image=ct, change=lambda k, tags: tags):
        array = sitk.GetArrayFromImage(image)
        indices = list(range(len(array)) if indices is None else indices)
        names = random.Random(3).sample(range(1000), len(indices))
        for number, (k, name) in enumerate(zip(indices, names, strict=True)):
            position = image.TransformIndexToPhysicalPoint((0, 0, int(k)))
            tags = change(k, {"position": position, "number": number})
            path = tmp_path / folder / f"{name:03d}.dcm"
            write_dicom(path, array[k], **tags)
        return tmp_path / folder

    return write


def read_volume(source):
    return identify(reorient(read(source)), source)


def read_only(folder):
    found, refused = find_sources([folder])
    assert refused == []
    (source,) = found
    return read_volume(source)


def reason(folder):
    with pytest.raises(Unreadable) as caught:
        read_only(folder)
    return str(caught.value)


def test_a_series_in_shuffled_files_is_the_volume_it_was_written_from(ct, write_series):
    volume = read_only(write_series())
    assert volume.array.dtype == np.int16
    np.testing.assert_array_equal(volume.array, sitk.GetArrayFromImage(ct))
    assert volume.spacing == pytest.approx((2.5, 0.8, 0.7))
    np.testing.assert_allclose(volume.positions_mm, -104 + 2.5 * np.arange(6))
    assert (volume.orientation, volume.modality, volume.windowed) == ("LPS", "CT", False)
    assert volume.intensity is None
    assert volume.notes == ("slice thickness 2.5 mm",)


def test_a_series_is_found_by_its_uid_and_the_patient_id_is_hashed(write_series):
    first = write_series(folder="all/a")
    other = write_series(folder="all/b", change=lambda k, tags: {**tags, "t0020_000e": "9.9"})
    for path in first.iterdir():  # a series may lie in several folders, in files of any name
        path.rename(path.parents[1] / ("a" if int(path.stem) % 2 else "b") / f"{path.stem}_x")
    found, refused = find_sources([first.parent])
    assert refused == []
    assert [source.key for source in found] == ["all#1.2.3.4", "all/b#9.9"]
    assert [len(source.paths) for source in found] == [6, 6]
    assert re.fullmatch("[0-9a-f]{16}", found[0].patient)
    assert found[0].patient == found[1].patient
    assert "patient-7" not in repr(found)
    np.testing.assert_array_equal(read_volume(found[0]).array, read_volume(found[1]).array)
    assert other.is_dir()


def test_rescale_is_applied_to_each_slice_by_its_own_values(ct, write_series):
    def change(k, tags):
        slope, intercept = ("2", "-24") if k % 2 else ("1", "-1024")
        return {**tags, "t0028_1053": slope, "t0028_1052": intercept}

    # SimpleITK stores (value - intercept) / slope, so that even values come back in HU.
    array = sitk.GetArrayFromImage(ct) // 2 * 2
    image = sitk.GetImageFromArray(array)
    image.CopyInformation(ct)
    folder = write_series(image=image, change=change)
    stored = {_raw_tag(path, b"\x28\x00\x53\x10") for path in folder.iterdir()}
    assert stored == {b"1 ", b"2 "}
    np.testing.assert_array_equal(read_only(folder).array, array)


def _raw_tag(path, tag):
    data = path.read_bytes()
    at = data.index(tag) + 8  # behind the tag and, in implicit encoding, the length
    return data[at : at + int.from_bytes(data[at - 4 : at], "little")]


def test_gantry_tilt_is_noted_and_the_slices_are_kept(ct, write_series):
    tilt = np.radians(15)
    axes = f"1\\0\\0\\0\\{np.cos(tilt):.8f}\\{np.sin(tilt):.8f}"
    volume = read_only(write_series(change=lambda k, tags: {**tags, "t0020_0037": axes}))
    np.testing.assert_array_equal(volume.array, sitk.GetArrayFromImage(ct))
    assert "gantry tilt 15 degrees, slices kept as acquired" in volume.notes
    assert volume.spacing[0] == pytest.approx(2.5 * np.cos(tilt), abs=1e-4)
    np.testing.assert_allclose(np.diff(volume.positions_mm), 2.5 * np.cos(tilt), atol=1e-4)


def test_missing_slices_are_noted_and_positions_kept(ct, write_series):
    volume = read_only(write_series(indices=[0, 1, 2, 5]))
    np.testing.assert_array_equal(volume.array, sitk.GetArrayFromImage(ct)[[0, 1, 2, 5]])
    np.testing.assert_allclose(volume.positions_mm, [-104, -101.5, -99, -91.5])
    assert volume.spacing[0] == pytest.approx(2.5)
    assert "2 slices missing between others, positions kept" in volume.notes


def test_of_slices_at_one_position_the_first_instance_is_kept(ct, write_series, write_dicom):
    folder = write_series(change=lambda k, tags: {**tags, "number": k + 10})
    for number, name in ((3, "999"), (500, "000")):
        position = ct.TransformIndexToPhysicalPoint((0, 0, 2))
        pixels = np.full((20, 26), -number, dtype=np.int16)
        write_dicom(folder / f"{name}z.dcm", pixels, position=position, number=number)
    volume = read_only(folder)
    expected = sitk.GetArrayFromImage(ct).copy()
    expected[2] = -3
    np.testing.assert_array_equal(volume.array, expected)
    assert any(note.startswith("2 duplicate slices left out") for note in volume.notes)


def test_localizers_and_images_of_another_size_in_a_series_are_left_out(
    ct, write_series, write_dicom
):
    folder = write_series()
    scout = np.zeros((20, 26), dtype=np.int16)
    write_dicom(folder / "scout.dcm", scout, t0008_0008="ORIGINAL\\PRIMARY\\LOCALIZER")
    write_dicom(folder / "wide.dcm", np.zeros((20, 30), dtype=np.int16))
    volume = read_only(folder)
    np.testing.assert_array_equal(volume.array, sitk.GetArrayFromImage(ct))
    scout = "1 image left out, it is a localizer (scout), not a volume: scout.dcm"
    assert scout in volume.notes
    wide = "1 image left out, of another size, orientation or pixel spacing: wide.dcm"
    assert wide in volume.notes


def test_slices_from_head_to_feet_and_prone_patients_come_out_in_one_order(ct, write_series):
    turned = sitk.DICOMOrient(ct, "RAS")
    axes = "\\".join(
        f"{value:g}" for value in np.reshape(turned.GetDirection(), (3, 3)).T[:2].ravel()
    )
    volume = read_only(
        write_series(image=turned, change=lambda k, tags: {**tags, "t0020_0037": axes})
    )
    np.testing.assert_array_equal(volume.array, sitk.GetArrayFromImage(ct))
    assert volume.orientation == "RAS"
    np.testing.assert_allclose(volume.positions_mm, -104 + 2.5 * np.arange(6))


def coronal(write_series, ct, indices):
    turned = sitk.DICOMOrient(ct, "LSP")  # coronal slices, rows towards the head
    axes = "1\\0\\0\\0\\0\\1"
    return write_series(
        indices, image=turned, change=lambda k, tags: {**tags, "t0020_0037": axes,
                                                       "spacing": (0.7, 2.5)},
    )  # fmt: skip


def test_a_pet_series_is_read_with_the_slope_of_each_slice(ct, write_series):
    def change(k, tags):  # becquerels per millilitre, each slice scaled to its own largest value
        slope = {"t0028_1053": str(1 + k), "t0028_1052": "0"}
        return {**tags, "t0008_0060": "PT", "t0008_0016": "1.2.840.10008.5.1.4.1.1.128", **slope}

    counts = sitk.Abs(ct)
    counts.CopyInformation(ct)
    folder = write_series(image=counts, change=change)
    (source,) = find_sources([folder])[0]
    array = sitk.GetArrayFromImage(counts)
    slopes = (1 + np.arange(len(array)))[:, None, None]
    stored = array // slopes  # GDCM writes so that the slope gives the values again
    np.testing.assert_array_equal(reorient(read(source)).array, stored * slopes)
    volume = read_volume(source)
    assert volume.modality == "PT"
    assert volume.intensity is not None  # mapped, as all that is no HU


def test_a_coronal_series_is_cut_into_axial_slices(ct, write_series):
    volume = read_only(coronal(write_series, ct, range(20)))
    np.testing.assert_array_equal(volume.array, sitk.GetArrayFromImage(ct))
    assert "acquired in coronal slices, axial ones are cut across them" in volume.notes
    np.testing.assert_allclose(volume.positions_mm, -104 + 2.5 * np.arange(6))


def test_a_coronal_series_with_missing_slices_is_refused(ct, write_series):
    told = reason(coronal(write_series, ct, [0, 1, 2, 3, 4, 9]))
    assert told == "it was acquired across the axial plane and slices of it are missing"


@pytest.mark.parametrize(
    ("tags", "words"),
    [
        ({"t0008_0060": "US"}, "its modality is US, not CT, MR, PT"),
        ({"t0008_0008": "DERIVED\\SECONDARY\\LOCALIZER"}, "it is a localizer (scout)"),
        ({"t0008_0016": "1.2.840.10008.5.1.4.1.1.7"}, "it is a secondary capture"),
        ({"t0028_1052": "1e7", "t0028_1053": "1"}, "its rescale is absurd"),
    ],
)
def test_what_is_no_acquired_ct_or_mr_is_refused_with_its_reason(write_series, tags, words):
    assert reason(write_series(change=lambda k, old: {**old, **tags})).startswith(words)


@pytest.mark.parametrize("slope", [b"0 ", b"x ", b"-0"])
def test_a_single_slice_with_an_absurd_slope_is_left_out(ct, write_series, slope):
    folder = write_series(change=lambda k, tags: {**tags, "t0028_1053": "2", "t0028_1052": "0"})
    path = sorted(folder.iterdir())[2]
    data = path.read_bytes()
    at = data.index(b"\x28\x00\x53\x10") + 8
    path.write_bytes(data[:at] + slope + data[at + 2 :])
    volume = read_only(folder)
    assert len(volume.array) == 5
    assert volume.notes[0].startswith("1 image left out, its rescale is absurd (slope")
    assert volume.notes[0].endswith(path.name)


def test_header_text_that_is_no_unicode_is_escaped_in_the_reason(write_series):
    folder = write_series(indices=[0])
    (path,) = folder.iterdir()
    data = path.read_bytes()
    at = data.index(b"\x08\x00\x60\x00") + 8
    path.write_bytes(data[:at] + b"C\x99" + data[at + 2 :])
    assert reason(folder) == "its modality is C\\udc99, not CT, MR, PT"


def test_colour_images_are_refused(tmp_path, write_dicom):
    colour = write_dicom(tmp_path / "rgb/a.dcm", np.zeros((20, 26, 3), dtype=np.uint8))
    assert reason(colour.parent) == "it has colour (3 samples per pixel)"


@pytest.mark.parametrize(
    ("uid", "words"),
    [
        (b"1.2.840.10008.5.1.4.1.1.481.3", "it is an RT structure set, not an image"),
        (b"1.2.840.10008.5.1.4.1.1.88.11\0", "it is a structured report, not an image"),
        (b"1.2.840.10008.5.1.4.1.1.2\0", "it is a DICOM file without pixels"),
    ],
)
def test_objects_without_pixels_are_told_apart_when_sources_are_found(tmp_path, uid, words):
    meta = b"\x02\x00\x02\x00UI" + len(uid).to_bytes(2, "little") + uid
    length = b"\x02\x00\x00\x00UL\x04\x00" + len(meta).to_bytes(4, "little")
    (tmp_path / "object").write_bytes(bytes(128) + b"DICM" + length + meta)
    found, refused = find_sources([tmp_path / "object"])
    assert found == []
    assert refused == [("object", words)]


def test_a_truncated_slice_refuses_the_file_not_the_others(ct, write_series):
    folder = write_series()
    broken = sorted(folder.iterdir())[0]
    broken.write_bytes(broken.read_bytes()[:-200])
    found, refused = find_sources([folder])
    told = "it is a damaged DICOM file: an element reaches beyond the end of the file"
    assert refused == [(f"series/{broken.name}", told)]
    assert len(found[0].paths) == 5


@pytest.mark.parametrize(
    ("tag", "offset"),
    [(b"\x20\x00\x32\x00", 4), (b"\x10\x00\x20\x00", 7), (b"\xe0\x7f\x10\x00", 7)],
)
def test_a_length_beyond_the_file_reaches_no_parser(ct, write_series, monkeypatch, tag, offset):
    path = sorted(write_series(indices=[0]).iterdir())[0]
    data = bytearray(path.read_bytes())
    data[data.index(tag) + offset] = 0x77
    path.write_bytes(data)
    monkeypatch.setattr(dicom_header.pydicom, "dcmread", None)
    monkeypatch.setattr(dicom_pixels, "open_header", None)
    found, refused = find_sources([path])
    assert found == []
    assert "damaged DICOM file" in refused[0][1]


@pytest.mark.parametrize("compression", ["JPEG2000", "JPEG", "RLE"])
def test_compressed_and_explicitly_encoded_slices_are_read(tmp_path, ct, write_dicom, compression):
    array = sitk.GetArrayFromImage(ct)
    image = sitk.GetImageFromArray(array[0])
    path = write_dicom(tmp_path / "plain.dcm", array[0])
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    for tag in reader.GetMetaDataKeys():
        image.SetMetaData(tag, reader.GetMetaData(tag))
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    writer.SetCompressor(compression)
    writer.UseCompressionOn()
    writer.SetFileName(str(tmp_path / "packed.dcm"))
    writer.Execute(image)
    volume = read_only(tmp_path / "packed.dcm")
    assert b"\xe0\x7f\x10\x00OB\0\0\xff\xff\xff\xff" in (tmp_path / "packed.dcm").read_bytes()
    np.testing.assert_array_equal(volume.array, array[:1])
    cut = (tmp_path / "packed.dcm").read_bytes()[:-40]
    (tmp_path / "packed.dcm").write_bytes(cut)
    assert "cut off" in find_sources([tmp_path / "packed.dcm"])[1][0][1]


def test_a_slice_without_position_or_spacing_is_no_slice(write_series):
    told = reason(write_series(change=lambda k, tags: {**tags, "position": (float("nan"),) * 3}))
    assert told == "its images state no position or orientation"


def test_mr_is_taken_with_a_robust_range(ct, write_series):
    image = sitk.Cast(ct + 1000, sitk.sitkInt16)
    folder = write_series(image=image, change=lambda k, tags: {**tags, "t0008_0060": "MR",
        "t0008_0016": "1.2.840.10008.5.1.4.1.1.4"})  # fmt: skip
    volume = read_only(folder)
    array = sitk.GetArrayFromImage(image)
    low, high = np.percentile(array[array > array.min()], [0.5, 99.5])
    assert (volume.modality, volume.intensity["low"], volume.intensity["high"]) == ("MR", low, high)


def test_odd_values_of_a_header_raise_no_warning(write_series, caplog):
    # an age of no known form, a UID with letters and an unknown character set
    odd = {"t0010_1010": "old", "t0008_0005": "ISO_IR 999", "t0020_000e": "1.2.x"}
    folder = write_series(change=lambda k, tags: {**tags, **odd})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found, refused = find_sources([folder])
        volume = read_volume(found[0])
    assert refused == []
    assert (found[0].key, len(volume.array)) == ("series#1.2.x", 6)
    assert caplog.text == ""


@pytest.mark.parametrize("declared", [None, "ISO_IR 100", "ISO_IR 192"])
def test_the_hash_of_a_patient_is_that_of_the_bytes_in_the_file(write_series, declared):
    folder = write_series(
        indices=[0],
        change=lambda k, tags: {**tags, "t0010_0020": "M\u00fcller 7", "t0008_0005": declared},
    )
    (source,), _ = find_sources([folder])
    assert source.patient == hashlib.sha256("M\u00fcller 7".encode()).hexdigest()[:16]


def test_a_slice_that_gdcm_cannot_decode_refuses_the_file_not_the_others(ct, write_series):
    folder = write_series()
    path = sorted(folder.iterdir())[0]
    data = path.read_bytes()
    at = data.index(b"\x28\x00\x00\x01") + 8  # BitsAllocated
    path.write_bytes(data[:at] + b"\x07\x00" + data[at + 2 :])
    found, refused = find_sources([folder])
    told = "it is a damaged DICOM file, or one that GDCM cannot read"
    assert refused == [(f"series/{path.name}", told)]
    assert len(found[0].paths) == 5


@pytest.mark.parametrize("tag", [b"\x28\x00\x10\x00", b"\x28\x00\x11\x00"])
def test_an_image_without_rows_or_columns_is_damaged(write_series, tag):
    (path,) = write_series(indices=[0]).iterdir()
    path.write_bytes(path.read_bytes().replace(tag, tag[:2] + b"\x99\x00", 1))
    _, refused = find_sources([path])
    assert "is missing or not a number" in refused[0][1]


def test_what_is_read_leaves_the_switches_of_simpleitk_as_they_were(ct, write_series):
    shown = sitk.ProcessObject.GetGlobalWarningDisplay()
    try:
        for state in (True, False):
            sitk.ProcessObject.SetGlobalWarningDisplay(state)
            read_only(write_series(folder=f"s{state}"))
            assert sitk.ProcessObject.GetGlobalWarningDisplay() is state
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(shown)


@pytest.mark.slow
@pytest.mark.skipif(not LIDC.is_file(), reason=f"needs the LIDC volume at {LIDC}")
def test_a_series_written_from_a_real_ct_gives_the_same_arrays(tmp_path, write_dicom):
    image = sitk.ReadImage(str(LIDC))
    array = sitk.GetArrayFromImage(image)
    names = random.Random(0).sample(range(10_000), len(array))
    for k, name in enumerate(names):
        position = image.TransformIndexToPhysicalPoint((0, 0, k))
        write_dicom(tmp_path / "ct" / f"IM{name:04d}", array[k], position=position,
                    number=name, t0028_1052="-1024", t0028_1053="1")  # fmt: skip
    assert [p.name for p in sorted(os.scandir(tmp_path / "ct"), key=lambda p: p.name)] != names
    series = read_only(tmp_path / "ct")
    (nifti,), _ = find_sources([LIDC])
    volume = read_volume(nifti)
    np.testing.assert_array_equal(series.array, array)
    np.testing.assert_array_equal(series.array, volume.array)
    np.testing.assert_allclose(series.positions_mm, volume.positions_mm, atol=1e-3)
