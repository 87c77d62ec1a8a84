"""Files are put in place whole or not at all, whatever fails or is killed."""

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from nnunetv2_meddinov3 import files
from nnunetv2_meddinov3.errors import UserError

posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX permissions and signals")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def write_half(path, error):
    with files.replacing(path) as part:
        part.write_text("half")
        raise error


def write_folder(path, name, error=None):
    with files.replacing(path) as part:
        (part / name).mkdir(parents=True)
        (part / name / "file").write_text(name)
        if error is not None:
            raise error


@pytest.fixture
def target(tmp_path):
    path = tmp_path / "out.txt"
    path.write_text("old")
    return path


def test_a_file_is_written_and_replaced(tmp_path):
    path = tmp_path / "out.bin"
    data = os.urandom(3 * files._BLOCK + 7)
    files.write_bytes(path, b"first")
    files.write_bytes(path, data)
    assert path.read_bytes() == data
    files.write_text(path, "Größe")
    assert path.read_bytes() == "Größe".encode()
    assert names(tmp_path) == ["out.bin"]


def test_a_failed_write_leaves_the_old_file_and_no_part(target):
    with pytest.raises(RuntimeError, match="half way"):
        write_half(target, RuntimeError("half way"))
    assert target.read_text() == "old"
    assert names(target.parent) == ["out.txt"]


def test_a_full_disk_is_told_in_a_sentence(target):
    with pytest.raises(UserError) as raised:
        write_half(target, OSError(28, "No space left on device"))
    assert str(raised.value).startswith(f"{target} must be writable, but: No space left on device;")
    assert target.read_text() == "old"
    assert names(target.parent) == ["out.txt"]


def test_the_errors_that_a_library_raises_where_it_cannot_write_are_told_too(target):
    class LibraryError(Exception):
        pass

    with (
        pytest.raises(UserError, match="but: torn"),
        files.replacing(target, failures=(LibraryError,)),
    ):
        raise LibraryError("torn\nat byte 3")
    with pytest.raises(LibraryError), files.replacing(target):
        raise LibraryError("torn")


def test_a_body_that_writes_nothing_leaves_the_old_file(target):
    with pytest.raises(UserError, match="No such file"), files.replacing(target):
        pass
    assert target.read_text() == "old"


def test_a_folder_that_is_missing_is_told(tmp_path):
    with pytest.raises(UserError, match=r"missing.out\.txt must be writable"):
        files.write_text(tmp_path / "missing" / "out.txt", "new")


@posix
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o755])
def test_the_permissions_of_the_old_file_are_kept(target, mode):
    target.chmod(mode)
    files.write_text(target, "new")
    assert target.stat().st_mode & 0o777 == mode


@posix
def test_a_new_file_gets_the_permissions_of_any_new_file(tmp_path):
    files.write_text(tmp_path / "ours", "")
    (tmp_path / "any").write_text("")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "any").stat().st_mode


@posix
@pytest.mark.parametrize("is_broken", [False, True])
def test_a_link_stays_a_link(tmp_path, is_broken):
    (tmp_path / "elsewhere").mkdir()
    real, link = tmp_path / "elsewhere" / "real.txt", tmp_path / "link.txt"
    link.symlink_to(real)
    if not is_broken:
        real.write_text("old")
    files.write_text(link, "new")
    assert link.is_symlink()
    assert real.read_text() == "new"
    assert names(tmp_path / "elsewhere") == ["real.txt"]


def test_a_folder_is_replaced_with_all_it_holds(tmp_path):
    folder = tmp_path / "out"
    write_folder(folder, "old")
    write_folder(folder, "new")
    assert names(folder) == ["new"]
    assert names(tmp_path) == ["out"]


def test_a_folder_that_fails_is_not_replaced(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "old").write_text("old")
    with pytest.raises(RuntimeError, match="half way"):
        write_folder(folder, "new", RuntimeError("half way"))
    assert names(folder) == ["old"]
    assert names(tmp_path) == ["out"]


def test_a_folder_whose_rename_fails_is_put_back(tmp_path, monkeypatch):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "old").write_text("old")
    rename = Path.replace

    def refuse_the_new_one(path, to):
        if (path / "new").exists():
            raise OSError(5, "Input/output error")
        return rename(path, to)

    monkeypatch.setattr(Path, "replace", refuse_the_new_one)
    with pytest.raises(UserError, match="Input/output error"):
        write_folder(folder, "new")
    assert names(folder) == ["old"]
    assert names(tmp_path) == ["out"]


def test_the_first_of_two_writers_wins_where_it_is_asked_to(tmp_path):
    path = tmp_path / "out"
    with files.replacing(path, keep_existing=True) as late:
        late.write_text("late")
        with files.replacing(path, keep_existing=True) as early:
            early.write_text("early")
    assert path.read_text() == "early"
    assert names(tmp_path) == ["out"]
    files.write_bytes(path, b"later still", keep_existing=True)
    assert path.read_text() == "early"


def test_the_last_of_two_writers_wins_otherwise(tmp_path):
    path = tmp_path / "out"
    with files.replacing(path) as late:
        late.write_text("late")
        with files.replacing(path) as early:
            early.write_text("early")
    assert path.read_text() == "late"


def test_keeping_works_without_hard_links(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    files.write_bytes(tmp_path / "out", b"new", keep_existing=True)
    assert (tmp_path / "out").read_bytes() == b"new"
    assert names(tmp_path) == ["out"]


def test_many_threads_write_one_file_whole(tmp_path):
    path = tmp_path / "out"
    contents = [bytes([number]) * 200_000 for number in range(8)]
    threads = [threading.Thread(target=files.write_bytes, args=(path, c)) for c in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_bytes() in contents
    assert names(tmp_path) == ["out"]


WRITER = """
import sys, time
from pathlib import Path
from nnunetv2_meddinov3 import files
with files.replacing(Path(sys.argv[1])) as part:
    part.write_text("half")
    print(part, flush=True)
    time.sleep(60)
"""


@posix
def test_a_writer_killed_half_way_leaves_the_old_file_and_a_part_that_is_swept(target):
    command = [sys.executable, "-c", WRITER, str(target)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        part = Path(writer.stdout.readline().strip())
        assert part.read_text() == "half"
        assert not files.is_leftover(part)  # it is still being written
        files.sweep_leftovers(target.parent)
        assert part.exists()
        os.kill(writer.pid, signal.SIGKILL)
    assert target.read_text() == "old"
    assert files.is_leftover(part)
    files.sweep_leftovers(target.parent)
    assert names(target.parent) == ["out.txt"]


def test_what_this_process_writes_is_not_swept(target):
    with files.replacing(target) as part:
        part.write_text("new")
        files.sweep_leftovers(target.parent)
    assert target.read_text() == "new"


def test_sweeping_leaves_the_part_files_of_others(tmp_path):
    download = tmp_path / "film.part"
    download.touch()
    files.sweep_leftovers(tmp_path)
    assert download.exists()


def test_a_part_of_another_machine_is_swept_after_a_day(tmp_path):
    part = tmp_path / "out.other-host-12-0.part"
    part.mkdir()
    (part / "file").touch()
    files.sweep_leftovers(tmp_path)
    assert part.exists()
    two_days_ago = time.time() - 2 * 24 * 3600
    os.utime(part, (two_days_ago, two_days_ago))
    files.sweep_leftovers(tmp_path)
    assert not part.exists()


class _Windows(SimpleNamespace):
    """The module ``os`` as Windows has it, where a folder cannot be opened."""

    name = "nt"

    def __getattr__(self, name):
        return getattr(os, name)

    def open(self, *_):
        raise PermissionError(13, "Permission denied")


def test_on_windows_a_folder_is_not_flushed(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "os", _Windows())
    files.write_text(tmp_path / "out", "new")
    assert (tmp_path / "out").read_text() == "new"


@posix
def test_elsewhere_the_file_and_its_folder_are_flushed(tmp_path, monkeypatch):
    flushed = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (flushed.append(os.fstat(fd).st_mode), real(fd)))
    files.write_text(tmp_path / "out", "new")
    kinds = [mode & 0o170000 for mode in flushed]
    assert kinds == [0o100000, 0o040000]  # a regular file first, then the folder


def test_a_copy_is_equal_and_an_absent_source_is_not_blamed_on_the_target(tmp_path):
    (tmp_path / "source").write_bytes(b"content")
    files.copy_file(tmp_path / "source", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"content"
    with pytest.raises(FileNotFoundError, match="absent"):
        files.copy_file(tmp_path / "absent", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"content"


@pytest.mark.parametrize("text", ["a\0b", "x" * 5000, "~no-such-user-at-all/x", "absent"])
def test_what_does_not_exist_is_none_whatever_was_typed(text):
    assert files.existing(text) is None


def test_a_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "file").touch()
    assert files.existing("~/file") == tmp_path / "file"


def test_a_folder_that_can_be_written_or_made_is_left_as_it_was(tmp_path):
    for folder in (tmp_path, tmp_path / "new", tmp_path / "new/below"):
        files.check_writable(folder)
    assert names(tmp_path) == []


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    for name in ("file", "file/below", "broken"):
        with pytest.raises(UserError, match="must be writable") as caught:
            files.check_writable(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_rows_are_read_as_written_and_a_torn_line_is_left_out(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert files.read_rows(path) == []
    rows = [{"a": 1, "text": "Größe\nzwei"}, {"b": [1.5, None]}]
    files.write_rows(path, rows)
    files.append_row(path, {"c": True})
    assert files.read_rows(path) == [*rows, {"c": True}]
    path.write_bytes(path.read_bytes()[:-6])
    assert files.read_rows(path) == rows


def test_a_row_appended_after_a_torn_line_is_kept(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"b": ')
    files.append_row(path, {"c": 3})
    assert files.read_rows(path) == [{"a": 1}, {"c": 3}]


def test_hashes_are_those_of_sha256(tmp_path):
    data = os.urandom(2 * files._BLOCK + 1)
    (tmp_path / "file").write_bytes(data)
    assert files.file_sha256(tmp_path / "file") == hashlib.sha256(data).hexdigest()
    assert files.sha256(data) == hashlib.sha256(data).hexdigest()
