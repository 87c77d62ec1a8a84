import json
import subprocess
import sys

import pytest

from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.store import layout
from nnunetv2_meddinov3.store.cli import main
from nnunetv2_meddinov3.store.reader import SliceStore


def test_verify_says_intact_and_ends_with_zero(store, capsys):
    assert main(["verify", str(store)]) == 0
    assert capsys.readouterr().out == f"{store}: intact\n"


def test_verify_names_the_damage_and_ends_with_one(store, capsys):
    path = sorted((store / layout.VOLUMES).iterdir())[0]
    path.write_bytes(path.read_bytes()[:-1])
    assert main(["verify", str(store)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert path.stem in lines[0]
    assert lines[1] == f"{store}: 1 problem(s) found"


def test_merge_makes_one_store(stores, tmp_path, capsys):
    parts = [str(stores.write(tmp_path / str(n), [stores.volume(n)])) for n in range(2)]
    assert main(["merge", *parts, "--into", str(tmp_path / "m")]) == 0
    assert len(SliceStore(tmp_path / "m")) == 8
    assert capsys.readouterr().out == f"{tmp_path / 'm'}: 8 slices of 2 store(s)\n"


def test_merge_keeps_the_key_where_it_is_asked_to(stores, store, tmp_path):
    assert main(["merge", str(store), "--into", str(tmp_path / "m"), "--with-key"]) == 0
    assert layout.read_key(tmp_path / "m") == layout.read_key(store)


def test_split_writes_the_rows_of_each_part(store, capsys):
    assert main(["split", str(store), "train=0.8", "val=0.2", "--seed", "4"]) == 0
    assert capsys.readouterr().out == "train: 16 slices\nval: 4 slices\n"
    values = json.loads((store / layout.SPLITS).read_bytes())
    assert values["seed"] == 4
    assert {name: len(rows) for name, rows in values["rows"].items()} == {"train": 16, "val": 4}


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (["train"], "must be NAME=FRACTION such as train=0.9, got 'train'"),
        (["train=most"], "got 'train=most'"),
        (["a=0.5", "a=0.5"], "must have different names"),
        (["a=0.5", "b=0.6"], "sum to 1, got a=0.5, b=0.6"),
    ],
)
def test_parts_that_cannot_be_are_a_sentence(store, parts, message):
    with pytest.raises(UserError, match=message):
        main(["split", str(store), *parts])


def test_export_writes_npy_files(store, tmp_path, capsys):
    assert main(["export", str(store), str(tmp_path / "npy")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'npy'}: 20 slices\n"
    assert len(list((tmp_path / "npy").glob("*.npy"))) == 20


@pytest.mark.parametrize("verb", [["verify"], ["split"], ["export"]])
def test_a_folder_without_a_store_is_a_sentence(tmp_path, verb):
    rest = {"verify": [], "split": ["a=1"], "export": [str(tmp_path / "npy")]}[verb[0]]
    with pytest.raises(UserError, match="must be a slice store"):
        main([*verb, str(tmp_path), *rest])


def test_help_is_quick_since_nothing_heavy_is_imported():
    code = (
        "import sys, nnunetv2_meddinov3.store.cli as c; c.build_parser();"
        "sys.exit(bool({'torch', 'blosc2', 'pyarrow', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
