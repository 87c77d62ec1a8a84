import json

import numpy as np
import pytest
import torch

from nnunetv2_meddinov3.cli import main
from nnunetv2_meddinov3.demo.phantom import make_phantom
from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.models.architecture import Architecture
from nnunetv2_meddinov3.models.backbone import Backbone
from nnunetv2_meddinov3.models.build import save_backbone
from nnunetv2_meddinov3.pretrain.probe.fitting import (
    Linear,
    average_precision,
    best_thresholds,
    neighbour_scores,
)
from nnunetv2_meddinov3.pretrain.probe.labelled import ProbeData
from nnunetv2_meddinov3.pretrain.probe.probing import run_probe, verdict


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Six phantom patients, two labels and a region."""
    import SimpleITK as sitk

    folder = tmp_path_factory.mktemp("raw") / "Dataset001_Phantom"
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    for i in range(6):
        ct, labels = make_phantom(np.random.default_rng(i), (10, 64, 64), (14.0, 6.0, 6.0))
        for array, path in ((ct, f"imagesTr/p{i}_0000.nii.gz"), (labels, f"labelsTr/p{i}.nii.gz")):
            image = sitk.GetImageFromArray(array)
            image.SetSpacing((6.0, 6.0, 14.0))
            sitk.WriteImage(image, str(folder / path))
    labels = {"background": 0, "liver": 1, "kidney": 3, "organs": [1, 2, 3]}
    facts = {"channel_names": {"0": "CT"}, "labels": labels, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(facts))
    return folder


@pytest.fixture(scope="module")
def data(dataset):
    return ProbeData.from_nnunet(dataset, size=64, slices_per_case=6)


def a_backbone(seed=0):
    torch.manual_seed(seed)
    return Backbone(Architecture(32, 2, 2, patch_size=8, layer_scale=0.5))


def test_slices_masks_and_patients_belong_together(data):
    n = len(data.images)
    assert data.images.shape == (n, 1, 64, 64)
    assert data.masks.shape == (n, 3, 64, 64)
    assert data.structures == ["liver", "kidney", "organs"]
    assert (data.masks[:, 0] <= data.masks[:, 2]).all()  # a region holds its labels
    liver = data.images[:, 0][data.masks[:, 0]]
    assert 60 < liver.mean() < 150  # HU
    assert data.images.min() < -800


def test_no_patient_is_on_both_sides(data):
    patients = np.array(data.patients)
    fitted, held_out = (set(patients[data.is_held_out == side]) for side in (False, True))
    assert not fitted & held_out
    assert (len(fitted), len(held_out)) == (4, 2)


def test_a_given_split_is_taken_and_one_through_a_patient_refused(dataset, tmp_path):
    import shutil

    folder = tmp_path / "Dataset002"
    shutil.copytree(dataset, folder)
    cases = [f"p{i}" for i in range(6)]
    (folder / "splits_final.json").write_text(json.dumps([{"train": cases[2:], "val": cases[:2]}]))
    data = ProbeData.from_nnunet(folder, size=64, slices_per_case=1)
    assert set(np.array(data.patients)[data.is_held_out]) == {"p0", "p1"}
    with pytest.raises(UserError, match="p is in both parts"):
        ProbeData.from_nnunet(folder, patients="p")


class Planted(Backbone):
    """A backbone whose tokens say what is to be found: the picture itself, blurred."""

    def __init__(self, data, shuffled=False):
        super().__init__(Architecture(32, 2, 2, patch_size=8))
        order = torch.randperm(len(data.images)) if shuffled else torch.arange(len(data.images))
        self.answers = data.masks[order].float()
        self.at = 0

    def intermediate_tokens(self, images, layers):
        from nnunetv2_meddinov3.models.backbone import Tokens

        masks = self.answers[self.at : self.at + len(images)]
        self.at += len(images)
        patches = torch.nn.functional.avg_pool2d(masks, 8).flatten(2).transpose(1, 2)
        cls = masks.flatten(2).any(2).float()
        return [Tokens(cls, patches[:, :0], patches)]


def test_planted_features_are_found_and_shuffled_ones_are_not(data):
    torch.manual_seed(0)
    good, bad = run_probe(Planted(data), data), run_probe(Planted(data, shuffled=True), data)
    assert good.linear > 0.99
    assert good.knn > 0.95
    assert good.dense > 0.7
    assert bad.linear < 0.9
    assert bad.dense < 0.7 * good.dense  # organs lie alike in all patients
    assert good.intervals["dense"][0] <= good.dense <= good.intervals["dense"][1]


def test_a_probe_is_the_same_each_time_and_leaves_no_trace_in_the_random_state(data):
    before = torch.get_rng_state()
    a, b = (run_probe(a_backbone(), data).to_dict() for _ in range(2))
    assert a == b
    torch.manual_seed(0)
    a_backbone()
    torch.set_rng_state(before)
    json.dumps(a, allow_nan=False)


def test_average_precision_by_hand():
    labels = np.array([1, 0, 1, 0])
    assert average_precision(np.array([4.0, 3, 2, 1]), labels) == pytest.approx((1 + 2 / 3) / 2)
    assert average_precision(np.array([1.0, 1, 1, 1]), labels) == pytest.approx(0.5)
    assert np.isnan(average_precision(np.array([1.0, 2]), np.array([1, 1])))


def test_votes_are_of_the_nearest_by_cosine():
    train = torch.tensor([[1.0, 0], [0, 1], [0, 1]])
    labels = torch.tensor([[1], [0], [0]])
    scores = neighbour_scores(train, labels, torch.tensor([[5.0, 0], [0, 0.1]]), k=2)
    assert scores[0, 0] > 0.99
    assert scores[1, 0] < 0.01


def test_a_logistic_regression_learns_a_plane():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(500, 5, generator=g)
    y = (x[:, :1] + 2 * x[:, 1:2] > 0.5).float()
    model = Linear(x[:400], y[:400], 1e-4)
    assert ((model(x[400:]) > 0) == y[400:].bool()).float().mean() > 0.95


def test_the_best_threshold_is_found():
    masks = torch.zeros(1, 1, 10, 10, dtype=torch.bool)
    masks[..., :3] = True
    shares = torch.where(masks, 0.32, 0.2)
    assert 0.2 < best_thresholds(shares, masks)[0] < 0.32


def result(value, interval, patients=9):
    return {"knn": value, "dense": 0.5, "patients": [20, patients]} | {
        "intervals": {"knn": interval, "dense": [0.4, 0.6]}
    }


def test_worse_features_are_said_in_words_only_beyond_the_intervals():
    start = result(0.8, [0.75, 0.85])
    assert "k-NN on slices gives 0.600 now and gave 0.800" in verdict(
        start, result(0.6, [0.5, 0.7])
    )
    assert verdict(start, result(0.74, [0.66, 0.8])) is None
    assert verdict(result(0.8, [0.8, 0.8], 2), result(0.6, [0.5, 0.7], 2)) is None


def test_the_command_compares_weights_in_a_table(dataset, tmp_path, capsys):
    for seed in (0, 1):
        save_backbone(a_backbone(seed), tmp_path / f"w{seed}.safetensors", licence="mine")
    arguments = [str(tmp_path / f"w{seed}.safetensors") for seed in (0, 1)]
    options = ["--dataset", str(dataset), "--size", "64", "--slices-per-case", "4", "--random"]
    out = tmp_path / "figures.json"
    assert main(["probe", *arguments, *options, "--json", str(out)]) == 0
    text = capsys.readouterr().out
    assert "Dataset001_Phantom: 16 slices of 4 patients to fit, 8 of 2 held out" in text
    for name in (*arguments, "random weights", "blind guess"):
        assert name in text
    assert set(json.loads(out.read_text())) == {*arguments, "random weights"}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--dataset", "nowhere"], "there is no nowhere/dataset.json"),
        (["--size", "60"], "must be a multiple of 8 pixels, got 60"),
        (["--size", "8"], "--size must be at least 32"),
        (["--slices-per-case", "0"], "--slices-per-case must be at least 1"),
        (["--patients", "("], "--patients must be a regular expression"),
        (["--patients", "x"], "--patients must match every case"),
        (["--patients", "p"], "at least two patients"),
        (["--device", "cuda"], "--device cuda needs a GPU"),
    ],
)
def test_a_mistake_is_one_sentence(dataset, tmp_path, arguments, sentence):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    save_backbone(a_backbone(), tmp_path / "w.safetensors", licence="mine")
    given = arguments if "--dataset" in arguments else ["--dataset", str(dataset), *arguments]
    with pytest.raises(UserError, match=sentence) as caught:
        main(["probe", str(tmp_path / "w.safetensors"), *given])
    assert "\n" not in str(caught.value)


def test_weights_that_are_not_there_are_one_sentence(dataset):
    with pytest.raises(UserError, match=r"there is no nothing.pth"):
        main(["probe", "nothing.pth", "--dataset", str(dataset)])


def test_a_dataset_without_labels_is_one_sentence(dataset, tmp_path):
    import shutil

    folder = tmp_path / "Dataset003"
    shutil.copytree(dataset, folder, ignore=shutil.ignore_patterns("labelsTr"))
    with pytest.raises(UserError, match="holds no case with both"):
        ProbeData.from_nnunet(folder)
