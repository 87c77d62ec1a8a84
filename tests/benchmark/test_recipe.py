"""Recipes: what they may say, and the jobs that come of them."""

import json
from pathlib import Path

import pytest
import yaml

from nnunetv2_meddinov3.benchmark.jobs import (
    jobs,
    preparations,
    seconds_per_epoch,
    settings,
    weights_to_make,
)
from nnunetv2_meddinov3.benchmark.recipe import SHIPPED, load_recipe
from nnunetv2_meddinov3.benchmark.splits import with_few_cases
from nnunetv2_meddinov3.discovery import PLANNERS, TRAINERS
from nnunetv2_meddinov3.errors import UserError

RECIPE = {
    "name": "try",
    "datasets": [{"name": "Dataset801_A"}, {"name": "Dataset1802_B", "evaluate_on": "test"}],
    "methods": [
        {"name": "U-Net", "trainer": "nnUNetTrainer", "configuration": "2d"},
        {
            "name": "ours",
            "trainer": "MedDINOv3Trainer",
            "configuration": "2d_64",
            "weights": "w.pt",
        },
    ],
    "budgets": [
        {"name": "equal iterations", "epochs": 4, "iterations": 10},
        {"name": "equal time", "minutes": 2},
    ],
    "seeds": [0, 1],
    "few_cases": {"numbers": [5, 20], "methods": ["ours"], "budgets": ["equal iterations"]},
    "reference": "U-Net",
}


def write(tmp_path, **changes):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**RECIPE, **changes}))
    return str(path)


def test_jobs_are_all_combinations_each_once(tmp_path):
    found = jobs(load_recipe(write(tmp_path)))
    assert len({job.name for job in found}) == len(found) == 2 * 2 * 2 * 2 + 2 * 2 * 2
    assert [job.budget.name for job in found] == ["equal iterations"] * 16 + ["equal time"] * 8
    assert {job.cases for job in found if job.method.name == "U-Net"} == {None}
    first = found[0]
    assert first.name == "Dataset801_A__U-Net__equal-iterations__all__fold0__seed0"
    assert (first.dataset.number, found[8].dataset.number) == ("801", "801")
    assert {job.dataset.number for job in found} == {"801", "1802"}
    assert [job.seed for job in found[:16]] == [0] * 8 + [1] * 8


def test_methods_and_few_cases_can_be_for_some_datasets(tmp_path):
    methods = [{**RECIPE["methods"][0], "datasets": ["Dataset801_A"]}, RECIPE["methods"][1]]
    few = {**RECIPE["few_cases"], "datasets": ["Dataset1802_B"]}
    recipe = load_recipe(write(tmp_path, methods=methods, few_cases=few))
    found = {(j.dataset.number, j.method.name, j.cases) for j in jobs(recipe)}
    unet = {("801", "U-Net", None)}
    assert found == unet | {("801", "ours", None)} | {("1802", "ours", n) for n in (None, 5, 20)}
    assert len(preparations(recipe)) == 3
    few["datasets"] = ["Dataset1802_C"]
    with pytest.raises(UserError, match=r"names of its datasets, .*: did you mean 'Dataset1802_B'"):
        load_recipe(write(tmp_path, few_cases=few))


def test_every_configuration_is_prepared_once(tmp_path):
    twice = [*RECIPE["methods"], {**RECIPE["methods"][1], "name": "again"}]
    found = preparations(load_recipe(write(tmp_path, methods=twice)))
    assert len(found) == 4
    assert found[1].command().variables == {"MEDDINOV3_SIZE": "64"}
    assert "-pl MedDINOv3Planner -c 2d_64" in str(found[1].command())


def test_plans_of_another_name_are_planned_under_it(tmp_path):
    methods = [{**m, "plans": "nnUNetPlans_mine"} for m in RECIPE["methods"]]
    recipe = load_recipe(write(tmp_path, methods=methods, batch_size=4))
    for preparation in preparations(recipe):
        assert preparation.command().arguments[-2:] == (
            "-overwrite_plans_name",
            "nnUNetPlans_mine",
        )
    with pytest.raises(UserError, match="plans of its own for its batch_size, but 'nnUNetMed"):
        load_recipe(write(tmp_path, batch_size=4))


def weights_of(job, out):
    return job.variables(out, None, None).get("MEDDINOV3_WEIGHTS", "")


def test_weights_are_made_of_the_training_images_of_each_dataset(tmp_path):
    methods = [RECIPE["methods"][0], {**RECIPE["methods"][1], "weights": "pretrained"}]
    with pytest.raises(UserError, match="must have pretraining, which makes the weights called"):
        load_recipe(write(tmp_path, methods=methods))
    pretraining = {"config": "tiny_stage1", "changes": ["--steps", "7"]}
    grey = {**RECIPE["datasets"][1], "pretraining": ["data.modalities=[windowed]"]}
    datasets = [RECIPE["datasets"][0], grey]
    given = {"methods": methods, "pretraining": pretraining, "datasets": datasets}
    recipe = load_recipe(write(tmp_path, **given))
    first, second = weights_to_make(recipe)
    curate, pretrain = (c.arguments[3:] for c in first.commands(tmp_path, tmp_path / "raw"))
    raw = str(tmp_path / "raw")
    assert curate[:4] == ("curate", raw, "--exclude", raw)
    assert pretrain[:4] == ("pretrain", "tiny_stage1", "--stage", "1")
    assert pretrain[-2:] == ("--steps", "7")
    own = second.commands(tmp_path, tmp_path / "raw")[1].arguments
    assert own[-3:] == ("--steps", "7", "data.modalities=[windowed]")
    told = [settings(job, recipe).get("pretraining", {}).get("changes") for job in jobs(recipe)]
    assert None in told
    assert ["--steps", "7"] in told
    assert ["--steps", "7", "data.modalities=[windowed]"] in told
    assert curate[curate.index("--store") + 1] == pretrain[pretrain.index("--store") + 1]
    run = pretrain[pretrain.index("--out") + 1]
    for made, dataset in ((first, "Dataset801_A"), (second, "Dataset1802_B")):
        job = next(j for j in jobs(recipe) if (j.dataset.name, j.method.name) == (dataset, "ours"))
        assert made.folder(tmp_path) in Path(weights_of(job, tmp_path)).parents
    assert weights_of(jobs(recipe)[1], tmp_path) == f"{run}/stage1/teacher.safetensors"
    assert weights_of(jobs(recipe)[0], tmp_path) == ""


def test_weights_are_found_from_the_recipes_folder(tmp_path):
    recipe = load_recipe(write(tmp_path))
    assert recipe.methods[1].weights == str(tmp_path / "w.pt")
    for kept in ("none", "hf:a/b/c.pth", "timm:vit", "/abs/w.pt"):
        method = {**RECIPE["methods"][1], "weights": kept}
        changed = load_recipe(write(tmp_path, methods=[RECIPE["methods"][0], method]))
        assert changed.methods[1].weights == kept


def test_few_cases_are_folds_of_their_own_and_nested(tmp_path):
    recipe = load_recipe(write(tmp_path))
    cases = [f"case_{n:02d}" for n in range(30)]
    splits = [{"train": cases[6:], "val": cases[:6]}, {"train": cases[:24], "val": cases[24:]}]
    folds, index = with_few_cases(splits, recipe)
    assert index == {"0/all": 0, "0/5": 2, "0/20": 3}
    assert folds[:2] == splits
    assert (len(folds[2]["train"]), len(folds[3]["train"])) == (5, 20)
    assert set(folds[2]["train"]) < set(folds[3]["train"]) < set(splits[0]["train"])
    assert folds[2]["val"] == splits[0]["val"]
    assert json.loads(json.dumps(folds)) == folds


def test_the_time_of_an_epoch_is_a_median_without_the_first():
    log = "\n".join(f"2026-01-01: Epoch time: {s} s" for s in (99.0, 2.0, 8.0, 3.0))
    assert seconds_per_epoch(log) == 3.0
    assert seconds_per_epoch("Epoch time: 7.5 s") == 7.5
    assert seconds_per_epoch("nothing") is None


A_METHOD = RECIPE["methods"][0]
WRONG = {
    "key": ({"seed": [1]}, "unknown key seed: did you mean seeds"),
    "key inside": ({"methods": [{**A_METHOD, "trainr": "x"}]}, r"methods\.0\.trainr: did you mean"),
    "missing": ({"methods": [{"name": "x"}]}, r"methods\.0\.trainer must be given"),
    "dataset": (
        {"datasets": [{"name": "AMOS"}]},
        r"datasets\.0\.name must be text of the form .*, got 'AMOS'",
    ),
    "configuration": (
        {"methods": [{**A_METHOD, "configuration": "3d_fullres"}]},
        r"configuration must be .*, got '3d_fullres'",
    ),
    "twice": ({"methods": [A_METHOD, A_METHOD]}, "'U-Net' stands twice"),
    "reference": ({"reference": "U-net"}, "'U-net' is none: did you mean 'U-Net'"),
    "few": (
        {"few_cases": {"numbers": [1], "methods": ["ours"], "budgets": ["x"]}},
        "names of its budgets, but 'x' is none",
    ),
    "both": ({"budgets": [{"name": "a", "epochs": 1, "minutes": 1}]}, "not both"),
    "no times": (
        {"budgets": [{"name": "a", "minutes": 1}], "few_cases": None},
        "a first budget with epochs",
    ),
    "no methods": ({"methods": []}, "methods must be a list of at least 1, got"),
    "number": ({"seeds": ["x"]}, r"seeds\.0 must be a whole number, got 'x'"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_recipe_gets_one_sentence(tmp_path, what):
    changes, words = WRONG[what]
    with pytest.raises(UserError, match=words) as caught:
        load_recipe(write(tmp_path, **changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["a: [", "\tx", "[1, 2]", ""])
def test_what_is_no_recipe_is_refused(tmp_path, text):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UserError, match=r"r\.yaml"):
        load_recipe(str(tmp_path / "r.yaml"))


def test_an_unknown_recipe_gets_the_names_of_the_shipped_ones():
    with pytest.raises(UserError, match="a YAML file or one of"):
        load_recipe("table9")


@pytest.mark.parametrize("name", sorted(path.stem for path in SHIPPED.glob("*.yaml")))
def test_shipped_recipes_name_trainers_that_are_there(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    for method in recipe.methods:
        assert method.trainer in {*TRAINERS, "nnUNetTrainer"}
        assert method.planner in {*PLANNERS, "nnUNetPlannerResEncM", "ExperimentPlanner"}
