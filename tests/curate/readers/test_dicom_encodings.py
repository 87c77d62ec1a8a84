"""Deflated files, pixels that are cut off, and code streams that decoders must not get."""

import zlib

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom import encaps, uid

from nnunetv2_meddinov3.curate.discover import find_sources
from nnunetv2_meddinov3.curate.ingest import Job, ingest
from nnunetv2_meddinov3.curate.privacy import Names
from nnunetv2_meddinov3.curate.readers import dicom_guard, dicom_series, read
from nnunetv2_meddinov3.curate.volume import Unreadable
from nnunetv2_meddinov3.store.records import read_record
from nnunetv2_meddinov3.store.writer import StoreWriter

DEFLATED = uid.DeflatedExplicitVRLittleEndian


@pytest.fixture(scope="module")
def hu(ct):
    """The values of the CT (S, H, W)."""
    return sitk.GetArrayFromImage(ct)


@pytest.fixture
def one_slice(hu):
    """A function that makes a single-frame slice of the CT, in any transfer syntax."""

    def make(k, syntax=uid.ExplicitVRLittleEndian, **elements):
        dataset = pydicom.Dataset()
        dataset.file_meta = pydicom.dataset.FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = syntax
        for name, value in {
            "SOPClassUID": uid.CTImageStorage,
            "SOPInstanceUID": uid.generate_uid(),
            "Modality": "CT",
            "PatientID": "p",
            "StudyInstanceUID": "1.2.3",
            "SeriesInstanceUID": "1.2.3.4",
            "InstanceNumber": k + 1,
            "ImagePositionPatient": [0, 0, 2.5 * k],
            "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
            "PixelSpacing": [0.8, 0.7],
            "SliceThickness": 2.5,
            "SamplesPerPixel": 1,
            "PhotometricInterpretation": "MONOCHROME2",
            "Rows": hu.shape[1],
            "Columns": hu.shape[2],
            "BitsAllocated": 16,
            "BitsStored": 16,
            "HighBit": 15,
            "PixelRepresentation": 0,
            "RescaleSlope": 1,
            "RescaleIntercept": -1024,
            **elements,
        }.items():
            setattr(dataset, name, value)
        order = ">" if syntax == uid.ExplicitVRBigEndian else "<"
        dataset.PixelData = (hu[k] + 1024).astype(f"{order}u2").tobytes()
        dataset["PixelData"].VR = "OW"
        return dataset

    return make


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_a_deflated_series_is_read(tmp_path, hu, one_slice, save, photometric):
    for k in range(6):
        dataset = one_slice(k, DEFLATED, PhotometricInterpretation=photometric)
        save(dataset, tmp_path / f"{(5 * k) % 6}.dcm")
    (source,), refused = find_sources([tmp_path])
    assert refused == []
    image = read(source)
    np.testing.assert_array_equal(image.array, hu)
    assert image.notes == ["slice thickness 2.5 mm"]
    assert image.modality == "CT"


def test_deflated_and_plain_slices_are_one_volume(tmp_path, hu, one_slice, save):
    for k in range(6):
        syntax = DEFLATED if k % 2 else uid.ImplicitVRLittleEndian
        save(one_slice(k, syntax), tmp_path / f"{k}.dcm")
    (source,), _ = find_sources([tmp_path])
    np.testing.assert_array_equal(read(source).array, hu)


def begin_of_deflated(data):
    length = int.from_bytes(data[140:144], "little")  # of the file meta information, in its first
    return 144 + length


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: data[:-300], "cut off"),
        (lambda data: data[: begin_of_deflated(data)], "cut off"),
        (lambda data: data[: begin_of_deflated(data)] + b"\xff" * 500, "cannot be inflated"),
    ],
)
def test_a_damaged_deflated_file_costs_itself(tmp_path, hu, one_slice, save, change, words):
    for k in range(6):
        save(one_slice(k, DEFLATED), tmp_path / f"in/{k}.dcm")
    path = tmp_path / "in/5.dcm"
    path.write_bytes(change(path.read_bytes()))
    (source,), ((key, told),) = find_sources([tmp_path / "in"])
    assert key == "in/5.dcm"
    assert "deflated elements" in told
    assert words in told
    np.testing.assert_array_equal(read(source).array, hu[:5])


def test_elements_that_do_not_fit_into_what_is_inflated_are_damaged(tmp_path, one_slice, save):
    path = save(one_slice(0, DEFLATED), tmp_path / "a.dcm")
    data = path.read_bytes()
    begin = begin_of_deflated(data)
    plain = zlib.decompress(data[begin:], -zlib.MAX_WBITS)
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    path.write_bytes(data[:begin] + packer.compress(plain[:-200]) + packer.flush())
    assert "reaches beyond the end" in find_sources([path])[1][0][1]


def test_a_file_that_inflates_without_end_is_refused(tmp_path, monkeypatch, one_slice, save):
    path = save(one_slice(0, DEFLATED), tmp_path / "a.dcm")
    begin = begin_of_deflated(path.read_bytes())
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    bomb = packer.compress(bytes(1 << 24)) + packer.flush()
    path.write_bytes(path.read_bytes()[:begin] + bomb)
    assert "inflate" not in find_sources([path])[1][0][1]
    monkeypatch.setattr(dicom_guard, "MAX_INFLATED", 1 << 23)
    assert "inflate to more than" in find_sources([path])[1][0][1]


NATIVE = [uid.ExplicitVRLittleEndian, uid.ImplicitVRLittleEndian, uid.ExplicitVRBigEndian, DEFLATED]


@pytest.mark.parametrize("syntax", NATIVE, ids=lambda syntax: syntax.keyword)
def test_a_slice_whose_pixels_are_too_short_costs_itself(tmp_path, hu, one_slice, save, syntax):
    for k in range(6):
        dataset = one_slice(k, syntax)
        if k == 5:
            dataset.PixelData = dataset.PixelData[:-2]
        save(dataset, tmp_path / f"{k}.dcm")
    (source,), refused = find_sources([tmp_path])
    assert refused == []
    image = read(source)
    np.testing.assert_array_equal(image.array, hu[:5])
    told = "1 image left out, its pixels are cut off (1038 of 1040 bytes): 5.dcm"
    assert told in image.notes


@pytest.mark.parametrize("syntax", NATIVE, ids=lambda syntax: syntax.keyword)
@pytest.mark.parametrize("padding", [0, 2, 500])
def test_pixels_may_be_padded(tmp_path, hu, one_slice, save, syntax, padding):
    for k in range(6):
        dataset = one_slice(k, syntax)
        dataset.PixelData += bytes(padding)
        save(dataset, tmp_path / f"{k}.dcm")
    (source,), _ = find_sources([tmp_path])
    np.testing.assert_array_equal(read(source).array, hu)


@pytest.mark.parametrize(
    ("syntax", "packed"),
    [*((syntax, False) for syntax in NATIVE), (NATIVE[0], True), (NATIVE[1], True)],
)
@pytest.mark.parametrize("undefined", [False, True])
def test_the_pixels_of_an_icon_are_not_those_of_the_image(
    tmp_path, hu, one_slice, save, syntax, undefined, packed
):
    for k in range(6):
        dataset = one_slice(k, syntax)
        icon = pydicom.Dataset()
        icon.Rows = icon.Columns = icon.BitsAllocated = 8
        icon.PixelData = encaps.encapsulate([bytes(90)]) if packed else bytes(64)
        icon["PixelData"].VR = "OB"
        icon["PixelData"].is_undefined_length = packed
        icon.is_undefined_length_sequence_item = undefined
        dataset.IconImageSequence = [icon]
        dataset["IconImageSequence"].is_undefined_length = undefined
        if k == 5:
            dataset.PixelData = dataset.PixelData[:-100]
        save(dataset, tmp_path / f"{k}.dcm")
    (source,), refused = find_sources([tmp_path])
    assert refused == []
    image = read(source)
    np.testing.assert_array_equal(image.array, hu[:5])
    assert any("cut off (940 of 1040 bytes): 5.dcm" in note for note in image.notes)


def test_a_sequence_without_an_end_hides_where_the_pixels_are(tmp_path, hu, one_slice, save):
    for k in range(6):
        dataset = one_slice(k)
        dataset.IconImageSequence = [pydicom.Dataset()]
        dataset["IconImageSequence"].is_undefined_length = True
        path = save(dataset, tmp_path / f"{k}.dcm")
        data = path.read_bytes()
        end = b"\xfe\xff\xdd\xe0" + bytes(4)
        assert data.count(end) == 1
        with path.open("rb") as file:
            assert dicom_guard.check_lengths(file).length == 1040
        path.write_bytes(data.replace(end, b""))
        with path.open("rb") as file:
            assert dicom_guard.check_lengths(file) == dicom_guard.NOWHERE


def test_an_odd_number_of_bytes_is_padded(tmp_path, one_slice, save):
    values = np.random.default_rng(0).integers(0, 256, (3, 17, 19)).astype(np.uint8)
    for k in range(3):
        eight = {"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7, "Rows": 17, "Columns": 19}
        dataset = one_slice(k, **eight)
        dataset.PixelData = values[k].tobytes() + b"\0"
        save(dataset, tmp_path / f"{k}.dcm")
    (source,), _ = find_sources([tmp_path])
    np.testing.assert_array_equal(read(source).array, values.astype(int) - 1024)


@pytest.mark.parametrize("stream", [bytes(700), b"", b"\0\0"])
def test_a_broken_rle_stream_costs_its_slice_not_the_process(tmp_path, hu, one_slice, save, stream):
    for k in range(6):
        dataset = one_slice(k)
        dataset.compress(uid.RLELossless, generate_instance_uid=False)
        if k == 5:
            item = b"\xfe\xff\x00\xe0" + len(stream).to_bytes(4, "little") + stream
            dataset.PixelData = b"\xfe\xff\x00\xe0" + bytes(4) + item
        save(dataset, tmp_path / f"{k}.dcm")
    (source,), refused = find_sources([tmp_path])
    assert refused == [(f"{tmp_path.name}/5.dcm", "its pixels cannot be decoded")]
    np.testing.assert_array_equal(read(source).array, hu[:5])


def test_a_single_slice_in_an_unknown_encoding_says_so(tmp_path, one_slice, save):
    dataset = one_slice(0)
    dataset.PixelData = encaps.encapsulate([b"\xff\x4f\xff\x51" + bytes(60)])
    dataset["PixelData"].is_undefined_length = True
    dataset.file_meta.TransferSyntaxUID = uid.HTJ2K
    path = save(dataset, tmp_path / "a.dcm")
    found, refused = find_sources([path])
    told = [reason for _, reason in refused]
    for source in found:
        with pytest.raises(Unreadable) as caught:
            read(source)
        told.append(str(caught.value))
    assert len(told) == 1
    assert "High-Throughput JPEG 2000 Image Compression, which GDCM does not decode" in told[0]


def test_copies_are_read_once_when_sources_are_found(tmp_path, monkeypatch, one_slice, save):
    for k in range(8):
        data = save(one_slice(k % 6, InstanceNumber=1), tmp_path / f"in/a/{k}.dcm").read_bytes()
        (tmp_path / "in/b").mkdir(exist_ok=True)
        (tmp_path / f"in/b/{k}.dcm").write_bytes(data)
    read_files = []
    digest = dicom_series.files.file_sha256
    monkeypatch.setattr(
        dicom_series.files, "file_sha256", lambda path: read_files.append(path) or digest(path)
    )
    find_sources([tmp_path / "in"])
    assert read_files
    assert len(read_files) == len(set(read_files))


def test_frames_left_out_are_named_by_hashes_in_a_store_that_hides_names(
    tmp_path, slices_of, enhanced, save
):
    frames = slices_of(16, 20)
    frames[-1][1]["PlanePositionSequence__ImagePositionPatient"] = None
    save(enhanced(frames), tmp_path / "in/Smith_John.dcm")
    (source,), _ = find_sources([tmp_path / "in"])
    writer = StoreWriter(tmp_path / "store", {})
    outcome = ingest(source, Job(writer, names=Names(writer.key(), hides_paths=True)))
    assert outcome.state == "entered"
    record = read_record(next((tmp_path / "store/records").iterdir()))
    (note,) = (note for note in record.notes if "left out" in note)
    assert "Smith" not in note
    assert "frame 16" in note


@pytest.fixture
def slices_of(make_ct, frame):
    """A function that makes frames of a CT of some slices and pixels per side."""

    def make(slices, size):
        array = np.maximum(make_ct(slices, size), -1024)
        return [frame(array[k], (0, 0, 2.5 * k)) for k in range(slices)]

    return make
