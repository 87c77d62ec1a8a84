"""Pretraining on MR, on CT and MR together, and on stores and runs of before."""

import io
import json

import numpy as np
import pytest
import torch
import yaml

from nnunetv2_meddinov3.curate.pipeline import curate
from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.models.contracts import contracts_of
from nnunetv2_meddinov3.models.weights import read_checkpoint
from nnunetv2_meddinov3.pretrain.config import Contract, from_yaml, load_config
from nnunetv2_meddinov3.pretrain.intensity import (
    check_same_contract,
    intensity_of,
    usage,
    with_kinds,
)
from nnunetv2_meddinov3.pretrain.loader import open_store, said_of_slices, slices_to_follow
from nnunetv2_meddinov3.pretrain.run import run
from nnunetv2_meddinov3.pretrain.stages import check, settled
from nnunetv2_meddinov3.pretrain.views import Slices, make_views
from nnunetv2_meddinov3.pretrain.views.photometric import Scaling, apply_photometric
from nnunetv2_meddinov3.store.reader import SliceStore


def make_mr(seed=0, slices=6, size=64):
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    tissue = 90 + 60 * np.sin(x * generator.uniform(3, 8)) * np.cos(y * generator.uniform(3, 8))
    inside = (x / 0.9) ** 2 + (y / 0.8) ** 2 < 1
    array = np.where(inside, tissue, 3) + np.abs(generator.normal(0, 6, (slices, size, size)))
    scale = [1, 20, 300.7, 0.004][seed % 4]  # 8 bits, whole numbers, fractions
    if seed % 4 < 2:
        return (
            (array * scale)
            .clip(0, 255 if scale == 1 else 1e4)
            .astype(np.uint8 if scale == 1 else np.int16)
        )
    return (array * scale).astype(np.float32)


@pytest.fixture(scope="module")
def mr_store(tmp_path_factory, write_image):
    """A store of four MR volumes of six slices, whose numbers differ by five orders."""
    folder = tmp_path_factory.mktemp("mr")
    for seed in range(4):
        write_image(folder / f"v/p{seed}.nii.gz", make_mr(seed))
    curate([folder / "v"], folder / "s", modality="MR")
    return folder / "s"


@pytest.fixture(scope="module")
def both_store(tmp_path_factory, write_image, make_ct):
    """A store of three CT and three MR volumes."""
    folder = tmp_path_factory.mktemp("both")
    for seed in range(3):
        write_image(folder / f"mr/p{seed}.nii.gz", make_mr(seed))
        write_image(folder / f"ct/p{seed}.nii.gz", make_ct(6, 64, seed=seed))
    curate([folder / "mr"], folder / "s", modality="MR")
    curate([folder / "ct"], folder / "s")
    return folder / "s"


def config_of(store, *more):
    return load_config("tiny_stage1", [f"data.store={store}", *more])


def kinds_opened(store, *more):
    config = config_of(store, *more)
    opened, rows = open_store(config)
    return with_kinds(config, opened, rows).data.modalities, len(rows)


def said_of(config):
    return said_of_slices(config, *open_store(config))


def test_a_run_takes_what_a_store_holds_alone(mr_store, ct_store):
    assert kinds_opened(mr_store) == (["mr"], 24)
    assert kinds_opened(ct_store) == (["hu"], 24)


def test_ct_and_mr_together_must_be_asked_for(both_store):
    with pytest.raises(UserError, match=r"36 slices, 18 of MR beside 18 of CT in HU.*=\[hu,mr\]"):
        open_store(config_of(both_store))
    assert kinds_opened(both_store, "data.modalities=[hu,mr]") == (["hu", "mr"], 36)


@pytest.mark.parametrize(("kind", "modality"), [("hu", "CT"), ("mr", "MR")])
def test_one_kind_of_a_mixed_store_can_be_taken(kind, modality, both_store):
    store, rows = open_store(config_of(both_store, f"data.modalities=[{kind}]"))
    assert {store[int(row)][1]["modality"] for row in rows} == {modality}
    assert len(rows) == 18
    said = said_of(config_of(both_store, f"data.modalities=[{kind}]"))
    assert "18 of 36 slices are of other kinds than data.modalities names" in said[0]


def test_a_kind_that_a_store_does_not_hold_is_one_sentence(ct_store):
    with pytest.raises(UserError, match=r"modalities=\[mr\] must name what .* 24 of CT in HU"):
        open_store(config_of(ct_store, "data.modalities=[mr]"))


@pytest.mark.parametrize("modality", [None, "PT"])
def test_unknown_values_are_refused_until_named_and_other_modalities_are_not(
    modality, tmp_path, write_image
):
    for seed in (2, 3):
        write_image(tmp_path / f"v/p{seed}.nii.gz", make_mr(seed))
    curate([tmp_path / "v"], tmp_path / "s", modality=modality)
    if modality is None:
        with pytest.raises(UserError, match=r"only when told: with 'data.modalities=\[unknown\]'"):
            open_store(config_of(tmp_path / "s"))
        assert kinds_opened(tmp_path / "s", "data.modalities=[unknown]") == (["unknown"], 12)
    else:
        assert kinds_opened(tmp_path / "s") == (["other"], 12)


# what reaches the network


def test_mr_uses_the_range_of_its_contract_and_of_hu_it_did_not(mr_store):
    config = config_of(mr_store)
    store, rows = open_store(config)
    (now,) = usage(store, rows, config)
    assert (now.unit, now.slices) == ("normalised", 24)
    assert now.low + now.high < 0.01
    assert 0.5 < now.std < 2
    assert abs(now.mean) < 1
    config.intensity.normalised = None  # all stored numbers taken for HU, as before
    (before,) = usage(store, rows, config)
    assert before.high > 0.5
    assert "most values are clipped" in said_of(config)[-1]


def test_a_contract_that_clips_most_is_said(mr_store):
    config = config_of(mr_store, "intensity.normalised.clip=[0.9,1.0]")
    assert "set intensity.normalised.clip to their range" in said_of(config)[-1]
    assert len(said_of(config_of(mr_store))) == 1


def test_air_of_a_ct_is_not_said_to_be_clipped(tmp_path, make_ct, write_image):
    for seed in range(2):
        array = make_ct(6, 64, seed=seed)
        write_image(tmp_path / f"v/p{seed}.nii.gz", np.where(array < -500, -1024, array))
    curate([tmp_path / "v"], tmp_path / "s")
    (line,) = said_of(config_of(tmp_path / "s"))
    assert "12 slices of CT in HU" in line


PLAIN = [
    f"augment.{name}_probability=0"
    for name in ("window", "contrast", "gamma", "noise", "low_resolution")
] + ["augment.blur_probability=[0,0,0]"]


def flat(value):
    return np.full((40, 40), value, np.int16)


def test_each_slice_is_normalised_by_its_own_contract():
    config = load_config("tiny_stage2_gram", PLAIN)
    images, ends = [flat(300), flat(8192), flat(128)], [None, (0.0, 16384.0), (0.0, 255.0)]
    batch = make_views(Slices.of(images, ends), config.crops.resolutions[0], config, (0,))
    wanted = torch.tensor(
        [(300 - 65.1084213256836) / 178.01663208007812, 0.1 / 0.27, (128 / 255 - 0.4) / 0.27]
    )
    for crops in (batch.global_crops, batch.local_crops, batch.gram_crops):
        means = crops.mean((1, 2, 3))
        torch.testing.assert_close(means, wanted.repeat(len(means) // 3), rtol=1e-3, atol=1e-3)


def test_ct_is_changed_to_the_same_bits_as_by_ranges_in_hu():
    """The ranges of the shipped configs, as they stood there in HU, with the same draws."""
    config = load_config("vitb16_stage1")
    low, high = config.intensity.hu.clip
    augment = config.augment
    for name, wanted, start in (
        ("window_level", [-200.0, 200.0], low),
        ("window_width", [400.0, 2000.0], 0.0),
        ("brightness", [-50.0, 50.0], 0.0),
        ("noise_sd", [0.0, 50.0], 0.0),
    ):
        assert [start + v * (high - low) for v in getattr(augment, name)] == wanted


def changed(x, contract, seed):
    augment = load_config("vitb16_stage1").augment.model_copy(
        update={"window_probability": 1.0, "contrast_probability": 1.0, "noise_probability": 1.0}
    )
    noise = torch.Generator().manual_seed(seed)
    factor, offset, std, mean = Scaling.of(None, contract)
    out = x * factor + offset
    apply_photometric(out, augment, 0.5, np.random.default_rng(seed), noise)
    return out * std + mean


@pytest.mark.parametrize("seed", range(4))
def test_photometric_changes_scale_with_the_contract(seed):
    """The same picture in HU and in another unit comes out the same, up to rounding."""
    hu = Contract(clip=[-1000.0, 1000.0], mean=100.0, std=200.0)
    other = Contract(clip=[-0.25, 1.25], mean=0.575, std=0.15)  # 0.00075 a HU, 0.5 is 0
    x = torch.randn(8, 1, 32, 32, generator=torch.Generator().manual_seed(seed)) * 300
    ours = changed(x * 0.00075 + 0.5, other, seed)
    torch.testing.assert_close(ours, changed(x, hu, seed), rtol=1e-3, atol=1e-3)


def test_views_of_ct_alone_do_not_know_of_other_values():
    config = load_config("tiny_stage1")
    generator = np.random.default_rng(0)
    images = [generator.integers(-1000, 1000, (50, 60)).astype(np.int16) for _ in range(3)]
    resolution = config.crops.resolutions[0]
    with_it = make_views(Slices.of(images), resolution, config, (1,))
    config.intensity.normalised = None
    without = make_views(Slices.of(images), resolution, config, (1,))
    assert torch.equal(with_it.global_crops, without.global_crops)
    assert torch.equal(with_it.local_crops, without.local_crops)


def test_followed_slices_are_normalised_and_shown_each_in_its_way(both_store):
    config = config_of(both_store, "data.modalities=[hu,mr]")
    followed = slices_to_follow(*open_store(config), config)
    assert followed.inputs.abs().max() < 7
    assert followed.shown.min() >= -1000
    assert followed.shown.max() <= 1000
    assert all(image.std() > 10 for image in followed.shown)  # not flat in a window of HU


# contracts of checkpoints


def test_a_checkpoint_states_the_contracts_of_its_values():
    ct, mr, both = (
        intensity_of(load_config("tiny_stage1", [f"data.modalities={kinds}"]))
        for kinds in ("[hu]", "[mr]", "[mr,hu]")
    )
    assert (ct["unit"], ct["values"]) == ("HU", ["hu"])
    assert mr == {
        "unit": "normalised", "clip": [-0.25, 1.25], "mean": 0.4, "std": 0.27, "values": ["mr"]
    }  # fmt: skip
    assert both == {**ct, "others": [mr]}
    assert set(contracts_of(both)) == {"HU", "normalised"}
    assert list(contracts_of({"clip": [-1, 1], "mean": 0, "std": 1})) == ["HU"]  # of before
    assert contracts_of(None) == contracts_of({"window_hu": [-150, 250]}) == {}


def test_a_stage_keeps_the_contract_of_its_unit_and_may_go_on_in_another():
    ct, mr = (load_config("tiny_stage1", [f"data.modalities=[{kind}]"]) for kind in ("hu", "mr"))
    check_same_contract({"intensity": intensity_of(ct)}, mr, "w")
    check_same_contract({"intensity": intensity_of(mr)}, mr, "w")
    other = {**intensity_of(mr), "std": 0.5}
    with pytest.raises(UserError, match=r"w was trained with std 0.5 and .*intensity.normalised"):
        check_same_contract({"intensity": other}, mr, "w")
    with pytest.raises(UserError, match=r"w was trained with std 0.5 and"):
        check_same_contract({"intensity": {**intensity_of(ct), "others": [other]}}, mr, "w")


# stores and runs of before


def with_stored(store, folder, low, high):
    """Rewrite a store's index as if its MR had been kept on a scale of its own."""
    import shutil

    from nnunetv2_meddinov3.store import layout
    from nnunetv2_meddinov3.store.index import build_index

    shutil.copytree(store, folder)
    for path in (folder / layout.RECORDS).glob("*.json"):
        values = layout.unsealed(path.read_bytes(), "record_sha256")
        values["intensity"] = {"low": low, "high": high} | (
            {} if low is None else {"stored_low": low, "stored_high": high}
        )
        path.write_bytes(layout.sealed(values, "record_sha256"))
    build_index(folder)
    return folder


def test_a_store_of_before_is_read_by_the_ends_that_it_has(mr_store, tmp_path):
    """Whole-number MR was kept as it was, beside the percentiles of its volume."""
    folder = with_stored(mr_store, tmp_path / "s", 1000.0, 5000.0)
    assert SliceStore(folder).ends(0) == (1000.0, 5000.0)
    images = [np.full((40, 40), 3000, np.int16)]
    config = config_of(folder, *PLAIN)
    store, _ = open_store(config)
    batch = make_views(
        Slices.of(images * 2, [store.ends(0), store.ends(1)]),
        config.crops.resolutions[0], config, (0,),
    )  # fmt: skip
    assert batch.global_crops.mean().item() == pytest.approx(0.1 / 0.27, abs=1e-3)


def test_a_store_without_ends_is_one_sentence(mr_store, tmp_path):
    folder = with_stored(mr_store, tmp_path / "s", None, None)
    with pytest.raises(UserError, match=r"24 slices of .* do not: curate these volumes again"):
        open_store(config_of(folder))


def run_of(small_stage, store, out, *more):
    said = io.StringIO()
    words = small_stage(f"data.store={store}", "init.source=none", *more)
    stages = settled((load_config("tiny_stage1", words),), out)
    check(stages, out)
    return run(stages, out, said), said.getvalue()


@pytest.mark.slow
def test_a_run_begun_before_keeps_taking_all_numbers_for_hu(mr_store, small_stage, tmp_path):
    """Its saved config has the old keys and no contract of normalised values."""
    as_hu = ("optim.steps=1", "data.modalities=[mr]", "intensity.normalised=null")
    code, said = run_of(small_stage, mr_store, tmp_path, *as_hu)
    assert code == 0
    assert "most values are clipped" in said
    folder = tmp_path / "stage1"
    contract = read_checkpoint(folder / "teacher.safetensors").metadata["intensity"]
    assert (contract["unit"], contract["values"]) == ("HU", ["mr"])
    (folder / "teacher.safetensors").unlink()  # so that the stage is continued

    def of_before(text):
        values = yaml.safe_load(text)
        hu = values["intensity"].pop("hu")
        del values["intensity"]["normalised"]
        values["intensity"] |= {f"{name}_hu": value for name, value in hu.items()}
        augment = values["augment"]
        for name, start in (("window_level", -1000), ("window_width", 0), ("brightness", 0)):
            shares = augment.pop(name)
            augment[f"{name}_hu"] = [start + share * 2000 for share in shares]
        augment["noise_sd_hu"] = [share * 2000 for share in augment.pop("noise_sd")]
        return yaml.safe_dump(values)

    (folder / "config.yaml").write_text(of_before((folder / "config.yaml").read_text()))
    (state_file,) = folder.rglob("state.pt")
    state = torch.load(state_file, weights_only=True)
    state["config"] = of_before(state["config"])
    torch.save(state, state_file)
    code, _ = run_of(small_stage, mr_store, tmp_path, "optim.steps=1")
    assert code == 0
    assert from_yaml((folder / "config.yaml").read_text()).intensity.normalised is None


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["data.modalities=[hu,mr]"]])
def test_a_run_on_mr_and_on_both_trains_and_says_what_it_is_on(
    more, mr_store, both_store, small_stage, tmp_path
):
    store = both_store if more else mr_store
    losses = []
    for lr in (0, 0.002):
        out = tmp_path / str(lr)
        changes = (f"optim.lr.peak={lr}", f"optim.lr.end={lr}", "optim.steps=6", *more)
        code, said = run_of(small_stage, store, out, *changes)
        assert code == 0
        assert "slices of MR, normalised by volume" in said
        assert ("slices of CT in HU" in said) == bool(more)
        rows = map(json.loads, (out / "stage1/metrics.jsonl").read_text().splitlines())
        losses.append([row["loss_total"] for row in rows])
    assert np.isfinite(losses).all()
    assert losses[0][0] == losses[1][0]
    assert losses[0][-1] != losses[1][-1]
    facts = read_checkpoint(tmp_path / "0.002/stage1/teacher.safetensors").metadata["intensity"]
    assert set(contracts_of(facts)) == ({"HU", "normalised"} if more else {"normalised"})
    saved = from_yaml((tmp_path / "0.002/stage1/config.yaml").read_text())
    assert saved.data.modalities == (["hu", "mr"] if more else ["mr"])
    # the same command finds the stage finished
    assert run_of(small_stage, store, tmp_path / "0.002", *changes)[0] == 0


@pytest.mark.slow
def test_real_mr_is_curated_and_pretrained_over_its_whole_range(shared_data, small_stage, tmp_path):
    from nnunetv2_meddinov3.cli import main

    names = sorted((shared_data / "hippocampus/images").glob("*.nii.gz"))[::10]
    (tmp_path / "mr").mkdir()
    for path in names:
        (tmp_path / "mr" / path.name).symlink_to(path)
    store = str(tmp_path / "s")
    assert main(["curate", str(tmp_path / "mr"), "--modality", "MR", "--store", store]) == 0
    config = config_of(store)
    (used,) = usage(*open_store(config), config)
    assert used.unit == "normalised"
    assert used.low < 0.005
    assert used.high < 0.005
    assert abs(used.mean) < 1
    assert 0.7 < used.std < 1.3
    code, said = run_of(small_stage, store, tmp_path / "run", "optim.steps=5")
    assert code == 0
    assert "most values" not in said
    rows = (tmp_path / "run/stage1/metrics.jsonl").read_text().splitlines()
    losses = [json.loads(row)["loss_total"] for row in rows]
    assert np.isfinite(losses).all()
    assert len(set(losses)) == 5
