"""What pip makes of a fresh clone: a wheel, and environments with it installed.

The environments are layered over the packages of the one that runs the tests.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

STOCK_SEARCH = """
import json, os, sys
import nnunetv2
from nnunetv2.utilities.find_class_by_name import recursive_find_python_class
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

def find(name):
    if name.endswith("Planner"):
        folder = os.path.join(nnunetv2.__path__[0], "experiment_planning")
        return recursive_find_python_class(folder, name, "nnunetv2.experiment_planning")
    return recursive_find_trainer_class_by_name(name)

def where(name):
    try:
        found = find(name)
    except (Exception, SystemExit) as error:
        return f"{type(error).__name__}: {error}"
    return f"{found.__module__}.{found.__qualname__}"
"""


class Environment:
    """A fresh virtual environment that also sees the packages of this one."""

    search = STOCK_SEARCH

    def __init__(self, folder: Path):
        run([sys.executable, "-m", "venv", "--without-pip", folder])
        scripts = "Scripts" if os.name == "nt" else "bin"
        self.scripts = folder / scripts
        self.python = self.scripts / Path(sys.executable).name
        self.site_packages = Path(
            self.run("import sysconfig; print(sysconfig.get_path('purelib'))")
        )
        # Such a line adds a folder but does not run the .pth files in it, so an editable install
        # of this project in the surrounding environment stays out of sight.
        layers = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
        (self.site_packages / "zz_layer.pth").write_text("\n".join(sorted(layers)))

    def pip(self, *arguments):
        return run([sys.executable, "-m", "pip", "--python", self.python, *arguments])

    def install(self, *what):
        self.pip("install", "--no-deps", "--no-build-isolation", "--ignore-installed", *what)
        return self

    def run(self, program, *arguments, **variables):
        """The output of a program, run outside the checkout."""
        return run([self.python, "-c", program, *arguments], **variables).stdout.strip()

    def process(self, *arguments, **variables):
        """The finished process of this Python, which may have failed."""
        return run([self.python, *arguments], check=False, **variables)

    def meddinov3(self, *arguments, **variables):
        return run([self.scripts / "meddinov3", *arguments], check=False, **variables)

    def stock_command(self, name, *arguments, **variables):
        """The finished process of a console command of nnU-Net's."""
        program = (
            "import sys; from importlib.metadata import entry_points\n"
            f"(entry,) = entry_points(group='console_scripts', name='{name}')\n"
            "sys.exit(entry.load()())"
        )
        return self.process("-c", program, *arguments, **variables)

    def stock_session(self, *commands, **variables):
        """The finished process in which several console commands of nnU-Net's ran in turn.

        Args:
            commands: Pairs of further variables, and a name with its arguments.
            variables: Of the environment.
        """
        program = (
            "import json, os, sys; from importlib.metadata import entry_points\n"
            "def main():\n"
            "    for more, sys.argv in json.loads(sys.argv[1]):\n"
            "        os.environ.update(more)\n"
            "        (entry,) = entry_points(group='console_scripts', name=sys.argv[0])\n"
            "        entry.load()()\n"
            "if __name__ == '__main__':\n"
            "    main()"
        )
        return self.process("-c", program, json.dumps(commands), **variables)

    def where(self, *names, **variables):
        """What nnU-Net's own search finds under each name: ``module.Class`` or ``Error: ...``."""
        program = STOCK_SEARCH + "print(json.dumps([where(name) for name in sys.argv[1:]]))"
        return json.loads(self.run(program, *names, **variables).splitlines()[-1])

    def files(self):
        """Every file and folder of the environment, less the bytecode of other packages."""
        found = {path.relative_to(self.scripts.parent) for path in self.scripts.parent.rglob("*")}
        return {
            path for path in found if "__pycache__" not in path.parts or "meddinov3" in str(path)
        }


def run(command, check=True, cwd=None, **variables):
    environment = os.environ | {"PYTHONWARNINGS": "ignore", "MEDDINOV3_WEIGHTS": "none"} | variables
    for name in ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "MEDDINOV3_AUTOREGISTER"):
        if name not in variables:
            environment.pop(name, None)
    process = subprocess.run(
        [str(part) for part in command],
        cwd=cwd or Path(sys.prefix),
        env=environment,
        capture_output=True,
        encoding="utf-8",
        timeout=900,
        check=False,
    )
    assert not check or process.returncode == 0, process.stderr + process.stdout
    return process


def clone_tree(source, folder):
    """Copies a checkout as a fresh clone has it."""
    leave_out = (
        ".git",
        ".venv",
        "build",
        "*.egg-info",
        "__pycache__",
        ".*_cache",
        "meddinov3_demo",
    )
    shutil.copytree(source, folder, symlinks=True, ignore=shutil.ignore_patterns(*leave_out))
    return folder


def build_wheel(source, folder):
    flags = ["--no-deps", "--no-build-isolation", "--wheel-dir", folder]
    run([sys.executable, "-m", "pip", "wheel", *flags, source])
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="session")
def clone():
    return clone_tree


@pytest.fixture(scope="session")
def build():
    return build_wheel


@pytest.fixture(scope="session")
def new_environment():
    return Environment


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    return clone_tree(ROOT, tmp_path_factory.mktemp("source") / "tree")


@pytest.fixture(scope="session")
def wheel(tree, tmp_path_factory):
    return build_wheel(tree, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def installed(wheel, tmp_path_factory):
    """An environment with the wheel; a test that changes it must undo that."""
    return Environment(tmp_path_factory.mktemp("wheel_environment") / "venv").install(wheel)


@pytest.fixture(scope="session", params=["wheel", "editable"])
def either(request, tree, tmp_path_factory):
    """An environment with the wheel, then one with an editable install."""
    if request.param == "wheel":
        return request.getfixturevalue("installed")
    folder = tmp_path_factory.mktemp("editable_environment")
    return Environment(folder / "venv").install("--editable", tree)
