import multiprocessing
import os
import signal

import numpy as np
import pytest
import torch

from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.pretrain.config import load_config
from nnunetv2_meddinov3.pretrain.loader import SliceLoader, open_store
from nnunetv2_meddinov3.pretrain.views.batch import join

CPU = torch.device("cpu")


def steps(overrides, start=0, count=2, rank=0, world_size=1, **changes):
    config = load_config("tiny_stage1", [*overrides, *(f"{k}={v}" for k, v in changes.items())])
    store, rows = open_store(config)
    iterator = SliceLoader(store, rows, config, rank, world_size, CPU).iterate(start)
    out = [next(iterator) for _ in range(count)]
    iterator.close()
    return out


def equal(a, b):
    names = ("global_crops", "local_crops", "masks", "mask_indices")
    return all(torch.equal(getattr(a, n), getattr(b, n)) for n in names)


@pytest.mark.slow
def test_the_order_is_the_same_for_any_number_of_workers_and_any_start(small_stage):
    wanted = steps(small_stage(), count=4)
    for workers in (1, 2):
        found = steps(small_stage(), count=4, **{"data.workers": workers})
        assert all(equal(a[0], b[0]) for a, b in zip(found, wanted, strict=True))
    later = steps(small_stage(), start=2, count=2, **{"data.workers": 1})
    assert all(equal(a[0], b[0]) for a, b in zip(later, wanted[2:], strict=True))


LARGE = [  # crops whose sums and powers torch divides among threads, all of them changed
    "crops.resolutions.0.global_size=304",
    "crops.resolutions.0.local_size=272",
    "losses.koleo_group=2",
    "optim.batch_size=2",
    *(f"augment.{n}_probability=1" for n in ("window", "gamma", "noise", "low_resolution")),
    "augment.contrast_probability=0.3",  # of single crops
    "augment.blur_probability=[1,1,1]",
]


@pytest.mark.slow
def test_any_number_of_workers_and_threads_gives_the_same_bits_wherever_views_are_made(small_stage):
    before = torch.get_num_threads()
    wanted = steps(small_stage(*LARGE), count=4)  # in one thread
    try:
        torch.set_num_threads(3)
        for workers in (0, 1, 2):
            for views_on in ("workers", "device"):
                changes = {"data.workers": workers, "data.views_on": views_on}
                found = steps(small_stage(*LARGE), count=4, **changes)
                assert torch.get_num_threads() == 3
                assert all(equal(a[0], b[0]) for a, b in zip(found, wanted, strict=True)), changes
    finally:
        torch.set_num_threads(before)


def test_two_ranks_see_together_what_one_sees(small_stage):
    whole = steps(small_stage())
    halves = [steps(small_stage(), rank=rank, world_size=2) for rank in (0, 1)]
    for step in range(2):
        assert equal(join([halves[0][step][0], halves[1][step][0]]), whole[step][0])


def test_micro_batches_are_the_groups_of_a_step_in_order(small_stage):
    whole = steps(small_stage())[0][0]
    parts = steps(small_stage("engine.micro_batch=4"))[0]
    assert [p.images for p in parts] == [4, 4]
    assert equal(join(parts), whole)


def test_views_made_on_the_device_are_those_made_by_workers(small_stage):
    a = steps(small_stage("data.views_on=device"))[0][0]
    b = steps(small_stage("data.views_on=workers"))[0][0]
    assert equal(a, b)


def test_loading_leaves_the_global_random_state_alone(small_stage):
    torch.manual_seed(5)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    steps(small_stage())
    assert torch.equal(before, torch.get_rng_state())
    assert (numpy_before == np.random.get_state()[1]).all()  # noqa: NPY002


def iterator_with_a_worker(small_stage):
    config = load_config("tiny_stage1", small_stage("data.workers=1"))
    iterator = SliceLoader(*open_store(config), config, 0, 1, CPU).iterate()
    first, (worker,) = next(iterator), multiprocessing.active_children()
    return iterator, first, worker


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_to_every_process_of_a_job_leaves_the_workers_at_work(small_stage, name):
    iterator, _, worker = iterator_with_a_worker(small_stage)
    os.kill(worker.pid, getattr(signal, name))
    later = [next(iterator)[0] for _ in range(12)]  # more than are kept ready
    assert worker.is_alive()
    assert equal(later[0], steps(small_stage(), start=1, count=1)[0][0])
    iterator.close()
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_closing_ends_a_worker_that_is_stuck(small_stage):
    iterator, _, worker = iterator_with_a_worker(small_stage)
    os.kill(worker.pid, signal.SIGSTOP)
    iterator.close()
    worker.join(1)
    ended = not worker.is_alive()
    worker.kill()  # or the tests would wait for it at their end
    assert ended


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_damaged_slice_is_one_sentence(ct_store, small_stage, tmp_path, workers):
    import shutil

    shutil.copytree(ct_store, tmp_path / "store")
    for array in (tmp_path / "store/volumes").iterdir():
        array.write_bytes(array.read_bytes()[:100])
    with pytest.raises(UserError, match="cannot be read") as caught:
        steps(small_stage(f"data.store={tmp_path / 'store'}"), **{"data.workers": workers})
    assert "Traceback" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not multiprocessing.active_children()  # a mistake ends the workers too


def test_a_part_of_a_split_store_is_read_alone(ct_store, small_stage, tmp_path):
    import shutil

    from nnunetv2_meddinov3.store.manage import split_by_patient

    store = tmp_path / "store"
    shutil.copytree(ct_store, store)
    overrides = small_stage(f"data.store={store}", "data.split=train")
    with pytest.raises(UserError, match="has none: make one with `meddinov3 store split"):
        steps(overrides)
    split = split_by_patient(store, {"train": 0.5, "val": 0.5})
    assert open_store(load_config("tiny_stage1", overrides))[1].tolist() == split["train"]
    with pytest.raises(UserError, match=r"data.split must be one of train, val, got test"):
        steps([*overrides, "data.split=test"])
