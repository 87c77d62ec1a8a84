"""What a pickled file would run, told without running it, and how to get its tensors out."""

import io
import json
import pickle
import re
import shlex
import tarfile
import zipfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of torch's files before 1.6
_PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}
_LEGACY_PICKLES = 4  # of such a file: that number, a version, the system, the content
# names of the standard library that describe a run or hold values, and run nothing of a user's
_HARMLESS = {
    "_codecs.encode",
    "argparse.Namespace",
    "copyreg._reconstructor",
    "decimal.Decimal",
    "fractions.Fraction",
    "types.SimpleNamespace",
    "uuid.UUID",
    *(f"builtins.{name}" for name in ("bool", "bytearray", "bytes", "complex", "dict", "float")),
    *(f"builtins.{name}" for name in ("frozenset", "int", "list", "object", "range", "set")),
    *(f"builtins.{name}" for name in ("slice", "str", "tuple")),
    *(f"collections.{name}" for name in ("Counter", "OrderedDict", "defaultdict", "deque")),
    *(f"datetime.{name}" for name in ("date", "datetime", "time", "timedelta", "timezone")),
    *(
        f"pathlib{local}.{pure}{kind}Path"
        for local in ("", "._local")
        for pure in ("", "Pure")
        for kind in ("", "Posix", "Windows")
    ),
    *(f"typing.{name}" for name in ("Any", "Dict", "List", "Optional", "Tuple", "Union")),
    # what a state dict is made of that somebody pickled without torch.save
    "torch.storage._load_from_bytes",
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
    "torch.nn.parameter.Parameter",
    "torch.Size",
    "torch.device",
    "torch.Tensor",
}
# libraries whose classes hold the settings of a run
_OF_SETTINGS = {"addict", "easydict", "fvcore", "lightning", "lightning_fabric", "mmcv", "mmengine"}
_OF_SETTINGS |= {"lightning_utilities", "ml_collections", "omegaconf", "pytorch_lightning", "yacs"}
_OF_NUMPY = re.compile(
    r"numpy\.(?:ndarray|dtype|dtypes\.\w+DType"
    r"|_?core\.(?:multiarray\.(?:scalar|_reconstruct)|numeric\._frombuffer)"
    r"|random\.(?:_pickle\.__\w+_ctor|_\w+\.[A-Z]\w*|mtrand\.RandomState"
    r"|bit_generator\.(?:__pyx_unpickle_)?SeedSequence))"
)
_OF_TORCH = re.compile(r"torch\.(?:storage\.)?(?:\w+Storage|b?float\w*|u?int\w+|bool|double|half)")
# what tensors, arrays and plain values are made of, which says little of a file
_OF_VALUES = (
    *("torch.", "builtins.", "_codecs.", "copyreg.", "collections.OrderedDict"),
    *("numpy._core", "numpy.core", "numpy.dtype", "numpy.ndarray"),
)
_KEEP = (
    "keep = lambda d: {k: keep(v) for k, v in d.items() if isinstance(v, (dict, torch.Tensor, "
    "numpy.ndarray))} if isinstance(d, dict) else torch.as_tensor(d)"
)


class _Inert:
    """What every class and function of a pickle becomes: nothing is called and nothing is kept."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "_Inert":
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take whatever the value would be made from."""

    def __call__(self, *args: Any, **kwargs: Any) -> "_Inert":
        return self

    def __setstate__(self, state: Any) -> None:
        """Keep nothing of it."""

    def __setitem__(self, key: Any, value: Any) -> None:
        """Keep nothing of it."""

    def append(self, value: Any) -> None:
        """Keep nothing of it."""

    def extend(self, values: Any) -> None:
        """Keep nothing of it."""

    add = append


def _as_bytes(text: Any, encoding: Any = None) -> Any:
    """Return bytes that Python 2 could not pickle, which are Latin-1 in the file."""
    is_text = isinstance(text, str) and encoding == "latin1"
    return text.encode("latin1") if is_text else _Inert()


class _Listing(pickle.Unpickler):
    """Reads a pickle with ``_Inert`` in the place of every name, and notes the names."""

    def __init__(self, file: io.BufferedIOBase) -> None:
        super().__init__(file)
        self.names: set[str] = set()

    def find_class(self, module: str, name: str) -> Any:
        """Note a name."""
        full = f"{_PYTHON_2.get(module, module)}.{name}"
        self.names.add(full)
        if full == "torch.storage._load_from_bytes":
            return self._note_inside
        return _as_bytes if full == "_codecs.encode" else _Inert

    def _note_inside(self, content: Any) -> _Inert:
        """Note the names of a storage that somebody pickled: a file of torch's in the file."""
        if not isinstance(content, bytes):
            raise pickle.UnpicklingError("a storage that cannot be looked into")
        self.names.update(*_listed(io.BytesIO(content)))
        return _Inert()

    def persistent_load(self, pid: Any) -> Any:
        """Return nothing for a tensor's storage."""
        return _Inert()


def names_in(path: Path) -> set[str] | None:
    """Return the dotted names that opening a file would import, without importing any.

    Returns:
        None if the file is no whole pickle, alone or in a file of torch's.
    """
    try:
        with path.open("rb") as file:
            return set().union(*_listed(file))
    except Exception:  # pickle names no common class for what a damaged file can raise
        return None


def _listed(file: io.BufferedIOBase) -> Iterator[set[str]]:
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            (name,) = (n for n in archive.namelist() if n.rpartition("/")[2] == "data.pkl")
            yield _names(io.BytesIO(archive.read(name)))[0]
        return
    file.seek(0)
    names, first = _names(file)
    yield names
    if first == _MAGIC:
        for _ in range(_LEGACY_PICKLES - 1):
            yield _names(file)[0]


def _names(file: io.BufferedIOBase) -> tuple[set[str], Any]:
    listing = _Listing(file)
    content = listing.load()
    return listing.names, content


def unsafe(path: Path, where: str, reason: str) -> str:
    """Return what to say of a pickled file that was not opened, since it would run code.

    A command is given only where all it names is known to be harmless.

    Args:
        path: The file.
        where: What to call it.
        reason: What torch said.
    """
    names = names_in(path) or set()
    odd = sorted(name for name in names if not _is_harmless(name))
    if not names or odd:
        named = ", ".join(odd[:3]) or reason.partition("GLOBAL ")[2].split(" ")[0]
        return (
            f"{where} must hold tensors only, but it would run Python code when opened"
            f"{f' ({named})' if named else ''} and was not: get the file as safetensors or as a "
            "plain state dict, as `torch.save(model.state_dict(), FILE)` writes it in the program "
            "that the file comes from."
        )
    of_torch = zipfile.is_zipfile(path) or _is_legacy(path)
    load = 'torch.load({0}, map_location="cpu", weights_only=False)'
    read = load if of_torch else 'pickle.load(open({0}, "rb"))'
    shown = sorted(name for name in names if not name.startswith(_OF_VALUES)) or sorted(names)
    return (
        f"{where} must hold tensors only, but it also holds objects of {', '.join(shown[:3])}, "
        "which would run Python code when opened, and was not opened: if you trust it, write its "
        f"tensors to a file of their own with {_command(path, f'{_KEEP}; ', f'keep({read})')}"
        f"{f', where {chr(44).join(absent)} is installed' if (absent := _missing(names)) else ''}."
    )


def other_kind(path: Path, where: str) -> str | None:
    """Return what to say of a file of a known kind that is not read, None for any other.

    Args:
        path: The file.
        where: What to call it.
    """
    with path.open("rb") as file:
        head = file.read(8)
    if head.startswith(b"\x93NUMPY"):
        return (
            f"{where} must hold the tensors of a network by name, but it is one array of NumPy's: "
            "give the checkpoint itself."
        )
    if tarfile.is_tarfile(path):
        read = 'torch.load({0}, map_location="cpu", weights_only=False)'
        return (
            f"{where} must be a file of safetensors or torch, but it is a tar archive: if it is a "
            "checkpoint of torch before 0.2, which would run Python code when opened, and you "
            f"trust it, convert it with {_command(path, f'{_KEEP}; ', f'keep({read})')}, "
            "else unpack it."
        )
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        inside = archive.namelist()
    if any(name.endswith(".npy") for name in inside):
        read = "{{k: torch.from_numpy(v) for k, v in numpy.load({0}).items()}}"
        return (
            f"{where} must be a file of safetensors or torch, but it holds arrays of NumPy's: "
            f"convert it with {_command(path, '', read)}."
        )
    if any(name.endswith("constants.pkl") for name in inside):
        return (
            f"{where} must hold tensors only, but it is a TorchScript archive, which holds a "
            "program too and was not opened: if you trust it, convert it with "
            f"{_command(path, '', 'torch.jit.load({0}).state_dict()')}."
        )
    if not any(name.endswith("data.pkl") for name in inside):
        return (
            f"{where} must be a file of safetensors or torch, but it is a zip archive: unpack it."
        )
    return None


def _is_legacy(path: Path) -> bool:
    with path.open("rb") as file:
        return _names(file)[1] == _MAGIC


def _is_harmless(name: str) -> bool:
    if name in _HARMLESS or _OF_NUMPY.fullmatch(name) or _OF_TORCH.fullmatch(name):
        return True
    module, _, last = name.rpartition(".")
    return last[:1].isupper() and module.split(".")[0] in _OF_SETTINGS


def _missing(names: set[str]) -> list[str]:
    """Return the packages that names are of and that are not installed."""
    packages = {name.partition(".")[0] for name in names}
    return sorted(package for package in packages if find_spec(package) is None)


def _command(path: Path, before: str, content: str) -> str:
    """Return a command for a shell that writes tensors to a file beside another."""
    target = json.dumps(str(path.with_suffix(".tensors.pth")))
    content = content.format(json.dumps(str(path)))
    code = f"import numpy, pickle, torch; {before}torch.save({content}, {target})"
    return f"`python -c {shlex.quote(code)}`"
