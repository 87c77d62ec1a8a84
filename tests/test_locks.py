"""A folder is used by one process at a time, whatever ends the one before."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nnunetv2_meddinov3 import locks
from nnunetv2_meddinov3.errors import UserError

ROOT = Path(__file__).parents[1]
posix = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc")
HOLDING = """
import sys, time
from pathlib import Path
from nnunetv2_meddinov3.locks import locked
from nnunetv2_meddinov3.signals import Stop
with Stop() as stop, locked(Path(sys.argv[1]), print):
    print("held", flush=True)
    while stop.number is None:
        time.sleep(0.01)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the folder ``run``."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDING, str(tmp_path / "run")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def take(folder):
    said = []
    with locks.locked(folder, said.append):
        assert json.loads((folder / locks.LOCK).read_text())["pid"] == os.getpid()
    return said


def left_by(folder, age=0.0, **changes):
    """Write the lock of a process that is not there."""
    with locks.locked(folder, print):
        lock = json.loads((folder / locks.LOCK).read_text())
    path = folder / locks.LOCK
    path.write_text(json.dumps({**lock, **changes}))
    os.utime(path, (time.time() - age,) * 2)


def test_a_lock_is_released_at_the_end_and_after_an_error_and_nothing_is_left(tmp_path):
    assert take(tmp_path / "a/run") == []
    with pytest.raises(RuntimeError), locks.locked(tmp_path / "a/run", print):
        raise RuntimeError
    assert take(tmp_path / "a/run") == []
    assert list((tmp_path / "a/run").iterdir()) == []


def test_a_second_one_is_refused_also_in_this_process(tmp_path):
    with locks.locked(tmp_path, print):
        with pytest.raises(UserError, match=f"process {os.getpid()} on .*since 20"):
            take(tmp_path)
        assert (tmp_path / locks.LOCK).is_file()


def test_a_second_process_is_told_who_holds_it_and_may_have_it_after_a_signal(holder, tmp_path):
    with pytest.raises(UserError, match=f"process {holder.pid} on .* \\(since 20") as caught:
        take(tmp_path / "run")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="one process at a time"):
        locks.refuse_locked(tmp_path / "run")
    holder.send_signal(signal.SIGTERM)
    holder.wait(10)
    locks.refuse_locked(tmp_path / "run")
    assert take(tmp_path / "run") == []


@posix
def test_what_a_killed_process_left_is_taken_over_though_its_parent_has_not_noticed(
    holder, tmp_path
):
    holder.kill()
    deadline = time.time() + 10
    while locks._start_of(holder.pid) and time.time() < deadline:
        time.sleep(0.01)
    (line,) = take(tmp_path / "run")
    assert line.startswith("took over")
    assert f"process {holder.pid} on" in line


@posix
def test_another_process_that_got_its_number_does_not_keep_a_lock(tmp_path):
    left_by(tmp_path, started="1")
    assert len(take(tmp_path)) == 1


@pytest.mark.parametrize("torn", [False, True])
def test_a_lock_of_another_machine_is_nobodys_once_it_is_not_touched(tmp_path, torn):
    left_by(tmp_path, age=locks.LOST_AFTER_S - 30, machine="other", host="elsewhere")
    path = tmp_path / locks.LOCK
    if torn:
        path.write_text('{"pid"')
    with pytest.raises(UserError, match="an unknown machine" if torn else "on elsewhere"):
        take(tmp_path)
    os.utime(path, (time.time() - locks.LOST_AFTER_S - 30,) * 2)
    assert len(take(tmp_path)) == 1


def test_a_held_lock_is_touched_but_not_one_that_another_took(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "_REFRESH_S", 0.01)
    path = tmp_path / locks.LOCK
    with locks.locked(tmp_path, print):
        os.utime(path, (0, 0))
        deadline = time.time() + 10
        while path.stat().st_mtime == 0 and time.time() < deadline:
            time.sleep(0.01)
        assert path.stat().st_mtime > 0
        path.write_text("{}")
    assert path.read_text() == "{}"


def test_a_lock_that_changed_meanwhile_is_not_discarded(tmp_path):
    path = tmp_path / locks.LOCK
    path.write_text("of a third")
    assert not locks._discard(path, b"judged stale")
    assert path.read_text() == "of a third"
    assert [p.name for p in tmp_path.iterdir()] == [locks.LOCK]


def test_locks_work_without_hard_links(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    with locks.locked(tmp_path, print), pytest.raises(UserError, match="one process at a time"):
        take(tmp_path)
    assert take(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="must be writable"):
        take(tmp_path / "file/run")
