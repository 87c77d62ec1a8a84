"""Where weights come from: paths, timm, the Hugging Face hub, torch.hub, or nowhere on purpose.

Heavy libraries are imported where they are used, so that the doctor and commands start fast.
"""

import contextlib
import difflib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nnunetv2_meddinov3.errors import UserError, first_line
from nnunetv2_meddinov3.files import existing

if TYPE_CHECKING:
    from torch import Tensor

VARIABLE = "MEDDINOV3_WEIGHTS"
DINOV3_REPOSITORY = "facebookresearch/dinov3"
FORMS = (
    "a path, timm:NAME, hf:OWNER/REPO/FILE[@REV], torchhub:ENTRY[@REPO_DIR][=WEIGHTS_FILE] or none"
)


@dataclass(frozen=True)
class Source:
    """A parsed value of ``MEDDINOV3_WEIGHTS``.

    Attributes:
        kind: ``path``, ``timm``, ``hf``, ``torchhub`` or ``none``.
        name: The path, model name, file in the repository, or hub entry.
        repository: Hub repository, or the folder of a local torch.hub clone.
        revision: Of the hub repository.
        file: Weights file for a torch.hub entry.
    """

    kind: str
    name: str = ""
    repository: str | None = None
    revision: str | None = None
    file: str | None = None


def parse_source(value: str | os.PathLike[str]) -> Source:
    """Parse a source of weights.

    Raises:
        UserError: If the value has none of the known forms.
    """
    text = os.fspath(value).strip()
    if text.lower() == "none":
        return Source("none")
    kind, colon, rest = text.partition(":")
    patterns = {
        "timm": r"(?P<name>[\w.\-]+)",
        "hf": r"(?P<repository>[\w.\-]+/[\w.\-]+)/(?P<name>[^@]+)(?:@(?P<revision>.+))?",
        "torchhub": r"(?P<name>\w+)(?:@(?P<repository>[^=]+))?(?:=(?P<file>.+))?",
    }
    if colon and kind in patterns:
        if match := re.fullmatch(patterns[kind], rest):
            return Source(kind, **match.groupdict())
        raise UserError(f"weights must be {FORMS}, got {text!r}.")
    if not text or re.match(r"[A-Za-z]\w+:", text):
        raise UserError(f"weights must be {FORMS}, got {text!r}.")
    return Source("path", text)


def fetch(value: str | os.PathLike[str]) -> Path:
    """Return the local file of a source, downloading it to the hub's cache where needed.

    Raises:
        UserError: If it cannot be reached; the sentence says what to set instead.
    """
    source = parse_source(value)
    if source.kind == "path":
        return existing(source.name) or Path(source.name)
    if source.kind not in ("timm", "hf"):
        raise UserError(f"only timm: and hf: sources can be fetched to a file, got {str(value)!r}.")
    return _download(value, *_hub_file(source))


def _hub_file(source: Source) -> tuple[str, str, str | None]:
    """Return repository, file and revision on the hub."""
    if source.kind == "hf":
        return str(source.repository), source.name, source.revision
    from timm.models import get_pretrained_cfg, list_models

    try:
        config = get_pretrained_cfg(source.name)
    except RuntimeError:
        config = None
    if config is None or not config.hf_hub_id or "dinov3" not in source.name:
        names = list_models("*vit*dinov3*", pretrained=True)
        near = difflib.get_close_matches(source.name, names, n=3) or names[:3]
        raise UserError(
            f"timm must know the DINOv3 ViT, but has no weights for {source.name!r}: try "
            f"{', '.join(near)}."
        )
    repository = config.hf_hub_id
    if repository.endswith("/"):  # timm's short form for "the model's own name"
        tag = f".{config.tag}" if config.tag else ""
        repository += f"{config.architecture}{tag}"
    return repository, config.hf_hub_filename or "model.safetensors", None


def _download(value: object, repository: str, file: str, revision: str | None) -> Path:
    import huggingface_hub as hub

    try:
        with _quiet_hub():
            path = Path(hub.hf_hub_download(repository, file, revision=revision))
    except Exception as error:  # the hub's, its HTTP client's and the disk's errors alike
        raise UserError(
            f"the weights {value} must be reachable, but {_why_not(error)}: set {VARIABLE} to a "
            "local file (`meddinov3 weights fetch` on a machine with a connection gets it), to "
            "another source, or to none for random initialisation."
        ) from error
    if path.suffix == ".safetensors":  # transformers keeps heads and epsilon in a file beside it
        with contextlib.suppress(Exception), _quiet_hub():
            folder = Path(file).parent.as_posix()
            beside = "config.json" if folder == "." else f"{folder}/config.json"
            hub.hf_hub_download(repository, beside, revision=revision)
    return path


@contextlib.contextmanager
def _quiet_hub() -> Iterator[None]:
    """Silence the hub's log for a moment: our sentence says what its retries would."""
    from huggingface_hub.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _why_not(error: Exception) -> str:
    kinds = {type(e).__name__ for e in _chain(error)}
    if "GatedRepoError" in kinds:
        return "the repository is gated (accept its terms and log in with `hf auth login`)"
    if kinds & {"RepositoryNotFoundError", "EntryNotFoundError", "RevisionNotFoundError"}:
        return "the hub has no such repository, file or revision"
    if kinds & {
        "LocalEntryNotFoundError",
        "OfflineModeIsEnabled",
        "ConnectError",
        "ConnectionError",
    }:
        return "this machine is offline and its cache does not hold them"
    return first_line(error)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _missing(source: Source) -> str | None:
    """Say which path of a torch.hub source is missing; OWNER/REPO stands for one on GitHub."""
    folder, file = source.repository, source.file
    is_github = folder and re.fullmatch(r"[\w-]+/[\w.-]+(?::[\w./-]+)?", folder)
    if folder and not is_github and not ((found := existing(folder)) and found.is_dir()):
        return f"there is no folder {folder}: check the clone's path"
    if file and not ((found := existing(file)) and found.is_file()):
        return f"there is no file {file}: check the path"
    return None


def read_torch_hub(source: Source, where: str) -> "tuple[dict[str, Tensor], float | None]":
    """Build a torch.hub entry and take its weights; the repository's own code runs, as it must.

    Args:
        source: Of the kind ``torchhub``.
        where: What to call it in an error.

    Returns:
        The state dict, and the epsilon of the final norm if it has one.

    Raises:
        UserError: If a path is missing or the entry does not load.
    """
    import torch

    if missing := _missing(source):
        raise UserError(f"the torch.hub entry {where} must load, but {missing}.")
    local = existing(source.repository) if source.repository else None
    arguments = {"weights": str(existing(source.file))} if source.file else {}
    try:
        module = torch.hub.load(
            str(local) if local else source.repository or DINOV3_REPOSITORY,
            source.name,
            source="local" if local else "github",
            **({} if local else {"trust_repo": True}),
            **arguments,
        )
        return module.state_dict(), getattr(getattr(module, "norm", None), "eps", None)
    except (Exception, SystemExit) as error:  # the repository's code may raise anything
        raise UserError(
            f"the torch.hub entry {where} must load, but it says: {first_line(error)} (give "
            "a local clone after @ and a weights file after =)."
        ) from error


def describe_weights_source(value: str) -> tuple[bool, str]:
    """Say whether a source can be read here, without downloading anything.

    Returns:
        Whether it can be used as it is, and a sentence.
    """
    try:
        source = parse_source(value)
        if source.kind == "none":
            return True, "no pretrained weights: random initialisation"
        if source.kind == "path":
            if existing(source.name):
                return True, f"{value} exists"
            return False, f"{value} does not exist: check the path"
        if source.kind == "torchhub":
            if missing := _missing(source):
                return False, missing
            place = source.repository or f"{DINOV3_REPOSITORY} on GitHub, which needs a connection"
            return True, f"entry {source.name} of {place}"
        repository, file, revision = _hub_file(source)
    except UserError as error:
        return False, str(error)
    return _ask_hub(value, repository, file, revision)


def _ask_hub(value: str, repository: str, file: str, revision: str | None) -> tuple[bool, str]:
    import huggingface_hub as hub

    cached = hub.try_to_load_from_cache(repository, file, revision=revision)
    if isinstance(cached, str):
        return True, f"{value} is in the hub's cache"
    try:
        url = hub.hf_hub_url(repository, file, revision=revision)
        hub.get_hf_file_metadata(url, timeout=10)
    except Exception as error:  # as in _download
        return False, (
            f"{value} is not available: {_why_not(error)}; set {VARIABLE} to a local "
            "file, or fetch it on a machine with a connection (`meddinov3 weights fetch`)"
        )
    return True, f"{value} will be downloaded at the first training"
