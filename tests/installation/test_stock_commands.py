"""nnU-Net's own commands, typed as a user types them, in environments made by pip."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from nnunetv2_meddinov3.discovery import TRAINERS

pytestmark = pytest.mark.slow

SHARED = Path(__file__).parents[3] / "shared" / "data"
PLANS = ("-p", "nnUNetMedDINOv3Plans")
HERE = ("-device", "cpu")


def make_dataset(raw):
    """Write a dataset whose organ is a bright disc; returns its id."""
    folder = raw / "Dataset701_Discs"
    for part in ("imagesTr", "labelsTr", "imagesTs"):
        (folder / part).mkdir(parents=True)
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:60, :72]
    for case in range(6):
        disc = (y - rng.integers(20, 40)) ** 2 + (x - rng.integers(20, 50)) ** 2 < 150
        label = np.repeat(disc[None], 4, axis=0).astype(np.uint8)
        ct = rng.normal(-50, 30, label.shape) + 200 * label
        for array, part, ending in ((ct, "images", "_0000"), (label, "labels", "")):
            image = sitk.GetImageFromArray(array.astype(np.int16))
            image.SetSpacing((0.8, 0.8, 3.0))
            split = "Tr" if case < 5 else "Ts"
            if (folder / f"{part}{split}").exists():
                sitk.WriteImage(image, folder / f"{part}{split}" / f"case_{case}{ending}.nii.gz")
    description = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "disc": 1},
        "numTraining": 5,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(description))
    return "701"


def make_real_dataset(raw):
    """Write Dataset802 (real CT, six labels); returns its id."""
    if not (SHARED / "make_nnunet.py").exists():
        pytest.skip("the real CT of shared/data is not beside this checkout")
    subprocess.run([sys.executable, SHARED / "make_nnunet.py", raw, "totalseg"], check=True)
    return "802"


class Desk:
    """The commands of one environment with their nnU-Net folders."""

    def __init__(self, environment, root, **variables):
        self.environment, self.root = environment, root
        self.variables = {f"nnUNet_{n}": str(root / n) for n in ("raw", "preprocessed", "results")}
        for folder in self.variables.values():
            Path(folder).mkdir(parents=True, exist_ok=True)
        self.variables |= {"nnUNet_def_n_proc": "1", **variables}

    def __call__(self, name, *arguments, **variables):
        done = self.environment.stock_command(name, *arguments, **self.variables, **variables)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return done.stdout + done.stderr

    def prepare(self, number, size):
        options = ("-np", "1", "-npfp", "1", "--verify_dataset_integrity")
        chosen = ("-pl", "MedDINOv3Planner", "-c", f"2d_{size}")
        self("nnUNetv2_plan_and_preprocess", "-d", number, *chosen, *options, MEDDINOV3_SIZE=size)

    def train(self, number, size, *more, trainer="MedDINOv3Trainer"):
        names = (number, f"2d_{size}", "0", "-tr", trainer, *PLANS)
        return self("nnUNetv2_train", *names, *HERE, *more, nnUNet_n_proc_DA="0")

    def predict(self, number, size, images, out, *, command=("nnUNetv2_predict",), **variables):
        places = ("-i", images, "-o", self.root / out, "-npp", "0", "-nps", "0")
        names = ("-d", number, "-c", f"2d_{size}", "-f", "0", "-tr", "MedDINOv3Trainer", *PLANS)
        said = self(*command, *map(str, places), *names, *HERE, **variables)
        is_ours = command != ("nnUNetv2_predict",) or bool(variables)
        assert ("/4 slices" in said) == is_ours
        return hashes(self.root / out)

    def session(self, *commands):
        """Run commands one after the other in one process, which imports torch once.

        A command is a list, or a pair of the desk whose folders it uses and a list.
        """
        pairs = [command if isinstance(command, tuple) else (self, command) for command in commands]
        chosen = [(desk.variables, [str(part) for part in command]) for desk, command in pairs]
        done = self.environment.stock_session(*chosen, nnUNet_n_proc_DA="0")
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return done.stdout


def hashes(folder):
    """The SHA-256 of each segmentation in a folder."""
    return {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.glob("*.nii.gz"))
    }


def test_train_here_predict_there_without_the_weights_file(installed, released_file, tmp_path):
    weights = tmp_path / "model.pth"
    released_file(weights)
    here = Desk(
        installed,
        tmp_path / "here",
        MEDDINOV3_WEIGHTS=str(weights),
        MEDDINOV3_EPOCHS="2",
        MEDDINOV3_ITERATIONS="4",
    )
    number = make_dataset(tmp_path / "here" / "raw")
    here.prepare(number, "64")
    log = here.train(number, "64")
    assert "training checkpoint, teacher.backbone" in log
    assert log.count("Licence of these weights") == 1
    images = next((tmp_path / "here" / "raw").glob("Dataset*/imagesTs"))
    expected = here.predict(number, "64", images, "predicted")
    assert expected
    ours = here.predict(number, "64", images, "ours", command=("meddinov3", "predict"))
    assert ours == expected
    asked = here.predict(number, "64", images, "asked", MEDDINOV3_PREDICTOR="1")
    assert asked == expected
    here.train(number, "64", "--c")
    assert here.predict(number, "64", images, "after_c") == expected
    archive = tmp_path / "model.zip"
    names = ("-d", number, "-c", "2d_64", "-f", "0", "-tr", "MedDINOv3Trainer", *PLANS)
    here("nnUNetv2_export_model_to_zip", "-o", str(archive), *names)

    weights.unlink()
    images = shutil.copytree(images, tmp_path / "elsewhere")
    shutil.rmtree(tmp_path / "here")
    there = Desk(installed, tmp_path / "there", MEDDINOV3_WEIGHTS=str(weights))
    there("nnUNetv2_install_pretrained_model_from_zip", str(archive))
    assert there.predict(number, "64", images, "predicted") == expected


def test_stock_plans_and_stock_2d_work_too(installed, tmp_path):
    desk = Desk(
        installed,
        tmp_path,
        MEDDINOV3_WEIGHTS="none",
        MEDDINOV3_BACKBONE="vit_tiny",
        MEDDINOV3_EPOCHS="1",
        MEDDINOV3_ITERATIONS="2",
    )
    number = make_dataset(tmp_path / "raw")
    desk("nnUNetv2_plan_and_preprocess", "-d", number, "-c", "2d", "-np", "1", "-npfp", "1")
    options = ("-tr", "MedDINOv3Trainer", *HERE)
    desk("nnUNetv2_train", number, "2d", "0", *options, nnUNet_n_proc_DA="0")
    summary = next((tmp_path / "results").rglob("validation/summary.json"))
    assert "foreground_mean" in json.loads(summary.read_text())


def test_the_unmodified_recipe_runs_with_a_vit_base_in_the_released_format(
    installed, released_file, tmp_path
):
    weights = tmp_path / "model.pth"
    released_file(weights, size="vit_base")
    desk = Desk(
        installed,
        tmp_path,
        MEDDINOV3_WEIGHTS=str(weights),
        MEDDINOV3_EPOCHS="1",
        MEDDINOV3_ITERATIONS="1",
    )
    number = make_dataset(tmp_path / "raw")
    desk.prepare(number, "64")
    log = desk.train(number, "64", "--disable_checkpointing")
    assert "tensors used" in log
    plans = next((tmp_path / "results").rglob("plans.json")).read_text()
    network = json.loads(plans)["configurations"]["2d_64"]["architecture"]["arch_kwargs"]
    assert network["layers"] == [2, 5, 8, 11]
    assert network["drop_path"] == 0.2
    assert network["backbone"]["norm_eps"] == 1e-6
    assert network["backbone"]["qkv_bias"] is False


# Not those that differ from another in weights or options alone.
TRAVELLERS = [
    name
    for name, module in TRAINERS.items()
    if module.endswith("baseline_trainers") and not name.endswith(("_x4", "_imagenet", "_adamw"))
]


def travel(ready, there, number, trainer, folder):
    """Train, predict, export; import elsewhere and predict the same images."""
    images = shutil.copytree(next(ready.root.glob(f"raw/Dataset{number}_*/imagesTs")), folder / "x")
    archive, first, second = folder / "model.zip", folder / "first", folder / "second"
    chosen = ("-c", "2d_64", "-f", "0", "-tr", trainer, *PLANS)
    predict = ["nnUNetv2_predict", "-i", images, "-npp", "0", "-nps", "0", *HERE, *chosen]
    predict += ["-d", number]
    log = ready.session(
        ["nnUNetv2_train", number, "2d_64", "0", "-tr", trainer, *PLANS, *HERE],
        [*predict, "-o", first],
        ["nnUNetv2_export_model_to_zip", "-d", number, "-o", archive, *chosen],
        (there, ["nnUNetv2_install_pretrained_model_from_zip", archive]),
        (there, [*predict, "-o", second]),
    )
    assert hashes(first)
    assert hashes(first) == hashes(second)
    return log


def new_desk(environment, root, weights="none"):
    return Desk(
        environment,
        root,
        MEDDINOV3_WEIGHTS=weights,
        MEDDINOV3_BACKBONE="vit_tiny",
        MEDDINOV3_EPOCHS="1",
        MEDDINOV3_ITERATIONS="2",
    )


@pytest.fixture(scope="module")
def ready(installed, tmp_path_factory):
    """A desk with a planned and preprocessed dataset, for runs of two iterations."""
    desk = new_desk(installed, tmp_path_factory.mktemp("baselines"))
    desk.prepare(make_dataset(desk.root / "raw"), "64")
    return desk


@pytest.mark.parametrize("trainer", [*TRAVELLERS, "MedDINOv3Trainer_v2"])
def test_each_trainer_trains_predicts_and_travels(trainer, ready, installed, tmp_path):
    there = Desk(installed, tmp_path / "there", MEDDINOV3_WEIGHTS=str(tmp_path / "gone.pth"))
    travel(ready, there, "701", trainer, tmp_path)


def test_a_model_of_real_ct_travels_without_its_weights(installed, released_file, tmp_path):
    weights = tmp_path / "model.pth"
    released_file(weights)
    desk = new_desk(installed, tmp_path / "here", str(weights))
    number = make_real_dataset(tmp_path / "here" / "raw")
    desk.prepare(number, "64")
    there = Desk(installed, tmp_path / "there", MEDDINOV3_WEIGHTS=str(tmp_path / "gone.pth"))
    assert "training checkpoint, teacher.backbone" in travel(
        desk, there, number, "MedDINOv3Trainer", tmp_path
    )
