import warnings

import pytest
import torch
import torch._dynamo.config as dynamo_config

from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.pretrain import distributed
from nnunetv2_meddinov3.pretrain.config import Engine
from nnunetv2_meddinov3.pretrain.distributed import _process_wide_settings, started

LIMIT = "recompile_limit" if hasattr(dynamo_config, "recompile_limit") else "cache_size_limit"


def settings():
    return (
        torch.get_float32_matmul_precision(),
        getattr(dynamo_config, LIMIT),
        list(warnings.filters),
    )


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_a_run_sets_for_the_whole_process_is_put_back(device):
    before = settings()
    with _process_wide_settings(torch.device(device)):
        precision, graphs, filters = settings()
        assert precision == ("high" if device == "cuda" else before[0])
        assert graphs >= 64
        assert len(filters) > len(before[2])
    assert settings() == before


def test_it_is_put_back_after_an_error_too():
    def fail():
        with started(Engine(device="cpu")) as runtime:
            assert (runtime.rank, runtime.world_size, runtime.precision) == (0, 1, "fp32")
            raise UserError("stop")

    before = settings()
    with pytest.raises(UserError, match="stop"):
        fail()
    assert settings() == before


def test_fsdp2_that_would_add_gradients_on_cpus_is_refused(monkeypatch):
    """PyTorch before 2.9 does, in silence; ``test_ranks.py`` compares where it does not."""
    monkeypatch.setattr(distributed, "_AVERAGES_ON_CPU", False)
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    sentence = "FSDP2 on CPUs needs PyTorch 2.9 or later, but this is .*engine.parallel=ddp"
    with (
        pytest.raises(UserError, match=sentence),
        started(Engine(device="cpu", parallel="fsdp2")),
    ):
        pass
