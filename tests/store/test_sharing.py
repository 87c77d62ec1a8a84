"""Who may write to a store at once, and what a killed writer leaves."""

import json
import os
import re
import secrets
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nnunetv2_meddinov3 import locks
from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.store import layout
from nnunetv2_meddinov3.store.index import build_index
from nnunetv2_meddinov3.store.manage import export_npy, merge, split_by_patient
from nnunetv2_meddinov3.store.reader import SliceStore
from nnunetv2_meddinov3.store.sharing import (
    check_target,
    one_at_a_time,
    refuse_written,
    writing,
)
from nnunetv2_meddinov3.store.verify import verify
from nnunetv2_meddinov3.store.writer import StoreWriter

ROOT = Path(__file__).parents[2]


def enter(folder, shard):
    said = []
    with writing(folder, said.append, shard):
        return said


def locks_in(folder):
    return sorted(path.name for path in folder.glob("lock*"))


@pytest.mark.parametrize("first", [(0, 1), (0, 4), (2, 3)])
def test_the_same_part_of_the_work_is_done_by_one_process(tmp_path, first):
    with writing(tmp_path / "s", print, first):
        with pytest.raises(UserError, match=f"one I/N, but process {os.getpid()} on .* \\(since"):
            enter(tmp_path / "s", first)
        with pytest.raises(UserError, match="by different shards of one I/N"):
            check_target(tmp_path / "s", first)
    assert enter(tmp_path / "s", first) == []
    assert list((tmp_path / "s").iterdir()) == []


@pytest.mark.parametrize(("first", "second"), [((0, 2), (1, 2)), ((3, 16), (15, 16))])
def test_different_shards_of_one_division_write_at_once(tmp_path, first, second):
    with writing(tmp_path, print, first):
        check_target(tmp_path, second)
        assert enter(tmp_path, second) == []


@pytest.mark.parametrize(
    ("first", "second"), [((0, 1), (0, 4)), ((1, 4), (0, 1)), ((1, 4), (0, 3)), ((0, 2), (1, 4))]
)
def test_divisions_that_overlap_do_not_write_at_once(tmp_path, first, second):
    with writing(tmp_path, print, first):
        for ask in (enter, check_target):
            with pytest.raises(UserError, match="must be written by one process at a time"):
                ask(tmp_path, second)
        assert len(locks_in(tmp_path)) == 1


def left_by_killed_writers(folder, shards):
    """Leave the locks of a process of this machine that has ended."""
    left = {}
    for shard in shards:
        with writing(folder, print, shard):
            (path,) = folder.glob("lock*.json")
            left[path] = json.dumps({**json.loads(path.read_bytes()), "started": "1"})
    for path, lock in left.items():
        path.write_text(lock)
    return [path.name for path in left]


posix = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc")


@posix
def test_what_killed_writers_left_blocks_nobody_and_is_swept(stores, store):
    left = left_by_killed_writers(store, [(0, 1), (1, 4), (2, 3)])
    assert left == ["lock.json", "lock-1-of-4.json", "lock-2-of-3.json"]
    assert sum("left by a writer that was killed" in each for each in verify(store)) == 3
    refuse_written(store)
    (line,) = enter(store, (0, 1))
    assert line.startswith("took over")
    assert locks_in(store) == []
    assert verify(store) == []


@posix
def test_a_process_killed_in_its_turn_gives_the_turn_away(stores, store):
    with one_at_a_time(store):
        (path,) = store.glob("lock*.json")
        lock = json.loads(path.read_bytes())
    path.write_text(json.dumps({**lock, "pid": 1 << 22}))
    build_index(store)
    assert locks_in(store) == []


def test_turns_are_taken_one_after_the_other(store):
    inside, most = [], []

    def turn(_):
        with one_at_a_time(store):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.02)
            inside.pop()

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(turn, range(6)))
    assert most == [1] * 6


def test_without_hard_links_all_writers_that_make_one_store_share_its_key(
    stores, tmp_path, monkeypatch
):
    def no_links(path, target):
        raise PermissionError(1, "Operation not permitted")

    def slowly(number, drawn=secrets.token_bytes):
        time.sleep(0.05)  # so that all have seen that there is no key yet
        return drawn(number)

    monkeypatch.setattr(Path, "hardlink_to", no_links)
    monkeypatch.setattr(layout.secrets, "token_bytes", slowly)
    with ThreadPoolExecutor(6) as pool:
        made = [
            pool.submit(lambda: StoreWriter(tmp_path / "s", stores.options).key()) for _ in range(6)
        ]
        keys = {each.result() for each in made}
    assert keys == {layout.read_key(tmp_path / "s")}


def test_a_store_being_written_is_exported_and_split_but_not_verified_or_merged(
    stores, store, tmp_path
):
    expected = len(SliceStore(store))
    with writing(store, print, (1, 4)):
        assert export_npy(store, tmp_path / "out") == expected
        split_by_patient(store, {"a": 0.5, "b": 0.5})
        for task in (lambda: verify(store), lambda: merge([store], tmp_path / "merged")):
            with pytest.raises(UserError, match="must not be written meanwhile, but process"):
                task()
    assert not (tmp_path / "merged").exists()
    other = stores.write(tmp_path / "other", [stores.volume(9)])
    with writing(other, print), pytest.raises(UserError, match="written by one process at a time"):
        merge([store], other)
    merge([store], other)
    assert verify(other) == []


def test_a_lock_of_another_machine_in_a_folder_that_can_only_be_read_ages_too(store, monkeypatch):
    with writing(store, print):
        lock = json.loads((store / locks.LOCK).read_bytes())
    path = store / locks.LOCK
    path.write_text(json.dumps({**lock, "machine": "other"}))

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "touch", refuse)
    with pytest.raises(UserError, match="must not be written meanwhile"):
        refuse_written(store)
    os.utime(path, (time.time() - locks.LOST_AFTER_S - 30,) * 2)
    refuse_written(store)


@pytest.mark.parametrize(
    "words",
    [
        ["curate", "SOURCE", "--store", "TARGET"],
        ["store", "merge", "STORE", "--into", "TARGET"],
        ["store", "export", "STORE", "TARGET"],
    ],
)
@pytest.mark.parametrize("target", ["below a file", "in use", "of another kind"])
def test_a_target_that_cannot_be_written_is_one_sentence_before_heavy_imports(
    store, tmp_path, words, target
):
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("x")
    where = {"below a file": "file/s", "in use": "used", "of another kind": "full"}[target]
    if target == "in use" and "export" in words:
        pytest.skip("an export has no lock")
    named = {"SOURCE": tmp_path, "STORE": store, "TARGET": tmp_path / where}
    command = [str(named.get(word, word)) for word in words]
    code = (
        "import sys\nfrom nnunetv2_meddinov3.cli import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "except Exception as error:\n    print(type(error).__name__, error)\n"
        "heavy = {'SimpleITK', 'numpy', 'matplotlib', 'pyarrow', 'scipy'} & set(sys.modules)\n"
        "print('heavy:', sorted(heavy))"
    )
    with writing(tmp_path / "used", print):
        done = subprocess.run(
            [sys.executable, "-c", code, *command],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
    *_, sentence, heavy = done.stdout.splitlines()
    assert re.match(r"UserError .*(must be|must not)", sentence), done.stdout + done.stderr
    assert str(tmp_path / where.split("/")[0]) in sentence
    if "export" not in words or target == "below a file":
        assert heavy == "heavy: []"
