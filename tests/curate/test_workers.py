"""Three ways to run many sources; Dask runs on a real cluster of two worker processes."""

import logging
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from nnunetv2_meddinov3.curate.discover import find_sources
from nnunetv2_meddinov3.curate.ingest import Job
from nnunetv2_meddinov3.curate.pipeline import curate
from nnunetv2_meddinov3.curate.slices import SliceRules
from nnunetv2_meddinov3.curate.workers import run_in_processes, run_on_dask
from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.signals import Stop
from nnunetv2_meddinov3.store.index import build_index, read_skips
from nnunetv2_meddinov3.store.reader import SliceStore
from nnunetv2_meddinov3.store.verify import verify
from nnunetv2_meddinov3.store.writer import StoreWriter


def contents(store):
    """Name -> bytes of everything but the report and the manifest."""
    names = [p for p in store.rglob("*") if p.is_file() and p.suffix in (".b2nd", ".parquet")]
    return {path.relative_to(store).as_posix(): path.read_bytes() for path in names}


@pytest.mark.slow
def test_two_worker_processes_equal_one(tmp_path, source):
    curate([source], tmp_path / "one")
    assert curate([source], tmp_path / "two", workers=2).entered == 5
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


# A guard for slices of 25 rows, which no other volume has: the processes import it by name.
KILLING = """
import os
import signal
import time
from pathlib import Path

from nnunetv2_meddinov3.curate.leakage import Guard

HERE = Path(__file__).parent

class KillingGuard(Guard):
    "Ends the process that reads such a slice."
    def inspect(self, stack, volume=None):
        if stack.array.shape[1] == 25:
            os._exit(1)
        return None, []

class WaitingGuard(Guard):
    "Says the first time who reads such a slice, and waits to be killed."
    def inspect(self, stack, volume=None):
        if stack.array.shape[1] == 25 and not (HERE / "reader").exists():
            (HERE / "reader.part").write_text(str(os.getpid()))
            (HERE / "reader.part").rename(HERE / "reader")
            time.sleep(600)
        return None, []
"""


@pytest.fixture
def guards(tmp_path, source, make_ct, write_image, monkeypatch):
    """The guards of KILLING; a sixth volume of the source is theirs."""
    write_image(source / "v1b.nii.gz", make_ct(4, 25))
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "killing.py").write_text(KILLING)
    monkeypatch.syspath_prepend(folder)
    paths = [str(folder), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    monkeypatch.delitem(sys.modules, "killing", raising=False)
    import killing

    yield killing
    sys.modules.pop("killing", None)


def job_of(folder, guard):
    return Job(StoreWriter(folder, SliceRules().options()), guard=guard)


@pytest.mark.slow
def test_a_source_that_ends_its_process_is_skipped_and_the_others_enter(tmp_path, source, guards):
    job = job_of(tmp_path / "store", guards.KillingGuard())
    sources, _ = find_sources([source])
    outcomes = list(run_in_processes(sources, job, 2, Stop()))
    assert sorted(outcome.key for outcome in outcomes) == [each.key for each in sources]
    skipped = {outcome.key: outcome.reason for outcome in outcomes if outcome.state == "skipped"}
    assert list(skipped) == ["source/v1b.nii.gz"]
    assert "ended the process that read it" in skipped["source/v1b.nii.gz"]


@pytest.mark.slow
def test_the_environment_is_as_before_while_a_pool_works(tmp_path, source):
    before = dict(os.environ)
    sources, _ = find_sources([source])
    job = Job(StoreWriter(tmp_path / "store", SliceRules().options()))
    during = [dict(os.environ) for _ in run_in_processes(sources, job, 2, Stop())]
    assert during == [before] * 5


@pytest.fixture(scope="module")
def dask():
    """Dask, giving up soon on schedulers and on tasks whose workers die."""
    distributed = pytest.importorskip("distributed", reason="needs dask[distributed]")
    import dask

    options = {
        "distributed.comm.timeouts.connect": "2s",
        "distributed.scheduler.allowed-failures": 1,
        "distributed.scheduler.worker-ttl": "20s",
    }
    with dask.config.set(options):
        yield distributed


@pytest.fixture
def cluster(dask, guards):
    """A cluster of two worker processes on the loopback interface."""
    with dask.LocalCluster(
        n_workers=2,
        threads_per_worker=1,
        processes=True,
        host="127.0.0.1",
        dashboard_address="127.0.0.1:0",
        memory_limit=0,
        silence_logs=logging.CRITICAL,
    ) as cluster:
        yield cluster


@pytest.mark.slow
def test_two_dask_workers_equal_one_process(tmp_path, source, cluster):
    curate([source], tmp_path / "one")
    address = cluster.scheduler_address
    summary = curate([source], tmp_path / "two", dask_scheduler=address)
    assert (summary.entered, summary.exit_code) == (6, 0)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert curate([source], tmp_path / "two", dask_scheduler=address).present == 6


@pytest.mark.slow
def test_a_source_that_cannot_be_read_is_skipped_on_dask_too(tmp_path, source, cluster):
    (source / "broken.nii.gz").write_bytes(b"no image")
    address = cluster.scheduler_address
    summary = curate([source], tmp_path / "store", dask_scheduler=address)
    assert (summary.entered, summary.exit_code) == (6, 3)
    assert read_skips(tmp_path / "store") == summary.skipped
    assert [key for key, _ in summary.skipped] == ["source/broken.nii.gz"]


def wait_for(path, seconds=60.0):
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"no {path.name} after {seconds} s"
        time.sleep(0.05)
    return path.read_text()


@pytest.mark.slow
def test_the_source_of_a_killed_dask_worker_enters_on_another(tmp_path, source, cluster, guards):
    job = job_of(tmp_path / "store", guards.WaitingGuard())
    sources, _ = find_sources([source])
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(
            lambda: list(run_on_dask(sources, job, cluster.scheduler_address, Stop()))
        )
        victim = int(wait_for(tmp_path / "modules" / "reader"))
        assert victim != os.getpid()
        os.kill(victim, signal.SIGKILL)
        outcomes = run.result(timeout=120)
    assert sorted(outcome.key for outcome in outcomes) == [each.key for each in sources]
    # an outcome that was lost with its worker is found to be present when it is asked for again
    assert {outcome.state for outcome in outcomes} <= {"entered", "present"}
    build_index(tmp_path / "store")
    assert verify(tmp_path / "store") == []
    assert len(SliceStore(tmp_path / "store")) == 24


@pytest.mark.slow
def test_a_source_that_kills_its_dask_workers_is_skipped_and_the_rest_enters(
    tmp_path, source, cluster, guards
):
    job = job_of(tmp_path / "store", guards.KillingGuard())
    sources, _ = find_sources([source])
    outcomes = list(run_on_dask(sources, job, cluster.scheduler_address, Stop()))
    skipped = {outcome.key: outcome.reason for outcome in outcomes if outcome.state == "skipped"}
    assert list(skipped) == ["source/v1b.nii.gz"]
    assert "ended the Dask workers that read it" in skipped["source/v1b.nii.gz"]
    assert sorted(outcome.key for outcome in outcomes) == [each.key for each in sources]
    build_index(tmp_path / "store")
    assert verify(tmp_path / "store") == []
    assert len(SliceStore(tmp_path / "store")) == 20


@pytest.mark.slow
def test_a_signal_stops_a_run_on_dask_and_the_next_run_continues(tmp_path, source, cluster):
    stop = Stop()
    sources, _ = find_sources([source])
    job = Job(StoreWriter(tmp_path / "store", SliceRules().options()))
    for _ in run_on_dask(sources, job, cluster.scheduler_address, stop):
        stop.number = signal.SIGTERM
    summary = curate([source], tmp_path / "store")
    assert summary.entered + summary.present == 6
    assert summary.present >= 1
    assert verify(tmp_path / "store") == []


@pytest.mark.slow
def test_a_scheduler_that_does_not_answer_is_named(tmp_path, source, dask):
    with pytest.raises(UserError, match=r"but tcp://127\.0\.0\.1:1 does not answer \("):
        curate([source], tmp_path / "store", dask_scheduler="tcp://127.0.0.1:1")


def test_dask_is_needed_only_for_its_option(tmp_path, source, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(UserError, match="needs the package distributed"):
        curate([source], tmp_path / "store", dask_scheduler="tcp://host:8786")
