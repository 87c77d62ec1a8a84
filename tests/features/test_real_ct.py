"""A marked place in real CT is the same place in every output, however the file lies."""

import json

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from nibabel.affines import apply_affine

from nnunetv2_meddinov3.cli import main
from nnunetv2_meddinov3.features.npz import read_npz

pytestmark = pytest.mark.slow
SCANS = {
    "lidc": "lidc_idri_0314/lidc_idri_0314_ct.nii.gz",
    "totalsegmentator": "totalsegmentator_example/example_ct.nii.gz",
}
COMMON = ["--size", "320", "--slices", "all", "--device", "cpu"]
MARK_MM = 48.0  # its side; stripes in it look like no anatomy
STRIPE_MM = 8.0


@pytest.fixture(scope="module")
def vit_small(tmp_path_factory, released_file):
    path = tmp_path_factory.mktemp("weights") / "vit_small.pth"
    released_file(path, "vit_small")
    return str(path)


@pytest.fixture(scope="module", params=SCANS)
def marked(request, shared_data):
    """Four slices of a real CT with stripes in the middle two, and the mark's middle in mm, RAS."""
    image = sitk.DICOMOrient(sitk.ReadImage(str(shared_data / SCANS[request.param])), "LPS")
    image = image[:, :, image.GetDepth() // 2 - 2 : image.GetDepth() // 2 + 2]
    array = sitk.GetArrayFromImage(image).astype(np.int16)
    y, x = np.mgrid[: array.shape[1], : array.shape[2]]
    centre = [round(array.shape[1] * 0.45), round(array.shape[2] * 0.35)]  # left and right differ
    spacing = image.GetSpacing()
    inside = abs(x - centre[1]) * spacing[0] < MARK_MM / 2
    inside &= abs(y - centre[0]) * spacing[1] < MARK_MM / 2
    stripes = np.where((x * spacing[0] // STRIPE_MM) % 2 == 0, 900, -900).astype(np.int16)
    array[1:3, inside] = stripes[inside]
    changed = sitk.GetImageFromArray(array)
    changed.CopyInformation(image)
    return changed, centre


def voxels_of(path):
    """Numbers of a NIfTI by (i, j, k) of the file."""
    image = nibabel.load(path)
    return np.asarray(image.dataobj), image.affine


@pytest.mark.parametrize(("letters", "degrees"), [("LPS", 20), ("PIR", 0)])
def test_a_marked_voxel_is_in_the_same_place_in_every_output(
    marked, letters, degrees, oriented, vit_small, tmp_path
):
    image, (row, column) = marked
    mask = sitk.Image(image.GetSize(), sitk.sitkUInt8)
    mask.CopyInformation(image)
    mask[column, row, 1] = 1
    path = oriented(tmp_path / "ct.nii.gz", image, letters, degrees)
    where, affine = voxels_of(oriented(tmp_path / "where.nii.gz", mask, letters, degrees))
    (voxel,) = np.argwhere(where)
    point = apply_affine(affine, voxel)  # mm

    weights = ["--weights", vit_small, *COMMON]
    at = f"--point={','.join(map(str, point))}"
    for name, way in (
        ("like", ["similarity", path, at, "--mm", *weights]),
        ("maps", ["pca", path, *weights]),
        ("again", ["pca", path, *weights]),
        ("tokens", ["extract", path, *weights]),
    ):
        assert main(["features", *map(str, way), "-o", str(tmp_path / name)]) == 0

    # similarity: nothing else is as like the mark, and it lies where the mark does
    cosines, of_cosines = voxels_of(tmp_path / "like/ct_similarity.nii.gz")
    np.testing.assert_allclose(of_cosines, affine, atol=1e-4)
    assert cosines[tuple(voxel)] == pytest.approx(1, abs=1e-5)
    near = np.linalg.norm(apply_affine(affine, np.argwhere(cosines > 0.9)) - point, axis=1)
    assert np.max(near) < MARK_MM

    # principal components: the mark's colour is in the mark alone, and the same bytes come again
    colours, of_colours = voxels_of(tmp_path / "maps/ct_pca.nii.gz")
    np.testing.assert_allclose(of_colours, affine, atol=1e-4)
    colours = np.stack([colours[name] for name in "RGB"], axis=-1).astype(int)
    alike = np.abs(colours - colours[tuple(voxel)]).max(-1) == 0
    near = np.linalg.norm(apply_affine(affine, np.argwhere(alike)) - point, axis=1)
    assert np.max(near) < MARK_MM
    for file in ("ct_pca.nii.gz", "ct_pca.png", "basis.npz"):
        one, other = ((tmp_path / name / file).read_bytes() for name in ("maps", "again"))
        assert one == other

    # tokens in files: the patch that the affine puts there is the one most like itself
    facts, arrays = read_npz(tmp_path / "tokens/ct_features.npz", ("patches", "slices"))
    steps = np.linalg.inv(np.array(facts["affine"]))
    k, i, j = np.rint(apply_affine(steps, point)).astype(int)
    tokens = arrays["patches"][k].astype(np.float32)
    tokens /= np.linalg.norm(tokens, axis=-1, keepdims=True)
    of_file = tokens @ tokens[i, j]
    middle = apply_affine(np.linalg.inv(affine), apply_affine(np.array(facts["affine"]), (k, 3, 4)))
    assert of_file[3, 4] == pytest.approx(cosines[tuple(np.rint(middle).astype(int))], abs=2e-3)
    page = (tmp_path / "like/similarity.html").read_text(encoding="utf-8")
    assert json.dumps({"row": int(i), "column": int(j)})[1:-1] in page
