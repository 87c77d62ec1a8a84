"""The whole way on real CT, where it lies beside the checkout."""

import json
from pathlib import Path

import pytest

from nnunetv2_meddinov3.cli import main
from nnunetv2_meddinov3.models.build import build_segmenter, load_backbone

DATA = Path(__file__).parents[3] / "shared" / "data"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not DATA.is_dir(), reason="no real CT in ../shared/data"),
]


@pytest.mark.parametrize("init", ["none", "released"])
def test_real_ct_is_curated_pretrained_in_three_stages_and_loaded(init, tmp_path, released_file):
    store, out = tmp_path / "store", tmp_path / "run"
    sources = [DATA / "lidc_idri_0314", DATA / "totalsegmentator_example" / "example_ct_sm.nii.gz"]
    assert main(["curate", *map(str, sources), "--store", str(store)]) == 0
    if init == "released":
        released_file(tmp_path / "model.pth")
        init = str(tmp_path / "model.pth")
    short = [f"stage{n}.optim.steps=3" for n in (1, 2, 3)]
    short += ["stage1.engine.export_at=[2]", "stage2.losses.gram.teacher=previous@2"]
    short += ["stage1.optim.lr.warmup_steps=1", "stage2.losses.local_weight.cosine_steps=2"]
    short += ["stage2.losses.gram.weight.cosine_steps=2", "stage3.optim.lr.cosine_steps=2"]
    short += ["optim.batch_size=8", "losses.koleo_group=4", "engine.log_every=1", "data.workers=0"]
    short += ["stage3.engine.micro_batch=4"]
    command = ["pretrain", "tiny", "--store", str(store), "--out", str(out), "--init", init, *short]
    assert main(command) == 0
    rows = (out / "stage3/metrics.jsonl").read_text().splitlines()
    assert len(rows) == 3
    assert json.loads(rows[-1])["loss_gram"] > 0
    backbone = load_backbone(out / "stage3/teacher.safetensors")
    assert build_segmenter(backbone, num_classes=2).backbone.embed_dim == 128
