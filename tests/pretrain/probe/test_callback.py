import pytest
import torch

from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.files import read_rows
from nnunetv2_meddinov3.models.architecture import Architecture
from nnunetv2_meddinov3.models.backbone import Backbone
from nnunetv2_meddinov3.pretrain.config import load_config
from nnunetv2_meddinov3.pretrain.distributed import Runtime
from nnunetv2_meddinov3.pretrain.intensity import intensity_of
from nnunetv2_meddinov3.pretrain.probe import labelled
from nnunetv2_meddinov3.pretrain.probe.callback import ProbeCallback
from nnunetv2_meddinov3.pretrain.probe.labelled import ProbeData
from nnunetv2_meddinov3.pretrain.probe.probing import run_probe
from nnunetv2_meddinov3.pretrain.train import Stage
from nnunetv2_meddinov3.signals import Stop

ALONE = Runtime(0, 1, torch.device("cpu"), "fp32", False)
ARCHITECTURE = Architecture(32, 2, 2, patch_size=16, layer_scale=0.5)


@pytest.fixture
def config(dataset, small_stage, monkeypatch):
    """A stage with a probe of few and small slices."""
    original = ProbeData.from_nnunet.__func__
    few = classmethod(lambda cls, folder: original(cls, folder, size=64, slices_per_case=3))
    monkeypatch.setattr(labelled.ProbeData, "from_nnunet", few)
    words = ("optim.steps=3", "engine.probe_every=2", f"engine.probe_dataset={dataset}")
    return load_config("tiny_stage1", small_stage(*words))


def a_backbone(seed=0):
    torch.manual_seed(seed)
    return Backbone(ARCHITECTURE, mask_token=True)


def callback(config, folder, backbone, step=0):
    return ProbeCallback(config, folder, ALONE, backbone.state_dict, ARCHITECTURE, step)


def test_a_row_is_what_a_probe_of_the_same_weights_gives(config, dataset, tmp_path):
    backbone = a_backbone()
    assert callback(config, tmp_path / "stage1", backbone)(0, "start") is None
    (row,) = read_rows(tmp_path / "stage1" / "probe.jsonl")
    data = ProbeData.from_nnunet(dataset)
    wanted = run_probe(backbone, data, intensity=intensity_of(config)).to_dict()
    assert row == {"step": 0, "weights": "start", **wanted, "verdict": None}


def test_a_resume_drops_later_rows_and_keeps_the_start(config, tmp_path):
    first = callback(config, tmp_path, a_backbone())
    for step in (0, 2, 4):
        first(step, "teacher" if step else "start")
    callback(config, tmp_path, a_backbone(1), step=2)(4, "teacher")
    rows = read_rows(tmp_path / "probe.jsonl")
    assert [row["step"] for row in rows] == [0, 2, 4]
    assert rows[2]["dense"] != rows[1]["dense"]


def test_a_stage_that_begins_anew_probes_its_start_once(config, tmp_path):
    for seed in (0, 1):
        callback(config, tmp_path, a_backbone(seed))(0, "start")
    assert len(read_rows(tmp_path / "probe.jsonl")) == 1


def test_a_probe_leaves_no_trace_in_the_random_state(config, tmp_path):
    probe = callback(config, tmp_path, a_backbone())
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    probe(0, "start")
    assert torch.equal(torch.rand(3), wanted)


def test_features_that_become_worse_are_said_so(config, tmp_path, monkeypatch):
    said = []

    def judge(start, now):
        said.append((start["step"], now["step"]))
        return "worse"

    monkeypatch.setattr("nnunetv2_meddinov3.pretrain.probe.callback.verdict", judge)
    probe = callback(config, tmp_path, a_backbone())
    assert probe(0, "start") is None
    assert probe(2, "teacher") == "worse"
    assert said == [(0, 2)]
    assert [row["verdict"] for row in read_rows(tmp_path / "probe.jsonl")] == [None, "worse"]


def test_a_dataset_that_cannot_be_used_is_told_before_the_stage_starts(config, tmp_path):
    config.engine.probe_dataset = str(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"there is no .*nowhere/dataset\.json"):
        callback(config, tmp_path / "stage1", a_backbone())
    assert not (tmp_path / "stage1").exists()


@pytest.mark.slow
def test_a_stage_probes_its_start_at_intervals_and_at_its_end(config, tmp_path):
    assert Stage(config, tmp_path, ALONE, previous=None, stream=None).run(Stop())
    rows = read_rows(tmp_path / "probe.jsonl")
    assert [(row["step"], row["weights"]) for row in rows] == [
        *((0, "start"), (2, "teacher"), (3, "teacher")),
    ]
