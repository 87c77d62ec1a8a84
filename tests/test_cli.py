import json
import os
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest

from nnunetv2_meddinov3 import __version__, cli, discovery
from nnunetv2_meddinov3.errors import UserError

ROOT = Path(cli.__file__).parents[1]


def meddinov3(*arguments, flags=(), **variables):
    """Run the command line in a process of its own, from the checkout."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"} | variables
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    command = [sys.executable, *flags, "-m", "nnunetv2_meddinov3", *arguments]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.fixture
def verb(monkeypatch, tmp_path):
    """A verb `probe` whose function the test writes; what it returns is what the verb returns."""
    monkeypatch.syspath_prepend(tmp_path)

    def define(body, stands_for=None):
        (tmp_path / "verb_for_tests.py").write_text(body)
        monkeypatch.setitem(
            cli.VERBS, "probe", cli.Verb("a probe", "verb_for_tests:run", stands_for)
        )
        monkeypatch.delitem(sys.modules, "verb_for_tests", raising=False)

    yield define
    sys.modules.pop("verb_for_tests", None)


@pytest.mark.slow
def test_help_names_every_verb_in_under_half_a_second():
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        run = meddinov3("--help")
        seconds.append(time.perf_counter() - start)
        assert run.returncode == 0
        for name, verb in cli.VERBS.items():
            assert f"  {name} " in run.stdout
            assert verb.help in run.stdout
    assert min(seconds) < 0.5


def test_help_fits_a_terminal(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 100


def test_no_verb_at_all_prints_the_help(capsys):
    assert cli.main([]) == 0
    assert "verbs:" in capsys.readouterr().out


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"meddinov3 {__version__}\n"


@pytest.mark.parametrize(
    ("typed", "answer"),
    [("trian", "did you mean 'train'?"), ("xyzzy", "choose from plan, train")],
)
def test_an_unknown_verb_is_answered_with_a_suggestion(capsys, typed, answer):
    with pytest.raises(SystemExit) as caught:
        cli.main([typed, "--flag"])
    assert caught.value.code == 2
    last_line = capsys.readouterr().err.splitlines()[-1]
    assert last_line.startswith(f"meddinov3: error: unknown verb '{typed}'")
    assert answer in last_line


def test_what_follows_a_verb_reaches_it_untouched(verb):
    verb("seen = []\ndef run(argv):\n    seen.append(argv)\n    return 3\n")
    assert cli.main(["probe", "-d", "4", "--help", "--", "-x"]) == 3
    assert sys.modules["verb_for_tests"].seen == [["-d", "4", "--help", "--", "-x"]]


def test_a_verb_that_returns_nothing_has_succeeded(verb):
    verb("def run(argv): pass\n")
    assert cli.main(["probe"]) == 0


def test_a_verb_of_nnunet_sees_the_arguments_as_its_own_command_would(verb, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["meddinov3"])
    verb("import sys\ndef run():\n    global seen\n    seen = list(sys.argv)\n", "nnUNetv2_x")
    assert cli.main(["probe", "802", "-tr", "T"]) == 0
    assert sys.modules["verb_for_tests"].seen == ["nnUNetv2_x", "802", "-tr", "T"]


def test_a_mistake_of_the_user_leaves_as_it_is(verb):
    verb(
        "from nnunetv2_meddinov3.errors import UserError\n"
        "def run(argv): raise UserError('The size must be even, 7 came: use 8.')\n"
    )
    with pytest.raises(UserError, match="size must be even"):
        cli.main(["probe"])


def test_a_mistake_of_the_user_that_an_import_finds_leaves_as_it_is_too(verb):
    verb(
        "from nnunetv2_meddinov3.errors import UserError\n"
        "raise UserError('MEDDINOV3_SIZE must be even, got 7.')\n"
    )
    with pytest.raises(UserError, match=r"^MEDDINOV3_SIZE must be even, got 7\.$"):
        cli.main(["probe"])


def test_a_mistake_of_the_user_in_a_process_is_one_sentence_and_exit_code_1():
    run = meddinov3("demo", "--raw", "nowhere", MEDDINOV3_ITERATIONS="many")
    assert run.returncode == 1
    assert run.stderr == "MEDDINOV3_ITERATIONS must be a whole number of at least 1, got 'many'.\n"


def test_a_verb_that_cannot_be_imported_is_explained(verb):
    verb("import no_such_package_xyz\n")
    with pytest.raises(UserError, match=r"no_such_package_xyz.*doctor"):
        cli.main(["probe"])


def test_a_mismatched_torchvision_is_explained_for_any_verb(verb):
    verb("raise RuntimeError('operator torchvision::nms does not exist')\n")
    with pytest.raises(UserError, match="do not match"):
        cli.main(["probe"])


def test_an_interrupt_ends_quietly_with_the_shells_code(verb, capsys):
    verb("def run(argv): raise KeyboardInterrupt\n")
    assert cli.main(["probe"]) == 130
    assert capsys.readouterr().err == "meddinov3: interrupted\n"


def test_a_reader_that_goes_away_leaves_no_traceback():
    program = (
        "import sys\nfrom nnunetv2_meddinov3 import cli\n"
        "def flood(argv):\n    for _ in range(100000): print('a line of the report')\n"
        "cli.print_ext_path = flood\nsys.exit(cli.main(['ext-path']))\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(timeout=30) == 1


def test_a_broken_pipe_that_is_not_stdout_is_not_hidden(verb):
    verb("def run(argv): raise BrokenPipeError('a worker died')\n")
    with pytest.raises(BrokenPipeError, match="a worker died"):
        cli.main(["probe"])


def test_ext_path_is_a_folder_with_one_module_that_shows_our_trainers(capsys):
    assert cli.main(["ext-path"]) == 0
    folder = Path(capsys.readouterr().out.rstrip("\n"))
    assert folder == cli.ext_path()
    assert [path.name for path in folder.glob("*.py")] == ["meddinov3_ext.py"]


def test_every_verb_has_a_module():
    for name, verb in cli.VERBS.items():
        module = verb.target.split(":")[0]
        if verb.stands_for is None:
            path = ROOT.joinpath(*module.split(".")).with_suffix(".py")
            assert path.is_file(), f"{name} points to {path}, which does not exist"


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, v in cli.VERBS.items() if v.stands_for is None])
def test_every_verb_of_ours_explains_itself(name):
    run = meddinov3(name, "--help")
    assert run.returncode == 0, run.stderr
    assert f"usage: meddinov3 {name}" in run.stdout


@pytest.mark.slow
def test_train_finds_our_trainers_where_no_start_up_file_is_read(tmp_path):
    folder = tmp_path / "Dataset999_Cube"
    folder.mkdir()
    configurations = {"3d_fullres": {"patch_size": [16, 16, 16], "architecture": {}}}
    plans = {"configurations": configurations, "plans_name": "nnUNetPlans"}
    plans["dataset_name"] = folder.name
    (folder / "nnUNetPlans.json").write_text(json.dumps(plans))
    (folder / "dataset.json").write_text("{}")
    path = os.pathsep.join([str(ROOT), sysconfig.get_path("purelib")])
    folders = {f"nnUNet_{name}": str(tmp_path) for name in ("raw", "preprocessed", "results")}
    run = meddinov3(
        "train", "999", "3d_fullres", "0", "-tr", "MedDINOv3Trainer", "-device", "cpu",
        flags=["-S"], PYTHONPATH=path, **folders,
    )  # fmt: skip
    assert run.returncode != 0
    assert "MedDINOv3 is a 2D network and needs a 2D configuration" in run.stderr, run.stderr


def test_importing_the_command_line_registers_for_spawned_workers():
    assert discovery.is_registered()
