"""Small stores of slices, for the tests of writing, indexing, reading and maintenance."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from nnunetv2_meddinov3.store.index import build_index
from nnunetv2_meddinov3.store.records import SliceRecord, VolumeRecord
from nnunetv2_meddinov3.store.writer import StoreWriter

OPTIONS = {"pixel_spacing_mm": None, "size": None, "min_gap_mm": 0.0, "keep_flagged": False}


class Stores:
    """Makes volumes that follow from a number, their records, and stores of them."""

    options = OPTIONS

    @staticmethod
    def slices(number, shape=(4, 24, 20)):
        rng = np.random.default_rng(number)
        return rng.integers(-1024, 3000, shape).astype(np.int16)

    @staticmethod
    def record(key, slices, *, first_z=0, **changes):
        hashes = [hashlib.sha256(image.tobytes()).hexdigest() for image in slices]
        described = [
            SliceRecord(
                index=index,
                z=first_z + index,
                position_mm=2.5 * (first_z + index),
                sha256=hashes[index],
                phash=hashes[index][:16],
                body_fraction=0.5,
                saturated_fraction=0.0,
                padding_fraction=0.25,
                hu_min=float(image.min()),
                hu_max=float(image.max()),
                hu_mean=float(image.mean()),
                flags=["saturated"] if index == 1 else [],
            )
            for index, image in enumerate(slices)
        ]
        values = {
            "source_key": key,
            "source_sha256": hashlib.sha256(slices.tobytes()).hexdigest(),
            "dataset": key.split("/")[0],
            "patient": key.split("/")[-1],
            "modality": "CT",
            "windowed": False,
            "spacing_mm": (2.5, 0.7, 0.8),
            "orientation": "RAI",
            "shape": slices.shape,
            "slices": described,
            "left_out": [(first_z + len(slices), "air only")],
            "versions": {"numpy": np.__version__},
        }
        return VolumeRecord(**{**values, **changes})

    def volume(self, number, key=None, **changes):
        slices = self.slices(number)
        return self.record(key or f"Set{number % 2}/case{number}", slices, **changes), slices

    def write(self, folder, volumes, skips=(("Set0/broken", "is empty"),), options=OPTIONS):
        writer = StoreWriter(folder, options)
        for record, slices in volumes:
            writer.write_volume(record, slices)
        for skip in skips:
            writer.write_skip(*skip)
        build_index(folder)
        return folder

    @staticmethod
    def contents(folder):
        """All files but half written ones and the key, which is random, by relative path."""
        return {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(Path(folder).rglob("*"))
            if path.is_file() and path.suffix != ".part" and path.name != "store.key"
        }


@pytest.fixture(scope="session")
def stores():
    """What makes volumes, records and stores."""
    return Stores()


@pytest.fixture
def store(stores, tmp_path):
    """A finished store of five volumes of four slices, from two datasets."""
    return stores.write(tmp_path / "store", [stores.volume(n) for n in range(5)])
