"""Which files of one SeriesInstanceUID are one volume, and what one bad file costs."""

import re
import shutil

import numpy as np
import pytest
import SimpleITK as sitk

from nnunetv2_meddinov3.curate.discover import find_sources
from nnunetv2_meddinov3.curate.readers import read
from nnunetv2_meddinov3.curate.volume import Unreadable

UID = "1.2.3.4"


@pytest.fixture
def write_pass(tmp_path, write_dicom):
    """A function that writes slices along z; each holds its position, ``of`` tells passes apart."""

    def write(folder, places, of=0, name="s", start=1, x=0.0, **tags):
        rng = np.random.default_rng(of)
        for i, z in enumerate(places):
            pixels = rng.integers(-1000, 900, (20, 26)).astype(np.int16)
            pixels[0, 0] = of
            each = {key: value(i) if callable(value) else value for key, value in tags.items()}
            write_dicom(
                tmp_path / folder / f"{name}{i:03}.dcm",
                pixels,
                **{"position": (x, 0.0, float(z)), "number": start + i, **each},
            )
        return tmp_path / folder

    return write


def passes(folder):
    """Return key -> (marks of the slices, positions) of every volume found."""
    found, refused = find_sources([folder])
    assert refused == []
    images = {source.key: read(source) for source in found}
    return {
        key: (set(image.array[:, 0, 0].tolist()), image.positions_mm.tolist())
        for key, image in images.items()
    }


def plain_and_other(found, folder="in"):
    """Return the volume with the plain key, and the one with a suffix."""
    plain, other = sorted(found)
    assert plain == f"{folder}#{UID}"
    assert re.fullmatch(re.escape(plain) + r"\+[0-9a-f]{8}", other)
    return found[plain], found[other]


@pytest.mark.parametrize(
    "noise",
    [
        {"t0020_0037": lambda i: f"0.99999987\\{0.000499 + 2e-6 * (i % 2)}\\0\\0\\1\\0"},
        {"t0020_0037": lambda i: ("1\\0\\0\\0\\1\\0", "1\\1e-3\\0\\-1e-3\\1\\0")[i % 2]},
        {"spacing": lambda i: (0.7 + 5e-4 * (i % 2), 0.8)},
        {"t0018_0050": lambda i: ("2.5", "2.500001", "2.49")[i % 3]},
        {"t0020_0012": lambda i: str(i)},  # a rotation each, as of step-and-shoot scanners
        {"t0020_0012": lambda i: str(i // 4)},
        {"t0008_0032": lambda i: f"1000{i:02}.5"},
    ],
)
def test_headers_that_differ_within_a_tolerance_are_one_volume(write_pass, noise):
    folder = write_pass("in", 2.5 * np.arange(12), **noise)
    ((key, (_, places)),) = passes(folder).items()
    assert key == f"in#{UID}"
    np.testing.assert_allclose(places, 2.5 * np.arange(12), atol=1e-3)


@pytest.mark.parametrize(
    "places",
    [
        [0, 2.5, 5, 7.5, 10, 15, 20, 25, 30, 35],  # thin at the base, thick above
        [0, 1, 2, 5, 6, 9, 10, 11, 15, 16],  # many lost
        np.round(np.arange(12) * 0.625, 1),
        [0, 2.5, 5],
        [0, 0.7],
    ],
)
def test_uneven_steps_of_one_pass_are_one_volume(write_pass, places):
    ((_, (_, read_places)),) = passes(write_pass("in", places)).items()
    np.testing.assert_allclose(read_places, places)


@pytest.mark.parametrize("shift", [0.0, 0.7, 1.25, 10.0])
def test_acquisitions_that_overlap_are_two_volumes(write_pass, shift):
    places = 2.5 * np.arange(10)
    write_pass("in", places, t0020_0012="1")
    folder = write_pass("in", places + shift, of=1, name="t", start=11, t0020_0012="2")
    (first, first_places), (second, second_places) = plain_and_other(passes(folder))
    assert {*first, *second} == {0, 1}
    assert sorted([first_places[0], second_places[0]]) == [0, shift]
    assert len(first_places) == len(second_places) == 10


@pytest.mark.parametrize(
    "tags",
    [
        {"t0018_0050": "5.0"},
        {"t0018_1210": "B60s"},
        {"t0008_0032": "120000"},
        {"t0020_000d": "1.2.99"},
        {"t0008_0008": "DERIVED\\SECONDARY\\AXIAL"},
    ],
)
def test_passes_are_told_apart_by_what_differs(write_pass, tags):
    places = 2.5 * np.arange(8)
    write_pass("in", places)
    folder = write_pass("in", places, of=1, name="t", **tags)
    (first, first_places), (second, second_places) = plain_and_other(passes(folder))
    assert {*first, *second} == {0, 1}
    assert len(first) == len(second) == 1
    np.testing.assert_allclose([first_places, second_places], [places, places])


def test_passes_are_told_apart_by_the_order_of_their_instances(write_pass):
    write_pass("in", 2.5 * np.arange(8))
    folder = write_pass("in", 2.5 * np.arange(8), of=1, name="t", start=9)
    first, second = plain_and_other(passes(folder))
    assert {*first[0], *second[0]} == {0, 1}


@pytest.mark.parametrize("shift", [0.0, 0.7, 2.5 / 3])
def test_passes_that_nothing_tells_apart_are_refused(write_pass, shift):
    def taking_turns(i):
        return (i * 7) % 16

    write_pass("in", 2.5 * np.arange(8), number=taking_turns)
    folder = write_pass("in", 2.5 * np.arange(8) + shift, of=1, name="t", number=taking_turns)
    (source,), _ = find_sources([folder])
    with pytest.raises(Unreadable, match="those of several volumes"):
        read(source)


@pytest.mark.parametrize(
    ("first", "x"), [(0.0, 0.0), (0.7, 0.0), (40.0, 0.0), (2.5 * 8, 30.0), (1.25, 30.0)]
)
def test_two_patients_with_one_anonymised_uid_in_two_folders_are_two_volumes(write_pass, first, x):
    write_pass("all/a", 2.5 * np.arange(8))
    folder = write_pass("all/b", first + 2.5 * np.arange(8), of=1, x=x).parent
    found = passes(folder)
    assert {key: marks for key, (marks, _) in found.items()} == {
        f"all/a#{UID}": {0},
        f"all/b#{UID}": {1},
    }


def test_one_volume_over_two_folders_stays_one(write_pass):
    write_pass("all/a", 2.5 * np.arange(8))
    folder = write_pass("all/b", 20 + 2.5 * np.arange(8), start=9).parent
    ((key, (_, places)),) = passes(folder).items()
    assert key == f"all#{UID}"
    assert len(places) == 16


def test_keys_do_not_depend_on_the_names_of_files(write_pass):
    write_pass("in", 2.5 * np.arange(8), t0020_0012="1")
    folder = write_pass("in", 2.5 * np.arange(8), of=1, name="t", t0020_0012="2")
    before = passes(folder)
    for path in list(folder.iterdir()):  # the second pass comes first now
        path.rename(path.with_name(f"{'z' if path.name[0] == 's' else 'a'}{path.name}"))
    assert passes(folder) == before


def test_images_of_another_orientation_are_a_volume_from_three_on(write_pass):
    folder = write_pass("in", 2.5 * np.arange(8))
    for n in (2, 3):
        write_pass("in", range(n), of=1, name="cor", t0020_0037="1\\0\\0\\0\\0\\-1",
                   position=lambda i: (0, 3.0 * i, 0))  # fmt: skip
        found, _ = find_sources([folder])
        assert [len(source.paths) for source in found] == ([10] if n == 2 else [8, 3])


def test_copies_of_one_file_are_no_second_volume(write_pass):
    folder = write_pass("in", 2.5 * np.arange(8))
    for path in list(folder.iterdir()):
        path.with_name(f"copy_{path.name}").write_bytes(path.read_bytes())
    ((key, (_, places)),) = passes(folder).items()
    assert (key, len(places)) == (f"in#{UID}", 8)


def test_one_image_in_several_encodings_is_one_slice(write_pass):
    folder = write_pass("in", [0.0])
    image = sitk.ReadImage(str(folder / "s000.dcm"))
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    writer.UseCompressionOn()
    for compressor in ("JPEG2000", "RLE", "JPEG"):
        writer.SetCompressor(compressor)
        writer.SetFileName(str(folder / f"{compressor}.dcm"))
        writer.Execute(image)
    ((key, (marks, places)),) = passes(folder).items()
    assert (key, marks, len(places)) == (f"in#{UID}", {0}, 1)


def test_one_dummy_uid_for_all_images_makes_no_copies(write_pass):
    write_pass("in", 2.5 * np.arange(8), t0008_0018="1.2.3.9", t0020_0012="1")
    folder = write_pass("in", 2.5 * np.arange(8), of=1, name="t", t0008_0018="1.2.3.9",
                        t0020_0012="2")  # fmt: skip
    found, refused = find_sources([folder])
    assert ([len(source.paths) for source in found], refused) == ([8, 8], [])


@pytest.mark.parametrize(
    ("tags", "reason"),
    [
        ({"t0008_0016": "1.2.840.10008.5.1.4.1.1.7"}, "it is a secondary capture (a screenshot)"),
        ({"t0008_0060": "OT"}, "its modality is OT, not CT, MR, PT"),
        ({"t0020_0037": "0\\1\\0\\0\\0\\-1"}, "of another size, orientation"),
        ({"t0008_0008": "DERIVED\\SECONDARY\\SCOUT"}, "it is a localizer"),
        ({"spacing": (2.0, 2.0)}, "of another size, orientation or pixel spacing"),
        ({"position": (float("nan"),) * 3}, "its images state no position"),
    ],
)
def test_one_bad_member_costs_itself_and_is_named(write_pass, tags, reason):
    write_pass("in", 2.5 * np.arange(8))
    folder = write_pass("in", [2.5], of=9, name="bad", **tags)
    (source,), refused = find_sources([folder])
    assert (source.key, refused) == (f"in#{UID}", [])
    image = read(source)
    assert set(image.array[:, 0, 0].tolist()) == {0}
    assert len(image.array) == 8
    (note,) = (note for note in image.notes if "bad000.dcm" in note)
    assert reason in note


def compress(path, compressor="JPEG2000"):
    """Write a file anew as a code stream."""
    image = sitk.ReadImage(str(path))
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    writer.SetCompressor(compressor)
    writer.UseCompressionOn()
    writer.SetFileName(str(path))
    writer.Execute(image)


def damage(path):
    """Make the pixels of a file undecodable, not its header."""
    compress(path)
    data = bytearray(path.read_bytes())
    at = data.index(b"\xff\x4f\xff\x51")  # start and size of the code stream
    data[at : at + 60] = bytes(60)
    path.write_bytes(data)


@pytest.mark.parametrize("z", [0, 3, 7])
def test_a_broken_code_stream_costs_its_slice(write_pass, z):
    folder = write_pass("in", 2.5 * np.arange(8))
    path = folder / f"s{z:03}.dcm"
    damage(path)
    found, refused = find_sources([folder])
    image = read(found[0])
    assert len(image.array) == 7
    assert 2.5 * z not in image.positions_mm
    left = " ".join([*image.notes, *(key for key, _ in refused)])
    assert path.name in left
    assert ("1 slice missing" in left) == (0 < z < 7)


@pytest.mark.parametrize("z", [0, 4, 7])
@pytest.mark.parametrize("compressor", [None, "RLE", "JPEG"])
def test_a_slice_whose_first_copy_cannot_be_decoded_enters_from_another(write_pass, z, compressor):
    folder = write_pass("in", 2.5 * np.arange(8))
    path, copy = folder / f"s{z:03}.dcm", folder / f"t{z:03}.dcm"
    whole = read(find_sources([folder])[0][0])
    shutil.copy(path, copy)
    if compressor:
        compress(copy, compressor)
    damage(path)
    (source,), _ = find_sources([folder])
    image = read(source)
    np.testing.assert_array_equal(image.array, whole.array)
    assert image.positions_mm.tolist() == whole.positions_mm.tolist()
    assert [note for note in image.notes if note not in whole.notes] == [
        f"1 image left out, its pixels cannot be decoded: {path.name}"
    ]


def test_of_three_images_at_one_place_the_first_that_can_be_decoded_enters(write_pass):
    folder = write_pass("in", 2.5 * np.arange(8), start=10)
    for of, number in ((1, 3), (2, 4), (3, 900)):
        write_pass("in", [7.5], of=of, name=f"d{of}", start=number)
    for name in ("d1000", "s003"):
        damage(folder / f"{name}.dcm")
    ((source,), _) = find_sources([folder])
    image = read(source)
    assert image.array[:, 0, 0].tolist() == [0, 0, 0, 2, 0, 0, 0, 0]
    notes = " ".join(image.notes)
    assert "2 duplicate slices left out" in notes
    assert "its pixels cannot be decoded: d1000.dcm" in notes
    assert "s003.dcm" not in notes  # it was not needed


def test_a_slice_that_is_broken_in_all_its_copies_is_left_out_and_all_are_named(write_pass):
    folder = write_pass("in", 2.5 * np.arange(8))
    path, copy = folder / "s002.dcm", folder / "t002.dcm"
    damage(path)
    shutil.copy(path, copy)
    ((source,), _) = find_sources([folder])
    image = read(source)
    assert 5.0 not in image.positions_mm
    assert "2 images left out, its pixels cannot be decoded: s002.dcm, t002.dcm" in image.notes


def test_a_copy_of_the_series_in_another_folder_has_the_slice_that_one_lost(write_pass):
    write_pass("in/a", 2.5 * np.arange(8))
    folder = write_pass("in/b", 2.5 * np.arange(8)).parent
    for path in (folder / "a").iterdir():  # with the same bytes
        shutil.copy(path, folder / "b" / path.name)
    damage(folder / "a" / "s005.dcm")
    places = [read(source).positions_mm.tolist() for source in find_sources([folder])[0]]
    assert 12.5 in {place for each in places for place in each}
    damage(folder / "b" / "s002.dcm")
    places = [read(source).positions_mm.tolist() for source in find_sources([folder])[0]]
    assert {place for each in places for place in each} == set(2.5 * np.arange(8))


def test_a_series_of_bad_members_only_is_refused_with_their_reason(write_pass):
    folder = write_pass("in", 2.5 * np.arange(4), t0008_0016="1.2.840.10008.5.1.4.1.1.7")
    (source,), _ = find_sources([folder])
    with pytest.raises(Unreadable, match="it is a secondary capture"):
        read(source)
