"""Two hundred hostile files in one folder: each is named with its reason."""

import gzip
import random
import struct
from collections import Counter

import numpy as np
import pytest
import SimpleITK as sitk

from nnunetv2_meddinov3.curate.pipeline import curate
from nnunetv2_meddinov3.store.reader import SliceStore
from nnunetv2_meddinov3.store.verify import verify

EACH = 10


def whole(rng):
    """Return the bytes of a small CT as an uncompressed NIfTI."""
    header = bytearray(352)
    struct.pack_into("<i", header, 0, 348)
    struct.pack_into("<8h", header, 40, 3, 16, 16, 3, 1, 1, 1, 1)
    struct.pack_into("<hh", header, 70, 4, 16)
    struct.pack_into("<8f", header, 76, 1, 1, 1, 2, 0, 0, 0, 0)
    struct.pack_into("<f", header, 108, 352)
    struct.pack_into("<ff", header, 112, 1, 0)
    struct.pack_into("<hh", header, 252, 0, 1)
    for row in range(3):
        struct.pack_into(
            "<4f", header, 280 + 16 * row, *(2.0 * (column == row) for column in range(4))
        )
    header[344:348] = b"n+1\0"
    return bytes(header), rng.integers(-1000, 1000, 16 * 16 * 3, dtype=np.int16).tobytes()


def changed(header, at, form, *values):
    data = bytearray(header)
    struct.pack_into(form, data, at, *values)
    return bytes(data)


def hostile_file(kind, rng, folder, name):
    """Write one hostile file of a kind; returns what it is called."""
    header, voxels = whole(rng)
    nan = np.full(16 * 16 * 3, np.nan, np.float32).tobytes()
    float_header = changed(header, 70, "<hh", 16, 32)
    cut = int(rng.integers(1, 300))
    made = {
        "empty": (".nii", b""),
        "cut header": (".nii", header[:cut]),
        "cut voxels": (".nii", header + voxels[:cut]),
        "cut gzip": (".nii.gz", gzip.compress(header + voxels)[:cut]),
        "no gzip": (".nii.gz", rng.bytes(500)),
        "wrong gzip checksum": (".nii.gz", _with_wrong_checksum(header + voxels)),
        "noise": (".nii", rng.bytes(2000)),
        "text": (".nii", b"this is no image\n" * int(rng.integers(1, 50))),
        "4D": (".nii", changed(header, 40, "<8h", 4, 16, 16, 3, 5, 1, 1, 1) + voxels * 5),
        "huge size": (".nii", changed(header, 42, "<3h", 32000, 32000, 32000) + voxels),
        "negative size": (".nii", changed(header, 42, "<h", -16) + voxels),
        "unknown type": (".nii", changed(header, 70, "<hh", 999, 16) + voxels),
        "endless slope": (".nii", changed(header, 112, "<ff", float("inf"), 0) + voxels),
        "absurd rescale": (".nii", changed(header, 112, "<ff", 1e20, -1e30) + voxels),
        "all NaN": (".nii", float_header + nan),
        "constant": (".nii", header + bytes(len(voxels))),
        "NRRD without end": (".nrrd", b"NRRD0004\ntype: short\ndimension: 3\n"),
        "MHA that lies": (
            ".mha",
            b"ObjectType = Image\nNDims = 3\nDimSize = 9 9 9\n" + voxels[:50],
        ),
        "DICOM noise": (".dcm", bytes(128) + b"DICM" + rng.bytes(400)),
        "PNG cut": (".png", b"\x89PNG\r\n\x1a\n" + rng.bytes(40)),
    }
    ending, data = made[kind]
    (folder / f"{name}{ending}").write_bytes(data)
    return f"{name}{ending}"


def _with_wrong_checksum(data):
    packed = bytearray(gzip.compress(data))
    packed[-8] ^= 0xFF
    return bytes(packed)


KINDS = """
empty, cut header, cut voxels, cut gzip, no gzip, wrong gzip checksum, noise, text, 4D, huge size,
negative size, unknown type, endless slope, absurd rescale, all NaN, constant, NRRD without end,
MHA that lies, DICOM noise, PNG cut
"""


@pytest.mark.slow
def test_two_hundred_hostile_files_are_skipped_by_name_and_reason(tmp_path):
    folder = tmp_path / "hospital"
    folder.mkdir()
    rng = np.random.default_rng(0)
    expected = {}
    for kind in KINDS.replace("\n", " ").split(","):
        kind = kind.strip()
        for number in range(EACH):
            name = hostile_file(kind, rng, folder, f"{kind.replace(' ', '_')}_{number}")
            expected[f"hospital/{name}"] = kind
    assert len(expected) == 200
    (folder / "loop").mkdir()
    (folder / "loop" / "back").symlink_to(folder, target_is_directory=True)
    good = sitk.GetImageFromArray(rng.integers(-1000, 1000, (4, 16, 16), dtype=np.int16))
    sitk.WriteImage(good, str(folder / "good.nii.gz"))

    summary = curate([folder], tmp_path / "store")

    skipped = dict(summary.skipped)
    missed = Counter(kind for key, kind in expected.items() if key not in skipped)
    assert missed == Counter()
    assert all(reason.strip() and "\n" not in reason for reason in skipped.values())
    assert summary.exit_code == 3
    assert summary.entered == 1
    assert verify(tmp_path / "store") == []
    store = SliceStore(tmp_path / "store")
    assert {store[i][1]["source_key"] for i in range(len(store))} == {"hospital/good.nii.gz"}


def test_the_file_that_the_hostile_ones_are_made_from_is_fine(tmp_path):
    # otherwise they would be refused for a fault of this test
    header, voxels = whole(np.random.default_rng(random.Random(0).randint(0, 9)))
    (tmp_path / "fine.nii").write_bytes(header + voxels)
    summary = curate([tmp_path / "fine.nii"], tmp_path / "store")
    assert summary.exit_code == 0
    assert summary.slices == 3
