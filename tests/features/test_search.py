import numpy as np
import pytest
from PIL import Image

from nnunetv2_meddinov3.cli import main
from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.features.search import search

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_ct, write_image, weights):
    """Scans of which c is a copy of a with a little noise, and their tokens."""
    scans = tmp_path_factory.mktemp("scans") / "scans"
    first = make_ct(5, 64, seed=0)
    noise = np.random.default_rng(0).integers(-3, 4, first.shape)
    for name, array in {"a": first, "b": make_ct(5, 64, seed=1), "c": first + noise}.items():
        write_image(scans / f"{name}.nii.gz", array.astype(np.int16))
    tokens = tmp_path_factory.mktemp("tokens")
    assert main(["features", "extract", str(scans), "--weights", weights, "--size", "64",
                 "--device", "cpu", "-o", str(tokens)]) == 0  # fmt: skip
    return scans, tokens


def found(folder, weights, output, **options):
    scans, tokens = folder
    return search(scans / "a.nii.gz", tokens, weights, output, device="cpu", **options)


def test_the_nearest_is_the_copy_and_the_query_is_left_out(folder, weights, tmp_path):
    hits = found(folder, weights, tmp_path / "o.png", at=3, count=14)
    assert (hits[0].scan, hits[0].slice) == ("c", 3)
    assert len(hits) == 14  # of 15 slices
    assert ("a", 3) not in {(hit.scan, hit.slice) for hit in hits}
    cosines = [hit.cosine for hit in hits]
    assert cosines == sorted(cosines, reverse=True)
    assert 0.99 < cosines[0] <= 1.0001


def test_the_scan_of_the_query_can_be_left_out(folder, weights, tmp_path):
    hits = found(folder, weights, tmp_path / "o.png", at=3, count=99, elsewhere=True)
    assert len(hits) == 10
    assert {hit.scan for hit in hits} == {"b", "c"}


def test_the_command_prints_and_draws_them(folder, weights, tmp_path, capsys):
    scans, tokens = folder
    output = tmp_path / "o.png"
    arguments = [str(scans / "a.nii.gz"), str(tokens), "--weights", weights, "--count", "3"]
    assert main(["features", "search", *arguments, "-o", str(output)]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert last == str(output)
    assert len(lines) == 3
    assert lines[0].split()[1:] == ["slice", "2", "c"]  # the middle one
    with Image.open(output) as picture:
        assert np.asarray(picture.convert("L")).std() > 20


def test_a_mistake_is_a_sentence_and_leaves_no_picture(
    folder, weights, other_weights, tmp_path, source
):
    scans, tokens = folder
    output = tmp_path / "o.png"
    (tmp_path / "empty").mkdir()
    half = tmp_path / "half"
    half.mkdir()
    content = (tokens / "a_features.npz").read_bytes()
    (half / "a_features.npz").write_bytes(content[:1000])
    mistakes = [
        ((scans / "a.nii.gz", tmp_path / "empty", weights), "FOLDER must be an output of"),
        ((scans / "a.nii.gz", half, weights), "must be a whole file of `features extract`"),
        ((scans / "a.nii.gz", tokens, other_weights), "FOLDER must be made with the weights"),
        ((source, tokens, weights), "QUERY must be one scan, but .* holds 5"),
        ((tmp_path / "no.nii.gz", tokens, weights), "does not exist"),
    ]
    for (query, where, which), sentence in mistakes:
        with pytest.raises(UserError, match=sentence):
            search(query, where, which, output, device="cpu")
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "a_features.npz").write_bytes(content)
    with pytest.raises(UserError, match="FOLDER must hold other slices than the query's"):
        search(scans / "a.nii.gz", alone, weights, output, device="cpu", elsewhere=True)
    with pytest.raises(UserError, match="--at must name slices from 0 to 4"):
        search(scans / "a.nii.gz", tokens, weights, output, at=9, device="cpu")
    with pytest.raises(UserError, match="--count must be at least 1"):
        main(["features", "search", str(scans / "a.nii.gz"), str(tokens), "--weights", weights,
              "-o", str(output), "--count", "0"])  # fmt: skip
    assert not output.exists()
