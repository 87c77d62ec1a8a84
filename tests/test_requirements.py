"""setup.cfg: every import is declared with its oldest version, and every file it names exists."""

import ast
import configparser
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "nnunetv2_meddinov3"
TEXT = (ROOT / "setup.cfg").read_text(encoding="utf-8")
# Imported under another name than they are installed under.
INSTALLED_AS = {
    "PIL": "pillow",
    "yaml": "pyyaml",
    "sklearn": "scikit-learn",
    "distributed": "dask[distributed]",
}
NOT_OURS_TO_DECLARE = {"torchvision"}  # timm's; `doctor` looks at it
NOT_IMPORTED = {"tensorboard"}  # torch's writer imports it


def requirements():
    """Lines of install_requires and of the extras, without comments."""
    config = configparser.ConfigParser()
    config.read_string(TEXT)
    values = [config["options"]["install_requires"], *config["options.extras_require"].values()]
    lines = (line.strip() for value in values for line in value.splitlines())
    return sorted({line for line in lines if line and not line.startswith("#")})


def name_of(requirement):
    return re.split(r"[<>=!~ ]", requirement)[0].lower().replace("_", "-")


def imported():
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                yield from (alias.name.split(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                yield node.module.split(".")[0]
            elif (
                isinstance(node, ast.Call)
                and ast.unparse(node.func).endswith("import_module")
                and isinstance(node.args[0], ast.Constant)
            ):
                yield node.args[0].value.split(".")[0]


@pytest.mark.parametrize("requirement", requirements())
def test_every_requirement_states_its_oldest_version(requirement):
    assert re.search(r">=\d", requirement)


def test_what_is_imported_is_declared_and_what_is_declared_is_imported():
    ours = {PACKAGE.name, *sys.stdlib_module_names, *NOT_OURS_TO_DECLARE}
    names = {
        INSTALLED_AS.get(name, name).lower().replace("_", "-")
        for name in imported()
        if name not in ours
    }
    config = configparser.ConfigParser()
    config.read_string(TEXT)
    extras = config["options.extras_require"]
    tools = {name_of(line) for line in extras["dev"].split("\n") if line and line[0] != "#"}
    declared = {name_of(line) for line in requirements()}
    assert names - declared == set()
    assert declared - names - tools - NOT_IMPORTED == set()


def test_files_that_setup_cfg_names_exist():
    named = re.findall(r"\b(?:tests|docs)/[\w/.]+\.\w+", TEXT)
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []
