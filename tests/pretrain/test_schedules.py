import json
from pathlib import Path

import numpy as np
import pytest

from nnunetv2_meddinov3.pretrain.config import Schedule
from nnunetv2_meddinov3.pretrain.schedules import value_at, values

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "golden.json").read_text())["schedules"]


@pytest.mark.parametrize("name", GOLDEN)
def test_schedules_are_the_originals(name):
    a = GOLDEN[name]["args"]
    schedule = Schedule(
        a["start"], a["peak"], a["end"], a["warmup_iterations"], a.get("cosine_iterations")
    )
    found = values(schedule, a["total_iterations"])
    assert len(found) == len(GOLDEN[name]["values"])
    np.testing.assert_allclose(found, GOLDEN[name]["values"], rtol=1e-12, atol=1e-15)


def test_the_warm_up_excludes_its_end_and_the_cosine_includes_both():
    found = values(Schedule(0.0, 1.0, 0.1, warmup_steps=4), 10)
    wanted = [0, 0.25, 0.5, 0.75, 1, 0.914058, 0.689058, 0.410942, 0.185942, 0.1]
    np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_a_cosine_of_one_step_is_its_peak_and_one_of_none_is_the_end_at_once():
    assert values(Schedule(1.0, 1.0, 0.5, 3, 1), 6).tolist() == [1, 1, 1, 1, 0.5, 0.5]
    assert values(Schedule(0.0, 1.0, 0.5, 1, 0), 3).tolist() == [0, 0.5, 0.5]


def test_a_cosine_may_rise():
    found = values(Schedule(0.0, 0.0, 2.0, 0, 5), 6)
    assert found[0] == 0
    assert found[4] == pytest.approx(2)
    assert (np.diff(found) >= 0).all()


def test_beyond_the_last_step_the_last_value_stays_and_parts_that_do_not_fit_are_refused():
    assert value_at(Schedule(1.0, 1.0, 0.5), 99, 10) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="at most the 3 steps"):
        value_at(Schedule(0.0, 1.0, 1.0, 4), 0, 3)
