"""Several `meddinov3 curate` on one store, in processes of their own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nnunetv2_meddinov3.curate.cli import main
from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.store import layout
from nnunetv2_meddinov3.store.index import read_records
from nnunetv2_meddinov3.store.verify import verify

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc"),
]


def start(source, store, *options):
    return subprocess.Popen(
        [sys.executable, "-m", "nnunetv2_meddinov3", "curate", source, "--store", store, *options],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def keys_of(store):
    return {record.source_key for record in read_records(store)}


@pytest.mark.parametrize("options", [[], ["--shard", "0/2"], ["--workers", "2"]])
def test_a_second_run_is_refused_and_what_a_killed_one_left_is_taken_over(
    tmp_path, source, options, capsys
):
    store = tmp_path / "store"
    first = start(source, store, *options)
    while not list(store.glob("lock*.json")) and first.poll() is None:
        time.sleep(0.005)
    first.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(UserError, match=f"but process {first.pid} on .* works on it"):
            main([str(source), "--store", str(store), *options])
    finally:
        first.kill()
        first.wait()
        first.stdout.close()
    assert main([str(source), "--store", str(store), *options]) == 0
    said = capsys.readouterr().err
    assert f"process {first.pid} on" in said
    assert "which held it, is gone" in said
    assert not list(store.glob("lock*"))
    assert verify(store) == []


def test_shards_that_make_one_store_at_once_share_it(tmp_path, source):
    store = tmp_path / "store"
    running = [start(source, store, "--shard", f"{i}/3") for i in range(3)]
    said = [process.communicate()[0] for process in running]
    assert {process.returncode for process in running} <= {0}, said
    assert keys_of(store) == {f"source/v{n}.nii.gz" for n in range(5)}
    assert verify(store) == []
    assert not list(store.glob("lock*"))
    assert layout.read_key(store) is not None
