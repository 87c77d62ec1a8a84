import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nnunetv2_meddinov3.models.architecture import architecture_of
from nnunetv2_meddinov3.models.backbone import Backbone
from nnunetv2_meddinov3.pretrain import memory
from nnunetv2_meddinov3.pretrain.config import Head, Resolution, load_config
from nnunetv2_meddinov3.pretrain.heads import ProjectionHead
from nnunetv2_meddinov3.pretrain.operations import forward_flops, mean_flops, step_flops
from nnunetv2_meddinov3.pretrain.student import encode, pack_blocks
from nnunetv2_meddinov3.progress import in_words

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("size", "resolution", "gigaflops"),
    [
        ("vits16", Resolution(global_size=224, local_size=96), 130),
        ("vitb16", Resolution(global_size=224, local_size=96), 469),
        ("vitl16", Resolution(global_size=224, local_size=96), 1618),
        ("vits16", Resolution(global_size=256, local_size=112), 172),
        ("vitb16", Resolution(global_size=256, local_size=112), 617),
        ("vitl16", Resolution(global_size=256, local_size=112), 2125),
    ],
)
def test_a_step_has_the_published_number_of_operations(size, resolution, gigaflops):
    config = load_config(f"{size}_stage1")
    flops = step_flops(config, architecture_of(config.model.size), resolution)
    assert flops.total / 1e9 == pytest.approx(gigaflops, rel=5e-3)


@pytest.mark.parametrize(
    ("size", "gigaflops"), [("vits16", 300), ("vitb16", 1048), ("vitl16", 3581)]
)
def test_gram_anchoring_adds_the_gram_teacher(size, gigaflops):
    config = load_config(f"{size}_stage2_gram")
    a = architecture_of(config.model.size)
    flops = step_flops(config, a, config.crops.resolutions[0])
    assert flops.total / 1e9 == pytest.approx(gigaflops, rel=5e-3)
    assert 0.40 < flops.gram / flops.total < 0.44


@pytest.mark.parametrize("size", ["vit_tiny", "vit_small_plus"])
def test_operations_and_parameters_are_those_torch_counts(size):
    a = architecture_of(size)
    backbone = pack_blocks(Backbone(a, mask_token=True)).eval()
    assert memory.backbone_parameters(a) == sum(p.numel() for p in backbone.parameters())
    # torch counts the products of attention only where it computes them one by one
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        encode(backbone, [torch.zeros(1, 3, 64, 64)])
    assert counter.get_total_flops() == forward_flops(a, 64)


def a_head(width, head):
    return ProjectionHead(width, head.prototypes, head.hidden_dim, head.bottleneck_dim, head.layers)


def test_heads_have_the_parameters_that_are_counted():
    for sizes in ((100, 20, 10, 3), (50, 8, 4, 1)):
        head = Head(**dict(zip(Head.model_fields, sizes, strict=True)))
        parameters = sum(p.numel() for p in a_head(32, head).parameters())
        assert memory.head_parameters(32, head) == parameters
    assert memory.head_parameters(768, Head()) / 1e6 == pytest.approx(23.1, abs=0.05)


@pytest.mark.parametrize(("stage", "gram_teachers"), [("stage1", 0), ("stage2_gram", 1)])
def test_the_memory_of_networks_is_that_of_their_numbers(stage, gram_teachers):
    config = load_config(f"tiny_{stage}")
    a = architecture_of(config.model.size)
    modules = [Backbone(a, mask_token=True)]
    modules += [a_head(a.embed_dim, h) for h in (config.heads.dino, config.heads.ibot)]
    sizes = [sum(p.numel() for p in module.parameters()) for module in modules]
    # weights, gradients and two moments of the student, weights of the teacher; in fp32
    wanted = 4 * (5 * sum(sizes) + gram_teachers * sizes[0])
    assert memory.memory_gb(config, a, 4, is_bf16=False)["networks"] * 1e9 == wanted


@pytest.mark.slow
@pytest.mark.parametrize("size", ["vit_tiny", "vit_small_plus"])
def test_the_memory_of_activations_is_about_what_autograd_keeps(size):
    config, a, images = load_config("tiny_stage1"), architecture_of(size), 2
    backbone = pack_blocks(Backbone(a, mask_token=True)).train()
    weights = {p.untyped_storage().data_ptr() for p in backbone.parameters()}
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    crops = config.crops.resolutions[0]
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        encode(
            backbone,
            [
                torch.zeros(2 * images, 3, crops.global_size, crops.global_size),
                torch.zeros(4 * images, 3, crops.local_size, crops.local_size),
            ],
        )
    counted = memory.memory_gb(config, a, images, is_bf16=False)["activations"] * 1e9
    assert counted == pytest.approx(sum(kept.values()), rel=0.25)


def test_memory_that_was_measured_is_said_as_it_is_and_grows_along_a_line():
    config, a = load_config("tiny_stage1"), architecture_of("vit_tiny")
    measured = memory.Measured({2: 1.25, 8: 1.5})
    said = {n: sum(measured.memory_gb(config, a, n, False, n).values()) for n in (2, 8, 32)}
    assert said == pytest.approx({2: 1.25, 8: 1.5, 32: 2.5})
    one = memory.Measured({2: 1.25}).memory_gb(config, a, 4, False, 4)
    counted = [memory.memory_gb(config, a, n, is_bf16=False) for n in (2, 4)]
    grown = sum(counted[1].values()) - sum(counted[0].values())
    assert sum(one.values()) == pytest.approx(1.25 + memory._ON_CPU * grown)


def test_images_of_other_micro_batches_take_their_views_and_targets():
    a = architecture_of("vit_tiny")
    heads = "heads={dino: {prototypes: 4000}, ibot: {prototypes: 500}}"
    config = load_config("tiny_stage1", [heads])
    few, many = (memory.memory_gb(config, a, 8, False, n) for n in (8, 12))
    assert {name for name in few if few[name] != many[name]} == {"targets"}
    # views of 96 and 48 pixels, prototypes of 2 crops and of 0.3 of 36 patches, 37 features each
    numbers = 2 * 96**2 + 4 * 48**2 + 2 * 4000 + 0.3 * 36 * 500 + 2 * 37 * a.embed_dim
    assert many["targets"] - few["targets"] == pytest.approx(4 * 4 * numbers / 1e9)


def test_a_step_is_timed_at_the_largest_crops_and_said_for_all():
    config = load_config("vitb16_stage3_highres")
    a = architecture_of("vit_base")
    largest = memory.widest(config, a)
    assert (largest.global_size, largest.local_size) == (768, 336)
    share = mean_flops(config, a) / step_flops(config, a, largest).total
    flops = [step_flops(config, a, each).total for each in config.crops.resolutions]
    assert flops[-1] == max(flops)
    mean = sum(f * p for f, p in zip(flops, (0.3, 0.3, 0.3, 0.05, 0.05), strict=True))
    assert share == pytest.approx(mean / max(flops))
    tiny, a = load_config("tiny_stage1"), architecture_of("vit_tiny")  # of one resolution
    assert mean_flops(tiny, a) == step_flops(tiny, a, tiny.crops.resolutions[0]).total


_USE = """
import io, re, sys, tempfile
from pathlib import Path
from nnunetv2_meddinov3.pretrain.dry_run import dry_run
from nnunetv2_meddinov3.pretrain.stages import settled, stages_of
what, store, name, *changes = sys.argv[1:]
changes += ["engine.device=cpu", "data.workers=0", "engine.health_every=1000"]
(config,) = settled(stages_of([name], changes, store=store), None)
if what == "said":
    stream = io.StringIO()
    dry_run((config,), stream)
    print(re.search(r"memory of a process +about ([0-9.]+) GB", stream.getvalue())[1])
else:
    from nnunetv2_meddinov3.pretrain.distributed import started
    from nnunetv2_meddinov3.pretrain.train import Stage
    from nnunetv2_meddinov3.processes import peak_gb
    from nnunetv2_meddinov3.signals import Stop
    # as late in the stage: from no earlier one, with the whole Gram loss, all at the largest crops
    config.init.source, config.init.optimizer = "none", False
    if config.losses.gram.weight is not None:
        config.losses.gram.weight.start = config.losses.gram.weight.peak = 2.0
        config.losses.gram.teacher = "init"
    config.crops.resolutions = config.crops.resolutions[-1:]
    with started(config.engine) as runtime, tempfile.TemporaryDirectory() as folder:
        stage = Stage(config, Path(folder) / "stage", runtime, previous=None, stream=None)
        batches = stage.loader.iterate(0)
        for _ in range(3):
            stage.one_step(next(batches), Stop())
            stage.step += 1
        stage.save()
        print(peak_gb())
"""
_SMALL = "model.size=vit_small"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(
    "words",
    [
        ["tiny_stage2_gram"],
        ["tiny_stage1", "optim.batch_size=64", "engine.micro_batch=16"],
        ["tiny_stage3_highres", "engine.micro_batch=32", "engine.activation_checkpointing=true"],
        ["tiny_stage1", _SMALL, "optim.batch_size=8"],
    ],
    ids=" ".join,
)
def test_the_memory_that_is_said_is_about_what_is_used_on_a_cpu(ct_store, words):
    order = ["said", "used"]
    found = {}
    for what in order if len(words) % 2 else reversed(order):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", _USE, what, str(ct_store), *words],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        found[what] = float(done.stdout.split()[-1])
    print(" ".join(words), found)
    assert found["said"] == pytest.approx(found["used"], rel=0.2)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.42, "0.42 s"),
        (42, "42 s"),
        (100, "1.7 min"),
        (666, "11 min"),
        (5399, "90 min"),
        (9000, "2.5 h"),
        (100_000, "28 h"),
        (864_000, "10.0 days"),
    ],
)
def test_a_time_is_said_in_a_unit_in_which_it_is_a_small_number(seconds, words):
    assert in_words(seconds) == words


def test_recomputing_activations_saves_memory_and_more_images_need_more():
    a = architecture_of("vit_base")
    plain = load_config("vitb16_stage1")
    saving = load_config("vitb16_stage1", ["engine.activation_checkpointing=true"])
    one, two = (memory.memory_gb(plain, a, n, is_bf16=True) for n in (16, 32))
    assert two["activations"] == pytest.approx(2 * one["activations"])
    assert two["logits"] == pytest.approx(2 * one["logits"])
    of_saving = memory.memory_gb(saving, a, 16, is_bf16=True)
    assert of_saving["activations"] < 0.3 * one["activations"]
    assert one["networks"] == two["networks"] == of_saving["networks"]
