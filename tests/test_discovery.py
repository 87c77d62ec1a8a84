import ast
import importlib
import importlib.util
import inspect
import sys
from pathlib import Path

import pytest

from nnunetv2_meddinov3 import discovery
from nnunetv2_meddinov3.errors import UserError

HOST = "host_for_tests.trainer"


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """A copy of the module with a state of its own, a small host in nnU-Net's place, and a plug-in.

    What the host and the plug-in hold is written by the tests into tmp_path.
    """
    (tmp_path / "host_for_tests").mkdir()
    (tmp_path / "host_for_tests/__init__.py").touch()
    (tmp_path / "host_for_tests/trainer.py").write_text("stock = 'stock'\n")
    (tmp_path / "plugin_for_tests.py").write_text("class OurTrainer: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.setattr(sys, "modules", sys.modules)
    monkeypatch.delenv("MEDDINOV3_AUTOREGISTER", raising=False)
    spec = importlib.util.spec_from_file_location("fresh_discovery", discovery.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.TRAINERS = {}
    module.PLANNERS = {"OurTrainer": "plugin_for_tests"}
    module._HOSTS = {HOST: module.PLANNERS}
    yield module
    for name in [HOST, "host_for_tests", "plugin_for_tests"]:
        sys.modules.pop(name, None)


def test_a_host_imported_after_registration_knows_our_names(fresh):
    fresh.register()
    host = importlib.import_module(HOST)
    assert host.OurTrainer is importlib.import_module("plugin_for_tests").OurTrainer
    assert host.stock == "stock"


def test_a_host_imported_before_registration_knows_our_names(fresh):
    host = importlib.import_module(HOST)
    assert not hasattr(host, "OurTrainer")
    fresh.register()
    assert hasattr(host, "OurTrainer")


def test_our_code_is_not_imported_before_our_name_is_asked_for(fresh):
    fresh.register()
    host = importlib.import_module(HOST)
    assert not hasattr(host, "SomebodyElsesTrainer")
    assert "plugin_for_tests" not in sys.modules
    assert host.OurTrainer
    assert "plugin_for_tests" in sys.modules


def test_an_earlier_module_getattr_of_the_host_still_answers(fresh, tmp_path):
    (tmp_path / "host_for_tests/trainer.py").write_text(
        "def __getattr__(name):\n"
        "    if name == 'lazy':\n"
        "        return 'from the host'\n"
        "    raise AttributeError(name)\n"
    )
    fresh.register()
    host = importlib.import_module(HOST)
    assert host.lazy == "from the host"
    assert host.OurTrainer
    assert not hasattr(host, "nobodys")


def test_registering_twice_changes_nothing(fresh):
    fresh.register()
    host = importlib.import_module(HOST)
    finders, answering = list(sys.meta_path), host.__getattr__
    fresh.register()
    assert sys.meta_path == finders
    assert host.__getattr__ is answering


def test_a_host_that_does_not_exist_stays_an_import_error(fresh):
    fresh._HOSTS["host_for_tests.gone"] = fresh.PLANNERS
    fresh.register()
    with pytest.raises(ModuleNotFoundError, match="gone"):
        importlib.import_module("host_for_tests.gone")


@pytest.mark.parametrize(("value", "active"), [("0", False), ("1", True), (None, True)])
def test_the_start_up_file_obeys_the_opt_out_variable(fresh, monkeypatch, value, active):
    if value is not None:
        monkeypatch.setenv("MEDDINOV3_AUTOREGISTER", value)
    fresh.autoregister()
    assert fresh.started_up
    assert fresh.is_registered() is active


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("class OurTrainer(\n", "SyntaxError"),
        ("raise AttributeError('half installed')\n", "AttributeError: half installed"),
        ("import no_such_package_xyz\n", "No module named 'no_such_package_xyz'"),
        ("", "has no attribute 'OurTrainer'"),
    ],
)
def test_a_broken_plugin_is_explained_and_not_taken_for_missing(fresh, tmp_path, source, said):
    (tmp_path / "plugin_for_tests.py").write_text(source)
    fresh.register()
    host = importlib.import_module(HOST)
    with pytest.raises(UserError) as caught:
        hasattr(host, "OurTrainer")
    message = str(caught.value)
    assert message.startswith("OurTrainer cannot be used")
    assert said in message
    assert "\n" not in message
    assert host.stock == "stock"


def test_a_trainer_is_refused_where_torchvision_does_not_match(fresh, tmp_path, monkeypatch):
    (tmp_path / "timm").mkdir()
    (tmp_path / "timm/__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')\n"
    )
    (tmp_path / "plugin_for_tests.py").write_text("import timm\nclass OurTrainer: pass\n")
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    fresh.TRAINERS["OurTrainer"] = fresh.PLANNERS.pop("OurTrainer")
    with pytest.raises(UserError, match=r"torch [\d.]+.* and torchvision [\d.]+.* do not match"):
        fresh.resolve("OurTrainer")


def test_the_mismatch_is_recognised_behind_another_exception():
    try:
        try:
            raise RuntimeError("operator torchvision::nms does not exist")
        except RuntimeError as error:
            raise ImportError("timm cannot be imported") from error
    except ImportError as error:
        sentence = discovery.explain_import_error(error)
    assert "do not match" in sentence
    assert "pip install" in sentence


def test_an_unknown_failure_is_told_with_its_place():
    try:
        raise OSError("disk on\nfire")
    except OSError as error:
        sentence = discovery.explain_import_error(error)
    assert "OSError: disk on fire" in sentence
    assert Path(__file__).name in sentence
    assert "meddinov3 doctor" in sentence


def test_a_name_that_is_not_ours_is_an_attribute_error():
    with pytest.raises(AttributeError, match="nnUNetTrainer"):
        discovery.resolve("nnUNetTrainer")


def test_the_module_costs_no_import_that_a_starting_interpreter_does_not_have():
    tree = ast.parse(Path(discovery.__file__).read_text())
    imported = {
        alias.name
        for node in tree.body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert imported == {"os", "sys"}


@pytest.mark.slow
def test_the_table_names_every_trainer_and_planner_that_is_defined_and_no_other():
    from nnunetv2.experiment_planning.experiment_planners import default_experiment_planner
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    for table, base in [
        (discovery.TRAINERS, nnUNetTrainer),
        (discovery.PLANNERS, default_experiment_planner.ExperimentPlanner),
    ]:
        defined = {
            name: module_name
            for module_name in set(table.values())
            for name, value in vars(importlib.import_module(module_name)).items()
            if inspect.isclass(value)
            and issubclass(value, base)
            and value.__module__ == module_name
            and not name.startswith("_")
        }
        assert defined == table


@pytest.mark.slow
def test_every_module_of_trainers_is_in_the_table():
    from nnunetv2_meddinov3 import trainers

    modules = {f"{trainers.__name__}.{path.stem}" for path in _sources(trainers)}
    assert modules == set(discovery.TRAINERS.values())


def _sources(package):
    return [p for p in Path(package.__file__).parent.glob("*.py") if p.stem != "__init__"]


@pytest.fixture
def host_with_our_names(fresh, monkeypatch):
    monkeypatch.delenv("nnUNet_extTrainer", raising=False)
    fresh._HOSTS[HOST] = dict.fromkeys(discovery.TRAINERS, "plugin_for_tests")
    fresh.register()
    return importlib.import_module(HOST)


@pytest.mark.parametrize(
    ("typed", "advice"),
    [
        ("MedDINOv3Trainr", "did you mean MedDINOv3Trainer?"),
        ("meddinov3trainer", "did you mean MedDINOv3Trainer?"),
        ("MedDINOv3Trainer_scrach", "did you mean MedDINOv3Trainer_scratch?"),
        ("MedDINOv3_frozen", "did you mean MedDINOv3Trainer_frozen?"),
        ("DINOv3Trainer2", "did you mean DINOv3Trainer?"),
        ("MedDINOv3Trainer_100epochs", "take MedDINOv3Trainer and export MEDDINOV3_EPOCHS=100,"),
        ("DINOv3Trainer_5epochs", "take DINOv3Trainer and export MEDDINOV3_EPOCHS=5,"),
        ("MedDINOv3Trainer_frozen_1epoch", "take MedDINOv3Trainer_frozen and export MEDDINOV3_EPO"),
    ],
)
def test_a_misspelt_name_of_ours_gets_the_nearest(typed, advice, host_with_our_names):
    with pytest.raises(UserError) as caught:
        hasattr(host_with_our_names, typed)
    assert advice in str(caught.value)
    assert "MedDINOv3Trainer_NoMirroring" in str(caught.value)


@pytest.mark.parametrize(
    "typed", ["nnUNetTrainerr", "DINOTrainer", "Trainer", "MyMedDINOv3Trainer"]
)
def test_other_names_are_left_to_nnunet(typed, host_with_our_names):
    assert not hasattr(host_with_our_names, typed)


@pytest.mark.parametrize("place", ["beside the host", "ext"])
def test_somebody_elses_class_may_begin_like_ours(
    place, host_with_our_names, tmp_path, monkeypatch
):
    folder = tmp_path / ("host_for_tests" if place == "beside the host" else "ext/deeper")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "theirs.py").write_text("class MedDINOv3Trainer_theirs: pass\n")
    monkeypatch.setenv("nnUNet_extTrainer", f"{tmp_path / 'ext'}:")
    assert not hasattr(host_with_our_names, "MedDINOv3Trainer_theirs")
    with pytest.raises(UserError, match="did you mean"):
        hasattr(host_with_our_names, "MedDINOv3Trainer_their")


@pytest.mark.slow
def test_nnunets_own_searches_give_the_nearest_name():
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    discovery.register()
    with pytest.raises(UserError, match="MEDDINOV3_EPOCHS=7"):
        recursive_find_trainer_class_by_name("MedDINOv3Trainer_7epochs")
    with pytest.raises(RuntimeError, match="Could not find requested nnunet trainer"):
        recursive_find_trainer_class_by_name("SomebodysTrainer_7epochs")
