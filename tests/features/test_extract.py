import json

import nibabel
import numpy as np
import pytest
import torch

from nnunetv2_meddinov3.cli import main
from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.features.extraction import Extractor
from nnunetv2_meddinov3.features.scans import find_scans, open_scans
from nnunetv2_meddinov3.models.weights import read_checkpoint

pytestmark = pytest.mark.slow
SMALL = ["--size", "128", "--device", "cpu"]


def extract(output, *arguments):
    assert main(["features", "extract", *SMALL, *map(str, arguments), "-o", str(output)]) == 0
    return output


def read(path):
    with np.load(path, allow_pickle=False) as content:
        arrays = {name: content[name] for name in content.files}
    return arrays, json.loads(str(arrays.pop("facts")))


@pytest.fixture
def looked(monkeypatch):
    """Names and slices that a backbone is shown from here on."""
    seen, tokens_of = [], Extractor.tokens_of

    def watched(self, scan, indices):
        seen.append((scan.name, list(indices)))
        return tokens_of(self, scan, indices)

    monkeypatch.setattr(Extractor, "tokens_of", watched)
    return seen


def test_a_file_holds_the_tokens_and_where_they_are_from(tmp_path, marked_ct, oriented, weights):
    path = oriented(tmp_path / "ct.nii.gz", marked_ct, "RSA", 20)
    arrays, facts = read(extract(tmp_path / "o", path, "--weights", weights) / "ct_features.npz")
    assert arrays["slices"].tolist() == list(range(6))
    assert arrays["cls"].shape == (6, 128)
    assert arrays["patches"].shape == (6, 6, 8, 128)
    assert arrays["patches"].dtype == np.float16
    (scan,) = open_scans(find_scans([path]))
    wanted = Extractor(weights, 128, "cpu").tokens(scan, 3)
    np.testing.assert_allclose(arrays["patches"][3], wanted.patches, atol=5e-3)
    np.testing.assert_allclose(arrays["cls"][3], wanted.cls, atol=5e-3)
    assert facts["modality"] == "CT"
    assert facts["spacing_mm"] == pytest.approx([3, 1, 1])
    # the mark fills patch (2, 5) of slices 2 and 3
    image = nibabel.load(path)
    bright = np.argwhere(np.asarray(image.dataobj) > 600)
    middle = nibabel.affines.apply_affine(image.affine, bright.mean(0))
    found = nibabel.affines.apply_affine(np.array(facts["affine"]), [2.5, 2, 5])
    np.testing.assert_allclose(found, middle, atol=1e-3)


def test_batches_give_what_single_slices_give(tmp_path, source, weights, looked):
    one = extract(tmp_path / "one", source / "v0.nii.gz", "--weights", weights)
    three = extract(tmp_path / "b", source / "v0.nii.gz", "--weights", weights, "--batch", "3")
    assert [slices for _, slices in looked] == [[0], [1], [2], [3], [0, 1, 2], [3]]
    a, b = (read(each / "v0_features.npz")[0] for each in (one, three))
    np.testing.assert_allclose(a["patches"], b["patches"], atol=5e-3)


def test_what_is_there_is_left_alone_and_what_is_not_whole_is_made_again(
    tmp_path, source, weights, other_weights, looked, capsys
):
    output = extract(tmp_path / "o", source, "--weights", weights, "--cls-only", "--slices", "2")
    files = sorted(output.iterdir())
    assert [path.name for path in files] == [f"v{n}_features.npz" for n in range(5)]
    assert "patches" not in read(files[0])[0]
    before = [path.read_bytes() for path in files]
    looked.clear()
    files[1].unlink()
    files[2].write_bytes(before[2][: len(before[2]) // 2])
    again = ["--weights", weights, "--cls-only", "--slices", "2"]
    capsys.readouterr()
    extract(output, source, *again)
    printed = capsys.readouterr()
    assert {name for name, _ in looked} == {"v1", "v2"}
    assert "3 of 5 scans are there from before" in printed.err
    assert printed.out.split() == [str(path) for path in files]
    assert [path.read_bytes() for path in files] == before
    for changed in (
        ["--weights", other_weights, "--cls-only", "--slices", "2"],
        ["--weights", weights, "--cls-only", "--slices", "1"],
        ["--weights", weights, "--slices", "2"],
        ["--weights", weights, "--cls-only", "--slices", "2", "--size", "64"],
    ):
        looked.clear()
        extract(output, source / "v0.nii.gz", *changed)
        assert {name for name, _ in looked} == {"v0"}, changed


def test_an_interrupted_scan_leaves_no_file(tmp_path, source, weights, monkeypatch):
    tokens_of = Extractor.tokens_of

    def stopped(self, scan, indices):
        if (scan.name, indices) == ("v1", [2]):
            raise KeyboardInterrupt
        return tokens_of(self, scan, indices)

    monkeypatch.setattr(Extractor, "tokens_of", stopped)
    arguments = ["features", "extract", *SMALL, str(source), "--weights", weights]
    assert main([*arguments, "-o", str(tmp_path / "o")]) == 130
    assert [path.name for path in (tmp_path / "o").iterdir()] == ["v0_features.npz"]


def test_a_scan_that_cannot_be_read_is_said(tmp_path, source, weights, capsys):
    (source / "v2.nii.gz").write_bytes(b"no image")
    output = extract(tmp_path / "o", source, "--weights", weights, "--slices", "1")
    assert len(list(output.iterdir())) == 4
    printed = capsys.readouterr()
    assert "v2.nii.gz cannot be looked at" in printed.err
    assert len(printed.out.split()) == 4


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--batch", "0"], "--batch must be at least 1, got 0"),
        (["--modality", "CAT"], "--modality must be one of CT"),
    ],
)
def test_a_mistake_is_a_sentence(tmp_path, source, weights, more, sentence):
    arguments = ["features", "extract", *SMALL, str(source), "--weights", weights, *more]
    with pytest.raises(UserError, match=sentence):
        main([*arguments, "-o", str(tmp_path / "o")])
    assert not (tmp_path / "o").exists()


def test_a_fine_tuned_network_sees_ct_as_nnunet_showed_it(tmp_path, source, weights, capsys):
    checkpoint = torch.load(weights, weights_only=True)["teacher"]
    network = {k: t for k, t in checkpoint.items() if k.startswith("backbone.")}
    facts = {"percentile_00_5": -160.0, "percentile_99_5": 240.0, "mean": 40.0, "std": 100.0}
    plans = {
        "configurations": {
            "2d": {"normalization_schemes": ["CTNormalization"], "architecture": {}},
            "2d_128": {
                "inherits_from": "2d",
                "architecture": {
                    "arch_kwargs": {"backbone": read_checkpoint(weights).architecture.to_dict()}
                },
            },
        },
        "foreground_intensity_properties_per_channel": {"0": facts},
    }
    path = tmp_path / "checkpoint_final.pth"
    arguments = {"plans": plans, "configuration": "2d_128"}
    content = {"network_weights": network, "trainer_name": "T", "init_args": arguments}
    torch.save(content, path)
    extractor = Extractor(str(path), 128, "cpu")
    (scan,) = open_scans(find_scans([source / "v0.nii.gz"]))
    seen = extractor.input(scan, 1)
    assert float(seen.min()) == pytest.approx(-2)
    assert float(seen.max()) <= 2
    plain = Extractor(weights, 128, "cpu").input(scan, 1)
    body = (plain > plain.min() + 1) & (seen > -2) & (seen < 2)
    values = plain * 178.01663208007812 + 65.1084213256836
    torch.testing.assert_close(seen[body], (values[body] - 40) / 100, rtol=0, atol=1e-4)
    said = capsys.readouterr().err
    assert f"the intensity contract of {weights} states none" in said
    assert path.name not in said
