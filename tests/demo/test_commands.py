"""Running other commands: what is shown, what is logged, how a failure is told."""

import io
import os
import re
import stat
import sys

import pytest

from nnunetv2_meddinov3.demo import commands
from nnunetv2_meddinov3.errors import UserError


@pytest.fixture
def fake_command(tmp_path, monkeypatch):
    """A command on PATH that runs the given Python."""
    if os.name == "nt":
        pytest.skip("makes a POSIX executable")

    def make(body):
        path = tmp_path / "bin" / "fake_nnunet"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!{sys.executable}\nimport os, sys\n{body}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", str(path.parent), prepend=os.pathsep)
        return path.name

    return make


TRAINING = """
for epoch in range(2):
    print(f"2026-01-01 00:00:00.000000: Epoch {epoch}")
    print(f"2026-01-01 00:00:00.000000: train_loss -0.{epoch + 1}")
    print("2026-01-01 00:00:00.000000: Pseudo dice [np.float32(0.25), np.float32(0.75), nan]")
    print("2026-01-01 00:00:00.000000: Epoch time: 3.25 s")
print(os.environ["GREETING"], sys.argv[1:])
"""


def test_a_step_shows_the_command_and_its_epochs_and_logs_everything(
    fake_command, tmp_path, capsys
):
    (tmp_path / "debug.json").write_text('{"num_epochs": "2"}')
    log = tmp_path / "logs" / "train.log"
    command = [fake_command(TRAINING), "900", "a b"]
    commands.run_step("Train", command, {**os.environ, "GREETING": "hi"}, log, tmp_path)
    shown = capsys.readouterr().out.splitlines()
    assert shown[1:3] == ["Train", "  $ fake_nnunet 900 'a b'"]
    assert shown[3:5] == [
        "  trained: 1/2 epochs, loss -0.1, pseudo Dice 0.500, s per epoch 3.25, 0:00:00 left",
        "  trained: 2/2 epochs, loss -0.2, pseudo Dice 0.500, s per epoch 3.25, 0:00:00 left",
    ]
    assert shown[5].startswith("  done in")
    assert log.read_text().count("\n") == 9
    assert "hi ['900', 'a b']" in log.read_text()


def test_epochs_are_counted_where_nnunet_does_not_say_how_many(fake_command, tmp_path, capsys):
    environment = {**os.environ, "GREETING": "hi"}
    commands.run_step("Train", [fake_command(TRAINING)], environment, tmp_path / "log", tmp_path)
    shown = capsys.readouterr().out.splitlines()
    assert shown[4] == "  trained: 2 epochs, loss -0.2, pseudo Dice 0.500, s per epoch 3.25"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_on_a_terminal_a_bar_of_epochs_is_redrawn(fake_command, tmp_path, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    (tmp_path / "debug.json").write_text('{"num_epochs": "2"}')
    environment = {**os.environ, "GREETING": "hi"}
    body = f"print('Unpacking')\n{TRAINING}"
    commands.run_step("Train", [fake_command(body)], environment, tmp_path / "log", tmp_path)
    redrawn = re.split(r"\r(?:\x1b\[K)?", terminal.getvalue())
    assert "  Unpacking" in redrawn
    assert any(re.match(r"  trained:\s+0%.* 0/2 ", line) for line in redrawn)
    assert any(
        re.match(r"  trained: 100%.* 2/2 .*loss -0\.2, pseudo Dice", line) for line in redrawn
    )
    assert "  hi []" in redrawn  # after the last epoch nnU-Net goes on, and its lines are shown
    assert terminal.getvalue().count("\n") == 5  # blank, title, command, bar, done


def test_on_a_terminal_a_step_without_epochs_shows_its_last_line(
    fake_command, tmp_path, monkeypatch
):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    body = "for case in range(3): print('case', case)"
    commands.run_step("Predict", [fake_command(body)], os.environ, tmp_path / "log")
    assert re.findall(r"\r\x1b\[K  (case \d)", terminal.getvalue()) == [
        "case 0",
        "case 1",
        "case 2",
    ]
    assert terminal.getvalue().count("\n") == 4  # blank, title, command, done


def test_a_failing_step_tells_its_last_words_and_where_its_log_is(fake_command, tmp_path):
    body = "for i in range(40): print('line', i)\nsys.exit('out of luck')"
    log = tmp_path / "plan.log"
    with pytest.raises(UserError) as raised:
        commands.run_step("Plan", [fake_command(body)], os.environ, log)
    first, *last = str(raised.value).splitlines()
    assert first.startswith("fake_nnunet failed with exit code 1")
    assert str(log) in first
    assert last[-1] == "  | out of luck"
    assert len(last) == commands.TAIL_LINES
    assert "line 0\n" in log.read_text()


def test_a_missing_command_is_named():
    with pytest.raises(UserError, match="nnUNetv2_nonsense must be installed"):
        commands.find_command("nnUNetv2_nonsense")
