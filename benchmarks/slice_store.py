"""How fast a slice store is read, against 16-bit PNG files of the same slices, on one core.

    python benchmarks/slice_store.py [--slices 96] [--size 512] [--rounds 9] [--rows 100000]

Three things are measured: random reads per second of a store (slices alone, and with their rows
of the index) and of PNG files, in turns, from a warm page cache; the size of both; and, for an
index of many synthetic rows, the time and memory to build it, the time to open it and the memory a
process takes of its own to hold it. Slices are synthetic CT: an elliptic body with organs, noise of
12 HU, air with noise of 8 HU, and padding outside the circle that a scanner reconstructs. Pass
--array FILE.npy for (S, H, W) int16 slices of your own.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from nnunetv2_meddinov3.processes import peak_gb
from nnunetv2_meddinov3.store import layout
from nnunetv2_meddinov3.store.fingerprints import perceptual_hash, slice_sha256
from nnunetv2_meddinov3.store.index import build_index
from nnunetv2_meddinov3.store.reader import SliceStore
from nnunetv2_meddinov3.store.records import SliceRecord, VolumeRecord
from nnunetv2_meddinov3.store.writer import StoreWriter

CT_3M = 3_868_833  # slices
OPTIONS = {"benchmark": True}
SIGN = np.uint16(1 << 15)  # flipping it adds 32768, the cheapest way from int16 to what PNG holds

# Opens a store in a process of its own and prints seconds, rows per second and MB of its own.
OPEN = """
import json, sys, time
from pathlib import Path
import numpy as np
from nnunetv2_meddinov3.store.reader import SliceStore

def own_mb():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(l.split()[1]) for l in lines if l.startswith("Private_Dirty")) / 1024

before, start = own_mb(), time.perf_counter()
store = SliceStore(sys.argv[1])
opened = time.perf_counter() - start
chosen = np.random.default_rng(0).integers(0, len(store), 5000)
start = time.perf_counter()
for number in chosen:
    {name: column[int(number)].as_py() for name, column in store._columns.items()}
per_row = (time.perf_counter() - start) / len(chosen)
print(json.dumps({"open_s": opened, "row_us": per_row * 1e6, "own_mb": own_mb() - before}))
"""


def synthetic_ct(slices: int, size: int) -> np.ndarray:
    """Return (slices, size, size) int16 in HU."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    volume = np.empty((slices, size, size), np.int16)
    for z in range(slices):
        body = (x / 0.8) ** 2 + (y / 0.6) ** 2 < 1
        organs = 60 * np.sin(5 * x + z / 9) * np.cos(7 * y - z / 11)
        clean = np.where(body, 40 + organs, -1000)
        noise = rng.normal(0, 1, clean.shape) * np.where(body, 12, 8)
        volume[z] = np.where(x**2 + y**2 < 1, np.rint(clean + noise), -1024)
    return volume


def described(index: int, image: np.ndarray) -> SliceRecord:
    """Return the record of a slice."""
    numbers = (float(image.min()), float(image.max()), float(image.mean()))
    phash = perceptual_hash(image, -160, 240)
    return SliceRecord(index, index, 1.0 * index, slice_sha256(image), phash, 0.4, 0, 0.2, *numbers)


def record_of(key: str, shape: tuple[int, int, int], slices: list[SliceRecord]) -> VolumeRecord:
    """Return the record of a CT volume."""
    return VolumeRecord(
        source_key=key,
        source_sha256="0" * 64,
        dataset=key.split("/")[0],
        patient=key.split("/")[1],
        modality="CT",
        windowed=False,
        spacing_mm=(1.0, 0.7, 0.7),
        orientation="LPS",
        shape=shape,
        slices=slices,
    )


def write_both(array: np.ndarray, folder: Path) -> tuple[SliceStore, list[Path]]:
    """Write the same slices as a store and as PNG files (HU + 32768), in the order of the store."""
    writer = StoreWriter(folder / "store", OPTIONS)
    slices = [described(index, image) for index, image in enumerate(array)]
    writer.write_volume(record_of("Set/case", array.shape, slices), array)
    build_index(folder / "store")
    store, paths = SliceStore(folder / "store"), []
    for number in range(len(store)):
        paths.append(folder / f"{number}.png")
        Image.fromarray(store.image(number).view(np.uint16) ^ SIGN).save(paths[-1])
    return store, paths


def read_png(path: Path) -> np.ndarray:
    """Return one slice in HU."""
    with Image.open(path) as image:
        return (np.asarray(image, dtype=np.uint16) ^ SIGN).view(np.int16)


def reading(array: np.ndarray, rounds: int, folder: Path) -> None:
    """Print reads per second of both, and their ratio."""
    store, paths = write_both(array, folder)
    for number, path in enumerate(paths):
        if not np.array_equal(store.image(number), read_png(path)):
            raise SystemExit(f"slice {number} differs between store and PNG")
    readers = {
        "store": store.image,
        "rows": store.__getitem__,
        "png": lambda number: read_png(paths[number]),
    }
    rng, rates = np.random.default_rng(0), {name: [] for name in readers}
    for _ in range(rounds):
        order = rng.permutation(len(store)).tolist()
        for name, read in readers.items():
            start = time.process_time()
            for number in order:
                read(number)
            rates[name].append(len(order) / (time.process_time() - start))
    ratios = [a / b for a, b in zip(rates["store"], rates["png"], strict=True)]
    for name, found in rates.items():
        print(f"{name:6} {statistics.median(found):8.0f} slices/s/core (median of {rounds})")
    print(f"ratio  {statistics.median(ratios):8.1f} (median; {min(ratios):.1f}-{max(ratios):.1f})")
    size = next((store.path / layout.VOLUMES).iterdir()).stat().st_size
    pngs = sum(path.stat().st_size for path in paths)
    print(
        f"size   store {array.nbytes / size:.2f}x smaller than int16, "
        f"PNG {array.nbytes / pngs:.2f}x"
    )
    print(f"CT-3M at this size and noise: {CT_3M * size / len(array) / 1e12:.2f} TB")


def write_records(rows: int, folder: Path, per_volume: int = 400) -> None:
    """Write the records of a store of many synthetic slices."""
    rng = np.random.default_rng(0)
    StoreWriter(folder, OPTIONS)
    for first in range(0, rows, per_volume):
        slices = [
            SliceRecord(i, i, 1.0 * i, rng.bytes(32).hex(), rng.bytes(8).hex(), 0.4, 0, 0.2,
                        -1024.0, float(rng.integers(1000, 3000)), float(rng.normal()))
            for i in range(min(per_volume, rows - first))
        ]  # fmt: skip
        record = record_of(f"Set{first % 16}/case{first}", (len(slices), 512, 512), slices)
        values = record.to_dict() | {"volume_id": rng.bytes(16).hex()}
        path = folder / layout.RECORDS / layout.record_name(record.source_key)
        path.write_bytes(layout.sealed(values, "record_sha256"))


def indexing(rows: int, folder: Path) -> None:
    """Print what an index of synthetic rows costs."""
    write_records(rows, folder / "index")
    start = time.perf_counter()
    index = build_index(folder / "index")
    built = time.perf_counter() - start
    print(f"index of {rows} rows: built in {built:.1f} s", end="")
    print(f" (peak {peak_gb() * 1e9 / 2**20:.0f} MB)", end="")
    print(f", {index.stat().st_size / rows:.0f} bytes/row in Parquet", end="")
    print(f", {(folder / 'index' / layout.MAPPED_INDEX).stat().st_size / rows:.0f} mapped")
    report_opening(folder, "mapped")
    (folder / "index" / layout.MAPPED_INDEX).unlink()
    report_opening(folder, "Parquet")


def report_opening(folder: Path, kind: str, repeats: int = 5) -> None:
    """Print the median over processes that open the index."""
    command = [sys.executable, "-c", OPEN, str(folder / "index")]
    found = [
        json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
        for _ in range(repeats)
    ]
    median = {name: statistics.median(each[name] for each in found) for name in found[0]}
    print(
        f"  {kind:8} open {median['open_s'] * 1e3:.1f} ms, {median['own_mb']:.1f} MB of its own, "
        f"{median['row_us']:.0f} us per row"
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slices", type=int, default=96)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--array", type=Path, help="(S, H, W) int16 .npy instead of synthetic CT")
    args = parser.parse_args()
    array = np.load(args.array) if args.array else synthetic_ct(args.slices, args.size)
    print(f"{len(array)} slices of {array.shape[1:]}, {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory() as folder:
        reading(array, args.rounds, Path(folder))
        if args.rows:
            indexing(args.rows, Path(folder))


if __name__ == "__main__":
    main()
