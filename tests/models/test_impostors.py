"""What is no file of weights is called what it is, and what is harmless gets a way in."""

import argparse
import collections
import datetime
import os
import pathlib
import re
import shlex
import subprocess
import sys

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
}


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
    command = shlex.split(re.search(r"`(python -c .*)`", message).group(1))
    subprocess.run([sys.executable, "-W", "ignore", *command[1:]], check=True)
    loaded = load_backbone(tmp_path / "with 'args'.tensors.pth", norm_eps=1e-5)
    assert torch.equal(state_dicts.features(loaded), state_dicts.features(source))


class _Hostile:
    def __reduce__(self):
        return os.mkdir, ("never",)


class _Own:
    """A class that nobody else has."""


@pytest.mark.parametrize("other", [_Hostile, _Own])
def test_a_harmless_class_beside_another_gets_no_such_command(other, tmp_path, mistake):
    torch.save({"a": argparse.Namespace(), "b": other()}, tmp_path / "both.pth")
    message = mistake(load_backbone, tmp_path / "both.pth")
    assert "would run Python code" in message
    assert "python -c" not in message
