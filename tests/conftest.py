"""Shared by all tests: torch first, the goldens' processor path, small synthetic volumes."""

import json
import locale
import os
import subprocess
import sys

# tests/golden was recorded with AVX2 kernels; other instruction sets round differently. These
# settings hold only where MKL heeds them, so no test may depend on the last bits.
for _name, _value in {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    # networks of this size gain nothing from threads and lose much where cores are shared
    "OMP_NUM_THREADS": "1",
}.items():
    os.environ.setdefault(_name, _value)

from pathlib import Path  # noqa: E402

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import SimpleITK as sitk  # noqa: E402
import torch  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

# The shapes in these modules' signatures are checked wherever a test calls them.
_OURS = "nnunetv2_meddinov3"
install_import_hook(
    [
        f"{_OURS}.models",
        *(f"{_OURS}.pretrain.{n}" for n in ("losses", "views", "heads", "student", "distillation")),
    ],
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
)


@pytest.fixture(autouse=True)
def same_locale():
    """GDCM sets the process's locale to C when it writes DICOM, as many tests do."""
    before = locale.setlocale(locale.LC_ALL)
    yield
    locale.setlocale(locale.LC_ALL, before)


@pytest.fixture(scope="session")
def shared():
    """The folder ../shared with real CT in its data/; without it the test is skipped."""
    folder = Path(__file__).parents[2] / "shared"
    if not (folder / "data").is_dir():
        pytest.skip("needs the real CT of ../shared/data, which is not beside this checkout")
    return folder


@pytest.fixture(scope="session")
def shared_data(shared):
    """The folder ../shared/data."""
    return shared / "data"


@pytest.fixture(scope="session")
def gpu():
    """The CUDA device; without one the test is skipped."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and torch sees none")
    return torch.device("cuda")


@pytest.fixture(scope="session")
def released_file():
    """A function that writes a random ViT in the format of MedDINOv3's release, Meta's names."""
    return _write_released_file


def _write_released_file(path, size="vit_tiny", seed=0):
    from nnunetv2_meddinov3.models.architecture import architecture_of
    from nnunetv2_meddinov3.models.backbone import Backbone

    torch.manual_seed(seed)
    backbone = Backbone(architecture_of(size, qkv_bias=False, norm_eps=1e-6))
    renamed = {"vit.reg_token": "storage_tokens", "vit.rope.periods": "rope_embed.periods"}
    state = {"backbone.mask_token": torch.zeros(1, backbone.embed_dim)}
    for name, tensor in backbone.state_dict().items():
        key = renamed.get(name, name.removeprefix("vit."))
        key = key.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma")
        state[f"backbone.{key}"] = tensor
    state["dino_head.last_layer.weight"] = torch.zeros(8, 4)
    torch.save({"teacher": state}, path)
    return backbone


@pytest.fixture(scope="session")
def make_ct():
    """A function that draws a CT (S, H, W): a body in air, each slice with noise of its own."""
    return _make_ct


@pytest.fixture(scope="session")
def write_image():
    """A function that writes an array (S, H, W) in LPS as one file, the ending says which."""
    return _write_image


@pytest.fixture(scope="session")
def write_series():
    """A function that writes an array (S, H, W) as a DICOM series in shuffled order of files."""
    return _write_series


def _make_ct(slices=6, size=40, seed=0):
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    noise = generator.normal(0, 20, (slices, size, size))
    organs = 60 * np.sin(x * generator.uniform(3, 9)) * np.cos(y * generator.uniform(3, 9))
    body = (x / 0.8) ** 2 + (y / 0.6) ** 2 < 1
    return np.rint(np.where(body, 40 + organs, -1000) + noise).astype(np.int16)


def _write_image(path, array, spacing=(2.0, 0.8, 0.8), first_mm=0.0):
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing[::-1])
    image.SetOrigin((0.0, 0.0, first_mm))
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path))
    return path


def _write_series(folder, array, spacing=(2.0, 0.8, 0.8), modality="CT", series="1.2.826.0.1.7"):
    folder.mkdir(parents=True, exist_ok=True)
    order = np.random.default_rng(1).permutation(len(array))
    for name, z in enumerate(order):
        image = sitk.GetImageFromArray(array[z])
        image.SetSpacing(spacing[:0:-1])
        tags = {
            "0008|0016": "1.2.840.10008.5.1.4.1.1.2",
            "0008|0018": f"{series}.{z + 1}",
            "0008|0060": modality,
            "0010|0020": "P1",
            "0018|0050": str(spacing[0]),
            "0020|000d": "1.2.826.0.1.6",
            "0020|000e": series,
            "0020|0013": str(z + 1),
            "0020|0032": f"0\\0\\{z * spacing[0]}",
            "0020|0037": "1\\0\\0\\0\\1\\0",
        }
        for tag, value in tags.items():
            image.SetMetaData(tag, value)
        writer = sitk.ImageFileWriter()
        writer.KeepOriginalImageUIDOn()
        writer.SetFileName(str(folder / f"{name:03}.dcm"))
        writer.Execute(image)
    return folder


@pytest.fixture
def source(tmp_path, make_ct, write_image):
    """A folder of five volumes."""
    for number in range(5):
        write_image(tmp_path / "source" / f"v{number}.nii.gz", make_ct(4, 24, seed=number))
    return tmp_path / "source"


@pytest.fixture(scope="session")
def ct_store(tmp_path_factory):
    """A store of four synthetic CT volumes of six slices each."""
    from nnunetv2_meddinov3.curate.pipeline import curate

    folder = tmp_path_factory.mktemp("volumes")
    for i in range(4):
        _write_image(folder / f"patient{i}.nii.gz", _make_ct(6, 64, seed=i))
    store = tmp_path_factory.mktemp("store") / "ct"
    curate([folder], store)
    return store


# A process that has imported what nnU-Net needs, but neither nnU-Net nor us, and forks for each
# command: imports take most of the time of a command that ends with a sentence.
_FORKING = """
import importlib, json, os, runpy, sys
for name in sys.argv[1].split(","):
    try:
        importlib.import_module(name)
    except ImportError:
        pass
for line in sys.stdin:
    wanted = json.loads(line)
    child = os.fork()
    if child == 0:
        for number, name in enumerate((os.devnull, wanted["stdout"], wanted["stderr"])):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), number)
        os.environ.clear()
        os.environ.update(wanted["environment"])
        sys.argv = ["meddinov3", *wanted["arguments"]]
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    sys.exit()
runpy.run_module("nnunetv2_meddinov3", run_name="__main__", alter_sys=True)
"""
_LIBRARIES = (
    "torch,torch._dynamo,torchvision,timm,SimpleITK,scipy.ndimage,skimage.morphology,seaborn,"
    "batchgenerators.dataloading.multi_threaded_augmenter,acvl_utils,blosc2,pandas"
)


@pytest.fixture(scope="session")
def meddinov3_command(tmp_path_factory):
    """A function that runs ``meddinov3`` with arguments and an environment, in a fork.

    Returns exit code, stdout and stderr.
    """
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    root, folder = Path(__file__).parents[1], tmp_path_factory.mktemp("commands")
    environment = {**os.environ, "PYTHONPATH": str(root), "PYTHONWARNINGS": "ignore"}
    server = subprocess.Popen(
        [sys.executable, "-c", _FORKING, _LIBRARIES],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def command(arguments, environment):
        for name in ("stdout", "stderr"):
            (folder / name).write_text("")
        wanted = {name: str(folder / name) for name in ("stdout", "stderr")}
        wanted |= {"arguments": [str(a) for a in arguments], "environment": environment}
        server.stdin.write(f"{json.dumps(wanted)}\n")
        server.stdin.flush()
        code = int(server.stdout.readline())
        return (code, *((folder / name).read_text() for name in ("stdout", "stderr")))

    yield command
    server.stdin.close()
    server.wait()
    server.stdout.close()
