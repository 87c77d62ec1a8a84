import hashlib
import itertools

import numpy as np
import pytest
import SimpleITK as sitk

PAIRS = ("RL", "AP", "IS")
ORIENTATIONS = [
    "".join(letters)
    for axes in itertools.permutations(PAIRS)
    for letters in itertools.product(*axes)
]


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_every_orientation_gives_the_same_slices(tmp_path, ct, orientation, read_path, write_as):
    path = write_as(sitk.DICOMOrient(ct, orientation), tmp_path / "v.nii.gz")
    volume = read_path(path)
    expected = sitk.GetArrayFromImage(ct)
    assert volume.orientation == orientation
    assert volume.array.shape == (6, 20, 26)
    assert volume.array.flags.c_contiguous
    assert hashlib.sha256(volume.array).digest() == hashlib.sha256(expected).digest()
    assert volume.spacing == pytest.approx((2.5, 0.8, 0.7))
    np.testing.assert_allclose(volume.positions_mm, -104 + 2.5 * np.arange(6), atol=1e-4)
