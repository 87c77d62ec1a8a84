import nibabel
import numpy as np
import pytest
import SimpleITK as sitk


@pytest.mark.parametrize(
    ("slope", "intercept"), [(2.0, -1024.0), (0.37, 11.5), (0.0, 0.0), (np.nan, 0.0)]
)
def test_the_rescale_of_nifti_is_applied_as_simpleitk_does(
    tmp_path, ct, slope, intercept, read_path, write_as
):
    path = write_as(ct, tmp_path / "v.nii")
    data = bytearray(path.read_bytes())
    data[112:120] = np.array([slope, intercept], dtype="<f4").tobytes()
    path.write_bytes(data)
    expected = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
    np.testing.assert_array_equal(read_path(path).array, expected)
    assert (read_path(path).array.dtype == np.float32) == (slope == 0.37)


@pytest.mark.parametrize("slope", [0.0, -0.0, np.nan])
@pytest.mark.parametrize("intercept", [7.0, -1024.0, 1e9])
def test_a_slope_of_zero_means_no_scaling_whatever_the_intercept(
    tmp_path, ct, slope, intercept, read_path, write_as
):
    path = write_as(ct, tmp_path / "v.nii")
    data = bytearray(path.read_bytes())
    data[112:120] = np.array([slope, intercept], dtype="<f4").tobytes()
    path.write_bytes(data)
    np.testing.assert_array_equal(read_path(path).array, nibabel.load(path).get_fdata().T)


def test_big_endian_and_nifti_2_files_are_read(tmp_path, ct, read_path):
    array = sitk.GetArrayFromImage(ct)
    affine = np.diag([-0.7, -0.8, 2.5, 1])
    swapped = nibabel.Nifti1Header(endianness=">")
    swapped.set_data_dtype(">i2")
    nibabel.save(nibabel.Nifti1Image(array.T, affine, swapped), tmp_path / "big.nii.gz")
    nibabel.save(nibabel.Nifti2Image(array.T, affine), tmp_path / "two.nii")
    for name in ("big.nii.gz", "two.nii"):
        np.testing.assert_array_equal(read_path(tmp_path / name).array, array)


def test_axes_that_simpleitk_refuses_are_taken_from_nibabel(tmp_path, ct, read_path):
    array = sitk.GetArrayFromImage(ct)
    affine = np.diag([-0.7, -0.8, 2.5, 1.0])
    affine[1, 2] = 2.5 * np.tan(np.radians(20))  # each slice shifted, as by a gantry tilt
    nibabel.save(nibabel.Nifti1Image(array.T, affine), tmp_path / "tilted.nii.gz")
    with pytest.raises(RuntimeError, match="orthonormal"):
        sitk.ReadImage(str(tmp_path / "tilted.nii.gz"))
    volume = read_path(tmp_path / "tilted.nii.gz")
    np.testing.assert_array_equal(volume.array, array)
    assert "axes that SimpleITK refuses, taken from nibabel" in volume.notes
    assert "gantry tilt 20 degrees, slices kept as acquired" in volume.notes
    assert volume.spacing == pytest.approx((2.5, 0.8, 0.7), abs=1e-4)
