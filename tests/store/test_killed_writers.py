"""Writers that are killed, and several that write at once, in processes of their own."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from nnunetv2_meddinov3.store import codec, layout
from nnunetv2_meddinov3.store.index import build_index, read_records
from nnunetv2_meddinov3.store.reader import SliceStore
from nnunetv2_meddinov3.store.verify import verify
from nnunetv2_meddinov3.store.writer import StoreWriter

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
VOLUMES = range(8)
SHAPE = (5, 64, 64)  # 40 kB, which do not compress


def add(folder, numbers, stores):
    """What curation does with some of the volumes: enter what is new, then index all."""
    writer = StoreWriter(folder, stores.options)
    for number in numbers:
        slices = stores.slices(number, SHAPE)
        record = stores.record(f"Set{number % 3}/case{number}", slices)
        if not writer.has(record.source_key, record.source_sha256):
            writer.write_volume(record, slices)
    build_index(folder)


class _SlowFile:
    """A file whose writing takes long enough to be killed in."""

    def __init__(self, file):
        self.file = file

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def write(self, data):
        for start in range(0, len(data), 4096):
            self.file.write(data[start : start + 4096])
            self.file.flush()
            time.sleep(0.003)

    def __getattr__(self, name):
        return getattr(self.file, name)


def _add_slowly(folder, numbers, stores):
    opened = Path.open
    Path.open = lambda path, mode="r", *rest, **options: (
        _SlowFile(opened(path, mode)) if mode == "wb" else opened(path, mode, *rest, **options)
    )
    add(folder, numbers, stores)


def _kill(folder, numbers, stores, seconds, in_a_write):
    """Starts a writer and kills it; returns whether it was killed, and in the midst of what.

    ``seconds`` are counted from its start, or from the first sight of a file half written.
    """
    child = multiprocessing.get_context("fork").Process(
        target=_add_slowly, args=(folder, numbers, stores)
    )
    before = set(folder.rglob("*.part"))
    child.start()
    while in_a_write and child.is_alive() and not set(folder.rglob("*.part")) - before:
        time.sleep(0.001)
    time.sleep(seconds)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    writing = [part.name.split(".")[1] for part in set(folder.rglob("*.part")) - before]
    return child.exitcode == -signal.SIGKILL, writing


@needs_fork
@pytest.mark.slow
def test_a_writer_killed_at_twenty_moments_leaves_a_store_that_another_run_completes(
    stores, tmp_path
):
    whole = tmp_path / "whole"
    add(whole, VOLUMES, stores)
    rng = np.random.default_rng(0)
    folder, kills, inside = tmp_path / "killed0", 0, []
    while kills < 20 or (len(inside) < 10 and kills < 60):
        numbers = rng.permutation(len(VOLUMES)).tolist()
        in_a_write = kills % 4 != 0
        seconds = rng.choice([0.005, 0.05]) * rng.random() if in_a_write else rng.uniform(0.01, 0.2)
        killed, writing = _kill(folder, numbers, stores, seconds, in_a_write)
        kills += killed
        inside += writing[:killed]
        if (folder / layout.STORE).is_file():
            assert [s for s in verify(folder) if "not what" in s or "bytes, not" in s] == []
            for record in read_records(folder):
                array = codec.open_array(folder / layout.array_name(record.volume_id))
                np.testing.assert_array_equal(array[:], stores.slices(_number(record), SHAPE))
        if (folder / layout.INDEX).is_file():
            assert all(SliceStore(folder)[i][1]["sha256"] for i in range(len(SliceStore(folder))))
        if not killed or kills in (7, 14):  # on to a fresh store, so that early moments return
            add(folder, VOLUMES, stores)
            assert stores.contents(folder) == stores.contents(whole)
            folder = tmp_path / f"killed{kills}"
    add(folder, VOLUMES, stores)
    assert stores.contents(folder) == stores.contents(whole)
    assert list(folder.rglob("*.part")) == []
    assert verify(folder) == []
    assert len(inside) >= 10, inside
    assert {"b2nd", "json"} <= set(inside)


def _number(record):
    return int(record.source_key.removeprefix(f"{record.dataset}/case"))


@needs_fork
@pytest.mark.slow
def test_a_reader_finds_a_whole_index_while_an_index_is_replaced(stores, tmp_path):
    folder = tmp_path / "s"
    add(folder, VOLUMES, stores)
    rng = np.random.default_rng(1)
    known, inside = {len(SliceStore(folder))}, 0
    for number in range(100, 150):
        slices = stores.slices(number, (40, 8, 8))
        record = stores.record(f"Set0/case{number}", slices)
        StoreWriter(folder, stores.options).write_volume(record, slices)
        known.add(5 * len(VOLUMES) + 40 * (number - 99))
        _, writing = _kill(folder, [], stores, rng.uniform(0, 0.02), in_a_write=True)
        inside += bool(writing)
        reader = SliceStore(folder)
        assert len(reader) in known
        for index in rng.integers(0, len(reader), 10):
            image, row = reader[index]
            assert stores.record("a", image[None]).slices[0].sha256 == row["sha256"]
        if number >= 109 and inside >= 3:  # as a machine has it, the writer may be done before
            break
    assert inside >= 3


@needs_fork
@pytest.mark.slow
@pytest.mark.parametrize("attempt", range(3))
def test_two_processes_that_write_shards_at_once_equal_one_run(stores, tmp_path, attempt):
    add(tmp_path / "one", VOLUMES, stores)
    folder = tmp_path / "two"
    context = multiprocessing.get_context("fork")
    children = [
        context.Process(target=_add_slowly, args=(folder, VOLUMES[shard::2], stores))
        for shard in range(2)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0]
    assert stores.contents(folder) == stores.contents(tmp_path / "one")


@needs_fork
def test_processes_that_write_the_same_volumes_at_once_equal_one_run(stores, tmp_path):
    add(tmp_path / "one", VOLUMES, stores)
    folder = tmp_path / "two"
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=add, args=(folder, VOLUMES, stores)) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0, 0]
    assert stores.contents(folder) == stores.contents(tmp_path / "one")
