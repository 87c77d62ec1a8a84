import itertools

import numpy as np
import pytest
import SimpleITK as sitk

from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.features.extraction import patch_of_pixels
from nnunetv2_meddinov3.features.scans import choose_slices, find_scans, open_scans

ORIENTATIONS = [
    "".join(letters)
    for pairs in itertools.permutations(("RL", "AP", "IS"))
    for letters in itertools.product(*pairs)
]


def opened(path, modality=None):
    (scan,) = open_scans(find_scans([path], modality), modality)
    return scan


@pytest.mark.parametrize("letters", ORIENTATIONS)
def test_slices_are_axial_and_go_back_to_the_voxels_they_came_from(
    tmp_path, marked_ct, oriented, letters
):
    path = oriented(tmp_path / "ct.nii.gz", marked_ct, letters)
    scan = opened(path)
    np.testing.assert_array_equal(scan.slices, sitk.GetArrayFromImage(marked_ct))
    in_file = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
    np.testing.assert_array_equal(scan.to_file(scan.slices), in_file)
    assert scan.spacing == pytest.approx((3.0, 1.0, 1.0))
    assert (scan.unit, scan.modality) == ("HU", "CT")


def test_the_body_has_its_lungs_and_not_the_table(tmp_path, write_image):
    y, x = np.mgrid[-1:1:100j, -1:1:100j]
    body = (x / 0.7) ** 2 + (y / 0.5) ** 2 < 1
    array = np.where(body, 40, -1000)
    array[(x / 0.2) ** 2 + (y / 0.2) ** 2 < 1] = -850  # a lung
    array[85:87] = 300  # a table
    rng = np.random.default_rng(0)
    noisy = np.rint(array + rng.normal(0, 5, (3, 100, 100))).astype(np.int16)
    scan = opened(write_image(tmp_path / "ct.nii.gz", noisy))
    found = scan.body(1)
    np.testing.assert_array_equal(found, body)


def test_slices_are_chosen_at_even_distances_or_by_number(tmp_path, write_image, make_ct):
    array = make_ct(20, 40)
    array[:5] = -1000  # show nothing
    scan = opened(write_image(tmp_path / "ct.nii.gz", array))
    assert scan.unusable == frozenset(range(5))
    assert choose_slices(scan, None) == list(range(5, 20))
    assert choose_slices(scan, 1) == [12]
    assert choose_slices(scan, 3) == [9, 12, 15]
    assert choose_slices(scan, 99) == list(range(5, 20))
    assert choose_slices(scan, 3, [7, 19, 7]) == [7, 19]
    with pytest.raises(UserError, match=r"slices from 0 to 19 of ct, .* got 20"):
        choose_slices(scan, 3, [20])
    with pytest.raises(UserError, match="slice 2 of ct shows nothing"):
        choose_slices(scan, 3, [2])


def test_mr_has_the_ends_of_its_range(tmp_path, write_image, make_ct):
    array = (make_ct(4, 40) + 1000).clip(0)
    path = write_image(tmp_path / "mr.nii.gz", array)
    scan = opened(path, modality="MR")
    assert (scan.unit, scan.modality) == ("normalised", "MR")
    assert scan.ends == scan.window == (0.0, 16384.0)


def test_scans_of_a_folder_have_names_of_their_own(tmp_path, source, write_image, make_ct):
    write_image(source / "more" / "v0.nii.gz", make_ct(4, 24))
    names = [name for name, _ in find_scans([source])]
    assert sorted(names) == ["v0", "v0_", "v1", "v2", "v3", "v4"]


def test_what_cannot_be_read_is_said_and_the_others_are_looked_at(source, capsys):
    (source / "v1.nii.gz").write_bytes(b"no image")
    assert [scan.name for scan in open_scans(find_scans([source]))] == ["v0", "v2", "v3", "v4"]
    assert "source/v1.nii.gz cannot be looked at: " in capsys.readouterr().err


def test_a_mistake_ends_with_a_sentence(tmp_path, write_image, make_ct):
    with pytest.raises(UserError, match="does not exist"):
        find_scans([tmp_path / "none.nii.gz"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"VOLUME must be a scan .* holds none"):
        find_scans([tmp_path / "empty"])
    broken = tmp_path / "broken.nii.gz"
    broken.write_bytes(b"no image")
    with pytest.raises(UserError, match=r"broken.nii.gz cannot be looked at: "):
        opened(broken)
    air = write_image(tmp_path / "air.nii.gz", np.full((3, 40, 40), -1000, np.int16))
    with pytest.raises(UserError, match=r"air.nii.gz cannot be looked at: "):
        opened(air)
    four = sitk.JoinSeries([sitk.GetImageFromArray(make_ct(3, 40))] * 2)
    sitk.WriteImage(four, str(tmp_path / "four.nii.gz"))
    with pytest.raises(UserError, match=r"four.nii.gz cannot be looked at: .*4"):
        opened(tmp_path / "four.nii.gz")
    with pytest.raises(UserError, match="--modality must be one of CT"):
        find_scans([tmp_path], "CAT")


@pytest.mark.parametrize(("pixels", "patches"), [(512, 32), (500, 32), (50, 56), (7, 3)])
def test_a_pixel_belongs_to_the_patch_that_covers_its_middle(pixels, patches):
    rows, columns = patch_of_pixels((pixels, 2 * pixels), (patches, patches))
    assert len(rows) == pixels
    assert len(columns) == 2 * pixels
    edges = np.linspace(0, pixels, patches + 1)
    middle = np.arange(pixels) + 0.5
    assert (edges[rows] <= middle).all()
    assert (middle <= edges[rows + 1]).all()
