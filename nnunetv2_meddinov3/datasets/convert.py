"""A download becomes a raw dataset of nnU-Net, case by case; an interrupted conversion goes on."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import nibabel as nib
import numpy as np

from nnunetv2_meddinov3.datasets.affines import Verdict, judge
from nnunetv2_meddinov3.datasets.archive import Member, members
from nnunetv2_meddinov3.datasets.benchmarks import AMOS_SPELLINGS, Benchmark
from nnunetv2_meddinov3.errors import UserError, first_line
from nnunetv2_meddinov3.files import replacing, write_text
from nnunetv2_meddinov3.progress import Progress

ENDING = ".nii.gz"
READER = "NibabelIOWithReorient"  # axes point one way in every case, whatever the file's do
UNKNOWN_SPACING = ("error", "skip", "keep")
FOLDS = 5
_NAMED = 5  # of what is missing


@dataclass(frozen=True)
class Download:
    """A download whose files have been told apart.

    Attributes:
        cases: Case -> image and label, sorted.
        tests: Case -> image without a label.
        missing: What there must be and is not, in words.
    """

    cases: dict[str, tuple[Member, Member]]
    tests: dict[str, Member]
    missing: list[str]


@dataclass
class Converted:
    """The result of ``convert``.

    Attributes:
        folder: The dataset.
        cases: Names of the labelled cases.
        tests: Names of the others.
        notes: What was repaired or left out, in sentences.
    """

    folder: Path
    cases: list[str]
    tests: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def find(benchmark: Benchmark, folder: Path) -> Download:
    """Tell the files of a download apart.

    Raises:
        UserError: If the folder holds none of them, or its dataset.json has other labels.
    """
    images: dict[str, Member] = {}
    labels: dict[str, Member] = {}
    tests: dict[str, Member] = {}
    layout = benchmark.layout
    found = members(folder)
    for member in found:
        for pattern, kind in ((layout.test, tests), (layout.image, images), (layout.label, labels)):
            match = pattern and pattern.search(str(member.name))
            if match:
                case = benchmark.case(match["n"])
                if benchmark.keeps(case):
                    kind.setdefault(case, member)
                break
    if not images and not labels:
        example = layout.image.pattern.removeprefix("(?:^|/)")
        raise UserError(
            f"{folder} must hold the download of {benchmark.reference}, with images such as "
            f"{_readable(example)}, but there is none: give the folder of the archives, or that "
            "which they were unpacked into, with its folder names."
        )
    if benchmark.name.startswith("AMOS"):
        _check_amos_labels(benchmark, found)
    cases = {n: (images[n], labels[n]) for n in sorted(images.keys() & labels.keys())}
    return Download(cases, dict(sorted(tests.items())), _missing(benchmark, images, labels))


def _readable(pattern: str) -> str:
    """Return an example of what a pattern of ``Layout`` matches."""
    text = re.sub(r"\(\?P<n>(.*?)\)", r"\1", pattern).replace(r"\.", ".").removesuffix("$")
    text = re.sub(r"\\d\{(\d)\}", lambda match: "0" * (int(match[1]) - 1) + "1", text)
    return text.replace(r"\d+", "0").replace("(?:Tr|Va)", "Tr").replace("(?:.gz)?", "")


def _missing(
    benchmark: Benchmark, images: Mapping[str, Member], labels: Mapping[str, Member]
) -> list[str]:
    expected = set(benchmark.expected) or images.keys() | labels.keys()
    missing = [f"the image of {case}" for case in sorted(expected - images.keys())]
    missing += [f"the label of {case}" for case in sorted(expected - labels.keys())]
    short = benchmark.count - len(expected)
    if short > 0:
        missing.append(f"{short} more of {benchmark.count} labelled cases")
    return missing


def _check_amos_labels(benchmark: Benchmark, found: Sequence[Member]) -> None:
    """Refuse a dataset.json of AMOS whose labels are others than ours, misspelt names aside."""
    for member in found:
        if member.name.name != "dataset.json":
            continue
        with member.on_disk() as path:
            try:
                theirs = json.loads(path.read_text(encoding="utf-8"))["labels"]
                names = {int(value): str(name) for value, name in theirs.items()}
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(
                    f"{member} must list the labels of AMOS22, but: {first_line(error)}."
                ) from error
        for ours, value in benchmark.labels.items():
            accepted = {ours, *AMOS_SPELLINGS.get(ours, ())}
            given = names.get(int(str(value)), "nothing")
            if not {given.lower(), re.sub(r"[ /]", "_", given.lower())} & accepted:
                raise UserError(
                    f"value {value} must be {ours} in AMOS22, but {member} says {given}: this is "
                    "another dataset, or another release."
                )


def convert(
    benchmark: Benchmark,
    download: Download,
    folder: Path,
    *,
    with_tests: bool = False,
    unknown_spacing: str = "error",
    stream: TextIO | None = None,
) -> Converted:
    """Write a raw dataset; ``dataset.json`` comes last, and without it there is no dataset.

    Files that an interrupted conversion has written are kept.

    Args:
        benchmark: What the download is.
        download: Its files.
        folder: The dataset, ``.../nnUNet_raw/DatasetXXX_Name``.
        with_tests: Whether images without labels go into imagesTs.
        unknown_spacing: What becomes of cases whose files state no spacing: ``"error"``,
            ``"skip"``, or ``"keep"`` (1 mm, as the files say).
        stream: Where progress goes.

    Raises:
        UserError: If a file is damaged, holds other labels, or lies elsewhere than its label; the
            sentence names the first and counts the others. The dataset is then not finished.
    """
    _check_target(folder, benchmark, download)
    tests = download.tests if with_tests else {}
    wrong: list[str] = []
    verdicts: dict[str, Verdict] = {}
    total = len(download.cases) + len(tests)
    with Progress(total, "cases", title=folder.name, every=10, stream=stream) as progress:
        for case, (image, label) in download.cases.items():
            try:
                verdicts[case] = _convert_case(
                    benchmark, case, image, label, folder, unknown_spacing
                )
            except UserError as error:
                wrong.append(str(error))
            progress.advance(case)
        for case, image in tests.items():
            try:
                _copy_image(image, folder / "imagesTs" / f"{case}_0000{ENDING}")
            except UserError as error:
                wrong.append(str(error))
            progress.advance(case)
    if wrong:
        more = f" Wrong cases in all: {len(wrong)}." if len(wrong) > 1 else ""
        raise UserError(f"{wrong[0]}{more}")
    left_out = unknown_spacing == "skip"
    cases = [c for c, v in verdicts.items() if not (left_out and v is Verdict.UNKNOWN_SPACING)]
    _write_description(benchmark, folder, cases)
    return Converted(folder, cases, list(tests), _notes(verdicts, unknown_spacing))


def _check_target(folder: Path, benchmark: Benchmark, download: Download) -> None:
    """Refuse a folder with files that this conversion would not write."""
    if (folder / "dataset.json").exists():
        raise UserError(
            f"{folder} must not be a dataset already, but is one: remove it, or choose another "
            "number with -d."
        )
    known = {f"{case}_0000{ENDING}" for case in (*download.cases, *download.tests)}
    known |= {f"{case}{ENDING}" for case in download.cases}
    parts = ("imagesTr", "labelsTr", "imagesTs")
    strange = [p for part in parts for p in folder.glob(f"{part}/[!.]*") if p.name not in known]
    if strange:
        raise UserError(
            f"{folder} must be empty, or hold what an interrupted conversion of {benchmark.name} "
            f"left, but it holds {strange[0].relative_to(folder)}: choose another number with -d."
        )


def _convert_case(
    benchmark: Benchmark, case: str, image: Member, label: Member, folder: Path, unknown: str
) -> Verdict:
    targets = folder / "imagesTr" / f"{case}_0000{ENDING}", folder / "labelsTr" / f"{case}{ENDING}"
    with image.on_disk() as image_path, label.on_disk() as label_path:
        headers = [_open(path, m) for path, m in ((image_path, image), (label_path, label))]
        shapes = [header.shape for header in headers]
        if shapes[0] != shapes[1] or len(shapes[0]) != 3:
            raise UserError(
                f"an image and its label must be volumes of one shape, but {image} has {shapes[0]} "
                f"and {label} has {shapes[1]} voxels."
            )
        verdict = judge(headers[0].affine, headers[1].affine)
        if verdict is Verdict.REFUSED:
            raise UserError(
                f"an image and its label must lie in one place, but {image} and {label} differ in "
                "orientation or spacing, and neither is an identity: download both again, or "
                "correct their headers."
            )
        if verdict is Verdict.UNKNOWN_SPACING and unknown != "keep":
            if unknown == "skip":
                return verdict
            raise UserError(
                f"an image must state its spacing, but {image} and its label have identity affines "
                "(1 mm): say --unknown-spacing skip to leave such cases out, or keep to take 1 mm."
            )
        affine = headers[1 if verdict is Verdict.USE_LABEL else 0].affine
        if all(target.is_file() for target in targets):
            return verdict
        values = _whole_numbers(headers[1], label)
        if surplus := sorted(set(np.unique(values).tolist()) - benchmark.values):
            raise UserError(
                f"{label} must hold the values {min(benchmark.values)} to {max(benchmark.values)}, "
                f"but holds {surplus[0]}."
            )
        voxels = _decode(headers[0], image)
        _save(targets[0], voxels, affine, headers[0])
        _save(targets[1], values.astype(np.uint8), affine, None)
    return verdict


def _copy_image(image: Member, target: Path) -> None:
    if target.is_file():
        return
    with image.on_disk() as path:
        header = _open(path, image)
        _save(target, _decode(header, image), header.affine, header)


def _open(path: Path, member: Member) -> Any:
    try:
        return nib.load(path)
    except Exception as error:  # nibabel raises what its parts do
        raise _damaged(member, error) from error


def _decode(opened: Any, member: Member) -> np.ndarray:
    """Return voxels as stored where they have no scaling, else in fp32."""
    try:
        stored = opened.dataobj.get_unscaled()
        slope, intercept = opened.dataobj.slope, opened.dataobj.inter
        if (slope, intercept) == (1, 0):
            return np.asarray(stored)
        return np.asarray(opened.dataobj, dtype=np.float32)
    except Exception as error:
        raise _damaged(member, error) from error


def _whole_numbers(opened: Any, member: Member) -> np.ndarray:
    values = _decode(opened, member)
    whole = np.rint(values).astype(np.int32)
    if not np.array_equal(whole, values):
        raise UserError(f"{member} must be a label map of whole numbers, but is none.")
    return whole


def _damaged(member: Member, error: Exception) -> UserError:
    return UserError(
        f"{member} must be a whole NIfTI file, but: {first_line(error)}; download it again."
    )


def _save(target: Path, voxels: np.ndarray, affine: np.ndarray, like: Any) -> None:
    """Write a volume, whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    volume = nib.Nifti1Image(voxels, affine, dtype=voxels.dtype)
    if like is not None:
        volume.header.set_xyzt_units(*like.header.get_xyzt_units())
    with replacing(target) as part:
        whole = part.with_name(f"{part.name}{ENDING}")  # nibabel goes by the name
        try:
            nib.save(volume, whole)
            whole.replace(part)
        finally:
            whole.unlink(missing_ok=True)


def _write_description(benchmark: Benchmark, folder: Path, cases: Sequence[str]) -> None:
    content: dict[str, Any] = {
        "channel_names": {"0": benchmark.channel},
        "labels": dict(benchmark.labels),
        "numTraining": len(cases),
        "file_ending": ENDING,
        "overwrite_image_reader_writer": READER,
        "name": benchmark.name,
        "reference": benchmark.reference,
        "licence": benchmark.licence,
    }
    if benchmark.regions_class_order is not None:
        content["regions_class_order"] = benchmark.regions_class_order
    splits = json.dumps(five_folds(cases), indent=1)
    write_text(folder / "splits_final.json", f"{splits}\n")
    write_text(folder / "dataset.json", f"{json.dumps(content, indent=1)}\n")


def five_folds(cases: Sequence[str]) -> list[dict[str, list[str]]]:
    """Return nnU-Net's own five folds of these cases, one case a patient; fold 0 is the paper's.

    Written beside dataset.json, so that they can be seen and copied: nnU-Net makes the same.
    """
    if len(cases) < FOLDS:
        return []
    from nnunetv2.utilities.crossval_split import generate_crossval_split

    folds = generate_crossval_split(sorted(cases), seed=12345, n_splits=FOLDS)
    return [{part: [str(c) for c in fold[part]] for part in ("train", "val")} for fold in folds]


def _notes(verdicts: Mapping[str, Verdict], unknown_spacing: str) -> list[str]:
    notes = []
    for verdict in (Verdict.USE_IMAGE, Verdict.USE_LABEL, Verdict.UNKNOWN_SPACING):
        if cases := [case for case, found in verdicts.items() if found is verdict]:
            left_out = verdict is Verdict.UNKNOWN_SPACING and unknown_spacing == "skip"
            end = ": left out" if left_out else ""
            notes.append(f"{verdict.value.capitalize()}{end}: {named(cases)}.")
    return notes


def named(things: Sequence[str]) -> str:
    """Return the first few of some names, and how many more there are."""
    shown = ", ".join(things[:_NAMED])
    more = len(things) - _NAMED
    return f"{shown} and {more} more" if more > 0 else shown
