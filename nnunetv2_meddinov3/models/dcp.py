"""torch.distributed.checkpoint folders, read without trusting their pickled index."""

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, FileSystemReader, load
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from nnunetv2_meddinov3.errors import UserError

_ALLOWED_MODULES = (
    "torch.distributed.checkpoint.metadata",
    "torch.distributed.checkpoint.filesystem",
)
_ALLOWED = {
    ("torch", "Size"),
    ("torch", "device"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib", "Path"),
}


class _IndexUnpickler(pickle.Unpickler):
    """Unpickle a checkpoint index: only torch's own records of shapes, dtypes and places."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED or (module in _ALLOWED_MODULES and "." not in name):
            found = super().find_class(module, name)
            if (module, name) in _ALLOWED or isinstance(found, type):
                return found
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint's index")


class _Reader(FileSystemReader):
    """A reader whose index cannot run code; torch reads the tensors with weights_only."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata = _IndexUnpickler(file).load()
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = super().storage_meta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def is_dcp(path: Path) -> bool:
    """Return whether a folder is a torch.distributed.checkpoint."""
    return (path / ".metadata").is_file()


def read_dcp(path: Path, where: str) -> dict[str, Tensor]:
    """Read every tensor of a distributed checkpoint, on one process, optimiser states left out.

    Raises:
        UserError: If the folder is damaged or its index holds anything but an index.
    """
    reader = _Reader(path)
    try:
        entries = reader.read_metadata().state_dict_metadata
        state = {
            key: torch.empty(entry.size, dtype=entry.properties.dtype)
            for key, entry in entries.items()
            if isinstance(entry, TensorStorageMetadata) and not key.startswith("optimizer")
        }
        load(state, storage_reader=reader, no_dist=True)
    except (Exception, CheckpointException) as error:  # the latter is no Exception
        cause: BaseException = error
        if isinstance(error, CheckpointException) and error.failures:
            cause = next(iter(error.failures.values()))[0]
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        raise UserError(
            f"{where} must be a whole distributed checkpoint, but it is damaged or unsafe: "
            f"{reason[:200]}"
        ) from error
    return state
