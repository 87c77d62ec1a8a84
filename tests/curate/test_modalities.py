import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image


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
        assert (volume.intensity["low"], volume.intensity["high"]) == (low, high)


def head(make_ct, seed=0):
    """A body in air, as HU in floating point."""
    return make_ct(6, 40, seed=seed).astype(np.float64)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda hu: np.clip((hu + 1024) / 2048, 0, 1), "they lie between 0"),
        (lambda hu: np.clip(hu / 1000, -1, 1), "they lie between -1"),
        (lambda hu: (hu - hu.mean()) / hu.std(), "they lie between"),
        (lambda hu: (np.clip(hu, -160, 240) + 160) / 400 * 255, "and even fat is below 0"),
        (lambda hu: np.clip(hu + 1024, 0, None), "and even fat is below 0"),
        (lambda hu: hu + 1024, "most tissue is near 1024"),
        (lambda hu: hu * 16, "are beyond -4000 to 4000"),
        (lambda hu: hu / 8192 + 1.0, "they lie between"),
    ],
)
@pytest.mark.parametrize("padded", [False, True])
def test_values_that_are_no_hu_outrank_the_name(
    tmp_path, make_ct, change, why, padded, read_path, write_as
):
    array = change(head(make_ct)).astype(np.float32)
    if padded:
        array[:, :6] = array[:, -6:] = -2000  # outside the field of view, which was not scaled
    path = write_as(sitk.GetImageFromArray(array), tmp_path / "v.nii")
    for name in ("CT", None):
        volume = read_path(path, channel_name=name)
        assert volume.modality == "unknown"
        assert volume.intensity is not None
        assert name is None or any(why in note for note in volume.notes), volume.notes
        np.testing.assert_allclose(volume.array, array)


@pytest.mark.parametrize(
    "change",
    [
        lambda hu: hu,
        lambda hu: hu[:, 14:26, 10:30],  # inside the body: no air
        lambda hu: np.clip(hu, -160, 240),
        lambda hu: np.where(hu < -500, -32768, hu),
        lambda hu: np.where(hu < -500, -2000, hu),
        lambda hu: np.where(hu > 100, 3071, hu),
    ],
)
def test_cropped_clipped_and_padded_ct_stays_ct_by_its_name(
    tmp_path, make_ct, change, read_path, write_as
):
    image = sitk.GetImageFromArray(change(head(make_ct)).astype(np.float32))
    volume = read_path(write_as(image, tmp_path / "v.nii"), channel_name="CT")
    assert (volume.modality, volume.intensity) == ("CT", None)


def test_a_ct_without_air_is_noted(tmp_path, make_ct, read_path, write_as):
    image = sitk.GetImageFromArray(make_ct(6, 40)[:, 14:26, 10:30])
    volume = read_path(write_as(image, tmp_path / "v.nii"), channel_name="CT")
    assert "said to be CT, but its values show no air" in volume.notes


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


def masks():
    """Two organs, as a picture of 0, 120 and 255."""
    mask = np.zeros((64, 64), np.uint8)
    mask[10:30, 10:40], mask[35:50, 20:30] = 255, 120
    return mask


@pytest.mark.parametrize("ending", [".png", ".bmp", ".tif"])
@pytest.mark.parametrize("values", [(0, 255), (0, 1), (0, 63, 126, 189, 252), (3, 7)])
def test_pictures_of_labels_are_refused(tmp_path, ending, values, reason_of):
    mask = np.asarray(values, np.uint8)[np.minimum(masks() // 100, len(values) - 1)]
    path = tmp_path / f"liver{ending}"
    Image.fromarray(mask).save(path)
    assert "picture of labels" in reason_of(path, "png")


@pytest.mark.parametrize("quality", [50, 75, 95])
def test_masks_are_recognised_after_jpeg(tmp_path, quality, reason_of):
    mask = np.where(np.kron(masks(), np.ones((8, 8))) > 0, 255, 0).astype(np.uint8)
    Image.fromarray(mask).save(tmp_path / "m.jpg", quality=quality)
    assert "picture of labels" in reason_of(tmp_path / "m.jpg", "png")


@pytest.mark.parametrize("window", [(-1000, 1000), (-160, 240), (0, 255), (0, 100)])
@pytest.mark.parametrize("ending", [".png", ".jpg"])
def test_windowed_slices_are_no_labels(tmp_path, make_ct, window, ending, read_path):
    low, high = window
    grey = np.clip((make_ct(1, 64)[0].astype(float) - low) / (high - low), 0, 1) * 255
    Image.fromarray(grey.astype(np.uint8)).save(tmp_path / f"v{ending}")
    assert read_path(tmp_path / f"v{ending}", "png").windowed


@pytest.mark.parametrize("background", [0, -1, -1024])
def test_labels_in_dicom_and_with_negative_numbers_are_refused(
    tmp_path, background, write_dicom, reason_of, write_as
):
    labels = background + masks().astype(np.int16)
    path = write_dicom(tmp_path / "a.dcm", labels, t0028_1052=str(background), t0028_1053="1")
    assert "label map" in reason_of(path, "dicom")
    image = sitk.GetImageFromArray(np.stack([labels] * 3))
    assert "label map" in reason_of(write_as(image, tmp_path / "a.nii.gz"))
