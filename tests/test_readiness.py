"""Sentences for what is not there before nnU-Net starts."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nnunetv2_meddinov3 import cli, readiness
from nnunetv2_meddinov3.errors import UserError

VARIABLES = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")


@pytest.fixture
def folders(monkeypatch, tmp_path):
    for variable in VARIABLES:
        monkeypatch.setenv(variable, str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return tmp_path


@pytest.mark.parametrize("value", [None, ""])
@pytest.mark.parametrize(
    ("verb", "variable"),
    [
        ("train", "nnUNet_preprocessed"),
        ("train", "nnUNet_results"),
        ("predict", "nnUNet_results"),
    ],
)
def test_a_variable_that_is_not_set_is_named(verb, variable, value, folders, monkeypatch):
    if value is None:
        monkeypatch.delenv(variable)
    else:
        monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match=rf"^{variable} must name .* not set: export {variable}="):
        cli.main([verb, "1", "2d", "0", "-device", "cpu"])


@pytest.mark.parametrize(
    "device", [[], ["-device", "cuda"], ["-device=cuda"], ["-device", "cpu", "-device", "cuda"]]
)
@pytest.mark.parametrize("verb", ["train", "predict"])
def test_without_a_cuda_device_the_sentence_says_which_option_to_add(verb, device, folders):
    with pytest.raises(UserError, match=r"-device cuda needs .* add -device cpu to the command"):
        cli.main([verb, "1", "2d", "0", *device])


def test_what_can_run_is_not_refused(folders, monkeypatch):
    for command in readiness.NEEDED:
        readiness.check_command(command, ["1", "2d", "0", "-device", "cpu"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    readiness.check_command("nnUNetv2_train", ["1", "2d", "0"])
    for variable in VARIABLES:
        monkeypatch.delenv(variable)
    readiness.check_command("nnUNetv2_train", ["-h"])
    readiness.check_command("nnUNetv2_predict", ["--help"])
    readiness.check_command("nnUNetv2_train", [])
    readiness.check_command("nnUNetv2_something_else", ["1"])


PLANS = {
    "dataset_name": "Dataset1234_Big",
    "plans_name": "MyPlans",
    "configurations": {"2d": {}, "2d_896": {}},
}


def test_a_size_that_was_not_planned_gets_the_two_commands():
    with pytest.raises(UserError) as caught:
        readiness.check_planned(PLANS, "2d_448")
    sentence = str(caught.value)
    assert "`meddinov3 plan -d 1234 --size 448 -p MyPlans`" in sentence
    assert "`nnUNetv2_preprocess -d 1234 -plans_name MyPlans -c 2d_448`" in sentence
    assert "MEDDINOV3_SIZE" in sentence


@pytest.mark.parametrize("name", ["2d", "2d_896", "3d_fullres", "2d_mine", "2d_100", "2d_0896"])
def test_any_other_configuration_is_nnunets_affair(name):
    readiness.check_planned(PLANS, name)


def trainer(base, device="cpu"):
    return SimpleNamespace(
        device=torch.device(device),
        plans_manager=SimpleNamespace(dataset_name="Dataset012_A", plans_name="MyPlans"),
        configuration_name="2d_448",
        configuration_manager=SimpleNamespace(data_identifier="MyPlans_2d_448"),
        preprocessed_dataset_folder_base=base if base is None else str(base),
    )


@pytest.mark.parametrize(("made", "said"), [(False, "does not exist"), (True, "is empty")])
def test_a_configuration_that_was_not_preprocessed_gets_the_command(made, said, tmp_path):
    folder = tmp_path / "MyPlans_2d_448"
    if made:
        folder.mkdir()
    with pytest.raises(UserError) as caught:
        readiness.check_trainer(trainer(tmp_path))
    command = "nnUNetv2_preprocess -d 12 -plans_name MyPlans -c 2d_448"
    assert str(caught.value).endswith(f"but {said}: run `{command}`.")
    folder.mkdir(exist_ok=True)
    (folder / "case.pkl").touch()
    readiness.check_trainer(trainer(tmp_path))
    readiness.check_trainer(trainer(None))


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "mps"])
def test_a_trainer_without_its_device_is_told_before_its_data(device, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError, match="add -device cpu"):
        readiness.check_trainer(trainer(tmp_path, device))


def test_torchs_note_about_jit_is_hidden_and_no_other(tmp_path):
    (tmp_path / "noisy_verb.py").write_text(
        "import warnings\n"
        "def run(argv):\n"
        "    warnings.warn('`torch.jit.script` is deprecated. Please use x.', FutureWarning)\n"
        "    warnings.warn('something else is deprecated', FutureWarning)\n"
    )
    code = (
        "import sys, warnings; from nnunetv2_meddinov3 import cli\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        "cli.VERBS['noisy'] = cli.Verb('', 'noisy_verb:run'); cli.main(['noisy'])\n"
        "warnings.warn('`torch.jit.script` is deprecated later.', FutureWarning)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(cli.__file__).parents[1],
        check=True,
    )
    assert "something else" in run.stderr
    assert "Please use x" not in run.stderr
    assert "deprecated later" in run.stderr  # whoever imports us hears it
