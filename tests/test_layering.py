"""What may import what: read from the source text, lazy and string imports included."""

import ast
import re
import sys
from pathlib import Path

import pytest

from nnunetv2_meddinov3 import cli

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "nnunetv2_meddinov3"
OURS = PACKAGE.name
SOURCES = sorted(PACKAGE.rglob("*.py"))
STANDARD = {"os", "sys", "importlib"}
MAX_LINES = 400

# A room is a folder of the package or a file at its top. What of ours each may import, besides
# itself and the version:
SHARED = {"errors", "files", "locks", "progress", "html", "signals", "raw_dataset", "settings"}
SHARED |= {"processes", "case_names", "invalid", "curves"}
NNUNET_SIDE = {
    "trainers",
    "fine_tuning",
    "optimisation",
    "folds",
    "step_guard",
    "planning",
    "planning_cli",
}
NNUNET_SIDE |= {"preprocessed", "unet"}  # parts of planning
NNUNET_SIDE |= {"augmentation"}  # part of the trainers
MAY_IMPORT = {
    "__init__": set(),
    **dict.fromkeys(SHARED, SHARED),
    "store": SHARED,
    "curate": SHARED | {"store"},
    "models": SHARED,
    "pretrain": SHARED | {"store", "models"},
    "features": SHARED | {"store", "curate", "models", "pretrain"},
    **dict.fromkeys(
        NNUNET_SIDE,
        SHARED | NNUNET_SIDE | {"models", "discovery", "readiness", "prediction", "report"},
    ),
    "prediction": SHARED,
    "readiness": SHARED,
    "evaluation": SHARED,
    "report": SHARED | {"evaluation", "models"},
    "watch": SHARED | {"evaluation", "pretrain", "report"},
    "segment": SHARED | {"curate", "evaluation", "models", "prediction", "readiness"},
    "datasets": SHARED,
    "benchmark": SHARED | {"evaluation", "cli", "datasets", "discovery"},
    "demo": SHARED | {"evaluation", "planning"},
    "discovery": SHARED
    | {"readiness", "spelling", "stock_commands", "stock_options", "prediction"},
    "stock_commands": SHARED | {"readiness", "spelling", "stock_options"},
    "stock_options": SHARED,
    "spelling": SHARED,
    "ext": {"discovery"},
    "bench": SHARED | {"models"},
    "doctor": SHARED | {"cli", "discovery", "models"},
    "cli": SHARED | {"discovery", "readiness"},
    "__main__": {"cli"},
}
# Which of the large libraries each must not import, at the top of a module or inside a function.
NETWORKS = {"torch", "torchvision", "timm"}
MUST_NOT_IMPORT = {
    **{room: {"nnunetv2", *NETWORKS} for room in ("__init__", *SHARED, "store", "curate")},
    "models": {"nnunetv2"},
    "pretrain": {"nnunetv2"},
    "features": {"nnunetv2"},
}
# Imports that a table or a variable names, each with the reason why a plain import will not do.
BY_NAME = {
    "fine_tuning.py": (
        {"nnunetv2.run"},
        "looked up among the loaded modules: whether a command of nnU-Net runs",
    ),
    "cli.py": (
        {f"{OURS}.{name}" for name in ("planning_cli", "demo", "doctor", "curate", "store")}
        | {f"{OURS}.prediction", f"{OURS}.bench", f"{OURS}.features", f"{OURS}.report"}
        | {f"{OURS}.segment", f"{OURS}.watch"}
        | {
            f"{OURS}.{name}"
            for name in ("pretrain", "models", "cli", "evaluation", "datasets", "benchmark")
        }
        | {"nnunetv2.run", "import_module(module_name)"},
        "a table of verbs, each imported only when it is asked for",
    ),
    "discovery.py": (
        {f"{OURS}.trainers", f"{OURS}.planning", "import_module(module_name)"}
        | {"nnunetv2.training", "nnunetv2.experiment_planning", "nnunetv2.run"}
        | {"nnunetv2.inference", "nnunetv2.evaluation", "nnunetv2.model_sharing"},
        "a table of our names, and of the modules of nnU-Net that answer to them or are commands",
    ),
}
_DOTTED = re.compile(rf"(?:{OURS}|nnunetv2)(?:\.\w+)+(?::\w+)?")


def imports(path, top_level_only=False):
    """Dotted names that a source file imports; ``from a import b`` counts as a.b."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{a.name}" for a in node.names)


def string_imports(path):
    """What a source file imports, or may import, by a text that names a module.

    That is every text such as ``package.module:function`` that is not a docstring, and every call
    of ``import_module`` or ``__import__``; one with anything but a text gives the call itself.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documentation = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if id(node) not in documentation and _DOTTED.fullmatch(node.value):
                yield node.value.replace(":", ".")
        elif isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", None))
            if name in ("import_module", "__import__"):
                what = node.args[0] if node.args else node
                is_text = isinstance(what, ast.Constant) and isinstance(what.value, str)
                yield what.value if is_text else f"import_module({ast.unparse(what)})"


def starts_with(name, prefixes):
    return any(f"{name}.".startswith(f"{prefix}.") for prefix in prefixes)


def breaches(names, room):
    """Those of the imported names that a room must not import."""
    allowed = {room, "__version__", *MAY_IMPORT[room]}
    for name in names:
        first, *rest = name.split(".")
        if (
            (first == OURS and (not rest or rest[0] not in allowed))
            or first in MUST_NOT_IMPORT.get(room, ())
            or first.startswith("import_module(")
            or first == ""
        ):
            yield name


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def breaches_of(path, package=PACKAGE):
    relative = path.relative_to(package)
    declared = BY_NAME.get(relative.as_posix(), (set(), ""))[0]
    by_name = [name for name in string_imports(path) if not starts_with(name, declared)]
    return list(breaches([*imports(path), *by_name], relative.parts[0].removesuffix(".py")))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_modules_import_downwards_and_absolutely(path):
    assert breaches_of(path) == []


FORBIDDEN = [
    ("models", "import nnunetv2.run", "nnunetv2.run"),
    ("models", f"from {OURS}.pretrain import heads", f"{OURS}.pretrain.heads"),
    ("models", f"def f():\n    from {OURS} import trainers", f"{OURS}.trainers"),
    ("models", "from . import x", "..x"),
    ("pretrain", f"import {OURS}.curate.slices", f"{OURS}.curate.slices"),
    ("pretrain", f"from {OURS}.trainers import x", f"{OURS}.trainers.x"),
    ("trainers", f"from {OURS} import pretrain", f"{OURS}.pretrain"),
    ("curate", "import torch.nn", "torch.nn"),
    ("curate", f"from {OURS}.models.build import x", f"{OURS}.models.build.x"),
    ("curate", f"from {OURS}.pretrain.views import x", f"{OURS}.pretrain.views.x"),
    ("store", f"from {OURS}.curate import x", f"{OURS}.curate.x"),
    ("store", "from timm import layers", "timm.layers"),
    ("evaluation", f"from {OURS}.demo import report", f"{OURS}.demo.report"),
    ("files.py", f"from {OURS}.store import x", f"{OURS}.store.x"),
    ("errors.py", "import torch", "torch"),
    ("models", f"import {OURS}", OURS),
    ("models", f"TABLE = {{'a': '{OURS}.pretrain.train:main'}}", f"{OURS}.pretrain.train.main"),
    ("models", "load = importlib.import_module('nnunetv2.run')", "nnunetv2.run"),
    ("store", "torch = import_module('torch')", "torch"),
    ("store", "torch = __import__('torch')", "torch"),
    ("models", "importlib.import_module(name)", "import_module(name)"),
    ("models", "import_module(f'{a}.b')", "import_module(f'{a}.b')"),
    ("cli.py", f"V = '{OURS}.fine_tuning:main'", f"{OURS}.fine_tuning.main"),
]


@pytest.mark.parametrize(("place", "line", "name"), FORBIDDEN, ids=lambda value: str(value)[:60])
def test_the_rule_sees_what_it_must_see(place, line, name, tmp_path):
    path = tmp_path / (place if place.endswith(".py") else f"{place}/m.py")
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"{line}\n")
    assert set(breaches_of(path, tmp_path)) == {name}


ALLOWED = [
    ("models", f'"""Used by {OURS}.pretrain."""'),
    ("models", f'"""{OURS}.pretrain"""'),
    ("models", f'a = 1\n"""{OURS}.pretrain"""'),
    ("models", f"from {OURS} import __version__"),
    ("models", f"from {OURS}.models import build\nimport torch, timm"),
    ("models", "a = 'nnunetv2_meddinov3'\nb = 'the nnunetv2.run module'"),
    ("models", f"importlib.import_module('{OURS}.models.weights')"),
    ("pretrain", f"from {OURS}.store.reader import SliceStore\nimport nnunetv2x"),
    ("demo", f"from {OURS}.evaluation import dice\nimport nnunetv2.run"),
    ("cli.py", f"V = '{OURS}.store.cli:main'"),
]


@pytest.mark.parametrize(("place", "line"), ALLOWED, ids=lambda value: str(value)[:60])
def test_the_rule_lets_pass_what_it_must_let_pass(place, line, tmp_path):
    path = tmp_path / (place if place.endswith(".py") else f"{place}/m.py")
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"{line}\n")
    assert breaches_of(path, tmp_path) == []


def test_every_room_has_a_rule_and_every_rule_a_room():
    rooms = {room_of(path) for path in SOURCES}
    assert rooms == set(MAY_IMPORT)
    assert set(MUST_NOT_IMPORT) <= rooms
    assert set().union(*MAY_IMPORT.values()) <= rooms


def test_no_two_rooms_import_each_other():
    for room, others in MAY_IMPORT.items():
        peers = SHARED if room in SHARED else NNUNET_SIDE if room in NNUNET_SIDE else {room}
        for other in others - peers:
            assert room not in MAY_IMPORT[other]


@pytest.mark.parametrize("place", BY_NAME)
def test_every_declared_import_by_name_is_there_and_has_a_reason(place):
    declared, reason = BY_NAME[place]
    found = list(string_imports(PACKAGE / place))
    assert reason
    assert [name for name in declared if not any(starts_with(f, {name}) for f in found)] == []


def test_no_two_modules_have_one_name():
    repeatable = {"__init__", "__main__", "cli", "report"}
    names = [path.stem for path in SOURCES if path.stem not in repeatable]
    assert sorted({name for name in names if names.count(name) > 1}) == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_file_is_too_long_to_read(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


def test_what_every_interpreter_loads_at_start_imports_next_to_nothing():
    assert list(imports(PACKAGE / "__init__.py")) == []
    names = {name.split(".")[0] for name in imports(PACKAGE / "discovery.py")}
    assert names - {OURS} <= STANDARD
    assert set(imports(PACKAGE / "discovery.py", top_level_only=True)) == {"os", "sys"}


# What `meddinov3 VERB --help` waits for: the module of each verb, and what those import at the top.
LIGHT = [
    *("__init__", "__main__", "cli", "discovery", "errors", "settings", "files", "progress"),
    *("signals", "raw_dataset", "locks", "demo.commands", "demo.data"),
    *("store.sharing", "store.layout", "segment.model_source", "readiness"),
    *(
        verb.target.split(":")[0].removeprefix(f"{OURS}.")
        for verb in cli.VERBS.values()
        if verb.stands_for is None
    ),
]
ROOMS_OF_VERBS = sorted({name.rpartition(".")[0] for name in LIGHT} - {""})
LIGHT_LIBRARIES = {"tqdm"}


@pytest.mark.parametrize("name", [*LIGHT, *(f"{room}.__init__" for room in ROOMS_OF_VERBS)])
def test_the_command_line_imports_nothing_heavy_at_module_level(name):
    path = PACKAGE.joinpath(*name.split(".")).with_suffix(".py")
    for imported in imports(path, top_level_only=True):
        top = imported.split(".")[0]
        assert top in sys.stdlib_module_names | LIGHT_LIBRARIES | {OURS}
        ours = imported.removeprefix(f"{OURS}.")
        assert top != OURS or ours == "__version__" or starts_with(ours, LIGHT)


@pytest.mark.parametrize("name", ["pretrain", "trainers"])
def test_the_links_at_the_top_lead_into_the_package(name):
    link = ROOT / name
    if not link.is_symlink():
        pytest.skip("this checkout is on a system without links")
    assert not link.readlink().is_absolute()
    assert link.resolve() == (PACKAGE / name).resolve()


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
        if path.is_file() and path.name != ".git":  # a file in a worktree
            yield path
