"""What is no file of weights is called what it is, and what is harmless gets a way in."""

import argparse
import collections
import datetime
import importlib.util
import io
import os
import pathlib
import pickle
import re
import shlex
import subprocess
import sys
import tarfile
import types
import zipfile

import numpy as np
import pytest
import torch

from nnunetv2_meddinov3.models import load_backbone

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 343\n"
IMPOSTORS = {
    "pointer": (POINTER, "git-LFS pointer"),
    "pointer of Windows": (POINTER.replace(b"\n", b"\r\n"), "git-LFS pointer"),
    "page": (b"<!DOCTYPE html><html><body>Sign in</body></html>", "web page"),
    "long page": (b"\n\n<html lang='en'>" + "<p>Geprüft</p>".encode() * 999, "web page"),
    "page with a mark": (b"\xef\xbb\xbf<HTML></HTML>", "web page"),
    "xml": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "web page"),
    "json": (b'{"error": "Repository not found"}', "a text: '{\"error"),
    "text": (b"Entry not found, and more words", "a text: 'Entry not found"),
    "text cut inside a letter": (b"x" * 511 + "ß".encode() * 50, "a text"),
}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".bin", ""])
@pytest.mark.parametrize("kind", IMPOSTORS)
def test_an_impostor_is_called_what_it_is(kind, suffix, tmp_path, mistake):
    content, name = IMPOSTORS[kind]
    (tmp_path / f"model{suffix}").write_bytes(content)
    message = mistake(load_backbone, tmp_path / f"model{suffix}")
    assert name in message
    assert "Python code" not in message


@pytest.mark.parametrize("part", ["index", "data"])
def test_a_pointer_in_a_distributed_checkpoint_is_called_that(part, state_dicts, tmp_path, mistake):
    path = state_dicts.write_dcp(state_dicts.meta(state_dicts.random_backbone()), tmp_path)
    file = path / ".metadata" if part == "index" else next(path.glob("*.distcp"))
    file.write_bytes(POINTER)
    assert "git-LFS pointer" in mistake(load_backbone, path)


def test_a_pointer_among_shards_is_called_that(state_dicts, tmp_path, mistake):
    fmt = state_dicts.FORMATS["huggingface in shards"]
    path = fmt.write(fmt.keys(fmt.backbone()), tmp_path)
    (path / "model-00002-of-00003.safetensors").write_bytes(POINTER)
    message = mistake(load_backbone, path)
    assert "git-LFS pointer" in message
    assert "model-00002" in message


HARMLESS = {
    "argparse.Namespace": argparse.Namespace(lr=1e-3),
    "pathlib": pathlib.PurePosixPath("a/b"),
    "datetime": datetime.timedelta(1),
    "collections.defaultdict": collections.defaultdict(list),
    "numpy.random": np.random.default_rng(0),
    "types.SimpleNamespace": types.SimpleNamespace(size="vit"),
}


def _old_torch(content, path):
    torch.save(content, path, _use_new_zipfile_serialization=False)


def _bare(protocol):
    def write(content, path):
        path.write_bytes(pickle.dumps(content, protocol=protocol))

    return write


def _numpys(content, path):
    arrays = {key: tensor.numpy() for key, tensor in content["teacher"].items()}
    path.write_bytes(pickle.dumps({**content, "teacher": arrays}))


WAYS = {
    "torch": torch.save,
    "old torch": _old_torch,
    "pickle": _bare(4),
    "pickle of Python 2": _bare(2),
    "pickle as text": _bare(0),
    "pickle of numpy arrays": _numpys,
}


def _convert(message):
    """Run the command that a message gives."""
    command = shlex.split(re.search(r"`(python -c .*)`", message).group(1))
    subprocess.run([sys.executable, "-W", "ignore", *command[1:]], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_however_it_was_pickled_the_command_converts_it(way, state_dicts, tmp_path, mistake):
    source, path = state_dicts.random_backbone(), tmp_path / "weights.pkl"
    WAYS[way]({"teacher": state_dicts.meta(source), "args": argparse.Namespace(a=1)}, path)
    message = mistake(load_backbone, path)
    assert "argparse.Namespace" in message
    assert "if you trust it" in message
    _convert(message)
    loaded = load_backbone(tmp_path / "weights.tensors.pth", norm_eps=1e-5)
    assert torch.equal(state_dicts.features(loaded), state_dicts.features(source))


@pytest.mark.slow
def test_arrays_of_numpy_in_a_file_of_its_own_are_converted_too(state_dicts, tmp_path, mistake):
    source = state_dicts.random_backbone()
    arrays = {key: tensor.numpy() for key, tensor in state_dicts.meta(source).items()}
    np.savez(tmp_path / "weights.npz", **arrays)
    message = mistake(load_backbone, tmp_path / "weights.npz")
    assert "arrays of NumPy" in message
    _convert(message)
    loaded = load_backbone(tmp_path / "weights.tensors.pth")
    assert torch.equal(state_dicts.features(loaded), state_dicts.features(source))


@pytest.mark.parametrize("way", [name for name in WAYS if name != "pickle of numpy arrays"])
@pytest.mark.parametrize("library", ["lightning_fabric.utilities.data", "omegaconf.dictconfig"])
def test_settings_of_a_library_that_is_not_here_need_it(
    library, way, tmp_path, mistake, monkeypatch
):
    module = types.ModuleType(library)
    module.AttributeDict = type("AttributeDict", (dict,), {"__module__": library})
    packages = [library.rsplit(".", n)[0] for n in range(library.count(".") + 1)]
    with monkeypatch.context() as patch:
        for package in packages:
            patch.setitem(sys.modules, package, module)
        content = {"state_dict": {"w": torch.ones(2)}, "hyper": module.AttributeDict(a=1)}
        WAYS[way](content, tmp_path / "last.ckpt")
    message = mistake(load_backbone, tmp_path / "last.ckpt")
    assert f"{library}.AttributeDict" in message
    package = packages[-1]
    if importlib.util.find_spec(package) is None:
        assert f"where {package} is installed" in message


def test_classes_of_somebodys_own_program_get_the_way_in_words(tmp_path, mistake):
    torch.save({"w": _OwnDict(a=torch.ones(2))}, tmp_path / "own.pth")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "model.pth")
    for name, what in (("own", "_OwnDict"), ("model", "torch.nn.modules.linear.Linear")):
        message = mistake(load_backbone, tmp_path / f"{name}.pth")
        assert what in message
        assert "`torch.save(model.state_dict(), FILE)`" in message


def test_other_kinds_of_files_are_called_what_they_are(tmp_path, mistake):
    np.save(tmp_path / "a.npy", np.ones(3))
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "a.pt")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(tmp_path / "a.npy", "storages")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(tmp_path / "a.npy", "weights/model.npz")
    for name, said in {
        "a.npy": "it is one array of NumPy",
        "a.pt": "TorchScript archive",
        "a.tar": "it is a tar archive",
        "a.zip": "it is a zip archive: unpack it",
    }.items():
        assert said in mistake(load_backbone, tmp_path / name)


@pytest.mark.parametrize("way", ["torch", "old torch", "pickle", "pickle of Python 2"])
@pytest.mark.parametrize("kind", ["function", "beside a namespace", "in a storage", "method"])
def test_a_hostile_pickle_is_refused_without_a_command_and_nothing_runs(
    kind, way, tmp_path, mistake
):
    canary = tmp_path / "canary"
    hostile = _Runs(os.mkdir, str(canary))
    if kind == "method":  # of a class that is harmless itself
        hostile = _Runs(pathlib.Path.mkdir, canary)
    if kind == "in a storage":
        inner = io.BytesIO()
        torch.save({"x": hostile}, inner, _use_new_zipfile_serialization=way != "old torch")
        hostile = _Runs(torch.storage._load_from_bytes, inner.getvalue())
    beside = argparse.Namespace(a=1) if kind == "beside a namespace" else None
    WAYS[way]({"model": {"w": torch.ones(1)}, "args": beside, "x": hostile}, tmp_path / "h.pth")
    message = mistake(load_backbone, tmp_path / "h.pth")
    assert "would run Python code" in message
    assert "python -c" not in message
    assert not canary.exists()
    pickle.loads(pickle.dumps(hostile))  # the canary sings where it is opened
    assert canary.exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", HARMLESS)
def test_a_harmless_class_gets_a_command_that_converts_the_file(
    name, state_dicts, tmp_path, mistake
):
    source = state_dicts.random_backbone()
    path = tmp_path / "with 'args'.pth"
    torch.save({"teacher": state_dicts.meta(source), "args": HARMLESS[name]}, path)
    message = mistake(load_backbone, path)
    assert name in message
    _convert(message)
    loaded = load_backbone(tmp_path / "with 'args'.tensors.pth", norm_eps=1e-5)
    assert torch.equal(state_dicts.features(loaded), state_dicts.features(source))


class _Hostile:
    def __reduce__(self):
        return os.mkdir, ("never",)


class _Own:
    """A class that nobody else has."""


class _OwnDict(collections.OrderedDict):
    """A dictionary that nobody else has."""


class _Runs:
    """Runs a function where it is unpickled."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


@pytest.mark.parametrize("other", [_Hostile, _Own])
def test_a_harmless_class_beside_another_gets_no_such_command(other, tmp_path, mistake):
    torch.save({"a": argparse.Namespace(), "b": other()}, tmp_path / "both.pth")
    message = mistake(load_backbone, tmp_path / "both.pth")
    assert "would run Python code" in message
    assert "python -c" not in message
