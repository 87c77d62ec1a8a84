"""Make the two raw datasets of the recipe ``small`` from public files, with patients held out.

    python benchmarks/small_datasets.py NNUNET_RAW --hippocampus FOLDER --pancreas FOLDER [FOLDER]

Hippocampus: Task04_Hippocampus of the Medical Segmentation Decathlon (CC BY-SA 4.0), unpacked, or
``data/TrainingSet`` of github.com/udacity/nd320-c3-3d-imaging-starter, which has the same cases
under the same names and is what was used. 195 of its cases are taken.

Pancreas: axial slices of TCIA Pancreas-CT (CC BY 3.0) as 8-bit pictures, the folders
``dataset/Pancreas/test`` of github.com/atlan-antillia/Tensorflow-Image-Segmentation-Pancreas and
``dataset/Cropped-Pancreas/test`` of github.com/atlan-antillia/
Tensorflow-Image-Segmentation-Augmented-Pancreas, in this order, each with ``images`` and ``masks``.

A fifth of the patients goes to imagesTs and labelsTs, chosen by the SHA-256 of their names, and the
rest into five folds of patients, ``splits_final.json`` beside ``dataset.json``.
"""

import argparse
import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

PICTURE = re.compile(r"PANCREAS_(?P<patient>\d+)-(?:cropped-(?P<crop>\d)-)?(?P<slice>\d+)\.jpg")
PANCREAS_CASES = 1040
FOLDS = 5

# What remains without volumes that are not crops, images unlike their labels, and every fourth.
HIPPOCAMPUS_CASES = """
1 3 4 7 8 11 15 17 19 23 24 25 33 34 35 37 38 39 41 42 44 46 48 49 51 52 53 57 58 60 65 67 68 74 75
77 84 87 88 90 91 92 94 95 96 98 99 101 104 105 106 108 109 114 124 125 126 130 132 133 136 138 141
143 144 145 148 149 150 154 155 156 158 160 161 163 164 165 169 170 171 173 174 175 177 178 180 184
185 188 190 193 194 197 199 203 205 207 210 215 216 217 220 221 222 224 225 226 228 229 230 232 233
234 236 238 242 244 245 248 250 251 252 257 259 260 263 264 265 269 274 276 279 280 282 287 288 289
292 294 295 297 298 299 301 302 303 305 308 309 311 314 316 318 319 320 322 325 326 328 329 330 332
333 334 336 337 338 341 343 345 350 351 352 354 355 356 359 360 361 366 367 368 372 373 374 376 378
380 383 385 386 389 390 393
"""


def stable_order(names: Iterable[str]) -> list[str]:
    """Return names in the order of their hashes, which is random and the same everywhere."""
    return sorted(names, key=lambda name: hashlib.sha256(name.encode()).hexdigest())


def held_out(patients: Iterable[str]) -> set[str]:
    """Return the fifth of the patients that is for testing."""
    order = stable_order(patients)
    return set(order[: round(len(order) / 5)])


def make_folders(folder: Path) -> None:
    """Make a new dataset's folders, or end with a sentence if it is there already."""
    if folder.exists():
        raise SystemExit(f"{folder} must not exist yet, but does: remove it.")
    for part in ("imagesTr", "labelsTr", "imagesTs", "labelsTs"):
        (folder / part).mkdir(parents=True)


def describe(
    folder: Path,
    cases: Mapping[str, Sequence[str]],
    *,
    channel: str,
    labels: Mapping[str, int],
    ending: str,
) -> None:
    """Write dataset.json and the folds; ``cases`` are those of each patient for training."""
    content = {
        "channel_names": {"0": channel},
        "labels": labels,
        "numTraining": sum(map(len, cases.values())),
        "file_ending": ending,
    }
    order = stable_order(cases)
    folds = []
    for k in range(FOLDS):
        validation = set(order[k::FOLDS])
        train = sorted(c for p in order if p not in validation for c in cases[p])
        folds.append({"train": train, "val": sorted(c for p in validation for c in cases[p])})
    (folder / "splits_final.json").write_text(json.dumps(folds, indent=1))
    (folder / "dataset.json").write_text(json.dumps(content, indent=1))


def hippocampus(source: Path, raw: Path) -> None:
    """Copy the cases; ``source`` has images and labels, or imagesTr and labelsTr."""
    end = "Tr" if (source / "imagesTr").is_dir() else ""
    cases = [f"hippocampus_{int(number):03d}" for number in HIPPOCAMPUS_CASES.split()]
    found = {
        case: [source / f"{part}{end}" / f"{case}.nii.gz" for part in ("images", "labels")]
        for case in cases
    }
    if missing := [str(path) for paths in found.values() for path in paths if not path.is_file()]:
        raise SystemExit(f"{source} must hold 195 cases, but lacks {missing[0]}.")
    folder = raw / "Dataset804_Hippocampus"
    make_folders(folder)
    test = held_out(cases)
    for case, (image, label) in found.items():
        part = "Ts" if case in test else "Tr"
        shutil.copyfile(image, folder / f"images{part}" / f"{case}_0000.nii.gz")
        shutil.copyfile(label, folder / f"labels{part}" / f"{case}.nii.gz")
    describe(
        folder,
        {case: [case] for case in cases if case not in test},
        channel="MRI",
        labels={"background": 0, "anterior": 1, "posterior": 2},
        ending=".nii.gz",
    )


def pancreas(sources: Sequence[Path], raw: Path) -> None:
    """Turn the pictures into greyscale PNG, front up; of one slice in two sources, the last."""
    found: dict[str, tuple[str, Path]] = {}
    for source in sources:
        for path in sorted(source.glob("images/*.jpg")):
            if match := PICTURE.fullmatch(path.name):
                view = "full" if match["crop"] is None else f"crop{match['crop']}"
                found[f"panc_{match['patient']}_{view}_{match['slice']}"] = match["patient"], path
    if len(found) != PANCREAS_CASES:
        raise SystemExit(f"{PANCREAS_CASES} slices of the pancreas were used; found {len(found)}.")
    folder = raw / "Dataset801_Pancreas"
    make_folders(folder)
    test = held_out({patient for patient, _ in found.values()})
    cases: dict[str, list[str]] = {}
    for case, (patient, path) in sorted(found.items()):
        part = "Ts" if patient in test else "Tr"
        mask = np.uint8(grey(path.parents[1] / "masks" / path.name) > 127)
        Image.fromarray(grey(path)).save(folder / f"images{part}" / f"{case}_0000.png")
        Image.fromarray(mask).save(folder / f"labels{part}" / f"{case}.png")
        if patient not in test:
            cases.setdefault(patient, []).append(case)
    labels = {"background": 0, "pancreas": 1}
    describe(folder, cases, channel="CT", labels=labels, ending=".png")


def grey(path: Path) -> np.ndarray:
    """Return a picture's grey values, (H, W) uint8; the files have the table at the top."""
    return np.ascontiguousarray(np.flipud(np.asarray(Image.open(path).convert("L"))))


def main() -> None:
    """Make what is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("raw", type=Path, metavar="NNUNET_RAW")
    parser.add_argument("--hippocampus", type=Path, metavar="FOLDER")
    parser.add_argument("--pancreas", type=Path, nargs="+", metavar="FOLDER")
    arguments = parser.parse_args()
    if arguments.hippocampus:
        hippocampus(arguments.hippocampus, arguments.raw)
    if arguments.pancreas:
        pancreas(arguments.pancreas, arguments.raw)


if __name__ == "__main__":
    main()
