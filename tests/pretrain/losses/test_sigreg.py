"""SIGReg against numerical integration, its closed form, and what it is for."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import norm

from nnunetv2_meddinov3.pretrain.losses import SIGRegLoss

# of N(0, 1) against itself, times the number of images: what chance alone leaves
BY_CHANCE = math.sqrt(2 * math.pi) - math.sqrt(2 * math.pi / 3)


def features(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def projections(loss, cls, seed):
    return (cls.double() @ loss.directions(cls.shape[1], seed).double()).numpy()


NODES, WEIGHTS = np.polynomial.legendre.leggauss(120)
T, WEIGHTS = 7 * NODES, 7 * WEIGHTS  # of an integral over [-7, 7]
OF_NORMAL = np.array([quad(lambda u, t=t: math.cos(t * u) * norm.pdf(u), -12, 12)[0] for t in T])


def by_integration(x):
    """The Epps-Pulley statistic of one projection, the normal's characteristic function too."""
    found = np.exp(1j * T[:, None] * x).mean(1)
    return len(x) * (WEIGHTS * abs(found - OF_NORMAL) ** 2 * np.exp(-T * T / 2)).sum()


def by_closed_form(x):
    """The same over the whole line: each integral of a cosine with a normal is known."""
    n = len(x)
    pairs = np.exp(-((x[:, None] - x[None]) ** 2) / 2).sum() * math.sqrt(2 * math.pi) / n
    crossed = 2 * math.sqrt(math.pi) * np.exp(-(x**2) / 4).sum()
    return pairs - crossed + n * math.sqrt(2 * math.pi / 3)


SAMPLES = {
    "normal": features(12, 5),
    "wide": 2.5 * features(12, 5),
    "shifted": features(12, 5) + 1,
    "collapsed": torch.full((12, 5), 0.3),
    "at the middle": torch.zeros(12, 5),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_it_is_the_integral(name):
    loss = SIGRegLoss(slices=3)
    cls = SAMPLES[name]
    x = projections(loss, cls, 7)
    wanted = np.mean([by_integration(column) for column in x.T])
    assert wanted == pytest.approx(np.mean([by_closed_form(column) for column in x.T]), rel=1e-4)
    assert float(loss(cls, 7)) == pytest.approx(wanted, rel=2e-4)


def test_chance_leaves_what_is_known():
    loss = SIGRegLoss(slices=256)
    found = [float(loss(features(128, 64, seed=seed), seed)) for seed in range(40)]
    assert np.mean(found) == pytest.approx(BY_CHANCE, rel=0.03)


def test_quantiles_of_the_normal_have_next_to_none():
    grid = torch.from_numpy(norm.ppf((np.arange(200) + 0.5) / 200)).float()[:, None]
    assert float(SIGRegLoss(slices=4)(grid, 0)) < 0.01


def test_features_that_are_no_standard_normal_have_more():
    loss = SIGRegLoss(slices=256)
    good = float(loss(features(128, 32), 0))
    for name, worse in {
        "collapsed": torch.zeros(128, 32),
        "one direction": features(128, 1) * features(1, 32, seed=1),
        "small": 0.3 * features(128, 32),
        "large": 3 * features(128, 32),
        "shifted": features(128, 32) + 1,
    }.items():
        assert float(loss(worse, 0)) > 3 * good, name


def test_its_gradient_is_that_of_its_value():
    loss = SIGRegLoss(slices=5).double()
    cls = features(6, 4, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(x, 3), (cls,))


def test_descent_spreads_a_batch_that_has_collapsed():
    loss = SIGRegLoss(slices=128)
    cls = (0.5 + 0.05 * features(64, 8)).requires_grad_()
    optimiser = torch.optim.Adam([cls], lr=0.05)
    before = loss(cls, 0).item()
    for step in range(200):
        optimiser.zero_grad()
        loss(cls, step).backward()
        optimiser.step()
    assert loss(cls, 1000).item() < 1.2 * BY_CHANCE < before / 10
    assert cls.detach().mean(0).abs().max() < 0.2
    spread = torch.linalg.eigvalsh(torch.cov(cls.detach().T))
    assert float(spread.min()) > 0.6
    assert float(spread.max()) < 1.4


def test_directions_are_unit_vectors_that_the_seed_decides():
    loss = SIGRegLoss(slices=16)
    first = loss.directions(10, 5)
    torch.testing.assert_close(first.norm(dim=0), torch.ones(16))
    assert torch.equal(first, loss.directions(10, 5))
    assert not torch.equal(first, loss.directions(10, 6))
    torch.manual_seed(3)  # whatever a process did before
    assert torch.equal(first, loss.directions(10, 5))


def test_it_is_computed_in_fp32():
    cls = features(8, 16).bfloat16()
    assert SIGRegLoss(slices=8)(cls, 0) == SIGRegLoss(slices=8)(cls.float(), 0)
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        assert SIGRegLoss(slices=8)(cls, 0).dtype == torch.float32


def test_nothing_of_it_is_in_a_checkpoint():
    assert SIGRegLoss().state_dict() == {}


@pytest.mark.parametrize("slices", [0, -1])
def test_no_direction_is_refused(slices):
    with pytest.raises(ValueError, match="slices must be at least 1"):
        SIGRegLoss(slices)


def test_no_image_is_refused():
    with pytest.raises(ValueError, match="at least one image"):
        SIGRegLoss()(torch.zeros(0, 4), 0)
