import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from nnunetv2_meddinov3.cli import main
from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.models.architecture import Architecture
from nnunetv2_meddinov3.models.backbone import Backbone
from nnunetv2_meddinov3.models.build import save_backbone
from nnunetv2_meddinov3.pretrain.probe.comparison import table
from nnunetv2_meddinov3.pretrain.probe.fitting import (
    Linear,
    average_precision,
    best_thresholds,
    neighbour_scores,
    resampled_average_precision,
)
from nnunetv2_meddinov3.pretrain.probe.labelled import ProbeData
from nnunetv2_meddinov3.pretrain.probe.probing import MIN_HELD_OUT, run_probe, verdict


@pytest.fixture(scope="module")
def data(dataset):
    return ProbeData.from_nnunet(dataset, size=64, slices_per_case=6)


def a_backbone(seed=0):
    torch.manual_seed(seed)
    return Backbone(Architecture(32, 2, 2, patch_size=8, layer_scale=0.5))


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


def with_patients(data, number):
    """The same slices with as many held-out patients."""
    patients = list(data.patients)
    for n, i in enumerate(np.flatnonzero(data.is_held_out)):
        patients[i] = f"held out {n % number}"
    return replace(data, patients=patients)


@pytest.mark.parametrize("number", [1, 2, MIN_HELD_OUT - 1, MIN_HELD_OUT, 8])
def test_intervals_over_a_few_patients_are_not_shown_and_said_to_mean_nothing(data, number):
    few = with_patients(data, number)
    result = run_probe(a_backbone(), few)
    text = table({"w": result}, few)
    is_enough = number >= MIN_HELD_OUT
    assert (" to 0." in text) == is_enough
    assert (f"too few patients for an interval (n = {number} held out" in text) != is_enough
    assert result.to_dict()["intervals_mean_something"] == is_enough


def test_the_fewest_patients_are_those_whose_whole_range_is_an_interval_of_95_percent():
    assert 2 * 0.5**MIN_HELD_OUT <= 0.05 < 2 * 0.5 ** (MIN_HELD_OUT - 1)


def test_a_blind_guess_scores_in_every_column_what_no_picture_is_needed_for(data):
    result = run_probe(a_backbone(), data)
    held_out = torch.from_numpy(data.is_held_out)
    shown = data.masks[held_out].flatten(2).any(2)
    usable = [i for i, s in enumerate(result.structures.values()) if s["knn"] is not None]
    prevalence = shown[:, usable].float().mean().item()
    assert result.blind["knn"] == result.blind["linear"] == pytest.approx(prevalence)
    assert result.chance == result.blind["knn"]
    # a prediction of a whole picture is a guess too, and the usual place is no worse a one
    whole = [
        2 * m.sum().item() / (m.numel() + m.sum().item()) for m in data.masks[held_out].unbind(1)
    ]
    assert np.mean(whole) < result.blind["dense"] < run_probe(Planted(data), data).dense
    assert run_probe(a_backbone(1), data).blind == result.blind  # whatever the weights
    *_, row, _ = table({"w": result}, data).splitlines()
    assert row.split() == ["blind", "guess", *(f"{v:.3f}" for v in result.blind.values())]


def test_a_blind_segmentation_is_of_the_training_slices_and_by_hand(data):
    """One structure, in the left half of the training slices and the whole of the others."""
    masks = torch.zeros_like(data.masks[:, :1])
    masks[..., :32] = True
    masks[torch.from_numpy(data.is_held_out)] = True
    planted = replace(data, masks=masks, structures=["a"])
    assert run_probe(a_backbone(), planted).blind["dense"] == pytest.approx(2 * 0.5 / 1.5)
    half = half_ignored(planted)
    assert run_probe(a_backbone(), half).blind["dense"] == pytest.approx(2 * 0.5 / 1.5)
    elsewhere = planted.masks.clone()
    elsewhere[torch.from_numpy(data.is_held_out), :, :, :32] = False
    result = run_probe(a_backbone(), replace(planted, masks=elsewhere))
    assert result.blind["dense"] == 0


def half_ignored(data):
    """The same slices, whose lower half is not labelled."""
    ignored = torch.zeros_like(data.ignored)
    ignored[:, 32:] = True
    return replace(data, masks=data.masks & ~ignored[:, None], ignored=ignored)


def test_a_segmentation_is_not_blamed_for_what_it_finds_in_ignored_pixels(data):
    half = half_ignored(data)
    known = run_probe(Planted(data), half)
    as_background = run_probe(Planted(data), replace(half, ignored=data.ignored))
    assert known.dense > 0.8
    assert known.dense > as_background.dense + 0.05


def test_slices_with_ignored_pixels_do_not_count_as_slices_without_a_structure(data):
    rows = torch.arange(len(data.images)) % 3 == 1  # two slices of every patient
    ignored = data.ignored.clone()
    ignored[rows, 60:] = True
    masks = data.masks.clone()
    masks[rows] = False  # what they show may lie under the ignored pixels
    partly = run_probe(a_backbone(), replace(data, masks=masks, ignored=ignored))
    kept = (~rows).nonzero()[:, 0].tolist()
    whole = ProbeData(
        *(data.images[kept], data.masks[kept], data.ignored[kept], data.structures),
        [data.patients[i] for i in kept],
        data.is_held_out[kept],
        data.name,
    )
    without = run_probe(a_backbone(), whole)
    for kind in ("knn", "linear"):
        assert getattr(partly, kind) == pytest.approx(getattr(without, kind), abs=1e-6)
        assert partly.intervals[kind] == pytest.approx(without.intervals[kind], abs=1e-6)
    assert partly.chance == pytest.approx(without.chance)


def test_where_no_slice_is_completely_labelled_the_table_says_so(data):
    half = half_ignored(data)
    result = run_probe(a_backbone(), half)
    assert (result.knn, result.linear, result.chance) == (None, None, None)
    assert set(result.intervals) == {"dense"}
    text = table({"w": result}, half)
    assert "no structure is shown by some completely labelled slices and not by others" in text
    assert text.count("not measurable") == 2
    assert (result.blind["knn"], result.blind["linear"]) == (None, None)
    assert 0 < result.blind["dense"] < 1
    assert "\nblind guess  -  " in text


def test_a_probe_is_the_same_each_time_and_leaves_no_trace_in_the_random_state(data):
    before = torch.get_rng_state()
    a, b = (run_probe(a_backbone(), data).to_dict() for _ in range(2))
    assert a == b
    torch.manual_seed(0)
    a_backbone()
    torch.set_rng_state(before)
    json.dumps(a, allow_nan=False)


def test_average_precision_by_hand():
    labels = np.array([True, False, True, False])
    assert average_precision(np.array([4.0, 3, 2, 1]), labels) == pytest.approx((1 + 2 / 3) / 2)
    assert average_precision(np.array([1.0, 1, 1, 1]), labels) == pytest.approx(0.5)
    assert np.isnan(average_precision(np.array([1.0, 2]), np.array([True, True])))
    assert np.isnan(average_precision(np.array([1.0, 2]), np.array([False, False])))


def test_the_average_precision_of_each_draw_is_that_of_the_slices_it_drew():
    g = np.random.default_rng(0)
    for number in range(20):
        scores = g.integers(0, 5, 12) / 4 if number % 2 else g.normal(size=12)  # ties or none
        labels = g.random(12) < 0.4
        draws = g.integers(0, 12, (30, 12))
        times = np.stack([np.bincount(draw, minlength=12) for draw in draws])
        wanted = [average_precision(scores[draw], labels[draw]) for draw in draws]
        np.testing.assert_allclose(
            resampled_average_precision(scores, labels, times), wanted, rtol=1e-12
        )


def test_votes_are_of_the_nearest_by_cosine():
    train = torch.tensor([[1.0, 0], [0, 1], [0, 1]])
    labels = torch.tensor([[True], [False], [False]])
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
        (["--patients", "x"], "--patients must find a patient in every name"),
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
