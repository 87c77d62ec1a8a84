"""``meddinov3 export-onnx``: PyTorch's logits without torch."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from nnunetv2_meddinov3 import cli
from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.segment.model_source import opened_model
from nnunetv2_meddinov3.segment.segmenting import load_predictor
from tests.segment.conftest import make_model

# torch's exporter and onnxscript, on what they do themselves
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

ROOT = Path(__file__).parents[2]
RUN = """
import json, sys
sys.path[:0] = [sys.argv[1]]
import numpy, onnxruntime
try:
    import torch
except ImportError:
    pass
else:
    raise SystemExit("torch can be imported here")
session = onnxruntime.InferenceSession(sys.argv[2])
facts = json.loads(session.get_modelmeta().custom_metadata_map["meddinov3"])
images = numpy.load(sys.argv[3])
numpy.save(sys.argv[4], session.run(None, {"images": images})[0])
print(json.dumps(facts))
"""


def run_command(model, out, *lines):
    """Export in a process of its own.

    Here the shapes in the signatures of our networks are checked,
    by calls that torch does not export.
    """
    code = "\n".join([*lines, "from nnunetv2_meddinov3.cli import main"])
    code += f"\nraise SystemExit(main(['export-onnx', {str(model)!r}, '-o', {str(out)!r}]))"
    command = [sys.executable, "-W", "ignore", "-c", code]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=200, check=False, cwd=ROOT
    )


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A model of two folds, its file, and what was said."""
    folder = tmp_path_factory.mktemp("model")
    model = make_model(folder / "results", folds=("0", "1"))
    done = run_command(model, folder / "m.onnx")
    assert done.returncode == 0, done.stderr
    assert "images of any size; largest difference" in done.stdout
    return model, folder / "m.onnx"


def logits_of(model, images):
    """The mean of the folds' logits, by the networks that nnU-Net builds."""
    with opened_model(model) as opened:
        predictor = load_predictor(opened, "cpu")
    total = 0
    with torch.no_grad():
        for weights in predictor.list_of_parameters:
            predictor.network.load_state_dict(weights)
            total = total + predictor.network.eval()(torch.from_numpy(images))
    return (total / len(predictor.list_of_parameters)).numpy()


@pytest.mark.parametrize(
    "shape", [(1, 1, 32, 32), (5, 1, 32, 32), (1, 1, 100, 77), (2, 1, 16, 208), (1, 1, 640, 512)]
)
def test_logits_are_those_of_pytorch_for_any_batch_and_size(shape, exported):
    model, path = exported
    images = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found, expected = session.run(None, {"images": images})[0], logits_of(model, images)
    assert found.shape == (shape[0], 3, *shape[2:])
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
    assert np.abs(expected).max() > 1


def test_it_runs_without_torch(exported, tmp_path):
    model, path = exported
    place = tmp_path / "packages"
    place.mkdir()
    for package in Path(onnxruntime.__file__).parents[1].iterdir():
        if re.match(r"(numpy|onnxruntime|flatbuffers|google|protobuf|packaging)\b", package.name):
            (place / package.name).symlink_to(package)
    images = np.random.default_rng(2).normal(size=(2, 1, 48, 64)).astype(np.float32)
    np.save(tmp_path / "in.npy", images)
    arguments = [place, path, tmp_path / "in.npy", tmp_path / "out.npy"]
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", RUN, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    expected = logits_of(model, images)
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected, atol=1e-3, rtol=1e-4)
    facts = json.loads(done.stdout)
    assert facts["labels"] == {"background": 0, "liver": 1, "spleen": 2}
    assert facts["spacing_mm"] == [1.5, 1.5]
    assert facts["folds"] == ["0", "1"]
    assert facts["any_size"] is True


def test_one_file_is_written_and_nothing_beside_it(exported):
    _, path = exported
    assert [p.name for p in path.parent.iterdir() if p.name != "results"] == ["m.onnx"]


def test_another_network_than_pytorchs_is_not_written(tmp_path, model):
    lines = [
        "from nnunetv2_meddinov3.segment import onnx_export",
        "onnx_export.TOLERANCE = 1e-12",
    ]
    done = run_command(model, tmp_path / "m.onnx", *lines)
    assert done.returncode == 1
    assert "nothing was written" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["results"]


def test_a_network_that_torch_cannot_export_is_one_sentence(tmp_path, model, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no such operator\nand a long list")

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(UserError, match="but Segmenter is not: no such operator") as caught:
        cli.main(["export-onnx", str(model), "-o", str(tmp_path / "m.onnx")])
    assert "\n" not in str(caught.value)


def test_mistakes_are_one_sentence(tmp_path, model, monkeypatch):
    with pytest.raises(UserError, match=r"ends in \.onnx"):
        cli.main(["export-onnx", str(model), "-o", str(tmp_path / "m.pt")])
    with pytest.raises(UserError, match="--model must be"):
        cli.main(["export-onnx", str(tmp_path / "nowhere"), "-o", str(tmp_path / "m.onnx")])
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match=r"pip install 'nnunetv2_meddinov3\[onnx\]'"):
        cli.main(["export-onnx", str(model), "-o", str(tmp_path / "m.onnx")])
