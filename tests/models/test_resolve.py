"""Where weights come from: the forms of MEDDINOV3_WEIGHTS, the hubs, and being offline."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from nnunetv2_meddinov3.models import load_backbone
from nnunetv2_meddinov3.models.resolve import (
    Source,
    describe_weights_source,
    fetch,
    parse_source,
)
from nnunetv2_meddinov3.models.weights import resolve_source

TIMM_NAME = "vit_small_patch16_dinov3.lvd1689m"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("none", Source("none")),
        (" None ", Source("none")),
        ("weights.pth", Source("path", "weights.pth")),
        ("/data/a b/weights.pth", Source("path", "/data/a b/weights.pth")),
        (Path("folder/weights.pth"), Source("path", str(Path("folder/weights.pth")))),
        ("C:\\weights\\model.pth", Source("path", "C:\\weights\\model.pth")),
        ("d:/weights/model.pth", Source("path", "d:/weights/model.pth")),
        ("~/model.pth", Source("path", "~/model.pth")),
        ("./timm:name", Source("path", "./timm:name")),
        ("run/12:30/model.pth", Source("path", "run/12:30/model.pth")),
        ("run@home/model.pth", Source("path", "run@home/model.pth")),
        ("run=3.pth", Source("path", "run=3.pth")),
        (f"timm:{TIMM_NAME}", Source("timm", TIMM_NAME)),
        ("hf:owner/repo/model.safetensors", Source("hf", "model.safetensors", "owner/repo")),
        ("hf:o-1/r.2/sub/dir/m.pth", Source("hf", "sub/dir/m.pth", "o-1/r.2")),
        ("hf:owner/repo/m.pth@v1.0", Source("hf", "m.pth", "owner/repo", "v1.0")),
        ("hf:owner/repo/m.pth@refs/pr/3", Source("hf", "m.pth", "owner/repo", "refs/pr/3")),
        ("torchhub:dinov3_vitb16", Source("torchhub", "dinov3_vitb16")),
        ("torchhub:entry@/a/dinov3", Source("torchhub", "entry", "/a/dinov3")),
        ("torchhub:entry@C:\\dinov3", Source("torchhub", "entry", "C:\\dinov3")),
        ("torchhub:entry=/a/w.pth", Source("torchhub", "entry", file="/a/w.pth")),
        ("torchhub:e@clone=w=1@2.pth", Source("torchhub", "e", "clone", file="w=1@2.pth")),
    ],
)
def test_every_form_is_understood(value, expected):
    assert parse_source(value) == expected


@pytest.mark.parametrize(
    "value",
    [
        "",
        "  ",
        "timm:",
        "timm:a/b",
        "tim:x",
        "hf:",
        "hf:owner",
        "hf:owner/repo",
        "hf:owner/repo/",
        "hf:owner/repo/m.pth@",
        "torchhub:",
        "torchhub:a b",
        "torchhub:entry@",
        "torchhub:entry=",
        "https://host/model.pth",
        "s3://bucket/model.pth",
    ],
)
def test_other_forms_are_refused(value, mistake):
    message = mistake(parse_source, value)
    assert "timm:NAME" in message
    assert repr(value.strip()) in message
    usable, sentence = describe_weights_source(value)
    assert not usable
    assert sentence == message


def test_none_cannot_be_loaded(mistake):
    assert "random" in mistake(resolve_source, "none")


@pytest.fixture
def cached(state_dicts, tmp_path, monkeypatch):
    """A hub with two files, asked through the client's own function; returns what was asked."""
    hub, asked = tmp_path / "hub", []
    hub.mkdir()
    source = state_dicts.random_backbone(num_heads=4, norm_eps=3e-3, periods=False)
    state_dicts.write_huggingface(state_dicts.huggingface(source, "late"), hub)

    def download(repository, file, revision=None):
        asked.append((repository, file, revision))
        if not (hub / file).exists():
            raise EntryNotFoundError(f"404: no {file}\nRequest ID: 1")
        return str(hub / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return source, asked


def test_a_file_of_the_hub_is_loaded_with_its_config(cached, state_dicts):
    source, asked = cached
    loaded = load_backbone("hf:facebook/dinov3/model.safetensors@v2")
    assert torch.equal(state_dicts.features(loaded), state_dicts.features(source))
    assert asked == [
        ("facebook/dinov3", "model.safetensors", "v2"),
        ("facebook/dinov3", "config.json", "v2"),
    ]


def test_timms_names_are_looked_up_on_the_hub(state_dicts, tmp_path, monkeypatch):
    source = state_dicts.random_backbone(periods=False)
    path, asked = state_dicts.write_safetensors(state_dicts.timm(source), tmp_path), []

    def download(repository, file, revision=None):
        asked.append((repository, file, revision))
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    loaded = load_backbone(f"timm:{TIMM_NAME}")
    assert torch.equal(state_dicts.features(loaded), state_dicts.features(source))
    assert asked[0] == (f"timm/{TIMM_NAME}", "model.safetensors", None)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("vit_smal_patch16_dinov3", "vit_small_patch16_dinov3"),
        ("vit_base_patch16_dinov3.lvd1688m", "vit_base_patch16_dinov3.lvd1689m"),
        ("vit_base_patch16_224", "vit_"),
        ("convnext_tiny.dinov3_lvd1689m_wrong", "dinov3"),
        ("resnet50", "dinov3"),
    ],
)
def test_an_unknown_timm_name_gets_suggestions(name, near, mistake):
    message = mistake(load_backbone, f"timm:{name}")
    assert repr(name) in message
    assert near in message.split("try")[1]


def _response_error(kind):
    error = kind.__new__(kind)
    Exception.__init__(error, "401 Client Error.\nlong text")
    return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (_response_error(GatedRepoError), "gated"),
        (_response_error(RepositoryNotFoundError), "no such repository"),
        (EntryNotFoundError("404\nmore"), "no such repository"),
        (LocalEntryNotFoundError("not in the cache\nmore"), "offline"),
        (ConnectionError("refused\nmore"), "offline"),
        (OSError(28, "No space left on device"), "No space left"),
        (RuntimeError("first line\nsecond line"), "first line"),
        (RuntimeError(), "RuntimeError"),
    ],
)
def test_what_the_hub_says_becomes_one_sentence(error, expected, mistake, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    message = mistake(load_backbone, "hf:owner/repo/model.pth")
    assert expected in message
    assert "MEDDINOV3_WEIGHTS" in message


def test_the_hubs_log_is_silent_only_while_it_downloads(monkeypatch, mistake):
    """Its level is one for the whole process; it was left at ``error``."""
    logging, seen = huggingface_hub.utils.logging, []

    def fail(*args, **kwargs):
        seen.append(logging.get_verbosity())
        raise ConnectionError("refused")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    before = logging.get_verbosity()
    logging.set_verbosity_warning()
    try:
        mistake(fetch, "hf:owner/repo/model.pth")
        assert (seen, logging.get_verbosity()) == ([logging.ERROR], logging.WARNING)
    finally:
        logging.set_verbosity(before)


def _in_a_process(program, *arguments, **variables):
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | variables,
        check=False,
        timeout=120,
    )


@pytest.mark.slow
@pytest.mark.parametrize("value", [f"timm:{TIMM_NAME}", "hf:owner/repo/model.safetensors"])
def test_offline_one_sentence_names_the_variable(value, tmp_path):
    """The hub's client reads HF_HUB_OFFLINE when it is imported, hence a process of its own."""
    program = (
        "import sys\n"
        "from nnunetv2_meddinov3.models.resolve import describe_weights_source, fetch\n"
        "print(*describe_weights_source(sys.argv[1]), sep='|')\n"
        "fetch(sys.argv[1])\n"
    )
    variables = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path)}
    process = _in_a_process(program, value, **variables)
    assert process.returncode == 1
    (sentence,) = process.stderr.splitlines()
    assert value in sentence
    assert "offline" in sentence
    assert "MEDDINOV3_WEIGHTS" in sentence
    (described,) = process.stdout.splitlines()
    assert described.startswith("False|")
    assert "MEDDINOV3_WEIGHTS" in described


HUBCONF = """
import torch
dependencies = ["torch"]

class Network(torch.nn.Module):
    def __init__(self, tensors, eps):
        super().__init__()
        self.tensors, self.norm = tensors, torch.nn.LayerNorm(4, eps=eps)

    def state_dict(self):
        return dict(self.tensors)

def entry(weights=None):
    return Network(torch.load(weights or {default!r}), {eps})

def broken(weights=None):
    raise RuntimeError("no such weights\\nmore lines")

def leaving(weights=None):
    raise SystemExit("bye")

def empty(weights=None):
    return torch.nn.Identity()

def nothing(weights=None):
    return None
"""


@pytest.fixture
def clone(state_dicts, tmp_path):
    """A local torch.hub repository in place of facebookresearch/dinov3, and its backbone."""
    folder = tmp_path / "clone"
    folder.mkdir()
    source = state_dicts.random_backbone(norm_eps=2e-4)
    default = state_dicts.write_pth(state_dicts.meta(source), folder)
    (folder / "hubconf.py").write_text(HUBCONF.format(default=str(default), eps=2e-4))
    return folder, source


def test_an_entry_of_a_local_hub_repository_is_loaded_with_its_epsilon(clone, state_dicts):
    folder, source = clone
    loaded = load_backbone(f"torchhub:entry@{folder}")
    assert loaded.architecture.norm_eps == 2e-4
    assert torch.equal(state_dicts.features(loaded), state_dicts.features(source))
    assert load_backbone(f"torchhub:entry@{folder}", norm_eps=1e-3).architecture.norm_eps == 1e-3


def test_an_entry_takes_a_weights_file(clone, state_dicts, tmp_path):
    folder, _ = clone
    other = state_dicts.random_backbone(6, norm_eps=2e-4)
    path = state_dicts.write_pth(state_dicts.meta(other), tmp_path)
    loaded = load_backbone(f"torchhub:entry@{folder}={path}")
    assert torch.equal(state_dicts.features(loaded), state_dicts.features(other))


def test_the_github_repository_is_the_default(clone, state_dicts, monkeypatch):
    folder, source = clone
    original, asked = torch.hub.load, []

    def load(repository, name, source, **arguments):
        asked.append((repository, source, arguments))
        return original(str(folder), name, source="local")

    monkeypatch.setattr(torch.hub, "load", load)
    for value, repository in (
        ("torchhub:entry", "facebookresearch/dinov3"),
        ("torchhub:entry@owner/fork:branch", "owner/fork:branch"),
    ):
        loaded = load_backbone(value)
        assert torch.equal(state_dicts.features(loaded), state_dicts.features(source))
        assert asked.pop() == (repository, "github", {"trust_repo": True})


@pytest.mark.parametrize("entry", ["broken", "leaving", "empty", "nothing", "unknown"])
def test_a_broken_entry_is_one_sentence(entry, clone, mistake):
    folder, _ = clone
    message = mistake(load_backbone, f"torchhub:{entry}@{folder}")
    assert f"torchhub:{entry}@{folder}" in message
    assert "more lines" not in message


@pytest.mark.parametrize("value", ["e@{0}/nowhere", "e@nowhere", "e@{0}/clone/hubconf.py"])
def test_a_clone_that_is_not_there_is_named(value, clone, tmp_path, mistake):
    value = f"torchhub:{value.format(tmp_path)}"
    assert value.split("@")[1] in mistake(load_backbone, value)
    usable, sentence = describe_weights_source(value)
    assert not usable
    assert value.split("@")[1] in sentence


@pytest.mark.parametrize("file", ["nowhere.pth", "clone", "x" * 5000])
def test_a_weights_file_of_an_entry_that_is_not_there_is_named(file, clone, tmp_path, mistake):
    value = f"torchhub:entry@{clone[0]}={tmp_path / file}"
    assert str(tmp_path / file) in mistake(load_backbone, value)
    usable, sentence = describe_weights_source(value)
    assert not usable
    assert str(tmp_path / file) in sentence


def test_only_files_of_the_hub_can_be_fetched(mistake):
    for value in ("torchhub:entry", "none"):
        assert "fetched" in mistake(fetch, value)
    assert fetch("some/weights.pth") == Path("some/weights.pth")
    assert fetch("~/weights.pth").name == "weights.pth"


def test_paths_are_described(tmp_path):
    path = tmp_path / "weights.pth"
    assert describe_weights_source(str(path)) == (False, f"{path} does not exist: check the path")
    path.touch()
    assert describe_weights_source(str(path)) == (True, f"{path} exists")
    for strange in ("~nobody_of_that_name/w.pth", "x" * 5000, "a\0b"):
        assert not describe_weights_source(strange)[0]
    assert describe_weights_source("none")[0]


def test_a_home_folder_is_expanded(state_dicts, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    source = state_dicts.random_backbone()
    state_dicts.write_pth(state_dicts.meta(source), tmp_path)
    assert describe_weights_source("~/weights.pth")[0]
    assert torch.equal(
        state_dicts.features(load_backbone("~/weights.pth")), state_dicts.features(source)
    )


def test_entries_of_a_hub_repository_are_described(clone):
    usable, sentence = describe_weights_source(f"torchhub:entry@{clone[0]}")
    assert usable
    assert str(clone[0]) in sentence
    usable, sentence = describe_weights_source("torchhub:dinov3_vitb16")
    assert usable
    assert "GitHub" in sentence
    shutil.rmtree(clone[0])
    assert not describe_weights_source(f"torchhub:entry@{clone[0]}")[0]


def test_files_of_the_hub_are_described_without_downloading(monkeypatch):
    value, answers = "hf:owner/repo/model.pth@v1", {}

    def refuse(*args, **kwargs):
        raise AssertionError("nothing may be downloaded")

    def metadata(url, timeout):
        if isinstance(answers["there"], Exception):
            raise answers["there"]
        assert url.endswith("owner/repo/resolve/v1/model.pth")
        assert timeout <= 30

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", metadata)
    monkeypatch.setattr(
        huggingface_hub, "try_to_load_from_cache", lambda *a, **k: answers["cached"]
    )
    answers |= {"cached": "/cache/model.pth"}
    assert describe_weights_source(value) == (True, f"{value} is in the hub's cache")
    answers |= {"cached": None, "there": True}
    usable, sentence = describe_weights_source(value)
    assert usable
    assert "downloaded" in sentence
    answers |= {"there": ConnectionError("refused\nmore")}
    usable, sentence = describe_weights_source(value)
    assert not usable
    assert "offline" in sentence
    assert "\n" not in sentence
    usable, sentence = describe_weights_source("timm:resnet50")
    assert not usable
    assert "resnet50" in sentence
