import sys

import pytest

from nnunetv2_meddinov3.errors import UserError
from nnunetv2_meddinov3.files import read_rows
from nnunetv2_meddinov3.pretrain.monitor.logger import MetricsLogger, StepRows


def test_rows_are_on_the_disk_as_soon_as_they_are_written(tmp_path):
    log = MetricsLogger(tmp_path / "stage1")
    log.write({"step": 1, "loss": 2.5})
    log.write({"step": 2, "loss": 2.25, "gram": 0.5})
    assert read_rows(tmp_path / "stage1/metrics.jsonl") == [
        {"step": 1, "loss": 2.5},
        {"step": 2, "loss": 2.25, "gram": 0.5},
    ]
    assert [path.name for path in (tmp_path / "stage1").iterdir()] == ["metrics.jsonl"]


def test_a_resume_drops_later_rows_and_a_torn_last_line(tmp_path):
    log = MetricsLogger(tmp_path)
    for step in range(1, 6):
        log.write({"step": step, "loss": step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    log = MetricsLogger(tmp_path, resume_step=3)
    log.write({"step": 4, "loss": 40})
    assert [row["loss"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3, 40]


def test_a_full_disk_is_said_once_and_the_run_goes_on(tmp_path, monkeypatch, caplog):
    log = MetricsLogger(tmp_path)
    log.write({"step": 1})

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.open", full)
    log.write({"step": 2})
    log.write({"step": 3})
    assert caplog.text.count("No space left on device") == 1


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/stage1 must be writable"):
        StepRows(tmp_path / "file" / "stage1" / "health.jsonl", 0)


@pytest.mark.parametrize(
    ("option", "package"), [("tensorboard", "tensorboard"), ("wandb", "wandb")]
)
def test_a_missing_extra_is_one_sentence_before_anything_is_written(
    tmp_path, option, package, monkeypatch
):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=f"pip install {package}"):
        MetricsLogger(tmp_path / "stage1", **{option: "project" if option == "wandb" else True})
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_and_wandb_get_every_row_and_are_closed_once(tmp_path, events):
    with MetricsLogger(tmp_path, tensorboard=True, wandb="ct", name="run-stage1") as log:
        log.write({"step": 3, "loss": 2.5, "note": "words"})
        log.close()
        log.close()
    assert events[0] == ("tensorboard", "open", str(tmp_path / "tensorboard"))
    assert events[1][:2] == ("wandb", "init")
    assert vars(events[1][2]) == {
        "project": "ct",
        "name": "run-stage1",
        "dir": str(tmp_path),
        "id": (tmp_path / "wandb_id").read_text().strip(),
        "resume": "allow",
    }
    written = {("tensorboard", "loss", (3, 2.5)), ("wandb", "log", 3)}
    assert set(events[2:4]) == written
    assert sorted(events[4:]) == [("tensorboard", "close", None), ("wandb", "finish", 0)]


def test_an_error_closes_both_and_marks_the_run_as_failed(tmp_path, events):
    with (
        pytest.raises(RuntimeError, match="out of memory"),
        MetricsLogger(tmp_path, tensorboard=True, wandb="ct"),
    ):
        raise RuntimeError("out of memory")
    assert ("wandb", "finish", 1) in events
    assert ("tensorboard", "close", None) in events


def test_tensorboard_is_closed_where_wandb_cannot_start(tmp_path, events, monkeypatch):
    def fail(**facts):
        raise ConnectionError("no network")

    monkeypatch.setattr(sys.modules["wandb"], "init", fail)
    with pytest.raises(ConnectionError):
        MetricsLogger(tmp_path, tensorboard=True, wandb="ct")
    assert [what for _, what, _ in events] == ["open", "close"]


def ids(events):
    return [facts.id for _, what, facts in events if what == "init"]


def test_a_resumed_stage_continues_its_run_and_a_new_start_begins_another(tmp_path, events):
    for folder, step in (("a", 0), ("a", 4), ("a", 8), ("a", 0), ("b", 0), ("c", 2)):
        MetricsLogger(tmp_path / folder, step, wandb="ct").close()
    first, resumed, again, anew, other, without_a_file = ids(events)
    assert first == resumed == again
    assert len({first, anew, other, without_a_file}) == 4
