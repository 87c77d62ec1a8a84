"""Names by which public test sets are known, so that pretraining on them is no accident."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from nnunetv2_meddinov3.curate.volume import VolumeSource
from nnunetv2_meddinov3.errors import UserError

# The benchmarks of the paper (MedDINOv3, sec. 4.1), as lower-case words joined by "_". Task 3 of
# the Medical Segmentation Decathlon is LiTS.
_PATTERNS = {
    "AMOS22": r"amos(_?(20)?22)?",
    "BTCV": r"btcv|abdomen_?btcv|synapse",
    "KiTS23": r"kits(_?(20)?\d\d)?",
    "LiTS": r"lits(_?(20)?17)?|(task|dataset)_?0*3_liver|msd_liver",
}
# Collections that hold images of these benchmarks, as their publications say.
_CONTAIN = {
    r"abdomen_?ct_?1k": ("KiTS23", "LiTS"),
    r"ct_?org": ("LiTS",),
    r"abdomen_?atlas(_?[\d_]*(mini|pro)?)?": ("AMOS22", "BTCV", "KiTS23", "LiTS"),
}
DEFAULT_BENCHMARKS = tuple(_PATTERNS)


def check_benchmarks(
    sources: Iterable[VolumeSource],
    arguments: Sequence[Path],
    exclude: Sequence[Path],
    names: Sequence[str] = DEFAULT_BENCHMARKS,
) -> None:
    """Refuse sources that look like a benchmark for which nothing is excluded.

    Names only raise the question; what is then left out is decided by content.

    Args:
        sources: what was found.
        arguments: the sources as given.
        exclude: what must not enter, as given.
        names: the benchmarks, those of the paper or others by their own names.

    Raises:
        UserError: If a name of a source, or of a folder or file in it, is that of a benchmark or
            of a collection that contains it, and none of ``exclude`` has such a name.
    """
    texts = {source.dataset for source in sources}
    texts |= {part for source in sources for part in source.key.split("#")[0].split("/")}
    texts |= {part for path in arguments for part in path.resolve().parts[-2:]}
    covered = {part for path in exclude for part in path.resolve().parts}
    for name in names:
        suspects = sorted(text for text in texts if _holds(text, name))
        if suspects and not any(_is(text, name) for text in covered):
            raise UserError(
                f"The test images of {name} must not enter, but the sources hold {suspects[0]!r} "
                f"and no --exclude has a name like {name}: give --exclude with its test images, "
                "or --allow-benchmarks if you will not measure on it."
            )


def _is(text: str, name: str) -> bool:
    pattern = _PATTERNS.get(name, re.escape(_words(name)))
    return re.search(rf"(?<![a-z0-9])({pattern})(?![a-z0-9])", _words(text)) is not None


def _holds(text: str, name: str) -> bool:
    if _is(text, name):
        return True
    return any(
        name in contained and re.search(rf"(?<![a-z0-9])({pattern})(?![a-z0-9])", _words(text))
        for pattern, contained in _CONTAIN.items()
    )


def _words(text: str) -> str:
    """Lower-case words and numbers joined by "_"."""
    return "_".join(re.findall(r"[a-z0-9]+", text.lower()))
