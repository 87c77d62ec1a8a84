"""Which devices train in bf16."""

import pytest
import torch

from nnunetv2_meddinov3.models.precision import has_bf16
from nnunetv2_meddinov3.models.segmenter import Segmenter

TINY = {"embed_dim": 32, "depth": 1, "num_heads": 2}


@pytest.fixture
def gpu(monkeypatch):
    """A function that pretends there is a GPU of a compute capability."""

    def pretend(*capability, hip=None):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.version, "hip", hip)

    return pretend


def test_without_a_gpu_there_is_no_bf16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not has_bf16()
    assert not has_bf16(torch.device("cuda", 0))


@pytest.mark.parametrize(
    ("capability", "hip", "expected"),
    [((7, 5), None, False), ((8, 0), None, True), ((9, 0), None, True), ((7, 5), "6.0", True)],
)
def test_gpus_that_only_emulate_bf16_do_not_count(capability, hip, expected, gpu):
    gpu(*capability, hip=hip)
    assert has_bf16() is expected
    assert has_bf16(torch.device("cuda", 0)) is expected
    assert not has_bf16(torch.device("cpu"))
    assert (Segmenter(1, 2, TINY).autocast_dtype is torch.bfloat16) is expected
