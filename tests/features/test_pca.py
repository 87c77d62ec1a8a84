import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image

from nnunetv2_meddinov3.cli import main
from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.features.basis import Basis, fit_basis, like

pytestmark = pytest.mark.slow
SMALL = ["--size", "128", "--slices", "all", "--device", "cpu"]


def colours_of(path):
    """Colours (z, y, x, 3) of a NIfTI as its file has them, and its affine."""
    image = nibabel.load(path)
    data = np.asarray(image.dataobj)
    rgb = np.stack([data[channel] for channel in "RGB"], axis=-1)
    return rgb.transpose(2, 1, 0, 3), image.affine


def pca(output, *arguments):
    assert main(["features", "pca", *map(str, arguments), "-o", str(output), *SMALL]) == 0
    return output


@pytest.fixture(scope="module")
def axial(tmp_path_factory, marked_ct, oriented, weights):
    """The output for the marked scan as LPS, and its file."""
    folder = tmp_path_factory.mktemp("axial")
    path = oriented(folder / "ct.nii.gz", marked_ct)
    return pca(folder / "maps", path, "--weights", weights), path


def test_a_mark_has_colours_of_its_own_in_its_own_place(axial):
    colours, affine = colours_of(axial[0] / "ct_pca.nii.gz")
    np.testing.assert_allclose(affine, nibabel.load(axial[1]).affine, atol=1e-4)
    assert colours.shape == (6, 96, 128, 3)
    assert (colours[:, 0, 0] == 0).all()  # air
    mark = colours[2, 32:48, 80:96].reshape(-1, 3).astype(float)
    tissue = colours[0, 32:48, 80:96].reshape(-1, 3).astype(float)
    assert mark.std(0).max() == 0
    assert np.abs(mark.mean(0) - tissue.mean(0)).max() > 60


@pytest.mark.parametrize(("letters", "degrees"), [("RSA", 0), ("PIR", 0), ("LPI", 0), ("LPS", 20)])
def test_colours_lie_where_the_file_has_its_voxels_whatever_its_axes(
    tmp_path, marked_ct, oriented, weights, axial, letters, degrees
):
    path = oriented(tmp_path / "ct.nii.gz", marked_ct, letters, degrees)
    output = pca(tmp_path / "maps", path, "--weights", weights)
    colours, affine = colours_of(output / "ct_pca.nii.gz")
    np.testing.assert_allclose(affine, nibabel.load(path).affine, atol=1e-4)
    wanted, _ = colours_of(axial[0] / "ct_pca.nii.gz")
    image = sitk.GetImageFromArray(wanted, isVector=True)
    turned = sitk.GetArrayFromImage(sitk.DICOMOrient(image, letters))
    assert np.abs(colours.astype(int) - turned).max() <= 1


def test_itk_reads_the_colours_in_the_place_of_the_scan(axial):
    image, scan = (sitk.ReadImage(str(path)) for path in (axial[0] / "ct_pca.nii.gz", axial[1]))
    assert image.GetSize() == scan.GetSize()
    assert image.GetNumberOfComponentsPerPixel() == 3
    assert image.GetOrigin() == pytest.approx(scan.GetOrigin())
    assert image.GetDirection() == pytest.approx(scan.GetDirection())


def test_the_picture_shows_slices_above_their_colours(axial):
    with Image.open(axial[0] / "ct_pca.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    spread = np.ptp(pixels, axis=-1)
    half = len(pixels) // 2
    assert (spread[:half] > 30).mean() < 0.01  # grey
    assert (spread[half:] > 30).mean() > 0.1  # colours


def test_the_same_command_gives_the_same_bytes(tmp_path, axial, weights):
    again = pca(tmp_path / "again", axial[1], "--weights", weights)
    assert (again / "ct_pca.nii.gz").read_bytes() == (axial[0] / "ct_pca.nii.gz").read_bytes()


def test_colours_are_kept_for_other_scans_and_matched_for_other_weights(
    tmp_path, axial, weights, other_weights, write_image, make_ct
):
    wanted, _ = colours_of(axial[0] / "ct_pca.nii.gz")
    one = pca(tmp_path / "one", axial[1], "--weights", weights, "--like", axial[0], "--at", "2")
    found, _ = colours_of(one / "ct_pca.nii.gz")
    np.testing.assert_array_equal(found[2], wanted[2])
    assert not found[3].any()
    other = pca(tmp_path / "other", axial[1], "--weights", other_weights, "--like", axial[0])
    free = pca(tmp_path / "free", axial[1], "--weights", other_weights)
    body = wanted.any(-1)
    far = [
        np.abs(colours_of(each / "ct_pca.nii.gz")[0][body].astype(int) - wanted[body]).mean()
        for each in (other, free)
    ]
    assert far[0] < far[1], far
    strange = write_image(tmp_path / "strange.nii.gz", make_ct(3, 64))
    with pytest.raises(UserError, match="--like compares other weights on the same slices"):
        pca(tmp_path / "no", strange, "--weights", other_weights, "--like", axial[0])
    assert not (tmp_path / "no").exists()


def test_several_scans_share_a_basis(tmp_path, axial, source, weights, capsys):
    output = pca(tmp_path / "maps", axial[1], source, "--weights", weights)
    names = sorted(path.name for path in output.iterdir())
    assert names == sorted(
        ["basis.npz", "ct_pca.png", "ct_pca.nii.gz"]
        + [f"v{n}_pca.{end}" for n in range(5) for end in ("png", "nii.gz")]
    )
    printed = capsys.readouterr()
    assert sorted(printed.out.splitlines()) == [str(output / name) for name in names]
    said = [line for line in printed.err.splitlines() if "contract" in line]
    assert len(said) == 1  # once for all scans
    assert "states none" in said[0]
    assert "mean 65.1084" in said[0]


def test_pictures_have_no_nifti(tmp_path, make_ct, weights):
    folder = tmp_path / "pictures"
    folder.mkdir()
    grey = ((make_ct(1, 96)[0] + 1000) / 8).clip(0, 255).astype(np.uint8)
    Image.fromarray(grey).save(folder / "a.png")
    output = pca(tmp_path / "maps", folder, "--weights", weights)
    assert sorted(p.name for p in output.iterdir()) == ["a_pca.png", "basis.npz"]


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--size", "100"], r"--size must be a multiple of the 16 pixels .* got 100: take 96"),
        (["--size", "8208"], r"--size must be .* at most 8192, got 8208: take 8192"),
        (["--slices", "0"], r"--slices must be a number from 1 on, or all, got '0'"),
        (["--slices", "few"], r"--slices must be a number from 1 on, or all, got 'few'"),
        (["--at", "6"], r"--at must name slices from 0 to 5 of ct"),
        (["--weights", "nothing.pth"], r"nothing.pth"),
        (["--like", "nothing"], r"--like must be the output folder of an earlier"),
        (["--size", "16"], r"need at least four patches that show a body, but there are"),
        (["--device", "cuda"], r"--device cuda needs a GPU"),
        (["-o", __file__], r"must be writable, but: Not a directory"),
    ],
)
def test_a_mistake_is_a_sentence_and_leaves_nothing(tmp_path, axial, weights, more, sentence):
    import torch

    if "cuda" in more and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    output = tmp_path / "maps"
    base = [str(axial[1]), "--weights", weights, "-o", str(output), *SMALL]
    arguments = [*base, "--at", "0"] if more == ["--size", "16"] else base
    with pytest.raises(UserError, match=sentence):
        main(["features", "pca", *arguments, *more])
    assert not output.exists()


# the basis


def tokens(seed=0, patches=500):
    generator = np.random.default_rng(seed)
    hidden = generator.normal(size=(patches, 3)) * [5, 3, 2]
    shown = hidden + generator.normal(size=(patches, 3)) * 0.3
    return hidden @ generator.normal(size=(3, 20)), shown


def basis(x, shown, weights="a", patches="p"):
    return fit_basis(x, shown, weights=weights, patches=patches)


def test_signs_follow_what_is_shown_and_not_the_algebra():
    x, shown = tokens()
    found, turned = basis(x, shown), basis(-x, shown)
    np.testing.assert_allclose(found.colours(x), turned.colours(-x), atol=1e-6)
    scores = (x - found.mean) @ found.axes.T
    along = np.corrcoef(scores.T, shown.T)[:3, 3:]
    assert (along[np.arange(3), np.abs(along).argmax(1)] > 0).all()


def test_a_rotated_backbone_gets_the_same_colours_by_like():
    x, shown = tokens()
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(20, 20)))[0]
    ours, other = basis(x @ rotation, shown, weights="b"), basis(x, shown)
    matched = like(ours, other)
    np.testing.assert_allclose(matched.colours(x @ rotation), other.colours(x), atol=0.02)


def test_a_basis_is_read_as_it_was_written(tmp_path):
    x, shown = tokens()
    written = basis(x, shown)
    written.save(tmp_path / "basis.npz")
    read = Basis.load(tmp_path)
    assert (read.weights, read.patches) == ("a", "p")
    np.testing.assert_allclose(read.colours(x), written.colours(x), atol=1e-5)
