import json
import warnings

import numpy as np
import pytest

from nnunetv2_meddinov3.features.npz import Damaged, read_npz, write_npz

ARRAYS = {"a": np.arange(6.0).reshape(2, 3), "b": np.array([1, 2], np.int8)}


@pytest.mark.parametrize("compressed", [False, True])
def test_what_was_written_is_read(tmp_path, compressed):
    write_npz(tmp_path / "x.npz", {"n": 1, "text": "ä"}, ARRAYS, compressed)
    facts, arrays = read_npz(tmp_path / "x.npz", ["a"])
    assert facts == {"n": 1, "text": "ä"}
    assert list(arrays) == ["a"]
    np.testing.assert_array_equal(arrays["a"], ARRAYS["a"])
    assert [path.name for path in tmp_path.iterdir()] == ["x.npz"]


class Evil:
    def __reduce__(self):
        return (print, ("ran",))


def damaged(kind, path):
    """Write a file that cannot be read, of some kind."""
    write_npz(path, {"n": 1}, ARRAYS, compressed=True)
    whole = path.read_bytes()
    if kind == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("no archive")
    elif kind == "flipped":
        middle = whole.index(b"a.npy") + 60
        path.write_bytes(whole[:middle] + bytes(b ^ 255 for b in whole[middle:middle + 40])
                         + whole[middle + 40 :])  # fmt: skip
    elif kind == "pickle":
        np.savez(path, a=np.array([Evil()], object), facts=np.array("{}"))
    elif kind == "pickled facts":
        np.savez(path, a=np.zeros(1), facts=np.array([Evil()], object))
    elif kind == "bare array":
        with path.open("wb") as file:
            np.save(file, np.zeros(3))
    elif kind == "list":
        np.savez(path, a=np.zeros(1), facts=np.array(json.dumps([1])))
    elif kind == "no JSON":
        np.savez(path, a=np.zeros(1), facts=np.array("{"))
    elif kind == "no facts":
        np.savez(path, a=np.zeros(1))
    elif kind == "no array":
        np.savez(path, facts=np.array("{}"))
    elif kind == "missing":
        path.unlink()
    elif kind == "folder":
        path.unlink()
        path.mkdir()


@pytest.mark.parametrize(
    "kind",
    ["cut", "empty", "text", "flipped", "pickle", "pickled facts", "bare array", "list", "no JSON",
     "no facts", "no array", "missing", "folder"],
)  # fmt: skip
def test_what_is_damaged_or_hostile_is_refused_and_nothing_runs(tmp_path, capsys, kind):
    path = tmp_path / "x.npz"
    damaged(kind, path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of files left open too
        with pytest.raises(Damaged) as error:
            read_npz(path, ["a"])
    assert "\n" not in str(error.value)
    assert capsys.readouterr().out == ""
