"""The U-Net of ``2d_N``, built and run as nnU-Net's stock trainer does."""

import copy
import json

import pytest
import torch
from nnunetv2.experiment_planning import plan_and_preprocess_api as api
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import (
    ExperimentPlanner,
)
from nnunetv2.experiment_planning.experiment_planners.network_topology import (
    get_pool_and_conv_props,
)
from nnunetv2.experiment_planning.experiment_planners.residual_unets import (
    residual_encoder_unet_planners as resenc,
)
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnunetv2_meddinov3.cli import main as meddinov3
from nnunetv2_meddinov3.planning import MedDINOv3Planner, add_configuration
from nnunetv2_meddinov3.unet import fits, unet_for

PLAIN, RESIDUAL = "PlainConvUNet", "ResidualEncoderUNet"
BLOCKS = {PLAIN: [2] * 12, RESIDUAL: [1, 3, 4, *[6] * 9]}


def planned_unet(patch_size, spacing, network=PLAIN):
    """A U-Net as nnU-Net's planners describe it, for a patch that their rule may enlarge."""
    _, strides, kernels, patch_size, _ = get_pool_and_conv_props(spacing, patch_size, 4, 999999)
    n, residual = len(strides), network == RESIDUAL
    kwargs = {
        "n_stages": n,
        "features_per_stage": tuple(min(512, 32 * 2**i) for i in range(n)),
        "conv_op": "torch.nn.modules.conv.Conv2d",
        "kernel_sizes": kernels,
        "strides": strides,
        "n_blocks_per_stage" if residual else "n_conv_per_stage": tuple(BLOCKS[network][:n]),
        "n_conv_per_stage_decoder": (1 if residual else 2,) * (n - 1),
        "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm2d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    return [int(side) for side in patch_size], {
        "network_class_name": f"dynamic_network_architectures.architectures.unet.{network}",
        "arch_kwargs": kwargs,
        "_kw_requires_import": ("conv_op", "norm_op", "dropout_op", "nonlin"),
    }


def plans_with(patch_size, spacing, architecture):
    planned = {
        "data_identifier": "nnUNetPlans_2d",
        "batch_size": 12,
        "patch_size": patch_size,
        "median_image_size_in_voxels": patch_size,
        "spacing": spacing,
        "architecture": architecture,
    }
    return {
        "dataset_name": "Dataset999_MadeUp",
        "plans_name": "nnUNetPlans",
        "original_median_shape_after_transp": [100, *patch_size],
        "configurations": {"2d": planned},
    }


def added_to(plans, size):
    options = {"gpu_memory_gb": 8, "backbone": "vit_base", "training_cases": 100}
    amended = add_configuration(plans, size, **options)
    amended = json.loads(json.dumps(amended))
    return PlansManager(amended).get_configuration(f"2d_{size}")


def run_stock_network(configuration):
    """Build the network as nnUNetTrainer does, and go forth and back with a patch."""
    slim = ConfigurationManager(copy.deepcopy(configuration.configuration))
    kwargs = slim.configuration["architecture"]["arch_kwargs"]
    kwargs["features_per_stage"] = [2] * kwargs["n_stages"]  # widths do not matter to the shapes
    network = nnUNetTrainer.build_network_architecture(None, slim, 1, 3, True)
    outputs = network(torch.rand(1, 1, *configuration.patch_size))
    sum(output.mean() for output in outputs).backward()
    # nnU-Net shrinks the labels by these scales, and compares with each output
    sides, expected = list(configuration.patch_size), []
    for strides in configuration.pool_op_kernel_sizes:
        sides = [side // step for side, step in zip(sides, strides, strict=True)]
        expected.append((1, 3, *sides))
    assert [tuple(output.shape) for output in outputs] == expected[:-1]


@pytest.mark.slow
@pytest.mark.parametrize("network", [PLAIN, RESIDUAL])
@pytest.mark.parametrize(
    ("patch_size", "spacing", "size", "expected"),
    [
        ((256, 224), (0.8, 0.8), 896, [896, 784]),
        ((224, 256), (0.8, 0.8), 144, [128, 144]),
        ((512, 512), (0.8, 0.8), 448, [448, 448]),
        ((512, 512), (0.8, 0.8), 1008, [1008, 1008]),
        ((64, 48), (1, 1), 304, [304, 240]),
        ((24, 24), (1, 1), 496, [496, 496]),
        ((320, 8), (0.3, 3.0), 64, [64, 16]),
        ((8, 320), (3.0, 0.3), 1200, [32, 1200]),
        ((192, 160), (0.5, 1.7), 64, [64, 64]),
    ],
)
def test_nnunets_network_runs_on_the_new_patch(network, patch_size, spacing, size, expected):
    patch_size, architecture = planned_unet(patch_size, spacing, network)
    configuration = added_to(plans_with(patch_size, spacing, architecture), size)
    assert configuration.patch_size == expected
    assert fits(configuration.configuration["architecture"], expected)
    run_stock_network(configuration)


def test_the_u_net_that_the_old_plans_inherited_does_not_fit():
    patch_size, architecture = planned_unet((256, 224), (0.8, 0.8))
    assert fits(architecture, patch_size)
    assert not fits(architecture, [896, 784])
    assert not fits(architecture, [128, 144])


@pytest.mark.parametrize("network", [PLAIN, RESIDUAL])
@pytest.mark.parametrize("size", [64, 128, 192, 512, 640, 896, 1024, 2048])
def test_where_nnunets_rule_keeps_the_patch_the_u_net_is_nnunets(network, size):
    small, planned = planned_unet((24, 24), (1, 1), network)
    padded, expected = planned_unet((size, size), (1, 1), network)
    assert padded == [size, size]
    for stages_before in (small, padded):
        _, planned = planned_unet(stages_before, (1, 1), network)
        assert unet_for(planned, [size, size], (1, 1)) == json.loads(json.dumps(expected))


@pytest.mark.parametrize("network", [PLAIN, RESIDUAL])
@pytest.mark.parametrize("size", range(64, 1216, 16))
def test_every_size_gets_a_u_net_that_divides_it(network, size):
    for sides, spacing in (((512, 512), (1, 1)), ((256, 224), (1, 1)), ((64, 320), (2, 0.4))):
        patch_size, architecture = planned_unet(sides, spacing, network)
        configuration = added_to(plans_with(patch_size, spacing, architecture), size)
        entry = configuration.configuration["architecture"]
        assert fits(entry, configuration.patch_size)
        kwargs = entry["arch_kwargs"]
        blocks = "n_blocks_per_stage" if network == RESIDUAL else "n_conv_per_stage"
        per_stage = ("features_per_stage", "kernel_sizes", "strides", blocks)
        assert {len(kwargs[name]) for name in per_stage} == {kwargs["n_stages"]}
        assert len(kwargs["n_conv_per_stage_decoder"]) == kwargs["n_stages"] - 1
        assert kwargs["n_stages"] >= 4


def test_features_go_on_as_they_were_planned():
    _, architecture = planned_unet((64, 64), (1, 1))  # five stages: 32 to 512
    for planned, expected in (
        ([32, 64, 128, 256, 512], [32, 64, 128, 256, 512, 512, 512, 512]),
        ([16, 32, 64, 128, 256], [16, 32, 64, 128, 256, 512, 512, 512]),
        ([32, 64, 128, 256, 320], [32, 64, 128, 256, 320, 320, 320, 320]),
        ([64, 128, 256, 512, 1024], [64, 128, 256, 512, 1024, 1024, 1024, 1024]),
    ):
        architecture["arch_kwargs"]["features_per_stage"] = planned
        kwargs = unet_for(architecture, [512, 512], (1, 1))["arch_kwargs"]
        assert kwargs["features_per_stage"] == expected


@pytest.mark.parametrize(
    "arch_kwargs", [{}, {"embed_dim": 396, "patch_embed_size": [8, 8]}, {"strides": [2, 2]}]
)
def test_a_network_without_stages_is_inherited(arch_kwargs):
    architecture = {"network_class_name": "some.Net", "arch_kwargs": arch_kwargs}
    plans = plans_with([256, 224], (1, 1), architecture)
    assert unet_for(architecture, [896, 784], (1, 1)) is None
    assert added_to(plans, 896).network_arch_class_name == "some.Net"


def test_plans_of_nnunet_2_0_get_a_u_net_too():
    plans = plans_with([256, 224], [0.8, 0.8], None)
    _, architecture = planned_unet((256, 224), (0.8, 0.8))
    kwargs = architecture["arch_kwargs"]
    planned = plans["configurations"]["2d"]
    del planned["architecture"]
    planned |= {
        "UNet_class_name": PLAIN,
        "UNet_base_num_features": 32,
        "unet_max_num_features": 512,
        "n_conv_per_stage_encoder": kwargs["n_conv_per_stage"],
        "n_conv_per_stage_decoder": kwargs["n_conv_per_stage_decoder"],
        "num_pool_per_axis": [5, 5],
        "pool_op_kernel_sizes": kwargs["strides"],
        "conv_kernel_sizes": kwargs["kernel_sizes"],
    }
    with pytest.warns(UserWarning, match="old nnU-Net plans format"):
        configuration = added_to(plans, 128)
    assert configuration.patch_size == [128, 112]
    run_stock_network(configuration)


@pytest.mark.slow
@pytest.mark.parametrize("planner", [ExperimentPlanner, MedDINOv3Planner, resenc.ResEncUNetPlanner])
def test_plans_of_real_planners_get_a_network_that_runs(planner, dataset, folder, monkeypatch):
    monkeypatch.setenv("MEDDINOV3_SIZE", "144")
    plans, name = api.plan_experiment_dataset(dataset.number, planner)
    meddinov3(["plan", "-d", str(dataset.number), "--size", "144", "-p", name])
    path = folder / dataset.name / f"{name}.json"
    written = json.loads(path.read_text())
    run_stock_network(PlansManager(written).get_configuration("2d_144"))
    if planner is MedDINOv3Planner:  # what the command makes is what the planner had made
        assert written["configurations"]["2d_144"] == plans["configurations"]["2d_144"]


@pytest.mark.slow
def test_a_u_net_that_was_inherited_stays_where_it_fits(folder, capsys):
    path = folder / "Dataset901_Square" / "nnUNetPlans.json"
    api.plan_experiment_dataset(901, ExperimentPlanner)
    plans = json.loads(path.read_text())
    patch_size, architecture = planned_unet((256, 256), (0.8, 0.8))  # halved six times
    plans["configurations"]["2d"] |= {"patch_size": patch_size, "architecture": architecture}
    path.write_text(json.dumps(plans))
    for size, stays in ((128, True), (144, False)):
        meddinov3(["plan", "-d", "901", "--size", str(size)])
        plans = json.loads(path.read_text())
        new = plans["configurations"][f"2d_{size}"]
        del plans["configurations"][f"2d_{size}"]["architecture"]  # as versions before wrote them
        path.write_text(json.dumps(plans))
        meddinov3(["plan", "-d", "901", "--size", str(size)])
        again = json.loads(path.read_text())["configurations"][f"2d_{size}"]
        assert ("architecture" not in again) is stays
        assert {**new, **again} == again
