from pathlib import Path

import numpy as np
import pytest

from nnunetv2_meddinov3.curate.leakage import Guard, build_guard, check_benchmarks
from nnunetv2_meddinov3.curate.pipeline import curate
from nnunetv2_meddinov3.curate.slices import stack_slices
from nnunetv2_meddinov3.curate.volume import Volume, VolumeSource
from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.store.fingerprints import slice_sha256
from nnunetv2_meddinov3.store.reader import SliceStore


def stack_of(array):
    return stack_slices(Volume(array, (2.0, 1.0, 1.0), "LPS", "CT", False, None, None, ()))


def source(key, dataset="X"):
    return VolumeSource(key, "file", (f"/data/{key}",), dataset, "p")


def test_a_renamed_copy_is_recognised_by_content_and_the_whole_volume_is_left_out(
    tmp_path, make_ct, write_image
):
    test_case, other = make_ct(6, seed=1), make_ct(6, seed=2)
    write_image(tmp_path / "tests" / "amos_0001.nii.gz", test_case)
    write_image(tmp_path / "mine" / "patient7.nrrd", test_case)
    write_image(tmp_path / "mine" / "patient8.nrrd", other)
    summary = curate([tmp_path / "mine"], tmp_path / "store", exclude=[tmp_path / "tests"])
    assert summary.excluded == [("mine/patient7.nrrd", "excluded: shares 6 slices with tests")]
    assert (summary.skipped, summary.exit_code) == ([], 0)
    store = SliceStore(tmp_path / "store")
    assert set(store.rows["source_key"].to_pylist()) == {"mine/patient8.nrrd"}


def test_one_shared_slice_leaves_out_the_volume(tmp_path, make_ct, write_image):
    volume = make_ct(6, seed=1)
    write_image(tmp_path / "tests" / "a.nii.gz", volume[3:4])
    guard = build_guard([tmp_path / "tests"])
    assert guard.inspect(stack_of(volume))[0] == "excluded: shares 1 slice with tests"
    assert guard.inspect(stack_of(make_ct(6, seed=2)))[0] is None


def test_air_and_constant_slices_do_not_make_volumes_alike(tmp_path, make_ct, write_image):
    excluded, mine = make_ct(4, seed=1), make_ct(4, seed=2)
    excluded[0] = mine[0] = -1000
    excluded[1] = mine[1] = np.where(np.arange(1600).reshape(40, 40) == 5, 0, -1000)
    write_image(tmp_path / "tests" / "a.nii.gz", excluded)
    guard = build_guard([tmp_path / "tests"])
    assert guard.inspect(stack_of(mine)) == (None, [])


def test_near_duplicates_are_flagged_and_enter(tmp_path, make_ct, write_image):
    volume = make_ct(3, seed=1)
    write_image(tmp_path / "tests" / "a.nii.gz", volume)
    noisy = volume + np.random.default_rng(0).integers(-5, 6, volume.shape, dtype=np.int16)
    write_image(tmp_path / "mine" / "b.nii.gz", noisy)
    write_image(tmp_path / "mine" / "c.nii.gz", make_ct(3, seed=2))
    assert curate([tmp_path / "mine"], tmp_path / "s", exclude=[tmp_path / "tests"]).exit_code == 0
    rows = SliceStore(tmp_path / "s").rows.select(["source_key", "flags"]).to_pylist()
    flagged = {row["source_key"] for row in rows if "near_excluded" in row["flags"]}
    assert flagged == {"mine/b.nii.gz"}


TURNS = {
    "left to right": lambda a: a[:, :, ::-1],
    "front to back": lambda a: a[:, ::-1],
    "upside down": lambda a: a[:, ::-1, ::-1],
    "a quarter to the left": lambda a: np.rot90(a, 1, (1, 2)),
    "a quarter to the right": lambda a: np.rot90(a, 3, (1, 2)),
    "transposed": lambda a: a.transpose(0, 2, 1),
    "transposed across": lambda a: a[:, ::-1, ::-1].transpose(0, 2, 1),
    "caudal to cranial": lambda a: a[::-1],
}


@pytest.mark.parametrize("turn", TURNS.values(), ids=TURNS)
@pytest.mark.parametrize("kind", ["volumes", "store", "list"])
def test_a_mirrored_or_turned_copy_is_left_out(tmp_path, make_ct, write_image, turn, kind):
    volume = make_ct(3, seed=1)[:, :30]
    tests = tmp_path / "tests"
    write_image(tests / "a.nii.gz", volume)
    if kind == "store":
        curate([tests], tests := tmp_path / "excluded")
    elif kind == "list":
        tests = tmp_path / "hashes.txt"
        tests.write_text("\n".join(map(slice_sha256, volume)))
    guard = build_guard([tests])
    copy = np.ascontiguousarray(turn(volume))
    reason = guard.inspect(stack_of(copy))[0]
    assert reason.startswith(f"excluded: shares 3 slices with {tests.name}")
    assert ("mirrored or turned" in reason) == (turn is not TURNS["caudal to cranial"])
    assert guard.inspect(stack_of(make_ct(3, seed=2)))[0] is None


@pytest.mark.parametrize("turn", TURNS.values(), ids=TURNS)
def test_a_turned_copy_with_noise_is_flagged(tmp_path, make_ct, write_image, turn):
    volume = make_ct(3, seed=1)
    write_image(tmp_path / "tests" / "a.nii.gz", volume)
    noisy = volume + np.random.default_rng(0).integers(-5, 6, volume.shape, dtype=np.int16)
    guard = build_guard([tmp_path / "tests"])
    assert guard.inspect(stack_of(np.ascontiguousarray(turn(noisy)))) == (None, [0, 1, 2])
    assert guard.inspect(stack_of(make_ct(3, seed=2))) == (None, [])


def test_of_an_nnunet_dataset_the_test_images_are_excluded(tmp_path, make_ct, write_image):
    dataset = tmp_path / "Dataset042_Mine"
    train, test = make_ct(3, seed=1), make_ct(3, seed=2)
    write_image(dataset / "imagesTr" / "a_0000.nii.gz", train)
    (dataset / "dataset.json").write_text(
        '{"channel_names": {"0": "CT"}, "labels": {"background": 0}, "numTraining": 1,'
        ' "file_ending": ".nii.gz"}'
    )
    everything = build_guard([dataset])
    assert everything.inspect(stack_of(train))[0] is not None
    write_image(dataset / "imagesTs" / "b_0000.nii.gz", test)
    only_tests = build_guard([dataset])
    assert only_tests.inspect(stack_of(train))[0] is None
    assert "3 slices with Dataset042_Mine/imagesTs" in only_tests.inspect(stack_of(test))[0]


def test_a_list_of_hashes_excludes(tmp_path, make_ct):
    volume = make_ct(3, seed=1)
    path = tmp_path / "tests.txt"
    path.write_text(f"# AMOS22 test\n\n{slice_sha256(volume[1]).upper()}  0123456789abcdef\n")
    guard = build_guard([path])
    assert guard.inspect(stack_of(volume))[0] == "excluded: shares 1 slice with tests.txt"
    assert guard.phashes.tolist() == [0x0123456789ABCDEF]


def test_a_broken_list_of_hashes_is_refused_with_its_line(tmp_path):
    path = tmp_path / "tests.txt"
    path.write_text("# fine\nnot a hash\n")
    with pytest.raises(UserError, match="line 2 is 'not a hash'"):
        build_guard([path])


def test_a_store_excludes_unless_it_was_resampled(tmp_path, make_ct, write_image):
    volume = make_ct(3, seed=1)
    write_image(tmp_path / "amos" / "a.nii.gz", volume)
    curate([tmp_path / "amos"], tmp_path / "native", allow_benchmarks=True)
    for path in (tmp_path / "native", tmp_path / "native" / "manifest.json"):
        reason = build_guard([path]).inspect(stack_of(volume))[0]
        assert reason == "excluded: shares 3 slices with native"
    curate([tmp_path / "amos"], tmp_path / "small", size=16, allow_benchmarks=True)
    with pytest.raises(
        UserError, match=r"must have the native geometry, but .*small was resampled"
    ):
        build_guard([tmp_path / "small"])


def test_a_guard_with_a_hole_is_refused(tmp_path, make_ct, write_image):
    write_image(tmp_path / "tests" / "a.nii.gz", make_ct(2))
    (tmp_path / "tests" / "b.nii.gz").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"must be readable, but tests/b.nii.gz is not \("):
        build_guard([tmp_path / "tests"])
    with pytest.raises(UserError, match="must name what exists"):
        build_guard([tmp_path / "nothing"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="has none"):
        build_guard([tmp_path / "empty"])


@pytest.mark.parametrize(
    ("size", "doubt"), [(None, "shares 3 slices with tests: "), (16, "was not compared with")]
)
def test_a_store_that_holds_what_is_excluded_now_is_not_continued(
    tmp_path, make_ct, write_image, size, doubt
):
    write_image(tmp_path / "mine" / "a.nii.gz", make_ct(3, seed=1))
    write_image(tmp_path / "tests" / "b.nii.gz", make_ct(3, seed=1))
    curate([tmp_path / "mine"], tmp_path / "s", size=size)
    with pytest.raises(UserError, match=f"mine/a.nii.gz in it {doubt}"):
        curate([tmp_path / "mine"], tmp_path / "s", size=size, exclude=[tmp_path / "tests"])


def test_a_resampled_store_is_continued_with_the_same_exclusions(tmp_path, make_ct, write_image):
    write_image(tmp_path / "mine" / "a.nii.gz", make_ct(3, seed=1))
    write_image(tmp_path / "tests" / "b.nii.gz", make_ct(3, seed=2))
    options = {"size": 16, "exclude": [tmp_path / "tests"]}
    assert curate([tmp_path / "mine"], tmp_path / "s", **options).entered == 1
    assert curate([tmp_path / "mine"], tmp_path / "s", **options).present == 1


def test_no_exclusion_leaves_no_note():
    assert Guard().note() == ()
    assert Guard().inspect(None) == (None, [])


@pytest.mark.parametrize(
    ("key", "dataset", "name"),
    [
        ("Dataset218_AMOS2022_postChallenge/imagesTr/a.nii.gz", "D", "AMOS22"),
        ("data/amos_0001.nii.gz", "D", "AMOS22"),
        ("x/a.nii.gz", "BTCV", "BTCV"),
        ("x/kits23/dataset/case_00000/imaging.nii.gz", "D", "KiTS23"),
        ("LITS17/volume-0.nii", "D", "LiTS"),
        ("Task03_Liver/imagesTr/liver_0.nii.gz", "D", "LiTS"),
        ("AbdomenCT-1K/Case_00001_0000.nii.gz", "D", "KiTS23"),
        ("CT-ORG/volume-0.nii.gz", "D", "LiTS"),
        ("AbdomenAtlas1.0Mini/BDMAP_00000001/ct.nii.gz", "D", "AMOS22"),
    ],
)
def test_benchmarks_are_suspected_by_name(key, dataset, name):
    with pytest.raises(UserError, match=f"test images of {name} must not enter"):
        check_benchmarks([source(key, dataset)], [Path("/data/x")], [])


@pytest.mark.parametrize(
    "key", ["splits/a.nii.gz", "famous/a.nii.gz", "limits/kitsch.nii.gz", "WORD/a.nii.gz"]
)
def test_other_names_are_no_benchmarks(key):
    check_benchmarks([source(key)], [Path("/data/x")], [])


def test_a_benchmark_with_its_own_exclusion_may_start_and_another_may_not():
    sources = [source("AMOS22/imagesTr/a.nii.gz")]
    check_benchmarks(sources, [Path("/data/AMOS22")], [Path("/data/AMOS22/imagesTs")])
    with pytest.raises(UserError, match="no --exclude has a name like AMOS22"):
        check_benchmarks(sources, [Path("/data/AMOS22")], [Path("/data/BTCV/imagesTs")])


def test_the_folder_above_a_source_is_looked_at():
    with pytest.raises(UserError, match="KiTS23"):
        check_benchmarks([source("imagesTr/a.nii.gz")], [Path("/data/kits19/imagesTr")], [])


def test_own_benchmarks_replace_those_of_the_paper():
    sources = [source("AMOS22/a.nii.gz"), source("hospital-b/a.nii.gz")]
    with pytest.raises(UserError, match="test images of Hospital B must"):
        check_benchmarks(sources, [Path("/x")], [], ["Hospital B"])
    check_benchmarks(sources, [Path("/x")], [], ["Hospital C"])
