import numpy as np
import pytest
import SimpleITK as sitk


@pytest.mark.parametrize("padding", [-1024, -2000, -3024])
def test_padding_is_noted_and_never_rewritten(tmp_path, ct, padding, read_path, write_as):
    array = sitk.GetArrayFromImage(ct).copy()
    rows, columns = np.mgrid[:20, :26]
    outside = (rows - 9.5) ** 2 + (columns - 12.5) ** 2 > 100
    array[:, outside] = padding
    volume = read_path(write_as(sitk.GetImageFromArray(array), tmp_path / "v.nii.gz"))
    np.testing.assert_array_equal(volume.array, array)
    share = f"{np.mean(array == padding):.0%}"
    note = f"padding value {padding} outside the field of view ({share}), kept"
    assert note in volume.notes
    assert "padding" not in " ".join(read_path(write_as(ct, tmp_path / "full.nii")).notes)


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
def test_the_channel_name_tells_the_modality(
    tmp_path, ct, channel_name, modality, read_path, write_as
):
    image = ct if modality == "CT" else sitk.Cast(ct + 1000, sitk.sitkInt16)
    volume = read_path(write_as(image, tmp_path / "v.nii"), channel_name=channel_name)
    assert volume.modality == modality
    if modality == "CT":
        assert volume.intensity is None
    else:
        array = sitk.GetArrayFromImage(image)
        low, high = np.percentile(array[array > array.min()], [0.5, 99.5])
        assert volume.intensity == {"low": low, "high": high}


def test_a_volume_named_ct_without_air_is_noted(tmp_path, ct, read_path, write_as):
    path = write_as(sitk.Cast(ct + 1000, sitk.sitkInt16), tmp_path / "v.nii")
    assert any("said to be CT, but" in note for note in read_path(path, channel_name="CT").notes)


def test_a_label_map_is_refused_and_an_image_of_small_numbers_is_not(
    tmp_path, read_path, reason_of, write_as
):
    labels = np.zeros((8, 40, 40), dtype=np.uint8)
    labels[1:7, 5:20, 5:20], labels[2:6, 20:35, 10:30] = 1, 7
    assert "label map" in reason_of(
        write_as(sitk.GetImageFromArray(labels), tmp_path / "seg.nii.gz")
    )
    noisy = np.random.default_rng(0).integers(0, 200, labels.shape).astype(np.uint8)
    volume = read_path(write_as(sitk.GetImageFromArray(noisy), tmp_path / "v.nii.gz"))
    assert volume.windowed
    assert volume.intensity == {"low": 0.0, "high": 255.0}
    np.testing.assert_array_equal(volume.array, noisy)
