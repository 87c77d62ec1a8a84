"""Tensors in files and folders of any known format, read without running their code."""

import contextlib
import json
import os
import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, FileSystemReader, load
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from nnunetv2_meddinov3.errors import UserError, first_line
from nnunetv2_meddinov3.files import existing
from nnunetv2_meddinov3.models import pickles

METADATA_KEY = "meddinov3"

# what the pickled index of a distributed checkpoint may name
_INDEX_MODULES = (
    "torch.distributed.checkpoint.metadata",
    "torch.distributed.checkpoint.filesystem",
)
_INDEX_NAMES = {
    ("torch", "Size"),
    ("torch", "device"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib", "Path"),
}


@dataclass
class Contents:
    """What a checkpoint file or folder holds.

    Attributes:
        tensors: Key -> tensor; nested dictionaries are flattened with dots.
        metadata: What one of our own files says of itself.
        config: A DINOv3 ViT's config.json of Hugging Face transformers beside the file.
        run: What a checkpoint of nnU-Net says of its training: ``trainer`` and, where a trainer of
            ours wrote it, ``architecture`` of the backbone and ``network``, the segmenter's own
            arguments; of the second stage of a cascade also ``image_channels``, the number of its
            input channels that are images; of a training on CT alone also ``intensity``, the
            contract by which nnU-Net normalised it.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)


def read_files(path: str | os.PathLike[str], where: str | None = None) -> Contents:
    """Read the tensors of a file or folder of any known format, without running its code.

    Args:
        path: A file, or a folder: a distributed checkpoint, or one with ``model.safetensors``.
        where: What to call it in an error.

    Raises:
        UserError: If it is missing, damaged or unsafe.
    """
    where, found = where or os.fspath(path), existing(path)
    if found is None:
        raise UserError(f"the weights must exist, but there is no {where}: check the path.")
    path = found
    if path.is_dir():
        if (path / ".metadata").is_file():
            for part in (path / ".metadata", *path.glob("*.distcp")):
                _check_kind(_head(part, where), where if part.name == ".metadata" else str(part))
            return Contents(_read_distributed(path, where))
        shards = _shards(path, where)
        if not shards:
            raise UserError(
                f"a folder of weights must hold model.safetensors or a distributed checkpoint, but "
                f"{where} holds neither: give the weights file itself."
            )
    else:
        shards = [path]
    state: dict[str, Tensor] = {}
    metadata: dict[str, Any] = {}
    run: dict[str, Any] = {}
    for shard in shards:
        contents = _read_file(shard, where if len(shards) == 1 else str(shard))
        state.update(contents.tensors)
        metadata.update(contents.metadata)
        run.update(contents.run)
    return Contents(state, metadata, _read_config(shards[0].parent / "config.json"), run)


def _shards(folder: Path, where: str) -> list[Path]:
    """Return the files of a folder of Hugging Face weights; none if it is not such a folder."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        whole = folder / "model.safetensors"
        return [whole] if whole.exists() else []
    try:
        names = set(json.loads(index.read_text())["weight_map"].values())
        shards = sorted(folder / name for name in names)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{index} must list the files of {where}, but it is damaged.") from error
    for shard in shards:
        if not shard.is_file():
            raise UserError(f"{where} must hold all its files, but {shard.name} is missing.")
    return shards


def _read_config(path: Path) -> dict[str, Any]:
    """Return a Hugging Face config.json beside the weights, if it is a DINOv3 ViT's."""
    with contextlib.suppress(OSError, ValueError):
        config = json.loads(path.read_text())
        if isinstance(config, dict) and config.get("model_type", "dinov3_vit") == "dinov3_vit":
            return config
    return {}


def _read_file(path: Path, where: str) -> Contents:
    head = _head(path, where)
    _check_kind(head, where)
    if head[8:9] == b"{" or (path.suffix == ".safetensors" and head[:2] != b"PK"):
        return Contents(*_read_safetensors(path, where))
    return _read_pickle(path, where)


def _head(path: Path, where: str) -> bytes:
    """Return the first bytes of a file."""
    try:
        with path.open("rb") as file:
            return file.read(512)
    except OSError as error:
        raise UserError(f"{where} must be readable: {first_line(error)}.") from error


def _check_kind(head: bytes, where: str) -> None:
    """Refuse what downloads leave in the place of weights: texts, which no weights begin with.

    Raises:
        UserError: If the file is a pointer of git-LFS, a web page or another text.
    """
    text = head.removeprefix(b"\xef\xbb\xbf").strip()
    if text.startswith(b"version https://git-lfs"):
        raise UserError(
            f"{where} must hold weights, but it is a git-LFS pointer, a text that stands for them: "
            "run `git lfs pull` in its repository, or download the file itself."
        )
    if not text or any(c < 32 and c not in b"\t\n\f\r" for c in text) or b"\x7f" in text:
        return
    with contextlib.suppress(UnicodeDecodeError):
        shown = " ".join(text[:-3].decode().split())[:40] if len(head) == 512 else None
        shown = " ".join(text.decode().split())[:40] if shown is None else shown
        if text.startswith(b"<"):
            raise UserError(
                f"{where} must hold weights, but it is a web page, as a download without a login "
                "or from a page's own address leaves: download the file itself."
            )
        if len(text) > 8:
            raise UserError(f"{where} must hold weights, but it is a text: {shown!r}.")


def _read_safetensors(path: Path, where: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))
            if not isinstance(facts, dict):
                raise ValueError("its metadata are not a dictionary")
            return {k: file.get_tensor(k) for k in file.keys()}, facts  # noqa: SIM118
    except (SafetensorError, ValueError) as error:
        raise UserError(_damaged(where, error)) from error


class _Nothing:
    """What a value of numpy's becomes: nothing of it is built, called or kept."""

    def __init__(self, *args: Any) -> None:
        """Take whatever the value would be made from."""

    def __new__(cls, *args: Any) -> "_Nothing":
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        """Keep nothing of it."""


# nnU-Net's checkpoints hold numbers and arrays of numpy in their logs; these names make them, in
# files of numpy 1 and 2
_NUMPY = ("multiarray.scalar", "multiarray._reconstruct", "numeric._frombuffer")
_OF_NUMPY: list[Any] = [
    (_Nothing, name)
    for name in (
        "numpy.ndarray",
        "numpy.dtype",
        *(f"numpy.{core}.{name}" for core in ("core", "_core") for name in _NUMPY),
    )
]


# what makes the numbers themselves, and nothing else
_scalar = numpy.float64().__reduce__()[0]
_NUMBERS: list[Any] = [(_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
_NUMBERS += [numpy.dtype, *{type(numpy.dtype(kind)) for kind in "?bBhHiIlLqQefdg"}]


def load_with_numbers(path: Path) -> Any:
    """Return the content of a file of torch's with its numbers of numpy, without running its code.

    Tensors are not read before they are used.

    Raises:
        UserError: If it is missing, damaged or unsafe.
    """
    try:
        with torch.serialization.safe_globals(_NUMBERS):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # torch names no common class for what a damaged file can raise
        raise UserError(_refusal(path, str(path), error)) from error


def _read_pickle(path: Path, where: str) -> Contents:
    tensors: dict[str, Tensor] = {}
    try:
        with path.open("rb") as file, torch.serialization.safe_globals(_OF_NUMPY):
            # given a path, torch would go by its suffix
            content = torch.load(file, map_location="cpu", weights_only=True)
        run = _read_run(content)
        _flatten(content["network_weights"] if run else content, "", tensors)
    except Exception as error:  # torch names no common class for what a damaged file can raise
        raise UserError(_refusal(path, where, error)) from error
    if not tensors:
        raise UserError(f"{where} must hold tensors, but it holds none.")
    return Contents(tensors, run=run)


def _read_run(content: Any) -> dict[str, Any]:
    """Return what a checkpoint of nnU-Net says of its training; nothing for any other content."""
    if not isinstance(content, dict) or not isinstance(content.get("network_weights"), dict):
        return {}
    run: dict[str, Any] = {"trainer": str(content.get("trainer_name", "an unknown trainer"))}
    with contextlib.suppress(LookupError, TypeError, AttributeError):
        arguments = content["init_args"]
        configurations = arguments["plans"]["configurations"]
        network = configurations[arguments["configuration"]]["architecture"]["arch_kwargs"]
        run |= {"architecture": dict(network["backbone"]), "network": network}
        if _is_cascaded(configurations, arguments["configuration"]):
            facts = arguments["dataset_json"]
            run["image_channels"] = len(facts.get("channel_names") or facts["modality"])
        run["intensity"] = _ct_contract(arguments["plans"], arguments["configuration"])
    return run


def _ct_contract(plans: dict[str, Any], name: str) -> dict[str, Any] | None:
    """Return how nnU-Net normalised a single channel of CT; None for any other."""
    schemes = _inherited(plans["configurations"], name, "normalization_schemes")
    if list(schemes or ()) != ["CTNormalization"]:
        return None
    facts = plans["foreground_intensity_properties_per_channel"]["0"]
    low, high, mean, std = (
        float(facts[key]) for key in ("percentile_00_5", "percentile_99_5", "mean", "std")
    )
    if not low < high:
        return None
    return {"unit": "HU", "clip": [low, high], "mean": mean, "std": max(std, 1e-8)}


def _inherited(configurations: dict[str, Any], name: str, key: str) -> Any:
    """Return what a configuration of nnU-Net's plans says, or the one that it inherits from."""
    for _ in configurations:
        configuration = configurations[name]
        if key in configuration or "inherits_from" not in configuration:
            return configuration.get(key)
        name = configuration["inherits_from"]
    return None


def _is_cascaded(configurations: dict[str, Any], name: str) -> bool:
    """Return whether a configuration of nnU-Net's plans gets the labels of an earlier stage too."""
    return _inherited(configurations, name, "previous_stage") is not None


def _refusal(path: Path, where: str, error: Exception) -> str:
    """Return what to say of a file that torch did not open."""
    with contextlib.suppress(Exception):  # what a damaged archive can raise
        if said := pickles.other_kind(path, where):
            return said
    if isinstance(error, pickle.UnpicklingError):
        is_pickle = _head(path, where)[:1] == b"\x80"  # and not any bytes with an unknown operand
        names_one = "GLOBAL" in str(error) or (is_pickle and "Unsupported" in str(error))
        if names_one or pickles.names_in(path):
            return pickles.unsafe(path, where, str(error))
    return _damaged(where, error)


def _damaged(where: str, error: Exception) -> str:
    reason = first_line(error)
    if "weights_only" in reason:  # torch's advice is to run whatever is in the file
        reason = "its content is of no known kind"
    return f"{where} must be a whole safetensors or torch file, but it is damaged: {reason}."


def _flatten(content: Any, prefix: str, out: dict[str, Tensor]) -> None:
    """Collect the tensors of nested dictionaries under dotted keys; the rest are not weights."""
    if isinstance(content, Tensor):
        out[prefix] = content
    elif isinstance(content, dict):
        for key, value in content.items():
            _flatten(value, f"{prefix}.{key}" if prefix else str(key), out)


class _IndexUnpickler(pickle.Unpickler):
    """Unpickle a distributed checkpoint's index: torch's records of shapes, dtypes and places."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _INDEX_NAMES or (module in _INDEX_MODULES and "." not in name):
            found = super().find_class(module, name)
            if (module, name) in _INDEX_NAMES or isinstance(found, type):
                return found
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint's index")


class _Reader(FileSystemReader):
    """A reader whose index cannot run code; torch reads the tensors with weights_only."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata = _IndexUnpickler(file).load()
        if getattr(metadata, "storage_meta", None) is None:  # written by an older torch
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def _read_distributed(path: Path, where: str) -> dict[str, Tensor]:
    """Read every tensor of a distributed checkpoint in one process, without optimiser states."""
    reader = _Reader(path)
    try:
        entries = reader.read_metadata().state_dict_metadata
        state = {
            key: torch.empty(entry.size, dtype=entry.properties.dtype)
            for key, entry in entries.items()
            if isinstance(entry, TensorStorageMetadata) and not key.startswith("optimizer")
        }
        load(state, storage_reader=reader, no_dist=True)
    except (Exception, CheckpointException) as error:  # the latter is not an Exception
        cause: BaseException = error
        if isinstance(error, CheckpointException) and error.failures:
            cause = next(iter(error.failures.values()))[0]
        raise UserError(
            f"{where} must be a whole distributed checkpoint, but it is damaged or unsafe: "
            f"{first_line(cause)}."
        ) from error
    return state
