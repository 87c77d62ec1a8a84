"""A bar on a terminal, lines elsewhere."""

import io
import os
import re
import subprocess
import sys

import pytest

from nnunetv2_meddinov3.progress import Progress


def test_elsewhere_than_on_a_terminal_a_line_comes_every_n_units_and_at_the_end():
    stream = io.StringIO()
    with Progress(7, "volumes", every=3, title="curate", stream=stream) as progress:
        for _ in range(7):
            progress.advance("2 left out")
    lines = stream.getvalue().splitlines()
    assert [line.split(",")[0] for line in lines] == [
        "curate: 3/7 volumes",
        "curate: 6/7 volumes",
        "curate: 7/7 volumes",
    ]
    assert all(re.fullmatch(r"curate: ./7 volumes, 2 left out, 0:00:00 left", x) for x in lines)


def test_many_units_at_once_are_not_missed():
    stream = io.StringIO()
    progress = Progress(100, "slices", every=10, stream=stream)
    progress.advance(units=9)
    assert stream.getvalue() == ""
    progress.advance(units=25)
    progress.advance(units=66)
    counts = [line.split()[0] for line in stream.getvalue().splitlines()]
    assert counts == ["34/100", "100/100"]


def test_a_resumed_job_counts_on_and_tells_the_time_left_from_this_run(monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr("nnunetv2_meddinov3.progress.time.monotonic", lambda: clock[0])
    progress = Progress(1000, "steps", done=600)
    assert progress.line() == "600/1000 steps, 0:00:00 left"
    clock[0] += 50
    progress.advance(units=100)  # 2 a second: 300 left take 150 s
    assert progress.line("loss 3.2") == "700/1000 steps, loss 3.2, 0:02:30 left"


def test_hours_are_told(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("nnunetv2_meddinov3.progress.time.monotonic", lambda: clock[0])
    progress = Progress(101, "epochs")
    clock[0] += 100
    progress.advance()
    assert progress.line() == "1/101 epochs, 2:46:40 left"


def test_without_a_total_units_are_counted():
    stream = io.StringIO()
    with Progress(None, "epochs", stream=stream) as progress:
        progress.advance("loss 1")
        progress.advance("loss 2")
    assert stream.getvalue().splitlines() == ["1 epochs, loss 1", "2 epochs, loss 2"]


def test_without_a_stream_nothing_is_written(capfd):
    with Progress(2, "volumes") as progress:
        progress.advance()
        progress.say("a line")
    assert capfd.readouterr() == ("", "")
    assert progress.done == 1


def test_a_line_of_its_own_is_written_as_it_is():
    stream = io.StringIO()
    Progress(2, "volumes", stream=stream).say("a.nii: left out")
    assert stream.getvalue() == "a.nii: left out\n"


PROGRAM = """
import sys
from nnunetv2_meddinov3.progress import Progress
with Progress(3, "volumes", title="curate", stream=sys.stderr) as progress:
    progress.advance("loss 1")
    progress.say("a.nii: left out")
    progress.advance("loss 2")
    progress.advance()
sys.stderr.write("the end\\n")
"""


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
def test_on_a_terminal_one_bar_is_redrawn_and_lines_stand_above_it():
    import fcntl
    import pty
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    with subprocess.Popen([sys.executable, "-c", PROGRAM], stderr=theirs) as process:
        os.close(theirs)
        shown = b""
        try:
            while chunk := os.read(ours, 4096):
                shown += chunk
        except OSError:  # Linux: the other end is closed
            pass
        os.close(ours)
    assert process.returncode == 0
    lines = shown.decode().split("\r\n")
    assert [line.split("\r")[-1].split("|")[0] for line in lines] == [
        "a.nii: left out",
        "curate: 100%",
        "the end",
        "",
    ]
    assert "3/3" in lines[1].split("\r")[-1]
    assert "loss 2" in lines[1].split("\r")[-1]  # the last facts stay
    assert "3/3 volumes" not in shown.decode()  # no lines beside the bar


def test_the_same_program_writes_lines_into_a_pipe():
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, timeout=60
    )
    assert run.stdout == ""
    assert [line.split(",")[0] for line in run.stderr.splitlines()] == [
        "curate: 1/3 volumes",
        "a.nii: left out",
        "curate: 2/3 volumes",
        "curate: 3/3 volumes",
        "the end",
    ]
