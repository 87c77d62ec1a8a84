import numpy as np
import pytest

from nnunetv2_meddinov3.curate import ingest as module
from nnunetv2_meddinov3.curate.discover import find_sources
from nnunetv2_meddinov3.curate.ingest import Job, ingest
from nnunetv2_meddinov3.curate.leakage import build_guard
from nnunetv2_meddinov3.curate.slices import SliceRules
from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.store.index import read_records
from nnunetv2_meddinov3.store.writer import StoreWriter


@pytest.fixture
def job(tmp_path):
    return Job(StoreWriter(tmp_path / "store", SliceRules().options()))


@pytest.fixture
def volume(tmp_path, make_ct, write_image):
    """A source of four slices, the second of which is air."""
    array = make_ct(4, 24)
    array[1] = -1000
    path = write_image(tmp_path / "v.nii.gz", array)
    (found,), _ = find_sources([path])
    return found


def test_a_source_enters_once_and_is_present_afterwards(volume, job):
    first = ingest(volume, job)
    assert (first.state, first.slices, first.left_out) == ("entered", 3, {"constant": 1})
    assert first.n_bytes > 0
    (record,) = read_records(job.writer.folder)
    assert [each.z for each in record.slices] == [0, 2, 3]
    assert (record.source_key, record.modality, record.orientation) == ("v.nii.gz", "CT", "LPS")
    assert ingest(volume, job) == module.Outcome("v.nii.gz", "present")


def test_an_excluded_source_is_left_out_before_anything_is_written(tmp_path, volume, job):
    guard = build_guard([tmp_path / "v.nii.gz"])
    outcome = ingest(volume, Job(job.writer, guard=guard))
    assert outcome.state == "excluded"
    assert outcome.reason == "excluded: shares 3 slices with v.nii.gz"
    assert list(read_records(job.writer.folder)) == []


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError(), "needs more memory than is available"),
        (PermissionError(13, "Permission denied", "/secret"), "cannot be read (Permission denied)"),
        (ZeroDivisionError("by zero\nsecond line"), "cannot be read (ZeroDivisionError: by zero)"),
    ],
)
def test_whatever_a_reader_raises_skips_the_source_in_one_line(
    volume, job, monkeypatch, error, reason
):
    def read(source):
        raise error

    monkeypatch.setattr(module, "read", read)
    assert ingest(volume, job) == module.Outcome("v.nii.gz", "skipped", reason)


def test_a_store_that_cannot_be_written_stops_the_run(volume, job, monkeypatch):
    def write_volume(self, record, slices):
        assert slices.dtype == np.int16
        raise UserError("the store must be writable")

    monkeypatch.setattr(StoreWriter, "write_volume", write_volume)
    with pytest.raises(UserError, match="must be writable"):
        ingest(volume, job)
