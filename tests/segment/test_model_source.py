"""Models of strangers: nothing of them is run, and nothing is written outside their folder."""

import json
import os
import pickle
import re
import stat
import zipfile

import pytest
import torch

from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.segment.model_source import opened_model
from tests.segment.conftest import NAME

BASE = f"Dataset007_Made/{NAME}"


class Evil:
    def __reduce__(self):
        return os.mkdir, (os.environ["EVIL"],)


def everything(folder):
    return {path.relative_to(folder) for path in folder.rglob("*")}


def test_a_zip_is_opened_beside_nothing_and_gone_afterwards(model, zip_of, tmp_path, monkeypatch):
    path = zip_of(model, tmp_path / "m.zip")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    before = everything(tmp_path)
    with opened_model(path) as opened:
        assert opened.folds == ("0",)
        names = sorted(p.name for p in opened.folder.rglob("*") if p.is_file())
        assert names == ["checkpoint_final.pth", "dataset.json", "plans.json"]
    assert everything(tmp_path) == before


def add(path, name, content=b"x", mode=0, **facts):
    info = zipfile.ZipInfo("x")
    info.filename = name
    info.external_attr = mode << 16
    for key, value in facts.items():
        setattr(info, key, value)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(info, content)


def climbing(path):
    add(path, f"{BASE}/../../../evil")


def absolute(path):
    add(path, "/evil")


def of_a_drive(path):
    add(path, "C:/evil")


def backwards(path):
    add(path, f"{BASE}\\..\\evil")


def a_link(path):
    add(path, f"{BASE}/fold_0/link", b"/etc", stat.S_IFLNK | 0o777)


HOSTILE = [climbing, absolute, of_a_drive, backwards, a_link]


@pytest.mark.parametrize("hostile", HOSTILE, ids=lambda f: f.__name__)
def test_paths_to_elsewhere_are_refused(hostile, model, zip_of, tmp_path, monkeypatch):
    path = zip_of(model, tmp_path / "m.zip")
    hostile(path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = everything(tmp_path)
    with pytest.raises(UserError, match="nothing was written"), opened_model(path):
        pass
    assert everything(tmp_path) == before


def test_a_bomb_is_refused_by_what_it_declares(model, zip_of, tmp_path):
    path = zip_of(model, tmp_path / "m.zip")
    add(path, f"{BASE}/fold_1/checkpoint_final.pth", b"\0" * 30_000_000)
    said = r"at most 0\.02 GB.* say --max-gb"
    with pytest.raises(UserError, match=said), opened_model(path, max_gb=0.02):
        pass
    add(path, "something/else.bin", b"\0" * 1000)  # what is not unpacked is not counted
    small = zip_of(model, tmp_path / "small.zip")
    add(small, "something/else.bin", b"\0" * 30_000_000)
    with opened_model(small, max_gb=0.02) as opened:
        assert opened.folds == ("0",)


def test_a_bomb_that_lies_about_its_size_is_cut(model, zip_of, tmp_path):
    path = zip_of(model, tmp_path / "m.zip")
    add(path, f"{BASE}/fold_1/checkpoint_final.pth", b"\0" * 3_000_000, compress_type=8)
    data = path.read_bytes()
    size = (3_000_000).to_bytes(4, "little")
    path.write_bytes(data.replace(size, (10).to_bytes(4, "little")))
    with pytest.raises(UserError, match="must be a whole zip"), opened_model(path):
        pass


def test_a_name_that_is_there_twice_is_refused(model, zip_of, tmp_path):
    path = zip_of(model, tmp_path / "m.zip")
    with pytest.warns(UserWarning, match="Duplicate"):
        add(path, f"{BASE}/plans.json", b"{}")
    with pytest.raises(UserError, match="each file once"), opened_model(path):
        pass


@pytest.mark.parametrize("part", [0.3, 0.9, 0.999])
def test_a_torn_zip_is_refused(part, model, zip_of, tmp_path):
    path = zip_of(model, tmp_path / "m.zip")
    data = path.read_bytes()
    path.write_bytes(data[: int(part * len(data))])
    said = "must be a model's folder or a whole zip"
    with pytest.raises(UserError, match=said), opened_model(path):
        pass


def test_a_zip_with_a_damaged_member_is_refused(model, zip_of, tmp_path):
    path = zip_of(model, tmp_path / "m.zip")
    data = bytearray(path.read_bytes())
    place = data.index(b"checkpoint_final.pth") + 500
    data[place : place + 50] = b"\0" * 50
    path.write_bytes(data)
    with pytest.raises(UserError, match="must be a whole zip"), opened_model(path):
        pass


@pytest.mark.parametrize("is_torch", [True, False])
@pytest.mark.parametrize("is_zipped", [True, False])
def test_code_in_a_checkpoint_is_not_run(is_torch, is_zipped, model, zip_of, tmp_path, monkeypatch):
    monkeypatch.setenv("EVIL", str(tmp_path / "evil"))
    path = model / "fold_0" / "checkpoint_final.pth"
    content = {**torch.load(path, weights_only=False), "logging": Evil()}
    if is_torch:
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    given = zip_of(model, tmp_path / "m.zip") if is_zipped else model
    with pytest.raises(UserError, match=r"checkpoint_final\.pth must"), opened_model(given):
        pass
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"network_class_name": "os.system"},
        {"network_class_name": "nnunetv2_meddinov3.models_of_others.X"},
        {"network_class_name": ["os.system"]},
        {"arch_kwargs": {"op": "subprocess.run"}, "_kw_requires_import": ["op"]},
    ],
)
def test_plans_of_a_zip_import_networks_alone(change, model, zip_of, tmp_path):
    plans = json.loads((model / "plans.json").read_text())
    plans["configurations"]["2d"]["architecture"].update(change)
    (model / "plans.json").write_text(json.dumps(plans))
    path = zip_of(model, tmp_path / "m.zip")
    with pytest.raises(UserError, match="would be imported and called"), opened_model(path):
        pass
    with opened_model(model):  # one's own folder may name what is installed
        pass


def test_a_zip_of_the_folder_itself_is_a_model(model, tmp_path):
    path = tmp_path / "m.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in (p for p in model.rglob("*") if p.is_file()):
            archive.write(file, file.relative_to(model))
    with opened_model(path) as opened:
        assert opened.folds == ("0",)


def test_of_several_configurations_one_is_chosen(model, zip_of, tmp_path):
    other = model.with_name(re.sub("2d$", "3d_fullres", NAME))
    other.mkdir()
    for name in ("plans.json", "dataset.json"):
        (other / name).write_text((model / name).read_text())
    path = tmp_path / "m.zip"
    zip_of(model, path)
    with zipfile.ZipFile(path, "a") as archive:
        for file in other.iterdir():
            archive.write(file, file.relative_to(model.parents[1]))
    with pytest.raises(UserError, match="say which with -c"), opened_model(path):
        pass
    with opened_model(path, "2d") as opened:
        assert opened.folds == ("0",)


def test_all_folds_but_all_are_used(tmp_path, model):
    final = (model / "fold_0" / "checkpoint_final.pth").read_bytes()
    for name in ("fold_1", "fold_all", "fold_2"):
        (model / name).mkdir()
        if name != "fold_2":  # which goes on
            (model / name / "checkpoint_final.pth").write_bytes(final)
    with opened_model(model) as opened:
        assert opened.folds == ("0", "1")
    with opened_model(model, folds=("all",)) as opened:
        assert opened.folds == ("all",)
