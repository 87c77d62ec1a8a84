import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nnunetv2_meddinov3 import cli, discovery, doctor
from nnunetv2_meddinov3.errors import UserError

ROOT = Path(doctor.__file__).parents[1]


@pytest.fixture
def checks(monkeypatch):
    """Replaces what the doctor examines by functions of the test's."""

    def replace(**functions):
        for name in [name for name in vars(doctor) if name.startswith("examine_")]:
            monkeypatch.setattr(doctor, name, functions.get(name, lambda: []))

    return replace


def test_all_well_is_exit_code_0(checks, capsys):
    checks(examine_device=lambda: [doctor.Finding(True, "device", "a good one")])
    assert doctor.main([]) == 0
    assert capsys.readouterr().out == "ok       device: a good one\nno problems found\n"


def test_one_problem_is_exit_code_1(checks, capsys):
    checks(
        examine_device=lambda: [doctor.Finding(True, "device", "a good one")],
        examine_weights=lambda: [doctor.Finding(False, "weights", "gone: fetch them")],
    )
    assert doctor.main([]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:] == ["PROBLEM  weights: gone: fetch them", "1 problem found"]


def test_the_report_can_be_read_by_a_machine(checks, capsys):
    checks(examine_weights=lambda: [doctor.Finding(False, "weights", "gone")])
    assert doctor.main(["--json"]) == 1
    assert json.loads(capsys.readouterr().out) == [
        {"ok": False, "subject": "weights", "sentence": "gone"}
    ]


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (UserError("MEDDINOV3_WEIGHTS must be a path."), "MEDDINOV3_WEIGHTS must be a path."),
        (RuntimeError("operator torchvision::nms does not exist"), "do not match"),
        (OSError("no space left"), "OSError: no space left"),
    ],
)
def test_a_check_that_breaks_down_is_a_finding_and_the_others_go_on(checks, error, sentence):
    def broken():
        raise error
        yield

    checks(
        examine_torchvision=broken,
        examine_weights=lambda: [doctor.Finding(True, "weights", "there")],
    )
    broken_down, weights = doctor.examine()
    assert (broken_down.ok, broken_down.subject) == (False, "torch and torchvision")
    assert sentence in broken_down.sentence
    assert weights.ok


@pytest.mark.parametrize(
    ("installed", "ok", "sentence"),
    [
        ("2.8.1", True, "2.8.1"),
        ("2.8", True, "2.8"),
        ("2.10.0+cpu", True, "2.10.0+cpu"),
        ("2.7.9", False, '2.7.9 does not fit: pip install "nnunetv2>=2.8,<3"'),
        ("3", False, '3 does not fit: pip install "nnunetv2>=2.8,<3"'),
        ("3.0", False, '3.0 does not fit: pip install "nnunetv2>=2.8,<3"'),
        (None, False, 'not installed: pip install "nnunetv2>=2.8,<3"'),
    ],
)
def test_versions_outside_the_range_are_named_with_the_fix(monkeypatch, installed, ok, sentence):
    def version(distribution):
        if installed is None or distribution != "nnunetv2":
            raise doctor.metadata.PackageNotFoundError(distribution)
        return installed

    monkeypatch.setattr(doctor.metadata, "version", version)
    findings = {finding.subject: finding for finding in doctor.examine_versions()}
    assert findings["nnunetv2"] == (ok, "nnunetv2", sentence)
    assert findings["python"].ok
    assert not findings["timm"].ok


@pytest.mark.parametrize(
    ("started_up", "variables", "ok", "sentence"),
    [
        (True, {}, True, "the start-up file is active"),
        (True, {"MEDDINOV3_AUTOREGISTER": "0"}, False, "AUTOREGISTER=0 switches"),
        (False, {}, False, "nnunetv2_meddinov3.pth was not read"),
        (False, {"nnUNet_extTrainer": "/elsewhere"}, False, str(cli.ext_path())),
        (
            False,
            {"nnUNet_extTrainer": os.pathsep.join(["/elsewhere", str(cli.ext_path())])},
            True,
            "nnUNet_extTrainer points to our folder",
        ),
    ],
)
def test_the_active_road_of_discovery_is_named(monkeypatch, started_up, variables, ok, sentence):
    monkeypatch.setattr(discovery, "started_up", started_up)
    for name in ("MEDDINOV3_AUTOREGISTER", "nnUNet_extTrainer"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    (finding,) = doctor.examine_discovery()
    assert finding.ok is ok
    assert sentence in finding.sentence


def test_folders_must_be_named_and_exist_and_be_writable(monkeypatch, tmp_path):
    def refuse(dir):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setenv("nnUNet_raw", str(tmp_path))
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "nowhere"))
    monkeypatch.delenv("nnUNet_results", raising=False)
    raw, preprocessed, results = doctor.examine_folders()
    assert raw == (True, "nnUNet_raw", str(tmp_path))
    assert not preprocessed.ok
    assert f"there is no folder {tmp_path / 'nowhere'}" in preprocessed.sentence
    assert results == (False, "nnUNet_results", "not set: export nnUNet_results=FOLDER")

    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refuse)
    raw, _, results = doctor.examine_folders()
    assert raw.ok, "nnU-Net only reads there"
    assert "cannot write to" in results.sentence
    assert "Permission denied" in results.sentence


def test_the_writing_test_leaves_no_file(monkeypatch, tmp_path):
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(name, str(tmp_path))
    assert all(finding.ok for finding in doctor.examine_folders())
    assert list(tmp_path.iterdir()) == []


def test_our_variables_are_listed_and_typing_mistakes_found(monkeypatch):
    for name in [name for name in os.environ if name.startswith("MEDDINOV3_")]:
        monkeypatch.delenv(name)
    (finding,) = doctor.examine_variables()
    assert finding == (True, "MEDDINOV3_* variables", "none is set")
    monkeypatch.setenv("MEDDINOV3_SIZE", "896")
    (finding,) = doctor.examine_variables()
    assert finding.sentence == "MEDDINOV3_SIZE=896"
    monkeypatch.setenv("MEDDINOV3_WIGHTS", "none")
    with pytest.raises(UserError, match="did you mean MEDDINOV3_WEIGHTS"):
        list(doctor.examine_variables())


@pytest.mark.slow
def test_without_the_variable_the_trainers_own_weights_are_looked_for(monkeypatch):

    from nnunetv2_meddinov3.models import resolve

    asked = []
    monkeypatch.setattr(
        resolve, "describe_weights_source", lambda value: (asked.append(value), (True, "there"))[1]
    )
    monkeypatch.delenv("MEDDINOV3_WEIGHTS", raising=False)
    assert list(doctor.examine_weights()) == [(True, "weights", "there")]
    assert asked == [discovery.resolve("MedDINOv3Trainer").weights]


def test_weights_that_are_not_there_are_a_problem(monkeypatch, tmp_path):
    monkeypatch.setenv("MEDDINOV3_WEIGHTS", str(tmp_path / "nowhere.pth"))
    (finding,) = doctor.examine_weights()
    assert not finding.ok
    assert "nowhere.pth" in finding.sentence


@pytest.fixture
def mismatched(tmp_path):
    """Runs a program where torchvision does not fit torch."""
    fake = tmp_path / "fake/torchvision"
    fake.mkdir(parents=True)
    (fake / "__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')\n"
    )
    folders = {f"nnUNet_{n}": str(tmp_path) for n in ("raw", "preprocessed", "results")}
    path = os.pathsep.join([str(fake.parent), str(ROOT)])
    environment = os.environ | folders | {"PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)

    def run(*command):
        command = [sys.executable, *command]
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=300, check=False
        )

    return run


@pytest.mark.slow
def test_doctor_names_a_mismatched_torchvision_and_does_not_stop_there(mismatched):
    run = mismatched("-m", "nnunetv2_meddinov3", "doctor")
    assert run.returncode == 1
    assert run.stderr == ""
    lines = [
        line
        for line in run.stdout.splitlines()
        if line.startswith("PROBLEM  torch and torchvision:")
    ]
    assert len(lines) == 1
    assert "do not match; install both together" in lines[0]
    assert "nnUNet_results" in run.stdout


@pytest.mark.slow
def test_stock_training_with_a_mismatched_torchvision_ends_in_one_sentence(mismatched):
    program = (
        "import sys\nfrom nnunetv2_meddinov3 import discovery\ndiscovery.register()\n"
        "from nnunetv2.run.run_training import run_training_entry\n"
        "sys.argv[1:] = '999 2d 0 -tr MedDINOv3Trainer -device cpu'.split()\n"
        "run_training_entry()\n"
    )
    run = mismatched("-c", program)
    assert run.returncode == 1
    (sentence,) = run.stderr.splitlines()
    assert sentence.startswith("MedDINOv3Trainer cannot be used: torch ")
    assert "do not match; install both together" in sentence
