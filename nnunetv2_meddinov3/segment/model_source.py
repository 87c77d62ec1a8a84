"""A trained model in a folder or a zip, opened so that nothing of it is run or written elsewhere.

nnU-Net unpickles checkpoints and imports whatever class the plans name. Both are looked at before:
checkpoints must hold tensors, numbers and texts alone, and the plans of a zip networks that are
known here.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import shutil
import stat
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from nnunetv2_meddinov3.errors import UserError, first_line

FINAL = "checkpoint_final.pth"
MAX_GB = 50.0  # of a zip, unpacked: five folds of a ViT-L with their optimiser are 18
_WANTED = re.compile(
    r"(plans|dataset|dataset_fingerprint)\.json|fold_(all|\d+)/checkpoint_\w+\.pth"
)
_CLASSES = ("dynamic_network_architectures.", "nnunetv2_meddinov3.models.")
_PARTS = ("torch.nn.", "torch.nn.modules.", "dynamic_network_architectures.")


@dataclass(frozen=True)
class TrainedModel:
    """A model folder that can be predicted with.

    Attributes:
        folder: With plans.json, dataset.json and fold_*.
        folds: Names as ``-f`` takes them.
        checkpoint: File name of the checkpoint of each fold.
    """

    folder: Path
    folds: tuple[str, ...]
    checkpoint: str

    @property
    def plans(self) -> dict[str, Any]:
        """Content of plans.json."""
        return read_json(self.folder / "plans.json")


@contextlib.contextmanager
def opened_model(
    path: Path,
    configuration: str | None = None,
    folds: Sequence[str] = (),
    checkpoint: str = FINAL,
    max_gb: float = MAX_GB,
) -> Iterator[TrainedModel]:
    """Yield a model whose files were looked at; those of a zip are in a temporary folder.

    Args:
        path: A model folder, a dataset's folder in nnUNet_results, or a zip of either, as
            ``nnUNetv2_export_model_to_zip`` writes it.
        configuration: Which, where there are several.
        folds: Which; all but ``all`` by default, or ``all`` where it is the only one.
        checkpoint: File name.
        max_gb: A zip that unpacks to more is refused.

    Raises:
        UserError: If it is no model, damaged or unsafe.
    """
    if path.is_dir():
        yield _checked(_model_folder(path, configuration), folds, checkpoint)
        return
    if not path.is_file():
        raise UserError(f"--model must be a model's folder or zip, but there is no {path}.")
    if not zipfile.is_zipfile(path):
        raise UserError(
            f"--model must be a model's folder or a whole zip that nnUNetv2_export_model_to_zip "
            f"wrote, but {path} is neither: copy or download it again."
        )
    with tempfile.TemporaryDirectory(prefix="meddinov3_model_") as place:
        _unpack(path, Path(place), configuration, checkpoint, max_gb)
        model = _checked(Path(place), folds, checkpoint)
        _check_classes(model.plans, path)
        yield model


def _model_folder(path: Path, configuration: str | None) -> Path:
    if path.name.startswith("fold_") and not (path / "plans.json").exists():
        path = path.resolve().parent
    if (path / "plans.json").is_file():
        return path
    found = sorted(inside.parent for inside in path.glob("*/plans.json"))
    found += sorted(inside.parent for inside in path.glob("*/*/plans.json"))
    return path / _choose([str(p.relative_to(path)) for p in found], configuration, path)


def _choose(names: Sequence[str], configuration: str | None, path: Path) -> str:
    """Return the one model among those of a folder or zip that is meant."""
    if not names:
        raise UserError(
            f"--model must hold plans.json, dataset.json and folders fold_*, but {path} holds no "
            "plans.json: give the folder or zip of a trained model."
        )
    chosen = [name for name in names if configuration in (None, name.rpartition("__")[2])]
    if len(chosen) == 1:
        return chosen[0]
    held = ", ".join(name or "one" for name in names)
    if not chosen:
        raise UserError(
            f"-c must name a configuration of {path}, but {configuration} is none of {held}."
        )
    if configuration is None:
        raise UserError(f"--model must be one model, but {path} holds {held}: say which with -c.")
    raise UserError(
        f"--model must be one model, but {path} holds several with {configuration}: "
        f"{', '.join(chosen)}; give the folder of one."
    )


def _unpack(
    path: Path, place: Path, configuration: str | None, checkpoint: str, max_gb: float
) -> None:
    """Write what prediction needs of a zip into a folder, under names of our own."""
    try:
        with zipfile.ZipFile(path) as archive:
            infos = [info for info in archive.infolist() if not info.is_dir()]
            for info in infos:
                _check_member(info, path)
            names = [info.filename for info in infos]
            if len({*names}) != len(names):
                raise UserError(
                    f"{path} must hold each file once, but holds some name twice: export the model "
                    "again."
                )
            models = sorted(
                str(PurePosixPath(name).parent).removeprefix(".")
                for name in names
                if PurePosixPath(name).name == "plans.json"
            )
            base = _choose(models, configuration, path)
            prefix = f"{base}/" if base else ""
            wanted = {
                rest: info
                for info in infos
                if info.filename.startswith(prefix)
                and _WANTED.fullmatch(rest := info.filename.removeprefix(prefix))
                and (not rest.endswith(".pth") or rest.endswith(f"/{checkpoint}"))
            }
            _check_room(wanted.values(), place, path, max_gb)
            for rest, info in wanted.items():
                target = place / rest
                target.parent.mkdir(exist_ok=True)
                with archive.open(info) as source, target.open("wb") as copy:
                    shutil.copyfileobj(source, copy, 1 << 20)
    except (OSError, EOFError, zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:
        # RuntimeError: a password; NotImplementedError: a compression that Python lacks
        raise UserError(
            f"{path} must be a whole zip that nnUNetv2_export_model_to_zip wrote, but: "
            f"{first_line(error)}; copy, download or export it again."
        ) from error


def _check_member(info: zipfile.ZipInfo, path: Path) -> None:
    name = info.filename
    is_link = stat.S_ISLNK(info.external_attr >> 16)
    parts = re.split(r"[/\\]", name)
    if is_link or ".." in parts or parts[0] == "" or ":" in parts[0] or "\\" in name:
        raise UserError(
            f"{path} must be a zip that nnUNetv2_export_model_to_zip wrote, but it holds "
            f"{'a link' if is_link else 'a path to elsewhere'} ({name!r}); nothing was written: "
            "get it from somebody you trust."
        )


def _check_room(
    infos: Iterator[zipfile.ZipInfo] | Any, place: Path, path: Path, max_gb: float
) -> None:
    # what a member declares is also the most that is unpacked of it
    total = sum(info.file_size for info in infos)
    if total > max_gb * 1e9:
        raise UserError(
            f"a zip of a model must unpack to at most {max_gb:g} GB, but {path} declares "
            f"{total / 1e9:.1f}; if that is right, say --max-gb {-(-total // 1e9):.0f}."
        )
    free = shutil.disk_usage(place).free
    if total > free:
        raise UserError(
            f"there must be room for the model, but {path} unpacks to {total / 1e9:.1f} GB and "
            f"{place.parent} has {free / 1e9:.1f} free: set TMPDIR to another folder."
        )


def _checked(folder: Path, folds: Sequence[str], checkpoint: str) -> TrainedModel:
    """Return a model whose checkpoints are there and safe.

    Raises:
        UserError: If not.
    """
    from nnunetv2_meddinov3.models.tensor_files import load_with_numbers

    for name in ("plans.json", "dataset.json"):
        read_json(folder / name)
    there = sorted(
        path.parent.name.removeprefix("fold_") for path in folder.glob(f"fold_*/{checkpoint}")
    )
    chosen = list(folds) or [fold for fold in there if fold != "all"] or there
    if missing := [fold for fold in chosen if fold not in there]:
        raise UserError(
            f"-f must name folds with {checkpoint}, but {folder} has {', '.join(there) or 'none'} "
            f"and not {missing[0]}."
        )
    if not chosen:
        others = sorted({path.name for path in folder.glob("fold_*/checkpoint_*.pth")})
        hint = f"say --checkpoint {others[0]}" if others else "train it first"
        raise UserError(f"a model must have {checkpoint} in a fold, but {folder} has none: {hint}.")
    for fold in chosen:
        path = folder / f"fold_{fold}" / checkpoint
        content = load_with_numbers(path)
        needed = {"network_weights", "trainer_name", "init_args"}
        if not isinstance(content, dict) or needed - content.keys():
            raise UserError(
                f"{path} must be a checkpoint of nnU-Net, but lacks "
                f"{', '.join(sorted(needed - {*content}))}: copy the model again."
            )
    return TrainedModel(folder, tuple(chosen), checkpoint)


def _check_classes(plans: dict[str, Any], path: Path) -> None:
    """Refuse plans that would import something else than a network."""
    for configuration in plans.get("configurations", {}).values():
        entry = configuration.get("architecture", {})
        names: list[tuple[Any, tuple[str, ...]]] = [(entry.get("network_class_name", ""), _CLASSES)]
        arguments = entry.get("arch_kwargs", {})
        for key in entry.get("_kw_requires_import", []):
            names.append((arguments.get(key), _PARTS))
        for name, known in names:
            if name and not (isinstance(name, str) and name.startswith(known)):
                raise UserError(
                    f"the plans of a zip must name a network of nnU-Net's or of this package, but "
                    f"{path} names {name!r}, which would be imported and called: if you trust it, "
                    "use nnUNetv2_install_pretrained_model_from_zip and give the folder."
                )


def read_json(path: Path) -> Any:
    """Return the content of a JSON file of a model.

    Raises:
        UserError: If it cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"a model must have a readable {path.name}, but {path}: {first_line(error)}."
        ) from error


def add_model_options(parser: argparse.ArgumentParser, name: str) -> None:
    """Add the options that say which model is meant.

    Args:
        parser: Of a command.
        name: ``MODEL`` for a positional argument, ``--model`` for an option.
    """
    add = parser.add_argument
    if name == "MODEL":
        add("model", type=Path, metavar="MODEL", help="a model's folder or zip")
    else:
        add(name, required=True, type=Path, metavar="MODEL", help="[REQUIRED] its folder or zip")
    add("-c", dest="configuration", metavar="NAME", help="which, where a model has several")
    add(
        "-f",
        dest="folds",
        nargs="+",
        default=(),
        metavar="FOLD",
        help="folds whose predictions are averaged. Default: all that are there",
    )
    add(
        "--checkpoint",
        default=FINAL,
        metavar="NAME",
        help="Default: %(default)s",
    )
    add(
        "--max-gb",
        type=_gigabytes,
        default=MAX_GB,
        metavar="GB",
        help="refuse a zip that unpacks to more. Default: %(default)g",
    )


def _gigabytes(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be more than 0, got {text}")
    return value
