import gzip
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image

from nnunetv2_meddinov3.curate import volume as volume_module
from nnunetv2_meddinov3.curate.discover import find_sources
from nnunetv2_meddinov3.curate.volume import Unreadable

SHARED = Path(__file__).parents[4] / "shared/data"
TOTALSEG = SHARED / "totalsegmentator_example"
FORMATS = [".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd"]


@pytest.mark.parametrize("ending", FORMATS)
@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.float32, np.float64])
def test_every_format_and_type_gives_the_same_int16_values(
    tmp_path, ct, ending, dtype, read_path, write_as
):
    image = sitk.GetImageFromArray(sitk.GetArrayFromImage(ct).astype(dtype))
    image.CopyInformation(ct)
    volume = read_path(write_as(sitk.DICOMOrient(image, "RAS"), tmp_path / f"v{ending}"))
    assert volume.array.dtype == np.int16
    np.testing.assert_array_equal(volume.array, sitk.GetArrayFromImage(ct))
    assert volume.spacing == pytest.approx((2.5, 0.8, 0.7))
    assert (volume.modality, volume.intensity) == ("CT", None)
    assert volume.notes == ("modality guessed from the values: CT",)


def test_nan_inf_and_values_beyond_int16_stay_where_they_are(tmp_path, ct, read_path, write_as):
    array = sitk.GetArrayFromImage(ct).astype(np.float32)
    array[1, 2, 3], array[2, 0, 0], array[3, 1, 1], array[4, 5, 5] = np.nan, np.inf, 40000, 0.25
    path = write_as(sitk.GetImageFromArray(array), tmp_path / "v.nrrd")
    volume = read_path(path)
    assert volume.array.dtype == np.float32
    np.testing.assert_array_equal(volume.array, array)
    assert volume.modality == "CT"


def test_4d_with_one_frame_and_2d_files_become_one_volume(tmp_path, ct, read_path, write_as):
    array = sitk.GetArrayFromImage(ct)
    affine = np.diag([-0.7, -0.8, 2.5, 1])
    nibabel.save(nibabel.Nifti1Image(array.T[..., None], affine), tmp_path / "one.nii")
    np.testing.assert_array_equal(read_path(tmp_path / "one.nii").array, array)
    for ending in (".mha", ".nii.gz"):
        volume = read_path(write_as(ct[:, :, 2], tmp_path / f"flat{ending}"))
        np.testing.assert_array_equal(volume.array, array[2:3])
        assert "a 2D file, the distance of slices is set to 1 mm" in volume.notes


def nifti_with(path, ct, offset, values, dtype):
    sitk.WriteImage(ct, str(path))
    data = bytearray(path.read_bytes())
    new = np.array(values, dtype=dtype).tobytes()
    data[offset : offset + len(new)] = new
    path.write_bytes(data)


def truncated_gzip(path, ct):
    sitk.WriteImage(ct, str(path))
    path.write_bytes(path.read_bytes()[:-500])


def damaged_gzip(path, ct):
    sitk.WriteImage(ct, str(path))
    data = bytearray(path.read_bytes())
    data[-6] ^= 1  # of the checksum: every voxel can be decoded
    path.write_bytes(data)


def shortened(path, ct):
    sitk.WriteImage(ct, str(path))
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
    sitk.WriteImage(ct, str(path))
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
def test_a_hostile_file_is_refused_with_its_reason(tmp_path, ct, name, make, words, reason_of):
    path = tmp_path / name
    make(path, ct)
    assert words in reason_of(path, "png" if name.endswith(".png") else "file")


def test_a_file_that_vanished_is_refused(tmp_path, reason_of):
    assert "No such file" in reason_of(tmp_path / "gone.nii")


def test_what_does_not_fit_into_memory_is_refused_before_it_is_read(
    tmp_path, ct, monkeypatch, read_path, reason_of, write_as
):
    path = write_as(ct, tmp_path / "v.nii")
    monkeypatch.setattr(volume_module, "free_memory", lambda: 1000)
    assert "of memory" in reason_of(path)
    monkeypatch.setattr(volume_module, "free_memory", lambda: None)
    assert read_path(path).array.shape == (6, 20, 26)


@pytest.mark.slow
@pytest.mark.parametrize(
    "ending",
    [".nii", ".nii.gz", ".nrrd", ".mha", ".gipl", ".png", ".bmp", ".tif", ".jpg", ".dcm"],
)
def test_fuzzed_headers_give_a_volume_or_a_reason(
    tmp_path, ct, write_dicom, ending, write_as, read_source
):
    seed = tmp_path / f"seed{ending}"
    grey = (sitk.GetArrayFromImage(ct)[0] % 256).astype(np.uint8)
    if ending == ".dcm":
        write_dicom(seed, sitk.GetArrayFromImage(ct)[0])
    elif ending in (".png", ".bmp", ".tif", ".jpg"):
        Image.fromarray(grey).save(seed)
    else:
        write_as(ct, seed)
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
                outcomes.add(read_source(source).array.ndim)
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
def test_real_volumes_equal_what_simpleitk_reads_and_their_labels_are_refused(
    tmp_path, reason_of, read_source
):
    for path in TOTALSEG.glob("*.nii.gz"):
        shutil.copy(path, tmp_path)
    found, refused = find_sources([tmp_path])
    assert refused == []
    for source in found:
        name = Path(source.paths[0]).name
        if "seg" in name:
            assert "label map" in reason_of(Path(source.paths[0]))
            continue
        volume = read_source(source)
        expected = sitk.DICOMOrient(sitk.ReadImage(source.paths[0]), "LPS")
        np.testing.assert_array_equal(volume.array, sitk.GetArrayFromImage(expected))
        assert volume.spacing == pytest.approx(expected.GetSpacing()[::-1])
        assert volume.modality == ("unknown" if "mr" in name else "CT")
