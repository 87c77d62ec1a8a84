"""Tensors in files and folders of any known format, read without running their code."""

import contextlib
import json
import os
import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, FileSystemReader, load
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from nnunetv2_meddinov3.errors import UserError, first_line
from nnunetv2_meddinov3.files import existing

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
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)


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
    for shard in shards:
        tensors, facts = _read_file(shard, where if len(shards) == 1 else str(shard))
        state.update(tensors)
        metadata.update(facts)
    return Contents(state, metadata, _read_config(shards[0].parent / "config.json"))


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


def _read_file(path: Path, where: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with path.open("rb") as file:
            head = file.read(9)
    except OSError as error:
        raise UserError(f"{where} must be readable: {first_line(error)}.") from error
    if head[8:9] == b"{" or (path.suffix == ".safetensors" and head[:2] != b"PK"):
        return _read_safetensors(path, where)
    return _read_pickle(path, where), {}


def _read_safetensors(path: Path, where: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))
            if not isinstance(facts, dict):
                raise ValueError("its metadata are not a dictionary")
            return {k: file.get_tensor(k) for k in file.keys()}, facts  # noqa: SIM118
    except (SafetensorError, ValueError) as error:
        raise UserError(_damaged(where, error)) from error


def _read_pickle(path: Path, where: str) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = {}
        with path.open("rb") as file:  # given a path, torch would go by its suffix
            _flatten(torch.load(file, map_location="cpu", weights_only=True), "", tensors)
    except pickle.UnpicklingError as error:
        if "Unsupported" in str(error) or "GLOBAL" in str(error):
            raise UserError(
                f"{where} must hold tensors only, but it would run Python code when opened and was "
                "not: get the file as safetensors or as a plain state dict (nnU-Net's own "
                "checkpoints go to -pretrained_weights)."
            ) from error
        raise UserError(_damaged(where, error)) from error
    except Exception as error:  # torch names no common class for what a damaged file can raise
        raise UserError(_damaged(where, error)) from error
    if not tensors:
        raise UserError(f"{where} must hold tensors, but it holds none.")
    return tensors


def _damaged(where: str, error: Exception) -> str:
    reason = first_line(error)
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
