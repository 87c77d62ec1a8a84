import json

import numpy as np
import pytest
import torch

from nnunetv2_meddinov3.pretrain.monitor.features import (
    fixed_slices,
    load_maps,
    pca_maps,
    save_maps,
    similarity_maps,
    spread_rows,
)
from nnunetv2_meddinov3.pretrain.monitor.report import write_report


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def some_run(folder, verdicts=()):
    folder.mkdir()
    write_rows(
        folder / "metrics.jsonl",
        [
            {"step": s, "loss_total": 9 - s / 10, "loss_koleo": 0.1, "lr": 1e-3, "skipped": 0}
            | {"images_per_second": 5.0, "memory_gb": 1.5, "data_wait_percent": 3}
            for s in range(1, 30)
        ],
    )
    health = {"cls_rank_student": 20.0, "cls_rank_teacher": 21.0, "update": None}
    write_rows(
        folder / "health.jsonl",
        [{"step": s, **health, "verdicts": list(verdicts)} for s in (1, 10, 20)],
    )
    write_rows(
        folder / "probe.jsonl",
        [{"step": 0, "weights": "start", "knn": 0.4, "linear": 0.5, "dense": 0.3, "verdict": None}],
    )
    (folder / "config.yaml").write_text("stage: 1\nnote: <b>&\n")
    (folder / "run.json").write_text(json.dumps({"command": ["meddinov3", "<x>"], "git": None}))
    slices = torch.rand(2, 1, 64, 64) * 400 - 200
    for step in (0, 10, 20):
        save_maps(folder, step, slices, torch.randn(2, 4, 4, 8))
    return folder


def test_the_report_is_one_page_with_curves_maps_and_words(tmp_path):
    folder = some_run(
        tmp_path / "stage1", ["collapse: all the same (effective rank 1.1); lower lr."]
    )
    page = write_report(folder).read_text()
    assert page.count("data:image/png;base64,") == 5
    assert "http" not in page.replace("https://", "")
    assert "collapse: all the same (effective rank 1.1)" in page
    assert "checks from step 1 to 20, 3 of 3" in page
    assert "29 steps, total loss 8.900 at step 1 and 6.100 at the last" in page
    assert "&lt;b&gt;&amp;" in page
    assert "&lt;x&gt;" in page


def test_a_run_that_has_hardly_begun_has_a_report(tmp_path):
    folder = tmp_path / "stage1"
    folder.mkdir()
    (folder / "config.yaml").write_text("stage: 1\n")
    (folder / "run.json").write_text("{}")
    assert "No step is done" in write_report(folder).read_text()


def test_principal_axes_that_only_turn_give_the_same_colours():
    g = np.random.default_rng(0)
    base = g.normal(size=(2, 6, 6, 16)) * np.linspace(3, 0.1, 16)
    rotation = np.linalg.qr(g.normal(size=(16, 16)))[0]
    a, b = pca_maps([base, base @ rotation])
    assert a.shape == (2, 6, 6, 3)
    np.testing.assert_allclose(a, b, atol=1e-6)


def test_similarity_is_1_at_its_patch_and_the_cosine_elsewhere():
    patches = np.random.default_rng(0).normal(size=(1, 3, 3, 5))
    out = similarity_maps(patches, [(1, 2)])[0]
    assert out[1, 2] == pytest.approx(1)
    a, b = patches[0, 0, 0], patches[0, 1, 2]
    assert out[0, 0] == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_slices_of_different_volumes_with_most_body_are_followed():
    volumes = np.repeat([0, 1, 2], 4)
    body = np.array([0, 0.5, 0.1, 0.2, 0.3, 0.1, np.nan, 0.2, 0, 0, 0, 0.9])
    assert spread_rows(volumes, body, count=3) == [1, 4, 11]
    assert fixed_slices([np.full((20, 30), 3000, np.int16)], (-1000, 1000)).max() == 1000


def test_maps_of_many_steps_are_thinned_with_both_ends_kept(tmp_path):
    for step in range(10):
        save_maps(tmp_path, step, torch.zeros(1, 1, 8, 8), torch.zeros(1, 2, 2, 3))
    assert [step for step, _, _ in load_maps(tmp_path, most=4)] == [0, 3, 6, 9]
