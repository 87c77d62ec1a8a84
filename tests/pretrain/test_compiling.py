"""Blocks are compiled one by one; here with a backend that needs no compiler."""

import importlib.util
import sys

import pytest
import torch

from nnunetv2_meddinov3.models.architecture import Architecture
from nnunetv2_meddinov3.models.backbone import Backbone
from nnunetv2_meddinov3.pretrain import student as checked

# the module as users have it: Dynamo cannot look through the checks of shapes that tests add
_spec = importlib.util.spec_from_file_location("unchecked_student", checked.__file__)
student = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = student
_spec.loader.exec_module(student)


def a_vit():
    torch.manual_seed(0)
    backbone = Backbone(Architecture(32, 2, 2, layer_scale=0.5), mask_token=True)
    return student.pack_blocks(backbone).train()


def gradient(vit, autocast=False):
    groups = [
        torch.randn(n, 1, s, s, generator=torch.Generator().manual_seed(1))
        for n, s in ((8, 48), (8, 32))
    ]
    generator = torch.Generator().manual_seed(2)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        options = student.StochasticOptions(0.3, rope_rescale=2.0)
        tokens = student.encode(vit, groups, None, options, generator)
    loss = sum(t.patches.float().square().mean() + t.cls.float().mean() for t in tokens)
    loss.backward()
    return loss.detach(), vit.vit.blocks[0].attn.qkv.weight.grad


@pytest.mark.slow
# Dynamo looks at the gradients of what it traces, also of tensors that have none
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_a_packed_block_is_one_graph_and_gives_the_same_gradients():
    plain = gradient(a_vit())
    compiled = a_vit()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    for block in compiled.vit.blocks:
        block.compile(backend=backend, fullgraph=True, dynamic=False)
    found = gradient(compiled)
    assert graphs
    for ours, theirs in zip(found, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_autocast_in_bf16_stays_near_fp32():
    wanted, ours = gradient(a_vit()), gradient(a_vit(), autocast=True)
    assert ours[0].dtype == torch.float32
    torch.testing.assert_close(ours[0], wanted[0], rtol=0.02, atol=0)
    error = (ours[1] - wanted[1]).norm() / wanted[1].norm()
    assert error < 0.1
