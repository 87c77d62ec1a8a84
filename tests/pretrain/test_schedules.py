import json
from pathlib import Path

import numpy as np
import pytest

from nnunetv2_meddinov3.pretrain.config import Schedule, load_config
from nnunetv2_meddinov3.pretrain.schedules import schedules_of, values

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "golden.json").read_text())["schedules"]


@pytest.mark.parametrize("name", GOLDEN)
def test_schedules_are_the_originals(name):
    a = GOLDEN[name]["args"]
    schedule = a_schedule(
        a["start"], a["peak"], a["end"], a["warmup_iterations"], a.get("cosine_iterations")
    )
    found = values(schedule, a["total_iterations"])
    assert len(found) == len(GOLDEN[name]["values"])
    np.testing.assert_allclose(found, GOLDEN[name]["values"], rtol=1e-12, atol=1e-15)


def a_schedule(start, peak, end, warmup_steps=0, cosine_steps=None):
    return Schedule(
        start=start, peak=peak, end=end, warmup_steps=warmup_steps, cosine_steps=cosine_steps
    )


def test_the_warm_up_excludes_its_end_and_the_cosine_includes_both():
    found = values(a_schedule(0.0, 1.0, 0.1, warmup_steps=4), 10)
    wanted = [0, 0.25, 0.5, 0.75, 1, 0.914058, 0.689058, 0.410942, 0.185942, 0.1]
    np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_a_cosine_of_one_step_is_its_peak_and_one_of_none_is_the_end_at_once():
    assert values(a_schedule(1.0, 1.0, 0.5, 3, 1), 6).tolist() == [1, 1, 1, 1, 0.5, 0.5]
    assert values(a_schedule(0.0, 1.0, 0.5, 1, 0), 3).tolist() == [0, 0.5, 0.5]


def test_a_cosine_may_rise():
    found = values(a_schedule(0.0, 0.0, 2.0, 0, 5), 6)
    assert found[0] == 0
    assert found[4] == pytest.approx(2)
    assert (np.diff(found) >= 0).all()


def test_parts_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="at most the 3 steps"):
        values(a_schedule(0.0, 1.0, 1.0, 4), 3)


def test_every_schedule_of_a_stage_is_an_array_over_its_steps():
    config = load_config("tiny_stage1", ["optim.batch_size=128"])  # half of the configs' rates
    schedules = schedules_of(config)
    arrays = vars(schedules)
    assert list(arrays) == [
        *("lr", "last_layer_lr", "weight_decay", "momentum"),
        *("teacher_temp", "local_weight", "gram_weight"),
    ]
    assert {(a.shape, a.dtype.name) for a in arrays.values()} == {((400,), "float64")}
    np.testing.assert_allclose(schedules.lr[[0, 10, 20, 399]], [0, 0.00025, 0.0005, 0.0005])
    assert (schedules.last_layer_lr[:5] == 0).all()
    assert (schedules.last_layer_lr[5:] == schedules.lr[5:]).all()
    assert (schedules.gram_weight == 0).all()
    assert set(schedules.momentum) == {0.98}


def test_the_second_stage_of_a_vit_b_has_the_papers_values():
    schedules = schedules_of(load_config("vitb16_stage2_gram"))
    assert (schedules.gram_weight[0], schedules.gram_weight[-1]) == (0, 2)
    assert schedules.gram_weight[500] == pytest.approx(1, abs=2e-3)
    assert (schedules.local_weight[0], schedules.local_weight[-1]) == (1, 0.5)
    assert set(schedules.lr) == {5e-5}
