import copy
import json
from pathlib import Path

import pytest
import torch

from nnunetv2_meddinov3.models.architecture import Architecture, architecture_of
from nnunetv2_meddinov3.models.backbone import Backbone
from nnunetv2_meddinov3.models.build import load_backbone
from nnunetv2_meddinov3.pretrain.config import Optim
from nnunetv2_meddinov3.pretrain.heads import ProjectionHead
from nnunetv2_meddinov3.pretrain.optim import (
    backbone_rows,
    build_optimizer,
    clip_gradients,
    parameter_groups,
    set_rates,
)
from nnunetv2_meddinov3.pretrain.student import Student

GOLDEN = Path(__file__).parents[1] / "golden"
KEY = "param_groups(lr_decay=0.9,patch_embed_lr_mult=0.2)"


def a_student(dim=16):
    torch.manual_seed(0)
    backbone = Backbone(Architecture(dim, 2, 2), mask_token=True)
    return Student(backbone, ProjectionHead(dim, 8, 12, 6), ProjectionHead(dim, 8, 12, 6))


@pytest.mark.parametrize("case", ["vit_lvd", "vit_meddinov3", "vit_swiglu"])
def test_every_parameter_has_the_originals_multipliers(case):
    wanted = json.loads((GOLDEN / "golden.json").read_text())[case][KEY]
    backbone = load_backbone(GOLDEN / f"{case}.weights.safetensors")
    rows = {row.name: row for row in backbone_rows(backbone, 0.9, 0.2)}
    assert set(rows) == {row["name"] for row in wanted}
    for row in wanted:
        ours = rows[row["name"]]
        assert ours.lr_multiplier == pytest.approx(row["lr_multiplier"], rel=1e-12), row["name"]
        assert ours.weight_decay_multiplier == row["wd_multiplier"], row["name"]
        assert ours.is_last_layer == row["is_last_layer"]


def test_vit_b_has_the_multipliers_of_the_published_recipe():
    with torch.device("meta"):
        backbone = Backbone(architecture_of("vit_base"), mask_token=True)
    rows = {row.name: row.lr_multiplier for row in backbone_rows(backbone, 0.9, 0.2)}
    assert rows["cls_token"] == pytest.approx(0.254187, abs=1e-6)
    assert rows["patch_embed.proj.weight"] == pytest.approx(0.050837, abs=1e-6)
    assert rows["blocks.0.attn.qkv.weight"] == pytest.approx(0.28243, abs=1e-5)
    assert rows["blocks.11.mlp.fc2.bias"] == pytest.approx(0.9)
    assert rows["norm.weight"] == 1
    groups = {
        (row.lr_multiplier, row.weight_decay_multiplier)
        for row in backbone_rows(backbone, 0.9, 0.2)
    }
    assert len(groups) == 28


def test_every_parameter_is_in_one_group():
    student = a_student()
    found = [p for g in parameter_groups(student, Optim()) for p in g["params"]]
    assert len(found) == len(set(map(id, found))) == len(list(student.parameters()))


def test_a_frozen_last_layer_does_not_move_and_the_rest_does():
    student = a_student()
    before = copy.deepcopy(student.state_dict())
    optimizer = build_optimizer(student, Optim(), torch.device("cpu"))
    for p in student.parameters():
        p.grad = torch.ones_like(p)
    set_rates(optimizer, lr=1e-3, weight_decay=0.04, last_layer_lr=0.0)
    optimizer.step()
    moved = {k for k, t in student.state_dict().items() if not torch.equal(t, before[k])}
    assert {"dino_head.last_layer.weight", "ibot_head.last_layer.weight"} & moved == set()
    assert {"dino_head.mlp.0.weight", "backbone.vit.cls_token", "backbone.mask_token"} <= moved


def test_rates_are_scaled_for_every_group():
    optimizer = build_optimizer(a_student(), Optim(), torch.device("cpu"))
    set_rates(optimizer, lr=0.5, weight_decay=0.1, last_layer_lr=0.25)
    for group in optimizer.param_groups:
        base = 0.25 if group["is_last_layer"] else 0.5
        assert group["lr"] == base * group["lr_multiplier"]
        assert group["weight_decay"] == 0.1 * group["weight_decay_multiplier"]


def test_backbone_and_heads_are_clipped_each_by_itself():
    student = a_student()
    for p in student.backbone.parameters():
        p.grad = torch.full_like(p, 10.0)
    for p in [*student.dino_head.parameters(), *student.ibot_head.parameters()]:
        p.grad = torch.full_like(p, 1e-4)
    norms = clip_gradients(student, 3.0)
    total = sum(p.numel() for p in student.backbone.parameters()) ** 0.5 * 10
    assert norms["backbone"].item() == pytest.approx(total, rel=1e-5)
    clipped = torch.nn.utils.get_total_norm([p.grad for p in student.backbone.parameters()])
    assert clipped.item() == pytest.approx(3.0, rel=1e-4)
    assert all((p.grad == 1e-4).all() for p in student.dino_head.parameters())
