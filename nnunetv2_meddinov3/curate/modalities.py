"""What names and values tell of a volume: modality, label maps, padding, range of intensities."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np

from nnunetv2_meddinov3.curate.volume import Unreadable, Volume, VolumeSource
from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.store.mapping import mapping_of

# Names of a store's modalities, DICOM's where it has one; "unknown" is what none of them is.
MODALITIES = {
    "CT": "computed tomography in HU",
    "MR": "magnetic resonance",
    "PT": "positron emission tomography",
    "US": "ultrasound",
    "XR": "X-ray projection",
}
_NAMES = {
    "CT": re.compile(r"ct"),
    "MR": re.compile(r"mri?|t[12](w|c|ce|gd|n|star)*|flair|pdw?|adc|dwi|swi|dce|cbf|cbv|bold"),
    "PT": re.compile(r"pet|pt|suv"),
    "US": re.compile(r"us|ultrasound"),
    "XR": re.compile(r"x_?ray|xr|cr|dx"),
}
BONE, SHIFTED_TISSUE = (300, 700), (900, 1200)  # the second where 1024 was not subtracted
MIN_HU_SPAN = 40  # noise alone spans more; values scaled to 0..1 or by their deviation do not
HU_AIR = -200  # below fat; a CT with none of this shows no air at all
HU_RANGE = (-4000, 4000)  # where nearly all voxels of a CT lie, padding included
MAX_LABELS = 256
LABEL_PATCHES = 0.6  # share of a label map's voxels, at least, whose neighbour is the same
FEW_VALUES = 16  # no image has so few
NEAR = 24  # of 255: how far lossy compression takes the values of a mask
SAMPLED = 16  # slices looked at for label maps
MAX_SAMPLE = 4_000_000  # voxels that HU are judged by


_LEFT_OUT = (
    "modality unknown: pretraining leaves it out unless data.modalities names unknown, or "
    "--modality said what it is"
)


def check_modality(modality: str | None) -> None:
    """Refuse a stated modality that is none.

    Raises:
        UserError: With those that are.
    """
    if modality is not None and modality not in MODALITIES:
        known = ", ".join(f"{name} ({what})" for name, what in MODALITIES.items())
        raise UserError(f"--modality must be one of {known}, got {modality!r}.")


def identify(volume: Volume, source: VolumeSource, stated: str | None = None) -> Volume:
    """Add what the values tell: modality, range of intensities, and remarks for the record.

    Args:
        volume: As it was read; its modality is known where the file says it.
        source: Where it comes from; an nnU-Net channel's name tells the modality too.
        stated: The modality of volumes that say none themselves (``--modality``).

    Raises:
        Unreadable: If it is a label map.
    """
    array, notes = volume.array, list(volume.notes)
    _refuse_labels(volume, source)
    modality = _said(volume, source, stated, notes)
    # 8 bits are a window of HU, or of what nobody said; of MR they are its values like any others
    windowed = volume.windowed and modality in ("CT", "unknown", None)
    if modality is None:
        is_hu = not windowed and looks_like_hu(array) and hu_fault(array) is None
        modality = "CT" if is_hu else "unknown"
        notes.append(f"modality guessed from the values: {modality}")
    elif modality == "CT" and not windowed:
        if fault := hu_fault(array):
            modality = "unknown"
            notes.append(f"said to be CT, but its values are no HU: {fault}")
        elif not looks_like_hu(array):
            notes.append("said to be CT, but its values show no air")
    elif modality not in ("CT", "unknown") and looks_like_hu(array) and hu_fault(array) is None:
        notes.append(f"said to be {modality}, but its values look like HU")
    intensity = None
    if windowed:
        intensity = {"low": 0.0, "high": 255.0}  # the ends of the window
        notes.append("8-bit values, taken as windowed")
    elif modality != "CT":
        intensity = mapping_of(array).facts()
        if modality == "unknown":
            notes.append(_LEFT_OUT)
    elif (padding := padding_value(array)) is not None:
        share = np.count_nonzero(array == padding) / array.size
        notes.append(f"padding value {padding} outside the field of view ({share:.0%}), kept")
    return replace(
        volume, modality=modality, windowed=windowed, intensity=intensity, notes=tuple(notes)
    )


def _refuse_labels(volume: Volume, source: VolumeSource) -> None:
    array = volume.array
    if source.kind == "png":
        if looks_like_mask_picture(array):
            raise Unreadable("it looks like a picture of labels (few values), not an image")
    elif looks_like_labels(array) or (
        few_values(array) and np.ptp(array) <= MAX_LABELS and not volume.windowed
    ):
        raise Unreadable("it looks like a label map (few whole numbers, in patches), not an image")


def _said(volume: Volume, source: VolumeSource, stated: str | None, notes: list[str]) -> str | None:
    """Return the modality that is said: by the file, by its channel's name, else by the user.

    DICOM says its own, also where that is that the way to HU is not known.
    """
    own = volume.modality or modality_of_name(source.channel_name)
    if stated is None or (source.kind == "dicom" and own is None):
        return own
    if own is not None and own != stated:
        notes.append(f"--modality {stated} is not used, since the volume itself says {own}")
    return own or stated


def modality_of_name(name: str | None) -> str | None:
    """Return the modality that nnU-Net's channel name says, None if it says none."""
    words = re.split(r"[^a-z0-9]+", (name or "").lower())
    said = (kind for kind, names in _NAMES.items() if any(map(names.fullmatch, words)))
    return next(said, None)


def looks_like_hu(array: np.ndarray) -> bool:
    """Return whether only CT has such values: some of air, and nearly all in a CT's range."""
    if not (array <= HU_AIR).any():
        return False
    low, high = HU_RANGE
    return bool(np.count_nonzero((array >= low) & (array <= high)) >= 0.99 * array.size)


def hu_fault(array: np.ndarray) -> str | None:
    """Return why values cannot be HU, whatever a name or header says; None if they can.

    A volume cropped to the inside of a body has no air and can be HU. Values that were scaled, or
    that lack the usual rescale intercept of -1024, cannot.
    """
    values = array.reshape(-1)
    values = values[:: max(1, len(values) // MAX_SAMPLE)]
    values = values[np.isfinite(values) & (values != (padding := padding_value(array)))]
    if not values.size:
        return None
    low, high = HU_RANGE
    beyond = np.count_nonzero((values < low) | (values > high)) / values.size
    if beyond > 0.01:
        return f"{beyond:.0%} of them are beyond {low} to {high}"
    if ((array <= HU_AIR) & (array != padding)).any():
        return None
    low, high = np.percentile(values, [0.05, 99.95])
    if high - low < MIN_HU_SPAN:
        return f"they lie between {low:.3g} and {high:.3g}"
    if low >= 0:
        return f"they begin at {low:.3g}, and even fat is below 0"
    bone, shifted = (
        np.count_nonzero((values >= start) & (values < end))
        for start, end in (BONE, SHIFTED_TISSUE)
    )
    return "most tissue is near 1024, not near 0" if shifted > bone else None


def looks_like_labels(array: np.ndarray) -> bool:
    """Return whether a volume (S, H, W) is a segmentation: few whole numbers >= 0, in patches."""
    if array.dtype != np.int16 or array.min() < 0:
        return False
    step = max(1, len(array) // SAMPLED)
    sample = array[::step]
    inside = sample[:, :, :-1] > 0
    count = np.count_nonzero(inside)
    if not count or len(np.unique(sample)) > MAX_LABELS:
        return False
    same = np.count_nonzero(inside & (sample[:, :, :-1] == sample[:, :, 1:]))
    return bool(same > LABEL_PATCHES * count)


def few_values(array: np.ndarray) -> bool:
    """Return whether there are from 2 to ``FEW_VALUES`` different values."""
    step = max(1, len(array) // SAMPLED)
    if len(np.unique(array[::step, ::8, ::8])) > FEW_VALUES:
        return False  # without sorting a whole volume
    values: set[float] = set()
    for image in array:
        values.update(np.unique(image).tolist())
        if len(values) > FEW_VALUES:
            return False
    return len(values) > 1


def looks_like_mask_picture(array: np.ndarray) -> bool:
    """Return whether pictures (S, H, W) are of labels: few values, or two after JPEG."""
    if few_values(array):
        return True
    low, high = float(array.min()), float(array.max())
    near = NEAR * (high - low) / 255
    top = np.count_nonzero(array >= high - near)
    between = np.count_nonzero((array > low + near) & (array < high - near))
    return bool(between <= 0.02 * array.size and top >= between)


def padding_value(array: np.ndarray) -> int | None:
    """Return the constant below air that fills the corners of most slices.

    It stands for what is outside the field of view.

    Args:
        array: (S, H, W) in HU.

    Returns:
        The value, such as -2000, -3024 or -1024, or None.
    """
    lowest = np.fmin.reduce(array, axis=None)  # NaN only if all are
    if not -32768 <= lowest < -1000:
        return None
    corners = array[:, [0, 0, -1, -1], [0, -1, 0, -1]]
    filled = np.count_nonzero((corners == lowest).all(axis=1))
    return int(lowest) if 2 * filled > len(array) else None
