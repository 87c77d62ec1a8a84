import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.models.architecture import SIZES
from nnunetv2_meddinov3.pretrain.config import (
    KINDS,
    Augment,
    Data,
    Engine,
    StageConfig,
    available,
    check_world,
    differences,
    effective_lr_factor,
    flatten,
    from_yaml,
    load_config,
    to_yaml,
)

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CONFIGS = ROOT / "nnunetv2_meddinov3/pretrain/configs"
STAGES = ("stage1", "stage2_gram", "stage3_highres")
# Recorded when each size and stage had a complete file of its own.
TWELVE = json.loads((HERE / "twelve_configs.json").read_text(encoding="utf-8"))
RENAMED = {"data.values": "data.modalities", "data.part": "data.split"}
RENAMED |= {f"intensity.{name}_hu": f"intensity.hu.{name}" for name in ("clip", "mean", "std")}
RENAMED |= {
    f"augment.{name}_hu": f"augment.{name}"
    for name in ("window_level", "window_width", "brightness", "noise_sd")
}
SHARES = {  # of -1000 to 1000 HU
    "augment.window_level": [0.4, 0.6],  # -200 to 200
    "augment.window_width": [0.2, 1.0],  # 400 to 2000
    "augment.brightness": [-0.025, 0.025],  # -50 to 50
    "augment.noise_sd": [0.0, 0.025],  # 0 to 50
}
NORMALISED = {"clip": [-0.25, 1.25], "mean": 0.4, "std": 0.27}
REMOVED = {"crops.global_crops": 2, "losses.gram.remove_negatives": False}


def test_four_sizes_of_three_stages_are_shipped():
    assert set(available()) == {
        f"{size}_{stage}" for size in ("vits16", "vitb16", "vitl16", "tiny") for stage in STAGES
    }


@pytest.mark.parametrize("name", available())
def test_a_size_and_a_stage_make_the_config_that_was_one_file(name):
    before = TWELVE["all"] | TWELVE[name]
    assert {key: before.pop(key) for key in REMOVED} == REMOVED
    wanted = {RENAMED.get(key, key): value for key, value in before.items()}
    wanted |= {"data.near_excluded": None, "data.modalities": None}  # left to the run
    wanted |= {"losses.regulariser": "koleo"}  # as it was
    wanted |= {"losses.sigreg_weight": 0.05, "losses.sigreg_slices": 1024}  # used with another
    wanted |= {f"intensity.normalised.{key}": value for key, value in NORMALISED.items()}  # new
    assert wanted["augment.window_level"] == [-200, 200]
    wanted |= SHARES
    shares = {"optim.lr": 0.05} if name == "tiny_stage1" else {}
    if name.endswith("_stage1") and name != "tiny_stage1":  # decided anew: a tenth of the stage
        shares = {"optim.lr": 0.1, "losses.teacher_temp": 0.1}
        wanted |= {f"{key}.warmup_steps": 10_000 for key in shares}
    wanted |= {
        key.replace("_steps", "_share"): shares.get(key.removesuffix(".warmup_steps"))
        for key in wanted
        if key.endswith(".warmup_steps")
    }
    assert flatten(load_config(name).model_dump()) == wanted


@pytest.mark.parametrize("name", available())
def test_every_shipped_config_survives_a_round_trip(name):
    config = load_config(name)
    assert from_yaml(to_yaml(config)) == config


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_file_is_complete(stage):
    given = yaml.safe_load((CONFIGS / f"{stage}.yaml").read_text(encoding="utf-8"))
    wanted = set(flatten(load_config(f"vitb16_{stage}").model_dump()))
    one_way = re.compile(r"\.warmup_(steps|share)$")  # of giving a warm-up
    assert {one_way.sub(".warmup", key) for key in flatten(given)} == {
        one_way.sub(".warmup", key) for key in wanted
    }
    assert set(flatten(given)) <= wanted


@pytest.mark.parametrize("size", ["vits16", "vitb16", "vitl16", "tiny"])
def test_a_preset_says_only_what_differs(size):
    preset = yaml.safe_load((CONFIGS / "sizes" / f"{size}.yaml").read_text(encoding="utf-8")) or {}
    assert set(preset) <= {"all_stages", "stage1", "stage2", "stage3"}
    of_stages = [flatten(load_config(f"vitb16_{stage}").model_dump()) for stage in STAGES]
    for number, of_stage in enumerate(of_stages, 1):
        for key, value in flatten(preset.get(f"stage{number}", {})).items():
            before = flatten(preset.get("all_stages", {})).get(key, of_stage.get(key))
            assert before != value or key.startswith("crops.resolutions."), key  # a list is whole
    for key, value in flatten(preset.get("all_stages", {})).items():
        assert any(of_stage[key] != value for of_stage in of_stages), key


def test_the_defaults_are_those_of_the_papers_first_stage():
    assert StageConfig() == load_config("vitb16_stage1")
    assert Augment() == load_config("vitl16_stage3_highres").augment


def test_importing_the_config_does_not_import_torch():
    code = "import sys, nnunetv2_meddinov3.pretrain.config; assert 'torch' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_every_size_has_the_patches_that_crops_are_checked_against():
    for size in SIZES:
        assert load_config("vitb16_stage1", [f"model.size={size}"]).model.size == size


def test_kinds_of_slices_are_those_that_may_be_asked_for():
    config = load_config("tiny_stage1", [f"data.modalities=[{','.join(KINDS)}]"])
    assert config.data.modalities == list(KINDS)


@pytest.mark.parametrize("size", ["vits16", "vitb16", "vitl16"])
def test_the_papers_values_are_in_the_configs(size):
    one, two, three = (load_config(f"{size}_{stage}") for stage in STAGES)
    assert [c.optim.steps for c in (one, two, three)] == [100_000, 10_000, 10_000]
    assert [c.optim.lr.end for c in (one, two, three)] == [2e-4, 5e-5, 2.5e-5]
    assert {c.optim.batch_size for c in (one, two, three)} == {512}
    assert (one.losses.gram.weight, two.losses.gram.weight.end) == (None, 2.0)
    assert two.losses.gram.teacher == "previous@20000"
    assert one.engine.export_at == [20_000]
    assert two.crops.resolutions[0].gram_size == 512
    sizes = [(r.global_size, r.local_size) for r in three.crops.resolutions]
    assert {s[0] for s in sizes} == {512, 768}
    assert (min(s[1] for s in sizes), max(s[1] for s in sizes)) == (112, 336)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("optim.stepz=3", "unknown key optim.stepz in tiny_stage1: did you mean optim.steps?"),
        ("koleo_group=4", "unknown key koleo_group .* did you mean losses.koleo_group?"),
        ("optim.lr.peek=1", "unknown key optim.lr.peek .* did you mean optim.lr.peak?"),
        ("zzz=1", "unknown key zzz .* known here: stage, init"),
        ("crops.resolutions.0.globl_size=64", "did you mean crops.resolutions.0.global_size?"),
        ("optim.steps=many", "optim.steps must be a whole number, got 'many'"),
        ("optim.steps=0", "optim.steps must be at least 1, got 0"),
        ("optim.steps=1.5", "optim.steps must be a whole number, got 1.5"),
        ("optim.steps=true", "optim.steps must be a whole number, got True"),
        ("optim.steps.x=1", "unknown key optim.steps.x"),
        ("optim.lr=null", "optim.lr must be a section with keys of its own, got None"),
        ("optim.clip_grad=.inf", "optim.clip_grad must be a finite number, got inf"),
        ("losses.ignore_diagonal=1", "losses.ignore_diagonal must be true or false, got 1"),
        ("losses.gram.weight.peak=1", "losses.gram.weight.start must be given"),
        ("data.store=[a]", r"data.store must be text, got \['a'\]"),
        ("optim.batch_size=33", "optim.batch_size must be a multiple of losses.koleo_group=8"),
        ("losses.koleo_group=1", "losses.koleo_group must be at least 2"),
        ("crops.resolutions.0.global_size=100", "must be a multiple of 16 pixels"),
        ("crops.resolutions.0.local_size=256", "at most its global_size"),
        ("crops.resolutions.0.probability=0.5", "probabilities that sum to 1"),
        ("crops.resolutions.3.global_size=96", "crops.resolutions must have an entry 3"),
        ("masks.ratio=[0.5,0.1]", "masks.ratio must be two numbers in order"),
        ("masks.probability=1.5", "masks.probability must be at most 1, got 1.5"),
        ("model.size=vit_huge", "model.size must be one of vit_tiny"),
        ("engine.device=gpu", "engine.device must be one of auto, cpu, cuda"),
        ("losses.gram.teacher=previous@x", "must be previous or previous@STEP"),
        ("engine.compile=on", "engine.compile must be one of auto, always, never"),
        ("engine.parallel=fsdp", "engine.parallel must be one of ddp, fsdp2"),
        ("augment.blur_probability=[0.5]", "augment.blur_probability must be three numbers"),
        ("augment.gamma=[2,1]", "augment.gamma must be two numbers in order"),
        ("optim.lr.warmup_steps=1000", "at most the 400 steps"),
        (
            "data.modalities=[ct]",
            "data.modalities.0 must be one of hu, windowed, mr, other, unknown, got",
        ),
        ("data.modalities=[]", r"data.modalities must be a list of at least 1, got \[\]"),
        ("data.valuez=[hu]", "unknown key data.valuez in tiny_stage1: known here: store, modal"),
        ("crops.global_crops=3", "crops.global_crops is no longer an option and must be 2, got 3"),
        ("losses.teacher_temp.peak=0", "losses.teacher_temp.peak must be above 0"),
        ("engine.probe_every=10", "engine.probe_dataset must be a labelled nnU-Net raw dataset"),
        ("steps", "written key=value"),
        ("data.split=2026-13-45", "the value of data.split must be a number, a word"),
        ("optim.steps=[1", "the value of optim.steps must be a number"),
    ],
)
def test_a_mistake_is_one_sentence(override, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        load_config("tiny_stage1", [override])
    assert "\n" not in str(caught.value)


def test_a_gram_teacher_needs_gram_crops():
    with pytest.raises(UserError, match="gram_size must be a size in pixels"):
        load_config("tiny_stage2_gram", ["crops.resolutions.0.gram_size=null"])


def test_changes_are_applied_to_values_lists_and_entries_of_lists():
    config = load_config(
        "tiny_stage3_highres",
        [
            "crops.resolutions.1.global_size=160",
            "optim.lr.end=1e-4",
            "data.modalities=[hu,mr]",
            "model.drop_path=0.1",
        ],
    )
    assert [r.global_size for r in config.crops.resolutions] == [128, 160]
    assert (config.optim.lr.end, config.data.modalities, config.model.drop_path) == (
        1e-4,
        ["hu", "mr"],
        0.1,
    )


def test_an_unknown_config_is_one_sentence_with_the_nearest(tmp_path):
    with pytest.raises(UserError, match="did you mean vitb16_stage1"):
        load_config("vitb_stage1")
    (tmp_path / "bad.yaml").write_text("optim: [unclosed")
    with pytest.raises(UserError, match="must be a readable YAML file"):
        load_config(str(tmp_path / "bad.yaml"))
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(UserError, match="must hold sections"):
        load_config(str(tmp_path / "list.yaml"))


def test_a_file_of_ones_own_may_leave_out_what_it_does_not_change(tmp_path):
    (tmp_path / "mine.yaml").write_text("stage: 1\noptim: {steps: 70_000, lr: {peak: 1e-3}}\n")
    config = load_config(str(tmp_path / "mine.yaml"))
    assert (config.optim.steps, config.optim.lr.peak, config.optim.lr.end) == (70_000, 1e-3, 2e-4)
    assert config.crops == StageConfig().crops
    (tmp_path / "mine.yaml").write_text("optim: {steps: 70}\n")  # the warm-up is a tenth of it
    assert load_config(str(tmp_path / "mine.yaml")).optim.lr.warmup_steps == 7
    (tmp_path / "mine.yaml").write_text("optim: {steps: 7, lr: {warmup_steps: 8}}\n")
    with pytest.raises(UserError, match=r"optim.lr.warmup_steps .* at most the 7 steps"):
        load_config(str(tmp_path / "mine.yaml"))


def test_numbers_in_files_are_numbers_and_text_that_looks_like_one_stays_text(tmp_path):
    (tmp_path / "mine.yaml").write_text("optim: {lr: {peak: 2e-4, end: 1E-3}, clip_grad: 3}\n")
    config = load_config(str(tmp_path / "mine.yaml"))
    found = (config.optim.lr.peak, config.optim.lr.end, config.optim.clip_grad)
    assert found == (2e-4, 1e-3, 3.0)
    assert all(type(value) is float for value in found)
    named = load_config("tiny_stage1", ["engine.wandb='1e-3'", "data.store=2024"])
    assert (named.engine.wandb, named.data.store) == ("1e-3", "2024")
    assert from_yaml(to_yaml(named)) == named


def test_a_key_that_stands_twice_is_refused(tmp_path):
    (tmp_path / "mine.yaml").write_text("optim: {steps: 7, steps: 8}\n")
    with pytest.raises(UserError, match="readable YAML file: the key steps stands twice"):
        load_config(str(tmp_path / "mine.yaml"))


def test_a_section_is_changed_key_by_key_and_a_list_as_a_whole():
    config = load_config("tiny_stage1", ["heads.dino={prototypes: 64}", "optim.betas=[0.8,0.9]"])
    assert (config.heads.dino.prototypes, config.heads.dino.hidden_dim) == (64, 256)
    assert config.optim.betas == [0.8, 0.9]


def test_a_config_of_an_earlier_version_still_loads(tmp_path):
    before = (HERE / "saved_config.yaml").read_text(encoding="utf-8")
    assert "global_crops: 2" in before
    assert "part: train" in before
    wanted = load_config(
        "tiny_stage2_gram",
        [
            *("data.split=train", "data.modalities=[hu,mr]", "data.store=somewhere"),
            *("model.qkv_bias=true", "model.norm_eps=1e-6", "model.rope_dtype=fp32"),
        ],
    )
    of_a_run = from_yaml(before)
    assert of_a_run.data.near_excluded is True  # as its slices were before the key existed
    assert of_a_run.intensity.normalised is None  # all stored numbers were taken for HU
    assert differences(of_a_run, wanted) == [
        "data.near_excluded is None instead of True",
        *(
            f"intensity.normalised.{key} is {value} instead of None"
            for key, value in NORMALISED.items()
        ),
    ]
    (tmp_path / "config.yaml").write_text(before)
    assert load_config(str(tmp_path / "config.yaml"), ["data.part=train"]) == wanted
    assert load_config(str(tmp_path / "config.yaml"), ["crops.global_crops=2"]) == wanted
    with pytest.raises(UserError, match="remove_negatives is no longer an option and must be fal"):
        from_yaml(before.replace("remove_negatives: false", "remove_negatives: true"))


def test_differences_name_what_changes_results_and_nothing_else():
    a = load_config("tiny_stage1")
    b = load_config("tiny_stage1", ["engine.save_every=3", "data.workers=0", "data.store=x"])
    assert differences(a, b) == []
    c = load_config("tiny_stage1", ["optim.lr.peak=0.5", "data.split=train"])
    assert differences(a, c) == [
        "data.split is train instead of None",
        "optim.lr.peak is 0.5 instead of 0.001",
    ]


@pytest.mark.parametrize(
    "change",
    [
        *("engine.precision=bf16", "data.modalities=[hu,mr]", "data.split=train"),
        "data.near_excluded=true",
    ],
)
def test_what_changes_numbers_or_slices_may_not_change(change):
    key = change.partition("=")[0]
    (found,) = differences(load_config("tiny_stage1"), load_config("tiny_stage1", [change]))
    assert found.startswith(f"{key} is ")


@pytest.mark.parametrize(
    "change",
    [
        *("engine.parallel=fsdp2", "engine.micro_batch=8", "engine.activation_checkpointing=true"),
        *("engine.export_at=[7]", "engine.tensorboard=true", "data.views_on=device"),
        *("engine.compile=never", "engine.device=cpu", "data.prefetch=1"),
    ],
)
def test_what_gives_the_same_numbers_may_change(change):
    assert differences(load_config("tiny_stage1"), load_config("tiny_stage1", [change])) == []


def test_what_may_change_are_keys():
    for section in (Data, Engine):
        assert set(section.model_fields) > section.MAY_CHANGE


def test_a_batch_that_does_not_divide_is_refused_with_numbers_that_do():
    config = load_config("tiny_stage1")
    check_world(config, 2)
    with pytest.raises(UserError, match="take 24 or 48"):
        check_world(config, 3)
    with pytest.raises(UserError, match="take one of 8, 16, 32"):
        check_world(load_config("tiny_stage1", ["engine.micro_batch=12"]), 1)


def test_learning_rates_scale_with_the_square_root_of_the_batch():
    assert effective_lr_factor(load_config("vitb16_stage1")) == 1
    assert effective_lr_factor(load_config("vitb16_stage1", ["optim.batch_size=128"])) == 0.5
