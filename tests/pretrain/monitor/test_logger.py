import csv
import io

import pytest

from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.pretrain.monitor.logger import MetricsLog, read_rows
from nnunetv2_meddinov3.pretrain.monitor.step_progress import StepProgress


def table(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_rows_go_to_both_files_at_once(tmp_path):
    log = MetricsLog(tmp_path)
    log.write({"step": 1, "loss": 2.5})
    log.write({"step": 2, "loss": 2.25})
    assert read_rows(tmp_path / "metrics.jsonl") == [
        {"step": 1, "loss": 2.5},
        {"step": 2, "loss": 2.25},
    ]
    assert table(tmp_path) == [{"step": "1", "loss": "2.5"}, {"step": "2", "loss": "2.25"}]


def test_a_new_column_gets_a_header_and_earlier_rows_stay(tmp_path):
    log = MetricsLog(tmp_path)
    log.write({"step": 1, "loss": 2})
    log.write({"step": 2, "loss": 1, "gram": 0.5})
    log.write({"step": 3, "loss": 1, "gram": 0.25})
    assert [row["gram"] for row in table(tmp_path)] == ["", "0.5", "0.25"]


def test_a_resume_drops_later_rows_and_a_torn_last_line(tmp_path):
    log = MetricsLog(tmp_path)
    for step in range(1, 6):
        log.write({"step": step, "loss": step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    log = MetricsLog(tmp_path, resume_step=3)
    log.write({"step": 4, "loss": 40})
    assert [row["loss"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3, 40]
    assert [row["loss"] for row in table(tmp_path)] == ["1", "2", "3", "40"]


def test_a_full_disk_is_said_once_and_the_run_goes_on(tmp_path, monkeypatch, caplog):
    log = MetricsLog(tmp_path)
    log.write({"step": 1})

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.open", full)
    log.write({"step": 2})
    log.write({"step": 3})
    assert caplog.text.count("No space left on device") == 1


@pytest.mark.parametrize(
    ("option", "package"), [("tensorboard", "tensorboard"), ("wandb", "wandb")]
)
def test_a_missing_extra_is_one_sentence(tmp_path, option, package, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=f"pip install {package}"):
        MetricsLog(tmp_path, **{option: "project" if option == "wandb" else True})


def test_progress_is_a_line_every_logged_step_without_a_terminal():
    stream = io.StringIO()
    progress = StepProgress(total=20, done=0, every=10, stream=stream, title="stage 1")
    for step in range(1, 21):
        progress.update(step, 5.0 if step % 10 == 0 else None, 7.0)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2
    assert lines[1].startswith("stage 1: step 20/20, loss 5.0000, 7.0 images/s, 0:00:00 left")


def test_progress_is_a_bar_on_a_terminal():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    progress = StepProgress(total=4, done=2, every=1, stream=stream, title="stage 2")
    progress.update(3, 1.0, 9.0)
    progress.say("a sentence")
    progress.close()
    assert "stage 2" in stream.getvalue()
    assert "a sentence" in stream.getvalue()
    assert "3/4" in stream.getvalue()
