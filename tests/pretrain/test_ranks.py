import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nnunetv2_meddinov3.pretrain import distributed

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("ranks.py")
needs_fsdp2 = pytest.mark.skipif(
    not distributed._AVERAGES_ON_CPU, reason="FSDP2 on CPUs needs PyTorch 2.9"
)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run(world_size, way, micro_batches, out, regulariser="koleo"):
    """Run a step on some processes and return what rank 0 saw."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(world_size),
    }
    command = [sys.executable, str(SCRIPT), way, str(micro_batches), str(out), regulariser]
    processes = [
        subprocess.Popen(command, env={**environment, "RANK": str(rank)}, stderr=subprocess.PIPE)
        for rank in range(world_size)
    ]
    errors = [p.communicate(timeout=300)[1].decode() for p in processes]
    assert [p.returncode for p in processes] == [0] * world_size, "\n".join(errors)
    return torch.load(out, weights_only=True)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    return run(1, "ddp", 1, tmp_path_factory.mktemp("one") / "one.pt")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world_size", "way", "micro_batches"),
    [
        (1, "ddp", 2),
        (2, "ddp", 1),
        (2, "ddp", 2),
        pytest.param(2, "fsdp2", 1, marks=needs_fsdp2),
        pytest.param(2, "fsdp2", 2, marks=needs_fsdp2),
    ],
)
def test_ranks_and_micro_batches_change_neither_losses_nor_gradients_nor_weights(
    one_process, tmp_path, world_size, way, micro_batches
):
    other = run(world_size, way, micro_batches, tmp_path / "other.pt")
    assert set(other["losses"]) == {"dino_local", "dino_global", "koleo", "ibot", "gram", "total"}
    compare(other, one_process)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp", pytest.param("fsdp2", marks=needs_fsdp2)])
def test_sigreg_counts_the_images_of_all_ranks_together(tmp_path, way):
    one = run(1, "ddp", 1, tmp_path / "one.pt", "sigreg")
    other = run(2, way, 1, tmp_path / "other.pt", "sigreg")
    assert set(other["losses"]) == {"dino_local", "dino_global", "sigreg", "ibot", "gram", "total"}
    assert one["losses"]["sigreg"] > 1
    compare(other, one)


def compare(other, one_process):
    """Losses, norms, gradients and weights of a step must be those of one process."""
    for kind in ("losses", "norms"):
        for name, value in one_process[kind].items():
            assert other[kind][name].item() == pytest.approx(value.item(), rel=1e-5), name
    assert set(other["gradients"]) == set(one_process["gradients"])
    for name, gradient in one_process["gradients"].items():
        error = (other["gradients"][name] - gradient).abs().max()
        assert error <= 1e-5 * max(gradient.abs().max(), 1e-3), name
    assert set(other["state"]) == set(one_process["state"])
    for name, tensor in other["exported"].items():
        assert torch.equal(tensor, other["state"][f"teacher.backbone.{name}"]), name
    for name, tensor in one_process["state"].items():
        if name.startswith("teacher."):
            torch.testing.assert_close(other["state"][name], tensor, rtol=0, atol=2.5e-4)
