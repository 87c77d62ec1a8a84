"""The four benchmarks of the paper: how their downloads are laid out and what they must hold.

Sources: the pages named in ``reference`` of each, and arXiv 2509.02379, table 2.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

AMOS_FIRST_MR = 501  # numbers up to 500 are CT, MR begins at 507
# Names as the download spells them, besides ours
AMOS_SPELLINGS = {
    "aorta": ("arota",),
    "gallbladder": ("gall bladder",),
    "prostate_uterus": ("prostate/uterus",),
}


@dataclass(frozen=True)
class Layout:
    """Which file is which, by the end of its path.

    Attributes:
        image: Matches labelled images; group ``n`` is the case's number or name.
        label: Matches their labels.
        test: Matches images without labels; None if there are none.
    """

    image: re.Pattern[str]
    label: re.Pattern[str]
    test: re.Pattern[str] | None = None


@dataclass(frozen=True)
class Benchmark:
    """One benchmark in one variant.

    Attributes:
        name: Of nnU-Net's dataset, without its number.
        number: nnU-Net's, by default.
        layout: Of the download.
        case: Group ``n`` of the layout -> name of the case.
        expected: Names of all labelled cases; None where the download lists them itself.
        count: How many labelled cases there must be.
        labels: Name -> value, or values of a region.
        values: That label files may hold.
        channel: nnU-Net's name of the channel, which decides the normalisation.
        keeps: Whether a case is of this variant.
        regions_class_order: For regions.
        licence: In words, with its source.
        reference: The page of the download.
        notes: What a reader of results should know.
    """

    name: str
    number: int
    layout: Layout
    case: Callable[[str], str]
    expected: Sequence[str]
    count: int
    labels: Mapping[str, int | list[int]]
    values: frozenset[int]
    licence: str
    reference: str
    channel: str = "CT"
    keeps: Callable[[str], bool] = lambda case: True
    regions_class_order: list[int] | None = None
    notes: Sequence[str] = field(default_factory=tuple)


def _organs(*names: str) -> dict[str, int]:
    return {name: value for value, name in enumerate(("background", *names))}


_AMOS_LABELS = _organs(
    *("spleen", "right_kidney", "left_kidney", "gallbladder", "esophagus", "liver", "stomach"),
    *("aorta", "postcava", "pancreas", "right_adrenal_gland", "left_adrenal_gland"),
    *("duodenum", "bladder", "prostate_uterus"),
)
_BTCV_LABELS = _organs(
    *("spleen", "right_kidney", "left_kidney", "gallbladder", "esophagus", "liver", "stomach"),
    *("aorta", "inferior_vena_cava", "portal_and_splenic_veins", "pancreas"),
    *("right_adrenal_gland", "left_adrenal_gland"),
)


def is_amos_ct(case: str) -> bool:
    """Return whether a case of AMOS22 is CT, which its number says."""
    return int(case.rpartition("_")[2]) < AMOS_FIRST_MR


def amos22(modality: str = "ct+mr") -> Benchmark:
    """AMOS22 as released after the challenge: training and validation cases, all labelled.

    Args:
        modality: ``"ct+mr"`` (360 cases, the paper's) or ``"ct"`` (300).
    """
    both = modality == "ct+mr"
    return Benchmark(
        name="AMOS2022_postChallenge_task2" if both else "AMOS2022_postChallenge_task1",
        number=219 if both else 218,
        layout=Layout(
            re.compile(r"(?:^|/)images(?:Tr|Va)/(?P<n>amos_\d{4})\.nii\.gz$"),
            re.compile(r"(?:^|/)labels(?:Tr|Va)/(?P<n>amos_\d{4})\.nii\.gz$"),
            re.compile(r"(?:^|/)imagesTs/(?P<n>amos_\d{4})\.nii\.gz$"),
        ),
        case=str,
        expected=(),
        count=360 if both else 300,
        labels=_AMOS_LABELS,
        values=frozenset(range(16)),
        channel="either_CT_or_MR" if both else "CT",  # nnU-Net's own name for this mixture
        keeps=(lambda case: True) if both else is_amos_ct,
        licence="CC BY 4.0 on Zenodo and CC BY-NC-SA in its dataset.json: ask its authors before "
        "commercial use",
        reference="https://zenodo.org/records/7262581",
        notes=(
            "Training and validation cases of the challenge are one training set here, as in "
            "nnU-Net's own converter: the paper's 300 CT and 60 MR.",
        ),
    )


def btcv() -> Benchmark:
    """BTCV (Beyond the Cranial Vault, abdomen): 30 labelled CT."""
    return Benchmark(
        name="BTCV",
        number=17,
        layout=Layout(
            re.compile(r"(?:^|/)img/img(?P<n>\d{4})\.nii\.gz$"),
            re.compile(r"(?:^|/)label/label(?P<n>\d{4})\.nii\.gz$"),
        ),
        case=lambda n: f"btcv_{n}",
        expected=[f"btcv_{n:04d}" for n in (*range(1, 11), *range(21, 41))],
        count=30,
        labels=_BTCV_LABELS,
        values=frozenset(range(14)),
        licence="Synapse terms of use of syn3193805; no redistribution",
        reference="https://www.synapse.org/#!Synapse:syn3193805/wiki/217789",
        notes=(
            "The paper says 50 CT: 30 have published labels, the 20 of the test set have none. A "
            "fold is 24 and 6 cases.",
        ),
    )


def kits23(scheme: str = "labels") -> Benchmark:
    """KiTS23: 489 CT.

    Args:
        scheme: ``"labels"`` (kidney, tumor, cyst: the paper's) or ``"regions"`` (kidney with
            masses, masses, tumor: the challenge's, and nnU-Net's converter's).
    """
    regions = scheme == "regions"
    plain: dict[str, int | list[int]] = {"background": 0, "kidney": 1, "tumor": 2, "cyst": 3}
    nested: dict[str, int | list[int]] = {
        "background": 0,
        "kidney": [1, 2, 3],
        "masses": [2, 3],
        "tumor": 2,
    }
    return Benchmark(
        name="KiTS2023" if regions else "KiTS2023_labels",
        number=220 if regions else 230,
        layout=Layout(
            re.compile(r"(?:^|/)(?P<n>case_\d{5})/imaging\.nii\.gz$"),
            re.compile(r"(?:^|/)(?P<n>case_\d{5})/segmentation\.nii\.gz$"),
        ),
        case=str,
        expected=[f"case_{n:05d}" for n in (*range(300), *range(400, 589))],
        count=489,
        labels=nested if regions else plain,
        values=frozenset(range(4)),
        regions_class_order=[1, 3, 2] if regions else None,
        licence="CC BY-NC-SA 4.0",
        reference="https://github.com/neheller/kits23",
        notes=(
            "Regions are what the challenge measures."
            if regions
            else "The paper names kidney, tumor and cyst; the challenge measures regions "
            "(--regions), so both means are not over the same structures.",
        ),
    )


def lits() -> Benchmark:
    """LiTS: 131 CT in two training batches."""
    return Benchmark(
        name="LiTS",
        number=29,
        layout=Layout(
            re.compile(r"(?:^|/)volume-(?P<n>\d+)\.nii(?:\.gz)?$"),
            re.compile(r"(?:^|/)segmentation-(?P<n>\d+)\.nii(?:\.gz)?$"),
            re.compile(r"(?:^|/)test-volume-(?P<n>\d+)\.nii(?:\.gz)?$"),
        ),
        case=lambda n: f"lits_{int(n):03d}",
        expected=[f"lits_{n:03d}" for n in range(131)],
        count=131,
        labels={"background": 0, "liver": 1, "tumor": 2},
        values=frozenset(range(3)),
        licence="CC BY-NC-ND 4.0",
        reference="https://competitions.codalab.org/competitions/17094",
        notes=("Volumes 28 to 47 state no spacing in the download (identity affines).",),
    )
