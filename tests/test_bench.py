"""``meddinov3 bench`` on a tiny network, and its arithmetic by hand."""

import json
import subprocess
import sys

import pytest
import torch

from nnunetv2_meddinov3 import bench
from nnunetv2_meddinov3.errors import UserError


@pytest.mark.slow
def test_a_small_run_prints_a_table_and_writes_its_figures(tmp_path, capsys):
    out = tmp_path / "bench.json"
    arguments = ["--backbone", "vit_tiny", "--sizes", "96", "64", "--rounds", "1"]
    assert bench.main([*arguments, "--classes", "3", "--device", "cpu", "-o", str(out)]) == 0
    said = capsys.readouterr().out
    assert "matrix products: " in said
    assert said.index("\n2d_64 ") < said.index("\n2d_96 ")
    assert "2d_96: an epoch of 250 steps of 2 images takes about" in said
    found = json.loads(out.read_text())
    assert [row["size"] for row in found["rows"]] == [64, 96]
    for row in found["rows"]:
        assert 0 < row["forward_s"] < row["step_s"]
        assert 0 < row["forward_gflops"] < 3 * found["matrix_gflops"]
        assert row["batch"] is None
        assert row["memory_gb"] > 0.1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--backbone", "vit_giant"], "--backbone must be one of vit_tiny, "),
        (["--sizes", "224", "100"], "--sizes must be multiples of 16 pixels, got 100"),
        (["--sizes", "0"], "--sizes must be multiples of 16 pixels, got 0"),
        (["--classes", "0"], "--classes must be at least 1, got 0"),
        (["--rounds", "-1"], "--rounds must be at least 1, got -1"),
        (["-o", "/proc/no/figures.json"], "/proc/no must be writable"),
    ],
)
def test_mistakes_are_told_before_anything_is_measured(arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        bench.main(arguments)


def test_mistakes_are_told_before_torch_is_imported():
    program = (
        "import sys\nfrom nnunetv2_meddinov3 import bench\n"
        "try:\n    bench.main(['--sizes', '1'])\n"
        "except ValueError:\n    sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a GPU here")
def test_a_gpu_that_is_not_there_is_told():
    with pytest.raises(UserError, match="--device cuda needs a GPU, but torch sees none"):
        bench.main(["--device", "cuda"])


@pytest.mark.parametrize(
    ("peaks", "room", "batch"),
    [
        ([3.0, 5.0], 4.9, 1),
        ([3.0, 5.0], 5.0, 2),
        ([3.0, 5.0], 12.9, 5),
        ([3.0, 5.0], 13.0, 6),
        ([3.0], 100.0, 1),  # two did not fit, whatever the sum says
    ],
)
def test_the_batch_that_fits_follows_from_one_and_two_images(peaks, room, batch):
    assert bench.fitting_batch(peaks, room) == batch


def test_operations_are_counted_as_by_hand():
    x, layer = torch.randn(5, 7), torch.nn.Linear(7, 11)
    assert bench.operations_of(lambda: layer(x)) == 2 * 5 * 7 * 11
    q = torch.randn(2, 3, 50, 8, requires_grad=True)
    attend = torch.nn.functional.scaled_dot_product_attention
    once = 2 * 3 * (2 * 50 * 50 * 8) * 2  # q k^T and its product with v
    with torch.no_grad():
        assert bench.operations_of(lambda: attend(q, q, q)) == once
    # backward: q k^T once more, then two products for each of the two
    assert bench.operations_of(lambda: attend(q, q, q).sum().backward()) == 3.5 * once


def test_on_a_gpu_the_largest_size_with_a_batch_of_two_is_recommended():
    batches = {224: 40, 448: 9, 896: 1}
    rows = [bench.Row(size, 1, 1, 1, 1, 1, batch) for size, batch in batches.items()]
    *lines, last = bench._advice(rows)
    assert lines[0].startswith("2d_224: batch_size up to 40 fits in training; an epoch of 250")
    assert last.startswith("recommended: MEDDINOV3_SIZE=448, ")
    assert last.endswith("(batch_size 9 in the plans)")
