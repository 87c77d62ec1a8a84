from collections import Counter

import numpy as np

from nnunetv2_meddinov3.pretrain.config import load_config
from nnunetv2_meddinov3.pretrain.loader import Sampler


def a_sampler(volumes, *overrides, name="tiny_stage1"):
    config = load_config(name, ["optim.batch_size=8", "losses.koleo_group=4", *overrides])
    return Sampler(np.arange(len(volumes)) + 100, np.asarray(volumes), config)


def stream(sampler, steps):
    return [sampler.group(s, g).rows for s in range(steps) for g in range(sampler.groups_per_step)]


def test_an_epoch_has_every_row_once_but_for_a_remainder():
    sampler = a_sampler([0] * 7 + [1] * 7 + [2] * 8)  # 22 rows, 5 groups an epoch
    groups = stream(sampler, 5)
    for epoch in (groups[:5], groups[5:]):
        rows = [row for group in epoch for row in group]
        assert len(rows) == len(set(rows)) == 20
        assert set(rows) <= set(range(100, 122))
    assert groups[:5] != groups[5:]


def test_no_group_holds_a_slice_twice_and_volumes_are_spread():
    sampler = a_sampler(np.repeat(np.arange(4), 30))
    for group in stream(sampler, 40):
        assert len(set(group)) == 4
        counts = Counter((row - 100) // 30 for row in group)
        assert max(counts.values()) <= 3
    same = np.mean([len({(r - 100) // 30 for r in group}) for group in stream(sampler, 40)])
    assert same > 3  # 2.73 if drawn blindly


def test_a_group_depends_on_seed_stage_and_place_alone():
    volumes = np.repeat(np.arange(5), 9)
    whole = stream(a_sampler(volumes), 12)
    fresh = a_sampler(volumes)
    assert [fresh.group(9, 1).rows, fresh.group(2, 0).rows] == [whole[19], whole[4]]
    assert stream(a_sampler(volumes, "optim.seed=1"), 12) != whole
    assert a_sampler(volumes).group(3, 1).seed != a_sampler(volumes).group(3, 0).seed
    other = a_sampler(volumes, name="tiny_stage3_highres")
    assert stream(other, 12) != whole


def test_the_resolutions_are_drawn_with_their_probabilities_once_for_a_whole_step():
    sampler = a_sampler(
        np.repeat(np.arange(4), 8),
        "crops.resolutions.0.probability=0.8",
        "crops.resolutions.1.probability=0.2",
        name="tiny_stage3_highres",
    )
    drawn = [sampler.resolution(step) for step in range(500)]
    assert 0.15 < np.mean(drawn) < 0.25
    assert {sampler.group(7, g).resolution for g in range(2)} == {drawn[7]}
