import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.models.architecture import architecture_of
from nnunetv2_meddinov3.models.backbone import Backbone
from nnunetv2_meddinov3.models.build import load_backbone, save_backbone
from nnunetv2_meddinov3.models.tensor_files import read_files
from nnunetv2_meddinov3.pretrain.config import load_config
from nnunetv2_meddinov3.pretrain.networks import head_of, load_start, student_of
from nnunetv2_meddinov3.pretrain.student import encode, pack_blocks

GOLDEN = Path(__file__).parents[1] / "golden"


def start(*overrides, name="tiny_stage1", previous=None):
    return load_start(load_config(name, overrides), previous)


def vit(start):
    return start.distillation.student.backbone.vit


def test_random_weights_depend_on_the_seed_alone_and_the_teacher_is_a_copy():
    a, b, c = start(), start(), start("optim.seed=1")
    states = [s.distillation.student.state_dict() for s in (a, b, c)]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert any(not torch.equal(states[0][k], states[2][k]) for k in states[0])
    teacher = a.distillation.teacher.state_dict()
    assert all(torch.equal(states[0][k], teacher[k]) for k in teacher)
    assert a.base == "random weights"


def test_a_released_checkpoint_is_taken_with_fresh_heads(released_file, tmp_path):
    backbone = released_file(tmp_path / "model.pth")
    found = start(f"init.source={tmp_path / 'model.pth'}")
    assert found.architecture.norm_eps == 1e-6
    assert not found.architecture.qkv_bias
    for name, tensor in backbone.state_dict().items():
        own = found.distillation.student.backbone.state_dict()[name]
        assert torch.equal(own, tensor), name
    assert "DINOv3 License" in found.licence
    assert found.base == str(tmp_path / "model.pth")


def test_a_one_channel_stem_of_summed_kernels_gives_what_repeated_slices_give(
    released_file, tmp_path
):
    released_file(tmp_path / "model.pth")
    three = start(f"init.source={tmp_path / 'model.pth'}")
    one = start(f"init.source={tmp_path / 'model.pth'}", "model.input_channels=1")
    assert vit(one).patch_embed.proj.weight.shape[1] == 1
    images = torch.randn(2, 1, 32, 48)
    with torch.no_grad():
        tokens = [encode(s.distillation.teacher.backbone, [images])[0] for s in (three, one)]
    torch.testing.assert_close(tokens[0].patches, tokens[1].patches, rtol=1e-4, atol=1e-5)


def test_weights_of_another_size_are_refused(tmp_path):
    save_backbone(Backbone(architecture_of("vit_tiny")), tmp_path / "w.safetensors", licence="x")
    with pytest.raises(UserError, match=r"must be a vit_small .* has embed_dim 128 instead of 384"):
        start(f"init.source={tmp_path / 'w.safetensors'}", name="vits16_stage1")


def test_weights_of_another_contract_are_refused(tmp_path):
    contract = {"unit": "HU", "clip": [-160, 240], "mean": 0, "std": 1}
    backbone = Backbone(architecture_of("vit_tiny"))
    save_backbone(backbone, tmp_path / "w.safetensors", licence="x", intensity=contract)
    with pytest.raises(UserError, match="was trained with clip"):
        start(f"init.source={tmp_path / 'w.safetensors'}")


def test_a_source_that_is_not_there_is_one_sentence():
    with pytest.raises(UserError, match=r"there is no nowhere"):
        start("init.source=nowhere.pth")


def test_a_gram_teacher_is_the_start_a_file_or_refused(tmp_path):
    gram = ("init.source=none", "init.optimizer=false")
    found = start(*gram, "losses.gram.teacher=init", name="tiny_stage2_gram").distillation
    ours, theirs = found.gram_teacher.backbone.state_dict(), found.teacher.backbone.state_dict()
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    other = Backbone(architecture_of("vit_tiny"))
    save_backbone(other, tmp_path / "g.safetensors", licence="x")
    path = f"losses.gram.teacher={tmp_path / 'g.safetensors'}"
    found = start(*gram, path, name="tiny_stage2_gram").distillation
    assert torch.equal(found.gram_teacher.backbone.vit.cls_token, other.vit.cls_token)
    assert (
        start(*gram, "losses.gram.teacher=ema", name="tiny_stage2_gram").distillation.gram_teacher
        is None
    )
    with pytest.raises(UserError, match=r"needs an earlier stage, but this is the first"):
        start(*gram, name="tiny_stage2_gram")
    with pytest.raises(UserError, match=r"teacher_step_000100.* does not exist: add 100 to"):
        start(*gram, name="tiny_stage2_gram", previous=tmp_path)
    with pytest.raises(UserError, match=r"losses.gram.teacher=retained needs an earlier stage"):
        start(*gram, "losses.gram.teacher=retained", name="tiny_stage2_gram", previous=tmp_path)


def test_heads_are_read_with_their_sizes_and_their_outputs_kept():
    tensors = load_file(GOLDEN / "stage1.weights.safetensors")
    student = student_of(tensors, "student", "golden")
    assert student.dino_head.last_layer.weight.shape == (96, 32)
    own = student.ibot_head.state_dict()
    assert all(torch.equal(t, tensors[f"student.ibot_head.{k}"]) for k, t in own.items())


@pytest.mark.parametrize("missing", ["dino_head.mlp.2.weight", "ibot_head.last_layer.weight"])
def test_a_head_with_a_hole_is_refused(missing):
    tensors = load_file(GOLDEN / "stage1.weights.safetensors")
    del tensors[f"student.{missing}"]
    with pytest.raises(UserError, match="must be a"):
        student_of(tensors, "student", "torn")


def test_a_checkpoint_without_heads_is_refused_as_a_stage(tmp_path, released_file):
    released_file(tmp_path / "model.pth")
    tensors = read_files(tmp_path / "model.pth").tensors
    with pytest.raises(UserError, match=r"must hold|must be a"):
        student_of(tensors, "teacher", "model.pth")
    with pytest.raises(UserError, match="must be a projection head"):
        head_of({"mlp.0.bias": torch.zeros(3)}, "h")


@pytest.fixture(scope="module")
def finished(small_stage, tmp_path_factory):
    """A stage of three steps."""
    import io

    from nnunetv2_meddinov3.pretrain.distributed import Runtime
    from nnunetv2_meddinov3.pretrain.train import Stage
    from nnunetv2_meddinov3.signals import Stop

    folder = tmp_path_factory.mktemp("run") / "stage1"
    overrides = small_stage("optim.steps=3", "optim.lr.peak=0.01", "optim.lr.end=0.01")
    runtime = Runtime(0, 1, torch.device("cpu"), "fp32", False)
    config = load_config("tiny_stage1", overrides)
    Stage(config, folder, runtime, previous=None, stream=io.StringIO()).run(Stop())
    return folder, small_stage


def second(finished, *more, **kwargs):
    folder, small_stage = finished
    gram = ("losses.gram.teacher=previous", "crops.resolutions.0.gram_size=96")
    weight = "losses.gram.weight={start: 1, peak: 1, end: 1, warmup_steps: 0, cosine_steps: 0}"
    overrides = small_stage("optim.steps=3", *gram, weight, *more)
    overrides = [o for o in overrides if "warmup_steps=0" not in o]
    config = load_config("tiny_stage2_gram", [*overrides, "losses.local_weight.cosine_steps=0"])
    return load_start(config, kwargs.get("previous", folder))


def test_a_stage_goes_on_from_both_branches_heads_optimiser_and_teacher(finished):
    state = torch.load(finished[0] / "checkpoints/step_0000003/state.pt", weights_only=True)
    found = second(finished)
    model = found.distillation.state_dict()
    for name, tensor in state["model"].items():
        assert torch.equal(model[name], tensor), name
    assert found.optimizer["state"].keys() == state["optimizer"]["state"].keys()
    exported = load_backbone(finished[0] / "teacher.safetensors")
    gram = found.distillation.gram_teacher.backbone
    assert torch.equal(gram.vit.cls_token, exported.vit.cls_token)


@pytest.mark.parametrize(
    "gram", ["previous", "retained", "init"], ids=lambda gram: f"Gram teacher {gram}"
)
def test_a_start_reads_the_training_state_of_the_stage_before_once(
    finished, tmp_path, reads_of_states, gram
):
    folder = shutil.copytree(finished[0], tmp_path / "stage1")
    path = folder / "checkpoints/step_0000003/state.pt"
    state = torch.load(path, weights_only=True)
    teacher = {k: t for k, t in state["model"].items() if k.startswith("teacher.backbone.")}
    state["model"] |= {f"gram_{k}": t for k, t in teacher.items()}  # as a later stage's has
    torch.save(state, path)
    reads_of_states.clear()
    found = second(finished, f"losses.gram.teacher={gram}", previous=folder).distillation
    assert reads_of_states == [path]
    assert found.gram_teacher is not None


def test_a_stage_may_start_from_the_teacher_alone(finished):
    found = second(finished, "init.student=teacher", "init.optimizer=false").distillation
    student, teacher = found.student.state_dict(), found.teacher.state_dict()
    assert all(torch.equal(student[k], teacher[k]) for k in student)
    assert second(finished, "init.optimizer=false").optimizer is None


def test_heads_of_another_size_are_refused(finished):
    with pytest.raises(UserError, match=r"32 prototypes there, 16 here\): give the same sizes"):
        second(finished, "heads.dino.prototypes=16")


def test_a_stage_that_saved_nothing_is_refused(finished, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="its stage saved none yet"):
        second(finished, previous=tmp_path)


def test_a_retained_gram_teacher_that_never_was_is_refused(finished):
    with pytest.raises(UserError, match="which had none: set it to previous, init or a file"):
        second(finished, "losses.gram.teacher=retained")


def test_the_export_is_what_the_trainers_load_with_all_that_must_be_known(finished):
    from nnunetv2_meddinov3.models.weights import read_checkpoint

    checkpoint = read_checkpoint(finished[0] / "teacher.safetensors")
    facts = checkpoint.metadata
    assert (facts["stage"], facts["step"]) == (1, 3)
    assert facts["spacing_mm"] == pytest.approx([0.8, 0.8])
    assert facts["intensity"]["clip"] == [-1000, 1000]
    assert {"architecture", "store_sha256", "versions", "licence", "base"} <= set(facts)
    state = finished[0] / "checkpoints/step_0000003/state.pt"
    teacher = load_backbone(state, branch="teacher", norm_eps=1e-6, layer_scale=0.1)
    exported = load_backbone(finished[0] / "teacher.safetensors")
    assert exported.architecture == teacher.architecture
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        a = exported.eval().intermediate_tokens(images, [3])[0].cls
        b = encode(pack_blocks(teacher.eval()), [images])[0].cls
    torch.testing.assert_close(a, b)


def test_an_export_gathers_the_teachers_backbone_alone(small_stage, tmp_path, monkeypatch):
    from nnunetv2_meddinov3.pretrain import checkpoints
    from nnunetv2_meddinov3.pretrain.distributed import Runtime
    from nnunetv2_meddinov3.pretrain.train import Stage

    config = load_config("tiny_stage1", small_stage())
    runtime = Runtime(0, 1, torch.device("cpu"), "fp32", False)
    stage = Stage(config, tmp_path, runtime, previous=None, stream=None)
    gathered = []

    def note(tensor):
        gathered.append(tensor)
        return tensor

    def never(*arguments, **options):
        raise AssertionError("everything is gathered")

    monkeypatch.setattr(checkpoints, "get_model_state_dict", never)
    monkeypatch.setattr(torch.Tensor, "full_tensor", note, raising=False)
    stage.export(tmp_path / "teacher.safetensors")
    teacher = stage.distillation.teacher.backbone.state_dict()
    assert len(gathered) == len(teacher)
    exported = load_backbone(tmp_path / "teacher.safetensors").state_dict()
    assert all(torch.equal(exported[k], t) for k, t in teacher.items())


def test_the_folder_of_a_checkpoint_and_its_file_mean_the_same(finished, tmp_path):
    shutil.copytree(finished[0] / "checkpoints/step_0000003", tmp_path / "copy")
    for source in (tmp_path / "copy", tmp_path / "copy/state.pt"):
        found = second(finished, f"init.source={source}").distillation
        assert found.student.dino_head.last_layer.weight.shape == (32, 16)
