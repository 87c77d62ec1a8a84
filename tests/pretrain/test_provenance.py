import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from nnunetv2_meddinov3 import __version__
from nnunetv2_meddinov3.models.architecture import architecture_of
from nnunetv2_meddinov3.pretrain import provenance
from nnunetv2_meddinov3.pretrain.distributed import Runtime

ROOT = Path(__file__).parents[2]
OURS = "[metadata]\nname = nnunetv2-meddinov3\n"
THEIRS = "[metadata]\nname = somebodys-project\n"
TINY = architecture_of("vit_tiny")
ALONE = Runtime(0, 1, torch.device("cpu"), "fp32", False)

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")


def git(folder, *words):
    names = ("-c", "user.name=a", "-c", "user.email=a@b")
    command = ["git", "-C", str(folder), *names, *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def runs_from(tmp_path, monkeypatch):
    """A function that copies the package into a new repository and runs it from there."""

    def run(folder, setup_cfg=None, tracked=True):
        package = tmp_path / "repository" / folder / "nnunetv2_meddinov3"
        shutil.copytree(
            ROOT / package.name, package, ignore=shutil.ignore_patterns("__pycache__", "*.yaml")
        )
        top = tmp_path / "repository"
        git(top, "init", "-q")
        (top / "README.md").write_text("a repository")
        if setup_cfg is not None:
            (top / "setup.cfg").write_text(setup_cfg)
        if not tracked:
            (top / ".gitignore").write_text(f"{folder}\n")
        git(top, "add", "--all")
        git(top, "commit", "-q", "-m", "all")
        monkeypatch.setattr(provenance, "_PACKAGE", package)
        provenance.git_state.cache_clear()
        return git(top, "rev-parse", "HEAD")

    yield run
    provenance.git_state.cache_clear()


@pytest.mark.parametrize(
    ("folder", "setup_cfg", "tracked"),
    [
        ("vendored", None, True),
        (".", THEIRS, True),
        ("venv/lib/site-packages", "not a config", False),
        ("venv/lib/site-packages", OURS, False),
    ],
    ids=["no metadata", "others' metadata", "broken metadata", "installed beside our checkout"],
)
def test_a_package_in_somebodys_repository_does_not_record_its_commit(
    runs_from, folder, setup_cfg, tracked
):
    runs_from(folder, setup_cfg, tracked)
    assert provenance.git_state() is None
    facts = json.loads(provenance.run_provenance(ALONE, TINY, "none"))
    assert facts["git"] is None
    assert facts["versions"]["nnunetv2_meddinov3"] == __version__


def test_our_own_checkout_records_its_commit_and_whether_it_is_clean(runs_from, tmp_path):
    commit = runs_from(".", OURS)
    assert provenance.git_state() == {"commit": commit, "clean": True}
    (tmp_path / "repository/README.md").write_text("changed")
    assert provenance.git_state() == {"commit": commit, "clean": True}  # of when it was started
    provenance.git_state.cache_clear()
    assert provenance.git_state() == {"commit": commit, "clean": False}


def test_git_is_asked_once_a_process(runs_from, monkeypatch):
    runs_from(".", OURS)
    provenance.run_provenance(ALONE, TINY, "none")

    def never(*arguments, **options):
        raise AssertionError("git is asked again")

    monkeypatch.setattr(subprocess, "run", never)
    assert json.loads(provenance.run_provenance(ALONE, TINY, "none"))["git"]["clean"]
