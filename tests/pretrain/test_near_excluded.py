"""Slices that look like an excluded one: left out of pretraining unless told otherwise."""

import io
import shutil

import numpy as np
import pytest
import torch
import yaml

from nnunetv2_meddinov3.curate.pipeline import curate
from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.pretrain.config import from_yaml, load_config
from nnunetv2_meddinov3.pretrain.loader import open_store
from nnunetv2_meddinov3.pretrain.run import run
from nnunetv2_meddinov3.pretrain.stages import check, settled
from nnunetv2_meddinov3.store.manage import split_by_patient
from nnunetv2_meddinov3.store.reader import SliceStore


@pytest.fixture(scope="module")
def flagged_store(tmp_path_factory, make_ct, write_image):
    """A store of four volumes of six slices, of which one is a noisy mirror image of a test."""
    folder = tmp_path_factory.mktemp("flagged")
    noise = np.random.default_rng(0).integers(-5, 6, (6, 64, 64), dtype=np.int16)
    write_image(folder / "tests/t.nii.gz", make_ct(6, 64, seed=0))
    write_image(folder / "mine/p0.nii.gz", (make_ct(6, 64, seed=0) + noise)[:, :, ::-1])
    for i in range(1, 4):
        write_image(folder / f"mine/p{i}.nii.gz", make_ct(6, 64, seed=i))
    assert curate([folder / "mine"], folder / "s", exclude=[folder / "tests"]).entered == 4
    return folder / "s"


def rows_of(overrides):
    return open_store(load_config("tiny_stage1", overrides))[1].tolist()


def flagged_rows(store):
    flags = SliceStore(store).rows["flags"].to_pylist()
    return [row for row, each in enumerate(flags) if "near_excluded" in each]


def test_flagged_slices_are_left_out_unless_told_otherwise(flagged_store, small_stage):
    overrides, flagged = small_stage(f"data.store={flagged_store}"), flagged_rows(flagged_store)
    assert len(flagged) == 6
    others = [row for row in range(24) if row not in flagged]
    assert rows_of(overrides) == rows_of([*overrides, "data.near_excluded=false"]) == others
    assert rows_of([*overrides, "data.near_excluded=true"]) == list(range(24))


def test_a_part_of_a_split_store_is_without_them_too(flagged_store, small_stage, tmp_path):
    store = shutil.copytree(flagged_store, tmp_path / "s")
    split_by_patient(store, {"all": 1.0})
    found = rows_of(small_stage(f"data.store={store}", "data.split=all"))
    assert found == [row for row in range(24) if row not in flagged_rows(store)]


def test_a_store_of_nothing_else_is_refused_with_what_to_do(
    flagged_store, small_stage, tmp_path, make_ct, write_image
):
    tests = flagged_store.parent / "tests"
    write_image(tmp_path / "mine/p.nii.gz", make_ct(6, 64, seed=0) + np.int16(1))
    curate([tmp_path / "mine"], tmp_path / "s", exclude=[tests])
    with pytest.raises(UserError, match=r"but all 6 do: set data\.near_excluded=true"):
        rows_of(small_stage(f"data.store={tmp_path / 's'}"))


def run_of(small_stage, store, out, *more):
    words = ["optim.steps=1", "init.source=none", f"data.store={store}", *more]
    said = io.StringIO()
    stages = settled((load_config("tiny_stage1", small_stage(*words)),), out)
    check(stages, out)
    code = run(stages, out, said)
    return code, said.getvalue()


@pytest.mark.slow
def test_a_run_says_how_many_were_left_out_and_keeps_to_it(flagged_store, small_stage, tmp_path):
    code, said = run_of(small_stage, flagged_store, tmp_path)
    assert code == 0
    assert "stage 1: 6 of 24 slices look like an excluded one and are left out" in said
    saved = (tmp_path / "stage1/config.yaml").read_text()
    assert from_yaml(saved).data.near_excluded is False
    with pytest.raises(UserError, match="near_excluded is True instead of False"):
        run_of(small_stage, flagged_store, tmp_path, "data.near_excluded=true")


@pytest.mark.slow
def test_a_run_begun_before_the_key_keeps_its_slices(flagged_store, small_stage, tmp_path):
    """Its saved config and its checkpoint lack the key; it had trained on all slices."""
    run_of(small_stage, flagged_store, tmp_path, "data.near_excluded=true")
    folder = tmp_path / "stage1"
    (folder / "teacher.safetensors").unlink()  # so that the stage is continued

    def without_the_key(text):
        values = yaml.safe_load(text)
        del values["data"]["near_excluded"]
        return yaml.safe_dump(values)

    (folder / "config.yaml").write_text(without_the_key((folder / "config.yaml").read_text()))
    (state_file,) = folder.rglob("state.pt")
    state = torch.load(state_file, weights_only=True)
    state["config"] = without_the_key(state["config"])
    torch.save(state, state_file)
    for _ in range(2):  # the first time writes the config with the key
        code, said = run_of(small_stage, flagged_store, tmp_path)
        assert code == 0
        assert "6 of 24 slices look like an excluded one and are trained on" in said
        (folder / "teacher.safetensors").unlink()
    assert from_yaml((folder / "config.yaml").read_text()).data.near_excluded is True
    with pytest.raises(UserError, match="near_excluded is False instead of True"):
        run_of(small_stage, flagged_store, tmp_path, "data.near_excluded=false")
