import multiprocessing
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from nnunetv2_meddinov3 import files
from nnunetv2_meddinov3.store import codec, layout
from nnunetv2_meddinov3.store.index import build_index
from nnunetv2_meddinov3.store.verify import verify
from nnunetv2_meddinov3.store.writer import StoreWriter

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def _ended_process():
    child = multiprocessing.get_context("fork").Process(target=int)
    child.start()
    child.join()
    return child.pid


@needs_fork
def test_only_the_leftovers_of_processes_that_ended_are_swept(stores, store):
    def part(host, pid, age_s=0):
        path = store / layout.VOLUMES / f"a.b2nd.{host}-{pid}-0.part"
        path.write_bytes(b"half")
        os.utime(path, (time.time() - age_s,) * 2)
        return path

    gone = [part(files._HOST, _ended_process()), part("elsewhere", 1, 25 * 3600)]
    gone += [part(files._HOST, os.getpid())]  # of an earlier process with our number
    kept = [part(files._HOST, os.getppid()), part("elsewhere", 2, 3600)]
    StoreWriter(store, stores.options)
    assert [path.exists() for path in gone] == [False, False, False]
    assert [path.exists() for path in kept] == [True, True]


def test_the_file_being_written_is_not_swept(stores, store, monkeypatch):
    sync, seen = os.fsync, []

    def sweeping(descriptor):
        StoreWriter(store, stores.options)
        seen.extend(store.rglob("*.part"))
        sync(descriptor)

    monkeypatch.setattr(files.os, "fsync", sweeping)
    StoreWriter(store, stores.options).write_volume(*stores.volume(8))
    assert len(seen) == 2
    build_index(store)
    assert verify(store) == []


def test_without_hard_links_a_store_can_be_made_all_the_same(stores, tmp_path, monkeypatch):
    def no_links(path, target):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", no_links)
    StoreWriter(tmp_path / "s", stores.options)
    assert layout.read_options(tmp_path / "s") == stores.options
    assert list((tmp_path / "s").rglob("*.part")) == []


def test_the_first_of_two_makers_of_a_store_decides_its_options(stores, tmp_path):
    path = tmp_path / layout.STORE
    linked = Path.hardlink_to

    def late(path, target):
        path.write_bytes(b"first")
        linked(path, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "hardlink_to", late)
        files.write_bytes(path, b"second", keep_existing=True)
    assert path.read_bytes() == b"first"
    assert [p.name for p in tmp_path.iterdir()] == [layout.STORE]


def test_each_slice_is_one_chunk_and_one_block(stores, store):
    array = codec.open_array(next((store / layout.VOLUMES).iterdir()))
    assert (array.shape, array.chunks, array.blocks) == ((4, 24, 20), (1, 24, 20), (1, 24, 20))
    assert array.dtype == np.int16


def test_a_sealed_file_shows_every_changed_byte():
    data = layout.sealed({"b": [1, None], "a": "é"}, "x_sha256")
    assert layout.unsealed(data, "x_sha256") == {"a": "é", "b": [1, None]}
    for place in range(len(data)):
        changed = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
        with pytest.raises(layout.Damaged):
            layout.unsealed(changed, "x_sha256")
    for cut in (b"", data[:-1], data + b"\n"):
        with pytest.raises(layout.Damaged):
            layout.unsealed(cut, "x_sha256")


def test_numbers_that_are_none_are_not_sealed():
    with pytest.raises(ValueError, match="JSON compliant"):
        layout.sealed({"a": float("nan")}, "x_sha256")


def test_all_writers_that_make_one_store_at_once_share_its_key(stores, tmp_path):
    with ThreadPoolExecutor(8) as pool:
        made = [pool.submit(StoreWriter, tmp_path / "s", stores.options) for _ in range(16)]
        keys = {each.result().key() for each in made}
    assert len(keys) == 1
    assert keys == {layout.read_key(tmp_path / "s")}


def test_a_writer_killed_before_its_store_was_made_leaves_a_key_that_is_used(stores, tmp_path):
    (tmp_path / "s").mkdir()
    layout.write_key(tmp_path / "s")
    before = (tmp_path / "s" / layout.KEY).read_bytes()
    assert StoreWriter(tmp_path / "s", stores.options).key() is not None
    assert (tmp_path / "s" / layout.KEY).read_bytes() == before
