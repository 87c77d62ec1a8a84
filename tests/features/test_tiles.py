"""Slices in overlapping tiles against one forward pass of the whole."""

import itertools
import json

import numpy as np
import pytest
import torch

from nnunetv2_meddinov3.cli import main
from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.features.extract import extract
from nnunetv2_meddinov3.features.extraction import Extractor, unit
from nnunetv2_meddinov3.features.npz import read_npz
from nnunetv2_meddinov3.features.scans import find_scans, open_scans
from nnunetv2_meddinov3.features.search import search
from nnunetv2_meddinov3.features.tiles import spans, tiles
from nnunetv2_meddinov3.models.backbone import Window


@pytest.mark.parametrize("most", [1, 2, 3, 4, 7, 8, 30, 100])
@pytest.mark.parametrize("patches", [1, 2, 5, 8, 9, 16, 31, 100])
def test_what_is_kept_of_tiles_makes_up_the_axis(patches, most):
    found = spans(patches, most)
    kept = [n for span in found for n in range(span.kept.start, span.kept.stop)]
    assert kept == list(range(patches))
    for span in found:
        assert span.tile.stop - span.tile.start == min(most, patches)
        assert 0 <= span.tile.start <= span.kept.start
        assert span.kept.stop <= span.tile.stop <= patches
    for before, after in itertools.pairwise(found):
        assert before.tile.stop - after.tile.start >= most // 2  # they overlap by half
        # a patch is taken from the tile in which it lies deepest
        assert (
            abs((before.tile.stop - before.kept.stop) - (after.kept.start - after.tile.start)) < 2
        )


def test_tiles_are_all_pairs_of_spans():
    assert len(list(tiles((10, 4), 4))) == 4
    assert len(list(tiles((3, 4), 4))) == 1


@pytest.fixture
def scan(marked_ct, oriented, tmp_path):
    path = oriented(tmp_path / "ct.nii.gz", marked_ct)
    (found,) = open_scans(find_scans([path], None), None)
    return found


def looked(weights, scan, tile, size=256, change=None):
    extractor = Extractor(weights, size, "cpu", tile)
    if change is not None:
        with torch.no_grad():
            for block in extractor.backbone.vit.blocks:
                change(block)
    return extractor.tokens(scan, 3)


def without_attention(block):
    block.gamma_1.zero_()


def with_strong_attention(block):
    block.gamma_1.fill_(1.0)
    block.attn.qkv.weight.mul_(4.0)


def test_a_tile_as_large_as_the_slice_changes_nothing(weights, scan):
    whole = looked(weights, scan, None)
    for tile in (256, 512):
        tiled = looked(weights, scan, tile)
        assert (tiled.patches == whole.patches).all()
        assert (tiled.cls == whole.cls).all()


@pytest.mark.parametrize("tile", [16, 48, 64, 128, 192])
def test_without_attention_tiles_are_the_whole(weights, scan, tile):
    """Then a token depends on its patch alone: what is cut and put together is in its place."""
    whole = looked(weights, scan, None, change=without_attention)
    tiled = looked(weights, scan, tile, change=without_attention)
    np.testing.assert_allclose(tiled.patches, whole.patches, atol=2e-6)
    assert whole.patches.std(axis=(0, 1)).max() > 0.1  # they do differ from patch to patch


def test_tiles_are_near_the_whole(weights, scan):
    whole, tiled = (looked(weights, scan, tile) for tile in (None, 128))
    cosines = (unit(whole.patches) * unit(tiled.patches)).sum(-1)
    assert cosines.min() > 0.999
    assert (whole.patches != tiled.patches).any()
    assert float(unit(whole.cls) @ unit(tiled.cls)) > 0.99


def test_patches_of_a_tile_have_the_positions_of_the_slice(weights, scan):
    """At those of the tile itself the tokens of a network that attends are others."""
    extractor = Extractor(weights, 256, "cpu")
    with torch.no_grad():
        for block in extractor.backbone.vit.blocks:
            with_strong_attention(block)
    images = extractor.input(scan, 3).expand(-1, 3, -1, -1)
    layer = [extractor.backbone.depth - 1]
    rows, columns = extractor.grid_size(scan)
    part = images[..., 64:128, 96:224]
    seen = [
        extractor.backbone.intermediate_tokens(part, layer, window)[0].patches
        for window in (None, Window((4, 8), 0, 0), Window((rows, columns), 4, 6))
    ]
    assert torch.equal(seen[0], seen[1])
    assert not torch.allclose(seen[0], seen[2], atol=1e-3)
    whole = extractor.backbone.intermediate_tokens(images, layer)[0].patches
    all_of_it = Window((rows, columns), 0, 0)
    again = extractor.backbone.intermediate_tokens(images, layer, all_of_it)[0].patches
    assert torch.equal(whole, again)


@pytest.mark.parametrize("tile", [0, -16, 100, 9000])
def test_a_tile_that_is_no_multiple_of_the_patch_is_refused(weights, tile):
    with pytest.raises(UserError, match=r"--tile must be a multiple of the 16 pixels .*: take \d+"):
        Extractor(weights, 256, "cpu", tile)


@pytest.fixture
def limited(weights, monkeypatch):
    """A function that gives an extractor whose device holds a few slices, and what it was given."""

    def make(most, failure):
        extractor = Extractor(weights, 256, "cpu")
        original, seen = extractor.backbone.intermediate_tokens, []

        def with_limit(images, *args):
            seen.append(len(images))
            if len(images) > most:
                raise failure
            return original(images, *args)

        monkeypatch.setattr(extractor.backbone, "intermediate_tokens", with_limit)
        return extractor, seen

    return make


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
    MemoryError(),
]


@pytest.mark.parametrize("failure", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_a_device_out_of_memory_sees_fewer_slices_and_then_says_what_to_do(
    failure, limited, weights, scan
):
    extractor, seen = limited(2, failure)
    found = extractor.tokens_of(scan, range(5))
    assert seen == [5, 2, 3, 1, 2]
    for n, one in enumerate(found):
        other = Extractor(weights, 256, "cpu").tokens(scan, n)
        np.testing.assert_allclose(one.patches, other.patches, atol=1e-5)
    extractor, _ = limited(0, failure)
    with pytest.raises(UserError, match=r"a slice of 256 pixels .* add --tile 128, or take"):
        extractor.tokens_of(scan, range(2))


def test_another_error_stays_what_it_is(limited, scan):
    extractor, seen = limited(0, RuntimeError("something else"))
    with pytest.raises(RuntimeError, match="something else"):
        extractor.tokens_of(scan, range(2))
    assert seen == [2]


def test_every_way_takes_tiles(weights, other_weights, marked_ct, oriented, tmp_path):
    path = str(oriented(tmp_path / "ct.nii.gz", marked_ct))
    common = ["--size", "128", "--tile", "64", "--slices", "2", "--device", "cpu"]
    for way in (
        ["pca", path, "--weights", weights, "-o", str(tmp_path / "pca")],
        ["similarity", path, "--point", "88,40,2", "--weights", weights, "-o", str(tmp_path / "s")],
        ["compare", weights, other_weights, "--on", path, "-o", str(tmp_path / "c.html")],
    ):
        assert main(["features", *way, *common]) == 0


def test_tokens_in_files_say_their_tiles_and_are_searched_alike(
    weights, marked_ct, oriented, tmp_path
):
    path = oriented(tmp_path / "ct.nii.gz", marked_ct)
    files = [
        extract([path], weights, tmp_path / name, size=128, tile=tile, device="cpu")[0]
        for name, tile in (("whole", None), ("tiled", 64))
    ]
    (plain, _), (facts, _arrays) = (read_npz(file, ("cls", "patches")) for file in files)
    assert facts["made_from"]["tile"] == 64
    assert "tile" not in plain["made_from"]
    assert "tile" not in json.dumps(plain)
    before = files[1].stat().st_mtime_ns
    extract([path], weights, tmp_path / "tiled", size=128, tile=64, device="cpu")
    assert files[1].stat().st_mtime_ns == before  # it is there
    extract([path], weights, tmp_path / "tiled", size=128, tile=96, device="cpu")
    assert files[1].stat().st_mtime_ns > before
    hits = search(path, tmp_path / "tiled", weights, tmp_path / "n.png", at=2, device="cpu")
    query = Extractor(weights, 128, "cpu", 96)
    (scan,) = open_scans(find_scans([path], None), None)
    cosine = float(unit(query.tokens(scan, 2).cls) @ unit(query.tokens(scan, hits[0].slice).cls))
    assert hits[0].cosine == pytest.approx(cosine, abs=1e-3)
    files[0].rename(tmp_path / "tiled" / "other_features.npz")
    with pytest.raises(UserError, match="has files of 128 and 128 in tiles of 96: extract"):
        search(path, tmp_path / "tiled", weights, tmp_path / "n.png", device="cpu")
