"""Check what `make dist` built: what it holds, what it says, and that it runs.

python build_backend/check_dist.py dist
"""

from __future__ import annotations

import email
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "nnunetv2_meddinov3"
START_UP = {f"{PACKAGE}.pth", f"{PACKAGE}.start"}
# in the sdist beside the package, so that its README's links lead somewhere and its tests run
BESIDE = {"README.md", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "NOTICE"}
BESIDE |= {"Makefile", "setup.cfg", "pyproject.toml", "docs/index.md", "tests/conftest.py"}
BESIDE |= {"build_backend/meddinov3_backend.py"}
SAID = ("Summary", "Author", "License", "Keywords", "Project-URL", "Classifier")


def main(folder: Path) -> None:
    """Raise SystemExit with a sentence if anything is wrong with a wheel or an sdist.

    Args:
        folder: With one of each.
    """
    wheels, sdists = sorted(folder.glob("*.whl")), sorted(folder.glob("*.tar.gz"))
    if (len(wheels), len(sdists)) != (1, 1):
        sys.exit(f"{folder} must hold one wheel and one sdist, but holds {wheels + sdists}.")
    tracked = _tracked()
    in_wheel = _check_wheel(wheels[0], tracked)
    in_sdist = _check_sdist(sdists[0], tracked)
    version = _run(wheels[0])
    sizes = " and ".join(f"{path.stat().st_size / 1e6:.1f} MB" for path in (wheels[0], sdists[0]))
    print(f"{version}: wheel of {in_wheel} files, sdist of {in_sdist}, {sizes}: good")


def _tracked() -> set[str]:
    """Return the files that git knows; a build must not hold what lies about."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name for name in listed.split("\0") if name and (ROOT / name).is_file()}


def _check_wheel(path: Path, tracked: set[str]) -> int:
    wanted = {name for name in tracked if name.startswith(f"{PACKAGE}/")} | START_UP
    with zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        said = email.message_from_bytes(archive.read(metadata))
    held = {name for name in names if ".dist-info/" not in name}
    _refuse(path, "lacks", wanted - held)
    _refuse(path, "should not hold", held - wanted)
    _refuse(
        path,
        "does not say",
        {name for name in SAID if not said[name] and not said[f"{name}-Expression"]},
    )
    if not str(said.get_payload()).startswith("# nnunetv2_meddinov3"):
        sys.exit(f"{path} must have the README as its description.")
    return len(names)


def _check_sdist(path: Path, tracked: set[str]) -> int:
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    _refuse(path, "lacks", (BESIDE | {n for n in tracked if n.startswith(f"{PACKAGE}/")}) - names)
    _refuse(path, "should not hold", {name for name in names if "__pycache__" in name})
    return len(names)


def _refuse(path: Path, what: str, names: set[str]) -> None:
    if names:
        sys.exit(f"{path} {what}: {', '.join(sorted(names))}.")


def _run(wheel: Path) -> str:
    """Return the version that the command of an unpacked wheel prints."""
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
        program = (
            f"import {PACKAGE}.cli as c, sys; print(c.__file__); sys.exit(c.main(['--version']))"
        )
        done = subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONPATH": folder, "MEDDINOV3_AUTOREGISTER": "0"},
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
        place, _, version = done.stdout.partition("\n")
        if done.returncode or not place.startswith(folder):
            sys.exit(f"{wheel} must run, but: {done.stderr.strip() or place}")
        return version.strip()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
