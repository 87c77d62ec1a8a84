"""A scan with a mark in a known place, written in any orientation, and tiny weights."""

import numpy as np
import pytest
import SimpleITK as sitk

SPACING = (1.0, 1.0, 3.0)  # x, y, z in mm


@pytest.fixture(scope="session")
def weights(tmp_path_factory, released_file):
    """A random ViT in the format of MedDINOv3's release, which states no contract."""
    path = tmp_path_factory.mktemp("weights") / "model.pth"
    released_file(path)
    return str(path)


@pytest.fixture(scope="session")
def other_weights(tmp_path_factory, released_file):
    """Another random ViT."""
    path = tmp_path_factory.mktemp("weights") / "other.pth"
    released_file(path, seed=1)
    return str(path)


@pytest.fixture(scope="session")
def marked_ct():
    """A CT (6, 96, 128) in LPS: tissue in air, with a bright block that no symmetry hides."""
    generator = np.random.default_rng(0)
    y, x = np.mgrid[-1:1:96j, -1:1:128j]
    body = (x / 0.9) ** 2 + (y / 0.8) ** 2 < 1
    array = np.where(body, 40, -1000) + generator.normal(0, 10, (6, 96, 128))
    array[2:4, 32:48, 80:96] = 900  # patches of 16 pixels
    image = sitk.GetImageFromArray(np.rint(array).astype(np.int16))
    image.SetSpacing(SPACING)
    image.SetOrigin((-60.0, -50.0, 10.0))
    return image


@pytest.fixture(scope="session")
def oriented():
    """A function that writes a scan with its axes in another order, such as "RSA", or turned."""

    def write(path, image, letters="LPS", degrees=0.0):
        turned = sitk.DICOMOrient(image, letters)
        if degrees:
            angle = np.radians(degrees)
            rotation = np.array(
                [[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]]
            )
            direction = rotation @ np.reshape(turned.GetDirection(), (3, 3))
            turned.SetDirection(direction.ravel().tolist())
        path.parent.mkdir(parents=True, exist_ok=True)
        sitk.WriteImage(turned, str(path))
        return path

    return write
