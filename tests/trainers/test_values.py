"""What the log says of weights that were pretrained on other values than the dataset has."""

import pytest

from nnunetv2_meddinov3.fine_tuning import said_of_values

CT = {"unit": "HU", "clip": [-1000, 1000], "mean": 65.1, "std": 178.0}
MR = {"unit": "normalised", "clip": [-0.25, 1.25], "mean": 0.4, "std": 0.27}
OF_BEFORE = {"clip": [-1000, 1000], "mean": 65.1, "std": 178.0}


@pytest.mark.parametrize(
    ("stated", "names", "said"),
    [
        (CT, ["CT"], None),
        (CT, ["T1", "FLAIR"], "on CT in HU alone, but the channels of the dataset are T1, FLAIR"),
        (OF_BEFORE, ["MRI"], "on CT in HU alone"),
        (MR, ["CT"], "on images that are not CT alone, but the channels of the dataset are CT"),
        (MR, ["MRI"], None),
        ({**CT, "others": [MR]}, ["CT"], None),
        ({**CT, "others": [MR]}, ["MRI"], None),
        (None, ["MRI"], None),
    ],
)
def test_weights_of_other_values_are_remarked(stated, names, said):
    found = said_of_values({} if stated is None else {"intensity": stated}, names)
    assert found is None if said is None else said in found
