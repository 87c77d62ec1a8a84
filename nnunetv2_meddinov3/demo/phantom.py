"""A synthetic abdominal CT with labels, in HU, for demonstrations and tests.

The anatomy is a set of ellipsoids in millimetres, bent by a smooth random displacement, so a
patient looks the same at every voxel size. Axes are (z, y, x) in arrays and (x, y, z) in formulas;
x grows to the patient's left, y to the back, z to the head (the LPS convention of DICOM), origin at
the trunk's centre. It is a drawing, not a simulation of physics: what a network learns here says
nothing about patients.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from scipy.ndimage import gaussian_filter

from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.files import replacing, write_text

LABELS = {"background": 0, "liver": 1, "spleen": 2, "kidney": 3, "aorta": 4, "spine": 5}

# Mean attenuation in HU: (low, high) between which patients differ. Rounded textbook ranges for
# 120 kVp in the portal venous phase; tissue that takes up no contrast as in any CT primer (air
# -1000, water 0, fat -120 to -80, muscle 45 to 65). Where contrast is taken up, the low end is a
# weak and the high end a strong enhancement.
TISSUE_HU = {
    "fat": (-115.0, -90.0),
    "muscle": (48.0, 62.0),
    "bowel": (20.0, 40.0),
    "bile": (0.0, 15.0),
    "gas": (-990.0, -940.0),
    "canal": (25.0, 40.0),
    "trabecular bone": (150.0, 230.0),
    "cortical bone": (550.0, 800.0),
    "table": (-250.0, -150.0),  # carbon fibre over foam, averaged over the thickness of the panel
}
ENHANCING_HU = {
    "liver": (90.0, 120.0),
    "spleen": (105.0, 135.0),
    "kidney": (150.0, 200.0),
    "aorta": (135.0, 175.0),
    "vena cava": (85.0, 115.0),  # blood from the legs, which enhances late
}
AIR_HU = -1000.0
NOISE_SD_HU = (12.0, 20.0)  # abdominal CT at slices of 3 to 5 mm
POINT_SPREAD_MM = 1.2  # standard deviation of the in-plane blur
TRUNK_MM = (158.0, 106.0)  # nominal half axes (x, y)

_Millimetres = Sequence[float] | np.ndarray  # (x, y, z) or (x, y)

DEFAULT_SHAPE = (24, 128, 128)
DEFAULT_SPACING_MM = (6.0, 3.0, 3.0)


def make_phantom(
    rng: np.random.Generator,
    shape: tuple[int, int, int] = DEFAULT_SHAPE,
    spacing_mm: tuple[float, float, float] = DEFAULT_SPACING_MM,
) -> tuple[np.ndarray, np.ndarray]:
    """Draw one patient: pose, size, organ shapes, contrast and noise come from ``rng`` alone.

    Args:
        rng: The only source of randomness; the same state gives the same voxels.
        shape: Voxels along (z, y, x). A field of view of about 380 mm holds every patient.
        spacing_mm: Voxel size along (z, y, x) in mm.

    Returns:
        The CT in HU (int16) and the labels of `LABELS` (uint8), both of ``shape``.
    """
    patient = _Patient(rng)
    canvas = _Canvas(patient.anatomical(_grid_mm(shape, spacing_mm)), patient.tissue_hu)
    cavity = _draw_trunk(canvas, rng)
    _draw_spine(canvas, rng)
    _draw_organs(canvas, rng, cavity)
    _draw_bowel(canvas, rng, cavity)
    sigma = (0.0, POINT_SPREAD_MM / spacing_mm[1], POINT_SPREAD_MM / spacing_mm[2])
    ct = gaussian_filter(canvas.hu, sigma) + _correlated_noise(rng, shape, patient.noise_sd_hu)
    return np.clip(np.rint(ct), -1024, 3071).astype(np.int16), canvas.labels


def write_phantom_dataset(
    folder: Path,
    num_train: int = 12,
    num_test: int = 3,
    seed: int = 0,
    shape: tuple[int, int, int] = DEFAULT_SHAPE,
    spacing_mm: tuple[float, float, float] = DEFAULT_SPACING_MM,
) -> None:
    """Write patients as an nnU-Net raw dataset with held-out cases in imagesTs and labelsTs.

    Each patient has its own stream of random numbers, so patient 3 is the same in every dataset of
    one seed, whatever the number of patients.

    Args:
        folder: The dataset folder to make, ``DatasetXXX_Name``; it appears when it is complete.
        num_train: Training patients; nnU-Net's five folds need at least five.
        num_test: Patients held out, in imagesTs and labelsTs.
        seed: Seed of all patients.
        shape: Voxels along (z, y, x).
        spacing_mm: Voxel size along (z, y, x) in mm.

    Raises:
        UserError: If ``folder`` exists or cannot be written.
    """
    folder = Path(folder)
    if folder.exists():
        raise UserError(
            f"The phantom needs a new folder, but {folder} exists; remove it or choose another."
        )
    parts = ["Tr"] * num_train + ["Ts"] * num_test
    folder.parent.mkdir(parents=True, exist_ok=True)
    with replacing(folder) as new:
        for index, part in enumerate(parts):
            ct, labels = make_phantom(np.random.default_rng([seed, index]), shape, spacing_mm)
            name = f"phantom_{index:03d}"
            _write_nifti(ct, spacing_mm, new / f"images{part}" / f"{name}_0000.nii.gz")
            _write_nifti(labels, spacing_mm, new / f"labels{part}" / f"{name}.nii.gz")
        dataset = {
            "channel_names": {"0": "CT"},
            "labels": LABELS,
            "numTraining": num_train,
            "file_ending": ".nii.gz",
        }
        write_text(new / "dataset.json", json.dumps(dataset, indent=2))


class _Patient:
    """What differs between patients as a whole: size, position, bending, contrast, noise."""

    def __init__(self, rng: np.random.Generator) -> None:
        enhancement = rng.uniform()
        self.tissue_hu = {name: rng.uniform(*limits) for name, limits in TISSUE_HU.items()}
        for name, (low, high) in ENHANCING_HU.items():
            share = np.clip(
                enhancement + rng.normal(0, 0.1), 0, 1
            )  # organs enhance together, but not alike
            self.tissue_hu[name] = low + share * (high - low)
        self.noise_sd_hu = rng.uniform(*NOISE_SD_HU)
        self._scale = rng.uniform([0.90, 0.90, 0.92], [1.08, 1.10, 1.08])
        self._shift_mm = rng.uniform([-8, -8, -18], [8, 8, 18])
        self._rotation = np.deg2rad(rng.uniform(-6, 6))
        wavelength_mm = rng.uniform(140, 260, size=(3, 2, 3))
        self._waves = 2 * np.pi / wavelength_mm * rng.choice([-1, 1], size=(3, 2, 3))
        self._phases = rng.uniform(0, 2 * np.pi, size=(3, 2))
        self._amplitudes_mm = rng.uniform(1.0, 3.5, size=(3, 2))

    def anatomical(self, points: np.ndarray) -> np.ndarray:
        """Scanner coordinates (3, Z, Y, X) in mm to those of the nominal anatomy, in mm."""
        shift = self._shift_mm.reshape(3, 1, 1, 1)
        x, y, z = (points - shift) / self._scale.reshape(3, 1, 1, 1)
        cos, sin = np.cos(self._rotation), np.sin(self._rotation)
        turned = np.stack([cos * x - sin * y, sin * x + cos * y, z])
        bent = turned.copy()
        for axis in range(3):
            for wave, phase, amplitude in zip(
                self._waves[axis], self._phases[axis], self._amplitudes_mm[axis], strict=True
            ):
                bent[axis] += amplitude * np.sin(np.tensordot(wave, turned, axes=1) + phase)
        return bent


class _Canvas:
    """A volume painted tissue by tissue; later paint covers earlier paint, label included."""

    def __init__(self, points: np.ndarray, tissue_hu: dict[str, float]) -> None:
        self.points = points
        self.hu = np.full(points.shape[1:], AIR_HU)
        self.labels = np.zeros(points.shape[1:], np.uint8)
        self._tissue_hu = tissue_hu

    def paint(self, where: np.ndarray, tissue: str, label: str = "background") -> None:
        self.hu[where] = self._tissue_hu[tissue]
        self.labels[where] = LABELS[label]

    def ellipsoid(
        self, centre: _Millimetres, half_axes: _Millimetres, power: float = 2.0
    ) -> np.ndarray:
        """Voxels inside an ellipsoid in mm; with two coordinates it is a cylinder along z."""
        distance = np.zeros(self.hu.shape)
        for coordinate, middle, half_axis in zip(self.points, centre, half_axes, strict=False):
            distance += np.abs((coordinate - middle) / half_axis) ** power
        return distance < 1


def _draw_trunk(canvas: _Canvas, rng: np.random.Generator) -> np.ndarray:
    """Table, skin, fat rim, muscle wall and cavity fat. Returns the cavity as a mask."""
    fat_mm, muscle_mm = rng.uniform(8, 22), rng.uniform(8, 13)
    x, y, _ = canvas.points
    table_top = TRUNK_MM[1] + 6 - 0.0006 * x**2  # a tray that bends up at the sides
    canvas.paint((y > table_top) & (y < table_top + 12) & (np.abs(x) < 210), "table")

    def inset(depth_mm: float) -> np.ndarray:
        return canvas.ellipsoid((0, 0), (TRUNK_MM[0] - depth_mm, TRUNK_MM[1] - depth_mm), power=2.4)

    cavity = inset(fat_mm + muscle_mm)
    canvas.paint(inset(0), "fat")
    canvas.paint(inset(fat_mm), "muscle")
    canvas.paint(cavity, "fat")
    return cavity


def _draw_spine(canvas: _Canvas, rng: np.random.Generator) -> None:
    for side in (-1, 1):
        canvas.paint(canvas.ellipsoid((side * 40, 72), (28, 17)), "muscle")  # erector spinae
        canvas.paint(canvas.ellipsoid((side * 37, 46), (13, 16)), "muscle")  # psoas
    size = rng.uniform(0.92, 1.08)
    body, arch, process = ((0, 46), (24, 19)), ((0, 71), (17, 14)), ((0, 84), (5, 12))
    for shrink_mm, tissue in ((0, "cortical bone"), (3.5, "trabecular bone")):
        for centre, (half_x, half_y) in (body, arch, process):
            half_axes = (max(half_x * size - shrink_mm, 1.0), max(half_y * size - shrink_mm, 1.0))
            canvas.paint(canvas.ellipsoid(centre, half_axes), tissue, "spine")
    canvas.paint(canvas.ellipsoid((0, 70), (9, 7)), "canal")


def _draw_organs(canvas: _Canvas, rng: np.random.Generator, cavity: np.ndarray) -> None:
    def organ(centre: _Millimetres, half_axes: _Millimetres) -> np.ndarray:
        """An ellipsoid a few mm off its nominal place and a few per cent off its size."""
        moved = np.add(centre, rng.normal(0, 3.0, len(centre)))
        return canvas.ellipsoid(
            moved, np.multiply(half_axes, rng.uniform(0.9, 1.1, len(half_axes)))
        )

    free = cavity & (canvas.labels == 0) & (canvas.hu < 0)  # fat that no muscle or bone has taken
    for side in (-1, 1):
        centre = (side * 66, 40, -14 + 6 * side)  # the left kidney stands higher
        sinus = canvas.ellipsoid((side * 54, 36, centre[2]), (14, 8, 24))
        canvas.paint(organ(centre, (26, 24, 50)) & ~sinus & free, "kidney", "kidney")
    canvas.paint(organ((9, 18), (10, 10)) & free, "aorta", "aorta")
    canvas.paint(organ((-20, 19), (12, 9)) & free, "vena cava")
    free &= canvas.hu < 0
    liver = organ((-72, -14, 32), (74, 72, 70)) | organ((-12, -46, 42), (66, 34, 38))
    canvas.paint(liver & free, "liver", "liver")
    canvas.paint(organ((100, 30, 34), (32, 44, 44)) & free & ~liver, "spleen", "spleen")
    canvas.paint(organ((-44, -44, 0), (13, 16, 18)) & free, "bile")


def _draw_bowel(canvas: _Canvas, rng: np.random.Generator, cavity: np.ndarray) -> None:
    """Stomach and bowel loops where the cavity is free; gas lies above fluid (patient supine)."""
    loops: list[tuple[_Millimetres, _Millimetres]] = [((48, -40, 36), (40, 32, 44))]
    for _ in range(rng.integers(16, 26)):
        loops.append((rng.uniform([-105, -70, -85], [105, 5, 0]), rng.uniform(10, 26, 3)))
    for centre, half_axes in loops:
        free = cavity & (canvas.labels == 0) & (canvas.hu < 0)
        lumen = canvas.ellipsoid(centre, half_axes) & free
        canvas.paint(lumen, "bowel")
        fluid_level = centre[1] + rng.uniform(-0.6, 0.2) * half_axes[1]
        inner = canvas.ellipsoid(centre, np.subtract(half_axes, 3.0))  # a wall of 3 mm
        canvas.paint(lumen & inner & (canvas.points[1] < fluid_level), "gas")


def _grid_mm(shape: tuple[int, int, int], spacing_mm: tuple[float, float, float]) -> np.ndarray:
    """Voxel centres (x, y, z) in mm around the middle of the volume, as an array (3, Z, Y, X)."""
    axes = [
        (np.arange(size) - (size - 1) / 2) * step
        for size, step in zip(shape, spacing_mm, strict=True)
    ]
    z, y, x = np.meshgrid(*axes, indexing="ij")
    return np.stack([x, y, z])


def _correlated_noise(
    rng: np.random.Generator, shape: tuple[int, int, int], sd_hu: float
) -> np.ndarray:
    """Noise of a given standard deviation, correlated in plane as reconstruction leaves it."""
    noise = gaussian_filter(rng.normal(size=shape), (0.0, 0.7, 0.7))
    return noise * (sd_hu / noise.std())


def _write_nifti(voxels: np.ndarray, spacing_mm: tuple[float, float, float], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(voxels)
    image.SetSpacing([float(step) for step in reversed(spacing_mm)])
    sitk.WriteImage(image, str(path), useCompression=True)
