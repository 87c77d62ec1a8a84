import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "nnunetv2_meddinov3"
OURS = PACKAGE.name
SOURCES = sorted(PACKAGE.rglob("*.py"))
STANDARD = {"os", "sys", "importlib"}

# What each part of the package must not import, at the top of a module or inside a function.
UPPER = [f"{OURS}.{name}" for name in ("cli", "demo", "demo_data", "doctor", "steps")]
NNUNET_SIDE = [
    f"{OURS}.{name}"
    for name in ("trainers", "fine_tuning", "planning", "planning_cli", "prediction")
]
FORBIDDEN = {
    "models": ["nnunetv2", f"{OURS}.pretrain", f"{OURS}.evaluation", *NNUNET_SIDE, *UPPER],
    "pretrain": ["nnunetv2", f"{OURS}.evaluation", *NNUNET_SIDE, *UPPER],
    "trainers": [f"{OURS}.pretrain", f"{OURS}.evaluation", *UPPER],
    "fine_tuning.py": [f"{OURS}.pretrain", f"{OURS}.evaluation", *UPPER],
    "planning.py": [f"{OURS}.pretrain", f"{OURS}.evaluation", *UPPER],
    "planning_cli.py": [f"{OURS}.pretrain", f"{OURS}.evaluation", *UPPER],
    "prediction.py": [f"{OURS}.pretrain", f"{OURS}.evaluation", *UPPER],
    "evaluation": [f"{OURS}.pretrain", *NNUNET_SIDE, *UPPER],
    "errors.py": [OURS],
    "settings.py": [
        "nnunetv2",
        "torch",
        f"{OURS}.models",
        f"{OURS}.pretrain",
        *NNUNET_SIDE,
        *UPPER,
    ],
    "phantom.py": ["nnunetv2", f"{OURS}.models", f"{OURS}.pretrain", *NNUNET_SIDE, *UPPER],
}
# Nothing stands above these; what they may import at module level is said further down.
UPPERMOST = {
    "__init__.py",
    "__main__.py",
    "cli.py",
    "demo.py",
    "demo_data.py",
    "discovery.py",
    "doctor.py",
    "ext",
    "steps.py",
}


def imports(path, top_level_only=False):
    """Dotted names that a source file imports; ``from a import b`` counts as a.b."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{a.name}" for a in node.names)


def breaches(names, forbidden):
    return [n for n in names if any(f"{n}.".startswith(f"{prefix}.") for prefix in forbidden)]


def rule_for(path):
    part = path.relative_to(PACKAGE).parts[0]
    return FORBIDDEN.get(part, [])


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_modules_import_downwards_and_absolutely(path):
    names = list(imports(path))
    assert breaches(names, rule_for(path)) == []
    assert [name for name in names if name.startswith(".")] == []


def test_the_rule_sees_what_it_must_see(tmp_path):
    (tmp_path / "m.py").write_text(
        f"import nnunetv2.run\ndef f():\n    from {OURS} import trainers\n    from . import x\n"
    )
    names = list(imports(tmp_path / "m.py"))
    assert breaches(names, FORBIDDEN["models"]) == ["nnunetv2.run", f"{OURS}.trainers"]
    assert "..x" in names
    assert breaches(["nnunetv2_meddinov3.models"], ["nnunetv2"]) == []


def test_every_part_of_the_package_has_a_rule():
    parts = {path.relative_to(PACKAGE).parts[0] for path in SOURCES}
    assert parts - set(FORBIDDEN) - UPPERMOST == set()


def test_what_every_interpreter_loads_at_start_imports_next_to_nothing():
    assert list(imports(PACKAGE / "__init__.py")) == []
    names = {name.split(".")[0] for name in imports(PACKAGE / "discovery.py")}
    assert names - {OURS} <= STANDARD
    assert set(imports(PACKAGE / "discovery.py", top_level_only=True)) == {"os", "sys"}


@pytest.mark.parametrize("name", ["__main__.py", "cli.py", "demo.py", "doctor.py", "steps.py"])
def test_the_command_line_imports_nothing_heavy_at_module_level(name):
    for imported in imports(PACKAGE / name, top_level_only=True):
        top = imported.split(".")[0]
        assert top in sys.stdlib_module_names or top == OURS
        part = imported.removeprefix(f"{OURS}.").split(".")[0]
        light = {"__version__", "errors", "settings"} | {Path(other).stem for other in UPPERMOST}
        assert top != OURS or part in light


def test_no_module_is_a_drawer_for_leftovers():
    drawers = {"utils.py", "misc.py", "common.py", "helpers.py"}
    assert [path for path in SOURCES if path.name in drawers] == []


def test_no_file_names_a_host_of_a_registry_or_a_place_on_a_machine():
    # Put together here, so that this file does not name them either.
    hosts = ["py" + "pi.org", "python" + "hosted.org", "registry." + "npmjs", "deb." + "debian.org"]
    places = [f"/{name}/" for name in ("work", "root", "tmp/" + "w", "home/" + "user")]
    found = [
        (path.relative_to(ROOT), word)
        for path in shipped_texts()
        for word in [*hosts, *places]
        if word in path.read_text(encoding="utf-8", errors="ignore")
    ]
    assert found == []


def shipped_texts():
    """Every text file of the checkout, whether tracked by git yet or not."""
    folders = [PACKAGE, *(ROOT / n for n in ("tests", "docs", "benchmarks", "build_backend"))]
    suffixes = {".py", ".md", ".sh", ".yaml", ".yml", ".toml", ".cfg", ".pth", ".start", ".html"}
    for folder in folders:
        yield from (path for path in folder.rglob("*") if path.suffix in suffixes)
    names = ("Makefile", "NOTICE", ".gitignore", ".pre-commit-config.yaml", ".ci/run")
    for path in [*ROOT.glob("*.*"), *(ROOT / name for name in names)]:
        if path.is_file():
            yield path
