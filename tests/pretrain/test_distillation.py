import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nnunetv2_meddinov3.pretrain.batch import ViewBatch
from nnunetv2_meddinov3.pretrain.distillation import LossOptions
from nnunetv2_meddinov3.pretrain.initialise import read_distillation
from nnunetv2_meddinov3.pretrain.naming import meta_name

GOLDEN = Path(__file__).parents[1] / "golden"


def golden_step(case):
    facts = json.loads((GOLDEN / "golden.json").read_text())[case]
    step = load_file(GOLDEN / f"{case}.step.safetensors")
    weights = facts["weights"]
    distillation = read_distillation(
        GOLDEN / f"{case}.weights.safetensors",
        LossOptions(
            dino_weight=weights["dino"],
            ibot_weight=weights["ibot"],
            koleo_weight=weights["koleo"],
            gram=case == "stage2",
        ),
    )
    distillation.teacher_temp = facts["teacher_temp"]
    distillation.gram_weight = weights["gram"]
    batch = ViewBatch(
        step["global_crops"], step["local_crops"], step["masks"], step.get("gram_crops")
    )
    return distillation, batch, step


@pytest.mark.parametrize("case", ["stage1", "stage2"])
def test_a_whole_step_has_the_losses_and_gradients_of_the_original(case):
    distillation, batch, step = golden_step(case)
    losses = distillation.losses(batch)
    wanted = {k.removeprefix("loss."): v for k, v in step.items() if k.startswith("loss.")}
    assert set(losses) == set(wanted)
    for name, value in wanted.items():
        assert losses[name].item() == pytest.approx(value.item(), rel=1e-5), name
    losses["total"].backward()
    found = 0
    for name, parameter in distillation.named_parameters():
        key = f"grad.{meta_name(name)}"
        if key in step:
            error = (parameter.grad - step[key].view_as(parameter)).abs().max()
            assert error / step[key].abs().max() < 1e-4, name
            found += 1
    assert found == sum(key.startswith("grad.") for key in step)
