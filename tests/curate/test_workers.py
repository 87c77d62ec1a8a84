import sys
import types

import pytest

from nnunetv2_meddinov3.curate.discover import find_sources
from nnunetv2_meddinov3.curate.ingest import Job
from nnunetv2_meddinov3.curate.pipeline import curate
from nnunetv2_meddinov3.curate.pool import run_in_processes
from nnunetv2_meddinov3.curate.slices import SliceRules
from nnunetv2_meddinov3.errors import UserError
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


KILLING = """
import os
from nnunetv2_meddinov3.curate.leakage import Guard

class KillingGuard(Guard):
    def inspect(self, stack):
        if stack.array.shape[1] == 25:
            os._exit(1)
        return None, []
"""


@pytest.mark.slow
def test_a_source_that_ends_its_process_is_skipped_and_the_others_enter(
    tmp_path, source, make_ct, write_image, monkeypatch
):
    write_image(source / "v1b.nii.gz", make_ct(4, 25))
    (tmp_path / "killing.py").write_text(KILLING)
    monkeypatch.syspath_prepend(tmp_path)
    import killing

    writer = StoreWriter(tmp_path / "store", SliceRules().options())
    job = Job(writer, guard=killing.KillingGuard())
    sources, _ = find_sources([source])
    outcomes = list(run_in_processes(sources, job, 2, lambda: False))
    assert sorted(outcome.key for outcome in outcomes) == [each.key for each in sources]
    skipped = {outcome.key: outcome.reason for outcome in outcomes if outcome.state == "skipped"}
    assert list(skipped) == ["source/v1b.nii.gz"]
    assert "ended the process that read it" in skipped["source/v1b.nii.gz"]


class FakeClient:
    """Stands for a Dask client; runs at once in this process."""

    loop = None

    def __init__(self, address, **_):
        if address == "tcp://nowhere:1":
            raise OSError("timed out")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def scatter(self, job, **_):
        return job

    def submit(self, function, *arguments, **_):
        try:
            result, error = function(*arguments), None
        except Exception as raised:
            result, error = None, raised
        return types.SimpleNamespace(
            key=arguments[0].key, result=lambda: result, exception=lambda: error, done=lambda: True
        )


@pytest.mark.slow
def test_a_dask_cluster_gets_the_sources(tmp_path, source, monkeypatch):
    class Hashable(types.SimpleNamespace):
        __hash__ = object.__hash__

    monkeypatch.setattr(types, "SimpleNamespace", Hashable)
    fake = types.ModuleType("distributed")
    fake.Client = FakeClient
    fake.as_completed = lambda futures, loop: iter(futures)
    monkeypatch.setitem(sys.modules, "distributed", fake)
    curate([source], tmp_path / "one")
    assert curate([source], tmp_path / "two", dask_scheduler="tcp://host:8786").entered == 5
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    with pytest.raises(UserError, match="tcp://nowhere:1 does not answer"):
        curate([source], tmp_path / "three", dask_scheduler="tcp://nowhere:1")


def test_dask_is_needed_only_for_its_option(tmp_path, source, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(UserError, match="needs the package distributed"):
        curate([source], tmp_path / "store", dask_scheduler="tcp://host:8786")
