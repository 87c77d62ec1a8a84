"""A labelled raw dataset of phantoms."""

import json

import numpy as np
import pytest
import SimpleITK as sitk

from nnunetv2_meddinov3.demo.phantom import make_phantom


@pytest.fixture(scope="session")
def write_dataset():
    """A function that writes a raw dataset from case -> (image, label map) and its labels."""

    def write(folder, cases, labels, ending=".nii.gz", spacing=(6.0, 6.0, 14.0)):
        for name in ("imagesTr", "labelsTr"):
            (folder / name).mkdir(parents=True)
        for case, (image, label) in cases.items():
            for array, name in (
                (image, f"imagesTr/{case}_0000"),
                (label, f"labelsTr/{case}"),
            ):
                volume = sitk.GetImageFromArray(array, isVector=array.shape[-1] == 3)
                volume.SetSpacing(spacing[: volume.GetDimension()])
                sitk.WriteImage(volume, str(folder / f"{name}{ending}"))
        facts = {"channel_names": {"0": "CT"}, "labels": labels, "file_ending": ending}
        (folder / "dataset.json").write_text(json.dumps(facts))
        return folder

    return write


@pytest.fixture(scope="session")
def phantoms():
    """Six phantom patients: case -> (CT, label map)."""
    generators = map(np.random.default_rng, range(6))
    return {
        f"p{i}": make_phantom(generator, (10, 64, 64), (14.0, 6.0, 6.0))
        for i, generator in enumerate(generators)
    }


@pytest.fixture(scope="session")
def dataset(tmp_path_factory, write_dataset, phantoms):
    """Six phantom patients, two labels and a region."""
    folder = tmp_path_factory.mktemp("raw") / "Dataset001_Phantom"
    labels = {"background": 0, "liver": 1, "kidney": 3, "organs": [1, 2, 3]}
    return write_dataset(folder, phantoms, labels)
