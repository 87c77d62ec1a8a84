import os
import signal
import subprocess
import sys

import pytest

from nnunetv2_meddinov3.curate.cli import main
from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.progress import Progress
from nnunetv2_meddinov3.store.reader import SliceStore


@pytest.fixture
def source(tmp_path, make_ct, write_image):
    """A folder of two volumes of 8 slices, 2 mm apart."""
    for number in range(2):
        write_image(tmp_path / "source" / f"v{number}.nii.gz", make_ct(8, 24, seed=number))
    return tmp_path / "source"


def test_exit_code_0_if_every_source_entered(tmp_path, source, capsys):
    assert main([str(source), "--store", str(tmp_path / "s")]) == 0
    out = capsys.readouterr().out
    assert "2 volumes entered with 16 slices" in out
    assert f"Report: {tmp_path / 's' / 'report.html'}" in out
    assert main([str(source), "--store", str(tmp_path / "s")]) == 0
    assert "0 volumes entered with 0 slices" in capsys.readouterr().out


def test_exit_code_3_if_some_were_skipped(tmp_path, source, capsys):
    (source / "broken.nii.gz").write_bytes(b"")
    assert main([str(source), "--store", str(tmp_path / "s")]) == 3
    assert "  skipped source/broken.nii.gz: " in capsys.readouterr().out


def test_exit_code_2_if_none_entered(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "broken.nii.gz").write_bytes(b"")
    assert main([str(tmp_path / "a"), "--store", str(tmp_path / "s")]) == 2


def test_exit_code_143_after_sigterm(tmp_path, source, monkeypatch):
    advance = Progress.advance

    def interrupt(self, facts="", units=1):
        advance(self, facts, units)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Progress, "advance", interrupt)
    assert main([str(source), "--store", str(tmp_path / "s")]) == 128 + signal.SIGTERM
    assert len(SliceStore(tmp_path / "s")) == 8


def test_every_option_arrives(tmp_path, source, write_image, make_ct):
    write_image(tmp_path / "tests" / "t.nii.gz", make_ct(8, 24, seed=0))
    options = "--pixel-spacing 0.45 --size 32 --min-gap-mm 4 --keep-flagged --shard 0/1"
    arguments = [str(source), "--store", str(tmp_path / "s"), *options.split()]
    assert main([*arguments, "--exclude", str(tmp_path / "tests")]) == 0
    store = SliceStore(tmp_path / "s")
    assert store.options == {
        "pixel_spacing_mm": 0.45,
        "size": 32,
        "min_gap_mm": 4.0,
        "keep_flagged": True,
    }
    assert [store[i][1]["z"] for i in range(len(store))] == [0, 2, 4, 6]
    assert store[0][0].shape == (32, 32)
    assert set(store.rows["source_key"].to_pylist()) == {"source/v1.nii.gz"}


def test_benchmarks_are_refused_unless_excluded_or_allowed(tmp_path, source):
    benchmark = source.rename(tmp_path / "Dataset001_AMOS22")
    arguments = [str(benchmark), "--store", str(tmp_path / "s")]
    with pytest.raises(UserError, match="AMOS22 must not enter"):
        main(arguments)
    assert not (tmp_path / "s").exists()
    assert main([*arguments, "--benchmark-names", "BTCV"]) == 0
    assert main([*arguments, "--allow-benchmarks"]) == 0


@pytest.mark.parametrize("shard", ["1", "a/b", "-1/2", "1/2/3"])
def test_a_shard_that_is_none_is_refused(tmp_path, source, shard):
    with pytest.raises(UserError, match="--shard must be i/n"):
        main([str(source), "--store", str(tmp_path / "s"), f"--shard={shard}"])


@pytest.mark.slow
def test_as_a_process_it_reports_lines_and_mistakes_on_stderr(tmp_path, source):
    (source / "broken.nii.gz").write_bytes(b"")
    module = "import sys; from nnunetv2_meddinov3.curate.cli import main"
    command = [sys.executable, "-c", f"{module}; sys.exit(main())"]
    done = subprocess.run(
        [*command, str(source), "--store", str(tmp_path / "s")], capture_output=True, text=True
    )
    assert done.returncode == 3, done.stderr
    assert "2/2 volumes, 16 slices, " in done.stderr
    assert "2 volumes entered with 16 slices" in done.stdout
    wrong = subprocess.run(
        [*command, str(tmp_path / "nothing"), "--store", str(tmp_path / "s")],
        capture_output=True,
        text=True,
    )
    assert wrong.returncode == 1
    assert "does not exist" in wrong.stderr
    assert "Traceback" not in wrong.stderr


def test_on_a_terminal_a_bar_shows_the_rate(tmp_path, source):
    class Terminal:
        def __init__(self):
            self.text = ""

        def write(self, text):
            self.text += text

        def flush(self):
            pass

        def isatty(self):
            return True

    from nnunetv2_meddinov3.curate.pipeline import curate

    terminal = Terminal()
    curate([source], tmp_path / "s", progress=terminal)
    assert "2/2" in terminal.text
    assert "slices/s, 0 skipped" in terminal.text
