"""What makes a stage small enough for a test."""

import importlib.util
import sys
from pathlib import Path

import pytest

# tests are not a package, so what several of them share is loaded by its path
_spec = importlib.util.spec_from_file_location(
    "pretrain_recorded", Path(__file__).with_name("recorded.py")
)
_recorded = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = _recorded
_spec.loader.exec_module(_recorded)


# what makes a stage small enough for a test
_SMALL = [
    "crops.resolutions.0.global_size=48",
    "crops.resolutions.0.local_size=32",
    "crops.local_crops=2",
    "heads.dino={prototypes: 32, hidden_dim: 24, bottleneck_dim: 16, layers: 3}",
    "heads.ibot={prototypes: 24, hidden_dim: 24, bottleneck_dim: 16, layers: 2}",
    "optim.batch_size=8",
    "losses.koleo_group=4",
    "losses.teacher_temp.warmup_steps=0",
    "optim.lr.warmup_steps=0",
    "model.drop_path=0.3",
    "data.workers=0",
    "engine.device=cpu",
    "engine.log_every=1",
    "engine.health_every=2",
    "engine.export_at=[]",
]


@pytest.fixture(scope="session")
def small_stage(ct_store):
    """A function that gives the small overrides of a stage on the small store, and more."""
    return lambda *more: [*_SMALL, f"data.store={ct_store}", *more]


@pytest.fixture
def reads_of_states(monkeypatch):
    """The training states that are opened from now on, by any of our ways of reading files."""
    found = []
    original = Path.open

    def noting(path, mode="r", *arguments, **options):
        if path.name == "state.pt" and "r" in mode:
            found.append(path)
        return original(path, mode, *arguments, **options)

    monkeypatch.setattr(Path, "open", noting)
    return found
