"""Stand-ins for TensorBoard and Weights & Biases that note what is done with them."""

import sys
from types import ModuleType, SimpleNamespace

import pytest


@pytest.fixture
def events(monkeypatch):
    """What was done with either, in order: (package, what, facts)."""
    noted = []

    class Run:
        def log(self, row, step):
            noted.append(("wandb", "log", step))

        def finish(self, exit_code=None):
            noted.append(("wandb", "finish", exit_code))

    def init(**facts):
        noted.append(("wandb", "init", SimpleNamespace(**facts)))
        return Run()

    class SummaryWriter:
        def __init__(self, folder):
            noted.append(("tensorboard", "open", folder))

        def add_scalar(self, key, value, step):
            noted.append(("tensorboard", key, (step, value)))

        def close(self):
            noted.append(("tensorboard", "close", None))

    wandb, tensorboard = ModuleType("wandb"), ModuleType("torch.utils.tensorboard")
    wandb.init, tensorboard.SummaryWriter = init, SummaryWriter
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "tensorboard", ModuleType("tensorboard"))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", tensorboard)
    return noted
