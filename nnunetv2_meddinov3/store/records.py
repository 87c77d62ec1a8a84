"""What a store knows of a volume and its slices, and the names it gives them."""

from __future__ import annotations

import hashlib
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nnunetv2_meddinov3 import files
from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.store import layout

NEAR_EXCLUDED = "near_excluded"  # flag of a slice that looks like one which must not enter


@dataclass(frozen=True)
class SliceRecord:
    """One slice of a stored array.

    Attributes:
        index: Place in the stored array.
        z: Place in the volume the slice was taken from, counted from the caudal end.
        position_mm: Position along z in mm, None where unknown.
        sha256: Of the int16 little-endian values as stored, row by row.
        phash: Perceptual hash, 16 hexadecimal digits.
        body_fraction: Share of pixels inside the body.
        saturated_fraction: Share of pixels at the end of the scanner's range.
        padding_fraction: Share of pixels outside the field of view.
        hu_min: Smallest stored value (HU for CT).
        hu_max: Largest stored value.
        hu_mean: Mean of the stored values.
        flags: What a reader may want to leave out, such as ``NEAR_EXCLUDED``.
    """

    index: int
    z: int
    position_mm: float | None
    sha256: str
    phash: str
    body_fraction: float
    saturated_fraction: float
    padding_fraction: float
    hu_min: float
    hu_max: float
    hu_mean: float
    flags: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class VolumeRecord:
    """One source that entered a store.

    Attributes:
        source_key: The source's stable name; a store holds one record per source key.
        source_sha256: Hash of the source's files.
        dataset: Dataset the source belongs to.
        patient: Patient or case within the dataset.
        modality: ``"CT"``, ``"MR"``, ``"PT"``, ``"US"``, ``"XR"`` or ``"unknown"``.
        windowed: True where the values are 8-bit grey levels and not HU.
        spacing_mm: (z, y, x) of the stored array in mm, None where unknown.
        orientation: Axes of the source before it was brought to LPS.
        shape: (S, H, W) of the stored array.
        slices: One record for each slice of the array, in its order.
        left_out: (z, reason) of the slices that did not enter.
        intensity: What the values mean where they are not HU, None for CT in HU:
            ``mapping.Mapping.facts``, of 8-bit pictures (and of whole numbers in stores of before)
            ``low`` and ``high`` alone, as they were and as ``stored_low`` and ``stored_high``.
        notes: Remarks of reading.
        versions: Name to version of the tools that made the array.
        volume_id: Name of the array, see ``volume_identity``; filled in by the writer.
        array_sha256: Hash of the compressed array file; filled in by the writer.
        array_bytes: Size of that file; filled in by the writer.
    """

    source_key: str
    source_sha256: str
    dataset: str
    patient: str
    modality: str
    windowed: bool
    spacing_mm: tuple[float, float, float] | None
    orientation: str
    shape: tuple[int, int, int]
    slices: list[SliceRecord]
    left_out: list[tuple[int, str]] = field(default_factory=list)
    intensity: dict[str, float] | None = None
    notes: tuple[str, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    volume_id: str = ""
    array_sha256: str = ""
    array_bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON can hold it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> VolumeRecord:
        """Return the record of ``to_dict``'s values, also after a trip through JSON."""
        spacing = values["spacing_mm"]
        return cls(
            **{
                **values,
                "spacing_mm": None if spacing is None else tuple(spacing),
                "shape": tuple(values["shape"]),
                "slices": [SliceRecord(**each) for each in values["slices"]],
                "left_out": [(z, reason) for z, reason in values["left_out"]],
                "notes": tuple(values["notes"]),
            }
        )


_QUOTED = re.compile(r"""(?<!\w)(?:'[^']*'|"[^"]*")(?!\w)""")
_DIGEST = re.compile(r" ?\b[0-9a-f]{16,}\b")
_ONE = re.compile(r"(?<![\w.-])1 ((?:[a-z-]+ )?(?:slice|image|localizer|pixel|volume))\b")
_NUMBER = r"(?<![\w.-])-?\d+(?:\.\d+)?(?:e[+-]?\d+)?(?:x\d+)*(?![\w-]|\.\d)"
_FILES = re.compile(r"(\bimages? left out, [^:]+): .*|(\bas the labels of ).+( beside it)")
_NUMBERS = re.compile(rf"{_NUMBER}(?:, {_NUMBER})*")


def kind_of(remark: str) -> str:
    """Return a note or a reason without what differs from source to source.

    Numbers become N, what is in quotes becomes ..., hashes and names of files go: "3 duplicate
    slices left out" is "N duplicate slices left out", and so is that of one slice.
    """
    text = _FILES.sub(lambda found: found[1] or f"{found[2]}...{found[3]}", remark)
    text = _DIGEST.sub("", _QUOTED.sub("...", text))
    return _NUMBERS.sub("N", _ONE.sub(r"1 \1s", text))


def read_record(path: Path) -> VolumeRecord:
    """Read one record.

    Raises:
        FileNotFoundError: If there is none.
        Damaged: If it is not what was written.
    """
    return VolumeRecord.from_dict(layout.unsealed(path.read_bytes(), "record_sha256"))


def read_frame(folder: Path, record: VolumeRecord) -> bytes:
    """Return the bytes of the array file of a record.

    Raises:
        UserError: If it is missing, or not what was written.
    """
    path = folder / layout.array_name(record.volume_id)
    frame = path.read_bytes() if path.is_file() else b""
    if files.sha256(frame) != record.array_sha256:
        raise UserError(
            f"the array {path} (from {record.source_key}) must be as it was written, but is "
            f"missing or damaged: repair that store first, `meddinov3 store verify {folder}` says "
            "how."
        )
    return frame


def volume_identity(slices: np.ndarray) -> str:
    """Return the name of an array: 32 hexadecimal digits from its int16 values and its shape.

    Equal arrays have equal names, so copies of a volume share one array file.

    Args:
        slices: (S, H, W) int16.
    """
    digest = hashlib.sha256("x".join(map(str, slices.shape)).encode())
    digest.update(np.ascontiguousarray(slices, dtype="<i2").data)
    return digest.hexdigest()[:32]
