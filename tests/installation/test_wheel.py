import base64
import csv
import hashlib
import io
import os
import subprocess
import sys
import zipfile

import pytest

from nnunetv2_meddinov3 import __version__

pytestmark = pytest.mark.slow

STARTUP_FILES = {"nnunetv2_meddinov3.pth", "nnunetv2_meddinov3.start"}


def contents(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_wheel_holds_the_package_the_start_up_files_and_nothing_else(tree, wheel):
    package = tree / "nnunetv2_meddinov3"
    wanted = {p for p in package.rglob("*") if p.suffix in {".py", ".yaml", ".json", ".html"}}
    held = {name for name in contents(wheel) if ".dist-info/" not in name}
    assert held == {p.relative_to(tree).as_posix() for p in wanted} | STARTUP_FILES


def test_the_wheel_records_every_file_with_its_hash(wheel):
    files = contents(wheel)
    (record,) = [name for name in files if name.endswith("/RECORD")]
    rows = {row[0]: row[1:] for row in csv.reader(io.StringIO(files[record].decode()))}
    assert set(rows) == set(files)
    for name, data in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")
        assert rows[name] == (["", ""] if name == record else [f"sha256={digest}", f"{len(data)}"])


def test_the_metadata_say_what_is_needed_and_under_which_licence(wheel):
    files = contents(wheel)
    (metadata,) = [data.decode() for name, data in files.items() if name.endswith("/METADATA")]
    header = metadata.split("\n\n")[0].splitlines()
    assert "Name: nnunetv2-meddinov3" in header
    assert f"Version: {__version__}" in header
    assert "Requires-Python: >=3.10" in header
    assert any(line in header for line in ("License: Apache-2.0", "License-Expression: Apache-2.0"))
    needed = [line.removeprefix("Requires-Dist:") for line in header if "extra ==" not in line]
    required = [line.replace(" ", "") for line in needed]  # setuptools differ in spaces
    floors = {"nnunetv2<3,>=2.8", "timm>=1.0.21", "torch>=2.7", "batchgenerators>=0.25.1"}
    assert floors <= set(required)
    assert sum(name.endswith(("/LICENSE", "/NOTICE")) for name in files) == 2


def test_a_second_build_is_equal_byte_for_byte_and_forgets_deleted_modules(
    tree, clone, build, wheel, tmp_path
):
    source = clone(tree, tmp_path / "tree")
    gone = source / "nnunetv2_meddinov3/deleted_before_the_second_build.py"
    gone.touch()
    assert any(gone.name in name for name in contents(build(source, tmp_path / "first")))
    gone.unlink()
    assert build(source, tmp_path / "second").read_bytes() == wheel.read_bytes()


def test_a_wheel_made_from_the_sdist_is_the_same(tree, build, wheel, tmp_path):
    program = f"import meddinov3_backend as b; print(b.build_sdist({str(tmp_path)!r}))"
    environment = os.environ | {"PYTHONPATH": str(tree / "build_backend")}
    command = [sys.executable, "-c", program]
    made = subprocess.check_output(command, cwd=tree, env=environment, text=True, timeout=120)
    sdist = tmp_path / made.split()[-1]
    assert contents(build(sdist, tmp_path / "wheel")) == contents(wheel)


@pytest.fixture
def checkout(tree, clone, tmp_path):
    """A repository of its own, of all that is here."""
    folder = clone(tree, tmp_path / "checkout")
    for words in (["init", "--quiet"], ["add", "--all"]):
        subprocess.run(["git", "-C", folder, *words], check=True, capture_output=True)
    return folder


def make_dist(folder):
    command = ["make", "--silent", "dist", "READY=", f"VENV={sys.prefix}"]
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=300, check=False
    )


def test_make_dist_builds_what_can_be_handed_on(checkout):
    done = make_dist(checkout)
    assert done.returncode == 0, done.stdout + done.stderr
    last = done.stdout.splitlines()[-1]
    assert last.startswith(f"meddinov3 {__version__}: wheel of ")
    assert done.stdout.count("PASSED") == 2
    assert sorted(path.suffix for path in (checkout / "dist").iterdir()) == [".gz", ".whl"]


def missing_page(checkout):
    setup = checkout / "setup.cfg"
    setup.write_text(setup.read_text().replace("    features/*.html\n", ""))
    return "lacks: nnunetv2_meddinov3/features/similarity.html"


def something_that_lies_about(checkout):
    (checkout / "nnunetv2_meddinov3/pretrain/configs/mine.yaml").touch()  # git does not know it
    return "should not hold: nnunetv2_meddinov3/pretrain/configs/mine.yaml"


def no_keywords(checkout):
    setup = checkout / "setup.cfg"
    lines = setup.read_text().splitlines(keepends=True)
    setup.write_text("".join(line for line in lines if not line.startswith("keywords")))
    return "does not say: Keywords"


def a_package_that_does_not_run(checkout):
    (checkout / "nnunetv2_meddinov3/cli.py").write_text("import nothing_of_that_name\n")
    return "must run, but: "


@pytest.mark.parametrize(
    "fault",
    [missing_page, something_that_lies_about, no_keywords, a_package_that_does_not_run],
)
def test_make_dist_refuses_a_build_that_is_wrong(fault, checkout):
    said = fault(checkout)
    done = make_dist(checkout)
    assert done.returncode != 0
    assert said in done.stderr
