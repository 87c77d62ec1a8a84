import json

import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image


def test_gipl_is_read_as_simpleitk_reads_it(tmp_path, ct, read_path, write_as):
    path = write_as(ct, tmp_path / "v.gipl")
    assert read_path(path).array.shape == (6, 20, 26)
    expected = sitk.DICOMOrient(sitk.ReadImage(str(path)), "LPS")
    np.testing.assert_array_equal(read_path(path).array, sitk.GetArrayFromImage(expected))


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P"])
def test_grey_pictures_are_windowed_slices_without_spacing(tmp_path, mode, read_path):
    grey = np.random.default_rng(0).integers(0, 256, (20, 26)).astype(np.uint8)
    Image.fromarray(grey).convert(mode).save(tmp_path / "v.png")
    volume = read_path(tmp_path / "v.png", "png", channel_name="CT")
    np.testing.assert_array_equal(volume.array, grey[None])
    assert volume.array.dtype == np.int16
    assert (volume.modality, volume.windowed, volume.spacing) == ("CT", True, None)
    assert volume.positions_mm is None
    assert volume.intensity == {"low": 0.0, "high": 255.0}


def test_sixteen_bit_pictures_are_not_windowed(tmp_path, read_path):
    grey = np.random.default_rng(0).integers(0, 4000, (20, 26)).astype(np.uint16)
    Image.fromarray(grey).save(tmp_path / "v.png")
    volume = read_path(tmp_path / "v.png", "png")
    np.testing.assert_array_equal(volume.array, grey[None])
    assert not volume.windowed


def test_a_tiff_stack_takes_the_spacing_that_nnunet_keeps_beside_it(tmp_path, read_path, write_as):
    stack = np.random.default_rng(0).integers(0, 4000, (5, 20, 26)).astype(np.uint16)
    write_as(sitk.GetImageFromArray(stack), tmp_path / "case_0000.tif")
    assert read_path(tmp_path / "case_0000.tif", "png").spacing is None
    (tmp_path / "case.json").write_text(json.dumps({"spacing": [3, 0.5, 0.6]}))
    volume = read_path(tmp_path / "case_0000.tif", "png")
    np.testing.assert_array_equal(volume.array, stack)
    assert volume.spacing == (3.0, 0.5, 0.6)
    np.testing.assert_array_equal(volume.positions_mm, [0, 3, 6, 9, 12])
