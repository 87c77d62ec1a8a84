"""Biases of queries and values: as the starting weights have them, trained without weight decay."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from nnunetv2_meddinov3.models.architecture import architecture_of
from nnunetv2_meddinov3.models.weights import read_checkpoint
from nnunetv2_meddinov3.pretrain.config import load_config
from nnunetv2_meddinov3.pretrain.networks import load_start
from nnunetv2_meddinov3.pretrain.optim import backbone_rows, build_optimizer, set_rates

_spec = importlib.util.spec_from_file_location(
    "pretrain_state_dicts", Path(__file__).parents[1] / "models" / "state_dicts.py"
)
state_dicts = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = state_dicts  # which its dataclass looks up
_spec.loader.exec_module(state_dicts)

# Names as the published files have them: Meta's hub, timm with (``_qkvb``) and without biases,
# Hugging Face of two generations; and the released MedDINOv3, which has none.
PUBLISHED = {
    "hub": True,
    "timm": True,
    "huggingface early": True,
    "huggingface late": True,
    "release": False,
}
STARTS = [*PUBLISHED.items(), ("timm", False), ("huggingface late", False)]


def started(name, has_biases, folder, *changes):
    """The start of a stage from a file of that naming, and the backbone it was made from."""
    form = state_dicts.FORMATS[name]
    size = architecture_of("vit_tiny", norm_eps=form.norm_eps, qkv_bias=has_biases).to_dict()
    source = state_dicts.random_backbone(periods=form.periods, **size)
    file = form.write(form.keys(source), folder)
    if (facts := folder / "config.json").is_file():  # Hugging Face's, of another size
        heads = {"num_attention_heads": size["num_heads"]}
        facts.write_text(json.dumps(json.loads(facts.read_text()) | heads))
    config = load_config("tiny_stage1", [f"init.source={file}", *changes])
    return load_start(config, None), source, config


@pytest.mark.parametrize(("name", "has_biases"), STARTS)
def test_they_are_there_if_and_only_if_the_file_has_them(name, has_biases, tmp_path):
    start, source, _ = started(name, has_biases, tmp_path)
    for branch in (start.distillation.student, start.distillation.teacher):
        for ours, theirs in zip(branch.backbone.vit.blocks, source.vit.blocks, strict=True):
            if not has_biases:
                assert ours.attn.q_bias is ours.attn.v_bias is None
                continue
            assert torch.equal(ours.attn.q_bias, theirs.attn.q_bias)
            assert torch.equal(ours.attn.v_bias, theirs.attn.v_bias)
            assert not ours.attn.k_bias.any()  # what Meta's mask hides stays away
            assert not isinstance(ours.attn.k_bias, torch.nn.Parameter)
    assert start.architecture.qkv_bias is has_biases


@pytest.mark.parametrize(("name", "has_biases"), STARTS)
def test_no_bias_norm_or_layer_scale_decays_and_everything_else_does(name, has_biases, tmp_path):
    start, _, config = started(name, has_biases, tmp_path)
    student = start.distillation.student
    before = {n: p.detach().clone() for n, p in student.backbone.named_parameters()}
    optimizer = build_optimizer(student, config.optim, torch.device("cpu"))
    set_rates(optimizer, lr=0.1, weight_decay=0.5, last_layer_lr=0.1)
    for parameter in student.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # nothing but the decay
    moved = {n for n, p in student.backbone.named_parameters() if not torch.equal(p, before[n])}
    kept = {n for n in before if before[n].any()} - moved  # a fresh mask token is zero
    assert {n for n in before if n.endswith("bias") or "gamma" in n or "norm" in n} == kept
    assert has_biases == any(n.endswith("attn.q_bias") for n in kept)
    rows = {row.name: row for row in backbone_rows(student.backbone, 0.9, 0.2)}
    biases = [row for row_name, row in rows.items() if row_name.endswith("attn.qkv.bias")]
    assert len(biases) == (student.backbone.depth if has_biases else 0)
    for row in biases:  # one row as in Meta's code, with the learning rate of its block
        assert len(row.parameters) == 2
        assert row.lr_multiplier == rows[row.name.replace("bias", "weight")].lr_multiplier


@pytest.mark.parametrize("name", ["hub", "huggingface late"])
def test_they_are_trained_and_exported(name, tmp_path):
    from nnunetv2_meddinov3.models.build import save_backbone

    start, _, config = started(name, True, tmp_path)
    student = start.distillation.student
    optimizer = build_optimizer(student, config.optim, torch.device("cpu"))
    set_rates(optimizer, lr=0.1, weight_decay=0.04, last_layer_lr=0.1)
    for parameter in student.parameters():
        assert parameter.requires_grad
        parameter.grad = torch.ones_like(parameter)
    before = student.backbone.vit.blocks[0].attn.v_bias.detach().clone()
    optimizer.step()
    assert not torch.equal(student.backbone.vit.blocks[0].attn.v_bias, before)
    save_backbone(student.backbone, tmp_path / "out.safetensors", licence="x")
    saved = read_checkpoint(tmp_path / "out.safetensors")
    assert saved.architecture.qkv_bias
    assert torch.equal(
        saved.tensors["blocks.0.attn.v_bias"], student.backbone.vit.blocks[0].attn.v_bias
    )
