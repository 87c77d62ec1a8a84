"""``meddinov3 weights inspect|convert|fetch``, in this process and as a command."""

import json
import os
import subprocess
import sys

import huggingface_hub
import pytest
import torch

from nnunetv2_meddinov3.models import load_backbone, save_backbone
from nnunetv2_meddinov3.models.weights_cli import main


@pytest.fixture
def source(state_dicts):
    return state_dicts.random_backbone(norm_eps=1e-6)


@pytest.fixture
def release(source, state_dicts, tmp_path):
    content = state_dicts.training(source)
    return state_dicts.write_pth(content, tmp_path, 1)


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "nnunetv2_meddinov3", "weights", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
        timeout=120,
    )


def test_inspect_says_what_a_file_holds(release, source, capsys):
    main(["inspect", str(release), "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["source"] == str(release)
    assert facts["format"] == "training checkpoint, teacher.backbone"
    assert facts["architecture"] == source.architecture.to_dict()
    assert facts["parameters"] == sum(p.numel() for p in source.parameters())
    assert facts["tensors"] == len(source.state_dict())
    assert "student.dino_head.last_layer.weight" in facts["left_out"]
    assert "Apache-2.0" in facts["licence"]


def test_inspect_prints_a_table_for_people(release, source, capsys):
    main(["inspect", str(release), "--rope-dtype", "bf16", "--norm-eps", "2e-3"])
    text = capsys.readouterr().out
    lines = {line.split()[0]: line.split()[1:] for line in text.splitlines()}
    assert lines["embed_dim"] == ["128"]
    assert lines["num_heads"] == ["2"]
    assert lines["norm_eps"] == ["0.002"]
    assert lines["rope_dtype"] == ["bf16"]
    assert lines["tensors"][0] == f"{len(source.state_dict())},"
    assert "left out" in text
    assert "licence" in text
    assert max(map(len, text.splitlines())) < 300


def test_inspect_shows_the_metadata_of_our_own_file(source, tmp_path, capsys):
    path = tmp_path / "ours.safetensors"
    save_backbone(source, path, licence="CC0", stage=2, spacing_mm=[1.0, 1.0])
    main(["inspect", str(path)])
    text = capsys.readouterr().out
    assert "[1.0, 1.0]" in text
    assert "CC0" in text
    main(["inspect", str(path), "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["metadata"]["stage"] == 2
    assert facts["licence"] == "CC0"


@pytest.mark.parametrize(
    ("name", "licence"),
    [("hub", "DINOv3 License"), ("timm", "DINOv3 License"), ("release", "Apache-2.0")],
)
def test_the_licence_is_said(name, licence, state_dicts, tmp_path, capsys):
    fmt = state_dicts.FORMATS[name]
    path = fmt.write(fmt.keys(fmt.backbone()), tmp_path)
    main(["convert", str(path), str(tmp_path / "out.safetensors")])
    assert licence in capsys.readouterr().out


def test_convert_writes_one_file_that_says_the_same(release, source, state_dicts, tmp_path, capsys):
    target = tmp_path / "converted.safetensors"
    main(["convert", str(release), str(target), "--rope-dtype", "bf16"])
    text = capsys.readouterr().out
    assert f"written to {target}" in text
    loaded = load_backbone(target)
    assert loaded.architecture.rope_dtype == "bf16"
    expected = load_backbone(release, rope_dtype="bf16")
    assert torch.equal(state_dicts.features(loaded), state_dicts.features(expected))
    assert torch.equal(loaded.mask_token, source.mask_token)
    main(["inspect", str(target), "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["metadata"]["base_model"] == str(release)
    again = tmp_path / "again.safetensors"
    main(["convert", str(target), str(again)])
    capsys.readouterr()
    main(["inspect", str(again), "--json"])
    assert json.loads(capsys.readouterr().out)["metadata"]["base_model"] == str(release)


def test_convert_takes_a_branch(release, source, state_dicts, tmp_path, capsys):
    target = tmp_path / "student.safetensors"
    main(["convert", str(release), str(target), "--branch", "student"])
    student = state_dicts.random_backbone(7, **source.architecture.to_dict())
    assert torch.equal(state_dicts.features(load_backbone(target)), state_dicts.features(student))


def test_convert_takes_the_heads(state_dicts, tmp_path, capsys):
    source = state_dicts.random_backbone(num_heads=4, periods=False)
    path = state_dicts.write_safetensors(state_dicts.timm(source), tmp_path)
    main(["convert", str(path), str(tmp_path / "out.safetensors"), "--num-heads", "4"])
    loaded = load_backbone(tmp_path / "out.safetensors")
    assert torch.equal(state_dicts.features(loaded), state_dicts.features(source))


@pytest.mark.parametrize("verb", ["convert", "fetch"])
def test_an_existing_target_is_kept_unless_told_otherwise(
    verb, release, state_dicts, tmp_path, mistake, capsys, monkeypatch
):
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *a, **k: str(release))
    source = str(release) if verb == "convert" else "hf:owner/repo/model.pth"
    target = tmp_path / "kept.safetensors"
    target.write_text("mine")
    message = mistake(main, [verb, source, str(target)])
    assert "--overwrite" in message
    assert str(target) in message
    assert target.read_text() == "mine"
    main([verb, source, str(target), "--overwrite"])
    assert torch.equal(
        state_dicts.features(load_backbone(target)), state_dicts.features(load_backbone(release))
    )


def test_a_failed_conversion_keeps_the_existing_target(tmp_path, mistake):
    target = tmp_path / "kept.safetensors"
    target.write_text("mine")
    (tmp_path / "bad.pth").write_text("bad")
    mistake(main, ["convert", str(tmp_path / "bad.pth"), str(target), "--overwrite"])
    assert target.read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("target", "expected"),
    [("out.pth", ".safetensors"), ("nowhere/out.safetensors", "nowhere"), ("out", ".safetensors")],
)
def test_a_target_that_cannot_be_is_refused_before_anything_is_read(
    target, expected, tmp_path, mistake, monkeypatch
):
    message = mistake(main, ["convert", "missing.pth", str(tmp_path / target)])
    assert expected in message
    assert "missing.pth" not in message
    assert list(tmp_path.iterdir()) == []


def test_fetch_reports_the_file_and_copies_it(release, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *a, **k: str(release))
    main(["fetch", "hf:owner/repo/model.pth"])
    assert f"file: {release}" in capsys.readouterr().out
    target = tmp_path / "copy.pth"
    main(["fetch", "hf:owner/repo/model.pth@v1", str(target)])
    text = capsys.readouterr().out
    assert f"file: {target}" in text
    assert "hf:owner/repo/model.pth@v1" in text
    assert "licence" in text
    assert target.read_bytes() == release.read_bytes()


def test_a_damaged_download_is_found_and_not_copied(tmp_path, mistake, monkeypatch):
    (tmp_path / "bad.pth").write_bytes(b"<html>504</html>")
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda *a, **k: str(tmp_path / "bad.pth")
    )
    message = mistake(main, ["fetch", "hf:owner/repo/model.pth", str(tmp_path / "copy.pth")])
    assert "hf:owner/repo/model.pth" in message
    assert not (tmp_path / "copy.pth").exists()


@pytest.mark.parametrize("value", ["weights.pth", "torchhub:entry", "none"])
def test_only_files_of_the_hubs_are_fetched(value, mistake):
    assert "fetched" in mistake(main, ["fetch", value])


@pytest.mark.slow
def test_the_command_inspects(release):
    process = command("inspect", str(release), "--json")
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout)["architecture"]["embed_dim"] == 128
    assert process.stderr == ""


@pytest.mark.slow
def test_the_command_says_one_sentence_for_a_mistake(tmp_path):
    path = tmp_path / "text.pth"
    path.write_text("these are no weights")
    process = command("convert", str(path), str(tmp_path / "out.safetensors"))
    assert process.returncode == 1
    assert process.stdout == ""
    (sentence,) = process.stderr.splitlines()
    assert str(path) in sentence
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.slow
def test_the_command_explains_itself():
    process = command("--help")
    assert process.returncode == 0
    for verb in ("inspect", "convert", "fetch"):
        assert verb in process.stdout
    wrong = command("burn", "weights.pth")
    assert wrong.returncode == 2
    assert "burn" in wrong.stderr
