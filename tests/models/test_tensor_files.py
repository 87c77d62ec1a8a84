"""Damaged, hostile and missing files: one sentence each, and nothing that runs or is lost."""

import errno
import json
import os
import pickle
import random
import resource
import subprocess
import sys
import zipfile

import pytest
import safetensors
import torch
from safetensors.torch import save_file

from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.models import build_segmenter, load_backbone, save_backbone, weights


@pytest.fixture
def source(state_dicts):
    return state_dicts.random_backbone(embed_dim=64, num_heads=4, ffn_hidden=32)


@pytest.fixture
def pth(source, state_dicts, tmp_path):
    return state_dicts.write_pth(state_dicts.meta(source), tmp_path)


@pytest.fixture
def saved(source, tmp_path):
    save_backbone(source, tmp_path / "ours.safetensors", licence="CC0")
    return tmp_path / "ours.safetensors"


def _cuts(size, count=12):
    chosen = random.Random(5)
    return [0, 1, 4, 8, 9, size - 1, *(chosen.randrange(10, size) for _ in range(count))]


@pytest.mark.parametrize("kind", ["pth", "saved"])
def test_a_truncated_file_is_refused_wherever_it_ends(kind, request, mistake):
    path = request.getfixturevalue(kind)
    whole = path.read_bytes()
    for cut in _cuts(len(whole)):
        path.write_bytes(whole[:cut])
        assert str(path) in mistake(load_backbone, path)


def test_a_truncated_file_of_the_old_torch_kind_is_refused(source, state_dicts, tmp_path, mistake):
    path = tmp_path / "old.pth"
    torch.save(state_dicts.meta(source), path, _use_new_zipfile_serialization=False)
    assert torch.equal(state_dicts.features(load_backbone(path)), state_dicts.features(source))
    whole = path.read_bytes()
    for cut in _cuts(len(whole), 6):
        path.write_bytes(whole[:cut])
        mistake(load_backbone, path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ""])
@pytest.mark.parametrize(
    "content",
    [b"", b"\n", b"these are no weights\n" * 99, b"{}", b"\x80\x02}q\x00.", b"\xff" * 999],
    ids=["empty", "line", "text", "json", "empty pickle", "ones"],
)
def test_a_file_that_is_no_checkpoint_is_refused(content, suffix, tmp_path, mistake):
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    assert str(path) in mistake(load_backbone, path)


def test_a_zip_that_is_no_torch_file_is_refused(tmp_path, mistake):
    path = tmp_path / "weights.pth"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("readme.txt", "hello")
    assert str(path) in mistake(load_backbone, path)


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, {}, "text", None, {"a": {"b": None}}])
def test_a_torch_file_without_tensors_is_refused(content, tmp_path, mistake):
    torch.save(content, tmp_path / "weights.pth")
    assert "tensors" in mistake(load_backbone, tmp_path / "weights.pth")


def test_a_torch_file_that_contains_itself_is_refused(tmp_path, mistake):
    content = {"a": torch.zeros(1)}
    content["self"] = content
    torch.save(content, tmp_path / "weights.pth")
    mistake(load_backbone, tmp_path / "weights.pth")


class _Hostile:
    """A pickle that would create a file when it is opened."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors", "weights", "weights.bin"])
@pytest.mark.parametrize("way", ["alone", "nested", "plain", "old"])
def test_code_in_a_pickle_does_not_run(way, name, source, state_dicts, tmp_path, mistake):
    mark, path = tmp_path / "it_ran", tmp_path / name
    content = _Hostile(mark)
    if way == "nested":
        content = {"teacher": {**state_dicts.meta(source, "backbone."), "extra": [content]}}
    if way == "plain":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=way != "old")
    message = mistake(load_backbone, path)
    assert str(path) in message
    if name == "weights.pth" and way != "plain":
        assert "run Python code" in message
    mistake(build_segmenter, "vit_tiny", 2, weights=path)
    assert not mark.exists()
    if way == "plain":
        pickle.loads(path.read_bytes())  # so it is hostile indeed
        assert mark.exists()


@pytest.mark.parametrize("way", ["alone", "inside"])
def test_code_in_the_index_of_a_distributed_checkpoint_does_not_run(
    way, source, state_dicts, tmp_path, mistake
):
    path = state_dicts.write_dcp(state_dicts.meta(source), tmp_path)
    index = pickle.loads((path / ".metadata").read_bytes())
    hostile = _Hostile(tmp_path / "it_ran")
    if way == "inside":
        index.planner_data["more"] = hostile
    (path / ".metadata").write_bytes(pickle.dumps(hostile if way == "alone" else index))
    assert "unsafe" in mistake(load_backbone, path)
    assert not (tmp_path / "it_ran").exists()


def test_code_in_the_data_of_a_distributed_checkpoint_does_not_run(
    source, state_dicts, tmp_path, mistake
):
    path = state_dicts.write_dcp(state_dicts.meta(source), tmp_path)
    data = next(path.glob("*.distcp"))
    hostile = pickle.dumps(_Hostile(tmp_path / "it_ran"))
    data.write_bytes(hostile.ljust(data.stat().st_size, b"\0"))
    mistake(load_backbone, path)
    assert not (tmp_path / "it_ran").exists()


def test_a_distributed_checkpoint_of_an_older_torch_is_read(source, state_dicts, tmp_path):
    """Its index has no ``storage_meta``; reading it failed, as if the folder were damaged."""
    path = state_dicts.write_dcp(state_dicts.meta(source), tmp_path)
    index = pickle.loads((path / ".metadata").read_bytes())
    index.storage_meta = None
    (path / ".metadata").write_bytes(pickle.dumps(index))
    assert torch.equal(state_dicts.features(load_backbone(path)), state_dicts.features(source))


@pytest.mark.parametrize("part", [".metadata", "*.distcp"])
def test_a_damaged_distributed_checkpoint_is_refused(part, source, state_dicts, tmp_path, mistake):
    path = state_dicts.write_dcp(state_dicts.meta(source), tmp_path)
    file = next(path.glob(part))
    whole = file.read_bytes()
    for cut in (0, 1, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:cut])
        assert str(path) in mistake(load_backbone, path)
    file.unlink()
    assert str(path) in mistake(load_backbone, path)


def test_a_folder_without_weights_is_refused(tmp_path, mistake):
    (tmp_path / "notes.txt").write_text("hello")
    message = mistake(load_backbone, tmp_path)
    assert "model.safetensors" in message


@pytest.mark.parametrize("index", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_a_damaged_index_of_shards_is_refused(index, tmp_path, mistake):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    assert str(tmp_path) in mistake(load_backbone, tmp_path)


def test_a_missing_shard_is_named(state_dicts, tmp_path, mistake):
    fmt = state_dicts.FORMATS["huggingface in shards"]
    path = fmt.write(fmt.keys(fmt.backbone()), tmp_path)
    for name in ("model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"):
        hidden = (path / name).rename(tmp_path / "hidden")
        assert name in mistake(load_backbone, path)
        hidden.rename(path / name)


@pytest.mark.parametrize(
    "path", ["nowhere/weights.pth", "~nobody_of_that_name/weights.pth", "x" * 5000, "a\0b"]
)
def test_a_path_that_cannot_be_is_refused(path, mistake):
    mistake(load_backbone, path)


def test_a_file_that_may_not_be_read_is_refused(pth, mistake, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(type(pth), "open", refuse)
    message = mistake(load_backbone, pth)
    assert "Permission denied" in message
    assert str(pth) in message


def _same(one, other):
    return all(
        torch.equal(a, b)
        for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pth", "saved"])
def test_flipped_bytes_are_refused_or_harmless(kind, request, source):
    """Bytes of what describes the tensors; of the numbers themselves nothing can be known.

    Torch does not check a zip's checksums: of its directory only that nothing else is raised.
    """
    path = request.getfixturevalue(kind)
    whole = path.read_bytes()
    chosen = random.Random(11)
    if kind == "saved":
        head = 8 + int.from_bytes(whole[:8], "little")
        places = range(head)
    else:
        head = zipfile.ZipFile(path).getinfo("weights/data/0").header_offset
        places = [*range(head), *range(whole.index(b"PK\x01\x02"), len(whole))]
    refused = 0
    for _ in range(100):
        damaged, place = bytearray(whole), chosen.choice(places)
        damaged[place] ^= chosen.randrange(1, 256)
        path.write_bytes(damaged)
        try:
            loaded = load_backbone(path)
        except UserError as error:
            assert "\n" not in str(error)  # noqa: PT017
            refused += 1
        else:
            assert place >= head or _same(loaded, source)
    assert refused > 20


def _write_half_and_fail(error):
    def save(tensors, path, metadata=None):
        save_file(tensors, path, metadata)
        with open(path, "r+b") as file:  # noqa: PTH123
            file.truncate(os.path.getsize(path) // 2)  # noqa: PTH202
        raise error

    return save


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left"), safetensors.SafetensorError("I/O error")]
)
def test_a_full_disk_leaves_the_previous_file(error, saved, state_dicts, mistake, monkeypatch):
    before = saved.read_bytes()
    other = state_dicts.random_backbone(5)
    monkeypatch.setattr(weights, "save_file", _write_half_and_fail(error))
    assert str(saved) in mistake(save_backbone, other, saved, licence="CC0")
    assert saved.read_bytes() == before
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


def test_an_interrupted_saving_leaves_the_previous_file(saved, state_dicts, monkeypatch):
    before = saved.read_bytes()
    monkeypatch.setattr(weights, "save_file", _write_half_and_fail(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        save_backbone(state_dicts.random_backbone(5), saved, licence="CC0")
    assert saved.read_bytes() == before
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


@pytest.mark.slow
def test_a_file_system_that_refuses_to_grow_leaves_the_previous_file(saved):
    """The real error of the real writer: a process that may write no more than 64 KiB."""
    program = (
        "import sys\n"
        "from nnunetv2_meddinov3.models import load_backbone, save_backbone\n"
        "save_backbone(load_backbone(sys.argv[1]), sys.argv[1], licence='CC0')\n"
    )
    before = saved.read_bytes()
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, str(saved)],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536)),
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONDONTWRITEBYTECODE": "1"},
        check=False,
    )
    assert process.returncode == 1
    assert "Traceback" not in process.stderr
    assert f"{saved} must be writable" in process.stderr
    assert saved.read_bytes() == before
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


def test_saving_into_a_folder_that_is_not_there_is_one_sentence(source, tmp_path, mistake):
    path = tmp_path / "nowhere" / "ours.safetensors"
    assert str(path) in mistake(save_backbone, source, path, licence="CC0")


def test_metadata_is_json_under_one_key(saved, source):
    with safetensors.safe_open(saved, framework="pt") as file:
        facts = json.loads(file.metadata()["meddinov3"])
    assert facts["architecture"] == source.architecture.to_dict()
    assert facts["licence"] == "CC0"
    assert facts["version"]
