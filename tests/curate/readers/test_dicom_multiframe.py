"""Multi-frame DICOM: frames become the slices of volumes, by the rules of series."""

import random
import tracemalloc

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom import encaps, uid
from pydicom.dataset import Dataset

from nnunetv2_meddinov3.curate.discover import find_sources
from nnunetv2_meddinov3.curate.modalities import identify
from nnunetv2_meddinov3.curate.orient import reorient
from nnunetv2_meddinov3.curate.readers import read
from nnunetv2_meddinov3.curate.volume import Unreadable

CLASS = "1.2.840.10008.5.1.4.1.1."
STACK, TIME = "FrameContentSequence__StackID", "FrameContentSequence__TemporalPositionIndex"
VALUES = "PixelValueTransformationSequence"
RULES = "its slices repeat or interleave as those of several volumes do"


@pytest.fixture(scope="module")
def hu(ct):
    """The values of the CT (S, H, W)."""
    return sitk.GetArrayFromImage(ct)


@pytest.fixture
def place(ct):
    """A function that returns the position of a slice of the CT."""
    return lambda k: ct.TransformIndexToPhysicalPoint((0, 0, int(k)))


@pytest.fixture
def slices(hu, place, frame):
    """A function that makes frames of slices of the CT, in shuffled order."""

    def make(indices=range(6), change=lambda k: {}, shift=0, shuffle=True):
        indices = list(indices)
        if shuffle:
            random.Random(5).shuffle(indices)
        made = []
        for k in indices:
            options = {"position": place(k), "values": hu[k] + shift} | change(k)
            made.append(frame(options.pop("values"), options.pop("position"), **options))
        return made

    return make


def volumes(folder):
    found, refused = find_sources([folder])
    assert refused == []
    return [identify(reorient(read(source)), source) for source in found]


def only(folder):
    (volume,) = volumes(folder)
    return volume


def reason(folder):
    (source,), _ = find_sources([folder])
    with pytest.raises(Unreadable) as caught:
        read(source)
    assert str(folder) not in str(caught.value)
    return str(caught.value)


SYNTAXES = [uid.ExplicitVRLittleEndian, uid.ImplicitVRLittleEndian, uid.ExplicitVRBigEndian]
SYNTAXES.append(uid.DeflatedExplicitVRLittleEndian)


@pytest.mark.parametrize("syntax", SYNTAXES, ids=lambda syntax: syntax.keyword)
def test_shuffled_frames_are_the_volume_they_were_made_from(
    tmp_path, hu, slices, enhanced, save, syntax
):
    volume = only(save(enhanced(slices(), syntax=syntax), tmp_path / "a.dcm"))
    assert volume.array.dtype == np.int16
    np.testing.assert_array_equal(volume.array, hu)
    assert volume.spacing == pytest.approx((2.5, 0.8, 0.7))
    np.testing.assert_allclose(volume.positions_mm, -104 + 2.5 * np.arange(6))
    assert (volume.orientation, volume.modality, volume.windowed) == ("LPS", "CT", False)
    assert volume.notes == ("slice thickness 2.5 mm",)


def test_an_enhanced_file_of_gdcm_is_read(tmp_path, ct, hu):
    ct = sitk.Image(ct)
    ct.SetMetaData("0008|0060", "CT")
    sitk.WriteImage(ct, str(tmp_path / "a.dcm"))
    np.testing.assert_array_equal(only(tmp_path).array, hu)


def test_frames_have_a_rescale_of_their_own_and_inversion_changes_none(
    tmp_path, hu, slices, enhanced, save
):
    def change(k):
        return {"rescale": ((1, -1024), (1, -1000), (0.5, -1100), (2, -2000))[k % 4]}

    even = hu // 2 * 2
    frames = slices(change=lambda k: {**change(k), "values": even[k]})
    save(enhanced(frames, PhotometricInterpretation="MONOCHROME1", BitsStored=13, HighBit=12),
         tmp_path / "a.dcm")  # fmt: skip
    np.testing.assert_array_equal(only(tmp_path).array, even)


ORIENTATIONS = {
    "sagittal": (0, 1, 0, 0, 0, -1),
    "coronal": (1, 0, 0, 0, 0, -1),
    "feet first": (-1, 0, 0, 0, 1, 0),
}


@pytest.mark.parametrize("name", ORIENTATIONS)
def test_other_orientations_come_out_in_lps(tmp_path, make_ct, frame, enhanced, save, name):
    array = np.maximum(make_ct(16, 20), -1024)  # (z, y, x), 1 mm in all directions
    axes = ORIENTATIONS[name]
    normal = np.cross(axes[:3], axes[3:])
    along = int(np.argmax(np.abs(normal)))
    frames = []
    size = np.array(array.shape[::-1])
    for k in range(size[along]):
        origin = np.array([size[w] - 1 if axes[w] + axes[3 + w] < 0 else 0 for w in range(3)])
        origin[along] = k
        y, x = np.mgrid[: size[np.argmax(np.abs(axes[3:]))], : size[np.argmax(np.abs(axes[:3]))]]
        at = origin + x[..., None] * np.array(axes[:3]) + y[..., None] * np.array(axes[3:])
        frames.append(frame(array[at[..., 2], at[..., 1], at[..., 0]], origin, axes))
    random.Random(2).shuffle(frames)
    shared = {"PixelMeasuresSequence__PixelSpacing": [1, 1]}
    volume = only(save(enhanced(frames, shared), tmp_path / "a.dcm"))
    np.testing.assert_array_equal(volume.array, array)


def test_an_oblique_orientation_is_noted(tmp_path, hu, slices, place, enhanced, save):
    turn = np.radians(20)
    axes = (1, 0, 0, 0, np.cos(turn), np.sin(turn))
    normal = np.cross(axes[:3], axes[3:])
    frames = slices(change=lambda k: {"axes": axes, "position": 2.5 * k * normal})
    volume = only(save(enhanced(frames), tmp_path / "a.dcm"))
    np.testing.assert_array_equal(volume.array, hu)
    assert "slices are 20 degrees oblique to the axial plane" in volume.notes


@pytest.mark.parametrize("apart", [0, 15, 40])
def test_two_stacks_are_two_volumes(tmp_path, hu, place, slices, enhanced, save, apart):
    def stack(name, shift):
        def change(k):
            return {STACK: name, "position": np.add(place(k), (0, 0, shift))}

        return slices(change=change, shift=10 * int(name))

    frames = [*stack("1", 0), *stack("2", apart)]
    random.Random(1).shuffle(frames)
    save(enhanced(frames), tmp_path / "a.dcm")
    first, second = sorted(volumes(tmp_path), key=lambda volume: volume.array[0, 0, 0])
    np.testing.assert_array_equal(first.array, hu + 10)
    np.testing.assert_array_equal(second.array, hu + 20)
    assert second.positions_mm[0] == pytest.approx(-104 + apart)


def dimensions(*keywords):
    items = []
    for keyword in keywords:
        items.append(Dataset())
        items[-1].DimensionIndexPointer = pydicom.tag.Tag(keyword)
    return items


PASSES = {
    "time": lambda k, n: {TIME: n + 1},
    "acquisition": lambda k, n: {"FrameContentSequence__FrameAcquisitionNumber": n + 4},
    "kernel": lambda k, n: {"CTReconstructionSequence__ConvolutionKernel": "BH"[n]},
    "type": lambda k, n: {
        "CTImageFrameTypeSequence__FrameType": ["DERIVED", "PRIMARY", "VOLUME", "NM"[n]]
    },
    "dimension": lambda k, n: {"FrameContentSequence__DimensionIndexValues": [n + 1, k + 1]},
}


@pytest.mark.parametrize("name", PASSES)
def test_passes_in_one_file_are_several_volumes(tmp_path, hu, slices, enhanced, save, name):
    frames = [
        each
        for n in range(2)
        for each in slices(change=lambda k, n=n: PASSES[name](k, n), shift=10 * n)
    ]
    random.Random(1).shuffle(frames)
    sequence = dimensions("DiffusionBValue", "InStackPositionNumber")
    save(enhanced(frames, DimensionIndexSequence=sequence), tmp_path / "a.dcm")
    first, second = sorted(volumes(tmp_path), key=lambda volume: volume.array[0, 0, 0])
    np.testing.assert_array_equal(first.array, hu)
    np.testing.assert_array_equal(second.array, hu + 10)


def test_stacks_and_times_together_are_told_apart(tmp_path, hu, place, slices, enhanced, save):
    frames = []
    for n in range(4):

        def change(k, n=n):
            return {STACK: str(n // 2), TIME: n % 2, "position": np.add(place(k), (0, 0, n // 2))}

        frames += slices(change=change, shift=10 * n)
    random.Random(1).shuffle(frames)
    save(enhanced(frames), tmp_path / "a.dcm")
    found = sorted(volumes(tmp_path), key=lambda volume: volume.array[0, 0, 0])
    for n, volume in enumerate(found):
        np.testing.assert_array_equal(volume.array, hu + 10 * n)
    assert len({source.key for source in find_sources([tmp_path])[0]}) == 4


def test_magnitude_and_phase_of_mr_are_two_volumes(tmp_path, hu, slices, enhanced, save):
    frames = []
    for n, part in enumerate(("MAGNITUDE", "PHASE")):
        part = {"MRImageFrameTypeSequence__ComplexImageComponent": part}
        frames += slices(change=lambda k, part=part: part, shift=10 * n)
    save(enhanced(frames, Modality="MR", SOPClassUID=f"{CLASS}4.1"), tmp_path / "a.dcm")
    assert [volume.modality for volume in volumes(tmp_path)] == ["MR", "MR"]


def test_passes_that_nothing_tells_apart_are_refused(tmp_path, slices, enhanced, save):
    frames = [*slices(), *slices(shift=10)]
    random.Random(1).shuffle(frames)
    save(enhanced(frames), tmp_path / "a.dcm")
    assert RULES in reason(tmp_path)


def test_a_missing_frame_is_noted_and_of_duplicates_the_first_enters(
    tmp_path, hu, slices, enhanced, save
):
    frames = [*slices([0, 1, 2, 4, 5], shuffle=False), *slices([4], shift=7)]
    volume = only(save(enhanced(frames), tmp_path / "a.dcm"))
    np.testing.assert_array_equal(volume.array, hu[[0, 1, 2, 4, 5]])
    assert "1 slice missing between others, positions kept" in volume.notes
    assert any(note.startswith("1 duplicate slice left out") for note in volume.notes)


BAD = [
    ({"PlanePositionSequence__ImagePositionPatient": None}, "state no position"),
    ({"PlaneOrientationSequence__ImageOrientationPatient": [1, 0, 0, 0, 0, 1]}, "orientation"),
    ({"PixelMeasuresSequence__PixelSpacing": [1.1, 1.1]}, "pixel spacing"),
    ({f"{VALUES}__RescaleSlope": 0}, "rescale is absurd"),
    ({"CTImageFrameTypeSequence__FrameType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, "scout"),
    (
        {
            "PixelValueTransformationSequence__RescaleSlope": None,
            "PixelValueTransformationSequence__RescaleIntercept": None,
        },
        "without the rescale of the others",
    ),
]


@pytest.mark.parametrize(("elements", "words"), BAD, ids=[words for _, words in BAD])
def test_one_bad_frame_costs_itself_and_is_named(
    tmp_path, hu, slices, enhanced, save, elements, words
):
    frames = slices(shuffle=False, change=lambda k: elements if k == 5 else {})
    volume = only(save(enhanced(frames), tmp_path / "big.dcm"))
    np.testing.assert_array_equal(volume.array, hu[:5])
    (note,) = (note for note in volume.notes if "big.dcm frame 6" in note)
    assert words in note


def test_parts_of_a_concatenation_are_one_volume(tmp_path, hu, slices, enhanced, save):
    for part in range(3):
        frames = slices([part, part + 3])
        dataset = enhanced(frames, ConcatenationUID="1.9", InConcatenationNumber=part + 1)
        save(dataset, tmp_path / f"{'cab'[part]}.dcm")
    np.testing.assert_array_equal(only(tmp_path).array, hu)


def test_single_frames_of_enhanced_files_are_one_volume(tmp_path, hu, slices, enhanced, save):
    for number, each in enumerate(slices()):
        save(enhanced([each], InstanceNumber=number), tmp_path / f"{number}.dcm")
    np.testing.assert_array_equal(only(tmp_path).array, hu)


def test_files_of_one_series_at_one_place_are_several_volumes(tmp_path, hu, slices, enhanced, save):
    for number in range(2):
        save(enhanced(slices(shift=10 * number)), tmp_path / f"{number}.dcm")
    first, second = sorted(volumes(tmp_path), key=lambda volume: volume.array[0, 0, 0])
    np.testing.assert_array_equal(first.array, hu)
    np.testing.assert_array_equal(second.array, hu + 10)


def test_copies_of_a_file_are_no_second_volume(tmp_path, hu, slices, enhanced, save):
    path = save(enhanced(slices()), tmp_path / "in/a/x.dcm")
    for name in ("in/a/y.dcm", "in/b/x.dcm"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(path.read_bytes())
    volume = only(tmp_path / "in")
    np.testing.assert_array_equal(volume.array, hu)
    assert any(note.startswith("12 duplicate slices left out") for note in volume.notes)


def test_what_a_converter_left_unassigned_is_used(tmp_path, hu, slices, enhanced, save):
    frames = [*slices(shuffle=False), *slices(shuffle=False, shift=10)]
    own = []
    for number in range(12):
        own.append(Dataset())
        own[-1].ConvolutionKernel = "B30f" if number < 6 else "B70f"
    dataset = enhanced(frames, SOPClassUID=f"{CLASS}2.2")
    unassigned = "UnassignedPerFrameConvertedAttributesSequence"
    for item, group in zip(own, dataset.PerFrameFunctionalGroupsSequence, strict=True):
        setattr(group, unassigned, [item])
    save(dataset, tmp_path / "a.dcm")
    first, second = sorted(volumes(tmp_path), key=lambda volume: volume.array[0, 0, 0])
    np.testing.assert_array_equal(first.array, hu)
    np.testing.assert_array_equal(second.array, hu + 10)


@pytest.mark.parametrize(
    ("elements", "words"),
    [
        ({"Modality": "US", "SOPClassUID": f"{CLASS}3.1"}, "its modality is US, not CT, MR, PT"),
        ({"SOPClassUID": f"{CLASS}7.3"}, "it is a secondary capture"),
        ({"ModalityLUTSequence": [Dataset()]}, "the table of a ModalityLUTSequence"),
        (
            {"PerFrameFunctionalGroupsSequence": None, "SharedFunctionalGroupsSequence": None},
            "it is multi-frame, but has no functional groups",
        ),
    ],
)
def test_other_multi_frame_objects_are_refused_with_their_name(
    tmp_path, slices, enhanced, save, elements, words
):
    save(enhanced(slices(), **elements), tmp_path / "a.dcm")
    assert words in reason(tmp_path)


@pytest.mark.parametrize(
    ("elements", "words"),
    [
        ({"SOPClassUID": f"{CLASS}66.4", "Modality": "SEG"}, "it is a segmentation"),
        ({"SOPClassUID": f"{CLASS}30"}, "it is a parametric map"),
        ({"NumberOfFrames": 5}, "it states 5 frames, but 6 are described"),
        ({"PerFrameFunctionalGroupsSequence": []}, "it states 6 frames, but 0 are described"),
    ],
)
def test_files_that_hold_no_frames_to_read_are_refused_by_name(
    tmp_path, slices, enhanced, save, elements, words
):
    save(enhanced(slices(), **elements), tmp_path / "a.dcm")
    found, ((key, told),) = find_sources([tmp_path / "a.dcm"])
    assert found == []
    assert key == "a.dcm"
    assert words in told


@pytest.mark.parametrize(
    ("change", "modality"),
    [
        ({f"{VALUES}__RescaleType": "Z_EFF"}, "unknown"),
        ({f"{VALUES}__RescaleType": "US"}, "CT"),
        ({"rescale": (1, 0)}, "unknown"),  # 1024 was not subtracted
        ({f"{VALUES}__RescaleSlope": None, f"{VALUES}__RescaleIntercept": None}, "unknown"),
    ],
)
def test_what_is_no_hu_does_not_enter_as_hu(tmp_path, hu, slices, enhanced, save, change, modality):
    values = hu + 1024 if "rescale" in change else hu
    frames = slices(change=lambda k: {"values": values[k], **change})
    assert only(save(enhanced(frames), tmp_path / "a.dcm")).modality == modality


def compressed(tmp_path, stored, compressor):
    """Return the code streams of frames, as GDCM compresses single ones, and the syntax."""
    streams = []
    for number, values in enumerate(stored):
        writer = sitk.ImageFileWriter()
        writer.SetCompressor(compressor)
        writer.UseCompressionOn()
        writer.SetFileName(str(tmp_path / f"one{number}.dcm"))
        writer.Execute(sitk.GetImageFromArray(values))
        dataset = pydicom.dcmread(tmp_path / f"one{number}.dcm")
        streams.append(next(encaps.generate_frames(dataset.PixelData, number_of_frames=1)))
        (tmp_path / f"one{number}.dcm").unlink()
    return streams, dataset


@pytest.mark.parametrize("table", [True, False])
@pytest.mark.parametrize("fragments", [1, 2])
@pytest.mark.parametrize("compressor", ["RLE", "JPEG", "JPEG2000"])
def test_compressed_frames_are_read(
    tmp_path, hu, slices, enhanced, save, compressor, fragments, table
):
    frames = slices()
    dataset = enhanced(frames, BitsStored=16, HighBit=15)
    if compressor == "RLE":
        dataset.compress(uid.RLELossless, generate_instance_uid=False)
        streams = list(encaps.generate_frames(dataset.PixelData, number_of_frames=6))
        fragments = 1  # as the standard asks for
    else:
        streams, one = compressed(tmp_path, [values for values, _ in frames], compressor)
        dataset.file_meta.TransferSyntaxUID = one.file_meta.TransferSyntaxUID
    dataset.PixelData = encaps.encapsulate(streams, fragments, has_bot=table)
    dataset["PixelData"].is_undefined_length = True
    dataset["PixelData"].VR = "OB"
    np.testing.assert_array_equal(only(save(dataset, tmp_path / "a.dcm")).array, hu)


@pytest.mark.parametrize("compressor", ["RLE", "JPEG2000"])
def test_a_broken_code_stream_costs_its_frame(tmp_path, hu, slices, enhanced, save, compressor):
    frames = slices(shuffle=False)
    dataset = enhanced(frames, BitsStored=16, HighBit=15)
    dataset.compress(uid.RLELossless, generate_instance_uid=False)
    streams = list(encaps.generate_frames(dataset.PixelData, number_of_frames=6))
    if compressor == "JPEG2000":
        streams, one = compressed(tmp_path, [values for values, _ in frames], compressor)
        dataset.file_meta.TransferSyntaxUID = one.file_meta.TransferSyntaxUID
    streams[5] = bytes(len(streams[5]))
    dataset.PixelData = encaps.encapsulate(streams)
    dataset["PixelData"].is_undefined_length = True
    volume = only(save(dataset, tmp_path / "a.dcm"))
    np.testing.assert_array_equal(volume.array, hu[:5])
    assert "1 image left out, its pixels cannot be decoded: a.dcm frame 6" in volume.notes


def test_frames_without_a_code_stream_are_left_out(tmp_path, hu, slices, enhanced, save):
    dataset = enhanced(slices(shuffle=False))
    dataset.compress(uid.RLELossless, generate_instance_uid=False)
    streams = list(encaps.generate_frames(dataset.PixelData, number_of_frames=6))
    dataset.PixelData = encaps.encapsulate(streams[:4])
    dataset["PixelData"].is_undefined_length = True
    volume = only(save(dataset, tmp_path / "a.dcm"))
    np.testing.assert_array_equal(volume.array, hu[:4])
    (note,) = (note for note in volume.notes if "left out" in note)
    assert note.endswith("a.dcm frame 5, a.dcm frame 6")


def test_a_syntax_that_cannot_be_decoded_is_named(tmp_path, slices, enhanced, save):
    dataset = enhanced(slices())
    dataset.PixelData = encaps.encapsulate([b"\xff\x4f\xff\x51" + bytes(60)] * 6)
    dataset["PixelData"].is_undefined_length = True
    dataset.file_meta.TransferSyntaxUID = uid.HTJ2KLossless
    save(dataset, tmp_path / "a.dcm")
    told = reason(tmp_path)
    assert "High-Throughput JPEG 2000" in told
    assert "export it uncompressed" in told


@pytest.mark.parametrize("cut", [1, 520, 1041])
def test_frames_before_a_cut_are_whole(tmp_path, hu, slices, enhanced, save, cut):
    dataset = enhanced(slices(shuffle=False))
    dataset.PixelData = dataset.PixelData[: -2 * cut]
    volume = only(save(dataset, tmp_path / "a.dcm"))
    whole = (6 * 1040 - 2 * cut) // 1040
    np.testing.assert_array_equal(volume.array, hu[:whole])
    (note,) = (note for note in volume.notes if "cut off" in note)
    assert f"({6240 - 2 * cut} of 6240 bytes)" in note
    assert "a.dcm frame 6" in note


def test_a_sequence_of_unknown_type_does_not_hide_the_pixels(tmp_path, hu, slices, enhanced, save):
    dataset = enhanced(slices())
    path = save(dataset, tmp_path / "a.dcm")
    data = path.read_bytes()
    at = data.index(b"\xe0\x7f\x10\x00OW")
    inner = b"\x09\x00\x01\x10" + (4).to_bytes(4, "little") + b"abcd"  # implicit, as in any UN
    nested = b"\x09\x00\x02\x10\xff\xff\xff\xff" + b"\xfe\xff\x00\xe0\xff\xff\xff\xff" + inner
    nested += b"\xfe\xff\x0d\xe0" + bytes(4) + b"\xfe\xff\xdd\xe0" + bytes(4)
    item = b"\xfe\xff\x00\xe0" + len(nested).to_bytes(4, "little") + nested
    unknown = b"\x01\x7f\x10\x10UN\0\0\xff\xff\xff\xff" + item + b"\xfe\xff\xdd\xe0" + bytes(4)
    path.write_bytes(data[:at] + unknown + data[at:])
    np.testing.assert_array_equal(only(path).array, hu)


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
def test_frames_are_held_once(tmp_path, make_ct, frame, enhanced, save, packed):
    array = np.maximum(make_ct(24, 128), -1024)
    dataset = enhanced([frame(values, (0, 0, 2.5 * k)) for k, values in enumerate(array)])
    if packed:
        dataset.compress(uid.RLELossless, generate_instance_uid=False)
    save(dataset, tmp_path / "a.dcm")
    (source,), _ = find_sources([tmp_path])
    tracemalloc.start()
    try:
        image = read(source)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    np.testing.assert_array_equal(image.array, array)
    assert peak < 1.6 * array.nbytes


def test_damaged_functional_groups_are_a_sentence(tmp_path, slices, enhanced, save):
    path = save(enhanced(slices()), tmp_path / "a.dcm")
    data = path.read_bytes()
    rng = random.Random(0)
    begin, end = data.index(b"\x00\x52\x29\x92"), data.index(b"\xe0\x7f\x10\x00OW")
    for _ in range(60):
        broken = bytearray(data)
        for _ in range(8):
            broken[rng.randrange(begin, end)] = rng.randrange(256)
        path.write_bytes(broken)
        found, refused = find_sources([path])
        assert all(reason and "\n" not in reason for _, reason in refused)
        assert all("\n" not in outcome(source) for source in found)


def outcome(source):
    try:
        return str(read(source).array.shape)
    except Unreadable as error:
        return str(error)
