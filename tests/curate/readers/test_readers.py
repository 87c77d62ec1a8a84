import gzip
import hashlib
import itertools
import json
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image

from nnunetv2_meddinov3.curate import volume as volume_module
from nnunetv2_meddinov3.curate.discover import find_sources
from nnunetv2_meddinov3.curate.modalities import identify
from nnunetv2_meddinov3.curate.orient import reorient
from nnunetv2_meddinov3.curate.readers import read as read_source
from nnunetv2_meddinov3.curate.volume import Unreadable, VolumeSource

SHARED = Path(__file__).parents[4] / "shared/data"
TOTALSEG = SHARED / "totalsegmentator_example"
PAIRS = ("RL", "AP", "IS")
ORIENTATIONS = [
    "".join(letters)
    for axes in itertools.permutations(PAIRS)
    for letters in itertools.product(*axes)
]
FORMATS = [".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd"]


def source_of(path, kind="file", channel_name=None):
    return VolumeSource(path.name, kind, (str(path),), "d", path.stem, channel_name)


def read_volume(source):
    return identify(reorient(read_source(source)), source)


def read(path, kind="file", channel_name=None):
    return read_volume(source_of(path, kind, channel_name))


def reason(path, kind="file"):
    with pytest.raises(Unreadable) as caught:
        read(path, kind)
    told = str(caught.value)
    assert told
    assert path.name not in told
    assert str(path.parent) not in told
    return told


def write(image, path):
    sitk.WriteImage(image, str(path))
    return path


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_every_orientation_gives_the_same_slices(tmp_path, ct, orientation):
    path = write(sitk.DICOMOrient(ct, orientation), tmp_path / "v.nii.gz")
    volume = read(path)
    expected = sitk.GetArrayFromImage(ct)
    assert volume.orientation == orientation
    assert volume.array.shape == (6, 20, 26)
    assert volume.array.flags.c_contiguous
    assert hashlib.sha256(volume.array).digest() == hashlib.sha256(expected).digest()
    assert volume.spacing == pytest.approx((2.5, 0.8, 0.7))
    np.testing.assert_allclose(volume.positions_mm, -104 + 2.5 * np.arange(6), atol=1e-4)


@pytest.mark.parametrize("ending", FORMATS)
@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.float32, np.float64])
def test_every_format_and_type_gives_the_same_int16_values(tmp_path, ct, ending, dtype):
    image = sitk.GetImageFromArray(sitk.GetArrayFromImage(ct).astype(dtype))
    image.CopyInformation(ct)
    volume = read(write(sitk.DICOMOrient(image, "RAS"), tmp_path / f"v{ending}"))
    assert volume.array.dtype == np.int16
    np.testing.assert_array_equal(volume.array, sitk.GetArrayFromImage(ct))
    assert volume.spacing == pytest.approx((2.5, 0.8, 0.7))
    assert (volume.modality, volume.intensity) == ("CT", None)
    assert volume.notes == ("modality guessed from the values: CT",)


def test_gipl_is_read_as_simpleitk_reads_it(tmp_path, ct):
    path = write(ct, tmp_path / "v.gipl")
    assert read(path).array.shape == (6, 20, 26)
    expected = sitk.DICOMOrient(sitk.ReadImage(str(path)), "LPS")
    np.testing.assert_array_equal(read(path).array, sitk.GetArrayFromImage(expected))


@pytest.mark.parametrize(
    ("slope", "intercept"), [(2.0, -1024.0), (0.37, 11.5), (0.0, 7.0), (np.nan, 0.0)]
)
def test_the_rescale_of_nifti_is_applied_as_simpleitk_does(tmp_path, ct, slope, intercept):
    path = write(ct, tmp_path / "v.nii")
    data = bytearray(path.read_bytes())
    data[112:120] = np.array([slope, intercept], dtype="<f4").tobytes()
    path.write_bytes(data)
    expected = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
    np.testing.assert_array_equal(read(path).array, expected)
    assert (read(path).array.dtype == np.float32) == (slope == 0.37)


def test_big_endian_and_nifti_2_files_are_read(tmp_path, ct):
    array = sitk.GetArrayFromImage(ct)
    affine = np.diag([-0.7, -0.8, 2.5, 1])
    swapped = nibabel.Nifti1Header(endianness=">")
    swapped.set_data_dtype(">i2")
    nibabel.save(nibabel.Nifti1Image(array.T, affine, swapped), tmp_path / "big.nii.gz")
    nibabel.save(nibabel.Nifti2Image(array.T, affine), tmp_path / "two.nii")
    for name in ("big.nii.gz", "two.nii"):
        np.testing.assert_array_equal(read(tmp_path / name).array, array)


def test_axes_that_simpleitk_refuses_are_taken_from_nibabel(tmp_path, ct):
    array = sitk.GetArrayFromImage(ct)
    affine = np.diag([-0.7, -0.8, 2.5, 1.0])
    affine[1, 2] = 2.5 * np.tan(np.radians(20))  # each slice shifted, as by a gantry tilt
    nibabel.save(nibabel.Nifti1Image(array.T, affine), tmp_path / "tilted.nii.gz")
    with pytest.raises(RuntimeError, match="orthonormal"):
        sitk.ReadImage(str(tmp_path / "tilted.nii.gz"))
    volume = read(tmp_path / "tilted.nii.gz")
    np.testing.assert_array_equal(volume.array, array)
    assert "axes that SimpleITK refuses, taken from nibabel" in volume.notes
    assert "gantry tilt 20 degrees, slices kept as acquired" in volume.notes
    assert volume.spacing == pytest.approx((2.5, 0.8, 0.7), abs=1e-4)


def test_nan_inf_and_values_beyond_int16_stay_where_they_are(tmp_path, ct):
    array = sitk.GetArrayFromImage(ct).astype(np.float32)
    array[1, 2, 3], array[2, 0, 0], array[3, 1, 1], array[4, 5, 5] = np.nan, np.inf, 40000, 0.25
    path = write(sitk.GetImageFromArray(array), tmp_path / "v.nrrd")
    volume = read(path)
    assert volume.array.dtype == np.float32
    np.testing.assert_array_equal(volume.array, array)
    assert volume.modality == "CT"


@pytest.mark.parametrize("padding", [-1024, -2000, -3024])
def test_padding_is_noted_and_never_rewritten(tmp_path, ct, padding):
    array = sitk.GetArrayFromImage(ct).copy()
    rows, columns = np.mgrid[:20, :26]
    outside = (rows - 9.5) ** 2 + (columns - 12.5) ** 2 > 100
    array[:, outside] = padding
    volume = read(write(sitk.GetImageFromArray(array), tmp_path / "v.nii.gz"))
    np.testing.assert_array_equal(volume.array, array)
    share = f"{np.mean(array == padding):.0%}"
    note = f"padding value {padding} outside the field of view ({share}), kept"
    assert note in volume.notes
    assert "padding" not in " ".join(read(write(ct, tmp_path / "full.nii")).notes)


@pytest.mark.parametrize(
    ("channel_name", "modality"),
    [
        ("CT", "CT"),
        ("ct", "CT"),
        ("T1", "MR"),
        ("FLAIR", "MR"),
        ("MRI_T2w", "MR"),
        ("noNorm", "unknown"),
    ],
)
def test_the_channel_name_tells_the_modality(tmp_path, ct, channel_name, modality):
    image = ct if modality == "CT" else sitk.Cast(ct + 1000, sitk.sitkInt16)
    volume = read(write(image, tmp_path / "v.nii"), channel_name=channel_name)
    assert volume.modality == modality
    if modality == "CT":
        assert volume.intensity is None
    else:
        array = sitk.GetArrayFromImage(image)
        low, high = np.percentile(array[array > array.min()], [0.5, 99.5])
        assert volume.intensity == {"low": low, "high": high}


def test_a_volume_named_ct_without_air_is_noted(tmp_path, ct):
    path = write(sitk.Cast(ct + 1000, sitk.sitkInt16), tmp_path / "v.nii")
    assert any("said to be CT, but" in note for note in read(path, channel_name="CT").notes)


def test_a_label_map_is_refused_and_an_image_of_small_numbers_is_not(tmp_path):
    labels = np.zeros((8, 40, 40), dtype=np.uint8)
    labels[1:7, 5:20, 5:20], labels[2:6, 20:35, 10:30] = 1, 7
    assert "label map" in reason(write(sitk.GetImageFromArray(labels), tmp_path / "seg.nii.gz"))
    noisy = np.random.default_rng(0).integers(0, 200, labels.shape).astype(np.uint8)
    volume = read(write(sitk.GetImageFromArray(noisy), tmp_path / "v.nii.gz"))
    assert volume.windowed
    assert volume.intensity == {"low": 0.0, "high": 255.0}
    np.testing.assert_array_equal(volume.array, noisy)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P"])
def test_grey_pictures_are_windowed_slices_without_spacing(tmp_path, mode):
    grey = np.random.default_rng(0).integers(0, 256, (20, 26)).astype(np.uint8)
    Image.fromarray(grey).convert(mode).save(tmp_path / "v.png")
    volume = read(tmp_path / "v.png", "png", channel_name="CT")
    np.testing.assert_array_equal(volume.array, grey[None])
    assert volume.array.dtype == np.int16
    assert (volume.modality, volume.windowed, volume.spacing) == ("CT", True, None)
    assert volume.positions_mm is None
    assert volume.intensity == {"low": 0.0, "high": 255.0}


def test_sixteen_bit_pictures_are_not_windowed(tmp_path):
    grey = np.random.default_rng(0).integers(0, 4000, (20, 26)).astype(np.uint16)
    Image.fromarray(grey).save(tmp_path / "v.png")
    volume = read(tmp_path / "v.png", "png")
    np.testing.assert_array_equal(volume.array, grey[None])
    assert not volume.windowed


def test_a_tiff_stack_takes_the_spacing_that_nnunet_keeps_beside_it(tmp_path):
    stack = np.random.default_rng(0).integers(0, 4000, (5, 20, 26)).astype(np.uint16)
    write(sitk.GetImageFromArray(stack), tmp_path / "case_0000.tif")
    assert read(tmp_path / "case_0000.tif", "png").spacing is None
    (tmp_path / "case.json").write_text(json.dumps({"spacing": [3, 0.5, 0.6]}))
    volume = read(tmp_path / "case_0000.tif", "png")
    np.testing.assert_array_equal(volume.array, stack)
    assert volume.spacing == (3.0, 0.5, 0.6)
    np.testing.assert_array_equal(volume.positions_mm, [0, 3, 6, 9, 12])


def test_4d_with_one_frame_and_2d_files_become_one_volume(tmp_path, ct):
    array = sitk.GetArrayFromImage(ct)
    affine = np.diag([-0.7, -0.8, 2.5, 1])
    nibabel.save(nibabel.Nifti1Image(array.T[..., None], affine), tmp_path / "one.nii")
    np.testing.assert_array_equal(read(tmp_path / "one.nii").array, array)
    for ending in (".mha", ".nii.gz"):
        volume = read(write(ct[:, :, 2], tmp_path / f"flat{ending}"))
        np.testing.assert_array_equal(volume.array, array[2:3])
        assert "a 2D file, the distance of slices is set to 1 mm" in volume.notes


def nifti_with(path, ct, offset, values, dtype):
    write(ct, path)
    data = bytearray(path.read_bytes())
    new = np.array(values, dtype=dtype).tobytes()
    data[offset : offset + len(new)] = new
    path.write_bytes(data)


def truncated_gzip(path, ct):
    write(ct, path)
    path.write_bytes(path.read_bytes()[:-500])


def damaged_gzip(path, ct):
    write(ct, path)
    data = bytearray(path.read_bytes())
    data[-6] ^= 1  # of the checksum: every voxel can be decoded
    path.write_bytes(data)


def shortened(path, ct):
    write(ct, path)
    path.write_bytes(path.read_bytes()[:-500])


def gzip_bomb(path, ct):
    nifti_with(path.with_suffix(""), ct, 42, [20000, 20000, 9], "<i2")
    path.write_bytes(gzip.compress(path.with_suffix("").read_bytes()))


def several(path, ct):
    array = np.stack([sitk.GetArrayFromImage(ct).T] * 3, axis=-1)
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), path)


def vectors(path, ct):
    sitk.WriteImage(sitk.Compose([ct, ct]), str(path))


def colours(path, ct):
    array = np.random.default_rng(0).integers(0, 256, (20, 26, 3)).astype(np.uint8)
    Image.fromarray(array).save(path)


def without_voxels(path, ct):
    write(ct, path)
    path.with_suffix(".raw").unlink()


def text(path, ct):
    path.write_text("patient;age\n7;61\n" * 50)


def complex_numbers(path, ct):
    nibabel.save(nibabel.Nifti1Image(np.ones((4, 5, 6), dtype=np.complex64), np.eye(4)), path)


def flat_axes(path, ct):
    affine = np.diag([0.7, 0.8, 2.5, 1])
    affine[:3, 2] = affine[:3, 0]
    nibabel.save(nibabel.Nifti1Image(sitk.GetArrayFromImage(ct).T, affine), path)
    data = bytearray(path.read_bytes())
    data[252:254] = b"\0\0"  # no qform, so that the sform counts
    path.write_bytes(data)


HOSTILE = [
    ("truncated.nii.gz", truncated_gzip, "ended before the end-of-stream"),
    ("checksum.nii.gz", damaged_gzip, "CRC check failed"),
    ("short.nii", shortened, "declares 26x20x6 voxels, more than the file can hold"),
    ("short.gipl", shortened, "declares 26x20x6 voxels, more than the file can hold"),
    ("short.mha", shortened, "it cannot be read (RuntimeError"),
    ("short.nrrd", shortened, "it cannot be read (RuntimeError"),
    ("short.png", colours, "it is a colour picture"),
    ("bomb.nii.gz", gzip_bomb, "declares 20000x20000x9 voxels, more than the file can hold"),
    ("huge.nii", lambda p, ct: nifti_with(p, ct, 42, [30000] * 3, "<i2"), "more than 4e+09"),
    ("minus.nii", lambda p, ct: nifti_with(p, ct, 42, [-5], "<i2"), "declares -5x20x6 voxels"),
    ("type.nii", lambda p, ct: nifti_with(p, ct, 70, [999], "<i2"), "unknown type of voxels (999)"),
    ("slope.nii", lambda p, ct: nifti_with(p, ct, 112, [1, 1e9], "<f4"), "its rescale is absurd"),
    ("inf.nii", lambda p, ct: nifti_with(p, ct, 112, [np.inf], "<f4"), "its rescale is absurd"),
    ("offset.nii", lambda p, ct: nifti_with(p, ct, 108, [1e20], "<f4"), "at byte 1e+20"),
    ("axes.nii", lambda p, ct: nifti_with(p, ct, 280, [np.nan] * 12, "<f4"), "not finite"),
    ("flat.nii", flat_axes, "span no volume"),
    ("several.nii.gz", several, "it is 4D (26x20x6x3 voxels), not one volume"),
    ("vectors.nrrd", vectors, "it has 2 values per voxel, not one"),
    ("complex.nii", complex_numbers, "it has colours or complex numbers"),
    ("gone.mhd", without_voxels, "it cannot be read (RuntimeError"),
    ("text.nii.gz", text, "it is not a NIfTI file"),
    ("text.nii", text, "it is not a NIfTI file"),
    ("text.nrrd", text, "it cannot be read (RuntimeError"),
    ("text.mha", text, "it cannot be read (RuntimeError"),
    ("text.png", text, "it cannot be read (UnidentifiedImageError"),
]


@pytest.mark.parametrize(("name", "make", "words"), HOSTILE, ids=[case[0] for case in HOSTILE])
def test_a_hostile_file_is_refused_with_its_reason(tmp_path, ct, name, make, words):
    path = tmp_path / name
    make(path, ct)
    assert words in reason(path, "png" if name.endswith(".png") else "file")


def test_a_file_that_vanished_is_refused(tmp_path):
    assert "No such file" in reason(tmp_path / "gone.nii")


def test_what_does_not_fit_into_memory_is_refused_before_it_is_read(tmp_path, ct, monkeypatch):
    path = write(ct, tmp_path / "v.nii")
    monkeypatch.setattr(volume_module, "free_memory", lambda: 1000)
    assert "of memory" in reason(path)
    monkeypatch.setattr(volume_module, "free_memory", lambda: None)
    assert read(path).array.shape == (6, 20, 26)


@pytest.mark.slow
@pytest.mark.parametrize(
    "ending",
    [".nii", ".nii.gz", ".nrrd", ".mha", ".gipl", ".png", ".bmp", ".tif", ".jpg", ".dcm"],
)
def test_fuzzed_headers_give_a_volume_or_a_reason(tmp_path, ct, write_dicom, ending):
    seed = tmp_path / f"seed{ending}"
    grey = (sitk.GetArrayFromImage(ct)[0] % 256).astype(np.uint8)
    if ending == ".dcm":
        write_dicom(seed, sitk.GetArrayFromImage(ct)[0])
    elif ending in (".png", ".bmp", ".tif", ".jpg"):
        Image.fromarray(grey).save(seed)
    else:
        write(ct, seed)
    rng = np.random.default_rng(0)
    outcomes = set()
    for number in range(60):
        data = bytearray(seed.read_bytes())
        for _ in range(rng.integers(1, 12)):
            data[rng.integers(min(len(data), 900))] = rng.integers(256)
        path = tmp_path / f"{number}" / f"fuzzed{ending}"
        path.parent.mkdir()
        path.write_bytes(data[: rng.integers(1, len(data))] if number % 3 == 0 else data)
        found, refused = find_sources([path])
        assert len(found) + len(refused) == 1
        for source in found:
            try:
                outcomes.add(read_volume(source).array.ndim)
            except Unreadable as error:
                refused.append((source.key, str(error)))
        for _, told in refused:
            assert told
            assert str(tmp_path) not in told
            outcomes.add("refused")
    assert "refused" in outcomes
    assert outcomes <= {3, "refused"}


@pytest.mark.slow
@pytest.mark.skipif(not TOTALSEG.is_dir(), reason=f"needs real volumes in {SHARED}")
def test_real_volumes_equal_what_simpleitk_reads_and_their_labels_are_refused(tmp_path):
    for path in TOTALSEG.glob("*.nii.gz"):
        shutil.copy(path, tmp_path)
    found, refused = find_sources([tmp_path])
    assert refused == []
    for source in found:
        name = Path(source.paths[0]).name
        if "seg" in name:
            assert "label map" in reason(Path(source.paths[0]))
            continue
        volume = read_volume(source)
        expected = sitk.DICOMOrient(sitk.ReadImage(source.paths[0]), "LPS")
        np.testing.assert_array_equal(volume.array, sitk.GetArrayFromImage(expected))
        assert volume.spacing == pytest.approx(expected.GetSpacing()[::-1])
        assert volume.modality == ("unknown" if "mr" in name else "CT")
