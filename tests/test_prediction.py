"""Our predictor against nnU-Net's own on the same files: the same labels, the same files."""

import functools
import json
import shutil
import threading
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.inference import predict_from_raw_data
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape
from nnunetv2.preprocessing.resampling.resample_torch import (
    resample_torch_fornnunet,
    resample_torch_simple,
)
from nnunetv2.training.nnUNetTrainer import nnUNetTrainer as trainer_module
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn

from nnunetv2_meddinov3 import discovery
from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.files import part_beside
from nnunetv2_meddinov3.prediction import predictor as module
from nnunetv2_meddinov3.prediction.ahead import in_threads
from nnunetv2_meddinov3.prediction.predictor import MedDINOv3Predictor
from nnunetv2_meddinov3.prediction.slicewise import slice_resampling

PLAIN = {"background": 0, "one": 1, "two": 2}
REGIONS = {"background": 0, "whole": [1, 2], "core": 2}
MANY = {"background": 0, **{f"label_{i}": i for i in range(1, 300)}}

WHOLE = {"coarse within slices", "nearest neighbours", "cubic resampling"}
OUR_PLANS = {"resampling": "resample_torch_fornnunet", "separate": False}

# (images' spacing and shape, z first; then what differs from the defaults of `model`)
CASES = {
    "thin slices": ((4.0, 1.9, 1.9), (6, 60, 70), {}),
    "thick slices": ((6.0, 1.9, 1.9), (6, 60, 70), {}),
    "as planned": ((4.0, 1.5, 1.5), (3, 60, 70), {}),
    "smaller than a tile": ((6.0, 1.5, 1.5), (3, 20, 40), {}),
    "one slice": ((999.0, 1.9, 1.9), (1, 60, 70), {}),
    "one slice thinner than its pixels": ((1.0, 1.9, 1.9), (1, 60, 70), {}),
    "regions, two channels": (
        (6.0, 1.9, 1.9),
        (3, 60, 70),
        {"labels": REGIONS, "regions": [1, 2], "channels": 2},
    ),
    "an ignored label": ((6.0, 1.9, 1.9), (3, 60, 70), {"labels": {**PLAIN, "ignore": 3}}),
    "three folds": ((6.0, 1.9, 1.9), (3, 60, 70), {"folds": 3}),
    "no mirroring": ((6.0, 1.9, 1.9), (3, 60, 70), {"mirror": None}),
    "one mirrored axis": ((6.0, 1.9, 1.9), (3, 60, 70), {"mirror": (1,)}),
    "300 labels": ((6.0, 1.9, 1.9), (2, 40, 50), {"labels": MANY}),
    "other axes": ((1.9, 6.0, 1.7), (60, 4, 70), {"axes": [1, 0, 2]}),
    "our plans": ((4.0, 1.9, 1.9), (6, 60, 70), OUR_PLANS),
    "our plans, thick slices": ((6.0, 1.9, 1.9), (6, 60, 70), OUR_PLANS),
    "our plans, separate slices": ((6.0, 1.9, 1.9), (6, 60, 70), OUR_PLANS | {"separate": None}),
    "our plans, as planned": ((6.0, 1.5, 1.5), (6, 60, 70), OUR_PLANS),
    "our plans, regions": (
        (6.0, 1.9, 1.9),
        (3, 60, 70),
        OUR_PLANS | {"labels": REGIONS, "regions": [1, 2], "folds": 2},
    ),
    # nnU-Net resamples across slices here, or otherwise than usual: its own way is taken
    "coarse within slices": ((1.9, 9.0, 1.9), (9, 44, 70), {}),
    "nearest neighbours": (
        (6.0, 1.9, 1.9),
        (3, 60, 70),
        OUR_PLANS | {"more": {"mode": "nearest"}, "separate": None},
    ),
    "cubic resampling": ((6.0, 1.9, 1.9), (3, 60, 70), {"order": 3}),
}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Whatever nnU-Net asks for: its eight threads would wait for each other on few cores."""
    before, set_num_threads = torch.get_num_threads(), torch.set_num_threads
    monkeypatch.setattr(torch, "set_num_threads", lambda n: set_num_threads(1))
    set_num_threads(1)
    yield
    set_num_threads(before)


def plans_of(channels, axes, resampling, order, separate, more):
    probabilities = {"is_seg": False, "force_separate_z": separate, **more}
    if resampling == "resample_data_or_seg_to_shape":
        probabilities |= {"order": order, "order_z": 0}
    return PlansManager(
        {
            "dataset_name": "Dataset001_Noise",
            "plans_name": "nnUNetPlans",
            "image_reader_writer": "SimpleITKIO",
            "label_manager": "LabelManager",
            "transpose_forward": axes,
            "transpose_backward": [axes.index(i) for i in range(3)],
            "foreground_intensity_properties_per_channel": {str(i): {} for i in range(channels)},
            "configurations": {
                "2d": {
                    "data_identifier": "nnUNetPlans_2d",
                    "preprocessor_name": "DefaultPreprocessor",
                    "batch_size": 2,
                    "patch_size": [32, 48],
                    "spacing": [1.5, 1.5],
                    "normalization_schemes": ["ZScoreNormalization"] * channels,
                    "use_mask_for_norm": [False] * channels,
                    "resampling_fn_data": "resample_data_or_seg_to_shape",
                    "resampling_fn_seg": "resample_data_or_seg_to_shape",
                    "resampling_fn_data_kwargs": {
                        "is_seg": False,
                        "order": 3,
                        "order_z": 0,
                        "force_separate_z": None,
                    },
                    "resampling_fn_seg_kwargs": {
                        "is_seg": True,
                        "order": 1,
                        "order_z": 0,
                        "force_separate_z": None,
                    },
                    "resampling_fn_probabilities": resampling,
                    "resampling_fn_probabilities_kwargs": probabilities,
                    "architecture": {},
                }
            },
        }
    )


def model(
    predictor,
    *,
    labels=PLAIN,
    regions=None,
    channels=1,
    folds=1,
    mirror=(0, 1),
    axes=(0, 1, 2),
    resampling="resample_data_or_seg_to_shape",
    order=1,
    separate=None,
    more=MappingProxyType({}),
):
    """Give a predictor a network of random weights, whose labels change from pixel to pixel."""
    description = {
        "labels": labels,
        "channel_names": {str(i): "MR" for i in range(channels)},
        "file_ending": ".nii.gz",
    }
    if regions:
        description["regions_class_order"] = regions
    plans = plans_of(channels, list(axes), resampling, order, separate, more)
    heads = plans.get_label_manager(description).num_segmentation_heads
    torch.manual_seed(0)
    network, parameters = None, []
    for _ in range(folds):
        network = nn.Sequential(
            nn.Conv2d(channels, 8, 5, padding=2), nn.GELU(), nn.Conv2d(8, heads, 3, padding=1)
        )
        parameters.append({k: v.clone() for k, v in network.state_dict().items()})
    predictor.manual_initialization(
        network, plans, plans.get_configuration("2d"), parameters, description, "x", mirror
    )
    return predictor


def write_cases(folder, spacing, shape, channels=1, cases=1):
    folder.mkdir()
    rng = np.random.default_rng(0)
    for case in range(cases):
        for channel in range(channels):
            array = rng.normal(0, 1, shape).astype(np.float32)
            array[:, :3] = 0  # nnU-Net crops what is 0 at the border
            image = sitk.GetImageFromArray(array)
            image.SetSpacing(spacing[::-1])
            sitk.WriteImage(image, str(folder / f"case{case}_{channel:04d}.nii.gz"))
    return folder


def stock(**options):
    return nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False, **options)


def ours(**options):
    return MedDINOv3Predictor(device=torch.device("cpu"), allow_tqdm=False, **options)


def predicted_by_stock(folder, out, options, **settings):
    out.mkdir()
    model(stock(**settings), **options).predict_from_files_sequential(str(folder), str(out))
    return read(out)


def predicted_by_ours(folder, out, options, **settings):
    model(ours(**settings), **options).predict_from_files(str(folder), str(out))
    return read(out)


def read(out):
    return {p.name: sitk.ReadImage(str(p)) for p in sorted(out.glob("*.nii.gz"))}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, image in expected.items():
        assert found[name].GetPixelID() == image.GetPixelID()
        assert found[name].GetSpacing() == image.GetSpacing()
        a, b = sitk.GetArrayFromImage(found[name]), sitk.GetArrayFromImage(image)
        assert len(np.unique(b)) > 2  # all labels of random networks, not one everywhere
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_labels_are_those_of_nnunet(name, tmp_path, monkeypatch):
    spacing, shape, options = CASES[name]
    folder = write_cases(tmp_path / "in", spacing, shape, options.get("channels", 1))
    expected = predicted_by_stock(folder, tmp_path / "stock", options)
    whole = []
    original = MedDINOv3Predictor.predict_logits_from_preprocessed_data

    def spy(self, data):
        whole.append(data.shape)
        return original(self, data)

    monkeypatch.setattr(MedDINOv3Predictor, "predict_logits_from_preprocessed_data", spy)
    assert_same(predicted_by_ours(folder, tmp_path / "ours", options), expected)
    # the logits of a whole volume exist only where they must
    assert len(whole) == (name in WHOLE)


@pytest.mark.parametrize(
    "settings", [{"use_gaussian": False}, {"use_mirroring": False}, {"tile_step_size": 0.9}]
)
def test_settings_are_those_of_nnunet(settings, tmp_path):
    folder = write_cases(tmp_path / "in", (6.0, 1.9, 1.9), (3, 80, 110))
    expected = predicted_by_stock(folder, tmp_path / "stock", {}, **settings)
    assert_same(predicted_by_ours(folder, tmp_path / "ours", {}, **settings), expected)


@pytest.mark.parametrize("batch", [1, 3, 8, 1000])
def test_labels_do_not_depend_on_the_batch(batch, tmp_path):
    folder = write_cases(tmp_path / "in", (6.0, 1.9, 1.9), (3, 80, 110))
    expected = predicted_by_stock(folder, tmp_path / "stock", {})
    predictor = model(ours())
    predictor.batch = batch
    predictor.predict_from_files(str(folder), str(tmp_path / "ours"))
    assert_same(read(tmp_path / "ours"), expected)


def test_the_files_are_those_of_nnunet(tmp_path):
    folder = write_cases(tmp_path / "in", (6.0, 1.9, 1.9), (3, 60, 70), cases=3)
    first, second = tmp_path / "stock", tmp_path / "ours"
    first.mkdir()
    model(ours()).predict_from_files(str(folder), str(second))
    model(stock()).predict_from_files_sequential(str(folder), str(first))
    names = sorted(p.name for p in first.iterdir())
    assert sorted(p.name for p in second.iterdir()) == names
    assert_same(read(second), read(first))
    for name in ("dataset.json", "plans.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_saved_probabilities_are_those_of_nnunet(tmp_path, monkeypatch):
    import multiprocessing
    import multiprocessing.pool

    class Threads:
        Pool = multiprocessing.pool.ThreadPool

    monkeypatch.setattr(multiprocessing, "get_context", lambda *_: Threads)
    folder = write_cases(tmp_path / "in", (6.0, 1.9, 1.9), (3, 60, 70))
    (tmp_path / "stock").mkdir()
    model(stock()).predict_from_files_sequential(str(folder), str(tmp_path / "stock"), True)
    model(ours()).predict_from_files(str(folder), str(tmp_path / "ours"), True)
    assert_same(read(tmp_path / "ours"), read(tmp_path / "stock"))
    one, other = (
        np.load(tmp_path / end / "case0.npz")["probabilities"] for end in ("ours", "stock")
    )
    np.testing.assert_allclose(one, other, atol=1e-4)  # a batch is rounded otherwise than a tile


def test_without_other_processes_the_labels_are_the_same(tmp_path):
    folder = write_cases(tmp_path / "in", (6.0, 1.9, 1.9), (3, 60, 70), cases=2)
    expected = predicted_by_stock(folder, tmp_path / "stock", {})
    (tmp_path / "ours").mkdir()
    model(ours()).predict_from_files_sequential(str(folder), str(tmp_path / "ours"))
    assert_same(read(tmp_path / "ours"), expected)
    model(ours()).predict_from_files_sequential(str(folder), str(tmp_path / "ours"), True)
    assert (tmp_path / "ours" / "case0.npz").is_file()


def test_arrays_are_returned_where_there_is_no_file(tmp_path):
    folder = write_cases(tmp_path / "in", (6.0, 1.9, 1.9), (3, 60, 70), cases=2)
    expected = predicted_by_stock(folder, tmp_path / "stock", {})
    files = [[str(p)] for p in sorted(folder.iterdir())]
    found = model(ours()).predict_from_files(files, None)
    for labels, image in zip(found, expected.values(), strict=True):
        np.testing.assert_array_equal(labels, sitk.GetArrayFromImage(image))


def test_a_prediction_goes_on_where_it_was_stopped(tmp_path):
    folder = write_cases(tmp_path / "in", (6.0, 1.9, 1.9), (3, 60, 70), cases=3)
    out = tmp_path / "out"
    expected = predicted_by_ours(folder, out, {})
    (out / "case1.nii.gz").unlink()
    before = (out / "case0.nii.gz").stat().st_mtime_ns
    model(ours()).predict_from_files(str(folder), str(out), overwrite=False)
    assert (out / "case0.nii.gz").stat().st_mtime_ns == before
    assert_same(read(out), expected)


@pytest.mark.parametrize("damage", ["no image", "no file", "other size"])
def test_a_bad_case_is_named_and_those_before_are_kept(damage, tmp_path):
    folder = write_cases(tmp_path / "in", (6.0, 1.9, 1.9), (3, 60, 70), channels=2, cases=3)
    bad = folder / "case1_0001.nii.gz"
    if damage == "no image":
        bad.write_bytes(b"not an image")
    elif damage == "no file":
        bad.unlink()
    else:
        image = sitk.GetImageFromArray(np.ones((3, 50, 70), np.float32))
        image.SetSpacing((1.9, 1.9, 6.0))
        sitk.WriteImage(image, str(bad))
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"case1_0000.*, then add --continue_prediction\."):
        model(ours(), channels=2).predict_from_files(str(folder), str(out))
    assert list(read(out)) == ["case0.nii.gz"]
    write_cases(tmp_path / "good", (6.0, 1.9, 1.9), (3, 60, 70), channels=2, cases=3)
    shutil.copy(tmp_path / "good" / bad.name, bad)
    model(ours(), channels=2).predict_from_files(str(folder), str(out), overwrite=False)
    assert len(read(out)) == 3


def test_a_file_that_cannot_be_written_is_named_and_nothing_half_written(tmp_path, monkeypatch):
    folder = write_cases(tmp_path / "in", (6.0, 1.9, 1.9), (3, 60, 70), cases=2)
    predictor = model(ours())
    writer = predictor.plans_manager.image_reader_writer_class

    def fails(self, labels, path, properties):
        Path(path).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(writer, "write_seg", fails)
    with pytest.raises(UserError, match=r"case0\.nii\.gz must be writable, but: .*no space left"):
        predictor.predict_from_files(str(folder), str(tmp_path / "out"))
    assert not list((tmp_path / "out").glob("case*"))


def test_leftovers_of_a_killed_prediction_go(tmp_path):
    folder = write_cases(tmp_path / "in", (6.0, 1.9, 1.9), (3, 60, 70))
    (tmp_path / "out").mkdir()
    with part_beside(tmp_path / "out" / "case0.nii.gz") as part:
        pass
    left = part.with_name(part.name.replace(f"-{__import__('os').getpid()}-", "-999999999-"))
    left.mkdir()
    (left / "case0.nii.gz").write_bytes(b"half")
    predicted_by_ours(folder, tmp_path / "out", {})
    assert not left.exists()


class _Small(nn.Module):
    """A network for a GPU of little memory."""

    def __init__(self, network, most):
        super().__init__()
        self.network, self.most, self.seen = network, most, []

    def forward(self, x):
        self.seen.append(len(x))
        if len(x) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.network(x)


def window_of(network, **options):
    """Return a sliding window and an image with its tiles."""
    predictor = model(ours())
    data = torch.randn(1, 3, 80, 110)
    heads = predictor.label_manager.num_segmentation_heads
    window = predictor._window([network or predictor.network], heads)
    for name, value in options.items():
        setattr(window, name, value)
    return window, data, predictor._internal_get_sliding_window_slicers(data.shape[1:])


@pytest.mark.parametrize(("most", "last"), [(1, 1), (3, 1), (8, 8)])
def test_batches_are_halved_until_they_fit(most, last):
    plain, data, tiles = window_of(None)
    network = _Small(plain.networks[0], most)
    window, _, _ = window_of(network, batch=64)
    with torch.inference_mode():
        found = list(window.in_batches(data, tiles))
        expected = [p for _, (p,) in plain.predictions(data, tiles)]
    assert max(network.seen) == 64
    assert network.seen[-1] == last  # mirrored tiles count, and go one by one at the end
    assert [tile for batch, _ in found for tile in batch] == tiles
    got = [p for _, (parts,) in found for p in parts]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_tiles_come_in_order_whatever_the_number_of_threads(threads, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    window, data, tiles = window_of(None, batch=4, threads=threads)
    with torch.inference_mode():
        found = list(window.predictions(data, tiles))
        wanted = window.networks[0](data[tiles[7]][None])[0]
        window.mirrorings = [()]
        plain = dict(enumerate(window.predictions(data, tiles)))
    assert [tile for tile, _ in found] == tiles
    torch.testing.assert_close(plain[7][1][0], wanted, rtol=1e-5, atol=1e-5)
    assert asked == [1, torch.get_num_threads()] * 2  # a tile each, and back


def test_a_single_tile_that_does_not_fit_is_an_error():
    window, data, tiles = window_of(_Small(nn.Identity(), 0))
    with torch.inference_mode(), pytest.raises(torch.OutOfMemoryError):
        list(window.in_batches(data, tiles))


def test_a_network_in_ddp_predicts_by_itself():
    """Ranks validate other cases: nothing may be exchanged, and not from several threads."""
    data, plain = torch.randn(1, 3, 80, 110), model(ours())
    wanted = plain.predict_sliding_window_return_logits(data)
    wrapped = model(ours())

    class Wrapped(module.DistributedDataParallel):
        def __init__(self, network):
            nn.Module.__init__(self)
            self.module = network

        def forward(self, *inputs):
            raise AssertionError("the ranks would wait for each other")

    wrapped.network = Wrapped(wrapped.network)
    assert torch.equal(wrapped.predict_sliding_window_return_logits(data), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("folds", [1, 2])
def test_compiled_networks_predict_too(folds, tmp_path, monkeypatch):
    folder = write_cases(tmp_path / "in", (6.0, 1.9, 1.9), (3, 60, 70))
    expected = predicted_by_ours(folder, tmp_path / "plain", {"folds": folds})
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    predictor = model(ours(), folds=folds)
    predictor.network = torch.compile(predictor.network)
    predictor.predict_from_files(str(folder), str(tmp_path / "compiled"))
    assert_same(read(tmp_path / "compiled"), expected)


def test_infinite_logits_are_an_error(tmp_path):
    folder = write_cases(tmp_path / "in", (6.0, 1.9, 1.9), (3, 60, 70))
    predictor = model(ours())
    predictor.list_of_parameters[0]["2.bias"][:] = 1e30
    with pytest.raises(RuntimeError, match="must stay below 65504"):
        predictor.predict_from_files(str(folder), str(tmp_path / "out"))


def test_cases_are_read_ahead_but_not_all_at_once():
    read, gate = [], threading.Event()

    def function(item):
        read.append(item)
        gate.wait(5)
        return item

    results = in_threads(function, range(10), 2)
    gate.set()
    assert next(results) == 0
    assert len(read) <= 4
    assert list(results) == list(range(1, 10))


def test_our_predictor_is_used_in_stock_commands_only_where_asked(monkeypatch):
    monkeypatch.setattr(predict_from_raw_data, "nnUNetPredictor", nnUNetPredictor)
    for value in ("", "0"):
        monkeypatch.setenv("MEDDINOV3_PREDICTOR", value)
        discovery.register()
        assert predict_from_raw_data.nnUNetPredictor is nnUNetPredictor
    monkeypatch.setenv("MEDDINOV3_PREDICTOR", "yes")
    with pytest.raises(UserError, match="MEDDINOV3_PREDICTOR must be 0 or 1, got 'yes'"):
        discovery.register()
    monkeypatch.setenv("MEDDINOV3_PREDICTOR", "1")
    discovery.register()
    assert predict_from_raw_data.nnUNetPredictor is MedDINOv3Predictor


def test_training_validation_uses_it_and_gives_it_back():
    before = trainer_module.nnUNetPredictor
    with module.used_in_validation():
        assert trainer_module.nnUNetPredictor is MedDINOv3Predictor
    assert trainer_module.nnUNetPredictor is before
    with pytest.raises(KeyError), module.used_in_validation():
        raise KeyError
    assert trainer_module.nnUNetPredictor is before


def test_logits_of_validation_are_those_of_nnunet():
    data = torch.randn(1, 3, 80, 110)
    results = [model(make()).predict_sliding_window_return_logits(data) for make in (stock, ours)]
    torch.testing.assert_close(*results, rtol=0, atol=2e-3)
    assert (results[0].argmax(0) == results[1].argmax(0)).float().mean() > 0.999


def test_resampling_with_options_that_are_not_known_is_left_to_nnunet():
    class Configuration:
        spacing = (1.5, 1.5)

    known = {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None}
    for function, keywords in (
        (resample_data_or_seg_to_shape, known | {"more": 2}),
        (resample_data_or_seg_to_shape, known | {"is_seg": True}),
        (resample_torch_fornnunet, {"is_seg": False, "device": torch.device("cuda")}),
        (resample_torch_simple, {"is_seg": False}),
    ):
        Configuration.resampling_fn_probabilities = functools.partial(function, **keywords)
        assert slice_resampling(Configuration, (6.0, 1.9, 1.9), (3, 3)) is None
    Configuration.resampling_fn_probabilities = functools.partial(
        resample_data_or_seg_to_shape, **known
    )
    assert slice_resampling(Configuration, (6.0, 1.9, 1.9), (3, 3)) is not None
    assert slice_resampling(Configuration, (6.0, 1.9, 1.9), (4, 3)) is None


def test_the_command_is_nnunets(monkeypatch, capsys):
    monkeypatch.setattr(predict_from_raw_data, "nnUNetPredictor", nnUNetPredictor)
    monkeypatch.setattr("sys.argv", ["nnUNetv2_predict", "--help"])
    with pytest.raises(SystemExit):
        module.main()
    assert "-step_size" in capsys.readouterr().out
    assert predict_from_raw_data.nnUNetPredictor is MedDINOv3Predictor


def test_what_is_written_names_the_call(tmp_path):
    folder = write_cases(tmp_path / "in", (6.0, 1.9, 1.9), (3, 60, 70))
    predicted_by_ours(folder, tmp_path / "out", {})
    said = json.loads((tmp_path / "out" / "predict_from_raw_data_args.json").read_text())
    assert said["save_probabilities"] is False
