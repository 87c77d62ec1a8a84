import pytest

from nnunetv2_meddinov3 import discovery

pytestmark = pytest.mark.slow

TRAINER, PLANNER = "MedDINOv3Trainer", "MedDINOv3Planner"


def test_nnunets_own_search_finds_our_classes(either):
    ours = {**discovery.TRAINERS, **discovery.PLANNERS}
    assert either.where(*ours) == [f"{module}.{name}" for name, module in ours.items()]


def test_spawned_processes_find_the_same_trainer(installed, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        installed.search + "import multiprocessing\n"
        "if __name__ == '__main__':\n"
        "    for method in ('spawn', 'forkserver'):\n"
        "        with multiprocessing.get_context(method).Pool(1) as pool:\n"
        f"            assert pool.apply(find, ['{TRAINER}']) is find('{TRAINER}'), method\n"
        "    print('the same class')\n"
    )
    assert installed.process(program).stdout.strip() == "the same class"


def test_the_opt_out_leaves_nnunet_as_it_is_and_the_ext_folder_as_the_other_road(installed):
    off = {"MEDDINOV3_AUTOREGISTER": "0"}
    (missed,) = installed.where(TRAINER, **off)
    assert "Could not find requested nnunet trainer" in missed
    folder = installed.meddinov3("ext-path", **off).stdout.strip()
    (found,) = installed.where(TRAINER, **off, nnUNet_extTrainer=folder)
    assert found == f"{discovery.TRAINERS[TRAINER]}.{TRAINER}"


def test_importing_the_package_imports_neither_torch_nor_nnunet(either):
    program = (
        "import sys, nnunetv2_meddinov3\n"
        "print([m for m in ('torch', 'nnunetv2', 'numpy', 'timm', 'argparse') if m in sys.modules])"
    )
    assert either.run(program) == "[]"


def test_the_start_up_file_costs_under_two_milliseconds(installed):
    program = """
import importlib, sys, time
path = sys.argv[1]
(line,) = [line for line in open(path) if line.startswith("import ")]
seconds = []
for _ in range(20):
    for name in [name for name in sys.modules if name.startswith("nnunetv2_meddinov3")]:
        del sys.modules[name]
    sys.meta_path[:] = [f for f in sys.meta_path if type(f).__name__ != "_HostFinder"]
    sys.path_importer_cache.clear()
    start = time.perf_counter()
    exec(line)
    seconds.append(time.perf_counter() - start)
    assert sys.modules["nnunetv2_meddinov3.discovery"].is_registered()
print(min(seconds))
"""
    path = installed.site_packages / "nnunetv2_meddinov3.pth"
    assert float(installed.run(program, path)) < 0.002


def test_doctor_finds_nothing_wrong_with_a_good_installation(either, tmp_path):
    folders = {f"nnUNet_{name}": str(tmp_path) for name in ("raw", "preprocessed", "results")}
    report = either.meddinov3("doctor", **folders)
    assert report.returncode == 0, report.stdout + report.stderr
    assert "PROBLEM" not in report.stdout
    assert "the start-up file is active" in report.stdout
    assert f"-tr {TRAINER}: found by nnU-Net" in report.stdout
    assert f"-pl {PLANNER}: found by nnU-Net" in report.stdout


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_uninstalling_leaves_nothing_behind(kind, wheel, tree, new_environment, tmp_path):
    environment = new_environment(tmp_path / "venv")
    before = environment.files()
    environment.install(*([wheel] if kind == "wheel" else ["--editable", tree]))
    environment.run("import nnunetv2_meddinov3.cli, nnunetv2_meddinov3.doctor")
    assert {path.name for path in environment.files() - before} >= {
        "meddinov3",
        "nnunetv2_meddinov3.pth",
    }
    environment.pip("uninstall", "--yes", "nnunetv2-meddinov3")
    assert environment.files() == before
