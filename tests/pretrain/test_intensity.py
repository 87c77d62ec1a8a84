import pytest

from nnunetv2_meddinov3.curate.pipeline import curate
from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.pretrain.config import load_config
from nnunetv2_meddinov3.pretrain.intensity import check_same_contract, intensity_of
from nnunetv2_meddinov3.pretrain.loader import open_store


def opened(store, *overrides):
    return open_store(load_config("tiny_stage1", [f"data.store={store}", *overrides]))


def test_a_store_of_several_ct_volumes_is_taken(ct_store):
    store, rows = opened(ct_store)
    assert len(rows) == len(store) == 24


def test_no_store_and_a_folder_that_is_none_are_one_sentence(tmp_path):
    with pytest.raises(UserError, match="needs a slice store: give --store DIR"):
        open_store(load_config("tiny_stage1"))
    with pytest.raises(UserError, match="must be a slice store"):
        opened(tmp_path)


def test_an_empty_store_is_refused(tmp_path, write_image):
    import numpy as np

    write_image(tmp_path / "v/air.nii.gz", np.full((4, 32, 32), -1000, np.int16))
    curate([tmp_path / "v"], tmp_path / "store")
    with pytest.raises(UserError, match="it is empty: curate volumes into it"):
        opened(tmp_path / "store")


def test_a_single_volume_is_refused(tmp_path, write_image, make_ct):
    write_image(tmp_path / "v/one.nii.gz", make_ct(20, 48))
    curate([tmp_path / "v"], tmp_path / "store")
    with pytest.raises(UserError, match="holds a single volume: curate more"):
        opened(tmp_path / "store")


def test_fewer_slices_than_a_group_are_refused(ct_store):
    with pytest.raises(
        UserError, match=r"koleo_group=32 needs at least 32 slices, but .* holds 24"
    ):
        opened(ct_store, "losses.koleo_group=32")


def test_another_kind_of_values_is_refused_until_it_is_named(tmp_path, write_image, make_ct):
    from PIL import Image

    for i in range(2):
        write_image(tmp_path / f"v/p{i}.nii.gz", make_ct(4, 48, seed=i))
    (tmp_path / "grey").mkdir()
    for i in range(8):
        grey = (make_ct(1, 48, seed=10 + i)[0].clip(0, 255)).astype("uint8")
        Image.fromarray(grey).save(tmp_path / f"grey/g{i}.png")
    curate([tmp_path / "v", tmp_path / "grey"], tmp_path / "store")
    with pytest.raises(
        UserError, match=r"16 slices, 8 of 8-bit grey .*data.modalities=\[hu,windowed\]"
    ):
        opened(tmp_path / "store")
    assert len(opened(tmp_path / "store", "data.modalities=[hu,windowed]")[1]) == 16


def test_the_contract_goes_into_the_export_and_another_one_is_refused():
    config = load_config("tiny_stage1")
    contract = intensity_of(config)
    assert contract["clip"] == [-1000, 1000]
    assert (contract["unit"], contract["values"]) == ("HU", ["hu"])
    check_same_contract({"intensity": contract}, config, "w")
    check_same_contract({}, config, "released weights say nothing")
    with pytest.raises(UserError, match=r"w was trained with std 100 HU and the config says 178"):
        check_same_contract({"intensity": {**contract, "std": 100}}, config, "w")
